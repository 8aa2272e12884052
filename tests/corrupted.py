"""Nonsense for every key of a config, and whether a run names it in one line before anything compiles.

    python -m tests.corrupted [STEP]

`cases` sets one key after another, of `configs/default.py` and of every factory in the registry, to values of a wrong
type, and to numbers, words and tuples that no key, or not this key, can mean. `stored` does the same to the config.json
of a run. STEP: take every so many cases. The program prints the faults, and fails if there are any.
"""

import contextlib
import copy
import inspect
import itertools
import json
import math
import signal
import sys
import tempfile
import typing
import zipfile
from collections.abc import Callable, Iterator
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import evaluate, registry, train
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.errors import RunError
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.runs import build, trained
from diversedit_jax.runs.check import FACTORIES, KEYS
from diversedit_jax.runtime import cli
from diversedit_jax.training import optimizer
from tests import DATA

SECONDS = 60  # what takes longer hangs
# No key means one of these, whatever its type.
NUMBERS = (-(2**31) - 1, 2**33, 10**12, 10**40, math.nan, math.inf, -math.inf, 1e300, -1e300, 1e-300)
NESTS = ({}, {"a": {"b": 1}}, [[[]]], [None, 1], [{}], "")
PLAIN = (None, True, 0, -1, 0.5, -0.5, "nonsense", "\0", "x" * 5000, [], ["nonsense"], [1], [0.5], [1] * 7)
# Numbers below 0 that mean something; numbers that must be above 0; words that are no choice among a few.
NEGATIVE = {"coefficient", "dispersion_scale", "time_mean", "bias", "token_cfg_scale", "weights", "mean", "mesh"}
POSITIVE = {"total_steps", "batch_size", "accumulate", "log_every", "keep", "steps", "num_timesteps", "size", "patch"}
POSITIVE |= {"depth", "width", "heads", "out_channels", "mlp_ratio", "chunk", "scale", "std", "final_std", "time_std"}
POSITIVE |= {"tau", "eps", "learning_rate", "clip", "groups", "block", "teacher_block", "k", "aligned", "batch", "side"}
POSITIVE |= {"last_step", "rtol", "atol", "hi", "steps_per_epoch", "decay_epochs", "guidance_channels", "shape"}
POSITIVE |= {"time_scale"}
UNREADABLE = {"data", "encoders", "evaluation"}  # kinds of slots whose files are not there
FREE = {"data_dir", "file", "vae", "reference", "encoder", "metric", "weights", "of", "fresh", "cached"}
SPACE = Space((8, 8, 1), Conditions.labels(10))


class Hang(BaseException):
    """A check took too long."""


class Case(NamedTuple):
    """A corrupted config.

    key: in full. wrong: whether it must be refused. run: what a run does with it. told: what may stand for the key.
    """

    key: str
    value: Any
    wrong: bool
    run: Callable[[], Any]
    told: tuple[str, ...] = ()


def fault(case: Case) -> str | None:
    """What is wrong with how a case ends; None: it is refused in one line with its key, or may be accepted."""
    said = f"{case.key} = {case.value!r:.60}: "
    signal.alarm(SECONDS)
    try:
        with cli.handling(_hang, signal.SIGALRM):
            case.run()
    except RunError as error:
        text = str(error)
        if "\n" in text:
            return f"{said}several lines: {text!r}"
        last, place = case.key.rpartition(".")[2], case.key.rpartition(".")[0]
        unread = not UNREADABLE.isdisjoint(place.split("."))
        named = case.key in text or (place in text and (last in text or last in FREE or unread))
        named |= any(words in text for words in case.told)
        return None if named else f"{said}without its key: {text:.200}"
    except Hang:
        return f"{said}hangs"
    except Exception as error:
        return f"{said}{type(error).__name__}: {error!s:.200}"
    finally:
        signal.alarm(0)
    return f"{said}accepted" if case.wrong else None


def _hang(number, frame):
    raise Hang


