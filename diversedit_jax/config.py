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
from diversedit_jax.errors import ConfigError, DataError, StorageError, WeightsError
from diversedit_jax.reading import read_json
from diversedit_jax.runtime.files import check_same, differences, flat, write_json

FILE, MODULES = "config.json", "modules"  # MODULES: a key of FILE, the folders of modules that the run's user wrote
RESERVED = ("name", "every")  # keys of a slot that are not options of its factory
DEEPEST = 16  # dicts and lists inside of each other, in a stored config
# Keys that runs of older versions lack, and their values there.
LATER = {
    "init_from": {"fresh": [], "trust": False},
    "input": {"resident": False},
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "rules": []},
    "loggers": "",
    "text_encoder": None,
}
NAMES = ("name", "extractor")  # keys whose values name factories
# key -> kind of slot; those in OPTIONAL may be None
SINGLE = {"data": "data", "codec": "codecs", "text_encoder": "encoders", "model": "models", "objective": "objectives"}
OPTIONAL = ("text_encoder",)
LABELED = ("encoders", "losses", "evaluators")  # kinds of slots that a run has any number of, under labels

# Paths in these parts of a config may change when a run is resumed. What they hold may not, see `build.inputs`.
MOVABLE = ("data", "codec", "encoders", "text_encoder", "init_from")
PATHS = ("data_dir", "file", "vae", "tokenizer")
# What may change when a run is resumed.
FREE = ("total_steps", "max_skipped", "watchdog", "mesh", "input")  # how long and where it runs
FREE += ("log_every", "profile", "loggers", "checkpoint", "samples", "evaluators")  # what it reports and keeps


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
    """The options of a config as keyword arguments.

    ConfigError if one is required and not set, or is not of the type in the signature of the factory `build`.
    """
    given = {name: plain(value) for name, value in config.to_dict().items() if name not in RESERVED}
    for name, parameter in registry.options(build).items():
        value, default = given.get(name, parameter.default), parameter.default
        if default is inspect.Parameter.empty and value in (None, default):
            raise ConfigError(f"{place}.{name} is not set; give it with --{place}.{name}=VALUE")
        if value is not default:
            registry.fits(f"{place}.{name}", value, parameter.annotation)
    return given


def make(kind: str, config: ConfigDict, place: str, *args: Any) -> Any:
    """Build the slot that a config describes. place: of the config, for errors, such as `config.model`."""
    given = keywords(config, place, factory(kind, config, place))
    with named(place, given):
        return registry.make(kind, config.name, *args, **given)


def factory(kind: str, config: ConfigDict, place: str) -> Callable:
    """The factory that the slot `config` at `place` names."""
    registry.fits(f"{place}.name", config.to_dict().get("name"), str)
    try:
        return registry.factory(kind, config.name)
    except ConfigError as error:
        raise ConfigError(f"{place}.name: {str(error).partition(': ')[2]}") from error


@contextlib.contextmanager
def named(place: str, options: Collection[str]) -> Iterator[None]:
    """Give errors of what is built here from `options` the place of these in the config, such as `config.model`."""
    try:
        yield
    except (DataError, WeightsError) as error:
        raise type(error)(f"{place}: {error}") from error
    except (ConfigError, OSError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())  # one line
        option = re.match(r"(?:\w+: )?(?:\w+\.|--)?(\w+) ?= ?", text)
        if option and option[1] in options:
            text = f"{place}.{text[option.start(1) :]}"
        elif not (isinstance(error, ConfigError) and text.startswith("config.")):
            text = f"{place}: {text}"
        raise ConfigError(text) from error


def plain(value: Any) -> Any:
    """A value with tuples for lists: a stored config has the one where a config has the other."""
    return tuple(plain(part) for part in value) if isinstance(value, list | tuple) else value


def modules(config: Mapping[str, Any]) -> dict[str, str]:
    """The modules outside this package that a config names, such as `my_loss:make`, and the folder of each."""
    found = {}
    for key, value in flat(config).items():
        if key.split(".")[-1] in NAMES and registry.OUTSIDE.fullmatch(str(value)):
            module = value.partition(":")[0]
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.origin is not None:
                up = module.count(".") + Path(spec.origin).name.startswith("__init__.")
                found[module] = str(Path(spec.origin).absolute().parents[up])
    return found


def claim(workdir: Path, config: ConfigDict, saved: Mapping[str, Any] | None = None) -> list[str]:
    """Store a run's config in its workdir. If one is stored there, compare them first.

    saved: the config in the run's last checkpoint, which is compared if the stored one is gone.

    Returns a line for each allowed difference (FREE, PATHS). Any other difference is a ConfigError.
    """
    notes, given = [], json.loads(json.dumps(config.to_dict()))
    if (workdir / FILE).exists() or saved:
        stored = _stored(workdir) if (workdir / FILE).exists() else _of_this_version(dict(saved))
        stored.pop(MODULES, None)
        _complete(stored, given)
        check_same(f"{workdir} holds a run", stored, given, "use its values or a new workdir", _may_change)
        notes = [f"config.{key}: {old!r} -> {new!r}" for key, (old, new) in differences(stored, given).items()]
    places = {MODULES: found} if (found := modules(given)) else {}
    write_json(workdir / FILE, given | places, sort_keys=True)
    return notes


