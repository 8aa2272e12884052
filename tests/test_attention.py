"""Kernels of attention: which is taken, and that each equals the plain form, forward and backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import models, sharding
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import attention


@pytest.mark.parametrize(
    ("platform", "given", "dtype", "second_time", "tokens", "chosen"),
    [
        ("gpu", "auto", "bfloat16", False, 256, "cudnn"),
        ("gpu", "auto", "bfloat16", True, 256, "xla"),
        ("gpu", "auto", "float32", False, 256, "xla"),
        ("gpu", "xla", "float16", False, 256, "xla"),
        ("gpu", "cudnn", "float16", False, 257, "cudnn"),
        ("tpu", "auto", "bfloat16", False, 256, "xla"),
        ("tpu", "splash", "bfloat16", False, 256, "splash"),
        ("tpu", "splash", "float32", False, 1024, "splash"),
        ("gpu", "cudnn", "float16", True, 256, "model.second_time: MeanFlow differentiates in forward mode"),
        ("gpu", "cudnn", "float32", False, 256, "model.dtype is float32"),
        ("gpu", "splash", "bfloat16", False, 256, "the device is a gpu, not a TPU"),
        ("tpu", "cudnn", "bfloat16", False, 256, "the device is a tpu, not a GPU"),
        ("tpu", "splash", "bfloat16", True, 256, "model.second_time"),
        ("tpu", "splash", "bfloat16", False, 257, "the network has 257 tokens, not a multiple of 128"),
    ],
)
def test_the_choice(platform, given, dtype, second_time, tokens, chosen, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    if chosen in attention.KERNELS:
        assert attention.choose(given, dtype, second_time, tokens) == chosen
        return
    with pytest.raises(ConfigError, match=re.escape(f"model.attention = {given!r} is not possible: {chosen}")):
        attention.choose(given, dtype, second_time, tokens)


@pytest.mark.parametrize(("platform", "kernel"), [("gpu", "cudnn"), ("cpu", "xla")])
def test_the_network_takes_what_was_chosen(platform, kernel, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    found = []

    def record(q, k, v, implementation):
        found.append(implementation)
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    model = models.make("dit", (4, 4, 2), 3, depth=2, width=16, heads=2, dtype="bfloat16")
    x, t, y = jnp.zeros((2, 4, 4, 2)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), x, t, y)
    assert set(found) == {kernel}


def inputs(width: int, batch: int = 1):
    return [jax.random.normal(jax.random.key(i), (batch, 128, 2, width)) for i in range(4)]


@pytest.mark.parametrize("width", [64, 72])
def test_splash_equals_the_plain_form(width):
    """In float32, interpreted: outputs to 1e-6, gradients to 1e-5 of the largest."""
    *qkv, weights = inputs(width)

    def value_and_gradients(run):
        def loss(*qkv):
            out = run(*qkv)
            return jnp.vdot(out, weights), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)

    (_, found), gradients = value_and_gradients(lambda *qkv: attention.splash(*qkv, interpret=True))
    (_, wanted), wanted_gradients = value_and_gradients(lambda *qkv: attention.attend(*qkv, "xla"))
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_on_a_mesh_every_device_attends_to_its_examples_and_heads(monkeypatch):
    monkeypatch.setattr(attention, "splash", lambda q, k, v: attention.attend(q, k, v, "xla") + q.shape[0] + q.shape[2])
    *qkv, _ = inputs(8, batch=4)
    plain = attention.attend(*qkv, "xla")
    with jax.set_mesh(sharding.make(data=2, fsdp=2, tensor=2).mesh):
        found = jax.jit(lambda *qkv: attention.attend(*qkv, "splash"))(*qkv)
    np.testing.assert_allclose(found, plain + 1 + 1, atol=1e-6)
    np.testing.assert_allclose(attention.attend(*qkv, "splash"), plain + 4 + 2, atol=1e-6)


@pytest.mark.parametrize("kernel", ["splash"])
def test_the_kernel_lowers_for_tpus_with_its_gradient(kernel):
    """Pallas' rules for TPUs need no TPU, and no libtpu."""
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(72))
    step = jax.jit(jax.grad(lambda q: attention.attend(q, k, v, kernel).astype(jnp.float32).sum()))
    assert "tpu_custom_call" in step.trace(q).lower(lowering_platforms=("tpu",)).as_text()
