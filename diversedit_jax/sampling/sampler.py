"""From a trained network to samples: conditions in, images out, in batches of one compiled size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diversedit_jax import sharding
from diversedit_jax.api import Codec, Condition, Conditions, Model, Network, Params, Space
from diversedit_jax.codecs import null_condition
from diversedit_jax.conditioning import check_guidance
from diversedit_jax.diffusion import image_and_token, solve
from diversedit_jax.diffusion.guidance import Velocity, autoguide, guide
from diversedit_jax.diffusion.predictions import Diffusion
from diversedit_jax.diffusion.solvers import normal_per_image
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.registry import in_range

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sampler:
    """Draws samples. Its program is compiled at the first call, and serves every scale and interval of guidance.

    sampler(params, frozen, conditions, seed) -> samples [n ...] on the host: uint8 images; float32 without a decoder.

    Sample i depends on the seed, on i and on its condition alone, not on the batch size or the devices, except for
    rounding (and for `dopri5`, which chooses its steps for a batch).
    """

    run: Callable[..., tuple[Array, Array]]  # the compiled program of a batch
    scales: Callable[[float], Array]
    conditions: Conditions
    layout: sharding.Layout
    batch_size: int
    cfg_scale: float
    guidance_interval: tuple[float, float]

    def __call__(
        self,
        params: Params,
        frozen: Any,
        conditions: Condition,
        seed: int,
        weak: Params | None = None,
        *,
        first: int = 0,
        cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """The samples of these stored conditions [n ...]. NonFiniteError if one of them is not finite.

        weak: parameters of a less trained state; `cfg_scale` is then the scale of autoguidance by it.
        first: the number of the first sample. cfg_scale, guidance_interval: instead of the sampler's own.
        """
        scale = self.cfg_scale if cfg_scale is None else cfg_scale
        interval = self.guidance_interval if guidance_interval is None else guidance_interval
        _check_interval(interval)
        check_guidance(scale, self.conditions if weak is None else Conditions(None))
        count = len(jax.tree.leaves(conditions)[0])
        numbers = jnp.arange(first, first + count)
        keys = np.asarray(jax.random.key_data(jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers)))
        size = sharding.filled(min(self.batch_size, count), self.layout.mesh.size)
        guidance = self.scales(scale), tuple(jnp.float32(time) for time in interval)

        def batches() -> Iterator[tuple[int, Array, Array]]:
            finite = sharding.put(np.bool_(True), sharding.replicated(self.layout))
            for begin in range(0, count, size):
                index = np.minimum(np.arange(begin, begin + size), count - 1)  # the last batch is filled up
                rows = jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], (conditions, keys))
                y, k = sharding.put(rows, sharding.over_batch(self.layout))
                with jax.set_mesh(self.layout.mesh):  # `finite` of the batch before, so that no two run at a time
                    images, finite = self.run(params, weak, frozen, y, k, *guidance, finite)
                yield begin, images, finite

        done = []
        for begin, images, finite in one_late(batches()):
            if not finite:
                raise NonFiniteError(f"samples {first + begin} to {first + begin + size - 1} are not finite")
            done.append(jax.device_get(images))
        return np.concatenate(done)[:count]

    def lower(self, params: Params, frozen: Any) -> jax.stages.Lowered:
        """The program of a full batch, lowered as jax.jit does; its arrays may be abstract."""
        size = sharding.filled(self.batch_size, self.layout.mesh.size)
        keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), size)))
        y = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *np.shape(leaf)), np.asarray(leaf).dtype), self.conditions.null
        )
        where = sharding.over_batch(self.layout)
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (y, keys))
        before = jax.ShapeDtypeStruct((), np.bool_, sharding=sharding.replicated(self.layout))
        guidance = jax.eval_shape(lambda: (self.scales(self.cfg_scale), (jnp.float32(0), jnp.float32(1))))
        with jax.set_mesh(self.layout.mesh):
            return self.run.lower(params, None, frozen, *inputs, *guidance, before)


def make(
    model: Model,
    codec: Codec,
    space: Space,
    predicts: Any,
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
    """A sampler of what a network predicts (`Objective.predicts`), by default as the papers sample without guidance.

    space: of stored examples. solver: for flows `euler` (1 evaluation a step), `heun` (2), `dopri5` (adaptive), and the
    stochastic `euler_maruyama` (1) and `sde_heun` (2); for a discrete diffusion `ddpm` (ancestral) and `ddim`; for an
    average velocity `mean_flow` (1 evaluation a step, 1 step as its authors sample), and all those for flows by its
    velocity, the average over no time. The other options, and the solvers that read them:

    steps: all; of `dopri5` the most that it may take.
    cfg_scale, guidance_interval, guidance_channels: all; see `guidance.guide`. In `ddpm` and `ddim` guidance changes
        the noise, never the variance, and its interval is one of (step + 1) / num_timesteps. In `mean_flow` it changes
        the average velocity, in addition to the guidance that the objective has trained in.
    token_cfg_scale: flows that denoise a class token with x; the token's scale in the same interval. None: cfg_scale;
        0 or less: the token is not guided. Both take the same steps; the token is not returned.
    diffusion, diffusion_norm: stochastic; form and magnitude of the coefficient, see `solvers.DIFFUSIONS`.
    last_step_kind, last_step: stochastic; `mean`, `euler` or `tweedie` from time `last_step`, or `none`.
    rtol, atol: `dopri5`. eta: `ddim`; 0 is deterministic.
    batch_size: samples at a time, over all devices.
    """
    given = solve.Options(steps, diffusion, diffusion_norm, last_step_kind, last_step, rtol, atol, eta)
    solution = solve.make(solver, predicts, given)
    shape = codec.shape(space.shape)
    _check_interval(guidance_interval)
    in_range("batch_size", batch_size, 1)
    if guidance_channels is not None:
        in_range("guidance_channels", guidance_channels, 1, shape[-1])
    width = getattr(predicts, "token", None)
    if token_cfg_scale is not None:
        in_range("token_cfg_scale", token_cfg_scale)
        if width is None:
            raise ConfigError(f"token_cfg_scale = {token_cfg_scale}: the network has no class token")
    channels = shape[-1] if isinstance(predicts, Diffusion) and guidance_channels is None else guidance_channels

    def scales(cfg_scale: float) -> Array:
        if width is None:
            return jnp.float32(cfg_scale)
        token_scale = cfg_scale if token_cfg_scale is None else token_cfg_scale if token_cfg_scale > 0 else 1.0
        return jnp.asarray(image_and_token.scales(shape, width, cfg_scale, token_scale, guidance_channels))

    def network(params: Params) -> Network:
        bound = model.network(params)
        return bound if width is None else image_and_token.packed(bound, shape)

    # To solver and guidance, x and its class token are one vector, whose guidance has a scale for each number.
    state, channels = (shape, channels) if width is None else ((prod(shape) + width,), None)

    @partial(jax.jit, out_shardings=sharding.replicated(layout))  # so that every process can read the result
    def run(params: Params, weak: Params | None, frozen: Any, y: Condition, keys: Array, scale, interval, before):
        start, path_keys = jax.vmap(jax.random.split, out_axes=1)(jax.random.wrap_key_data(keys))
        x = jax.vmap(lambda key: jax.random.normal(key, state))(start)
        y = codec.condition(frozen, y)
        options = {"scale": scale, "interval": interval, "channels": channels}

        def guided(convert: solve.Convert) -> Velocity:
            if weak is not None:
                return autoguide(convert(network(params)), convert(network(weak)), y, **options)
            null = null_condition(codec, frozen, space.conditions.null)
            return guide(convert(network(params)), y, null, **options)

        x = solution(guided, x, normal_per_image(path_keys, state))
        x = x if width is None else image_and_token.unpack(x, shape)[0]
        finite = before & jnp.isfinite(x).all()
        return x if codec.decode is None else codec.decode(frozen, x), finite

    return Sampler(run, scales, space.conditions, layout, batch_size, cfg_scale, tuple(guidance_interval))


def _check_interval(interval: tuple[float, float]) -> None:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance_interval = {low}, {high}: must be two times with 0 <= lo <= hi <= 1")


def one_late(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items one step late, so that the host never waits for the batch that it has just dispatched."""
    last = next(items)
    for item in items:
        yield last
        last = item
    yield last