def wrong(key: str, kind: Any, value: Any) -> bool:
    """Whether a value is none that a key of this type, as its annotation writes it, can mean."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in registry.UNIONS else (kind,)
    names = {key.rpartition(".")[2], key.partition(".")[0]}
    if isinstance(value, dict) or value in NESTS or (type(value) in (int, float) and value in NUMBERS):
        return True
    if value is None or isinstance(value, bool):
        return type(value) not in kinds
    if isinstance(value, str):
        return str not in kinds or "\0" in value or not names & FREE
    if isinstance(value, list):
        parts = next((typing.get_args(one) for one in kinds if typing.get_origin(one) in registry.TUPLES), None)
        if parts is None:
            return True
        each = parts[:1] * len(value) if parts[1:] in registry.OPEN else parts
        return len(each) != len(value) or any(wrong(key, one, part) for one, part in zip(each, value, strict=True))
    fits = float in kinds or (int in kinds and isinstance(value, int))
    return not fits or (value < 0 and not names & NEGATIVE) or (value == 0 and key.rpartition(".")[2] in POSITIVE)


def corrupted(config: ConfigDict, key: str, value: Any) -> ConfigDict:
    """A copy of a config with another value at a dotted key."""
    tree = copy.deepcopy(config.to_dict())
    *path, last = key.split(".")
    inside = tree
    for name in path:
        inside = inside[name]
    inside[last] = value
    return ConfigDict(tree)


def small() -> ConfigDict:
    """A small run on the digits that uses most of what runs can have."""
    config = digits.get_config()
    config.update({"total_steps": 20, "batch_size": 16})
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.losses.sra = slot("losses", "sra", block=1, teacher_block=2)
    config.groups.deep = optimizer.group("^params/deep/")
    config.evaluators = {"blocks": slot("evaluators", "similarity")}
    config.sampler.update({"steps": 2, "batch_size": 16})
    config.checkpoint.metric = "blocks/effective_rank"
    return config


class Reached(Exception):
    """Everything that a run checks before it compiles has passed."""


def started(config: ConfigDict) -> None:
    """Start a run, and stop where it would write its config and compile."""
    claim = mock.patch.object(configs, "claim", side_effect=Reached)
    work = mock.patch.object(build, "work", return_value=0)  # traces the step; takes a second
    with claim, work, tempfile.TemporaryDirectory() as folder, contextlib.suppress(Reached):
        train.run(config, Path(folder) / "run")


def cases() -> Iterator[Case]:
    """Corrupted configs: of a run, and of every slot by itself."""
    base, types = small(), types_of_keys()

    def case(key: str, value: Any, wrong: bool = True) -> Case:
        return Case(f"config.{key}", value, wrong, lambda: started(corrupted(base, key, value)))

    for key, kind in types.items():
        for value in (*NUMBERS, *NESTS, *PLAIN):
            if (key, value) not in (("profile", ""), ("loggers", ""), ("mesh.rules", [])):  # these are their defaults
                yield case(key, value, wrong(key, kind, value))
    inside = [*{key.rpartition(".")[0] for key in types}, "model", "data", "losses.sra", "evaluators.blocks"]
    yield from (case(f"{place}.unheard_of".removeprefix("."), 1) for place in sorted(inside))
    trees = [key for key in (*base, "losses.sra", "groups.deep", "evaluators.blocks") if key not in KEYS]
    yield from (case(place, value) for place in trees for value in (None, 5, "x", []))
    names = (None, 5, "", "nonsense", "a.b", "os:system", "x:make", [], {}, "../../x")
    slotted = ("model", "data", "codec", "objective", "losses.sra", "evaluators.blocks")
    yield from (case(f"{place}.name", value) for place in slotted for value in names)
    for kind, name, config, more in slots():
        for option, one in registry.options(registry.factory(kind, name)).items():
            for value in (*NUMBERS, *NESTS, *PLAIN):
                place = f"config.{kind}.{name}"
                run = partial(made, kind, config, option, value, place, more)
                yield Case(f"{place}.{option}", value, wrong(option, one.annotation, value), run)


def made(kind: str, config: ConfigDict, option: str, value: Any, place: str, more: tuple) -> None:
    """Make a slot with another value of an option."""
    configs.make(kind, corrupted(config, option, value), place, *more)


def types_of_keys() -> dict[str, Any]:
    """The types of the keys of `small` that are no options of slots."""
    types = {key: kind for key, (kind, _) in KEYS.items()}
    for place, build_part in (*FACTORIES.items(), ("groups.deep", optimizer.make)):
        types |= {f"{place}.{name}": one.annotation for name, one in registry.options(build_part).items()}
    return types | {"groups.deep.of": str, "evaluators.blocks.every": int}


def slots() -> Iterator[tuple[str, str, ConfigDict, tuple]]:
    """Every factory of the registry: kind, name, a valid config, and what the program gives it."""
    files = {"data_dir": "/nonexistent", "file": str(DATA / "dinov2.safetensors")}
    spec = SampleSpec.of(build.build(small(), SPACE))
    more = {"data": ("train",), "models": (SPACE, {}, ()), "evaluators": (spec,)}
    for kind in ("data", "codecs", "models", "objectives", "losses", "encoders", "evaluators", "evaluation.extractors"):
        for name in registry.known(kind):
            options = registry.options(registry.factory(kind, name))
            empty = [option for option, one in options.items() if one.default is inspect.Parameter.empty]
            changes = {option: files[option] for option in empty}
            changes |= {"depth": 2, "width": 16, "heads": 2} if kind == "models" else {}
            changes |= {"extractor": "digits"} if name == "scores" else {}
            changes |= {"heads": 4} if name == "dinov2" else {}  # of that small one
            yield kind, name, slot(kind, name, **changes), more.get(kind, ())


def stored(folder: Path) -> Iterator[Case]:
    """The config.json of a run with wrong values at each place, opened as sampling, analysis and evaluation do."""
    with zipfile.ZipFile(DATA / "old_runs" / "diversedit.zip") as packed:
        packed.extractall(folder)
    run = folder / "run"
    tree = json.loads(json.dumps(configs.load(run).to_dict()))  # with the names of this version

    def opened(text: str) -> None:
        (run / configs.FILE).write_text(text)
        trained.of_run(run, losses=True).experiment.sampler()
        evaluate.judges_of((), (), str(run))

    types = {
        key: kind for key, kind in types_of_keys().items() if not key.startswith(("input", "groups", "evaluators"))
    }
    slotted = {"codecs": "codec", "models": "model", "objectives": "objective", "losses": "losses.diversity"}
    for kind, place in slotted.items():
        build_part = registry.factory(kind, reduce(getitem, place.split("."), tree)["name"])
        types |= {f"{place}.{name}": one.annotation for name, one in registry.options(build_part).items()}
    for text in ("", "[]", "null", "5", '"x"', "{", "\0", "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "{}"):
        yield Case("config", text[:20], True, partial(opened, text), ("config.json",))
    values = (None, True, -1, 10**12, math.nan, "nonsense", "a:make", [], [[[[1]]]], {}, {"a": 1}, {"a.b": 1}, DELETED)
    for path in _places(tree):
        key = ".".join(path)
        for value in values:
            if (key, value) == ("mesh.rules", []):
                continue
            other = copy.deepcopy(tree)
            inside = reduce(getitem, path[:-1], other)
            inside[path[-1]] = value
            if value is DELETED:
                del inside[path[-1]]
            must = value is not DELETED and key in types and wrong(key, types[key], value)
            # Without its last key, a place is named by itself; without `scores`, there is nothing to evaluate by.
            told = (f"config.{'.'.join(path[:-1])}:", "config.json is", "give a feature network")
            yield Case(f"config.{key}", value, must, partial(opened, json.dumps(other)), told)


DELETED = "(deleted)"


def _places(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from _places(value, (*path, name))


def faults(step: int = 1) -> tuple[int, list[str]]:
    """How many cases were tried, every so many of them, and their faults."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = itertools.islice(itertools.chain(cases(), stored(Path(folder))), 0, None, step)
        found = [fault(case) for case in chosen]
    return len(found), [one for one in found if one]


if __name__ == "__main__":
    count, found = faults(*map(int, sys.argv[1:]))
    print(*found, f"{count} corrupted configs, {len(found)} faults", sep="\n")
    sys.exit(bool(found))
