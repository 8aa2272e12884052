"""Time the parts of an evaluation without sampling: features, moments, distances.

- Features: of random images of 256 pixels, by the function of `evaluate`: float32, with the copy to the host. Resizing
  to 299 pixels is also timed alone. Without --extractor, FID's Inception gets random weights.
- Frechet distance: of 2,048 features, beside the usual square root of the product of covariances (scipy's sqrtm). The
  eigenvalues of these covariances span five orders of magnitude.
- Precision and recall: of fewer images than in papers, extrapolated by the number of distances.
"""

from typing import Any

import jax
import numpy as np
import scipy.linalg

from diversedit_jax import sharding
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import extractors, scoring
from diversedit_jax.evaluation.extractors import Extractor, Features
from diversedit_jax.metrics.frechet import frechet_distance
from diversedit_jax.metrics.precision_recall import precision_recall
from diversedit_jax.models import inception
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.progress import brief, duration
from tools.benchmark import timing

WIDTH, SIDE = 2048, 256
PART, GATHERED = 256, 2_048  # images whose moments are merged at a time
REFERENCE, SAMPLES = 1_000, 5_000  # images for precision and recall
PAPER = 10_000, 50_000


def random_inception() -> Extractor:
    """FID's Inception with random weights."""
    network = inception.network("highest")
    weights = jax.device_get(jax.jit(network.init)(jax.random.key(0)))
    about = {"weights": {"name": "random"}}
    return Extractor("inception", lambda: weights, lambda *given: Features(*network.apply(*given)), about)


def operations(one: Extractor) -> float:
    """FLOPs for one image as XLA counts them: two for a multiply-add, none for padding. Inception: 11.25e9."""
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.uint8)
    return jax.jit(one.apply).lower(one.init(), image).compile().cost_analysis()["flops"]


def covariance(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A mean and a covariance whose eigenvalues fall from 1 to 1e-5."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2 * WIDTH, WIDTH)) * np.logspace(0, -2.5, WIDTH)
    axes, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    turned = root @ axes
    return rng.normal(size=WIDTH), turned.T @ turned / len(root)


def by_sqrtm(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The Frechet distance in its usual form."""
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root).real)


def run(one: Extractor, batch: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    rng = np.random.default_rng(0)
    layout = sharding.make()
    if batch < 1 or batch % (one.chunk * layout.mesh.size):
        raise ConfigError(f"--batch_size={batch}: must be a multiple of {one.chunk} x {layout.mesh.size} devices")
    extract = scoring.extraction([one], layout, batch)
    images = rng.integers(0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8)
    first, second = covariance(0), covariance(1)
    reference, samples = (rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (REFERENCE, SAMPLES))
    part, gathered = (
        Features(*(rng.normal(size=(n, d)).astype(np.float32) for d in (WIDTH, 2023))) for n in (PART, GATHERED)
    )
    totals = scoring.Totals().plus(part)
    resized = jax.jit(lambda images: sharding.in_chunks(inception.inputs, images, one.chunk, layout.mesh.size))
    on_device = jax.device_put(images, sharding.over_batch(layout))
    forms = {
        "features": lambda: extract(images),
        "resizing": lambda: jax.block_until_ready(resized(on_device)),
        f"moments of {PART}": lambda: totals.plus(part),
        f"moments of {GATHERED:,}": lambda: totals.plus(gathered),
        "frechet": lambda: frechet_distance(*first, *second),
        "frechet by sqrtm": lambda: by_sqrtm(*first, *second),
        "precision and recall, exact": lambda: precision_recall(reference, samples),
        "precision and recall, float16": lambda: precision_recall(reference, samples, distances="float16"),
    }
    if one.name != "inception":
        del forms["resizing"]
    times = timing.in_turn({name: timing.clocked(form) for name, form in forms.items()}, rounds)
    spreads = {name: timing.spread(values) for name, values in times.items()}
    seconds = {name: found["median"] for name, found in spreads.items()}
    pairs, wanted = (a**2 + b**2 + a * b for a, b in ((REFERENCE, SAMPLES), PAPER))
    flops = operations(one)
    return {
        "rows": [{"name": name, "s": found} for name, found in spreads.items()],
        "features_per_s": batch / seconds["features"],
        "features_tflops_per_s": batch / seconds["features"] * flops / 1e12,
        "gflop_per_image": flops / 1e9,
        "resizing_share": seconds["resizing"] / seconds["features"] if "resizing" in seconds else None,
        "moments_per_s": {str(n): n / seconds[f"moments of {n:,}"] for n in (PART, GATHERED)},
        "frechet_ratio": seconds["frechet by sqrtm"] / seconds["frechet"],
        "frechet_difference": by_sqrtm(*first, *second) / frechet_distance(*first, *second) - 1,
        "precision_recall_extrapolated_s": {
            mode: seconds[f"precision and recall, {mode}"] * wanted / pairs for mode in ("exact", "float16")
        },
        "sizes": {"batch": batch, "precision_recall": [REFERENCE, SAMPLES], "extrapolated_to": list(PAPER)},
    }


def table(found: dict[str, Any]) -> str:
    """The seconds as a table, and notes."""
    share = found["resizing_share"]
    notes = [
        f"Features: {brief(found['features_per_s'])} images/s, {found['features_tflops_per_s']:.3f} TFLOP/s"
        f" ({found['gflop_per_image']:.1f} GFLOP an image)"
        + ("." if share is None else f", {share:.1%} of the time for resizing."),
        *(f"Moments: {brief(rate)} images/s in parts of {n}." for n, rate in found["moments_per_s"].items()),
        f"Frechet distance: {found['frechet_ratio']:.1f} times as fast as by sqrtm, which differs by"
        f" {found['frechet_difference']:.0e} of it.",
    ]
    notes += [
        f"Precision and recall of {PAPER[0]:,} and {PAPER[1]:,}, {mode}: about {duration(seconds)}, extrapolated."
        for mode, seconds in found["precision_recall_extrapolated_s"].items()
    ]
    return timing.table_of(found["rows"], {"seconds": ("s", 3)}) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures and their table."""
    named = cli.named_files("extractor", [given.extractor] if given.extractor else [])
    one = next((extractors.make(name, **options) for name, options in named.items()), None) or random_inception()
    found = run(one, given.batch_size, given.rounds) | {"weights": dict(one.about["weights"])}
    return found, table(found)
