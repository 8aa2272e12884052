"""From a config to the components of a run. Mistakes in a config are found here, before anything compiles."""

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from diversedit_jax import codecs, conditioning, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Codec, Condition, Conditions, Model, Params, Space
from diversedit_jax.codecs import network_space, with_encoders, with_text
from diversedit_jax.data import Dataset, clip_tokenizer
from diversedit_jax.data.levels import numbered
from diversedit_jax.data.pipeline import generator, read, stacked
from diversedit_jax.encoders import TextEncoder
from diversedit_jax.errors import ConfigError, DataError, RunError, WeightsError
from diversedit_jax.runs.check import check
from diversedit_jax.runtime import flops
from diversedit_jax.runtime.files import flat
from diversedit_jax.runtime.progress import say
from diversedit_jax.sampling import sampler
from diversedit_jax.training import optimizer
from diversedit_jax.training.step import Components, train_step
from diversedit_jax.weights import hub
from diversedit_jax.weights.formats import weights_folder

# The least cosine of features of one text encoder. Small ones have 0.9999 in bfloat16 against float32.
ALIKE = 0.95
AT_ONCE = 256  # examples that are read at a time for their conditions alone
BUILT = ("codec", "text_encoder", "model", "objective", "losses", "encoders")  # the slots that `build` builds


class Experiment(NamedTuple):
    """A config, built for stored examples of `space`. rates: the learning rate at each step, by group."""

    config: ConfigDict
    space: Space
    layout: sharding.Layout
    components: Components
    rates: Mapping[str, optax.Schedule]

    def sampler(self, **changes: Any) -> sampler.Sampler:
        """The sampler of the config, with changes to its options."""
        chosen = ConfigDict({**self.config.sampler.to_dict(), **changes})
        given, parts = configs.keywords(chosen, "config.sampler", sampler.make), self.components
        make = partial(sampler.make, parts.model, parts.codec, self.space, parts.objective, self.layout)
        if changes:
            return make(**given)
        with configs.named("config.sampler", given):
            return make(**given)

    def prompts(self, texts: Sequence[str]) -> Condition:
        """The stored conditions of texts. ConfigError if the network has no text encoder, or none for its data.

        A text that is too long is cut, and a line says so.
        """
        if (encoder := text_encoder(self.config)) is None:
            kind = "conditions" if (classes := self.space.conditions.classes) is None else f"{classes} classes"
            raise ConfigError(f"prompts need config.text_encoder: this network knows {kind} instead")
        null = self.space.conditions.null
        tokenizer = encoder.tokenizer(len(jax.tree.leaves(null)[0]))
        ids, cut = tokenizer(texts)
        for text in (text for text, is_cut in zip(texts, cut, strict=True) if is_cut):
            say(f"note: only the first {tokenizer.length - 2} tokens of a prompt are read: {text[:60]}...")
        if not isinstance(null, Mapping):
            return ids
        null_ids, _ = tokenizer([""])
        encoded = jax.jit(encoder.apply)(encoder.init(), np.concatenate([null_ids, ids]))
        found = {name: np.asarray(encoded[name]) for name in null}
        check_features(null["context"], found["context"][0])
        return {name: values[1:] for name, values in found.items()}

    def named(self, y: Condition) -> list[str] | None:
        """What conditions say, for people: names of labels, or texts. None if they are not known."""
        if self.config.text_encoder is None or isinstance(y, Mapping):
            return self.space.conditions.named(y)
        with contextlib.suppress(RunError):  # texts can be drawn without their tokenizer
            return text_encoder(self.config).tokenizer().texts(np.asarray(y))
        return None

    def conditions(self, rule: str | None, num: int, seed: int) -> Condition:
        """The stored conditions of `num` samples, by a rule of `conditioning.RULES`."""
        return conditions(partial(open_data, self.config), self.space, rule, num, seed)


