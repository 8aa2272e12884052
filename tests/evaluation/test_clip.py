"""The CLIP score equals its definition: both towers, both projections, resizing as in Pillow; and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diversedit_jax.encoders import CLIP_MEAN, CLIP_STD
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import extractors
from diversedit_jax.evaluation.extractors import Features, clip
from tests import DATA, whole_clip

IMAGES = np.random.default_rng(1).integers(0, 256, (3, 30, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_clip.leave(tmp_path_factory.mktemp("clip") / "whole")


@pytest.fixture(scope="module")
def network(folder):
    return extractors.make("clip", file=str(folder))


@pytest.fixture(scope="module")
def gold():
    """Embeddings of texts by transformers."""
    with np.load(DATA / "clip_text.npz") as file:
        return file["input_ids"].astype(np.int32), file["text_embeds"]


def cropped(image, side):
    """One image as CLIP prepares it, by Pillow."""
    height, width = image.shape[:2]
    short = min(height, width)
    picture = Image.fromarray(image).resize((side * width // short, side * height // short), Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in picture.size)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def embedded(arrays, images):
    """The embeddings of images, from the arrays of transformers in float64: one loop after the definition."""
    a = {name.removeprefix("vision_model."): np.float64(array) for name, array in arrays.items()}
    arch, side = whole_clip.ARCH, whole_clip.SIDE
    count, size, wide = len(images), side // arch.patch, arch.width // arch.heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * a[f"{name}.weight"] + a[f"{name}.bias"]

    def linear(x, name):
        return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

    pixels = (np.stack([cropped(image, side) for image in images]) / 255 - CLIP_MEAN) / CLIP_STD
    patches = pixels.reshape(count, size, arch.patch, size, arch.patch, 3)
    x = np.einsum("bipjqc,dcpq->bijd", patches, a["embeddings.patch_embedding.weight"]).reshape(count, size**2, -1)
    first = np.broadcast_to(a["embeddings.class_embedding"], (count, 1, arch.width))
    x = norm(np.concatenate([first, x], 1) + a["embeddings.position_embedding.weight"], "pre_layrnorm")
    for layer in range(arch.depth):
        at = f"encoder.layers.{layer}"
        z = norm(x, f"{at}.layer_norm1")
        q, k, v = (linear(z, f"{at}.self_attn.{n}_proj").reshape(count, -1, arch.heads, wide) for n in "qkv")
        weights = np.exp(np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(wide))
        seen = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
        x = x + linear(seen.reshape(x.shape), f"{at}.self_attn.out_proj")
        hidden = linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        x = x + linear(hidden / (1 + np.exp(-1.702 * hidden)), f"{at}.mlp.fc2")
    return norm(x[:, 0], "post_layernorm") @ a["visual_projection.weight"].T


SIZES = [((16, 16), 16), ((32, 32), 16), ((31, 45), 16), ((13, 11), 16), ((256, 256), 224)]


@pytest.mark.parametrize(("shape", "side"), SIZES)
def test_images_are_resized_as_by_pillow(shape, side):
    images = np.random.default_rng(2).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    found = np.asarray(clip.resized(images, side))
    wanted = np.stack([cropped(image, side) for image in images]).astype(np.float32)
    assert np.abs(found - wanted).max() <= 1
    assert (found != wanted).mean() < 0.002, "Pillow's weights are whole multiples of 2^-22"


def test_the_score_is_that_of_the_definition(network, gold):
    ids, texts = gold
    images = np.resize(IMAGES, (len(ids), *IMAGES.shape[1:]))
    found = jax.jit(network.apply)(network.init(), images)
    wanted = embedded(whole_clip.arrays(), images)
    np.testing.assert_allclose(found.pool, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
    assert (found.spatial, found.logits, found.match) == (None, None, None)
    for sign in (1, -1):
        cosines = (sign * wanted * texts).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(texts, axis=1)
        match = jax.jit(network.match)(network.init(), Features(sign * found.pool), ids)
        np.testing.assert_allclose(match, 100 * np.maximum(cosines, 0), rtol=1e-3, atol=1e-2)
    assert (np.asarray(match) > 0).any(), "this could not tell one embedding from another"


def test_a_caption_matches_its_own_embedding_and_no_opposite(network, gold):
    ids, texts = gold
    for pool, wanted in ((3 * texts, 100), (-texts, 0)):
        match = jax.jit(network.match)(network.init(), Features(pool), ids)
        np.testing.assert_allclose(match, wanted, atol=2e-3)


def test_it_says_what_it_is(network, folder):
    assert network.about["weights"] == {"name": "whole", "digest": extractors.digest(network.init())}
    assert network.about["resize"] == "bicubic of Pillow, the shorter side to 16, cropped in the centre"
    file = extractors.make("clip", file=str(folder / "model.safetensors"))
    assert file.about["weights"]["digest"] == network.about["weights"]["digest"]


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.arange(4, dtype=np.int32), "clip: the conditions are labels; its score compares"),
        ({"context": np.zeros((2, 4, 3), np.float32)}, "clip: the conditions are stored features; its score compares"),
        (np.zeros((2, 4), np.float32), "clip: the conditions are stored features"),
        (
            np.full((2, 17), 98),
            r"17 tokens with ids 98 \.\. 98, but it takes 16 or fewer .* another tokenizer",
        ),
        (np.array([[97, 99, 98]]), r"3 tokens with ids 97 \.\. 99, .* with ids 0 \.\. 98 and the end 98"),
        (np.array([[97, 98], [97, 5]]), "another tokenizer made them"),
    ],
)
def test_conditions_that_are_no_captions_are_refused(y, said, network):
    with pytest.raises(ConfigError, match=said):
        network.check(y)


def test_what_is_no_whole_clip_is_refused(network, tmp_path):
    with pytest.raises(ConfigError, match=r"extractors\.clip: give its file"):
        extractors.make("clip")
    with pytest.raises(ConfigError, match=r"clip: wanted images \[b h w 3\], given \[2, 8, 8, 1\]"):
        network.apply(network.init(), jnp.zeros((2, 8, 8, 1), jnp.uint8))
    with pytest.raises(ConfigError, match=r"wanted vision_model\.embeddings\.patch_embedding\.weight"):
        extractors.make("clip", file=str(DATA / "clip_text"))
    name = "visual_projection.weight"
    for number, (changes, said) in enumerate(
        [
            ({name: None}, f"clip: the array {name} is missing"),
            ({"text_projection.weight": None}, "clip: the array text_projection.weight is missing"),
            ({name: np.zeros((20, 9), np.float32)}, rf"clip: {name} has shape \[20, 9\], wanted \[20, 24\]"),
            ({"vision_model.post_layernorm.bias": None}, r"vision_model.post_layernorm.bias \[24\] is missing"),
        ]
    ):
        broken = whole_clip.leave(tmp_path / str(number), **changes)
        with pytest.raises(ConfigError, match=said):
            extractors.make("clip", file=str(broken))
    other = whole_clip.leave(tmp_path / "other", vision={"hidden_act": "relu"})
    with pytest.raises(ConfigError, match=r"clip: hidden_act in config.json = 'relu' is unknown"):
        extractors.make("clip", file=str(other))


def test_it_equals_transformers(network, folder, gold):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    size = {"shortest_edge": whole_clip.SIDE}, {"height": whole_clip.SIDE, "width": whole_clip.SIDE}
    prepare = transformers.CLIPImageProcessor(size=size[0], crop_size=size[1])
    ids, _ = gold
    images = np.resize(IMAGES, (len(ids), *IMAGES.shape[1:]))
    with torch.no_grad():
        pixels = prepare([Image.fromarray(image) for image in images], return_tensors="pt")
        out = model(input_ids=torch.tensor(ids), **pixels, attention_mask=torch.ones(ids.shape))
    wanted = 100 * np.maximum((out.image_embeds * out.text_embeds).sum(1).numpy(), 0)
    weights, ids = network.init(), jnp.asarray(ids)
    found = network.match(weights, network.apply(weights, jnp.asarray(images)), ids)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-2)
