"""Equal to REPA's MMDiT (mmdit_sd3: with the options of Stable Diffusion 3): blocks, gradients, samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from diversedit_jax import models
from diversedit_jax.api import Conditions, Space
from diversedit_jax.diffusion import paths, solvers
from diversedit_jax.diffusion.guidance import guide
from diversedit_jax.losses import repa
from diversedit_jax.models import mmdit
from diversedit_jax.objectives.flow_matching import regress
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights import mmdit as names
from tests.models.test_golden_sit import projector
from tests.reference import DATA

CASES = ("mmdit", "mmdit_sd3")
IMAGES = {"x0", "noise", "xt", "out", "big_xt", "big_out", "z", "euler_6_cfg2", "heun_5_cfg2", "sde_6_cfg2", "sde_eps"}
BLOCK, COEFFICIENT = 2, 0.5  # of the aligned features


def numbers(name):
    """The arrays of a case, images as [b h w c]."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: np.moveaxis(file[key], -3, -1) if key in IMAGES else file[key] for key in file.files}
        return {key: jnp.asarray(value, jnp.float32) for key, value in arrays.items()}


def release(name):
    arrays = load_file(DATA / f"{name}.safetensors")
    return releases.load(arrays, {key: array.shape for key, array in arrays.items()})


def condition(gold):
    return {"context": gold["context"]} | ({"pooled": gold["pooled"]} if "pooled" in gold else {})


def network(arch, y, side=8, **options):
    """Our model for latents of this side."""
    space = Space((side, side, 4), Conditions(jax.tree.map(lambda leaf: leaf[0], y)))
    return models.make("mmdit", space, **arch.options, **options)


def near(ours, theirs, tolerance):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=tolerance)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_block_of_both_streams_equals_the_reference(name, unroll):
    gold, found = numbers(name), release(name)
    y = condition(gold)
    out, features = jax.jit(network(found.arch, y, unroll=unroll).apply)(found.params, gold["xt"], gold["t"], y)
    near(out, gold["out"], 1e-5)
    for ours, theirs in zip(features, [gold["x_in"], *gold["block_x"]], strict=True):
        near(ours, theirs, 1e-5)
    for ours, theirs in zip(features.text, [gold["context_in"], *gold["block_context"]], strict=True):
        near(ours, theirs[:, found.arch.registers :], 1e-5)


def test_a_larger_latent_takes_more_of_the_position_table():
    gold, found = numbers("mmdit"), release("mmdit")
    y = {"context": gold["context"][:1]}
    out, _ = network(found.arch, y, side=32).apply(found.params, gold["big_xt"], gold["big_t"], y)
    near(out, gold["big_out"], 1e-5)
    np.testing.assert_allclose(mmdit.positions((4, 4), 96, 16), gold["pos_embed_cropped"], atol=1e-6)


def test_losses_and_every_gradient_equal_the_reference():
    gold, found = numbers("mmdit"), release("mmdit")
    model, y = network(found.arch, condition(gold)), condition(gold)

    def loss(params, head):
        forward = regress(model.network(params), paths.make("linear"), gold["x0"], gold["noise"], gold["t"], y)
        aligned = repa.repa_loss(repa.project(head, forward.features[BLOCK]), gold["z_target_0"]).mean()
        return forward.loss.mean() + COEFFICIENT * aligned, (forward.loss, aligned)

    (grads, head), (denoising, aligned) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
        found.params, projector("mmdit")
    )
    np.testing.assert_allclose(denoising, gold["denoising_loss"], rtol=1e-5)
    np.testing.assert_allclose(aligned, gold["proj_loss"], rtol=1e-5)
    wanted = load_file(DATA / "mmdit_grads.safetensors")  # without block 0, to keep the file small
    ours = releases.export(jax.device_get(grads), "mmdit", found.arch)
    checked = [key for key in wanted if key in ours]
    assert len(checked) == len(wanted) - 6  # the projector's
    for key in checked:
        near(ours[key], wanted[key], 1e-4)
    for i, k in ((1, 0), (2, 2), (3, 4)):
        near(head[f"fc{i}"]["kernel"].T, wanted[f"projectors.0.{k}.weight"], 1e-4)
        near(head[f"fc{i}"]["bias"], wanted[f"projectors.0.{k}.bias"], 1e-4)


def test_weights_go_out_as_they_came_in():
    for name in CASES:
        arrays, found = load_file(DATA / f"{name}.safetensors"), release(name)
        assert found.family == "mmdit"
        assert found.sides == (32, 32)
        out = releases.export(found.params, "mmdit", found.arch)
        assert {key for key in arrays if not key.startswith("projectors.")} == out.keys()
        for key, array in out.items():
            np.testing.assert_allclose(array, arrays[key], atol=1e-6 if key == "pos_embed" else 0)


def test_the_published_size_has_its_number_of_parameters():
    space = Space((32, 32, 4), Conditions({"context": np.zeros((77, 768), np.float32)}))
    params = jax.eval_shape(models.make("mmdit", space).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 505_070_608
    arch = names.Architecture(depth=24, width=768, heads=24, patch=2, channels=4, text=768)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, releases.abstract(arch))


def test_samplers_with_guidance_by_the_empty_text_equal_the_reference():
    gold, found = numbers("mmdit"), release("mmdit")
    y = {"context": gold["context"]}
    model = network(found.arch, y).network(found.params)

    @jax.jit
    def run():
        velocity = guide(model, y, {"context": gold["null_context"]}, scale=2.0)
        return {
            "euler_6_cfg2": solvers.euler(velocity, gold["z"], solvers.uniform_times(6)),
            "heun_5_cfg2": solvers.heun(velocity, gold["z"], solvers.uniform_times(5)),
            "sde_6_cfg2": solvers.euler_maruyama(
                velocity, gold["z"], solvers.last_step_times(6), lambda i: gold["sde_eps"][i]
            ),
        }

    for key, ours in run().items():
        near(ours, gold[key], 1e-4)
