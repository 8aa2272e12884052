"""Encoders: equal to published networks, read from every layout, with REPA's preprocessing; their place in a run."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import erf

from diversedit_jax import codecs, encoders, sharding, train
from diversedit_jax import config as configs
from diversedit_jax.api import Conditions, Space
from diversedit_jax.codecs import with_encoders
from diversedit_jax.configs import default
from diversedit_jax.encoders import clip, dinov1, dinov2, ijepa, mae, moco_v3
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.models import bicubic, vit
from diversedit_jax.models.vit import Architecture
from diversedit_jax.runs import build, trained
from diversedit_jax.training.step import initializer, train_step
from diversedit_jax.weights import vit as published
from diversedit_jax.weights.formats import weights_folder
from tests import DATA

SPACE = Space((8, 8, 1), Conditions.labels(4))
TINY = Architecture(depth=2, width=16, heads=2, hidden=40, patch=2, channels=3, side=3)

# name: its module, what a tiny one of its architecture is, the layouts it is published in: (layout, before each name).
KINDS = {
    "dinov2": (dinov2, TINY._replace(layer_scale=True), [("original", ""), ("hf_dinov2", "")]),
    "dinov2_reg": (dinov2, TINY._replace(layer_scale=True, registers=3), [("original", ""), ("hf_dinov2", "")]),
    "dinov2_g": (dinov2, TINY._replace(layer_scale=True, swiglu=True), [("original", ""), ("hf_dinov2", "")]),
    "dinov1": (dinov1, TINY, [("original", ""), ("hf_vit", "")]),
    "mae": (mae, TINY._replace(final_norm=False), [("original", "model.")]),
    "moco_v3": (moco_v3, TINY, [("original", "state_dict.module.base_encoder."), ("original", "")]),
    "ijepa": (ijepa, TINY._replace(class_token=False), [("original", "encoder.module."), ("original", "")]),
    "clip": (
        clip,
        TINY._replace(pre_norm=True, final_norm=False, activation="quick_gelu", eps=1e-5),
        [("hf_clip", ""), ("clip", "")],
    ),
}
# What files hold beside the encoder.
ASIDE = {
    "dinov2": ["mask_token"],
    "hf_dinov2": ["embeddings.mask_token"],
    "hf_vit": ["pooler.dense.weight"],
    "mae": ["model.norm.weight", "model.decoder_blocks.0.norm1.weight", "optimizer.step"],
    "moco_v3": ["state_dict.module.base_encoder.head.0.weight", "state_dict.module.momentum_encoder.cls_token"],
    "ijepa": ["predictor.module.mask_token"],
    "hf_clip": ["text_model.final_layer_norm.weight", "logit_scale", "vision_model.post_layernorm.weight"],
    "clip": ["visual.proj", "visual.ln_post.weight", "transformer.resblocks.0.ln_1.weight", "positional_embedding"],
}


def params(arch, seed=0):
    """Random parameters, none of them zero or one, as one finds them in a file."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(vit.network(arch).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape, dtype=np.float32), shapes)


def write(path, name, which=0, **changes):
    """A file of a tiny encoder in one of its layouts; changes: arrays by name, None to leave one out."""
    _, arch, layouts = KINDS[name]
    layout, prefix = layouts[which]
    arrays = {prefix + key: value for key, value in published.export(params(arch), layout, arch).items()}
    if which == 0 or layout != "original":
        extra = ASIDE.get(KINDS[name][0].KIND.name if layout == "original" else layout, [])
        arrays |= {key: np.ones(3, np.float32) for key in extra}
    save_file({key: value for key, value in (arrays | changes).items() if value is not None}, path)
    return str(path)


def images(side=6, channels=3, count=2):
    return np.random.default_rng(1).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


# --- The network.


