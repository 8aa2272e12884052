"""Names to factories: `losses.diversity` is the function `make` of the module `diversedit_jax.losses.diversity`.

A factory's signature is the one place where its options and their defaults are written. A dotted path that ends in
`:function` names a factory outside this package, for example `my_project.my_loss:make`.
"""

import difflib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from diversedit_jax.errors import ConfigError


def known(slot: str) -> list[str]:
    """The names that a slot such as `losses` knows: its modules that have a factory."""
    package = importlib.import_module(f"diversedit_jax.{slot}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "make")]


def suggestion(given: str, candidates: Iterable[str]) -> str:
    """A sentence that helps after a mistyped name."""
    candidates = list(candidates)
    close = difflib.get_close_matches(given, candidates, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(candidates)}"


def factory(slot: str, name: str) -> Callable:
    """The factory that `name` stands for in `slot`; an unknown name is an error that lists the known ones."""
    if ":" in name:
        path, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(path), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{slot}: cannot load {name!r}: {error}") from None
    package = importlib.import_module(f"diversedit_jax.{slot}")
    if name.isidentifier() and importlib.util.find_spec(f"{package.__name__}.{name}"):
        module = importlib.import_module(f"{package.__name__}.{name}")
        if hasattr(module, "make"):
            return module.make
    raise ConfigError(f"{slot}: unknown name {name!r}; {suggestion(name, known(slot))}")


def options(make: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a factory: those that a config may set."""
    parameters = inspect.signature(make).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def make(slot: str, name: str, *args, **kwargs: Any) -> Any:
    """Build what `name` stands for in `slot`. Positional arguments come from the program, keywords from the config."""
    build = factory(slot, name)
    for key in kwargs:
        if key not in options(build):
            raise ConfigError(f"{slot}.{name}: no option {key!r}; {suggestion(key, options(build))}")
    return build(*args, **kwargs)
