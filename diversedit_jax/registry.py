"""Names to factories: `losses.diversity` is the function `make` of the module `diversedit_jax.losses.diversity`.

The signature of a factory is the one place where its options and their defaults are written. A path such as
`my_project.my_loss:make` names a factory outside this package. `one_of` and `in_range` check options.
"""

import difflib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from diversedit_jax.errors import ConfigError


def known(slot: str) -> list[str]:
    """The names in a slot such as `losses`: its modules with a factory."""
    package = importlib.import_module(f"diversedit_jax.{slot}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "make")]


def suggestion(given: Any, candidates: Iterable[Any]) -> str:
    """A hint for a mistyped name: the nearest candidate, and all of them."""
    candidates = list(map(str, candidates))
    close = difflib.get_close_matches(str(given), candidates, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(candidates)}"


def one_of(option: str, value: Any, choices: Iterable[Any]) -> Any:
    """`value`, if it is one of the choices. Else a ConfigError names `option`, the nearest choice and all others."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"{option} = {value!r} is unknown; {suggestion(value, choices)}")
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
        wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
        raise ConfigError(f"{option} = {value}: must be {wanted or 'finite'}")
    return value


def finite(option: str, value: Any) -> None:
    """Raise ConfigError, which names `option`, if a number in `value` is not finite. Tuples may hold numbers."""
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, float) and not math.isfinite(part):
            raise ConfigError(f"{option} = {value}: must be finite")


def factory(slot: str, name: str) -> Callable:
    """The factory with this name in `slot`. ConfigError for an unknown name lists the known ones."""
    if ":" in name:
        path, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(path), function)
        except (ImportError, AttributeError) as error:
            where = "a module lies beside the config file, in the folder above it, or where Python finds it"
            raise ConfigError(f"{slot}: cannot load {name!r}: {error}; {where}") from None
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
        finite(key, kwargs[key])
    return build(*args, **kwargs)
