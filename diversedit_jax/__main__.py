"""What there is: the programs, by name. The command `diversedit` is the same."""

import ast
import runpy
import sys
from pathlib import Path

import diversedit_jax
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import one_of

PROGRAMS = ("train", "sample", "evaluate", "analyze")


def main() -> None:
    """Run the program that the first argument names, with the others. Without arguments: list the programs."""
    name, *others = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(overview())
    elif name == "--version":
        print(diversedit_jax.__version__)
    else:
        try:
            one_of("program", name, PROGRAMS)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        sys.argv[1:] = others
        runpy.run_module(f"diversedit_jax.{name}", run_name="__main__", alter_sys=True)


def overview() -> str:
    """The programs with what they do, and where to read on."""
    rows = [f"  diversedit {name:<10}{said(name)}" for name in PROGRAMS]
    return "\n".join(
        [
            f"diversedit_jax {diversedit_jax.__version__}: {diversedit_jax.__doc__.splitlines()[0]}",
            "",
            *rows,
            "",
            "Start with: diversedit train --config=digits --workdir=runs/digits",
            "Each explains itself: diversedit train --help. `python -m diversedit_jax.train` is the same program.",
            "From Python: import diversedit_jax; help(diversedit_jax)",
        ]
    )


def said(name: str) -> str:
    """The first line of a program's docstring. The program is not imported, which takes seconds."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    return ast.get_docstring(tree).splitlines()[0]


if __name__ == "__main__":
    main()