def open_data(config: ConfigDict, split: str = "train") -> Dataset:
    """The data set of a config.

    ConfigError if its latents have another scale than `config.codec.scale`, or its texts the tokens of another encoder.
    """
    dataset = configs.make("data", config.data, "config.data", split)
    if dataset.text is not None and (text := text_encoder(config)) is not None:
        text.check(dataset.text)
    scale = config.codec.get("scale", dataset.scale)
    if dataset.scale not in (None, scale):
        raise ConfigError(f"config.codec.scale = {scale}, but the autoencoder of these latents has {dataset.scale}")
    return dataset


def resident(experiment: Experiment, dataset: Dataset) -> Experiment:
    """The experiment, whose devices also hold the images of `dataset` if its config says so."""
    if not experiment.config.input.resident:
        return experiment
    numbered(dataset)  # or it says why not
    codec = experiment.components.codec
    if other := set(codec.reads) - {"x", "y"}:
        raise ConfigError(f"config.input.resident: config.codec reads `{min(other)}`, and only images can be resident")
    components = experiment.components._replace(codec=codecs.resident(codec, dataset.source))
    return experiment._replace(components=components)


def found(config: ConfigDict, dataset: Dataset) -> str:
    """A line about the data: how many examples and classes were found, and where."""
    count = dataset.space.conditions.classes
    classes = "" if count is None else f", {count or 'no'} class{'es' * (count != 1)}"
    place = ", ".join(str(part) for part in (config.data.name, config.data.get("data_dir")) if part)
    return f"{len(dataset.source):,} examples{classes}: {place}"


def inputs(config: ConfigDict, dataset: Dataset) -> dict[str, Any]:
    """What a run reads, by content: it is the same wherever the files lie.

    The number of examples and digests of 16 conditions, evenly spread; a digest of each file of weights. A
    record that cannot be read is left out: training replaces it, if config.input allows it.
    """
    count, conditions = len(dataset.source), {}
    for index in map(int, np.linspace(0, count - 1, min(count, 16))):
        with contextlib.suppress(DataError):
            (example,), _ = read(dataset.source, [index], 0)
            parts = [np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(example["y"])]
            conditions[str(index)] = hashlib.sha256(b"".join(parts)).hexdigest()[:8]
    found = {"data": {"examples": count, "condition": conditions}}
    for part in ("codec", "encoders", "text_encoder"):
        for key, path in flat({part: config.to_dict()[part]}).items():
            if key.split(".")[-1] in configs.PATHS and path is not None:
                place = weights_folder.folder_of(hub.local(path), "vae")
                if clip_tokenizer.holds(place):
                    found[f"{key} (tokenizer)"] = clip_tokenizer.digest(place)[:16]
                with contextlib.suppress(WeightsError):  # an encoder of a user may read other folders
                    found[key] = weights_folder.digest(place)[:16]
    return found


def conditions(data: Callable[[str], Dataset], space: Space, rule: str | None, num: int, seed: int) -> Condition:
    """The stored conditions of `num` samples, by a rule of `conditioning.RULES`.

    data: split -> data set. Held-out examples are those of `test`, or of `train` if there is no such split.
    """

    def held_out(num: int, shuffled: bool) -> Condition:
        try:
            source, transform, *_ = data("test")
        except RunError:
            source, transform, *_ = data("train")
        count = len(source)
        if shuffled and num > count:
            few = f"there are {count} held-out examples, and none is taken twice"
            raise ConfigError(f"labels = 'shuffled': {num} samples were asked for, but {few}")
        order = np.arange(num) % count
        if shuffled:
            order = np.random.Generator(np.random.Philox(seed)).permutation(count)[:num]
        found = []
        for first in range(0, num, AT_ONCE):
            examples, _ = read(source, order[first : first + AT_ONCE].tolist(), 0)
            if shuffled and transform is not None:  # it draws one of several captions
                examples = [transform(one, generator(seed, number)) for number, one in enumerate(examples, first)]
            found += [example["y"] for example in examples]
        return stacked(found)

    return conditioning.chosen(rule, num, space.conditions, seed, held_out)


