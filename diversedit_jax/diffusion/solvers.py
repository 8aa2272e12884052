"""Solvers from noise (t = 1) to data (t = 0): functions over a velocity, the whole loop inside one `lax.scan`.

They give the numbers of the published samplers of REPA, DiverseDiT and SiT: `tests/diffusion/test_solvers.py` and
`tests/models/test_golden_official.py` compare them.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax.diffusion import paths
from diversedit_jax.diffusion.guidance import Velocity
from diversedit_jax.diffusion.paths import PATHS, Curve, Examples, Path
from diversedit_jax.registry import in_range, one_of

Grid = Float[np.ndarray, " s"]  # decreasing times; a solver takes s - 1 steps
Noise = Callable[[Array], Array]  # index of a step -> standard normal [b *s c]


def uniform_times(steps: int, first: float = 1.0, last: float = 0.0) -> np.ndarray:
    """steps + 1 equidistant times from `first` to `last`."""
    return np.linspace(first, last, in_range("steps", steps, 1) + 1)


def last_step_times(steps: int, last: float = 0.04, first: float = 1.0) -> np.ndarray:
    """`steps` equidistant times from `first` to `last`, then 0: the grid of the SDE samplers of REPA and SiT."""
    in_range("last_step", last, above=0, below=1)
    return np.append(np.linspace(first, last, in_range("steps", steps, 2)), 0.0)


def sde_times(steps: int, path: Path, prediction: str, diffusion: str, last: str, last_step: float) -> np.ndarray:
    """SiT's times for `steps` steps of a stochastic solver, with a last step of kind `last` from time `last_step`.

    The form `sbdm` stays 1e-3 away from t = 1 where it is infinite there. Without a last step all forms stay 1e-3 away
    from t = 0, where the score is infinite. SiT counts one step less for `none`.
    """
    one_of("last_step_kind", last, LAST_STEPS)
    end, first = paths.sampling_times(path, prediction)
    if diffusion == "sbdm" and path.alpha(jnp.float32(1)) < 1e-6:  # it divides by alpha
        first = min(first, 1 - 1e-3)
    if last == "none":
        return uniform_times(steps, first, max(end, 1e-3))
    return last_step_times(steps, last_step, first)


def _spans(times: np.ndarray, x: Array) -> tuple[Array, Array]:
    times = jnp.asarray(times, x.dtype)
    return times[:-1], times[1:]


def euler(velocity: Velocity, x: Examples, times: Grid) -> Examples:
    """Euler's method: first order, one evaluation a step."""

    def step(x, span):
        t, t_next = span
        return x + (t_next - t) * velocity(x, t, t), None

    return jax.lax.scan(step, x, _spans(times, x))[0]


def heun(velocity: Velocity, x: Examples, times: Grid) -> Examples:
    """Heun's method: second order, two evaluations a step. The last step is one of Euler's (as in EDM and REPA)."""

    def step(x, span):
        t, t_next = span
        v = velocity(x, t, t)
        v_next = velocity(x + (t_next - t) * v, t_next, t)
        return x + (t_next - t) * (v + v_next) / 2, None

    x, _ = jax.lax.scan(step, x, _spans(times[:-1], x))
    return euler(velocity, x, times[-2:])


def mean_flow(average: Callable[[Array, Array, Array], Array], x: Examples, times: Grid) -> Examples:
    """MeanFlow's sampler: x_r = x_t - (t - r) u (arXiv 2505.13447), one evaluation a step.

    average: (x, t, span) -> u, the average velocity between t - span and t. The true u is exact in any number of steps.
    """

    def step(x, span):
        t, r = span
        return x - (t - r) * average(x, t, t - r), None

    return jax.lax.scan(step, x, _spans(times, x))[0]


