"""What every key of a config means: its value, its type and range, and what it does.

Meanings come from where they are written: the docstring of a factory, and the comments of configs/default.py.
"""

import ast
import contextlib
import importlib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diversedit_jax.config import plain
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_words, nearest, options
from diversedit_jax.runs.check import KEYS, Part, parts_of
from diversedit_jax.runtime.help_page import CONFIGS

INDENT = " " * 6  # of meanings


class Key(NamedTuple):
    """A key of a config. name: dotted, without `config`. default: of its factory; `value` if it has none."""

    name: str
    value: Any
    default: Any
    allowed: str
    meaning: str


def text(config: ConfigDict, wanted: str = "", width: int = 100) -> str:
    """The keys of a config, or those below the dotted key `wanted`, with their meanings. ConfigError if it has none."""
    wanted = wanted.removeprefix("config").strip(".")
    blocks, found = [], []
    for part in parts_of(config):
        place = part.place.removeprefix("config").removeprefix(".")
        keys = list(explained(part, place))
        found += [place, *(key.name for key in keys)]
        chosen = [key for key in keys if f"{key.name}.".startswith(f"{wanted}.") or not wanted]
        if chosen:
            about = _first_line(part.build) if part.build is not None and len(chosen) == len(keys) else ""
            name = f" = {part.given.name}" if "name" in part.given and part.build is not None else ""
            head = f"config.{place}{name}" if place else "config"
            title = textwrap.wrap(f"{head}: {about}" if about else head, width)
            blocks.append("\n".join([*title, *(_row(key, place, width) for key in chosen)]))
    if not blocks:
        raise ConfigError(f"--explain={wanted}: no key {wanted!r}; {nearest(wanted, filter(None, found))}")
    return "\n\n".join(blocks)


def explained(part: Part, place: str) -> Iterator[Key]:
    """The keys of a part of a config."""
    meanings = comments() if part.build is None else documented(part.build)
    ranges = {} if part.build is None else limits(part.build)
    parameters = {} if part.build is None else options(part.build)
    for name, value in part.given.items():
        key = f"{place}.{name}".lstrip(".")
        if isinstance(value, ConfigDict) or name == "name":
            continue
        if key in KEYS:
            kind, limit = KEYS[key]
            yield Key(key, value, value, f"{in_words(kind)}{_between(limit)}", meanings.get(key, ""))
        elif name in parameters:
            kind, default = parameters[name].annotation, parameters[name].default
            default = None if default is inspect.Parameter.empty else default
            allowed = ranges.get(name, "")
            allowed = allowed if allowed.startswith("one of") else f"{in_words(kind)}{allowed}"
            yield Key(key, value, default, allowed, meanings.get(name, ""))
        else:
            yield Key(key, value, value, "", meanings.get(name, OTHERS.get(name, "")))


# Keys that the program adds to the options of a factory.
OTHERS = {
    "every": "Interval in steps; 0: only at the end of the run.",
    "of": "Pattern of the names of the parameters that this optimizer is for.",
}


def _row(key: Key, place: str, width: int) -> str:
    """A key: its value, then what it may be and what it does, below and indented."""
    name = key.name.removeprefix(f"{place}.") if place else key.name
    changed = f"    (default {key.default!r})" if key.value != key.default else ""
    meaning = f"{key.meaning[:1].upper()}{key.meaning[1:]}"
    about = f"{key.allowed}. {meaning}" if key.allowed else meaning
    rows = textwrap.wrap(about, width, initial_indent=INDENT, subsequent_indent=INDENT)
    return "\n".join([f"  {name} = {plain(key.value)!r}{changed}", *rows])


def _between(limit: Mapping[str, int | float]) -> str:
    """Limits of a number in words, such as `, at least 0`."""
    words = {"low": "at least", "above": "more than", "high": "at most", "below": "less than"}
    given = [f"{word} {limit[name]:g}" for name, word in words.items() if name in limit and limit[name] < 2**20]
    return f", {' and '.join(given)}" if given else ""


