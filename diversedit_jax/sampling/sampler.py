"""From a trained network to samples: conditions in, images out, in batches of one compiled size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diversedit_jax import sharding
from diversedit_jax.api import Codec, Condition, Conditions, Model, Network, Objective, Params, Space
from diversedit_jax.codecs import null_condition
from diversedit_jax.conditioning import check_guidance
from diversedit_jax.diffusion import image_and_token, solve
from diversedit_jax.diffusion.guidance import Velocity, guide
from diversedit_jax.diffusion.predictions import Diffusion
from diversedit_jax.diffusion.solvers import normal_per_image
from diversedit_jax.diffusion.times import check_interval
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.registry import MANY, UINT32, in_range

FINITE, INFINITE, NAN = range(3)  # what samples hold, the worst last


@dataclass(frozen=True)
class Sampler:
    """Draws samples. The first call compiles its program, which then serves every scale and interval of guidance.

    Sample i depends only on the seed, on i and on its condition, up to rounding. The batch size and the devices change
    nothing, except for `dopri5`, which chooses its steps for a whole batch.
    """

    run: Callable[..., tuple[Array, Array]]  # the compiled program of a batch
    scales: Callable[[float], Array]
    conditions: Conditions
    learns_null: bool  # see `Objective`
    layout: sharding.Layout
    batch_size: int
    cfg_scale: float
    guidance_interval: tuple[float, float]
    limit: str = ""  # the error for samples that the solver leaves infinite; "": they are as bad as NaN

    def __call__(
        self,
        params: Params,
        frozen: Any,
        conditions: Condition,
        seed: int,
        weak: Params | None = None,
        *,
        negative: Condition | None = None,
        first: int = 0,
        cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Samples [n ...] on the host: uint8 images, or float32 without a decoder.

        NonFiniteError if they are not finite, ConfigError if `dopri5` needs more steps.

        conditions: as stored, [n ...].
        weak: parameters of a less trained state. It guides the samples (autoguidance), with the scale `cfg_scale`.
        negative: the stored condition of one example, to guide away from. None: the null condition.
        first: the number of the first sample.
        cfg_scale, guidance_interval: None: those of the sampler.
        between: is called after every batch; what it raises ends the sampling.
        """
        in_range("seed", seed, 0, UINT32)
        scale = self.cfg_scale if cfg_scale is None else cfg_scale
        interval = self.guidance_interval if guidance_interval is None else guidance_interval
        check_interval("guidance_interval", interval)
        if weak is None:
            check_guidance(scale, self.conditions, self.learns_null)
        else:
            in_range("cfg_scale", scale, 0)
        if negative is not None and scale == 1:
            raise ConfigError("a negative condition has no effect while cfg_scale is 1: give a larger one")
        count = len(jax.tree.leaves(conditions)[0])
        numbers = jnp.arange(first, first + count)
        keys = np.asarray(jax.random.key_data(jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers)))
        size = sharding.filled(min(self.batch_size, count), self.layout.mesh.size)
        guidance = self.scales(scale), tuple(jnp.float32(time) for time in interval)
        null = self.conditions.null if negative is None else negative
        null = sharding.put(null, sharding.replicated(self.layout))

        def batches() -> Iterator[tuple[int, Array, Array]]:
            fault = sharding.put(np.int32(FINITE), sharding.replicated(self.layout))
            for begin in range(0, count, size):
                index = np.minimum(np.arange(begin, begin + size), count - 1)  # the last batch is filled up
                rows = jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], (conditions, keys))
                y, k = sharding.put(rows, sharding.over_batch(self.layout))
                with jax.set_mesh(self.layout.mesh):  # reading the last `fault` keeps two batches from running at once
                    images, fault = self.run(params, weak, frozen, y, null, k, *guidance, fault)
                yield begin, images, fault

        done = []
        for begin, images, fault in one_late(batches()):
            if fault == INFINITE and self.limit:
                raise ConfigError(self.limit)
            if fault != FINITE:
                raise NonFiniteError(f"samples {first + begin} to {first + begin + size - 1} are not finite")
            done.append(jax.device_get(images))
            between()
        return np.concatenate(done)[:count]

    def lower(self, params: Params, frozen: Any) -> jax.stages.Lowered:
        """The program of a full batch, lowered as by jax.jit. `params` and `frozen` may be abstract."""
        size = sharding.filled(self.batch_size, self.layout.mesh.size)
        where = sharding.over_batch(self.layout)

        def rows(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *np.shape(leaf)), np.asarray(leaf).dtype, sharding=where)

        def alone(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                np.shape(leaf), np.asarray(leaf).dtype, sharding=sharding.replicated(self.layout)
            )

        y, keys = jax.tree.map(rows, (self.conditions.null, jax.random.key_data(jax.random.key(0))))
        guidance = jax.eval_shape(lambda: (self.scales(self.cfg_scale), (jnp.float32(0), jnp.float32(1))))
        null, before = jax.tree.map(alone, (self.conditions.null, np.int32(FINITE)))
        with jax.set_mesh(self.layout.mesh):
            return self.run.lower(params, None, frozen, y, null, keys, *guidance, before)