def dopri5(
    velocity: Velocity,
    x: Examples,
    first: float = 1.0,
    last: float = 0.0,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_steps: int = 1000,
) -> Examples:
    """Dormand and Prince's fifth-order method with adaptive steps, SiT's default, through diffrax.

    The steps are chosen for the whole batch, by the root mean square of the error. A guidance interval is tested at the
    time of each evaluation. If `max_steps` steps, rejected ones included, do not reach `last`, the result is infinite,
    or NaN if the velocity is not finite where the steps end.
    """
    import diffrax  # for this solver only

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, args: velocity(x, t, t)),
        diffrax.Dopri5(),
        t0=jnp.asarray(first, x.dtype),
        t1=jnp.asarray(last, x.dtype),
        dt0=None,
        y0=x,
        # A step over most of the interval once passed the error estimate with 40 times the tolerance.
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, dtmax=(first - last) / 4),
        max_steps=max_steps,
        throw=False,
    )
    reached, end, t = solution.result == diffrax.RESULTS.successful, solution.ys[-1], solution.ts[-1]

    def cause() -> Array:
        return jnp.where(jnp.isfinite(velocity(end, t, t)).all(), jnp.inf, jnp.nan).astype(x.dtype)

    return jnp.where(reached, end, jax.lax.cond(reached, lambda: jnp.zeros((), x.dtype), cause))


# Stochastic differential equations: dx = (v - w/2 score) dt + sqrt(w) dW has the path's marginals for every w(t) >= 0.

# SiT's forms of D = w / 2, as its code has them: (path, t, norm) -> D.
DIFFUSIONS = {
    "constant": lambda path, t, norm: norm * jnp.ones_like(t),
    # the reverse of the forward diffusion that has the path's marginals (Song et al., arXiv 2011.13456)
    "sbdm": lambda path, t, norm: norm * path.sigma(t) * paths.wronskian(path, t) / path.alpha(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * t,
    "decreasing": lambda path, t, norm: 0.25 * (1 - norm * jnp.cos(jnp.pi * t)) ** 2,
    "increasing_decreasing": lambda path, t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
}
LAST_STEPS = ("none", "mean", "tweedie", "euler")


def diffusion(name: str, path: Path, norm: float = 1.0) -> Curve:
    """w(t) = 2 D(t), with D the form `name` of DIFFUSIONS, of magnitude `norm`."""
    form = DIFFUSIONS[one_of("diffusion", name, DIFFUSIONS)]
    return lambda t: 2 * form(path, t, norm)


def solve_sde(
    step: Callable,
    velocity: Velocity,
    x: Examples,
    times: Grid,
    noise: Noise,
    path: Path = PATHS["linear"],
    diffusion: Curve | None = None,
    last: str = "mean",
) -> Examples:
    """The SDE solved by `step`: (drift, w, x, t, t_next, draw) -> x at t_next.

    diffusion: w. None: 2 sigma(t), as in REPA's code.
    last: the last step. `mean`: without noise. `euler`: of the flow. `tweedie`: the expected x given x_t. `none`: a
        step like the others.
    """
    one_of("last_step_kind", last, LAST_STEPS)
    w = diffusion or (lambda t: 2 * path.sigma(t))

    def drift(x, t, t_step):
        v = velocity(x, t, t_step)
        return v - w(t) / 2 * paths.score_from_velocity(path, v, x, t)

    def body(x, span):
        i, (t, t_next) = span
        return step(drift, w, x, t, t_next, noise(i).astype(x.dtype)), None

    noisy = times if last == "none" else times[:-1]
    x, _ = jax.lax.scan(body, x, (jnp.arange(len(noisy) - 1), _spans(noisy, x)))
    t, t_next = (jnp.asarray(t, x.dtype) for t in times[-2:])
    match last:
        case "mean":
            return x + (t_next - t) * drift(x, t, t)
        case "euler":
            return x + (t_next - t) * velocity(x, t, t)
        case "tweedie":
            return paths.data_from_velocity(path, velocity(x, t, t), x, t)
    return x


def _euler_maruyama(drift: Velocity, w: Curve, x: Array, t: Array, t_next: Array, draw: Array) -> Array:
    """One evaluation a step."""
    return x + (t_next - t) * drift(x, t, t) + jnp.sqrt(w(t) * (t - t_next)) * draw


def _heun(drift: Velocity, w: Curve, x: Array, t: Array, t_next: Array, draw: Array) -> Array:
    """SiT's Heun method: add the noise, then take Heun's step along the drift. Second order for w = 0."""
    x = x + jnp.sqrt(w(t) * (t - t_next)) * draw
    d = drift(x, t, t)
    d_next = drift(x + (t_next - t) * d, t_next, t)
    return x + (t_next - t) * (d + d_next) / 2


euler_maruyama = partial(solve_sde, _euler_maruyama)
sde_heun = partial(solve_sde, _heun)


def normal_per_image(keys: Array, shape: tuple[int, ...]) -> Noise:
    """Noise for each image from its own key alone, so that no image depends on the batch around it."""
    return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)
