"""Solvers from noise (t = 1) to data (t = 0): functions over a velocity, the whole loop inside one `lax.scan`.

They give the numbers of the published samplers of REPA, DiverseDiT and SiT: `tests/diffusion/test_solvers.py` and
`tests/models/test_golden_official.py` compare them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax.diffusion import paths
from diversedit_jax.diffusion.guidance import Velocity
from diversedit_jax.diffusion.paths import PATHS, Path
from diversedit_jax.registry import in_range, one_of

Noise = Callable[[Array], Array]  # step index -> standard normal [b *s c]


def uniform_times(steps: int, first: float = 1.0, last: float = 0.0) -> np.ndarray:
    """steps + 1 equidistant times from `first` to `last`."""
    return np.linspace(first, last, in_range("steps", steps, 1) + 1)


def last_step_times(steps: int, last: float = 0.04, first: float = 1.0) -> np.ndarray:
    """`steps` equidistant times from `first` to `last`, then 0: the grid of REPA's and SiT's SDE samplers."""
    in_range("last_step", last, above=0, below=1)
    return np.append(np.linspace(first, last, in_range("steps", steps, 2)), 0.0)


def sde_times(steps: int, path: Path, prediction: str, diffusion: str, last: str, last_step: float) -> np.ndarray:
    """SiT's times for `steps` steps of a stochastic solver, with a last step of kind `last` from time `last_step`.

    They stay 1e-3 away from t = 1 where the form `sbdm` is infinite there, and, without a last step, from t = 0, where
    the score is infinite. SiT counts one step less for `none`.
    """
    one_of("last_step_kind", last, LAST_STEPS)
    end, first = paths.sampling_times(path, prediction)
    if diffusion == "sbdm" and path.alpha(np.float32(1)) < 1e-6:  # it divides by alpha
        first = min(first, 1 - 1e-3)
    if last == "none":
        return uniform_times(steps, first, max(end, 1e-3))
    return last_step_times(steps, last_step, first)


def euler(velocity: Velocity, x: Float[Array, "b *s c"], times: Float[np.ndarray, " s"]) -> Float[Array, "b *s c"]:
    """Euler's method along decreasing times: first order, one evaluation a step."""

    def step(x, span):
        t, t_next = span
        return x + (t_next - t) * velocity(x, t, t), None

    return jax.lax.scan(step, x, _spans(times, x))[0]


def heun(velocity: Velocity, x: Float[Array, "b *s c"], times: Float[np.ndarray, " s"]) -> Float[Array, "b *s c"]:
    """Heun's method: second order, two evaluations a step and one in the last, an Euler step (as in EDM and REPA)."""

    def step(x, span):
        t, t_next = span
        v = velocity(x, t, t)
        v_next = velocity(x + (t_next - t) * v, t_next, t)
        return x + (t_next - t) * (v + v_next) / 2, None

    x, _ = jax.lax.scan(step, x, _spans(times[:-1], x))
    return euler(velocity, x, times[-2:])


def mean_flow(
    average: Callable[[Array, Array, Array], Array], x: Float[Array, "b *s c"], times: Float[np.ndarray, " s"]
) -> Float[Array, "b *s c"]:
    """MeanFlow's sampler along decreasing times: x_r = x_t - (t - r) u (arXiv 2505.13447), one evaluation a step.

    average: (x, t, span) -> u, the average velocity between t - span and t. With the true u it is exact in any steps.
    """

    def step(x, span):
        t, r = span
        return x - (t - r) * average(x, t, t - r), None

    return jax.lax.scan(step, x, _spans(times, x))[0]


def dopri5(
    velocity: Velocity,
    x: Float[Array, "b *s c"],
    first: float = 1.0,
    last: float = 0.0,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_steps: int = 1000,
) -> Float[Array, "b *s c"]:
    """Dormand and Prince's fifth-order method with steps to a tolerance, SiT's default, through diffrax.

    The steps are chosen for the batch as a whole, by the error's root mean square. A guidance interval is tested at the
    time of each evaluation. NaN if `max_steps` steps, the rejected ones included, do not reach `last`.
    """
    import diffrax  # for this solver only

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, args: velocity(x, t, t)),
        diffrax.Dopri5(),
        t0=jnp.asarray(first, x.dtype),
        t1=jnp.asarray(last, x.dtype),
        dt0=None,
        y0=x,
        # A step over most of the interval has passed the error's estimate with 40 times the tolerance.
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, dtmax=(first - last) / 4),
        max_steps=max_steps,
        throw=False,
    )
    return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[-1], jnp.nan)


