"""What a run starts from: a public release, another run or a published folder, changed to fit the run's network."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax.api import Conditions, Made, Objective, Params, Space
from diversedit_jax.codecs import network_space
from diversedit_jax.diffusion.predictions import Flow
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import one_of
from diversedit_jax.runs import trained
from diversedit_jax.runs.build import Experiment
from diversedit_jax.sharding import by_name
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights import hub


class Start(NamedTuple):
    """What the network of a run starts with.

    params: top-level entries of its parameters, on the host. A leaf may be `api.Rows`. Entries that it lacks are new.
    told:   lines about it: where it is from, what is new, what was changed.
    """

    params: Params
    told: tuple[str, ...]


class Source(NamedTuple):
    """A trained network to start from. name: of the objective that trained it."""

    made: Made
    objective: Objective
    name: str


def start(experiment: Experiment, wanted: Params) -> Start | None:
    """What `config.init_from` says; None if it names no file.

    wanted: the shapes of the network's parameters. The source may lack those in `Model.fresh`, and no others, but for
        the parts in `config.init_from.fresh`, which are not taken from it.
    """
    config, parts = experiment.config, experiment.components
    given = config.init_from
    if given.file is None:
        if given.family is not None:
            raise ConfigError(f"config.init_from.file is not set, and config.init_from.family = {given.family!r} is")
        return None
    for part in given.fresh:
        one_of("config.init_from.fresh", part, wanted)
    now = Made(complete("models", config.model.to_dict()), network_space(parts.codec, experiment.space), wanted)
    with configs.named("config.init_from", given.to_dict()):
        source = opened(config, now)
    kept = {part: tree for part, tree in source.made.params.items() if part not in given.fresh}
    params, told = kept, []
    if parts.model.adapted is not None:
        try:
            params, told = parts.model.adapted(source.made._replace(params=kept), now)
        except ConfigError as error:
            raise ConfigError(f"config.init_from: {given.file}: {error}") from None
    check(given, params, wanted, (*parts.model.fresh, *given.fresh))
    told = [*told, *other_meaning(source, parts.objective, config.objective.name)]
    new = ", ".join(sorted(wanted.keys() - params.keys()))
    first = f"starting from {given.file}" + (f"; new: {new}" if new else "")
    return Start(params, (first, *(f"from {hub.title(given.file)}: {line}" for line in told)))


def opened(config: ConfigDict, now: Made) -> Source:
    """The network that `config.init_from` names. now: the network of the run."""
    given = config.init_from
    if configs.holds_run(hub.local(given.file)):
        return of_run(given, config.data)
    if given.trust:
        raise ConfigError(f"trust = True is for the folder of a run, and {given.file} is none")
    release, _ = releases.open_release(given.file, given.family, given.heads, given.weights)
    if "label_embed" not in given.fresh:
        trained.check_null_label(given.file, release)
    options, classes = complete("models", release.model), release.arch.num_classes
    ours = options["patch"] / now.options.get("patch", options["patch"])
    sides = release.sides or tuple(int(side * ours) for side in now.space.shape[-3:-1])  # not stored: as many patches
    conditions = now.space.conditions if classes is None else Conditions.labels(classes)
    made = Made(options, Space((*sides, release.arch.channels), conditions), release.params)
    objective = configs.make("objectives", ConfigDict(release.objective), "its objective")
    return Source(made, objective, release.objective["name"])


def of_run(given: ConfigDict, data: ConfigDict) -> Source:
    """The last checkpoint of the run, or the published folder, in `config.init_from`. data: of the run that starts."""
    for option in ("family", "heads"):
        if given[option] is not None:
            raise ConfigError(f"{option} = {given[option]!r} is for a file of a release, and {given.file} is a run")
    try:
        found = trained.of_run(given.file, data=data, trust=given.trust)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--trust_workdir", "--config.init_from.trust=True")) from None
    config, parts = found.experiment.config, found.experiment.components
    params = jax.tree.map(on_host, found.load(found.last, given.weights or "ema"))
    made = Made(complete("models", config.model.to_dict()), network_space(parts.codec, found.space), params)
    return Source(made, parts.objective, config.objective.name)


def on_host(array: jax.Array) -> np.ndarray:
    """A whole array, on every process."""
    return np.asarray(array) if array.is_fully_addressable else process_allgather(array, tiled=True)


def complete(kind: str, slot: Mapping[str, Any]) -> dict[str, Any]:
    """A slot of a config with all options of its factory: a stored one may lack those that came later."""
    return configs.slot(kind, slot["name"]).to_dict() | dict(slot)


def check(given: ConfigDict, params: Params, wanted: Params, fresh: Collection[str]) -> None:
    """Raise ConfigError for the first array that does not fit the network. fresh: entries that may be missing."""
    found, needed = by_name(params), by_name(wanted)
    for name in sorted(found.keys() | needed.keys()):
        has, needs = (list(leaves[name].shape) if name in leaves else None for leaves in (found, needed))
        part = name.partition("/")[0]
        if has != needs and (has is not None or part not in fresh):
            anew = f"; to start this part anew: --config.init_from.fresh=\"('{part}',)\"" if needs else ""
            raise ConfigError(
                f"config.init_from: {given.file} does not fit config.model: {name} is {has or 'missing'} there, "
                f"{needs or 'unknown'} here{anew}"
            )


def other_meaning(source: Source, objective: Objective, name: str) -> list[str]:
    """A line if the network was trained to predict something else than it will be. name: of the objective."""

    def meaning(predicts: Any) -> Any:
        return predicts._replace(token=None) if isinstance(predicts, Flow) else type(predicts)

    if meaning(source.objective.predicts) == meaning(objective.predicts):
        return []
    what = "this run by it, too, but with other options" if source.name == name else f"this run by {name}"
    return [f"it was trained by {source.name}, {what}: what it predicts means something else here"]
