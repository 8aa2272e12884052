"""Measure the representations of one checkpoint at one time over many images, a batch at a time.

Of each image only the mean token of every block and a few tokens are kept. Everything else is a sum over batches:
covariances, norms, cosines, HSIC of minibatches. So more images hardly need more memory.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diversedit_jax import sharding
from diversedit_jax.analysis.features import Learned, streams
from diversedit_jax.api import Batch
from diversedit_jax.data import Dataset, pipeline
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.metrics import similarity
from diversedit_jax.metrics.linear_probe import linear_probe
from diversedit_jax.registry import INT32, UINT32, in_range, one_of
from diversedit_jax.runs.build import Experiment
from diversedit_jax.runtime.progress import Ticker

UNITS = {
    "pooled": "an example is an image, by its mean token",
    "token": "an example is a token",
    "image": "an example is an image, by all its tokens",
}
HSICS = ("biased", "unbiased", "minibatch")
TOKENS = 2048  # the most examples, if an example is a token
IMAGE_BYTES = 2**30  # the most memory for features of whole images


class Estimator(NamedTuple):
    """A way to compare blocks.

    unit: of UNITS. kernel: of `similarity.KERNELS`. hsic: of HSICS.
    multiplier: bandwidth of `rbf`, in median distances. degree: of `polynomial`.
    """

    unit: str = "pooled"
    kernel: str = "linear"
    hsic: str = "unbiased"
    multiplier: float = 1.0
    degree: int = 3

    def gram(self) -> similarity.Kernel:
        """Bind the kernel to its option."""
        option = {"rbf": {"multiplier": self.multiplier}, "polynomial": {"degree": self.degree}}
        return partial(similarity.KERNELS[self.kernel], **option.get(self.kernel, {}))

    def name(self) -> str:
        """Describe the estimator in words."""
        option = {"rbf": f", {self.multiplier:g} x median", "polynomial": f", degree {self.degree}"}
        return f"{self.kernel}{option.get(self.kernel, '')} CKA, {self.hsic}, {UNITS[self.unit]}"

    def gathers_images(self) -> bool:
        """Whether the features of whole images must be kept."""
        return self.unit == "image" and self.hsic != "minibatch"


class Settings(NamedTuple):
    """How to measure. num: images, in batches of `batch`. noises: draws of noise for each. labels: `real` or `null`."""

    estimator: Estimator = Estimator()
    num: int = 512
    batch: int = 8
    noises: int = 1
    labels: str = "real"
    split: str = "test"
    seed: int = 0


class Measured(NamedTuple):
    """One checkpoint at one time. l blocks, d channels.

    similarity: by the estimator, a mean over draws of noise. All other fields are of the first draw.
    spread: the standard deviation of the mean similarity over draws of noise.
    centred_cosine: of tokens minus the mean token of their batch. mean_share: of the mean token in a block's energy.
    rows: the examples of each unit that was gathered, and the mean tokens of texts, `text`.
    minibatch: CKA by (unit, kernel).
    both: CKA of the k blocks of both streams, the image stream first, by their mean tokens. None: no text stream, or
        fewer than two blocks give text.
    """

    similarity: Float[np.ndarray, "l l"]
    spread: float
    token_cosine: Float[np.ndarray, "l l"]
    mean_cosine: Float[np.ndarray, "l l"]
    centred_cosine: Float[np.ndarray, "l l"]
    covariance: Float[np.ndarray, "l d d"]
    norm: Float[np.ndarray, " l"]
    mean_share: Float[np.ndarray, " l"]
    rows: Mapping[str, Float[np.ndarray, "l n p"]]
    minibatch: Mapping[tuple[str, str], Float[np.ndarray, "l l"]]
    both: Float[np.ndarray, "k k"] | None = None


def check(settings: Settings) -> None:
    """Raise ConfigError for settings that cannot be measured."""
    estimator = settings.estimator
    one_of("--unit", estimator.unit, UNITS)
    one_of("--kernel", estimator.kernel, similarity.KERNELS)
    one_of("--hsic", estimator.hsic, HSICS)
    one_of("--labels", settings.labels, ("real", "null"))
    in_range("--multiplier", estimator.multiplier, above=0)
    in_range("--degree", estimator.degree, 1)
    for name in ("num", "batch", "noises"):
        in_range(f"--{name}", getattr(settings, name), 1, INT32)
    in_range("--seed", settings.seed, 0, UINT32)
    if sharding.filled(settings.batch) < 4:
        raise ConfigError(f"--batch={settings.batch}: must be at least 4, for the unbiased estimator of HSIC")


def split_of(data: Callable[[str], Dataset], split: str | None) -> str:
    """Choose the split: the given one, else `test` if the data have it, else `train`."""
    if split is None:
        with contextlib.suppress(RunError):
            data("test")
            return "test"
    return split or "train"


def whole_batches(dataset: Dataset, settings: Settings) -> int:
    """The number of whole batches in at most `num` examples. ConfigError if there is none."""
    batch = sharding.filled(settings.batch)
    if count := min(settings.num, len(dataset.source)) // batch:
        return count
    raise ConfigError(f"--num={settings.num} of {len(dataset.source)} examples: not one batch of {batch} (--batch)")


def batches(dataset: Dataset, settings: Settings, layout: sharding.Layout) -> list[Batch]:
    """Read the first whole batches, at most `num` examples in an order by the seed, onto all devices."""
    batch, count = sharding.filled(settings.batch), whole_batches(dataset, settings)
    rows = sharding.rows(layout, batch)
    with contextlib.closing(pipeline.batches(dataset, batch, settings.seed, rows=rows, num_threads=1)) as loader:
        return [sharding.from_rows(local, layout, batch) for local in itertools.islice(loader, count)]


class Pass(NamedTuple):
    """The compiled pass of a network over a batch, for all its checkpoints and times."""

    experiment: Experiment
    settings: Settings
    run: Callable[..., dict[str, Any]]


def compiled(experiment: Experiment, settings: Settings) -> Pass:
    """Prepare the pass over a batch. It compiles at its first use."""
    check(settings)
    estimator = settings.estimator

    @jax.jit(out_shardings=sharding.replicated(experiment.layout))
    def run(learned, frozen, batch, t, key, hidden):  # hidden: whether the network gets the null condition
        key_tokens, key = jax.random.split(key)
        found = streams(experiment, learned, frozen, batch, t, key, hidden)
        stack = found.image
        blocks, b, n, d = stack.shape
        tokens = stack.reshape(blocks, b * n, d)
        mean = tokens.mean(axis=1)
        centred = tokens - mean[:, None]
        wanted = -(-TOKENS * b // max(settings.num, b))  # of this batch's tokens
        some = jax.random.permutation(key_tokens, b * n)[: min(max(wanted, 4), b * n)]
        rows = {"pooled": stack.mean(axis=2), "token": tokens[:, some]}
        units = rows | {"image": stack.reshape(blocks, b, n * d)}
        kernels = {kernel: estimator._replace(kernel=kernel).gram() for kernel in similarity.KERNELS}
        return {
            "rows": (units if estimator.gathers_images() else rows)
            | ({} if found.text is None else {"text": found.pooled_text()}),
            "hsic": {
                (unit, kernel): similarity.hsic_of(units[unit], gram, similarity.hsic_unbiased)
                for unit in UNITS
                for kernel, gram in kernels.items()
            },
            "token_cosine": similarity.token_cosine(stack),
            "mean_cosine": similarity.mean_cosine(stack),
            "centred_cosine": similarity.centred_cosine(stack),
            "norm": jnp.linalg.norm(tokens, axis=-1).mean(axis=1),
            "mean": mean,
            "scatter": jnp.einsum("lnd,lne->lde", centred, centred, precision="highest"),
            "count": b * n,
            "labels": None if experiment.space.conditions.classes is None else batch["y"],
        }

    return Pass(experiment, settings, run)


def measure(ready: Pass, learned: Learned, frozen: Any, shown: Sequence[Batch], t: float) -> Measured:
    """Measure a checkpoint on some batches at time t."""
    settings, estimator = ready.settings, ready.settings.estimator
    found, first = [], {}
    for draw in range(settings.noises):
        total = _over_batches(ready, learned, frozen, shown, t, draw, hidden=settings.labels == "null")
        minibatch = {name: np.asarray(similarity.normalised(jnp.asarray(x))) for name, x in total["hsic"].items()}
        if estimator.hsic == "minibatch":
            found.append(minibatch[estimator.unit, estimator.kernel])
        else:
            found.append(similar(estimator, total["rows"][estimator.unit]))
        first = first or total | {"minibatch": minibatch, "both": of_both(estimator, total["rows"])}
    averages = [float(similarity.off_diagonal_mean(jnp.asarray(one))) for one in found]
    return Measured(
        np.mean(found, axis=0),
        float(np.std(averages, ddof=1)) if len(averages) > 1 else 0.0,
        *(first[name] for name in Measured._fields[2:]),
    )


def probe_accuracies(
    ready: Pass, learned: Learned, frozen: Any, fitted: Sequence[Batch], shown: Sequence[Batch] | None, t: float
) -> Float[np.ndarray, " l"]:
    """Compute the accuracy of a linear probe of the mean token of every block at time t.

    The probe is fitted to the images in `fitted` and tested on `shown`. None: tested on the last fifth of `fitted`.
    The network gets the null label, because the probe would read a real label from the network's own condition.
    """

    def read(images: Sequence[Batch]) -> tuple[Float[np.ndarray, "l n d"], Int[np.ndarray, " n"]]:
        total = _over_batches(ready, learned, frozen, images, t, 0, hidden=True)
        return total["rows"]["pooled"], total["labels"]

    rows, labels = read(fitted)
    if shown is None:
        cut = max(1, len(labels) * 4 // 5)
        rows, test_rows, labels, test_labels = rows[:, :cut], rows[:, cut:], labels[:cut], labels[cut:]
    else:
        test_rows, test_labels = read(shown)
    return np.asarray(_probes(rows, labels, test_rows, test_labels, ready.experiment.space.conditions.classes))


@jax.jit(static_argnums=4)
def _probes(rows, labels, test_rows, test_labels, classes: int):
    return jax.lax.map(lambda block: linear_probe(block[0], labels, block[1], test_labels, classes), (rows, test_rows))


def _over_batches(
    ready: Pass, learned: Learned, frozen: Any, shown: Sequence[Batch], t: float, draw: int, hidden: bool
) -> dict[str, Any]:
    """Gather the rows of all batches, and average the rest, for one draw of noise."""
    parts, sums, labels = {}, {}, []
    key = jax.random.fold_in(jax.random.key(ready.settings.seed), draw)
    size = sharding.filled(ready.settings.batch)
    with Ticker(size * len(shown), "examples", leave=False) as ticker:
        for number, batch in enumerate(shown):
            now = jax.random.fold_in(key, number)
            out = jax.device_get(ready.run(learned, frozen, batch, jnp.float32(t), now, hidden))
            for unit, rows in out.pop("rows").items():
                if unit != "token" or sum(part.shape[1] for part in parts.get(unit, [])) < TOKENS:
                    parts.setdefault(unit, []).append(rows)
            labels.append(out.pop("labels"))
            sums = _merged(sums, out | {"batches": 1}) if sums else out | {"batches": 1}
            held = sum(part.nbytes for part in parts.get("image", []))
            if held > IMAGE_BYTES:
                raise ConfigError(
                    f"--unit=image: the features of {size * (number + 1)} whole images already take "
                    f"{held / 2**30:.1f} GB: give --hsic=minibatch, which keeps none, or a smaller --num"
                )
            ticker.update(size)
    blocks = {unit: np.concatenate(found, axis=1) for unit, found in parts.items()}
    blocks["token"] = blocks["token"][:, :TOKENS]
    count, covariance = sums["batches"], sums["scatter"] / sums["count"]
    of_mean = np.sum(sums["mean"] ** 2, axis=1)
    return {
        "rows": blocks,
        "labels": None if labels[0] is None else np.concatenate(labels),
        "covariance": covariance,
        "mean_share": of_mean / (of_mean + np.trace(covariance, axis1=1, axis2=2)),
        "hsic": {name: hsic / count for name, hsic in sums["hsic"].items()},
        **{name: sums[name] / count for name in ("token_cosine", "mean_cosine", "centred_cosine", "norm")},
    }


def _merged(total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Add the sums of two sets of tokens. The scatter is about the common mean (Chan et al., 1979)."""
    n, m = int(total["count"]), int(part["count"])
    between = part["mean"] - total["mean"]
    added = {name: jax.tree.map(np.add, total[name], part[name]) for name in total if name != "mean"}
    added["mean"] = total["mean"] + between * (m / (n + m))
    added["scatter"] += np.einsum("ld,le->lde", between, between) * np.float32(n * m / (n + m))
    return added


def of_both(estimator: Estimator, rows: Mapping[str, np.ndarray]) -> Float[np.ndarray, "k k"] | None:
    """Compute the CKA of the mean tokens of all blocks of the image and of the text stream; None without text."""
    if len(rows.get("text", ())) < 2:
        return None
    hsic = "unbiased" if estimator.hsic == "minibatch" else estimator.hsic
    return similar(estimator._replace(hsic=hsic), [*rows["pooled"], *rows["text"]])


def similar(estimator: Estimator, rows: Float[np.ndarray, "l n p"] | Sequence[np.ndarray]) -> Float[np.ndarray, "l l"]:
    """Compute the CKA of gathered rows, biased or unbiased. The blocks may differ in width."""
    with jax.default_device(jax.local_devices()[0]):
        return np.asarray(_similar(estimator, jax.tree.map(jnp.asarray, rows)))


@jax.jit(static_argnums=0)
def _similar(estimator: Estimator, rows: Array | list[Array]) -> Array:
    return similarity.cka(rows, estimator.gram(), similarity.HSICS[estimator.hsic])
