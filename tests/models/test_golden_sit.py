"""Equal to the public SiT of REPA and to DiverseDiT's release: outputs, features, losses, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.diffusion import paths
from diversedit_jax.losses import repa
from diversedit_jax.losses.diversity import diversity_loss, select_pairs
from diversedit_jax.objectives.flow_matching import regress
from tests import reference

CASES = [("sit_plain", "none"), ("sit_diversedit", "release")]
ENCODER_DEPTH = reference.CONFIG["encoder_depth"]
RULES = {"first": None, "projection": ENCODER_DEPTH}


def projector(name):
    """The reference's projector as ours, [in, out]."""
    arrays = reference.weights(name)
    layer = "projectors.0.{}.{}".format
    return {
        f"fc{i}": {
            "kernel": jnp.asarray(arrays[layer(k, "weight")].T),
            "bias": jnp.asarray(arrays[layer(k, "bias")]),
        }
        for i, k in ((1, 0), (2, 2), (3, 4))
    }


def forward(name, skip, params, **options):
    gold = reference.numbers(name)
    network = reference.model(skip, **options).network(params)
    return regress(network, paths.make("linear"), gold["lat"], gold["noise"], gold["t"], gold["y"])


@pytest.mark.parametrize(("name", "skip"), CASES)
def test_forward_equals_the_reference(name, skip):
    gold, params = reference.numbers(name), reference.params(name)
    result = forward(name, skip, params)
    np.testing.assert_allclose(result.x_t, gold["xt"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.loss, gold["denoising_loss"], rtol=1e-5)
    out, _ = reference.model(skip).apply(params, gold["xt"], gold["t"], gold["y"])
    np.testing.assert_allclose(out, gold["out"], rtol=1e-5, atol=1e-5 * np.abs(gold["out"]).max())
    for block, (ours, theirs) in enumerate(zip(result.features[1:], gold["block_feats"], strict=True)):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5, err_msg=f"features of block {block}")
    z = repa.project(projector(name), result.features[ENCODER_DEPTH])
    np.testing.assert_allclose(z, gold["zs"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(repa.repa_loss(z, gold["z_target"]).mean(), gold["proj_loss"], rtol=1e-5)


@pytest.mark.parametrize(("name", "skip"), CASES)
@pytest.mark.parametrize("rule", RULES)
def test_diversity_terms_equal_the_release(name, skip, rule):
    gold = reference.numbers(name)
    pairs = select_pairs(len(gold["block_feats"]), aligned=RULES[rule])
    np.testing.assert_array_equal(pairs, gold[f"pairs_{rule}"])
    _, terms = diversity_loss(forward(name, skip, reference.params(name)).features[1:], pairs)
    for ours, theirs in [
        ("orthogonality", "orth"),
        ("mutual_information", "mi"),
        ("dispersion", "disp"),
        ("loss", "div"),
    ]:
        np.testing.assert_allclose(terms[ours], gold[f"{theirs}_{rule}"], rtol=2e-5, atol=1e-6, err_msg=ours)


@pytest.mark.parametrize(("name", "skip"), CASES)
@pytest.mark.parametrize("remat", ["named", pytest.param("none", marks=pytest.mark.slow)])
def test_every_gradient_equals_the_reference(name, skip, remat):
    gold = reference.numbers(name)

    def total(params, projector):
        result = forward(name, skip, params, remat=remat)
        projected = repa.project(projector, result.features[ENCODER_DEPTH])
        _, terms = diversity_loss(result.features[1:])
        return result.loss.mean() + 0.5 * repa.repa_loss(projected, gold["z_target"]).mean() + 0.5 * terms["loss"]

    loss, (grads, projector_grads) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(
        reference.params(name), projector(name)
    )
    np.testing.assert_allclose(loss, gold["total_for_grad"], rtol=1e-5)
    wanted = {"model": reference.params(f"{name}_grads"), "projector": projector(f"{name}_grads")}
    found = {"model": grads, "projector": projector_grads}

    def compare(path, ours, theirs):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, found, wanted)
