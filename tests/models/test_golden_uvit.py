"""Equal to U-ViT's code, with labels, with nothing and with text: blocks, losses, gradients, names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diversedit_jax import models
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.diffusion import paths
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import uvit
from diversedit_jax.objectives.flow_matching import ERRORS, regress
from diversedit_jax.runs import trained
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights import uvit as names
from tests import captioned
from tests.models.test_dit import first_and_slow
from tests.reference import DATA
from tools import convert_checkpoint

CASES = ("uvit_class", "uvit_uncond", "uvit_t2i")
BOTH = [(name, unroll) for name in CASES for unroll in (False, True)]
IMAGES = {"x0", "eps", "xn", "out", "vp_xt", "vp_noise_pred", "vp_score"}


def numbers(name):
    """The arrays of a case, images as [b h w c]."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: np.moveaxis(file[key], -3, -1) if key in IMAGES else file[key] for key in file.files}
        return {key: jnp.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype)) for key, value in arrays.items()}


def config(name):
    return json.loads((DATA / f"{name}_config.json").read_text())


def release(name, file="", family="uvit"):
    arrays = load_file(DATA / f"{name}{file}.safetensors")
    shapes = {key: array.shape for key, array in arrays.items()}
    return releases.load(arrays, shapes, family, heads=config(name)["num_heads"])


def condition(gold):
    return {"context": gold["context"]} if "context" in gold else gold.get("y", jnp.zeros(len(gold["n"]), jnp.int32))


def space(arch):
    null = Conditions.labels(arch.num_classes) if arch.text is None else Conditions({"context": np.zeros(arch.text)})
    return Space((*arch.sides, arch.channels), null)


def network(arch, **options):
    """Our model of an architecture."""
    return models.make("uvit", space(arch), **arch.options, **options)


def near(ours, theirs, tolerance):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=tolerance)


def squared(network, gold):
    """U-ViT's loss of each example, and what the network returns."""
    found = network(gold["xn"], gold["n"].astype(jnp.float32), condition(gold))
    return jnp.mean((found[0] - gold["eps"]) ** 2, axis=(1, 2, 3)), found


@pytest.mark.parametrize(
    ("name", "unroll"), first_and_slow([("uvit_class", False), ("uvit_uncond", True), ("uvit_t2i", False)], BOTH)
)
def test_every_block_and_every_gradient_equal_the_reference(name, unroll):
    gold, found = numbers(name), release(name)
    model = network(found.arch, unroll=unroll)

    def loss(params):
        losses, found = squared(model.network(params), gold)
        return losses.mean(), (losses, found)

    grads, (losses, (out, features)) = jax.jit(jax.grad(loss, has_aux=True))(found.params)
    near(out, gold["out"], 1e-5)
    np.testing.assert_allclose(losses, gold["loss"], rtol=1e-5)
    extras = gold["embedding"].shape[1] - features[0].shape[1]
    assert features[0].shape[1] == 16
    for ours, theirs in zip(features, [gold["embedding"], *gold["block_feats"]], strict=True):
        near(ours, theirs[:, extras:], 1e-5)
    count = len(gold["merged"])
    for k, theirs in enumerate(gold["merged"]):  # (h_k, skip) -> what out block k takes
        p = jax.tree.map(lambda leaf, k=k: leaf[k], found.params["merges"]["linear"])
        both = jnp.concatenate([features[count + 1 + k], features[count - k]], axis=-1)
        near(both @ p["kernel"] + p["bias"], theirs[:, extras:], 1e-5)
    jax.tree.map(lambda ours, theirs: near(ours, theirs, 1e-4), grads, release(name, "_grads").params)


