"""Equal to the official SiT and DiT: networks, losses, and samples by Euler, by SiT's SDE, by DDPM and by DDIM."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.diffusion import ddpm_solvers, discrete, paths, solvers
from diversedit_jax.diffusion.guidance import guide
from diversedit_jax.models import official_sit
from diversedit_jax.objectives import ddpm, flow_matching
from tests import reference

LINEAR = paths.make("linear")
NULL = np.int32(reference.OFFICIAL["num_classes"])
# The rows of SiT's `sde_forms`, in its order.
FORMS = ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"]


def close(ours, theirs, tolerance, name=""):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def sit():
    network = official_sit.turned(reference.official_model()).network(reference.official_params("official_sit"))
    return network, reference.official_numbers("official_sit")


@pytest.fixture(scope="module")
def dit():
    network = reference.official_model().network(reference.official_params("official_dit"))
    return network, reference.official_numbers("official_dit")


def test_sit_forward_and_loss(sit):
    network, gold = sit
    t, y = jnp.asarray(1 - gold["t"]), jnp.asarray(gold["y"], jnp.int32)
    close(network(jnp.asarray(gold["xt"]), t, y)[0], -gold["out"], 1e-5)
    x, noise = jnp.asarray(gold["data_x1"]), jnp.asarray(gold["noise_x0"])
    result = flow_matching.regress(network, LINEAR, x, noise, t, y)
    np.testing.assert_allclose(result.x_t, gold["xt"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(paths.velocity(LINEAR, x, noise, t), -gold["target"], rtol=1e-6)
    np.testing.assert_allclose(result.loss, gold["loss"], rtol=1e-5)


def test_sit_samplers(sit):
    network, gold = sit
    z, y = jnp.asarray(gold["z"]), jnp.asarray(gold["sample_y"], jnp.int32)
    points = int(gold["num_steps"])  # of its time grids: the ODE's steps are one less
    even = solvers.uniform_times(points - 1)
    noise = jnp.asarray(gold["sde_eps"])

    @jax.jit
    def run():
        plain, guided = guide(network, y, NULL), guide(network, y, NULL, scale=4.0, channels=3)
        w = solvers.diffusion("sigma", LINEAR)
        times = solvers.sde_times(points, LINEAR, "velocity", "sigma", "mean", 0.04)
        return {
            "ode_euler": solvers.euler(plain, z, even),
            "ode_euler_cfg4_first3channels": solvers.euler(guided, z, even),
            "sde_sigma": solvers.euler_maruyama(plain, z, times, lambda i: noise[i], LINEAR, w),
        }

    for name, ours in run().items():
        close(ours, gold[name], 1e-4, name)


@pytest.mark.parametrize("form", FORMS)
def test_sit_diffusion_coefficients(sit, form):
    _, gold = sit
    with jax.enable_x64(True):
        t = 1 - jnp.asarray(gold["t"], jnp.float64)
        w = solvers.diffusion(form, LINEAR)(t)
    # SiT's noise is sqrt(2 D), ours sqrt(w); its t is float32
    np.testing.assert_allclose(np.asarray(w) / 2, gold["sde_forms"][FORMS.index(form)], rtol=2e-6)


def test_dit_forward_and_loss(dit):
    network, gold = dit
    x, noise = jnp.asarray(gold["x0"]), jnp.asarray(gold["noise"])
    t, y = jnp.asarray(gold["t"], jnp.int32), jnp.asarray(gold["y"], jnp.int32)
    schedule = discrete.linear(1000)
    result = ddpm.regress(network, schedule, x, noise, t, y)
    np.testing.assert_allclose(result.x_t, gold["xt"], rtol=1e-5, atol=1e-6)
    output, _ = network(jnp.asarray(gold["xt"]), t.astype(jnp.float32), y)
    close(output, gold["out"], 1e-5)
    vb = discrete.bound(schedule, output, x, result.x_t, t)
    np.testing.assert_allclose(vb, gold["vb"], rtol=1e-5)
    np.testing.assert_allclose(result.loss - vb, gold["mse"], rtol=1e-5)
    np.testing.assert_allclose(result.loss, gold["loss"], rtol=1e-5)


def test_dit_samplers(dit):
    network, gold = dit
    z, y, eps = jnp.asarray(gold["z"]), jnp.asarray(gold["sample_y"], jnp.int32), jnp.asarray(gold["eps"])
    kept = discrete.spaced(1000, 5)
    np.testing.assert_array_equal(kept, gold["respaced_timesteps"])
    schedule = discrete.respace(discrete.linear(1000), kept)

    @jax.jit
    def run():
        predict = partial(guide, network, y, NULL)
        noise = eps.__getitem__
        return {
            "ddpm5": ddpm_solvers.ddpm(predict(), z, schedule, noise),
            "ddpm5_cfg4_first3channels": ddpm_solvers.ddpm(predict(scale=4.0, channels=3), z, schedule, noise),
            "ddim5": ddpm_solvers.ddim(predict(), z, schedule, noise),
        }

    for name, ours in run().items():
        close(ours, gold[name], 1e-4, name)