# The diffusion coefficients of SiT, as its code has them: (path, t, norm) -> D, the noise of the SDE being sqrt(2 D).
DIFFUSIONS = {
    "constant": lambda path, t, norm: norm * jnp.ones_like(t),
    # the reverse of the forward diffusion that has the path's marginals (Song et al., arXiv 2011.13456)
    "sbdm": lambda path, t, norm: norm * path.sigma(t) * paths.wronskian(path, t) / path.alpha(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * t,
    "decreasing": lambda path, t, norm: 0.25 * (1 - norm * jnp.cos(jnp.pi * t)) ** 2,
    "increasing_decreasing": lambda path, t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
}


def diffusion(name: str, path: Path, norm: float = 1.0) -> Callable[[Array], Array]:
    """w(t) = 2 D(t) for `euler_maruyama` and `sde_heun`: the form `name` of DIFFUSIONS, of magnitude `norm`."""
    form = DIFFUSIONS[one_of("diffusion", name, DIFFUSIONS)]
    return lambda t: 2 * form(path, t, norm)


LAST_STEPS = ("none", "mean", "tweedie", "euler")


def euler_maruyama(
    velocity: Velocity,
    x: Float[Array, "b *s c"],
    times: Float[np.ndarray, " s"],
    noise: Noise,
    path: Path = PATHS["linear"],
    diffusion: Callable[[Array], Array] | None = None,
    last: str = "mean",
) -> Float[Array, "b *s c"]:
    """Euler-Maruyama for dx = (v - w/2 score) dt + sqrt(w) dW, whose marginals are the path's for every w(t) >= 0.

    `diffusion` is w; by default 2 sigma(t), as in REPA's code. `noise` gives the draw of step i. `last` is the last
    step: its `mean`, without noise; `euler`, of the flow; `tweedie`, the expected x given x_t; or `none`, a step like
    the others.
    """
    w = diffusion or (lambda t: 2 * path.sigma(t))
    drift = _drift(velocity, path, w)

    def step(x, t, t_next, draw):
        return x + (t_next - t) * drift(x, t, t) + jnp.sqrt(w(t) * (t - t_next)) * draw

    return _stochastic(step, velocity, drift, x, times, noise, path, last)


def sde_heun(
    velocity: Velocity,
    x: Float[Array, "b *s c"],
    times: Float[np.ndarray, " s"],
    noise: Noise,
    path: Path = PATHS["linear"],
    diffusion: Callable[[Array], Array] | None = None,
    last: str = "mean",
) -> Float[Array, "b *s c"]:
    """SiT's Heun method for the same SDE: a step adds its noise first, then takes Heun's step along the drift.

    Two evaluations a step, second order for w = 0. The arguments are those of `euler_maruyama`.
    """
    w = diffusion or (lambda t: 2 * path.sigma(t))
    drift = _drift(velocity, path, w)

    def step(x, t, t_next, draw):
        x = x + jnp.sqrt(w(t) * (t - t_next)) * draw
        d = drift(x, t, t)
        d_next = drift(x + (t_next - t) * d, t_next, t)
        return x + (t_next - t) * (d + d_next) / 2

    return _stochastic(step, velocity, drift, x, times, noise, path, last)


def normal_per_image(keys: Array, shape: tuple[int, ...]) -> Noise:
    """Draws of which each image's depend only on its own key, so that no image depends on the batch around it."""
    return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def _drift(velocity: Velocity, path: Path, w: Callable[[Array], Array]) -> Velocity:
    """v - w/2 score."""

    def drift(x, t, t_step):
        v = velocity(x, t, t_step)
        return v - w(t) / 2 * paths.score_from_velocity(path, v, x, t)

    return drift


def _stochastic(
    step: Callable,
    velocity: Velocity,
    drift: Velocity,
    x: Array,
    times: np.ndarray,
    noise: Noise,
    path: Path,
    last: str,
) -> Array:
    """`step` (x, t, t_next, draw) -> x over all spans of `times` but the last, which is taken as `last` says."""
    one_of("last_step_kind", last, LAST_STEPS)

    def body(x, span):
        i, (t, t_next) = span
        return step(x, t, t_next, noise(i).astype(x.dtype)), None

    noisy = times if last == "none" else times[:-1]
    x, _ = jax.lax.scan(body, x, (jnp.arange(len(noisy) - 1), _spans(noisy, x)))
    t, t_next = (jnp.asarray(t, x.dtype) for t in times[-2:])
    if last == "mean":
        return x + (t_next - t) * drift(x, t, t)
    if last == "euler":
        return x + (t_next - t) * velocity(x, t, t)
    if last == "tweedie":
        return paths.data_from_velocity(path, velocity(x, t, t), x, t)
    return x


def _spans(times: np.ndarray, x: Array) -> tuple[Array, Array]:
    times = jnp.asarray(times, x.dtype)
    return times[:-1], times[1:]
