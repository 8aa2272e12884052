"""Configs: ml_collections trees whose slots name a factory and hold all of its options.

A config file builds slots with `slot(...)`: the defaults come from the factory's signature, so that a stored config is
complete, and any option can be set on the command line (`--config.losses.diversity.lo=0.2`).
"""

import inspect
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from diversedit_jax import registry
from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime.files import check_same, differences, write_json

FILE = "config.json"

RESERVED = ("name", "every")  # keys of a slot that are not options of its factory

# What may differ when a run is resumed: how long it runs, where it runs, what it reports and keeps.
FREE = (
    "total_steps",
    "max_skipped",
    "log_every",
    "profile",
    "watchdog",
    "mesh",
    "input",
    "checkpoint",
    "samples",
    "evaluators",
)


def options(build: Callable, **changes: Any) -> ConfigDict:
    """All keyword options of a factory with their defaults, and `changes` to them."""
    values = {}
    for name, parameter in registry.options(build).items():
        default = parameter.default
        required = default is inspect.Parameter.empty
        values[name] = config_dict.placeholder(_kind(parameter.annotation)) if required or default is None else default
    config = ConfigDict(values, type_safe=True)
    for name, value in changes.items():
        if name not in config:
            raise ConfigError(f"{build.__module__}: no option {name!r}; {registry.suggestion(name, values)}")
        config[name] = value
    return config


def _kind(annotation: Any) -> type:
    """The type of an option that is None until it is set: of `int | None`, int."""
    choices = typing.get_args(annotation) if typing.get_origin(annotation) in (types.UnionType, typing.Union) else ()
    kinds = [kind for kind in choices or (annotation,) if kind is not type(None)]
    return typing.get_origin(kinds[0]) or kinds[0]


def slot(kind: str, name: str, **changes: Any) -> ConfigDict:
    """The config of a slot: `name`, and all options of what it names, with `changes` to their defaults.

    Evaluators also have `every`: their interval in steps, 0 for the end of the run only.
    """
    config = options(registry.factory(kind, name), **changes)
    config.name = name
    if kind == "evaluators":
        config.every = 0
    return config


def keywords(config: ConfigDict, place: str, build: Callable) -> dict[str, Any]:
    """The options of a config as keyword arguments; one that is required and not set is an error."""
    given = {name: _plain(value) for name, value in config.to_dict().items() if name not in RESERVED}
    for name, parameter in registry.options(build).items():
        if parameter.default is inspect.Parameter.empty and given.get(name) is None:
            raise ConfigError(f"{place}.{name} is not set; give it with --{place}.{name}=VALUE")
    return given


def make(kind: str, config: ConfigDict, place: str, *args: Any) -> Any:
    """Build the slot that a config describes. `place` is where the config stands, for errors: `config.model`."""
    given = keywords(config, place, registry.factory(kind, config.name))
    try:
        return registry.make(kind, config.name, *args, **given)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: {error}") from error


def _plain(value: Any) -> Any:
    return tuple(_plain(part) for part in value) if isinstance(value, list | tuple) else value


def claim(workdir: Path, config: ConfigDict) -> list[str]:
    """Store a run's config in its workdir, or compare it with the one that is stored there.

    Returns a line for each difference that is allowed (FREE). Any other is a ConfigError.
    """
    notes, given = [], json.loads(json.dumps(config.to_dict()))
    if (workdir / FILE).exists():
        stored = read(workdir)
        kept = [{key: value for key, value in tree.items() if key not in FREE} for tree in (stored, given)]
        check_same(f"{workdir} holds a run", *kept, remedy="use its values or a new workdir")
        notes = [f"config.{key}: {old!r} -> {new!r}" for key, (old, new) in differences(stored, given).items()]
    write_json(workdir / FILE, given, sort_keys=True)
    return notes


def read(workdir: Path) -> dict[str, Any]:
    """The config of the run in a workdir, as plain data."""
    try:
        stored = json.loads((workdir / FILE).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{workdir} holds no run: it has no {FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{workdir / FILE} is damaged: {error}") from None
    return translated(stored)


def translated(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the names that this version uses, whichever version wrote it."""
    if "prepare" not in stored:
        return stored
    codec, model, objective = stored.pop("prepare"), stored["model"], stored["objective"]
    stored |= {"codec": codec | {"name": "vae" if codec["name"] == "latents" else codec["name"]}, "groups": {}}
    model.pop("second_time", None)
    if (width := model.pop("token_width", None)) is not None:
        objective["width"] = width
    if "label_drop" in objective:
        objective["condition_drop"] = objective.pop("label_drop")
    return stored


def copied(config: ConfigDict) -> ConfigDict:
    """A copy that shares nothing with the config, and is not locked. (`ConfigDict(config)` shares what is nested.)"""
    return ConfigDict(config.to_dict())


def load(workdir: Path) -> ConfigDict:
    """The config of the run in a workdir."""
    return ConfigDict(read(workdir))