def gold(name):
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("name", ["dinov2", "dinov2_reg"])
def test_dinov2_equals_the_reference(name):
    """At the stored side, and at another by the rule of Hugging Face."""
    release = published.open_encoder(dinov2.KIND, DATA / f"{name}.safetensors", heads=4)
    assert (release.arch.depth, release.arch.patch, release.arch.side) == (3, 14, 4)
    assert release.arch.registers == (4 if name == "dinov2_reg" else 0)
    weights, numbers = release.read(), gold(name)
    half = published.open_encoder(dinov2.KIND, DATA / f"{name}.safetensors", heads=4, dtype="bfloat16").read()
    for size in ("native", "84"):
        x, wanted = jnp.asarray(numbers[f"pixels_{size}"].transpose(0, 2, 3, 1)), numbers[f"hidden_{size}"]
        out = jax.jit(vit.network(release.arch, "hf").apply)(weights, x)
        np.testing.assert_allclose(out, wanted, atol=1e-5 * np.abs(wanted).max())
        rough = jax.jit(vit.network(release.arch, "hf", "bfloat16").apply)(half, x)
        assert rough.dtype == jnp.float32
        error = np.abs(rough - wanted).max() / np.abs(wanted).max()
        assert 1e-4 < error < 2e-2, "three blocks of bfloat16 matmuls are off by about one percent"
    tokens = vit.split(release.arch, out)
    prefix = int(numbers["num_prefix_tokens"])
    np.testing.assert_array_equal(tokens.class_token, out[:, 0])
    np.testing.assert_array_equal(tokens.registers, out[:, 1:prefix])
    np.testing.assert_array_equal(tokens.patches, out[:, prefix:])


def test_position_tables():
    """The rules that are published, and that registers leave one of them."""
    table = np.random.default_rng(0).standard_normal((25, 4)).astype(np.float32)
    matrices = {
        "repa": bicubic.weights(5, 3, antialias=True),
        "hub": bicubic.weights(5, 3, scale=5 / 3.1),
        "hf": bicubic.weights(5, 3),
    }
    for rule, matrix in matrices.items():
        wanted = np.einsum("ih,jw,hwd->ijd", matrix, matrix, table.reshape(5, 5, 4)).reshape(9, 4)
        out = vit.resample(jnp.asarray(table), 5, (3, 3), *vit.POSITIONS[rule])
        np.testing.assert_allclose(out, wanted, atol=1e-5)
        np.testing.assert_array_equal(vit.resample(jnp.asarray(table), 5, (5, 5), *vit.POSITIONS[rule]), table)
    for arch, different in [(TINY, 3), (TINY._replace(registers=2), 1)]:
        weights = params(arch)
        x = jnp.asarray(images(10) / 255, jnp.float32)
        networks = [jax.jit(vit.network(arch, rule).apply) for rule in vit.POSITIONS]
        outputs = [np.asarray(network(weights, x)) for network in networks]
        assert len({out.tobytes() for out in outputs}) == different