def _complete(stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Give the slots of a stored config the options that its version did not have, with their defaults.

    given: the config of now, with the same slots.
    """
    slots = [(kind, stored.get(key), given.get(key)) for key, kind in SINGLE.items()]
    slots += [
        (kind, stored.get(kind, {}).get(label), slot) for kind in LABELED for label, slot in given.get(kind, {}).items()
    ]
    for kind, old, new in slots:
        if isinstance(old, dict) and isinstance(new, dict) and old.get("name") == new.get("name", ""):
            for name, option in registry.options(registry.factory(kind, new["name"])).items():
                if name in new and option.default is not inspect.Parameter.empty:
                    old.setdefault(name, json.loads(json.dumps(option.default)))


def _may_change(key: str, old: Any, new: Any) -> bool:
    """Whether a resumed run may have a new value at this dotted key."""
    top, last = key.split(".")[0], key.split(".")[-1]
    moved = top in MOVABLE and last in PATHS and None not in (old, new)
    told = key == "data.num_classes" and old is None  # the checkpoint says how many there are
    return top in FREE or moved or told


def holds_run(path: Path) -> bool:
    """Whether `path` is the workdir of a run. Other programs write a config.json, too."""
    try:
        _stored(path)
    except ConfigError:
        return False
    return True


def stored(workdir: Path) -> ConfigDict:
    """The whole config of the run in a workdir, to read: nothing that it names is imported."""
    return ConfigDict({key: value for key, value in _stored(workdir).items() if key != MODULES})


def load(workdir: Path, parts: Collection[str] = (*SINGLE, *LABELED), *, trust: bool = False) -> ConfigDict:
    """The config of the run in a workdir. A config of an older version gets the names of this version.

    parts: the slots (keys of SINGLE and LABELED) that will be built. The others in LABELED are left out.
    trust: whether the slots may be factories outside this package, see `registry.factory`. A stored config can come
        from anywhere, and to build them runs their code. The folders of these modules, which it stores, can then be
        imported from. Without trust, ConfigError names them; nothing is imported.
    """
    stored = _stored(workdir)
    folders = stored.pop(MODULES, {})
    stored |= {kind: {} for kind in LABELED if kind not in parts}
    built = {part: stored[part] for part in parts if isinstance(stored.get(part), dict)}
    own = {key: name for key, name in flat(built).items() if key.split(".")[-1] in NAMES and ":" in str(name)}
    if own and not trust:
        named = ", ".join(f"{name} (config.{key})" for key, name in own.items())
        raise ConfigError(f"{workdir}: its {FILE} runs code outside this package: {named}; allow it by --trust_workdir")
    if own and isinstance(folders, dict):
        sys.path += [folder for folder in folders.values() if isinstance(folder, str) and folder not in sys.path]
    try:
        return ConfigDict(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a key with a dot, or such as `items`
        raise ConfigError(f"{workdir / FILE} is damaged: {' '.join(str(error).split())}") from None


def _stored(workdir: Path) -> dict[str, Any]:
    """The config in a workdir as it is stored, with the names of this version."""
    try:
        stored = read_json(workdir / FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{workdir} holds no run: it has no {FILE}") from None
    except OSError as error:
        raise StorageError(f"{workdir / FILE}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{workdir / FILE} is damaged: {error}") from None
    if not isinstance(stored, dict) or not {"data", "model", "objective"} <= stored.keys():
        raise ConfigError(f"{workdir} holds no run: its {FILE} is of another program")
    if _deep(stored):
        raise ConfigError(f"{workdir / FILE} is damaged: it is nested more than {DEEPEST} times")
    return _of_this_version(stored)


def _of_this_version(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the names of this version."""
    if all(isinstance(stored.get(key), dict) for key in ("prepare", "model", "objective")):
        codec, model, objective = stored.pop("prepare"), stored["model"], stored["objective"]
        stored |= {"codec": codec | ({"name": "vae"} if codec.get("name") == "latents" else {}), "groups": {}}
        model.pop("second_time", None)
        if (width := model.pop("token_width", None)) is not None:
            objective["width"] = width
        if "label_drop" in objective:
            objective["condition_drop"] = objective.pop("label_drop")
    for key, later in LATER.items():
        if not isinstance(later, dict):
            stored.setdefault(key, later)
        elif isinstance(stored.get(key), dict):
            stored[key] = later | stored[key]
    return stored


def _deep(tree: Any) -> bool:
    """Whether lists and dicts are nested deeper than in any config, so that Python could not walk through them."""
    level = [tree]
    for _ in range(DEEPEST):
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [node for nodes in inner for node in nodes]
    return bool(level)


def copied(config: ConfigDict) -> ConfigDict:
    """A deep copy that is not locked. (`ConfigDict(config)` shares nested configs.)"""
    return ConfigDict(config.to_dict())
