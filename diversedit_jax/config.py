"""Configs: ml_collections trees. A slot in such a tree names a factory and holds all of its options.

Config files build slots with `slot(...)`. Defaults come from the factory's signature, so that a stored config is
complete and any option can be set on the command line (`--config.losses.diversity.lo=0.2`).
"""

import contextlib
import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from diversedit_jax import registry
from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime.files import check_same, differences, flat, write_json

FILE, MODULES = "config.json", "modules"  # MODULES: a key of FILE, the folders of modules that the run's user wrote
RESERVED = ("name", "every")  # keys of a slot that are not options of its factory
SINGLE = {"data": "data", "codec": "codecs", "model": "models", "objective": "objectives"}  # key -> kind of slot
LABELED = ("encoders", "losses", "evaluators")  # kinds of slots that a run has any number of, under labels

# Paths in these parts of a config may change when a run is resumed. What they hold may not, see `build.inputs`.
MOVABLE = ("data", "codec", "encoders", "init_from")
PATHS = ("data_dir", "file", "vae")
# What may change when a run is resumed.
FREE = ("total_steps", "max_skipped", "watchdog", "mesh", "input")  # how long and where it runs
FREE += ("log_every", "profile", "checkpoint", "samples", "evaluators")  # what it reports and keeps


def options(build: Callable, **changes: Any) -> ConfigDict:
    """All keyword options of a factory with their defaults, and `changes` to them."""
    config = ConfigDict()
    for name, parameter in registry.options(build).items():
        unset = parameter.default in (None, inspect.Parameter.empty)
        config[name] = config_dict.placeholder(_kind(parameter.annotation)) if unset else parameter.default
    for name, value in changes.items():
        if name not in config:
            raise ConfigError(f"{build.__module__}: no option {name!r}; {registry.suggestion(name, config)}")
        config[name] = value
    return config


def _kind(annotation: Any) -> type:
    """The type of an option that is None until it is set: int for `int | None`."""
    choices = typing.get_args(annotation) if typing.get_origin(annotation) in (types.UnionType, typing.Union) else ()
    kinds = [kind for kind in choices or (annotation,) if kind is not type(None)]
    return typing.get_origin(kinds[0]) or kinds[0]


def slot(kind: str, name: str, **changes: Any) -> ConfigDict:
    """The config of a slot: `name`, and all options of its factory, with `changes` to their defaults.

    Evaluators also have `every`: their interval in steps. 0: only at the end of the run.
    """
    config = options(registry.factory(kind, name), **changes)
    config.name = name
    if kind == "evaluators":
        config.every = 0
    return config


def keywords(config: ConfigDict, place: str, build: Callable) -> dict[str, Any]:
    """The options of a config as keyword arguments. ConfigError if one is required and not set, or not finite."""
    given = {name: _plain(value) for name, value in config.to_dict().items() if name not in RESERVED}
    for name, value in given.items():
        registry.finite(f"{place}.{name}", value)
    for name, parameter in registry.options(build).items():
        if parameter.default is inspect.Parameter.empty and given.get(name) is None:
            raise ConfigError(f"{place}.{name} is not set; give it with --{place}.{name}=VALUE")
    return given


def check(config: ConfigDict) -> None:
    """Find what is missing in the slots of a run, and build none. ConfigError as of `make`."""
    slots = [(kind, f"config.{key}", config[key]) for key, kind in SINGLE.items()]
    slots += [(kind, f"config.{kind}.{label}", one) for kind in LABELED for label, one in config[kind].items()]
    for kind, place, one in slots:
        keywords(one, place, _factory(kind, one, place))


def make(kind: str, config: ConfigDict, place: str, *args: Any) -> Any:
    """Build the slot that a config describes. place: of the config, for errors, such as `config.model`."""
    given = keywords(config, place, _factory(kind, config, place))
    with named(place, given):
        return registry.make(kind, config.name, *args, **given)


