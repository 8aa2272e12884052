"""Folders of diffusers and transformers, weights in parts, and the names that torch's wrappers add."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diversedit_jax import config as configs
from diversedit_jax.encoders import dinov2
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.models import patches
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights import vae, vit
from diversedit_jax.weights.formats import weights_folder
from tests import DATA

PUBLISHED = DATA / "sit_plain.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def folder(path, arrays, name="diffusion_pytorch_model.safetensors", **config):
    """A folder of weights, with a config.json if `config` says something."""
    path.mkdir(parents=True)
    save_file(arrays, path / name)
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def parts(path, arrays, **config):
    """The same folder with the arrays in two parts."""
    names = sorted(arrays)
    halves = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    path.mkdir(parents=True)
    for file, held in halves.items():
        save_file({name: arrays[name] for name in held}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": {name: f for f, held in halves.items() for name in held}}))
    (path / "config.json").write_text(json.dumps(config))
    return path


def same(given, wanted):
    for name, array in releases.export(wanted.params, wanted.family, wanted.arch).items():
        np.testing.assert_array_equal(releases.export(given.params, given.family, given.arch)[name], array, name)


@pytest.fixture(scope="module")
def diffusers():
    """A DiT under the names of diffusers, and the release."""
    release, _ = releases.open_release(DATA / "official_dit.safetensors", "official_dit", 4)
    return releases.export(release.params, "diffusers_dit", release.arch), release


def test_folders_of_diffusers_open_and_tell_their_heads(tmp_path, diffusers):
    arrays, release = diffusers
    about = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 4}
    whole = folder(tmp_path / "pipeline" / "transformer", arrays, **about)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    split = parts(tmp_path / "split", arrays, **about)
    for path in whole, whole.parent, split, whole / "diffusion_pytorch_model.safetensors":
        opened, counts = releases.open_release(path)
        assert (opened.family, opened.arch.heads, counts) == ("diffusers_dit", 4, {"arrays": len(arrays)})
        same(opened, release._replace(family="diffusers_dit"))
    assert weights_folder.digest(split) != weights_folder.digest(whole)


def test_a_folder_that_is_no_run_is_named(tmp_path, diffusers):
    path = folder(tmp_path / "dit", diffusers[0], _class_name="DiTTransformer2DModel")
    assert not configs.holds_run(path)
    assert not configs.holds_run(tmp_path)
    with pytest.raises(ConfigError, match=r"dit holds no run: its config.json is of another program"):
        configs.load(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "it is empty"),
        ({"a.txt": "", "b.txt": ""}, "it holds a.txt, b.txt"),
        ({"model_index.json": "{}", "vae/config.json": "{}"}, "a pipeline of diffusers, give one of its folders: vae"),
        ({"config.json": '{"_class_name": "UNet2DModel"}'}, "UNet2DModel of diffusers"),
        ({"config.json": '{"model_type": "bert"}'}, "bert of transformers"),
        ({"config.json": "[]"}, "config.json: cannot be read: wanted a JSON object"),
        ({"config.json": "{"}, "config.json: cannot be read: "),
        ({INDEX: "{}"}, "index.json: wanted 'weight_map'"),
        ({INDEX: '{"weight_map": {"a": "../../secret"}}'}, "given/secret: No such file"),
    ],
)
def test_a_folder_without_weights_says_what_it_is(tmp_path, content, match):
    path = tmp_path / "given"
    path.mkdir()
    for name, text in content.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    with pytest.raises(WeightsError, match=match):
        releases.open_release(path)


def test_a_folder_of_transformers_tells_the_heads_of_an_encoder(tmp_path):
    original = vit.open_encoder(dinov2.KIND, DATA / "dinov2.safetensors", 4)
    arrays = vit.export(original.read(), "hf_dinov2", original.arch)
    path = folder(tmp_path / "dinov2", arrays, "model.safetensors", model_type="dinov2", num_attention_heads=4)
    for place in path, path / "model.safetensors":
        opened = vit.open_encoder(dinov2.KIND, place)
        assert opened.arch == original.arch
        for name, array in vit.export(opened.read(), "original", opened.arch).items():
            np.testing.assert_array_equal(array, vit.export(original.read(), "original", original.arch)[name], name)
    (path / "config.json").unlink()
    with pytest.raises(ConfigError, match="the number of heads cannot be read"):
        vit.open_encoder(dinov2.KIND, path)


WRAPPED = [
    "_orig_mod.{}",
    "module.{}",
    "module._orig_mod.{}",
    "_orig_mod.module.{}",
    "_fsdp_wrapped_module._orig_mod.module.{}",
]


def wrapped(form, name):
    """A name of an array in a model that torch has wrapped, also block by block."""
    name = name.replace("blocks.1.", "blocks.1._orig_mod.").replace("blocks.2.", "blocks.2._checkpoint_wrapped_module.")
    return form.format(name)


@pytest.mark.parametrize("form", WRAPPED)
def test_wrappers_of_torch_are_stripped_by_every_reader(tmp_path, form):
    def rewrapped(arrays):
        save_file({wrapped(form, name): array for name, array in arrays.items()}, tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    same(
        releases.open_release(rewrapped(load_file(PUBLISHED)), heads=4)[0], releases.open_release(PUBLISHED, heads=4)[0]
    )
    encoder = rewrapped(load_file(DATA / "dinov2.safetensors"))
    assert vit.open_encoder(dinov2.KIND, encoder, 4).arch.depth > 0
    autoencoder = rewrapped(load_file(DATA / "vae" / "diffusion_pytorch_model.safetensors"))
    assert vae.open_vae(autoencoder).digest


def table(arrays, change):
    return arrays | {"pos_embed": change(arrays["pos_embed"]).astype(np.float32)}


def test_a_position_table_tells_height_and_width(tmp_path):
    release, _ = releases.open_release(PUBLISHED, heads=4)
    out = releases.export(release.params, "sit", release.arch, (4, 16))
    again = releases.load(out, {name: array.shape for name, array in out.items()}, heads=4)
    assert again.sides == (4, 16)
    np.testing.assert_array_equal(out["pos_embed"][0], patches.position_table((2, 8), release.arch.width))
    assert again.space(again.sides).shape == (4, 16, 4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x + 0.1, r"differs by up to 0.1 from that of 4 x 4: a learned or resized table is not read"),
        (lambda x: x[:, ::-1], "not the fixed sine-cosine table of any grid of 16 patches"),
        (lambda x: x * np.nan, "differs by up to nan"),
        (lambda x: x[..., :-1], r"its position table has shape \[1, 16, 31\], wanted \[1, n, 32\]"),
        (lambda x: x[:, :0], r"its position table has shape \[1, 0, 32\]"),
        (lambda x: x[0, 0], r"its position table has shape \[32\]"),
    ],
)
def test_a_release_with_another_position_table_is_refused(change, match):
    arrays = table(load_file(PUBLISHED), change)
    with pytest.raises(ConfigError, match=match):
        releases.load(arrays, {name: array.shape for name, array in arrays.items()}, heads=4)


def test_a_position_table_in_half_precision_is_known():
    arrays = load_file(PUBLISHED)
    arrays["pos_embed"] = arrays["pos_embed"].astype(np.float16)
    release = releases.load(arrays, {name: array.shape for name, array in arrays.items()}, heads=4)
    assert release.sides == (8, 8)
