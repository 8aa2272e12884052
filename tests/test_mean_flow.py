"""MeanFlow: the reference's numbers, the identity of the average velocity, what is drawn, what gradients reach."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import models, objectives, samplers
from diversedit_jax.errors import ConfigError
from diversedit_jax.interop import releases
from diversedit_jax.models.dit import REMAT
from diversedit_jax.objectives import mean_flow
from tests import reference

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles twice as fast

# --- The reference's numbers.

NULL = 1000
UNGUIDED, KAPPA = {"omega": 1.0, "kappa": 0.0}, {"omega": 1.0, "kappa": 0.5, "interval": (0.0, 0.75)}
CASES = {
    "raw_nocfg": UNGUIDED | {"power": 0.0},
    "raw_cfg_kappa": KAPPA | {"power": 0.0},
    "nocfg": UNGUIDED,
    "cfg_kappa0": {"omega": 2.0, "kappa": 0.0},
    "cfg_kappa": KAPPA,
}


@cache
def golden():
    """The reference's network and numbers."""
    release, _ = releases.open_release(reference.DATA / "meanflow.safetensors", heads=4)
    model = models.make("dit", (8, 8, 4), NULL, **releases.model_options(release.arch))
    with np.load(reference.DATA / "meanflow.npz") as file:
        gold = {key: jnp.asarray(file[key], jax.dtypes.canonicalize_dtype(file[key].dtype)) for key in file.files}
    return model, release.params, gold


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_references(case):
    model, params, gold = golden()
    dropped = jnp.arange(4) < 1

    def loss(params):
        arguments = gold["lat_nhwc"], gold["noise_nhwc"], gold["t"], gold["r"], gold["y"], dropped, NULL
        forward = mean_flow.regress(model.network(params), *arguments, **CASES[case])
        return forward.loss.mean(), forward.metrics

    (value, metrics), gradient = jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(value, gold[f"{case}_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["v_loss"], gold[f"{case}_v_loss"].mean(), rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(norm, gold[f"{case}_grad_norm"], rtol=1e-4)