class State(NamedTuple):
    """The state of solver and guidance: x, or x and its class token packed into one vector.

    shape:    of one example.
    channels: guide only the first channels, so many. None: all.
    scales:   cfg_scale -> the guidance scale, one for all or one per element.
    network:  the network of x (and token) -> the network of this state.
    x:        states -> x.
    """

    shape: tuple[int, ...]
    channels: int | None
    scales: Callable[[float], Array]
    network: Callable[[Network], Network]
    x: Callable[[Array], Array]


def state_of(predicts: Any, shape: tuple[int, ...], channels: int | None, token_cfg_scale: float | None) -> State:
    """The state for what a network predicts. shape: of x. channels, token_cfg_scale: options of `make`."""
    width = getattr(predicts, "token", None)
    if token_cfg_scale is not None and width is None:
        raise ConfigError(f"token_cfg_scale = {token_cfg_scale}: the network has no class token")
    in_range("token_cfg_scale", token_cfg_scale or 0)
    if width is None:
        channels = shape[-1] if isinstance(predicts, Diffusion) and channels is None else channels
        return State(shape, channels, jnp.float32, lambda network: network, lambda x: x)

    def scales(cfg_scale: float) -> Array:
        token_scale = cfg_scale if token_cfg_scale is None else token_cfg_scale if token_cfg_scale > 0 else 1.0
        return jnp.asarray(image_and_token.scales(shape, width, cfg_scale, token_scale, channels))

    packed = partial(image_and_token.packed, shape=shape)
    return State((prod(shape) + width,), None, scales, packed, lambda x: image_and_token.unpack(x, shape)[0])


def make(
    model: Model,
    codec: Codec,
    space: Space,
    objective: Objective,
    layout: sharding.Layout,
    *,
    solver: str = "euler_maruyama",
    steps: int = 250,
    cfg_scale: float = 1.0,
    token_cfg_scale: float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    diffusion: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step_kind: str = "mean",
    last_step: float = 0.04,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    eta: float = 0.0,
    batch_size: int = 256,
) -> Sampler:
    """A sampler for a network that an objective has trained. The defaults are the papers', without guidance.

    space: of stored examples.
    solver: one of `diffusion.solve.NAMES`.
    steps, diffusion, diffusion_norm, last_step_kind, last_step, rtol, atol, eta: see `diffusion.solve.Options`.
    cfg_scale: scale of classifier-free guidance. 1: none.
    guidance_interval: guide while t is in it; t = 1 is noise.
    guidance_channels: guide only so many channels, the first (DiT and SiT: 3 of 4). None: all.
    token_cfg_scale: guidance scale of the class token, for networks that denoise one with x. None: cfg_scale. 0 or
        less: do not guide the token. The samples do not hold the token.
    batch_size: samples at a time, over all devices.
    """
    given = solve.Options(steps, diffusion, diffusion_norm, last_step_kind, last_step, rtol, atol, eta)
    solution = solve.make(solver, objective.predicts, given)
    interval = check_interval("guidance_interval", guidance_interval)
    in_range("cfg_scale", cfg_scale, 0)
    in_range("batch_size", batch_size, 1, MANY)
    shape = codec.shape(space.shape)
    if guidance_channels is not None:
        in_range("guidance_channels", guidance_channels, 1, shape[-1])
    state = state_of(objective.predicts, shape, guidance_channels, token_cfg_scale)

    @partial(jax.jit, out_shardings=sharding.replicated(layout))  # every process can read the result
    def run(params: Params, weak: Params | None, frozen, y: Condition, null: Condition, keys, scale, interval, before):
        start, path_keys = jax.vmap(jax.random.split, out_axes=1)(jax.random.wrap_key_data(keys))
        x = jax.vmap(lambda key: jax.random.normal(key, state.shape))(start)
        y, null = codec.condition(frozen, y), null_condition(codec, frozen, null)
        options = {"scale": scale, "interval": interval, "channels": state.channels}

        def guided(convert: solve.Convert) -> Velocity:
            network = convert(state.network(model.network(params)))
            weak_network = None if weak is None else convert(state.network(model.network(weak)))
            return guide(network, y, null, weak=weak_network, **options)

        x = state.x(solution(guided, x, normal_per_image(path_keys, state.shape)))
        fault = jnp.where(jnp.isnan(x).any(), NAN, jnp.where(jnp.isinf(x).any(), INFINITE, FINITE))
        return x if codec.decode is None else codec.decode(frozen, x), jnp.maximum(before, fault)

    limit = f"solver = 'dopri5' did not reach the end in steps = {steps}: give more steps, or larger rtol and atol"
    return Sampler(
        run,
        state.scales,
        space.conditions,
        objective.learns_null,
        layout,
        batch_size,
        cfg_scale,
        interval,
        limit if solver == "dopri5" else "",
    )


def one_late(items: Iterator[Any]) -> Iterator[Any]:
    """Yield items one step late, so that the host never waits for the batch that it has just dispatched."""
    last = next(items)
    for item in items:
        yield last
        last = item
    yield last
