"""What `--help` prints: what a program does, with examples, then its own flags in groups."""

import ast
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

CONFIGS = Path(__file__).parents[1] / "configs"  # the recipes, in a checkout and in an installation
COLUMN = 27  # where explanations begin
# What stands for a value, by the kind of a flag; an enum shows its words.
KINDS = {"int": "N", "float": "X", "string": "TEXT", "multi string": "TEXT", "config object": "NAME"}
KINDS["comma separated list of strings"] = "A,B,..."
ABSL = re.compile(r"^<[^>]*>: |;\s+repeat this option to specify a list of values$")  # what absl adds to help texts


def page(about: str, own: Sequence[flags.Flag], groups: Mapping[str, Sequence[str]], width: int = 100) -> str:
    """The help of a program.

    about: its docstring. own: its flags. groups: title -> names of flags; the flags in no group come first.
    """
    by_name = {flag.name: flag for flag in own}
    grouped = {name for names in groups.values() for name in names}
    parts = [about.strip(), "Flags:\n" + _lines([flag for name, flag in by_name.items() if name not in grouped], width)]
    for title, names in groups.items():
        if found := [by_name[name] for name in names if name in by_name]:
            parts.append(f"{title}:\n{_lines(found, width)}")
    if "config" in by_name:
        rows = [_row(f"  {name}", said, width) for name, said in recipes().items()]
        parts.append("\n".join(["Recipes, for --config=NAME or --config=NAME:VARIANT:", *rows]))
    return "\n\n".join(parts)


def _lines(found: Sequence[flags.Flag], width: int) -> str:
    """A row for each flag."""
    return "\n".join(_row(f"  --{_form(flag)}", _said(flag), width) for flag in found)


def _form(flag: flags.Flag) -> str:
    """How a flag is written, such as `steps=N`."""
    kind = flag.flag_type()
    if kind == "bool":
        return flag.name
    if kind == "string enum" and len(words := "|".join(flag.parser.enum_values)) <= COLUMN - len(flag.name) - 6:
        return f"{flag.name}={words}"
    if (flag.help or "").startswith("Directory"):
        return f"{flag.name}=DIR"
    return f"{flag.name}={KINDS.get(kind, 'NAME')}"


def _said(flag: flags.Flag) -> str:
    """What a flag does, with the words that it may be and its default."""
    said = ABSL.sub("", " ".join((flag.help or "").split()))
    parts = [said if said.endswith(".") else f"{said}."]
    words = flag.parser.enum_values if flag.flag_type() == "string enum" and "|" not in _form(flag) else []
    if unnamed := [word for word in words if word not in said]:
        parts.append(f"One of {', '.join(unnamed)}.")
    if flag.default not in (None, False, [], ""):
        parts.append(f"Default: {flag.serialize().partition('=')[2]}.")
    return " ".join(parts)


def _row(head: str, said: str, width: int) -> str:
    """A name and its explanation, side by side, or one below the other if the name is long."""
    below = textwrap.wrap(said, width - COLUMN) or [""]
    first = f"{head:<{COLUMN}}" if len(head) < COLUMN - 1 else f"{head}\n{'':{COLUMN}}"
    return "\n".join([f"{first}{below[0]}", *(f"{'':{COLUMN}}{line}" for line in below[1:])]).rstrip()


def recipes() -> dict[str, str]:
    """The configs that are installed with the package: name -> the first line of its docstring."""
    found = {}
    for file in sorted(CONFIGS.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
    return found
