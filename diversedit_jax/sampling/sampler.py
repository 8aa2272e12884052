"""From a trained network to images: labels in, images out, in batches of one compiled size."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import inf, prod
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from diversedit_jax import sharding
from diversedit_jax.api import Codec, Network, Params
from diversedit_jax.diffusion import ddpm_solvers, discrete, image_and_token, paths, solvers
from diversedit_jax.diffusion.guidance import Velocity, autoguide, guide, over_span
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.models import Model
from diversedit_jax.registry import suggestion

FLOW_SOLVERS = ("euler", "heun", "dopri5", "euler_maruyama", "sde_heun")
DDPM_SOLVERS = ("ddpm", "ddim")
SOLVERS = (*FLOW_SOLVERS, "mean_flow", *DDPM_SOLVERS)
LABELS = ("balanced", "uniform")  # rules for the labels of an evaluation

# (params, frozen, labels [n], seed) -> images [n h w c] on the host: uint8, or x itself in float32 without a decoder.
# With weak=params of a less trained state, `cfg_scale` is the scale of autoguidance by it. first=: the number of the
# first image, by default 0. cfg_scale=, guidance_interval=: in place of those the sampler was made with; the compiled
# program serves all their values. `sample.lower(params, frozen)` lowers the program of a full batch, as jax.jit does:
# for arrays that may be abstract, and the devices of the layout, which may be another machine's.
Sample = Callable[..., np.ndarray]

Item = TypeVar("Item")

# (guided, x, noise) -> x at the end; guided takes what converts a network for the solver, and gives its velocity
Solve = Callable[[Callable[[Callable[[Network], Network]], Velocity], Array, solvers.Noise], Array]


class Drawn(NamedTuple):
    """What the samples of a run are. shape: (h, w, c) of an image, None for latents. batch: drawn at a time.

    latents: the shape of what the network takes. config: that of the run, for evaluators that look at the network.
    """

    shape: tuple[int, int, int] | None
    num_classes: int
    batch: int
    latents: tuple[int, int, int]
    config: ConfigDict


class Flow(NamedTuple):
    """What a network of `objectives.flow_matching` was trained to predict."""

    path: str = "linear"
    prediction: str = "velocity"


class Diffusion(NamedTuple):
    """What a network of `objectives.ddpm` was trained on."""

    num_timesteps: int = 1000


class AverageVelocity(NamedTuple):
    """What a network of `objectives.mean_flow` was trained to predict: of a span of times on the linear path."""


# by kind: the solvers for it, and who trains it
TRAINED = {
    Flow: (FLOW_SOLVERS, "a flow"),
    Diffusion: (DDPM_SOLVERS, "objective ddpm"),
    AverageVelocity: (("mean_flow", *FLOW_SOLVERS), "objective mean_flow"),
}


def trained(objective: Mapping[str, Any]) -> Flow | Diffusion | AverageVelocity:
    """What to sample from, by the options of the objective.

    A discrete diffusion is known by its `num_timesteps`, an average velocity by `equal`, the portion of empty spans.
    """
    kind = Diffusion if "num_timesteps" in objective else AverageVelocity if "equal" in objective else Flow
    return kind(**{name: objective[name] for name in kind._fields if name in objective})


def known_labels(num_classes: int) -> Int[np.ndarray, " n"]:
    """All labels to sample; of data without classes the null label, 0, alone."""
    return np.arange(max(num_classes, 1), dtype=np.int32)


def labels_by(rule: str, num: int, num_classes: int, seed: int) -> Int[np.ndarray, " n"]:
    """`num` labels by a rule of LABELS: `balanced`, every class in turn; `uniform`, drawn at random from a seed.

    The first labels do not depend on `num`.
    """
    if rule not in LABELS:
        raise ConfigError(f"unknown rule of labels {rule!r}; {suggestion(rule, LABELS)}")
    known = known_labels(num_classes)
    if rule == "balanced":
        return np.resize(known, num)
    return np.random.Generator(np.random.Philox(seed)).integers(0, len(known), num).astype(np.int32)


def check_guidance(cfg_scale: float, num_classes: int) -> None:
    """Raise ConfigError for classifier-free guidance without classes."""
    if not num_classes and cfg_scale != 1:
        raise ConfigError(f"cfg_scale = {cfg_scale}: the data have no classes to guide to; it must be 1")


def evaluations(options: Mapping[str, Any]) -> int | None:
    """Evaluations of the velocity for one image by a sampler's options, guidance not counted; None: adaptive."""
    steps, solver = options["steps"], options["solver"]
    if solver == "dopri5":
        return None
    if solver == "sde_heun" and options["last_step_kind"] == "none":
        return 2 * steps
    return 2 * steps - 1 if solver in ("heun", "sde_heun") else steps


