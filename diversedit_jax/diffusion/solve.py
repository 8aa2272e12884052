"""Solvers by name: from what a network predicts, and `Options`, to a function from noise to data.

Flow             euler, heun, dopri5, dpm_solver_pp (the ODE), euler_maruyama, sde_heun (the SDE)
Diffusion        ddpm, ddim (steps of the discrete diffusion), dpm_solver_pp (times between them too)
AverageVelocity  mean_flow, and every solver of flows: the average over no time is the velocity
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diversedit_jax.api import Network
from diversedit_jax.diffusion import ddpm_solvers, discrete, dpm_solver, paths, solvers
from diversedit_jax.diffusion.guidance import Velocity, over_span
from diversedit_jax.diffusion.predictions import AverageVelocity, Diffusion, Flow
from diversedit_jax.diffusion.solvers import Noise
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import MANY, in_range, one_of

Convert = Callable[[Network], Network]  # the network as a solver takes it
# (guided, x, noise) -> x at the end. `guided` gives the guided velocity of the converted network.
Solve = Callable[[Callable[[Convert], Velocity], Array, Noise], Array]


class Options(NamedTuple):
    """The options of solvers, and which solver reads them.

    steps:          all. `dopri5` takes at most so many. `dpm_solver_pp` evaluates the network so often.
    diffusion:      euler_maruyama, sde_heun: form of the diffusion coefficient, see `solvers.DIFFUSIONS`.
    diffusion_norm: euler_maruyama, sde_heun: its magnitude.
    last_step_kind: euler_maruyama, sde_heun: `mean`, `euler`, `tweedie` or `none`, see `solvers.solve_sde`.
    last_step:      euler_maruyama, sde_heun: the time at which the last step begins (not for `none`).
    rtol, atol:     dopri5: tolerances.
    eta:            ddim: 0 is deterministic, 1 has the posterior's variance.

    Guidance in ddpm and ddim changes the noise, never the variance; its interval is one of (step + 1) / num_timesteps,
    also in dpm_solver_pp.
    Guidance in mean_flow changes the average velocity, on top of any guidance that the objective has trained in.
    """

    steps: int = 250
    diffusion: str = "sigma"
    diffusion_norm: float = 1.0
    last_step_kind: str = "mean"
    last_step: float = 0.04
    rtol: float = 1e-3
    atol: float = 1e-6
    eta: float = 0.0


def velocity_of(predicts: Flow, network: Network) -> Network:
    """A network that predicts the velocity at t, from one that predicts this."""
    return paths.as_velocity(network, predicts.path, predicts.prediction, predicts.time_scale)


def ordinary(name: str, predicts: Flow, given: Options) -> Solve:
    """A solver of the flow's ODE: `euler`, `heun` or `dopri5`."""
    last, first = paths.sampling_times(predicts.path, predicts.prediction)
    times = solvers.uniform_times(given.steps, first, last)

    def solve(guided, x, noise):
        velocity = guided(partial(velocity_of, predicts))
        if name == "dopri5":
            return solvers.dopri5(velocity, x, first, last, rtol=given.rtol, atol=given.atol, max_steps=given.steps)
        return getattr(solvers, name)(velocity, x, times)

    return solve


def stochastic(name: str, predicts: Flow, given: Options) -> Solve:
    """A solver of the SDE with the flow's marginals: `euler_maruyama` or `sde_heun`."""
    path, prediction = predicts.path, predicts.prediction
    w = solvers.diffusion(given.diffusion, path, given.diffusion_norm)
    kind = given.last_step_kind
    times = solvers.sde_times(given.steps, path, prediction, given.diffusion, kind, given.last_step)

    def solve(guided, x, noise):
        velocity = guided(partial(velocity_of, predicts))
        return getattr(solvers, name)(velocity, x, times, noise, path, w, kind)

    return solve


def averaged(name: str, predicts: AverageVelocity, given: Options) -> Solve:
    """MeanFlow's sampler."""
    times = solvers.uniform_times(given.steps)

    def solve(guided, x, noise):
        def average(x, t, span):
            return guided(lambda network: over_span(network, span))(x, t, t)

        return solvers.mean_flow(average, x, times)

    return solve


def instantaneous(build: Callable[[str, Flow, Options], Solve]) -> Callable[[str, AverageVelocity, Options], Solve]:
    """A solver of flows for a network of average velocities: it takes the average over a span of 0."""

    def built(name: str, predicts: AverageVelocity, given: Options) -> Solve:
        solve = build(name, Flow(), given)
        return lambda guided, x, noise: solve(
            lambda convert: guided(lambda network: convert(over_span(network, 0.0))), x, noise
        )

    return built