def _first_line(build: Callable) -> str:
    return (inspect.getdoc(build) or "").partition("\n\n")[0].replace("\n", " ")


def documented(build: Callable) -> dict[str, str]:
    """option -> meaning, from the docstring of a factory, and from those that it names in backquotes."""
    names, found = list(options(build)), {}
    for source in (*named_by(build), build):
        said = meanings(inspect.getdoc(source) or "", names)
        found |= {name: text for name, text in said.items() if not text.lower().startswith("see `")}
    return found


def named_by(build: Callable, known: frozenset = frozenset()) -> Iterator[Callable]:
    """The functions and classes that a docstring names in backquotes, and those that these name, the nearest last."""
    for word in re.findall(r"`([\w.]+)`", inspect.getdoc(build) or ""):
        module, _, last = word.rpartition(".")
        with contextlib.suppress(ImportError):
            place = importlib.import_module(f"diversedit_jax.{module}") if module else inspect.getmodule(build)
            other = getattr(place, last, None)
            if (inspect.isfunction(other) or inspect.isclass(other)) and other not in known:
                yield from named_by(other, known | {build})
                yield other


def meanings(doc: str, names: list[str]) -> dict[str, str]:
    """name -> what a docstring says of it: `name: text`, `name, name: text`, several on a line or on several lines."""
    one = "|".join(map(re.escape, names)) or "$."
    known = rf"(?<=\. )(?:{one})(?:,\s+(?:{one}))*"
    start = re.compile(rf"(^[ ]*\w+(?:,\s+\w+)*|{known}):\s+", re.MULTILINE)
    heads, found = list(start.finditer(doc)), {}
    ends = [head.start() for head in heads[1:]] + [len(doc)]
    for head, end in zip(heads, ends, strict=True) if heads else ():
        said = doc[head.end() : end].partition("\n\n")[0]
        found |= {name: " ".join(said.split()) for name in re.findall(r"\w+", head[1]) if name in names}
    return found


def limits(build: Callable) -> dict[str, str]:
    """option -> its range in words, from the calls of `in_range` and `one_of` in a factory and in what it names."""
    found: dict[str, str] = {}
    for source in (*filter(inspect.isfunction, named_by(build)), build):
        found |= _limits(source, options(build))
    return found


def _limits(build: Callable, names: Mapping[str, Any]) -> dict[str, str]:
    """`limits`, from the calls in this function alone."""
    found = {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(build)))
    except (OSError, SyntaxError):  # a factory without a source
        return {}
    scope = vars(inspect.getmodule(build))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1):
            continue
        read = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)} & set(names)
        if len(read) != 1 or node.func.id not in ("in_range", "one_of"):
            continue
        try:
            rest = [eval(compile(ast.Expression(part), "", "eval"), scope) for part in node.args[2:]]
            more = {part.arg: eval(compile(ast.Expression(part.value), "", "eval"), scope) for part in node.keywords}
        except NameError:  # a limit that depends on other options
            continue
        if node.func.id == "one_of":
            found[read.pop()] = f"one of {', '.join(map(str, rest[0]))}"
        else:
            given = dict(zip(("low", "high"), rest, strict=False)) | more
            found[read.pop()] = _between({name: limit for name, limit in given.items() if math.isfinite(limit)})
    return found


def comments() -> dict[str, str]:
    """dotted key -> the comment beside it in configs/default.py."""
    found, inside = {}, ""
    for line in (CONFIGS / "default.py").read_text(encoding="utf-8").splitlines():
        code, _, comment = line.partition("  # ")
        if outer := re.match(r"    config\.(\w+) = ", code):
            inside, name = outer[1], outer[1]
        elif inner := re.match(r'            "(\w+)": ', code):
            name = f"{inside}.{inner[1]}"
        else:
            continue
        if comment:
            found[name] = comment.strip()
    found |= {key: found[key.partition(".")[0]] for key in KEYS if key not in found and key.partition(".")[0] in found}
    return found
