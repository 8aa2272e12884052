"""Feature networks: equal to their definitions, the same wherever they run, and their weights known by a digest."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.data import digits
from diversedit_jax.encoders.dinov2 import KIND
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import extractors
from diversedit_jax.evaluation.extractors import digits as small
from diversedit_jax.models import inception, vit
from diversedit_jax.weights import vit as published
from tests import DATA


@pytest.fixture(scope="module")
def network():
    return extractors.make("digits")


def test_digits_are_told_apart(network):
    images, labels = digits.levels("test")
    found = jax.jit(network.apply)(network.init(), small.as_bytes(images))
    assert found.pool.shape == (360, 96)
    assert found.spatial.shape == (360, 64)
    assert np.mean(np.argmax(found.logits, axis=1) == labels) > 0.9
    np.testing.assert_array_equal(network.reference(), small.as_bytes(digits.levels("train")[0]))


def test_digits_are_rounded_to_their_levels(network):
    images = small.as_bytes(digits.levels("test")[0][:5]).astype(int)
    near = np.clip(images + 5, 0, 255).astype(np.uint8)  # less than half of a level's 16
    exact, rounded = (jax.jit(network.apply)(network.init(), x).pool for x in (images.astype(np.uint8), near))
    np.testing.assert_array_equal(exact, rounded)


def test_images_of_another_size_are_refused(network):
    with pytest.raises(ConfigError, match=r"digits: wanted images \[b 8 8 1\], given \[2, 8, 8, 3\]"):
        network.apply(network.init(), jnp.zeros((2, 8, 8, 3), jnp.uint8))


def test_dinov2_is_its_class_token_of_images_resized_with_antialiasing():
    file = DATA / "dinov2.safetensors"
    release = published.open_encoder(KIND, file, 4, "hub", "float32")
    side = 2 * release.arch.patch
    one = extractors.make("dinov2", file=str(file), side=side, heads=4)
    images = np.random.default_rng(0).integers(0, 256, (3, 2 * side + 7, 2 * side + 7, 3), dtype=np.uint8)
    resized = jax.image.resize(np.float32(images), (3, side, side, 3), "cubic", antialias=True)
    x = (resized / 255 - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    tokens = vit.network(release.arch, "hub", "float32").apply(jax.tree.map(jnp.asarray, release.read()), x)
    found = jax.jit(one.apply)(one.init(), images)
    np.testing.assert_allclose(found.pool, tokens[:, 0], rtol=1e-4, atol=1e-5)
    assert found.spatial is None
    assert found.logits is None
    with pytest.raises(ConfigError, match=rf"side = {side + 1} is not a multiple of its patches"):
        extractors.make("dinov2", file=str(file), side=side + 1, heads=4)
    with pytest.raises(ConfigError, match=r"dinov2: wanted images \[b h w 3\], given \[3, 8, 8, 1\]"):
        one.apply(one.init(), jnp.zeros((3, 8, 8, 1), jnp.uint8))


def test_inception_gives_what_its_model_gives(monkeypatch):
    weights = {"unit": np.ones(3, np.float32)}
    opened = SimpleNamespace(name="graph.pb", read=lambda: weights)
    monkeypatch.setattr("diversedit_jax.evaluation.extractors.inception.open_inception", lambda file: opened)
    seen = []

    def apply(params, images):
        seen.append((params, images.shape))
        return inception.Features(*(jnp.full((1, n), float(n)) for n in (2048, 2023, 1008)))

    monkeypatch.setattr(inception, "network", lambda precision: inception.Model(None, apply))
    one = extractors.make("inception", file="graph.pb")
    found = one.apply(one.init(), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    assert (found.pool.shape, found.spatial.shape, found.logits.shape) == ((1, 2048), (1, 2023), (1, 1008))
    assert seen == [(weights, (1, 8, 8, 3))]
    assert one.about["weights"] == {"name": "graph.pb", "digest": extractors.digest(weights)}


def test_a_digest_is_of_values_names_and_shapes():
    weights = {"a": np.arange(6, dtype=np.float32), "b": {"c": np.ones(2, np.float32)}}
    same = {"b": {"c": np.ones(2)}, "a": np.arange(6)}
    assert extractors.digest(weights) == extractors.digest(same)
    others = [
        weights | {"a": weights["a"][::-1]},
        weights | {"a": weights["a"].reshape(2, 3)},
        {"a": weights["a"], "b": {"d": np.ones(2, np.float32)}},
    ]
    assert len({extractors.digest(other) for other in (weights, *others)}) == 4


def test_the_convolutions_of_digits_are_the_same_everywhere():
    """Pinned: scores of two machines compare only if the networks are one."""
    made = small.random_convolutions()
    assert {name: kernel.shape for name, kernel in made.items()} == {"first": (3, 3, 1, 16), "second": (3, 3, 16, 24)}
    first = np.array([0.059269793, -0.06227483, 0.30189812], np.float32)
    np.testing.assert_allclose(made["first"].ravel()[:3], first, rtol=1e-6)
    np.testing.assert_allclose([made["first"].std(), made["second"].std()], np.sqrt(2 / np.array([9, 144])), rtol=0.1)


def test_weights_of_digits_are_the_same_at_each_call(network):
    again = extractors.make("digits").init()
    jax.tree.map(np.testing.assert_array_equal, again, network.init())


def test_features_of_digits_are_those_of_plain_numpy(network):
    images = small.as_bytes(digits.levels("test")[0][:3])
    weights = jax.tree.map(np.float64, network.init())

    def convolved(x, kernel, stride):
        """Padded as TensorFlow does: of an even side and stride 2, behind alone."""
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)) if stride == 1 else ((0, 0), (0, 1), (0, 1), (0, 0)))
        side = (x.shape[1] - 3) // stride + 1
        out = np.zeros((len(x), side, side, kernel.shape[-1]))
        for i, j in np.ndindex(side, side):
            tile = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[:, i, j] = np.einsum("bhwc,hwcd->bd", tile, kernel)
        return np.maximum(out, 0)

    x = np.round(images * (16 / 255)) / 8 - 1
    x = convolved(convolved(x, weights["first"], 1), weights["second"], 2)
    quarters = [x[:, i : i + 2, j : j + 2].mean(axis=(1, 2)) for i in (0, 2) for j in (0, 2)]
    pool = np.concatenate(quarters, axis=1)
    logits = pool @ weights["classifier"]["kernel"] + weights["classifier"]["bias"]
    out = jax.jit(network.apply)(network.init(), images)
    for found, wanted in zip(out[:3], (pool, x[..., :4].reshape(3, 64), logits), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_a_network_without_its_file_is_refused(name):
    with pytest.raises(ConfigError, match=f"extractors.{name}: give its file"):
        extractors.make(name)
    with pytest.raises(ConfigError, match=rf"extractors.{name}: no option 'path'; (did you mean .*)?known: file, "):
        extractors.make(name, file="weights.pth", path="weights.pth")