def ancestral(name: str, predicts: Diffusion, given: Options) -> Solve:
    """A sampler of the discrete diffusion on `steps` of its steps: `ddpm` or `ddim`."""
    in_range("steps", given.steps, 2)
    kept = discrete.spaced(predicts.schedule.num_timesteps, given.steps)
    schedule = discrete.respace(predicts.schedule, kept)
    options = {"eta": given.eta} if name == "ddim" else {}

    def solve(guided, x, noise):
        return getattr(ddpm_solvers, name)(guided(lambda network: network), x, schedule, noise, **options)

    return solve


def exponential_flow(name: str, predicts: Flow, given: Options) -> Solve:
    """`dpm_solver_pp` on a path, at evenly spaced times.

    It stays 1e-3 away from t = 0, and from t = 1 where alpha is 0 there: lambda is infinite at both.
    """
    path = predicts.path
    last, first = paths.sampling_times(path, predicts.prediction)
    if path.alpha(jnp.float32(1)) < 1e-6:
        first = min(first, 1 - 1e-3)
    times = solvers.uniform_times(given.steps, first, max(last, 1e-3))
    alpha, sigma = (np.asarray(curve(jnp.asarray(times)), np.float64) for curve in (path.alpha, path.sigma))

    def solve(guided, x, noise):
        velocity = guided(partial(velocity_of, predicts))

        def predict(x, t, t_step):
            return paths.noise_from_velocity(path, velocity(x, t, t_step), x, t)

        return dpm_solver.dpm_solver_pp(predict, x, times, alpha, sigma)

    return solve


def exponential_diffusion(name: str, predicts: Diffusion, given: Options) -> Solve:
    """`dpm_solver_pp` on a discrete diffusion of n steps, at evenly spaced times from 1 to 1 / n, as in U-ViT.

    Step i, counted from 0, is at time (i + 1) / n. Between two steps the network is given their fractions.
    """
    schedule = predicts.schedule
    n = schedule.num_timesteps
    times = solvers.uniform_times(given.steps, 1.0, 1 / n)
    alpha, sigma = discrete.at_times(schedule, times)

    def solve(guided, x, noise):
        output = guided(lambda network: network)

        def predict(x, t, t_step):
            return discrete.split(output(x, n * t - 1 + schedule.first_step, t_step), x.shape[-1])[0]

        return dpm_solver.dpm_solver_pp(predict, x, times, alpha, sigma)

    return solve


FLOW = dict.fromkeys(("euler", "heun", "dopri5"), ordinary) | {"dpm_solver_pp": exponential_flow}
FLOW |= dict.fromkeys(("euler_maruyama", "sde_heun"), stochastic)
# For each kind of prediction: its solvers, and the options with which its papers sample.
SOLVERS: Mapping[type, Mapping[str, Callable[..., Solve]]] = {
    Flow: FLOW,
    AverageVelocity: {"mean_flow": averaged} | {name: instantaneous(build) for name, build in FLOW.items()},
    Diffusion: dict.fromkeys(("ddpm", "ddim"), ancestral) | {"dpm_solver_pp": exponential_diffusion},
}
DEFAULTS: Mapping[type, Mapping[str, Any]] = {
    Flow: {"solver": "euler_maruyama"},
    AverageVelocity: {"solver": "mean_flow", "steps": 1},
    Diffusion: {"solver": "ddpm"},
}
NAMES = tuple(dict.fromkeys(name for known in SOLVERS.values() for name in known))


def make(name: str, predicts: Any, options: Options) -> Solve:
    """The solver `name` for a network that predicts this. ConfigError if it cannot solve it."""
    one_of("solver", name, NAMES)
    in_range("steps", options.steps, 1, MANY)
    one_of("diffusion", options.diffusion, solvers.DIFFUSIONS)
    one_of("last_step_kind", options.last_step_kind, solvers.LAST_STEPS)
    in_range("diffusion_norm", options.diffusion_norm, 0)
    in_range("last_step", options.last_step, above=0, below=1)
    in_range("rtol", options.rtol, above=0)
    in_range("atol", options.atol, above=0)
    in_range("eta", options.eta, 0, 1)
    kind = type(predicts)
    if kind not in SOLVERS:
        known = ", ".join(known.__name__ for known in SOLVERS)
        raise ConfigError(
            f"the objective does not say how to sample from it: Objective.predicts = {predicts!r}, known: {known}; "
            "to train without samples, set config.samples.num=0"
        )
    if name not in SOLVERS[kind]:
        known = ", ".join(SOLVERS[kind])
        raise ConfigError(
            f"solver = {name!r} cannot solve what this network predicts ({kind.__name__}); known: {known}"
        )
    return SOLVERS[kind][name](name, predicts, options)


def evaluations(name: str, steps: int, last_step_kind: str) -> int | None:
    """Evaluations of the network per example, guidance not counted. None: the solver chooses its steps."""
    if name == "dopri5":
        return None
    if name == "sde_heun" and last_step_kind == "none":
        return 2 * steps
    return 2 * steps - 1 if name in ("heun", "sde_heun") else steps