def _factory(kind: str, config: ConfigDict, place: str) -> Callable:
    try:
        return registry.factory(kind, config.name)
    except ConfigError as error:
        raise ConfigError(f"{place}.name: {str(error).partition(': ')[2]}") from error


@contextlib.contextmanager
def named(place: str, options: Collection[str]) -> Iterator[None]:
    """Give errors of what is built here from `options` the place of these in the config, such as `config.model`."""
    try:
        yield
    except (ConfigError, TypeError, ValueError) as error:
        text = str(error)
        option = re.match(r"(?:\w+: )?(?:\w+\.)?(\w+) = ", text)
        if option and option[1] in options:
            text = f"{place}.{text[option.start(1) :]}"
        elif not (isinstance(error, ConfigError) and text.startswith("config.")):
            text = f"{place}: {text}"
        raise ConfigError(text) from error


def _plain(value: Any) -> Any:
    return tuple(_plain(part) for part in value) if isinstance(value, list | tuple) else value


def modules(config: Mapping[str, Any]) -> dict[str, str]:
    """The modules outside this package that a config names, such as `my_loss:make`, and the folder of each."""
    found = {}
    for key, value in flat(config).items():
        if key.split(".")[-1] == "name" and ":" in str(value):
            module = value.partition(":")[0]
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.origin is not None:
                up = module.count(".") + Path(spec.origin).name.startswith("__init__.")
                found[module] = str(Path(spec.origin).absolute().parents[up])
    return found


def claim(workdir: Path, config: ConfigDict) -> list[str]:
    """Store a run's config in its workdir. If one is stored there, compare them first.

    Returns a line for each allowed difference (FREE, PATHS). Any other difference is a ConfigError.
    """
    notes, given = [], json.loads(json.dumps(config.to_dict()))
    if (workdir / FILE).exists():
        stored = load(workdir).to_dict()
        check_same(f"{workdir} holds a run", stored, given, "use its values or a new workdir", _may_change)
        notes = [f"config.{key}: {old!r} -> {new!r}" for key, (old, new) in differences(stored, given).items()]
    places = {MODULES: found} if (found := modules(given)) else {}
    write_json(workdir / FILE, given | places, sort_keys=True)
    return notes


def _may_change(key: str, old: Any, new: Any) -> bool:
    """Whether a resumed run may have a new value at this dotted key."""
    top, last = key.split(".")[0], key.split(".")[-1]
    moved = top in MOVABLE and last in PATHS and None not in (old, new)
    told = key == "data.num_classes" and old is None  # the checkpoint says how many there are
    return top in FREE or moved or told


def holds_run(path: Path) -> bool:
    """Whether `path` is the workdir of a run. Other programs write a config.json, too."""
    try:
        load(path)
    except ConfigError:
        return False
    return True


def load(workdir: Path) -> ConfigDict:
    """The config of the run in a workdir. A config of an older version gets the names of this version.

    The folders of its user's modules, which it stores, can then be imported from.
    """
    try:
        stored = json.loads((workdir / FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{workdir} holds no run: it has no {FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{workdir / FILE} is damaged: {error}") from None
    if not isinstance(stored, dict) or not {"data", "model", "objective"} <= stored.keys():
        raise ConfigError(f"{workdir} holds no run: its {FILE} is of another program")
    sys.path += [folder for folder in stored.pop(MODULES, {}).values() if folder not in sys.path]
    if "prepare" in stored:
        codec, model, objective = stored.pop("prepare"), stored["model"], stored["objective"]
        stored |= {"codec": codec | {"name": "vae" if codec["name"] == "latents" else codec["name"]}, "groups": {}}
        model.pop("second_time", None)
        if (width := model.pop("token_width", None)) is not None:
            objective["width"] = width
        if "label_drop" in objective:
            objective["condition_drop"] = objective.pop("label_drop")
    if "init_from" in stored:
        stored["init_from"].setdefault("fresh", [])
    return ConfigDict(stored)


def copied(config: ConfigDict) -> ConfigDict:
    """A deep copy that is not locked. (`ConfigDict(config)` shares nested configs.)"""
    return ConfigDict(config.to_dict())