def make(
    model: Model,
    codec: Codec,
    shape: tuple[int, int, int],
    num_classes: int,
    source: Flow | Diffusion | AverageVelocity,
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
) -> Sample:
    """A function that samples and decodes, compiled at its first call; by default as the papers do without guidance.

    solver: for flows `euler` (1 evaluation a step), `heun` (2), `dopri5` (adaptive), and the stochastic
    `euler_maruyama` (1) and `sde_heun` (2); for objective ddpm `ddpm` (ancestral) and `ddim`; for objective mean_flow
    `mean_flow` (1 evaluation a step, 1 step as its authors sample) by its average velocity, and all those for flows by
    its velocity, the average over no time. The other options and the solvers that read them:

    steps: all; of `dopri5` the most that it may take.
    cfg_scale, guidance_interval, guidance_channels: all; see `guidance.guide`. In `ddpm` and `ddim` guidance changes
    the noise, never the variance, and its interval is of (step + 1) / num_timesteps. In `mean_flow` it changes the
    average velocity, beside the guidance that the objective has trained in.
    token_cfg_scale: flows; of a network that denoises a class token with the image (REG), the token's scale in the
    same interval; None: cfg_scale, <= 0: the token is not guided. Both take the same steps; only the image is returned.
    diffusion, diffusion_norm: stochastic; the coefficient's form and magnitude, see `samplers.DIFFUSIONS`.
    last_step_kind, last_step: stochastic; `mean`, `euler` or `tweedie` from time `last_step`, or `none`.
    rtol, atol: `dopri5`. eta: `ddim`; 0 is deterministic.

    Image i depends on the seed, on i and on its label alone: not on the batch size or the devices, rounding aside (and
    `dopri5` aside, which chooses its steps for a batch). Samples that are not finite are an error.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}; {suggestion(solver, SOLVERS)}")
    _check_values(cfg_scale, guidance_interval)
    width = model.token_width
    if token_cfg_scale is not None and (width is None or not abs(token_cfg_scale) < inf):
        wanted = "the network has no class token" if width is None else "must be finite"
        raise ConfigError(f"token_cfg_scale = {token_cfg_scale}: {wanted}")
    if guidance_channels is not None and not 1 <= guidance_channels <= shape[-1]:
        raise ConfigError(f"guidance_channels = {guidance_channels}: the samples have {shape[-1]} channels")
    if batch_size < 1:
        raise ConfigError(f"sampling batch_size = {batch_size}: must be positive")
    known, trainer = TRAINED[type(source)]
    if solver not in known:
        raise ConfigError(f"solver {solver!r} does not sample what {trainer} trained; one of: {', '.join(known)}")
    if isinstance(source, AverageVelocity) and solver != "mean_flow":
        model, source = _instantaneous(model), Flow()
    if isinstance(source, Diffusion):
        solve = _ddpm_solve(source, solver, steps, eta)
        guidance_channels = shape[-1] if guidance_channels is None else guidance_channels
    elif solver == "mean_flow":
        solve = _mean_solve(steps)
    elif solver in ("euler_maruyama", "sde_heun"):
        solve = _sde_solve(source, solver, steps, diffusion, diffusion_norm, last_step_kind, last_step)
    else:
        solve = _ode_solve(source, solver, steps, rtol, atol)
    state, guided_image = shape, guidance_channels
    if width is not None:  # to solver and guidance, an image and its token are one vector
        state, guidance_channels = (1, 1, prod(shape) + width), None

    def scales(cfg_scale: float) -> Array:
        if width is None:
            return jnp.float32(cfg_scale)
        token_scale = cfg_scale if token_cfg_scale is None else token_cfg_scale if token_cfg_scale > 0 else 1.0
        return jnp.asarray(image_and_token.scales(shape, width, cfg_scale, token_scale, guided_image))

    def network(params: Params) -> Network:
        bound = model.network(params)
        return bound if width is None else image_and_token.packed(bound, shape)

    @partial(jax.jit, out_shardings=sharding.replicated(layout))  # so that every process can read the result
    def run(
        params: Params, weak: Params | None, frozen: Any, y: Int[Array, " b"], keys: Array, scale, interval, before
    ):
        keys = jax.random.wrap_key_data(keys)
        start, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        x = jax.vmap(lambda key: jax.random.normal(key, state))(start)
        options = {"scale": scale, "interval": interval, "channels": guidance_channels}

        def guided(convert: Callable[[Network], Network]) -> Velocity:
            if weak is None:
                return guide(convert(network(params)), y, num_classes, **options)
            return autoguide(convert(network(params)), convert(network(weak)), y, **options)

        x = solve(guided, x, solvers.normal_per_image(path_keys, state))
        x = x if width is None else image_and_token.unpack(x, shape)[0]
        finite = before & jnp.isfinite(x).all()
        return x if codec.decode is None else codec.decode(frozen, x), finite

    def sample(
        params: Params,
        frozen: Any,
        labels: Int[np.ndarray, " n"],
        seed: int,
        weak: Params | None = None,
        *,
        first: int = 0,
        cfg_scale: float = cfg_scale,
        guidance_interval: tuple[float, float] = guidance_interval,
    ) -> np.ndarray:
        _check_values(cfg_scale, guidance_interval)
        if weak is None:
            check_guidance(cfg_scale, num_classes)
        numbers = jnp.arange(first, first + len(labels))
        keys = np.asarray(jax.random.key_data(jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers)))
        size = sharding.filled(min(batch_size, len(labels)), layout.mesh.size)
        guidance = scales(cfg_scale), tuple(jnp.float32(time) for time in guidance_interval)

        def batches() -> Iterator[tuple[int, Array, Array]]:
            finite = sharding.put(np.bool_(True), sharding.replicated(layout))
            for begin in range(0, len(labels), size):
                index = np.minimum(np.arange(begin, begin + size), len(labels) - 1)  # the last batch is filled up
                y, k = sharding.put((np.asarray(labels, np.int32)[index], keys[index]), sharding.over_batch(layout))
                with jax.set_mesh(layout.mesh):  # `finite` of the batch before, so that no two run at a time
                    images, finite = run(params, weak, frozen, y, k, *guidance, finite)
                yield begin, images, finite

        done = []
        for begin, images, finite in one_ahead(batches()):
            if not finite:
                raise NonFiniteError(f"samples {first + begin} to {first + begin + size - 1} are not finite")
            done.append(jax.device_get(images))
        return np.concatenate(done)[: len(labels)]

    def lower(params: Params, frozen: Any) -> jax.stages.Lowered:
        size = sharding.filled(batch_size, layout.mesh.size)
        keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), size)))
        inputs = (jax.ShapeDtypeStruct((size,), np.int32), keys)
        inputs = sharding.placed(inputs, (sharding.over_batch(layout),) * 2)
        before = jax.ShapeDtypeStruct((), np.bool_, sharding=sharding.replicated(layout))
        guidance = jax.eval_shape(lambda: (scales(cfg_scale), (jnp.float32(0), jnp.float32(1))))
        with jax.set_mesh(layout.mesh):
            return run.lower(params, None, frozen, *inputs, *guidance, before)

    sample.lower = lower
    return sample


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each when the next one has been made: what devices still compute is not waited for in between."""
    last = next(items)
    for item in items:
        yield last
        last = item
    yield last


