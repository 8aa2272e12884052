"""Kernels of attention: which is taken, and that each equals the plain form, forward and backward."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import models, sharding
from diversedit_jax.api import Conditions, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import attention
from tests.jaxprs import equations


@pytest.mark.parametrize(
    ("platform", "given", "dtype", "forward_mode", "tokens", "chosen"),
    [
        ("gpu", "auto", "bfloat16", False, 256, "cudnn"),
        ("gpu", "auto", "bfloat16", True, 256, "xla"),
        ("gpu", "auto", "float32", False, 256, "xla"),
        ("gpu", "xla", "float16", False, 256, "xla"),
        ("gpu", "auto", "bfloat16", False, 257, "xla"),
        ("gpu", "cudnn", "float16", False, 258, "cudnn"),
        ("tpu", "auto", "bfloat16", False, 256, "xla"),
        ("tpu", "splash", "bfloat16", False, 256, "splash"),
        ("tpu", "splash", "float32", False, 1024, "splash"),
        ("gpu", "cudnn", "float16", True, 256, "the objective differentiates the network in forward mode"),
        ("gpu", "cudnn", "float32", False, 256, "model.dtype is float32"),
        ("gpu", "cudnn", "float16", False, 257, "the network has 257 tokens, an odd number"),
        ("gpu", "splash", "bfloat16", False, 256, "the device is a gpu, not a TPU"),
        ("tpu", "cudnn", "bfloat16", False, 256, "the device is a tpu, not a GPU"),
        ("tpu", "splash", "bfloat16", True, 256, "the objective differentiates the network in forward mode"),
        ("tpu", "splash", "bfloat16", False, 257, "the network has 257 tokens, not a multiple of 128"),
    ],
)
def test_the_choice(platform, given, dtype, forward_mode, tokens, chosen, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    if chosen in attention.KERNELS:
        assert attention.choose(given, dtype, forward_mode, tokens) == chosen
        return
    with pytest.raises(ConfigError, match=re.escape(f"model.attention = {given!r} is not possible: {chosen}")):
        attention.choose(given, dtype, forward_mode, tokens)


@pytest.mark.parametrize(("width", "chosen"), [(64, "cudnn"), (72, "cudnn"), (128, "cudnn"), (60, "xla"), (136, "xla")])
def test_the_choice_by_the_width_of_a_head(width, chosen, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert attention.choose("auto", "bfloat16", width=width) == chosen
    if chosen == "xla":
        with pytest.raises(ConfigError, match=f"a head is {width} wide, not a multiple of 8 up to 128"):
            attention.choose("cudnn", "bfloat16", width=width)


@pytest.mark.parametrize(("platform", "kernel"), [("gpu", "cudnn"), ("cpu", "xla")])
def test_the_network_takes_what_was_chosen(platform, kernel, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    found = []

    def record(q, k, v, implementation="xla"):
        found.append(implementation)
        return v

    monkeypatch.setattr(attention, "plain", record)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    model = models.make("dit", Space((4, 4, 2), Conditions.labels(3)), depth=2, width=16, heads=2, dtype="bfloat16")
    x, t, y = jnp.zeros((2, 4, 4, 2)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), x, t, y)
    assert set(found) == {kernel}


@pytest.mark.parametrize(("remat", "forward"), [("named", 1), ("full", 2), ("none", 1)])
def test_the_backward_pass_runs_the_forward_kernel_of_cudnn_again_only_if_asked_to(remat, forward, monkeypatch):
    """In the gradient as traced: no GPU is needed. `named` keeps the output once, beside the softmax's statistics."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    size = {"depth": 6, "width": 48, "heads": 2, "mlp_ratio": 3.0}
    model = models.make("dit", Space((8, 8, 2), Conditions.labels(3)), dtype="bfloat16", remat=remat, **size)
    x, t, y = jnp.zeros((5, 8, 8, 2)), jnp.zeros(5), jnp.zeros(5, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    gradient = jax.make_jaxpr(jax.grad(lambda params: model.apply(params, x, t, y)[0].sum()))(params)
    scans = [eqn for eqn in gradient.eqns if eqn.primitive.name == "scan"]
    kernels = [eqn.primitive.name for eqn in equations(gradient.jaxpr) if "dot_product" in eqn.primitive.name]
    assert sum("fwd" in name for name in kernels) == forward * 2, kernels  # two scans
    assert sum("bwd" in name for name in kernels) == 2, kernels
    if remat == "named":
        kept = [(v.aval.shape, str(v.aval.dtype)) for v in scans[0].outvars]
        assert kept.count(((3, 5, 2, 16), "float32")) == 1, kept
        assert kept.count(((3, 5, 16, 2, 24), "bfloat16")) == 1, kept


def inputs(width: int, batch: int = 1):
    return [jax.random.normal(jax.random.key(i), (batch, 128, 2, width)) for i in range(4)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_the_plain_form_equals_that_of_jax(dtype, tolerance):
    """And a softmax in float32, whatever the dtype; forward mode too, which MeanFlow needs."""
    *qkv, tangent = (x.astype(dtype) for x in inputs(72, batch=2))
    theirs = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    for ours, wanted in zip(
        *(jax.jvp(lambda q, f=f: f(q, *qkv[1:]), (qkv[0],), (tangent,)) for f in (attention.plain, theirs)), strict=True
    ):
        assert ours.dtype == dtype
        ours, wanted = (x.astype(jnp.float32) for x in (ours, wanted))
        np.testing.assert_allclose(ours, wanted, atol=tolerance * float(jnp.abs(wanted).max()))
    jaxpr = jax.make_jaxpr(attention.plain)(*qkv)
    assert {str(e.outvars[0].aval.dtype) for e in equations(jaxpr) if e.primitive.name == "exp"} == {"float32"}


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
