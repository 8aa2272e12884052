"""Codecs: pixels pass unchanged and decode to grey levels; latents are drawn with the stored moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import codecs
from diversedit_jax.errors import ConfigError


def test_pixels_pass_unchanged():
    pixels = codecs.make("pixels")
    x, y = jnp.linspace(-1, 1, 2 * 3 * 3).reshape(2, 3, 3, 1), jnp.array([3, 4])
    batch = pixels.encode(pixels.init(), {"x": x, "y": y}, jax.random.key(0))
    assert batch["x"] is x
    assert batch["y"] is y


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


def test_latents_have_no_decoder_and_a_positive_scale():
    assert codecs.make("vae").decode is None
    with pytest.raises(ConfigError, match=r"scale = 0\.0: must be more than 0"):
        codecs.make("vae", scale=0.0)
