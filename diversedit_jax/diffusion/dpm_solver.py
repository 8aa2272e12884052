"""DPM-Solver++ (arXiv 2211.01095): singlestep, of third order, the noise predicted and the data extrapolated.

A step of order o evaluates the network at o times and ends at the next one. With lambda = log(alpha / sigma),

    x_b = (sigma_b / sigma_a) x_a + sigma_b * (the integral of exp(lambda) data(lambda) from lambda_a to lambda_b)

is exact for a step from a to b. The data are taken as constant (o = 1), or as linear in lambda (o = 2, 3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from diversedit_jax.diffusion.guidance import Velocity
from diversedit_jax.diffusion.paths import Examples


class Stages(NamedTuple):
    """What follows each of n evaluations: x = of_start x_a + of_first data_a + of_change (data - data_a).

    x_a and data_a are those of the evaluation that began the step.

    begins: whether the evaluation begins a step.
    start:  the number of the evaluation that began the step.
    """

    begins: Bool[np.ndarray, " n"]
    start: np.ndarray
    of_start: Float[np.ndarray, " n"]
    of_first: Float[np.ndarray, " n"]
    of_change: Float[np.ndarray, " n"]


def orders(evaluations: int) -> list[int]:
    """The orders of the steps for so many evaluations: 3 as often as possible, and a last step of order 1 or 2."""
    groups, rest = divmod(evaluations, 3)
    return [3] * groups + [rest] if rest else [3] * (groups - 1) + [2, 1]


def stages(alpha: Float[np.ndarray, " s"], sigma: Float[np.ndarray, " s"]) -> Stages:
    """The coefficients for s - 1 evaluations, at all times but the last. alpha, sigma: at the times, both above 0."""
    found = []
    log_ratio = np.log(alpha) - np.log(sigma)
    for order in orders(len(alpha) - 1):
        a = len(found)
        for i in range(a, a + order):
            h, seen = log_ratio[i + 1] - log_ratio[a], log_ratio[i] - log_ratio[a]
            # the weight of the slope of the data: of second order 1/2 of the constant's, as the authors have it
            slope = 0.0 if i == a else -np.expm1(-h) / 2 if order == 2 else np.expm1(-h) / h + 1
            of_change = alpha[i + 1] * slope * (h / seen if seen else 0.0)
            found.append((i == a, a, sigma[i + 1] / sigma[a], -alpha[i + 1] * np.expm1(-h), of_change))
    return Stages(*(np.array(column) for column in zip(*found, strict=True)))


def dpm_solver_pp(
    predict: Velocity,
    x: Examples,
    times: Float[np.ndarray, " s"],
    alpha: Float[np.ndarray, " s"],
    sigma: Float[np.ndarray, " s"],
) -> Examples:
    """x at the last of the times, by s - 1 evaluations in one `lax.scan`.

    predict: gives the noise. The interval of its guidance is tested where a step begins.
    times: decreasing, from noise to data.
    alpha, sigma: of x_t = alpha data + sigma noise at the times, both above 0.
    """
    plan = stages(alpha, sigma)

    def evaluate(carry: tuple[Array, Array, Array], at: tuple[Array, ...]):
        x, x_a, data_a = carry
        t, t_step, alpha, sigma, begins, of_start, of_first, of_change = at
        data = (x - sigma * predict(x, t, t_step)) / alpha
        x_a, data_a = jnp.where(begins, x, x_a), jnp.where(begins, data, data_a)
        return (of_start * x_a + of_first * data_a + of_change * (data - data_a), x_a, data_a), None

    floats = (times[:-1], times[plan.start], alpha[:-1], sigma[:-1])
    rows = [jnp.asarray(row, x.dtype) for row in (*floats, plan.of_start, plan.of_first, plan.of_change)]
    rows.insert(4, jnp.asarray(plan.begins))
    return jax.lax.scan(evaluate, (x, x, x), tuple(rows))[0][0]
