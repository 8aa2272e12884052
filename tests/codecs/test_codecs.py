"""Codecs: pixels pass unchanged and decode to grey levels; latents are drawn with the stored moments."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import codecs
from diversedit_jax.codecs import vae
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build


def test_pixels_pass_unchanged():
    pixels = codecs.make("pixels")
    x, y = jnp.linspace(-1, 1, 2 * 3 * 3).reshape(2, 3, 3, 1), jnp.array([3, 4])
    batch = pixels.encode(pixels.init(), {"x": x, "y": y}, jax.random.key(0))
    assert batch["x"] is x
    assert batch["y"] is y


def test_pixels_bring_an_image_for_encoders_where_the_data_have_none():
    pixels, x = codecs.make("pixels"), jnp.array([-1.0, 1.0]).reshape(1, 1, 2, 1)
    given = {"x": x, "y": jnp.array([3])}
    np.testing.assert_array_equal(pixels.encode({}, given, jax.random.key(0))["image"].ravel(), [0, 255])
    stored = jnp.full((1, 4, 4, 3), 7, jnp.uint8)
    assert pixels.encode({}, given | {"image": stored}, jax.random.key(0))["image"] is stored


def test_pixels_decode_to_the_nearest_grey_level():
    pixels = codecs.make("pixels")
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = levels.astype(np.float32) / 127.5 - 1
    for shift in (-0.4, 0, 0.4):
        np.testing.assert_array_equal(pixels.decode({}, jnp.asarray(x + shift / 127.5)), levels)
    out = pixels.decode({}, jnp.array([-7.0, 7.0]).reshape(1, 1, 2, 1))
    assert out.dtype == jnp.uint8
    assert out.ravel().tolist() == [0, 255]


def test_pixels_rounded_by_floor_decode_to_the_grey_level_below():
    """ADM's and REPA's uint8(127.5 x + 127.5): all that lies between two levels is the lower one."""
    pixels = codecs.make("pixels", rounding="floor")
    levels = np.arange(255, dtype=np.uint8).reshape(1, 15, 17, 1)
    for above in (0.1, 0.9):
        x = (levels + np.float32(above)) / 127.5 - 1
        np.testing.assert_array_equal(pixels.decode({}, jnp.asarray(x)), levels)


def batch_of(mean, std, shape=(64, 8, 8, 3)):
    moments = np.concatenate([np.full(shape, mean), np.full(shape, std)], axis=-1).astype(np.float16)
    return {"moments": jnp.asarray(moments), "y": jnp.arange(len(moments))}


def test_latents_have_the_stored_mean_and_deviation():
    latents = codecs.make("vae", scale=0.5, bias=1.0)
    batch = latents.encode(latents.init(), batch_of(mean=3.0, std=2.0), jax.random.key(0))
    x = np.asarray(batch["x"])
    assert (x.shape, x.dtype) == ((64, 8, 8, 3), np.float32)
    np.testing.assert_allclose([x.mean(), x.std()], [(3 - 1) * 0.5, 2 * 0.5], atol=0.03)
    np.testing.assert_array_equal(batch["y"], np.arange(64))


def test_latents_without_deviation_are_the_scaled_mean():
    latents = codecs.make("vae")
    x = latents.encode({}, batch_of(mean=2.0, std=0.0), jax.random.key(0))["x"]
    np.testing.assert_allclose(x, 2 * 0.18215, rtol=1e-6)


def test_latents_are_drawn_by_the_key_and_anew_for_every_example():
    latents = codecs.make("vae")
    draw = jax.jit(lambda seed: latents.encode({}, batch_of(0.0, 1.0, (4, 2, 2, 1)), jax.random.key(seed))["x"])
    np.testing.assert_array_equal(draw(0), draw(0))
    assert len(np.unique(np.concatenate([draw(0), draw(1)]))) == 2 * 4 * 2 * 2


def test_latents_stand_in_the_place_of_their_moments_beside_all_else():
    """Cached features of half precision become float32. Images stay bytes."""
    more = {"features/dinov2": jnp.ones((4, 3, 2), jnp.float16), "image": jnp.ones((4, 8, 8, 3), jnp.uint8)}
    batch = codecs.make("vae").encode({}, batch_of(0.0, 1.0, (4, 2, 2, 1)) | more, jax.random.key(0))
    dtypes = {name: value.dtype.name for name, value in batch.items()}
    assert dtypes == {"x": "float32", "y": "int32", "features/dinov2": "float32", "image": "uint8"}


@pytest.mark.parametrize(("rounding", "level"), [("nearest", 192), ("floor", 191)])
def test_latents_are_decoded_at_their_scale_a_chunk_at_a_time(rounding, level, monkeypatch):
    """With an autoencoder whose images are its latents."""
    seen = []

    def decode(params, latents):
        seen.append(latents.shape)
        return latents

    release = SimpleNamespace(arch=None, scale=0.5, shift=0.25, read=lambda halves: {})
    monkeypatch.setattr(vae, "open_vae", lambda path: release)
    monkeypatch.setattr(vae, "network", lambda arch, precision: SimpleNamespace(decode=decode))
    latents = codecs.make("vae", scale=0.5, bias=0.25, vae="of this test", rounding=rounding, chunk=3)
    wanted = np.array([-1.0, 64.3 / 127.5, 1.0])  # levels 0, 191.8 and 255
    x = jnp.asarray((wanted - 0.25) * 0.5, jnp.float32).reshape(1, 3, 1, 1)
    count = 6 * jax.device_count()
    images = latents.decode({}, jnp.tile(x, (count, 1, 1, 1)))
    np.testing.assert_array_equal(images[:, :, 0, 0], np.tile([0, level, 255], (count, 1)))
    assert seen == [(3 * jax.device_count(), 3, 1, 1)]


def test_conditions_go_through_the_codec_as_their_null_does():
    codec = codecs.make("pixels")._replace(condition=lambda frozen, y: frozen["table"][y])
    frozen = {"table": jnp.arange(8.0).reshape(4, 2)}
    batch = codecs.encoded(codec, frozen, {"x": jnp.zeros((2, 1, 1, 1)), "y": jnp.array([0, 2])}, jax.random.key(0))
    np.testing.assert_array_equal(batch["y"], [[0, 1], [4, 5]])
    np.testing.assert_array_equal(codecs.null_condition(codec, frozen, np.int32(3)), [6, 7])


def test_latents_have_no_decoder_and_a_positive_scale():
    assert codecs.make("vae").decode is None
    with pytest.raises(ConfigError, match=r"scale = 0\.0: must be more than 0"):
        codecs.make("vae", scale=0.0)


def test_a_codec_that_does_not_decode_to_bytes_is_refused():
    pixels = codecs.make("pixels")
    assert build.sample_shape(pixels, (4, 6, 1)) == (4, 6, 1)
    with pytest.raises(ConfigError, match=r"config.codec decodes samples to float32, wanted images of uint8"):
        build.sample_shape(pixels._replace(decode=lambda frozen, x: x), (4, 6, 1))