def norm(x, arrays, name, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def reference(arrays, x, arch):
    """A vision transformer in numpy under the names of `original`, in float64 and image by image."""
    arrays = {name: value.astype(np.float64) for name, value in arrays.items()}

    def linear(x, name):
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    out, p, d = [], arch.patch, arch.width
    for image in x:
        tiles = [image[i : i + p, j : j + p] for i in range(0, len(image), p) for j in range(0, len(image), p)]
        stream = np.stack([np.einsum("hwc,dchw->d", t, arrays["patch_embed.proj.weight"]) for t in tiles])
        stream = stream + arrays.get("patch_embed.proj.bias", 0)
        if arch.class_token:
            stream = np.concatenate([arrays["cls_token"].reshape(1, d), stream])
        stream = stream + arrays["pos_embed"].reshape(-1, d)
        if arch.registers:
            stream = np.concatenate([stream[:1], arrays["register_tokens"][0], stream[1:]])
        stream = norm(stream, arrays, "ln_pre", arch.eps) if arch.pre_norm else stream
        for i in range(arch.depth):
            block, heads = f"blocks.{i}.", []
            qkv = linear(norm(stream, arrays, block + "norm1", arch.eps), block + "attn.qkv")
            for h in range(arch.heads):
                k = d // arch.heads
                query, key, value = (qkv[:, n * d + h * k : n * d + (h + 1) * k] for n in range(3))
                scores = np.exp(query @ key.T / np.sqrt(k))
                heads.append(scores / scores.sum(-1, keepdims=True) @ value)
            scale1, scale2 = (arrays.get(f"{block}ls{n}.gamma", 1) for n in (1, 2))
            stream = stream + scale1 * linear(np.concatenate(heads, -1), block + "attn.proj")
            hidden = norm(stream, arrays, block + "norm2", arch.eps)
            if arch.swiglu:
                gate, hidden = np.split(linear(hidden, block + "mlp.w12"), 2, -1)
                hidden = linear(gate / (1 + np.exp(-gate)) * hidden, block + "mlp.w3")
            else:
                hidden = linear(hidden, block + "mlp.fc1")
                quick = arch.activation == "quick_gelu"
                hidden = hidden / (1 + np.exp(-1.702 * hidden)) if quick else hidden * (1 + erf(hidden / 2**0.5)) / 2
                hidden = linear(hidden, block + "mlp.fc2")
            stream = stream + scale2 * hidden
        out.append(norm(stream, arrays, "norm", arch.eps) if arch.final_norm else stream)
    return np.stack(out)


OPENAI = {
    "visual.transformer.resblocks": "blocks",
    "visual.": "",
    "conv1": "patch_embed.proj",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "c_fc": "fc1",
    "c_proj": "fc2",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_architecture_is_what_its_arrays_say(name):
    _, arch, _ = KINDS[name]
    arrays = published.export(params(arch), "clip" if name == "clip" else "original", arch)
    for wrong, right in OPENAI.items() if name == "clip" else ():
        arrays = {key.replace(wrong, right): value for key, value in arrays.items()}
    x = images() / 255 - 0.5
    out = jax.jit(vit.network(arch).apply)(params(arch), jnp.asarray(x, jnp.float32))
    wanted = reference(arrays, x, arch)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * np.abs(wanted).max())


# --- Files.


@pytest.mark.parametrize(("name", "which"), [(name, i) for name in KINDS for i in range(len(KINDS[name][2]))])
def test_every_layout_is_read_exactly(name, which, tmp_path):
    module, arch, _ = KINDS[name]
    release = published.open_encoder(module.KIND, write(tmp_path / "file", name, which), heads=2)
    assert release.arch == arch
    jax.tree.map(np.testing.assert_array_equal, release.read(), params(arch))
    half = published.open_encoder(module.KIND, tmp_path / "file", heads=2, dtype="bfloat16").read()
    kernel = params(arch)["blocks"]["qkv"]["kernel"]
    np.testing.assert_array_equal(half["blocks"]["qkv"]["kernel"], kernel.astype(jnp.bfloat16))
    assert half["blocks"]["norm1"]["scale"].dtype == half["position"].dtype == np.float32


def test_the_authors_dinov2_is_hugging_face_s(tmp_path):
    """Renamed by hand, with q, k and v joined: the same parameters, bit for bit."""
    theirs = load_file(DATA / "dinov2_reg.safetensors")
    arrays = {
        "cls_token": theirs.pop("embeddings.cls_token"),
        "pos_embed": theirs.pop("embeddings.position_embeddings"),
        "register_tokens": theirs.pop("embeddings.register_tokens"),
        "mask_token": theirs.pop("embeddings.mask_token"),
    }
    for i in range(3):
        for leaf in ("weight", "bias"):
            parts = [theirs.pop(f"encoder.layer.{i}.attention.attention.{n}.{leaf}") for n in ("query", "key", "value")]
            arrays[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(parts)
    renames = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer": "blocks",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm": "norm",
    }
    for name, value in theirs.items():
        for wrong, right in renames.items():
            name = name.replace(wrong, right)
        arrays[name] = value
    save_file(arrays, tmp_path / "original")
    files = (tmp_path / "original", DATA / "dinov2_reg.safetensors")
    ours, other = (published.open_encoder(dinov2.KIND, file, heads=4) for file in files)
    assert ours.arch == other.arch
    jax.tree.map(np.testing.assert_array_equal, ours.read(), other.read())


def test_moco_v3_is_spelt_right():
    assert moco_v3.rename("base_encoder.blocks.13.norm13.weight") == "blocks.13.norm1.weight"
    assert moco_v3.rename("base_encoder.blocks.13.mlp.fc13.bias") == "blocks.13.mlp.fc1.bias"
    assert moco_v3.rename("base_encoder.blocks.14.norm14.bias") == "blocks.14.norm2.bias"
    assert moco_v3.rename("base_encoder.blocks.14.mlp.fc14.weight") == "blocks.14.mlp.fc2.weight"
    assert moco_v3.rename("base_encoder.blocks.1.norm1.bias") == "blocks.1.norm1.bias"


def test_i_jepa_s_entry_can_be_chosen(tmp_path):
    _, arch, _ = KINDS["ijepa"]
    arrays = {}
    for seed, entry in enumerate(("encoder", "target_encoder")):
        exported = published.export(params(arch, seed), "original", arch)
        arrays |= {f"{entry}.module.{name}": value for name, value in exported.items()}
    save_file(arrays, tmp_path / "file")
    for seed, entry in enumerate(("encoder", "target_encoder")):
        made = ijepa.make(file=str(tmp_path / "file"), weights=entry, heads=2, dtype="float32")
        jax.tree.map(np.testing.assert_array_equal, made.init(), params(arch, seed))


def test_published_numbers_of_heads():
    def arch(kind, width):
        shapes = {
            "patch_embed.proj.weight": (width, 3, 16, 16),
            "pos_embed": (1, 197, width),
            "blocks.0.mlp.fc2.weight": (width, 4 * width),
        }
        return published.architecture(kind, "original", shapes)

    assert [arch(dinov2.KIND, width).heads for width in (384, 768, 1024, 1536)] == [6, 12, 16, 24]
    assert [arch(moco_v3.KIND, width).heads for width in (384, 768)] == [12, 12]
    with pytest.raises(ConfigError, match="heads cannot be read from arrays of width 100: set heads"):
        arch(dinov2.KIND, 100)


def test_files_that_do_not_fit(tmp_path):
    def refused(name, message, change, source=None, error=ConfigError):
        file = write(tmp_path / "file", source or name, **change)
        with pytest.raises(error, match=message):
            encoders.make(name, file=file, heads=2)

    bias = "blocks.1.mlp.fc1.bias"
    refused("dinov2", rf"dinov2: the array {bias} \[40\] is missing", {bias: None})
    refused("dinov2", r"dinov2: the array head.weight \[3\] is not known", {"head.weight": np.ones(3)})
    refused("dinov2", rf"{bias} has shape \[41\], wanted \[40\]", {bias: np.ones(41)})
    refused(
        "dinov2",
        r"pos_embed has 11 places, which are not a class token and a square",
        {"pos_embed": np.ones((1, 11, 16))},
    )
    refused("dinov2", r"blocks.0.ls1.gamma \[16\] is missing and 3 more", {}, source="dinov1")
    refused("dinov1", r"dinov1: the array blocks.0.ls1.gamma \[16\] is not known", {}, source="dinov2")
    refused("ijepa", r"pos_embed has 10 places, which are not a square", {}, source="dinov1")
    refused("clip", r"clip: these are not its arrays .*wanted vision_model.*or visual.conv1.weight", {}, source="mae")
    (tmp_path / "file").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="is not a weight file"):
        encoders.make("dinov2", file=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="unknown name 'dinov3'; did you mean 'dinov"):
        encoders.make("dinov3", file="")