@pytest.mark.parametrize("name", ["uvit_class", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES[1:])])
def test_the_continuous_form_is_flow_matching_of_the_noise_on_vp(name):
    gold, found = numbers(name), release(name)
    model = network(found.arch).network(found.params)
    assert found.objective == {"name": "flow_matching", "path": "vp", "prediction": "noise", "time_scale": 999.0}
    steps = release(name, family="uvit_discrete").objective
    assert steps == {"name": "ddpm", "betas": "scaled_linear", "first_step": 1, "learn_sigma": False}
    given = (gold["x0"], gold["eps"], gold["vp_t"], condition(gold))
    forward = regress(model, path := paths.make("vp"), *given, ERRORS["noise"], time_scale=999.0)
    near(forward.x_t, gold["vp_xt"], 1e-6)
    np.testing.assert_allclose(forward.loss, gold["vp_loss"], rtol=1e-5)
    predicted, _ = model(gold["vp_xt"], 999 * gold["vp_t"], condition(gold))
    near(predicted, gold["vp_noise_pred"], 1e-5)
    near(-predicted / path.sigma(gold["vp_t"])[:, None, None, None], gold["vp_score"], 1e-5)
    near(uvit.sinusoids(gold["tokens_t"], found.arch.width), gold["tokens"], 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_weights_go_out_as_they_came_in(name):
    arrays, found, given = load_file(DATA / f"{name}.safetensors"), release(name), config(name)
    assert (found.family, found.sides) == ("uvit", (given["img_size"],) * 2)
    arch = found.arch
    assert (arch.depth, arch.width) == (2 * (given["depth"] // 2), given["embed_dim"])
    assert (arch.qkv_bias, arch.conv, arch.time_mlp) == (given["qkv_bias"], given["conv"], given["mlp_time_embed"])
    assert arch.text == ((given["num_clip_token"], given["clip_dim"]) if "clip_dim" in given else None)
    assert found.scale == (0.2301 if arch.text else 0.18215)
    assert arch.num_classes == (None if arch.text else max(given["num_classes"] - 1, 0))
    assert convert_checkpoint.architecture(slot("models", "uvit", **arch.options), space(arch)) == arch
    out = releases.export(found.params, "uvit", arch)
    assert out.keys() == arrays.keys()
    for key, array in out.items():
        np.testing.assert_array_equal(array, arrays[key])


def test_a_position_table_shows_the_text_and_a_square_image():
    assert names.split(256, text=False) == (0, 16)
    assert names.split(333, text=True) == (77, 16)
    assert names.split(23, text=True) == (7, 4)  # the largest square, and the rest
    with pytest.raises(ConfigError, match="its position table has 200 rows for patches: only square images are read"):
        names.split(200, text=False)


def test_what_does_not_fit_is_one_line():
    arrays, found = load_file(DATA / "uvit_class.safetensors"), release("uvit_class")
    shapes = {key: array.shape for key, array in arrays.items()}
    for heads, said in ((None, "width 48: give it with --heads=N"), (5, "heads = 5 does not divide the width 48")):
        with pytest.raises(ConfigError, match=said):
            releases.load(arrays, shapes, "uvit", heads=heads)
    with pytest.raises(ConfigError, match="have the same arrays: say --family=uvit or uvit_discrete"):
        releases.load(arrays, shapes, heads=3)
    for family in ("sit", "mmdit"):
        with pytest.raises(ConfigError, match=f"{family} cannot hold this network: it is a uvit"):
            releases.export(found.params, family, found.arch)
    for sides in ((16, 16), (8, 9)):
        with pytest.raises(ConfigError, match=f"table is for images of 8 x 8, not of {sides[0]} x {sides[1]}"):
            trained.of_release(DATA / "uvit_class.safetensors", "uvit", heads=3, sides=sides)


def test_analysis_opens_a_release_without_the_option_capture():
    found = trained.of_release(DATA / "uvit_class.safetensors", "uvit", heads=3, model={"capture": "merged"})
    assert "capture" not in found.about["model"]
    assert found.experiment.components.model.skips.pairs == ((2, 4), (1, 5))


@pytest.mark.slow
def test_the_side_of_the_images_says_how_long_a_text_is(tmp_path):
    arch = names.Architecture(2, 24, 2, 2, 3, grid=(4, 4), num_classes=None, text=(captioned.LENGTH, 16))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), names.abstract(arch))
    save_file(releases.export(params, "uvit", arch), file := tmp_path / "uvit.safetensors")
    given = {"family": "uvit", "heads": 2, "text_encoder": str(captioned.encoder())}
    with pytest.raises(ConfigError, match=r"takes texts of 7 tokens at latents of 10 x 10, and .* have 16"):
        trained.of_release(file, **given)
    source = trained.drawing(trained.of_release(file, sides=8, **given), overrides={"steps": 2, "batch_size": 8})
    assert source.sampler(source.params, source.frozen, source.prompts(["a red bus"]), 0).shape[0] == 1


@pytest.mark.parametrize(
    ("size", "millions"), [("S", "44.8"), ("S_deep", "58"), ("M", "131"), ("L", "286.8"), ("H", "500.8")]
)
def test_the_published_sizes_have_their_numbers_of_parameters(size, millions):
    model = models.make("uvit", Space((32, 32, 4), Conditions.labels(1000)), size=size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions
    dims = uvit.SIZES[size]
    arch = names.Architecture(*dims[:3], patch=2, channels=4, grid=(16, 16), num_classes=1000, conv=dims.conv)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, releases.abstract(arch))
    assert len(jax.eval_shape(model.blocks, params)) == 2 * (dims.depth // 2) + 1