def build(config: ConfigDict, space: Space, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """A run for stored examples of `space`. devices: of another machine, to compile for it; None: of this one."""
    check(config, BUILT)
    layout = sharding.make(**config.mesh, devices=devices)
    at_once = layout.shards * config.accumulate
    if config.batch_size % at_once:
        below = config.batch_size // at_once * at_once
        nearest = " or ".join(str(size) for size in (below, below + at_once) if size)
        parts = f" x {config.accumulate} accumulated parts" if config.accumulate > 1 else ""
        raise ConfigError(
            f"config.batch_size = {config.batch_size} is not divisible by {layout.shards} (data x fsdp of config.mesh)"
            f"{parts}; nearest: {nearest}"
        )
    options = configs.keywords(config.optim, "config.optim", optimizer.make)
    given = config.groups.items()
    groups = {label: configs.keywords(group, f"config.groups.{label}", optimizer.make) for label, group in given}
    transform, rates = optimizer.grouped(config.total_steps, options, groups)
    components = components_of(config, space, layout, transform)
    return Experiment(config, space, layout.with_rules(components.model.rules), components, rates)


def text_encoder(config: ConfigDict) -> TextEncoder | None:
    """The text encoder of a config, or None."""
    if config.text_encoder is None:
        return None
    encoder = configs.make("encoders", config.text_encoder, "config.text_encoder")
    if not isinstance(encoder, TextEncoder):
        raise ConfigError(f"config.text_encoder.name = {config.text_encoder.name!r}: it encodes images")
    return encoder


def check_features(stored: np.ndarray, ours: np.ndarray) -> None:
    """Raise ConfigError if the features of the empty text [n d] that data store are of another encoder than ours."""
    if stored.shape == ours.shape:
        lengths = np.linalg.norm(stored, axis=-1) * np.linalg.norm(ours, axis=-1)
        alike = float(np.mean(np.sum(stored * ours, axis=-1) / np.maximum(lengths, 1e-12)))
        if alike > ALIKE:
            return
        found = f"their cosine is {alike:.2f}"
    else:
        found = f"they are {list(stored.shape)} and {list(ours.shape)}"
    raise ConfigError(
        f"config.text_encoder: its features of the empty text differ from those that the data store ({found}): the "
        "data were made with another text encoder"
    )


def components_of(
    config: ConfigDict, space: Space, layout: sharding.Layout, transform: optax.GradientTransformation
) -> Components:
    """The components that a config names."""
    for label in {"objective", "total"} & set(config.losses):
        raise ConfigError(f"config.losses.{label}: the metrics use this name already; choose another label")
    losses = {label: configs.make("losses", c, f"config.losses.{label}") for label, c in config.losses.items()}
    objective = configs.make("objectives", config.objective, "config.objective")
    codec = configs.make("codecs", config.codec, "config.codec")
    text = text_encoder(config)
    codec = codec if text is None else with_text(codec, text)
    inner = network_space(codec, space)
    encoders = {label: configs.make("encoders", c, f"config.encoders.{label}") for label, c in config.encoders.items()}
    for label in [label for label, encoder in encoders.items() if isinstance(encoder, TextEncoder)]:
        raise ConfigError(
            f"config.encoders.{label}: {config.encoders[label].name} encodes texts: use config.text_encoder"
        )
    codec = with_encoders(codec, encoders) if encoders else codec
    read_blocks = tuple(sorted({block for aux in losses.values() for block in aux.blocks}))
    with jax.set_mesh(layout.mesh):  # a network may ask where it will run
        try:
            model = configs.make("models", config.model, "config.model", inner, objective.inputs, read_blocks)
        except ConfigError as error:  # of a block that a loss reads, a model does not know the label
            said = re.match(r"config\.losses: block = (-?\d+)(.*)", str(error))
            for label in [label for label, aux in losses.items() if said and int(said[1]) in aux.blocks]:
                raise ConfigError(f"config.losses.{label}: block = {said[1]}{said[2]}") from None
            raise
    null = space.conditions.null
    return Components(model, codec, objective, losses, transform, config.ema_decay, config.accumulate, null)


def work(experiment: Experiment, state: Any, batch: Any, again: bool = False) -> int:
    """The FLOPs of a training step on this state and batch, which may be abstract. Raises what tracing raises.

    again: also count what rematerialisation computes again.
    """
    config = configs.copied(experiment.config)
    countable = {"attention": "xla", "unroll": False} | ({} if again else {"remat": "none"})
    config.model.update({name: form for name, form in countable.items() if name in config.model})
    parts = experiment.components
    with jax.set_mesh(experiment.layout.mesh):
        inner = network_space(parts.codec, experiment.space)
        model = configs.make("models", config.model, "config.model", inner, parts.objective.inputs, ())
    step = partial(train_step, parts._replace(model=model))
    return flops.of(step, state, jax.eval_shape(parts.codec.init), batch, jax.eval_shape(jax.random.key, 0))


def on_this_machine(config: ConfigDict) -> ConfigDict:
    """A copy of a config whose mesh fits the devices of this machine, however many trained the run."""
    config = configs.copied(config)
    given = {axis: config.mesh[axis] for axis in ("fsdp", "tensor")}
    if min(given.values()) < 1 or jax.device_count() % math.prod(given.values()):
        given = {"fsdp": 1, "tensor": 1}
    config.mesh = ConfigDict({"data": -1, **given, "rules": config.mesh.rules})
    return config


def abstract_params(model: Model, layout: sharding.Layout) -> Params:
    """The shapes of a model's parameters, with their shardings."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return sharding.placed(abstract, sharding.shardings(abstract, layout))


def frozen_weights(codec: Codec, layout: sharding.Layout) -> Any:
    """The frozen weights of a codec, on the devices. They are not made under jit: the program would hold a file."""
    frozen = jax.tree.map(np.asarray, codec.init())
    return sharding.put(frozen, sharding.shardings(frozen, layout))


def sample_shape(codec: Codec, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of an image that is decoded from a sample of `shape`; None if samples are not decoded.

    ConfigError for a codec that does not decode to uint8.
    """
    if codec.decode is None:
        return None
    frozen, x = jax.eval_shape(codec.init), jax.ShapeDtypeStruct((1, *shape), np.float32)
    image = jax.eval_shape(codec.decode, frozen, x)
    if image.dtype != np.uint8:
        raise ConfigError(f"config.codec decodes samples to {image.dtype}, wanted images of uint8")
    return image.shape[1:]


def best_by(config: ConfigDict) -> str | None:
    """The label of the evaluator whose metric chooses the best checkpoints, or None. ConfigError if it is missing."""
    if not config.checkpoint.best:
        return None
    label = (config.checkpoint.metric or "").partition("/")[0]
    if label not in config.evaluators:
        wanted = f"must be LABEL/NAME of config.evaluators, known: {', '.join(config.evaluators) or 'none'}"
        raise ConfigError(f"config.checkpoint.metric = {config.checkpoint.metric!r}: {wanted}")
    return label


def to_json(space: Space) -> dict[str, Any]:
    """A space as plain data, for a checkpoint: sampling then needs no data set."""
    null, classes, names = space.conditions
    stored = {"shape": list(space.shape), "num_classes": classes} | ({"class_names": list(names)} if names else {})
    stored |= {"video": True} if space.video else {}
    if classes is None:
        arrays = jax.tree.map(np.asarray, null)
        stored["null"] = jax.tree.map(lambda x: [x.dtype.name, list(x.shape), x.ravel().tolist()], arrays)
    return stored


def from_json(stored: Mapping[str, Any]) -> Space:
    """The inverse of `to_json`; also for checkpoints of older versions, which knew only labels."""

    def array(leaf: list) -> np.ndarray:
        dtype, shape, values = leaf
        return np.array(values, dtype).reshape(shape)

    shape, classes, video = tuple(stored["shape"]), stored["num_classes"], stored.get("video", False)
    if classes is not None:
        return Space(shape, Conditions.labels(classes, stored.get("class_names", ())), video)
    null = jax.tree.map(array, stored["null"], is_leaf=lambda node: isinstance(node, list))
    return Space(shape, Conditions(null), video)