def test_options_that_do_not_fit(tmp_path):
    file = write(tmp_path / "file", "dinov2")
    for options, message in [
        ({"mean": (0.5, 0.5)}, "mean has 2 values, the encoder has 3 channels"),
        ({"std": (0.0,)}, "std = 0.0: must be more than 0"),
        ({"side": 7}, "side = 7 must be a multiple of its patches of 2 pixels"),
        ({"heads": 3}, "heads = 3 does not divide the width 16"),
        ({"position": "timm"}, "position = 'timm' is unknown"),
        ({"dtype": "float16"}, "dtype = 'float16' is unknown"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dinov2.make(file=file, **({"heads": 2} | options))


# --- Images in, features out.


@pytest.mark.parametrize("name", KINDS)
def test_features_are_those_of_repa(name, tmp_path):
    """Of 256 pixels 16 x 16 patches; at a side of one's own, the numbers of the network behind the preprocessing."""
    module, arch, _ = KINDS[name]
    wide = arch._replace(patch=14 if name.startswith(("dinov2", "ijepa", "clip")) else 16)
    layout = "clip" if name == "clip" else "original"
    save_file(published.export(params(wide), layout, wide), tmp_path / "wide")
    encoder = module.make(file=str(tmp_path / "wide"), heads=2)
    for size in (256, 512):
        shape = jax.ShapeDtypeStruct((2, size, size, 3), np.uint8)
        if size == 512 and not name.startswith("dinov2"):
            with pytest.raises(
                ConfigError,
                match="the images have 512 x 512 pixels, there is a published rule only for 256 x 256 pixels: set side",
            ):
                jax.eval_shape(encoder.apply, encoder.init(), shape)
            continue
        patches, token = jax.eval_shape(encoder.apply, encoder.init(), shape)
        assert patches.shape == (2, size**2 // 16**2, arch.width)
        assert (token is None) == (name == "ijepa")

    encoder = module.make(file=write(tmp_path / "file", name), heads=2, side=6, dtype="float32")
    assert encoder.width == 16
    raw = images(9)
    kind = "CLIP" if name == "clip" else "IMAGENET"
    mean, std = (getattr(encoders, f"{kind}_{value}") for value in ("MEAN", "STD"))
    matrix = bicubic.weights(9, 6)
    x = (np.einsum("ih,jw,bhwc->bijc", matrix, matrix, raw / 255) - mean) / std
    tokens = jax.jit(vit.network(arch).apply)(params(arch), jnp.asarray(x, jnp.float32))
    patches, token = jax.jit(encoder.apply)(encoder.init(), raw)
    np.testing.assert_allclose(patches, tokens[:, -9:], atol=1e-4)
    assert patches.shape == (2, 9, 16)
    if token is not None:
        np.testing.assert_allclose(token, tokens[:, 0], atol=1e-4)


def toy(tmp_path, side=4, patch=2, channels=1, width=16):
    """An encoder in the layout of DINOv2 for digits: patches of 2 pixels, one channel."""
    arch = Architecture(2, width, 2, 4 * width, patch, channels, side, layer_scale=True)
    save_file(published.export(params(arch), "original", arch), tmp_path / "toy")
    return {"file": str(tmp_path / "toy"), "side": 8, "mean": (0.5,), "std": (0.25,), "heads": 2}


def test_an_encoder_of_one_s_own_for_small_images(tmp_path):
    encoder = encoders.make("dinov2", **toy(tmp_path), dtype="float32")
    patches, token = jax.eval_shape(encoder.apply, encoder.init(), images(8, 1))
    assert (patches.shape, token.shape) == ((2, 16, 16), (2, 16))
    with pytest.raises(ConfigError, match=r"dinov2: wanted images \[b h w 1\], given \[2, 8, 8, 3\]"):
        jax.eval_shape(encoder.apply, encoder.init(), images(8, 3))


def test_the_file_is_read_once(tmp_path, monkeypatch):
    opened = []
    opening = weights_folder.open_weights
    monkeypatch.setattr(weights_folder, "open_weights", lambda path: opened.append(path) or opening(path))
    encoder = encoders.make("dinov2", **toy(tmp_path))
    assert len(opened) == 1, "names and shapes are checked"
    for _ in range(2):
        jax.eval_shape(encoder.init)
    assert encoder.init() is encoder.init()
    assert len(opened) == 2


# --- In a codec.


def prepared(made, batch):
    return jax.jit(made.encode)(made.init(), batch, jax.random.key(0))


def test_the_batch_gets_features_and_class_token(tmp_path):
    encoder = encoders.make("dinov2", **toy(tmp_path))
    made = with_encoders(codecs.make("pixels"), {"one": encoder, "two": encoder})
    levels = images(8, 1)
    x, y = jnp.asarray(levels / 127.5 - 1, jnp.float32), jnp.arange(2)
    batch = prepared(made, {"x": x, "y": y})
    patches, token = jax.jit(encoder.apply)(encoder.init(), levels)
    assert set(batch) == {"x", "y", "image"} | {f"{kind}/{n}" for kind in ("features", "token") for n in ("one", "two")}
    np.testing.assert_array_equal(batch["image"], levels)
    for label in ("one", "two"):
        assert batch[f"features/{label}"].dtype == batch[f"token/{label}"].dtype == jnp.float32
        np.testing.assert_allclose(batch[f"features/{label}"], patches, atol=1e-5)
        np.testing.assert_allclose(batch[f"token/{label}"], token, atol=1e-5)
    np.testing.assert_array_equal(made.decode(made.init(), x), levels)

    def total(image):
        return made.encode(made.init(), {"x": x, "y": y, "image": image}, jax.random.key(0))["features/one"].sum()

    gradient = jax.jit(jax.grad(total))(x)
    assert not np.any(gradient), "a gradient passes through the encoder"


def test_latents_take_the_image_that_is_stored(tmp_path):
    made = with_encoders(codecs.make("vae"), {"toy": encoders.make("dinov2", **toy(tmp_path))})
    assert made.decode is None
    batch = {"moments": jnp.ones((2, 4, 4, 8), jnp.float16), "y": jnp.arange(2), "image": jnp.asarray(images(8, 1))}
    out = prepared(made, batch)
    assert out["features/toy"].shape == (2, 16, 16)
    without = {name: value for name, value in batch.items() if name != "image"}
    with pytest.raises(ConfigError, match=r"config.encoders.toy reads `image`, .* set config.data.image=True"):
        made.encode(made.init(), without, jax.random.key(0))
    with pytest.raises(ConfigError, match=r"features/toy are in the data already: remove config.encoders.toy"):
        made.encode(made.init(), batch | {"features/toy": jnp.ones((2, 16, 16))}, jax.random.key(0))


def test_each_frame_of_a_video_is_encoded_as_an_image(tmp_path):
    encoder = encoders.make("dinov2", **toy(tmp_path))
    made = with_encoders(codecs.make("pixels"), {"toy": encoder})
    clips = images(8, 1, 6).reshape(2, 3, 8, 8, 1)
    batch = prepared(made, {"x": jnp.asarray(clips / 127.5 - 1, jnp.float32), "y": jnp.arange(2)})
    assert "token/toy" not in batch, "a video has no class token"
    assert batch["features/toy"].shape == (2, 3 * 16, 16)
    for frame in range(3):
        patches, _ = jax.jit(encoder.apply)(encoder.init(), clips[:, frame])
        np.testing.assert_allclose(batch["features/toy"][:, 16 * frame : 16 * (frame + 1)], patches, atol=1e-5)


def test_cached_features_reach_the_losses_in_float32():
    batch = {"moments": jnp.ones((2, 4, 4, 8), jnp.float16), "y": jnp.arange(2), "image": jnp.asarray(images(8))}
    cached = {"features/dinov2": jnp.full((2, 4, 3), 0.1, jnp.float16), "token/dinov2": jnp.ones((2, 3), jnp.float16)}
    out = prepared(codecs.make("vae"), batch | cached)
    assert out["features/dinov2"].dtype == out["token/dinov2"].dtype == jnp.float32
    np.testing.assert_array_equal(out["features/dinov2"], np.float32(np.float16(0.1)))
    assert out["image"].dtype == jnp.uint8


# --- In a run.


def config_with(tmp_path, **options):
    config = default.get_config()
    config.total_steps, config.batch_size, config.log_every = 2, 8, 1
    config.data = configs.slot("data", "synthetic", shape=(8, 8, 1), num_classes=4)
    config.codec = configs.slot("codecs", "pixels")
    config.encoders.toy = configs.slot("encoders", "dinov2", **toy(tmp_path, **options))
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.losses.aligned = configs.slot("losses", "tests.parts:make_aligned", label="toy")
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 8})
    config.samples.num = 8
    return config


def test_weights_are_no_constants_of_the_step(tmp_path):
    config = config_with(tmp_path, width=192)
    parts = build.build(config, SPACE).components
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.codec.init()))
    batch = {"x": jnp.zeros((8, 8, 8, 1)), "y": jnp.zeros(8, jnp.int32)}
    key = jax.random.key(0)
    state = jax.eval_shape(initializer(parts, batch), key)
    step = jax.jit(partial(train_step, parts))
    traced = step.trace(state, jax.eval_shape(parts.codec.init), batch, key)
    assert sum(np.size(const) for const in traced.jaxpr.consts) < 1000
    text = traced.lower().as_text()
    assert "192x768x" in text, "the encoder is not in the step"
    assert len(text) < size / 2, f"the step's text has {len(text)} characters, the encoder's weights {size} bytes"


