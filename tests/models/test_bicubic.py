"""Bicubic resizing: equal to the definition, pixel by pixel, and to PyTorch's numbers in REPA's preprocessing."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import encoders
from diversedit_jax.models import bicubic
from tests import DATA


def cubic(x: float, a: float) -> float:
    """Keys' kernel, in powers."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(signal: np.ndarray, wanted: int, antialias: bool, scale: float) -> np.ndarray:
    """A signal resized as PyTorch's documentation and kernels define it: one output, one tap at a time."""
    out = []
    for i in range(wanted):
        centre = scale * (i + 0.5)
        if antialias:
            width = max(scale, 1.0)
            first, last = max(math.floor(centre - 2 * width), 0), min(math.ceil(centre + 2 * width), len(signal))
            taps = [(cubic((j + 0.5 - centre) / width, -0.5), signal[j]) for j in range(first, last)]
            out.append(sum(w * v for w, v in taps) / sum(w for w, _ in taps))
        else:
            left = math.floor(centre - 0.5)
            taps = [
                (cubic(centre - 0.5 - j, -0.75), signal[min(max(j, 0), len(signal) - 1)])
                for j in range(left - 1, left + 3)
            ]
            out.append(sum(w * v for w, v in taps))
    return np.array(out)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("given", "wanted", "offset"),
    [(37, 16, 0), (37, 32, 0), (14, 16, 0), (37, 16, 0.1), (4, 9, 0.1), (7, 7, 0), (5, 1, 0)],
)
def test_weights_are_the_definition(given, wanted, offset, antialias):
    scale = given / (wanted + offset)
    matrix = bicubic.weights(given, wanted, antialias, scale)
    signal = np.random.default_rng(0).standard_normal(given)
    np.testing.assert_allclose(matrix @ signal, resized(signal, wanted, antialias, scale), atol=2e-5)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    if (given, offset) == (wanted, 0):
        np.testing.assert_array_equal(matrix, np.eye(given))


def test_each_axis_is_resized_by_itself():
    x = np.random.default_rng(0).standard_normal((2, 12, 10, 3)).astype(np.float32)
    out = bicubic.resize(jnp.asarray(x), 7)
    rows = np.apply_along_axis(resized, 1, x, 7, False, 12 / 7)
    np.testing.assert_allclose(out, np.apply_along_axis(resized, 2, rows, 7, False, 10 / 7), atol=2e-5)


def test_repa_s_preprocessing():
    """Normalised, then resized; stored as float16, so that half of its last digit is all that may differ."""
    with np.load(DATA / "repa_preprocess.npz") as file:
        image, gold = (file[name].transpose(0, 2, 3, 1) for name in ("raw_uint8", "dino_input"))
    x = encoders.normalise(jnp.asarray(image), encoders.IMAGENET_MEAN, encoders.IMAGENET_STD)
    error = np.abs(np.asarray(bicubic.resize(x, 224)) - gold.astype(np.float32))
    assert (error - np.spacing(np.abs(gold)).astype(np.float32) / 2).max() < 2e-6
    other = encoders.normalise(bicubic.resize(jnp.asarray(image).astype(jnp.float32), 224), (0.5,), (0.5,))
    assert np.abs(np.asarray(other) - gold.astype(np.float32)).max() > 0.1, "the statistics change nothing"
