"""Names to factories: `losses.diversity` is the function `make` of the module `diversedit_jax.losses.diversity`.

The signature of a factory is the one place where its options, their types and their defaults are written. A path such
as `my_project.my_loss:make` names a factory outside this package: a function `make`, or `make_NAME`. `fits`, `one_of`
and `in_range` check options.
"""

import collections.abc
import difflib
import importlib.util
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from diversedit_jax.errors import ConfigError

OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:make(_\w+)?")  # a factory outside this package
INT32, UINT32 = 2**31 - 1, 2**32 - 1  # the largest integers on devices; a seed may be up to UINT32
MANY = 2**20  # more is a mistake: examples of a batch, channels, steps of a solver
TINY, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the smallest and the largest number of float32
UNIONS, TUPLES = (types.UnionType, typing.Union), (tuple, collections.abc.Sequence)  # kinds of types
OPEN = ((), (...,))  # what follows the first type in `Sequence[int]` and in `tuple[int, ...]`
WORDS = {int: "a whole number", float: "a number", str: "a word", bool: "True or False", types.NoneType: "None"}


def known(slot: str) -> list[str]:
    """The names in a slot such as `losses`: its modules with a factory."""
    package = importlib.import_module(f"diversedit_jax.{slot}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "make")]


def suggestion(given: Any, candidates: Iterable[Any]) -> str:
    """A hint for a mistyped name: the nearest candidate, and all of them."""
    candidates = list(map(str, candidates))
    known = f"known: {', '.join(candidates)}"
    hint = nearest(given, candidates)
    return hint if hint == known else f"{hint} {known}"


def nearest(given: Any, candidates: Iterable[Any]) -> str:
    """A shorter hint for a mistyped name: the nearest candidate, or all of them if none is near."""
    candidates = list(map(str, candidates))
    close = difflib.get_close_matches(str(given), candidates, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(candidates)}"


def one_of(option: str, value: Any, choices: Iterable[Any]) -> Any:
    """`value`, if it is one of the choices. Else a ConfigError names `option`, the nearest choice and all others."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"{option} = {value!r:.80} is unknown; {suggestion(value, choices)}")
    return value


def in_range(
    option: str,
    value: int | float,
    low: int | float = -math.inf,
    high: int | float = math.inf,
    *,
    above: int | float = -math.inf,
    below: int | float = math.inf,
) -> Any:
    """`value`, if it is finite, low <= value <= high and above < value < below. Else ConfigError names the limits."""
    if not (low <= value <= high and above < value < below and math.isfinite(value)):
        limits = {"at least": low, "more than": above, "at most": high, "less than": below}
        given = {word: limit for word, limit in limits.items() if math.isfinite(limit)}
        wanted = " and ".join(f"{word} {x if isinstance(x, int) else f'{x:g}'}" for word, x in given.items())
        raise ConfigError(f"{option} = {value}: must be {wanted or 'finite'}")
    return value


def representable(option: str, value: Any, most: int = INT32) -> None:
    """Raise ConfigError, which names `option`, if devices have no such number: not finite, too large, too near to 0.

    value: also a tuple of numbers; anything else passes. most: the largest integer.
    """
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, tuple | list):
            representable(option, part, most)
        elif isinstance(part, float) and not math.isfinite(part):
            raise ConfigError(f"{option} = {value}: must be finite")
        elif isinstance(part, int) and not -INT32 <= part <= most:
            raise ConfigError(f"{option} = {value}: must be at most {most} in size")
        elif isinstance(part, float) and part and not TINY <= abs(part) <= LARGEST:
            raise ConfigError(f"{option} = {value}: must be 0, or {TINY:.2g} to {LARGEST:.2g} in size, as float32 is")


def fits(option: str, value: Any, wanted: Any, most: int = INT32) -> None:
    """Raise ConfigError, which names `option`, if a value is not of the type `wanted`, as annotations write it.

    It knows int, float, bool, str, None, tuples of them and alternatives (`int | None`). Any other type is not checked.
    A word is not empty. most: the largest integer, see `representable`.
    """
    if not _is(value, wanted):
        raise ConfigError(f"{option} = {value!r:.80}: must be {in_words(wanted)}")
    representable(option, value, most)


def _is(value: Any, wanted: Any) -> bool:
    """Whether a value is of a type. An int is a float, too; a bool is neither. A list counts as a tuple."""
    kind, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if kind in UNIONS:
        return any(_is(value, one) for one in parts)
    if kind is typing.Literal:
        return value in parts
    if kind in TUPLES:
        if not isinstance(value, tuple | list):
            return False
        each = parts[:1] * len(value) if parts[1:] in OPEN else parts
        return len(value) == len(each) and all(_is(part, one) for part, one in zip(value, each, strict=True))
    if wanted in (int, float):
        return isinstance(value, int if wanted is int else int | float) and not isinstance(value, bool)
    if wanted is str:
        return isinstance(value, str) and value != "" and "\0" not in value  # no file's name has a \0
    return wanted not in WORDS or isinstance(value, wanted)


def in_words(wanted: Any) -> str:
    """A type in words."""
    kind, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if kind is typing.Literal:
        return " or ".join(map(repr, parts))
    if kind in UNIONS:
        return " or ".join(map(in_words, parts))
    if kind in TUPLES:
        return f"({', '.join('...' if one is ... else in_words(one) for one in parts)})"
    return WORDS[wanted]


def factory(slot: str, name: str) -> Callable:
    """The factory with this name in `slot`. ConfigError for an unknown name lists the known ones.

    A factory outside this package must declare itself by its name, see OUTSIDE. Nothing is imported for another name.
    """
    if ":" in name:
        if not OUTSIDE.fullmatch(name):
            raise ConfigError(f"{slot}: {name!r} is no factory: wanted MODULE:make, or MODULE:make_NAME")
        path, _, function = name.partition(":")
        try:
            made = getattr(importlib.import_module(path), function)
        except Exception as error:
            kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
            where = "a module lies beside the config file, in the folder above it, or where Python finds it"
            raise ConfigError(f"{slot}: cannot load {name!r}: {kind}{' '.join(str(error).split())}; {where}") from error
        if not callable(made):
            raise ConfigError(f"{slot}: {name!r} is no function")
        return made
    package = importlib.import_module(f"diversedit_jax.{slot}")
    if name.isidentifier() and importlib.util.find_spec(f"{package.__name__}.{name}"):
        module = importlib.import_module(f"{package.__name__}.{name}")
        if hasattr(module, "make"):
            return module.make
    raise ConfigError(f"{slot}: unknown name {name!r}; {suggestion(name, known(slot))}")


def options(make: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a factory. A config may set them."""
    parameters = inspect.signature(make).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def make(slot: str, name: str, *args, **kwargs: Any) -> Any:
    """Call a factory. The program gives the positional arguments, the config the keywords."""
    build = factory(slot, name)
    for key in kwargs:
        if key not in options(build):
            raise ConfigError(f"{slot}.{name}: no option {key!r}; {suggestion(key, options(build))}")
        representable(key, kwargs[key])
    return build(*args, **kwargs)
