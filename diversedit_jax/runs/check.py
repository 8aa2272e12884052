"""What the config of a run must be: its keys, their types, the ranges of its numbers. Nothing is built to check it."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax.config import LABELED, OPTIONAL, RESERVED, SINGLE
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import INT32, MANY, UINT32, fits, in_range, nearest, options
from diversedit_jax.runtime import loggers, profiler
from diversedit_jax.sampling import sampler
from diversedit_jax.training import optimizer
from diversedit_jax.weights.dit import FAMILIES

# Every key that is no option of a factory: its type, and the range of its number for `in_range`. Runs that were stored
# before a key was added need a value for it, see `config.LATER`.
KEYS: dict[str, tuple[Any, dict[str, int | float]]] = {
    "seed": (int, {"low": 0, "high": UINT32}),
    "ema_decay": (float, {"low": 0, "below": 1}),
    "watchdog": (float, {"low": 0, "high": INT32}),
    "profile": (Literal[""] | str, {}),
    "loggers": (Literal[""] | str, {}),
    "mesh.rules": (Sequence[tuple[str, str]], {}),
    "checkpoint.metric": (str | None, {}),
    "checkpoint.lower": (bool, {}),
    "init_from.heads": (int | None, {"low": 1}),
    "init_from.fresh": (tuple[str, ...], {}),
    "init_from.trust": (bool, {}),
}
KEYS |= {key: (int, {"low": 1}) for key in ("total_steps", "log_every", "checkpoint.keep")}
KEYS |= {key: (int, {"low": 1, "high": MANY}) for key in ("batch_size", "accumulate")}
KEYS |= {key: (int, {"low": 0}) for key in ("max_skipped", "samples.every")}
KEYS |= {f"checkpoint.{key}": (int, {"low": 0}) for key in ("every", "keep_every", "best")}
KEYS["samples.num"] = (int, {"low": 0, "high": MANY})
KEYS |= {f"init_from.{key}": (str | None, {}) for key in ("file", "weights")}
KEYS["init_from.family"] = (Literal[tuple(FAMILIES)] | None, {})
KEYS |= {f"mesh.{axis}": (int, {"low": -1}) for axis in ("data", "fsdp", "tensor")}
FACTORIES = {"input": pipeline.batches, "optim": optimizer.make, "sampler": sampler.make}  # whose options are in a key
TOP = [*dict.fromkeys(key.partition(".")[0] for key in KEYS), *FACTORIES, *SINGLE, *LABELED, "groups"]


class Part(NamedTuple):
    """A part of a config at `place`. known: its keys; needed: those of them without a default. build: its factory."""

    place: str
    given: Any
    known: Collection[str]
    needed: Collection[str] = ()
    build: Callable | None = None


def check(config: ConfigDict, parts: Collection[str] = (*SINGLE, *LABELED)) -> None:
    """Raise ConfigError for what cannot be the config of a run. All unknown keys are named at once, each in full.

    parts: the slots whose factories are imported, and whose options are checked.
    """
    every = list(parts_of(config, parts))
    if wrong := [fault for part in every for fault in _faults(part)]:
        raise ConfigError("; ".join(wrong))
    tree = config.to_dict()
    for key, (kind, limits) in KEYS.items():
        _number(key, reduce(getitem, key.split("."), tree), kind, limits)
    if 0 < config.watchdog < 1:
        raise ConfigError(f"config.watchdog = {config.watchdog}: must be 0, or at least 1")
    profiler.windows(config.profile)
    loggers.named(config.loggers)
    for label, one in tree["evaluators"].items():
        _number(f"evaluators.{label}.every", one["every"], int, {"low": 0})
    for label, one in tree["groups"].items():
        _pattern(f"config.groups.{label}.of", one["of"])
    for part in every:
        if part.build is not None:
            configs.keywords(part.given, part.place, part.build)


def parts_of(config: ConfigDict, built: Collection[str] = (*SINGLE, *LABELED)) -> Iterator[Part]:
    """All parts of a config that hold keys. built: see `check`."""
    yield Part("config", config, TOP, TOP)
    for top in TOP:
        inside = [key.partition(".")[2] for key in KEYS if key.startswith(f"{top}.")]
        given = config.get(top, {})
        if inside:
            yield Part(f"config.{top}", given, inside, inside)
        elif top in FACTORIES:
            yield Part(f"config.{top}", given, options(FACTORIES[top]), (), FACTORIES[top])
        elif top in SINGLE:
            if given is not None or top not in OPTIONAL:
                yield _slot(SINGLE[top], f"config.{top}", given, top in built)
        elif top not in KEYS and not isinstance(given, ConfigDict):
            yield Part(f"config.{top}", given, ())
        elif top == "groups":
            known = [*options(optimizer.make), "of"]
            yield from (
                Part(f"config.groups.{label}", one, known, ["of"], optimizer.make) for label, one in given.items()
            )
        elif top in LABELED:
            yield from (_slot(top, f"config.{top}.{label}", one, top in built) for label, one in given.items())


def _slot(kind: str, place: str, given: Any, built: bool) -> Part:
    """A slot. Its options are known if it is built: its factory, which is imported, has them."""
    needed = RESERVED if kind == "evaluators" else RESERVED[:1]
    if not built or not isinstance(given, ConfigDict) or "name" not in given:
        return Part(place, given, given if isinstance(given, ConfigDict) else (), needed)
    build = configs.factory(kind, given, place)
    return Part(place, given, [*needed, *options(build)], needed, build)


def _faults(part: Part) -> Iterator[str]:
    """What is unknown in a part, and what is missing."""
    place, given, known, needed, _ = part
    if not isinstance(given, ConfigDict):
        yield f"{place} = {given!r:.80}: must hold keys"
        return
    yield from (f"{place}.{key}: no key {key!r}; {nearest(key, known)}" for key in given if key not in known)
    yield from (f"{place}.{key} is missing" for key in needed if key not in given)


def _number(key: str, value: Any, kind: Any, limits: Mapping[str, int | float]) -> None:
    """Check the value of a key against its type and range."""
    fits(f"config.{key}", value, kind, UINT32 if limits.get("high") == UINT32 else INT32)
    if limits and value is not None:
        in_range(f"config.{key}", value, **limits)


def _pattern(place: str, pattern: Any) -> None:
    """Check a regular expression."""
    fits(place, pattern, str)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{place} = {pattern!r:.80}: {error}") from None
