"""The representations of one checkpoint at one time, measured over many images, a batch at a time.

What is kept of an image is little: the mean token of every block, and a few tokens. The rest are sums: covariances,
norms, cosines, and HSIC of minibatches. So the memory is that of one batch, whatever the number of images.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diversedit_jax import sharding
from diversedit_jax.analysis.features import Learned, features
from diversedit_jax.api import Batch
from diversedit_jax.data import Dataset, pipeline
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.metrics import similarity
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.runs.build import Experiment
from diversedit_jax.runtime.progress import Ticker

UNITS = {
    "pooled": "an example is an image, by its mean token",
    "token": "an example is a token",
    "image": "an example is an image, by all its tokens",
}
HSICS = ("biased", "unbiased", "minibatch")
KERNELS = tuple(similarity.KERNELS)
TOKENS = 2048  # examples at most, where tokens are gathered
IMAGE_BYTES = 2**30  # at most, where whole images are gathered


class Estimator(NamedTuple):
    """A way to compare blocks. unit: of UNITS. kernel: of `similarity.KERNELS`. hsic: of HSICS.

    multiplier: of the median distance, for `rbf`. degree: of `polynomial`.
    """

    unit: str = "pooled"
    kernel: str = "linear"
    hsic: str = "unbiased"
    multiplier: float = 1.0
    degree: int = 3

    def gram(self) -> similarity.Kernel:
        """The kernel with its option."""
        options = {"rbf": {"multiplier": self.multiplier}, "polynomial": {"degree": self.degree}}
        return partial(similarity.KERNELS[self.kernel], **options.get(self.kernel, {}))

    def name(self) -> str:
        """In words."""
        option = {"rbf": f", {self.multiplier:g} x median", "polynomial": f", degree {self.degree}"}
        return f"{self.kernel}{option.get(self.kernel, '')} CKA, {self.hsic}, {UNITS[self.unit]}"


class Settings(NamedTuple):
    """How to look. num: images, in batches of `batch`; noises: draws of noise for each; labels: `real` or `null`."""

    estimator: Estimator = Estimator()
    num: int = 512
    batch: int = 8
    noises: int = 1
    labels: str = "real"
    split: str = "test"
    seed: int = 0


class Measured(NamedTuple):
    """One checkpoint at one time; l blocks, d channels. Lists over draws of noise are averaged.

    similarity: by the estimator. spread: of its mean off-diagonal over draws of noise, a standard deviation.
    rows: [l n d] of each unit that was gathered, of the first draw. minibatch: CKA by (unit, kernel).
    labels: of the images, None where their conditions are not labels.
    """

    similarity: Float[np.ndarray, "l l"]
    spread: float
    token_cosine: Float[np.ndarray, "l l"]
    mean_cosine: Float[np.ndarray, "l l"]
    covariance: Float[np.ndarray, "l d d"]
    norm: Float[np.ndarray, " l"]
    rows: Mapping[str, Float[np.ndarray, "l n p"]]
    minibatch: Mapping[tuple[str, str], Float[np.ndarray, "l l"]]
    labels: Int[np.ndarray, " n"] | None


def check(settings: Settings) -> None:
    """Raise ConfigError for what cannot be measured."""
    estimator = settings.estimator
    one_of("--unit", estimator.unit, UNITS)
    one_of("--kernel", estimator.kernel, similarity.KERNELS)
    one_of("--hsic", estimator.hsic, HSICS)
    one_of("--labels", settings.labels, ("real", "null"))
    in_range("--multiplier", estimator.multiplier, above=0)
    in_range("--degree", estimator.degree, 1)
    in_range("--num", settings.num, 1)
    in_range("--batch", settings.batch, 1)
    in_range("--noises", settings.noises, 1)
    if sharding.filled(settings.batch) < 4:
        raise ConfigError(f"--batch={settings.batch}: minibatch estimators need at least 4 images at a time")


def split_of(data: Callable[[str], Dataset], split: str | None) -> str:
    """The split to look at: as asked for, else `test` where the data have it, else `train`."""
    if split is not None:
        return split
    try:
        data("test")
    except RunError:
        return "train"
    return "test"


def batches(dataset: Dataset, settings: Settings, layout: sharding.Layout) -> list[Batch]:
    """The first whole batches of the data, at most `num` examples, in an order by the seed; placed over all devices.

    ConfigError where there is not one batch.
    """
    batch = sharding.filled(settings.batch)
    count = min(settings.num, len(dataset.source)) // batch
    if not count:
        raise ConfigError(f"--num={settings.num} of {len(dataset.source)} examples: not one batch of {batch} (--batch)")
    rows = sharding.rows(layout, batch)
    with contextlib.closing(pipeline.batches(dataset, batch, settings.seed, rows=rows, num_threads=1)) as loader:
        return [sharding.from_rows(local, layout, batch) for local in itertools.islice(loader, count)]


class Pass(NamedTuple):
    """The compiled pass of a network over a batch, for all its checkpoints and times."""

    experiment: Experiment
    settings: Settings
    run: Any


def compiled(experiment: Experiment, settings: Settings) -> Pass:
    """The pass over a batch, compiled at its first use and once."""
    check(settings)
    copied = sharding.replicated(experiment.layout)
    return Pass(experiment, settings, jax.jit(partial(_measure, experiment, settings), out_shardings=copied))


def _measure(
    experiment: Experiment,
    settings: Settings,
    learned: Learned,
    frozen: Any,
    batch: Batch,
    t: Array,
    key: Array,
    hidden: Array,
) -> dict[str, Any]:
    """All that is taken from one batch: rows by unit, and sums. hidden: whether the network sees no conditions."""
    key_tokens, key = jax.random.split(key)
    stack = features(experiment, learned, frozen, batch, t, key, hidden)
    blocks, b, n, d = stack.shape
    tokens = stack.reshape(blocks, b * n, d)
    mean = tokens.mean(axis=1)
    centred = tokens - mean[:, None]
    wanted = -(-TOKENS * b // max(settings.num, b))
    some = jax.random.permutation(key_tokens, b * n)[: min(max(wanted, 4), b * n)]
    rows = {"pooled": stack.mean(axis=2), "token": tokens[:, some]}
    units = rows | {"image": stack.reshape(blocks, b, n * d)}
    grams = {(unit, kernel): settings.estimator._replace(kernel=kernel).gram() for unit in UNITS for kernel in KERNELS}
    hsic = {name: similarity.hsic_of(units[name[0]], gram, similarity.hsic_unbiased) for name, gram in grams.items()}
    if _gathers_images(settings.estimator):
        rows = units
    return {
        "rows": rows,
        "hsic": {"/".join(name): found for name, found in hsic.items()},
        "token_cosine": similarity.token_cosine(stack),
        "mean_cosine": similarity.mean_cosine(stack),
        "norm": jnp.linalg.norm(tokens, axis=-1).mean(axis=1),
        "mean": mean,
        "scatter": jnp.einsum("lnd,lne->lde", centred, centred, precision="highest"),
        "count": b * n,
        "labels": None if experiment.space.conditions.classes is None else batch["y"],
    }


def _gathers_images(estimator: Estimator) -> bool:
    return estimator.unit == "image" and estimator.hsic != "minibatch"


def measure(ready: Pass, learned: Learned, frozen: Any, shown: Sequence[Batch], t: float) -> Measured:
    """Look at a checkpoint at time t. shown: the batches."""
    settings = ready.settings
    hidden = settings.labels == "null"
    found: list[Float[np.ndarray, "l l"]] = []
    first: dict[str, Any] = {}
    for draw in range(settings.noises):
        total = _over_batches(ready, learned, frozen, shown, t, draw, hidden)
        minibatch = {
            tuple(name.split("/")): np.asarray(similarity.normalised(jnp.asarray(hsic)))
            for name, hsic in total["hsic"].items()
        }
        estimator = settings.estimator
        if estimator.hsic == "minibatch":
            found.append(minibatch[estimator.unit, estimator.kernel])
        else:
            found.append(similar(estimator, total["rows"][estimator.unit]))
        first = first or total | {"minibatch": minibatch}
    averages = [float(similarity.off_diagonal_mean(jnp.asarray(one))) for one in found]
    return Measured(
        np.mean(found, axis=0),
        float(np.std(averages, ddof=1)) if len(averages) > 1 else 0.0,
        *(first[name] for name in ("token_cosine", "mean_cosine", "covariance", "norm", "rows", "minibatch", "labels")),
    )


def pooled(
    ready: Pass, learned: Learned, frozen: Any, shown: Sequence[Batch], t: float
) -> tuple[Float[np.ndarray, "l n d"], Int[np.ndarray, " n"]]:
    """The mean token of every block for every image, where the network does not see the labels; and the labels."""
    total = _over_batches(ready, learned, frozen, shown, t, 0, hidden=True)
    return total["rows"]["pooled"], total["labels"]


def _over_batches(
    ready: Pass, learned: Learned, frozen: Any, shown: Sequence[Batch], t: float, draw: int, hidden: bool
) -> dict[str, Any]:
    """The rows of all batches, and their sums, for one draw of noise."""
    parts: dict[str, list[np.ndarray]] = {}
    sums: dict[str, Any] = {}
    labels: list[np.ndarray | None] = []
    key = jax.random.fold_in(jax.random.key(ready.settings.seed), draw)
    with Ticker(sum(map(count_of, shown)), leave=False) as ticker:
        for number, batch in enumerate(shown):
            now = jax.random.fold_in(key, number)
            out = jax.device_get(ready.run(learned, frozen, batch, jnp.float32(t), now, hidden))
            for unit, rows in out.pop("rows").items():
                if unit != "token" or sum(part.shape[1] for part in parts.get(unit, [])) < TOKENS:
                    parts.setdefault(unit, []).append(rows)
            labels.append(out.pop("labels"))
            sums = _merged(sums, out)
            if _gathers_images(ready.settings.estimator):
                _check_gathered(parts["image"])
            ticker.update(count_of(batch))
    blocks = {unit: np.concatenate(found, axis=1) for unit, found in parts.items()}
    blocks["token"] = blocks["token"][:, :TOKENS]
    count = sums["batches"]
    return {
        "rows": blocks,
        "labels": None if labels[0] is None else np.concatenate(labels),
        "covariance": sums["scatter"] / sums["count"],
        "hsic": {name: hsic / count for name, hsic in sums["hsic"].items()},
        **{name: sums[name] / count for name in ("token_cosine", "mean_cosine", "norm")},
    }


def count_of(batch: Batch) -> int:
    """The number of examples in a batch."""
    return len(jax.tree.leaves(batch)[0])


def _merged(total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Sums of two sets of tokens, all of one batch size; the scatter is about the common mean (Chan et al., 1979)."""
    part = part | {"batches": 1}
    if not total:
        return part
    n, m = int(total["count"]), int(part["count"])
    between = part["mean"] - total["mean"]
    added = {name: jax.tree.map(np.add, total[name], part[name]) for name in total if name != "mean"}
    added["mean"] = total["mean"] + between * (m / (n + m))
    added["scatter"] += np.einsum("ld,le->lde", between, between) * np.float32(n * m / (n + m))
    return added


def _check_gathered(images: Sequence[np.ndarray]) -> None:
    held = sum(part.nbytes for part in images)
    if held > IMAGE_BYTES:
        raise ConfigError(
            f"--unit=image: the features of {sum(part.shape[1] for part in images)} whole images already take "
            f"{held / 2**30:.1f} GB: give --hsic=minibatch, which keeps none, or a smaller --num"
        )


def similar(estimator: Estimator, rows: Float[np.ndarray, "l n p"]) -> Float[np.ndarray, "l l"]:
    """CKA of gathered rows, biased or unbiased."""
    with jax.default_device(jax.local_devices()[0]):
        return np.asarray(_similar(estimator)(jnp.asarray(rows)))


@cache
def _similar(estimator: Estimator):
    return jax.jit(lambda rows: similarity.cka(rows, estimator.gram(), similarity.HSICS[estimator.hsic]))
