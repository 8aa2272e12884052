"""Counts of arithmetic, against formulas and published figures."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from diversedit_jax import models
from diversedit_jax.api import Conditions, Space
from diversedit_jax.configs import diversedit
from diversedit_jax.models.dit import SIZES
from diversedit_jax.runs import build
from diversedit_jax.runtime import flops
from diversedit_jax.training.step import initializer


def forward(size: str, side: int, **options) -> float:
    """GMAC of one image through a network, half of the GFLOP."""
    model = models.make("dit", Space((side, side, 4), Conditions.labels(1000)), size=size, **options)
    params = jax.eval_shape(model.init, jax.random.key(0))
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    x = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
    return flops.of(model.apply, params, x, one, jax.ShapeDtypeStruct((1,), jnp.int32)) / 2e9


# DiT, arXiv 2212.09748, table 1 and 9, to the digits that stand there; the last two from their formula.
@pytest.mark.parametrize(
    ("size", "side", "options", "wanted"),
    [
        ("S", 32, {}, 6.06),
        ("B", 32, {}, 23.01),
        ("L", 32, {}, 80.71),
        ("XL", 32, {}, 118.64),
        ("XL", 64, {}, 524.60),
        ("B", 32, {"skip": "release"}, 24.82),
        ("XL", 32, {"skip": "release"}, 128.15),
    ],
)
def test_published_counts(size, side, options, wanted):
    assert forward(size, side, **options) == pytest.approx(wanted, rel=1e-3)


def test_by_the_formula():
    depth, d, _ = SIZES["S"]
    n = 64
    block = 12 * n * d**2 + 2 * n**2 * d + 6 * d**2  # matrices on tokens, attention, adaLN
    ends = 2 * n * d * 16 + 2 * d**2 + 256 * d + d**2  # patches in and out, final adaLN, time embedding
    assert forward("S", 16) == pytest.approx((depth * block + ends) / 1e9, rel=1e-9)
    assert forward("S", 16, remat="full", attention="xla") == forward("S", 16)


def test_loops_branches_and_convolutions():
    a = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    product = 2 * 4**3

    def loop(a):
        return jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=5)[0]

    def branch(a):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a)

    assert flops.of(loop, a) == 5 * product
    assert flops.of(branch, a) == 2 * product
    assert flops.of(jax.jit(jax.vmap(lambda x: x @ x)), jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)) == 3 * product
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert flops.of(conv, image, kernel) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


@pytest.mark.parametrize(("remat", "again"), [("named", 1.009), pytest.param("full", 1.315, marks=pytest.mark.slow)])
def test_a_step_counts_what_the_method_needs(remat, again):
    """Three forward passes, but for the gradients that nothing needs; what remat computes again only if asked for."""
    config = diversedit.get_config("b2")
    config.batch_size = 8
    config.losses = {}
    config.model.update({"remat": remat, "dtype": "float32"})
    experiment = build.build(config, Space((32, 32, 4), Conditions.labels(1000)))
    batch = {"moments": jnp.zeros((8, 32, 32, 8)), "y": jnp.zeros(8, jnp.int32)}
    state = jax.eval_shape(initializer(experiment.components, batch), jax.random.key(0))
    work = build.work(experiment, state, batch)
    assert work / 8 == pytest.approx(6e9 * forward("B", 32, skip="release"), rel=1e-3)
    performed = build.work(experiment, state, batch, again=True)
    assert performed / work == pytest.approx(again, abs=0.01)


def test_rates_and_peaks():
    assert flops.rates(197 * 10**12, 2.0, "TPU v5 lite", 4) == {"tflops_per_device": 98.5, "mfu": 0.5}
    assert flops.rates(10**12, 2.0, "cpu", 1) == {"tflops_per_device": 2.0}
    assert flops.peak("TPU v5") == 459.0
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989.0