def _check_values(cfg_scale: float, interval: tuple[float, float]) -> None:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance_interval = {low}, {high}: must be two times with 0 <= lo <= hi <= 1")
    if not 0 <= cfg_scale < inf:
        raise ConfigError(f"cfg_scale = {cfg_scale}: must be finite and not negative")


def _instantaneous(model: Model) -> Model:
    """A model of average velocities as one of velocities: their average over no time."""
    return Model(model.init, lambda params, *inputs: over_span(model.network(params), 0.0)(*inputs))


def _ode_solve(source: Flow, solver: str, steps: int, rtol: float, atol: float) -> Solve:
    path = paths.make(source.path)
    paths.check_prediction(source.prediction)
    last, first = paths.sampling_times(*source)
    times = solvers.uniform_times(steps, first, last)
    if not (rtol > 0 and atol > 0):
        raise ConfigError(f"rtol = {rtol}, atol = {atol}: must be positive")

    def solve(guided, x, noise):
        velocity = guided(lambda network: paths.as_velocity(network, path, source.prediction))
        if solver == "dopri5":
            return solvers.dopri5(velocity, x, first, last, rtol=rtol, atol=atol, max_steps=steps)
        return getattr(solvers, solver)(velocity, x, times)

    return solve


def _sde_solve(
    source: Flow, solver: str, steps: int, form: str, norm: float, last_kind: str, last_step: float
) -> Solve:
    path = paths.make(source.path)
    paths.check_prediction(source.prediction)
    w = solvers.diffusion(form, path, norm)
    times = solvers.sde_times(steps, *source, form, last_kind, last_step)
    if not 0 <= norm < inf:
        raise ConfigError(f"diffusion_norm = {norm}: must be finite and not negative")

    def solve(guided, x, noise):
        velocity = guided(lambda network: paths.as_velocity(network, path, source.prediction))
        return getattr(solvers, solver)(velocity, x, times, noise, path, w, last_kind)

    return solve


def _mean_solve(steps: int) -> Solve:
    times = solvers.uniform_times(steps)

    def solve(guided, x, noise):
        def average(x, t, span):
            return guided(lambda network: over_span(network, span))(x, t, t)

        return solvers.mean_flow(average, x, times)

    return solve


def _ddpm_solve(source: Diffusion, solver: str, steps: int, eta: float) -> Solve:
    if steps < 2:
        raise ConfigError(f"steps = {steps}: a discrete diffusion is sampled in at least 2")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta = {eta}: must be from 0 (deterministic) to 1")
    whole = discrete.linear(source.num_timesteps)
    schedule = discrete.respace(whole, discrete.spaced(source.num_timesteps, [steps]))

    def solve(guided, x, noise):
        predict = guided(lambda network: network)
        if solver == "ddim":
            return ddpm_solvers.ddim(predict, x, schedule, noise, eta)
        return ddpm_solvers.ddpm(predict, x, schedule, noise)

    return solve
