"""Every family of public releases loads, matches its reference's numbers, and goes back out as it came in."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diversedit_jax import models
from diversedit_jax.diffusion import paths
from diversedit_jax.errors import ConfigError
from diversedit_jax.objectives.flow_matching import regress
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.dit import FAMILIES
from tests import DATA

FILES = {
    "sit_plain": ("sit", "sit_config"),
    "sit_diversedit": ("sit", "sit_config"),
    "sra_student": ("sit", "sra_config"),
    "official_sit": ("official_sit", "official_config"),
    "official_dit": ("official_dit", "official_config"),
    "meanflow": ("meanflow", "meanflow_config"),
}


def arrays(name):
    return load_file(DATA / f"{name}.safetensors")


def shapes(arrays):
    return {name: array.shape for name, array in arrays.items()}


def heads(name):
    return json.loads((DATA / f"{FILES[name][1]}.json").read_text())["num_heads"]


def load(name, found=None, family=None, **options):
    found = arrays(name) if found is None else found
    given = family or (FILES[name][0] if name.startswith("official") else None)
    return releases.load(found, shapes(found), given, **({"heads": heads(name)} | options))


@pytest.mark.parametrize("name", FILES)
def test_family_and_architecture_are_recognised(name):
    family, config = FILES[name]
    config = json.loads((DATA / f"{config}.json").read_text())
    release = load(name)
    assert release.family == family
    arch = release.arch
    assert (arch.depth, arch.width, arch.patch) == (config["depth"], config["hidden_size"], config["patch_size"])
    assert arch.channels == config["in_channels"]
    assert arch.out_channels == config["in_channels"] * (2 if name.startswith("official") else 1)
    assert arch.skip == (name == "sit_diversedit")
    assert release.sides in ((config["input_size"],) * 2, None)


@pytest.mark.parametrize("name", FILES)
def test_import_export_import_is_exact(name):
    found = arrays(name)
    release = load(name)
    out = releases.export(release.params, release.family, release.arch)
    kept = {key: value for key, value in found.items() if not key.startswith(FAMILIES[release.family].ignored)}
    assert out.keys() == kept.keys()
    for key, value in out.items():
        assert value.flags.c_contiguous, key
        np.testing.assert_array_equal(value, kept[key], err_msg=key)
    again = releases.load(out, shapes(out), release.family, heads=release.arch.heads)
    jax.tree.map(np.testing.assert_array_equal, again.params, release.params)


def test_the_first_files_of_repa_count_their_later_blocks_anew(tmp_path):
    found = arrays("sit_plain")
    old = {}
    for name, array in found.items():
        first, _, rest = name.partition(".")
        index, _, rest = rest.partition(".")
        later = first == "blocks" and int(index) >= 4
        old[f"decoder_blocks.{int(index) - 4}.{rest}" if later else name] = array
    assert len(old) == len(found)
    assert len(old.keys() - found.keys()) > 50
    save_file(old, tmp_path / "old.safetensors")
    release, _ = releases.open_release(tmp_path / "old.safetensors", heads=heads("sit_plain"))
    jax.tree.map(np.testing.assert_array_equal, release.params, load("sit_plain").params)


def test_the_position_table_is_the_one_stored():
    for name in ("sit_plain", "sra_student", "official_sit", "official_dit"):
        release = load(name)
        out = releases.export(release.params, release.family, release.arch, sides=release.sides)
        np.testing.assert_allclose(out["pos_embed"], arrays(name)["pos_embed"], atol=1e-6)


def test_diffusers_layout_and_back():
    release = load("official_dit")
    out = releases.export(release.params, "diffusers_dit", release.arch)
    assert out["transformer_blocks.1.attn1.to_k.weight"].shape == (release.arch.width, release.arch.width)
    qkv = arrays("official_dit")["blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(out["transformer_blocks.1.attn1.to_k.weight"], np.split(qkv, 3)[1])
    again = releases.load(out, shapes(out), heads=release.arch.heads)
    assert again.family == "diffusers_dit"
    jax.tree.map(np.testing.assert_array_equal, again.params, release.params)
    out["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(ConfigError, match="differs from its copies in other blocks"):
        releases.load(out, shapes(out), heads=release.arch.heads)


@pytest.mark.parametrize("name", ["sra_student", "meanflow"])
def test_forward_equals_the_reference(name):
    release = load(name)
    options = releases.model_options(release.arch)
    model = models.make("dit", release.space((8, 8)), releases.inputs(release.arch), **options)
    with np.load(DATA / f"{FILES[name][1].removesuffix('_config')}.npz") as file:
        gold = {key: jnp.asarray(file[key], jax.dtypes.canonicalize_dtype(file[key].dtype)) for key in file.files}
    if name == "meanflow":
        t, r = jnp.ones(len(gold["z_nhwc"])), jnp.zeros(len(gold["z_nhwc"]))
        u, _ = model.apply(release.params, gold["z_nhwc"], t, gold["sample_y"], span=t - r)
        np.testing.assert_allclose(u, gold["u_t1_r0"], atol=1e-5 * np.abs(gold["u_t1_r0"]).max())
    else:
        x, noise = (jnp.moveaxis(gold[key], 1, -1) for key in ("lat", "noise"))
        result = regress(model.network(release.params), paths.make("linear"), x, noise, gold["t"], gold["y"])
        np.testing.assert_allclose(result.loss, gold["denoising_loss"], rtol=1e-5)


def changed(name, **changes):
    return {key: value for key, value in (arrays(name) | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.3.mlp.fc1.bias": None}, r"sit: the array blocks.3.mlp.fc1.bias \[128\] is missing"),
        ({"blocks.0.mlp.fc9.bias": np.zeros(3)}, r"sit: the array blocks.0.mlp.fc9.bias \[3\] is not known"),
        ({"blocks.2.attn.proj.bias": np.zeros(31)}, r"blocks.2.attn.proj.bias has shape \[31\], wanted \[32\]"),
        ({"x_embedder.proj.weight": np.zeros((32, 4))}, r"x_embedder.proj.weight has shape \[32, 4\], wanted 4 axes"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        load("sit_plain", changed("sit_plain", **change))


def test_what_cannot_be_told_is_asked_for():
    with pytest.raises(ConfigError, match=r"say --family=official_sit or official_dit"):
        releases.recognise(shapes(arrays("official_dit")))
    with pytest.raises(ConfigError, match=r"number of heads cannot be read from arrays of width 32"):
        load("sit_plain", heads=None)
    with pytest.raises(ConfigError, match=r"official_dit has 8 output channels, these arrays 4"):
        load("sit_plain", family="official_dit")
    with pytest.raises(ConfigError, match=r"no family known has these arrays \(conv.weight, ...\)"):
        releases.recognise({"conv.weight": (3, 3)})
    release = load("sit_diversedit")
    with pytest.raises(ConfigError, match=r"diffusers_dit cannot hold a network of 4 to 4 channels"):
        releases.export(release.params, "diffusers_dit", release.arch)
    with pytest.raises(ConfigError, match=r"meanflow has no long residual connections and no q and k norms"):
        releases.export(release.params, "meanflow", release.arch._replace(second_time=True))


def test_meanflow_goes_to_its_port_in_torch_and_back():
    release = load("meanflow")
    out = releases.export(release.params, "meanflow_torch", release.arch, sides=(8, 8))
    kernel = arrays("meanflow")["net/h_embedder/mlp/layers_0/_flax_linear/kernel"]
    np.testing.assert_array_equal(out["r_embedder.mlp.0.weight"], kernel.T)  # of t - r there as well
    again = releases.load(out, shapes(out), heads=release.arch.heads)
    assert (again.family, again.sides) == ("meanflow_torch", (8, 8))
    jax.tree.map(np.testing.assert_array_equal, again.params, release.params)
