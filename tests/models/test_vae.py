"""The autoencoder: equal to the published one in both directions, read from every spelling, and the way to pictures."""

import json
import re
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from diversedit_jax import codecs, sample, sharding
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.models import PRECISIONS, vae
from diversedit_jax.models.vae import Architecture
from diversedit_jax.runs import trained
from diversedit_jax.weights import mapping
from diversedit_jax.weights import vae as published
from tests import DATA
from tests.jaxprs import products

TINY = Architecture(widths=(32, 64), layers=1)


@cache
def params(arch=TINY):
    """Random parameters on the host, none of them zero or one, as one finds them in a file."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(vae.network(arch).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, dtype=np.float32), shapes)


def arrays(layout="diffusers", four=False, arch=TINY):
    """The parameters under the names of a layout."""
    every = [entry for half in published.HALVES for entry in published.entries(layout, arch, half, four)]
    return mapping.written(every, params(arch))


@pytest.fixture
def folder(tmp_path):
    published.export(params(), TINY, tmp_path / "vae", scale=0.5, shift=0.25)
    return tmp_path / "vae"


def same(found, wanted=None):
    jax.tree.map(np.testing.assert_array_equal, found, wanted or params())


def test_it_equals_the_published_network_in_both_directions():
    release = published.open_vae(DATA / "vae")
    network = vae.network(release.arch)
    with np.load(DATA / "vae.npz") as file:
        golden = {name: np.moveaxis(file[name], 1, -1) for name in file.files}
    mean, std = np.split(jax.jit(network.encode)(release.read(), golden["image"]), 2, axis=-1)
    np.testing.assert_allclose(mean, golden["mean"], atol=2e-5)
    np.testing.assert_allclose(std, golden["std"], atol=2e-5)
    decoded = jax.jit(network.decode)(release.read(("decoder",)), golden["z"])
    np.testing.assert_allclose(decoded, golden["decoded"], atol=2e-5)
    assert (release.scale, release.shift) == (0.18215, 0.0)


@pytest.mark.slow
def test_the_default_is_the_published_size():
    shapes = jax.tree.leaves(jax.eval_shape(vae.network(Architecture()).init, jax.random.key(0)))
    assert (sum(leaf.size for leaf in shapes), len(shapes)) == (83_653_863, 248)
    assert Architecture().factor == 8


def test_the_log_variance_is_clipped():
    """A last layer that says -100 and 100, on both sides of the published limits."""
    weights = jax.tree.map(np.zeros_like, params())
    for value, std in ((-100, np.exp(-15)), (100, np.exp(10))):
        weights["encoder"]["quant"]["bias"] = np.full(8, value, np.float32)
        moments = vae.network(TINY).encode(weights, jnp.zeros((1, 4, 4, 3)))
        np.testing.assert_allclose(moments[..., 4:], std, rtol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_precision_reaches_every_product(precision):
    network = vae.network(TINY, precision)
    moments = jax.make_jaxpr(network.encode)(params(), jnp.zeros((1, 4, 4, 3)))
    images = jax.make_jaxpr(network.decode)(params(), jnp.zeros((1, 2, 2, 4)))
    found = [eqn.params["precision"] for jaxpr in (moments, images) for eqn in products(jaxpr.jaxpr)]
    wanted = getattr(jax.lax.Precision, precision.upper())
    kernels = sum(path[-1].key == "kernel" for path, _ in jax.tree.leaves_with_path(params()))
    assert len(found) == kernels + 2 * 2  # and of each attention, the logits and the sum
    assert set(found) == {(wanted, wanted)}


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("layout", published.LAYOUTS)
def test_every_spelling_is_read(layout, four, tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file(arrays(layout, four), file)
    release = published.open_vae(file)
    assert release[:4] == (TINY, None, None, "vae.safetensors")
    same(release.read())
    same(release.read(("decoder",)), {"decoder": params()["decoder"]})


@pytest.mark.parametrize("prefix", ["first_stage_model.", "state_dict.first_stage_model.", "state_dict."])
def test_it_is_found_in_a_file_of_latent_diffusion(prefix, tmp_path):
    names = {f"{prefix}{name}": array for name, array in arrays("latent_diffusion", True).items()}
    if "first_stage" in prefix:
        names[prefix.replace("first_stage", "diffusion") + "time_embed.0.weight"] = np.zeros(3, np.float32)
    else:
        names["state_dict.loss.logvar"] = np.zeros(1, np.float32)
    save_file(names, tmp_path / "model.ckpt")
    same(published.open_vae(tmp_path / "model.ckpt").read())


def test_one_without_convolutions_around_the_latents_has_none(tmp_path):
    arch = TINY._replace(quant=False, latent_channels=16)
    published.export(params(arch), arch, tmp_path)
    release = published.open_vae(tmp_path)
    assert release.arch == arch
    same(release.read(), params(arch))


def test_a_folder_is_read_as_it_was_written(folder):
    release = published.open_vae(folder)
    assert release[:4] == (TINY, 0.5, 0.25, "vae")
    same(release.read())
    assert published.open_vae(folder.parent).digest == release.digest  # its subfolder `vae`
    assert published.open_vae(folder / "diffusion_pytorch_model.safetensors").scale == 0.5


def test_another_file_has_another_digest(folder):
    before = published.open_vae(folder).digest
    file = folder / "diffusion_pytorch_model.safetensors"
    changed = load_file(file)
    changed["decoder.conv_out.bias"][0] += 1
    save_file(changed, file)
    assert published.open_vae(folder).digest != before


def refused(path, words, kind=ConfigError):
    with pytest.raises(kind, match=words) as error:
        published.open_vae(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named(folder):
    file, whole = folder / "diffusion_pytorch_model.safetensors", arrays()
    middle = "encoder.mid_block.attentions.0.to_k.bias"
    for change, words in [
        ({middle: None}, rf"the array {middle} \[64\] is missing"),
        ({"decoder.more": np.zeros(3)}, r"the array decoder.more \[3\] is not known"),
        ({middle: np.zeros(4)}, rf"{middle} has shape \[4\], wanted \[64\]"),
        ({"encoder.conv_in.weight": np.zeros(4)}, r"the array encoder.conv_in.weight has shape \[4\], wanted 4 axes"),
        ({"encoder.conv_out.weight": None}, "the array encoder.conv_out.weight is missing"),
        ({"encoder.mid_block.attentions.0.to_q.weight": None}, "these are not the arrays of an autoencoder"),
    ]:
        save_file({name: np.float32(a) for name, a in (whole | change).items() if a is not None}, file)
        refused(folder, words)


def test_a_config_that_says_otherwise_is_refused(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for change, words, kind in [
        ({"block_out_channels": [8]}, r"says block_out_channels = \[8\], the arrays \[32, 64\]", ConfigError),
        ({"act_fn": "gelu"}, "says act_fn = gelu, the arrays silu", ConfigError),
        ({"norm_num_groups": 3}, "groups = 3 does not divide the width 32", ConfigError),
        ({"_class_name": "AutoencoderTiny"}, "wanted an AutoencoderKL, its config.json is of AutoencoderTiny", 0),
    ]:
        file.write_text(json.dumps(config | change))
        with pytest.raises(kind or WeightsError, match=words):
            published.open_vae(folder)
    file.write_text("{")
    refused(folder, "config.json: cannot be read", WeightsError)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    refused(
        tmp_path, "a folder without weights .it is empty.: wanted diffusion_pytorch_model.safetensors", WeightsError
    )
    refused(tmp_path / "nowhere", "No such file", WeightsError)
    shutil.copy(DATA / "sit_plain.safetensors", tmp_path)
    refused(tmp_path / "sit_plain.safetensors", "these are not the arrays of an autoencoder")


@pytest.mark.parametrize("shape", [(1, 5, 4, 3), (1, 4, 5, 3), (1, 4, 4, 1)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ConfigError, match="wanted 3 channels and sides that 2 divides"):
        vae.network(TINY).encode(params(), jnp.zeros(shape))


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="precision = 'bf16' is unknown; known: highest, high, default"):
        vae.network(TINY, "bf16")
    with pytest.raises(ConfigError, match="not an architecture"):
        vae.network(TINY._replace(widths=()))


def test_latents_are_decoded_a_chunk_at_a_time(folder):
    """Whole, in chunks, and over eight devices: the same images, and those of the network."""
    x = np.random.default_rng(0).standard_normal((48, 2, 2, 4), dtype=np.float32)
    wanted = vae.network(TINY).decode(params(), jnp.asarray(x / 0.5 + 0.25))
    wanted = np.clip(127.5 * np.asarray(wanted) + 128, 0, 255)
    for chunk, count in ((2, 48), (3, 47)):
        latents = codecs.make("vae", scale=0.5, bias=0.25, vae=str(folder), chunk=chunk)
        images = np.asarray(jax.jit(latents.decode)(latents.init(), jnp.asarray(x[:count])))
        assert (images.shape, images.dtype) == ((count, 4, 4, 3), np.uint8)
        assert np.abs(images - np.floor(wanted[:count])).max() <= 1  # rounding of a sum in another order
        assert np.mean(images != np.floor(wanted[:count])) < 1e-3
    same(latents.init(), {"decoder": params()["decoder"]})


def test_a_batch_is_decoded_where_it_lies(folder):
    """Over eight devices and in chunks no latent changes its device."""
    latents = codecs.make("vae", scale=0.5, bias=0.25, vae=str(folder), chunk=2)
    split = sharding.over_batch(sharding.make())
    x = jax.ShapeDtypeStruct((64, 2, 2, 4), jnp.float32, sharding=split)
    compiled = jax.jit(latents.decode, out_shardings=split).lower(latents.init(), x).compile().as_text()
    assert " while(" in compiled, "it is not in chunks"
    assert not re.findall(r" (all-\w+|collective-permute)\(", compiled)


def test_the_scale_is_that_of_the_autoencoder(folder):
    with pytest.raises(ConfigError, match=r"scale = 0.18215, but .*vae was trained with 0.5"):
        codecs.make("vae", vae=str(folder))
    with pytest.raises(ConfigError, match=r"bias = 0.0, but .*vae was trained with 0.25"):
        codecs.make("vae", scale=0.5, vae=str(folder))
    with pytest.raises(ConfigError, match="chunk = 0: must be at least 1"):
        codecs.make("vae", chunk=0)


@pytest.mark.slow
def test_a_release_is_sampled_into_pictures(tmp_path):
    published.export(params(), TINY, tmp_path / "vae")
    file = DATA / "sit_plain.safetensors"
    options = {"solver": "euler", "steps": 2}
    source = trained.drawing(trained.of_release(file, "sit", 4, vae=str(tmp_path / "vae")), overrides=options)
    out = sample.run(source, num=8, out=tmp_path / "samples")
    with np.load(out / "samples.npz") as found:
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((8, 16, 16, 3), np.uint8)
        assert len(np.unique(found["arr_0"])) > 100
    with Image.open(out / "grid.png") as grid:
        assert grid.mode == "RGB"