def test_frozen_weights_live_where_the_mesh_says(tmp_path):
    config = config_with(tmp_path, width=64)
    config.mesh.fsdp = 4
    experiment = build.build(config, SPACE)
    codec, layout = experiment.components.codec, experiment.layout
    frozen, host = build.frozen_weights(codec, layout), codec.init()
    kernel = frozen["encoders"]["toy"]["blocks"]["fc1"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, "fsdp"), "a stack is split along its layers"
    assert kernel.addressable_shards[0].data.shape == (2, 64, 64)
    jax.tree.map(np.testing.assert_array_equal, frozen, host)
    placed = sharding.shardings(host, layout)
    assert jax.tree.all(jax.tree.map(lambda leaf, s: leaf.sharding == s, frozen, placed))


@pytest.mark.slow
def test_a_run_trains_with_an_encoder_and_samples_without_it(tmp_path):
    config = config_with(tmp_path)
    train.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss/aligned"]) for line in lines if "loss/aligned" in line)
    assert any("loss/aligned" in line for line in lines)
    shutil.move(config.encoders.toy.file, tmp_path / "elsewhere")
    source = trained.drawing(trained.of_run(tmp_path / "run"))
    assert source.frozen == {}
    with pytest.raises(WeightsError, match="toy: No such file"):
        build.build(config, SPACE)


def test_an_encoder_without_a_file_says_how_to_give_one():
    config = default.get_config()
    config.encoders.dinov2 = configs.slot("encoders", "dinov2")
    with pytest.raises(ConfigError, match=r"config.encoders.dinov2.file is not set"):
        build.build(config, SPACE)
