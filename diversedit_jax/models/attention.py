"""Attention by the kernel that a config chooses. All kernels are equal up to rounding.

`xla`:    plain matrix products and a float32 softmax, on every platform. Only it has a forward mode (MeanFlow).
`cudnn`:  NVIDIA's kernel.
`splash`: jax's Pallas kernel for TPUs. It does not write the [n n] scores to memory.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from diversedit_jax import sharding
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import one_of

KERNELS = ("xla", "cudnn", "splash")
ATTENDED = "attn"  # the name of attention's output, for rematerialisation
LANES = 128  # the number of tokens must be a multiple of it for splash
LARGEST = 512  # most tokens in a block of splash


def choose(attention: str, dtype: str, forward_mode: bool = False, tokens: int = LANES, width: int = 64) -> str:
    """One of KERNELS: `attention` itself; for `auto`, `cudnn` if it can run, else `xla`.

    forward_mode: the network is differentiated in forward mode (MeanFlow). width: of a head.
    The platform is that of the mesh that is set, else that of this process. Raises ConfigError for a kernel that cannot
    run.
    """
    one_of("model.attention", attention, ("auto", *KERNELS))
    platform = sharding.platform()
    forward = "the objective differentiates the network in forward mode, which this kernel cannot"
    obstacles = {
        "xla": {},
        "cudnn": {
            f"the device is a {platform}, not a GPU": platform not in ("gpu", "cuda", "rocm"),
            f"model.dtype is {dtype}, not bfloat16 or float16": dtype == "float32",
            f"a head is {width} wide, not a multiple of 8 up to 128": width % 8 != 0 or width > 128,
            # jax 0.10 always passes a bias, if an empty one. With a bias, cuDNN's gradient needs even numbers.
            f"the network has {tokens} tokens, an odd number": tokens % 2 != 0,
            forward: forward_mode,
        },
        "splash": {
            f"the device is a {platform}, not a TPU": platform != "tpu",
            f"the network has {tokens} tokens, not a multiple of {LANES}": tokens % LANES != 0,
            forward: forward_mode,
        },
    }
    if attention == "auto":
        return "xla" if any(obstacles["cudnn"].values()) else "cudnn"
    if found := [text for text, stands in obstacles[attention].items() if stands]:
        raise ConfigError(f"model.attention = {attention!r} is not possible: {'; '.join(found)}")
    return attention


def attend(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"], kernel: str
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for every head.

    Every residual that the backward pass needs is saved exactly once: by its name (ATTENDED) or by the policy `kept`.
    """
    if kernel == "xla":
        return checkpoint_name(plain(q, k, v), ATTENDED)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    mesh = jax.sharding.get_abstract_mesh()
    if not set(sharding.AXES) <= set(mesh.axis_names):
        return splash(q, k, v)
    heads = PartitionSpec(sharding.BATCH, None, "tensor", None)  # the compiler cannot divide a kernel by itself
    return jax.shard_map(splash, in_specs=(heads,) * 3, out_specs=heads, check_vma=False)(q, k, v)


def plain(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
) -> Float[Array, "b n h d"]:
    """`attend` by matrix products and a float32 softmax."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, v), 1, 2)


def kept(primitive, *_, **__) -> bool:
    """The policy of `jax.checkpoint` that saves the outputs of cuDNN's kernel: the values and the softmax's statistics.

    jax names neither of them, so without this policy the backward pass would run the kernel a second time. If jax ever
    renames the primitive, that happens again, and nothing else breaks.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


def splash(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"], interpret: bool = False
) -> Float[Array, "b n h d"]:
    """`attend` by splash attention. interpret: on any platform, slowly."""
    _, tokens, heads, width = q.shape
    kernel = _splash(tokens, heads, interpret)
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    out = jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    return jnp.swapaxes(out, 1, 2)


@cache
def _splash(tokens: int, heads: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention  # here, because it takes half a second to import

    block = next(size for size in range(min(LARGEST, tokens), 0, -LANES) if tokens % size == 0)
    sizes = splash_attention.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), block),
        **dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), block),
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((tokens, tokens))] * heads)
    with jax.ensure_compile_time_eval():  # the result is cached, so it must not belong to one trace
        return splash_attention.make_splash_mha(
            mask,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENDED,  # else the backward pass would run the kernel a second time
            interpret=interpret,
        )
