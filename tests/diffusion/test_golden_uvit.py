"""Equal to U-ViT: its schedule, its two objectives and DPM-Solver++, on a network written here from its formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import objectives
from diversedit_jax.diffusion import discrete, dpm_solver, paths, solve
from diversedit_jax.diffusion.guidance import guide
from diversedit_jax.diffusion.predictions import Diffusion, Flow
from diversedit_jax.objectives import ddpm, flow_matching
from tests.reference import DATA, weights

HEADS = {"class": 3, "uncond": 4, "t2i": 2}
IMAGES = {"x0", "eps", "xn", "out", "vp_xt", "vp_noise_pred", "vp_score", "z"} | {
    f"dpmpp_fast_{n}" for n in (3, 10, 11)
}
SCHEDULE = discrete.scaled_linear(1000)._replace(first_step=1)
EVERY = pytest.mark.parametrize("name", HEADS)


def numbers(name):
    with np.load(DATA / f"uvit_{name}.npz") as file:
        return {key: np.moveaxis(file[key], 1, -1) if key in IMAGES else file[key] for key in file.files}


def close(found, wanted, tolerance):
    """Within a tolerance relative to the largest entry."""
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(found) / scale, wanted / scale, atol=tolerance)


def network(name):
    """U-ViT (arXiv 2209.12152) as a function of images, times in its unit, and y. Its only feature is its output."""
    w = weights(f"uvit_{name}")

    def linear(part, x):
        return x @ w[f"{part}.weight"].T + w.get(f"{part}.bias", 0)

    def norm(part, x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{part}.weight"] + w[f"{part}.bias"]

    def block(part, x):
        b, n, d = x.shape
        split = linear(f"{part}.attn.qkv", norm(f"{part}.norm1", x)).reshape(b, n, 3, HEADS[name], -1)
        q, k, v = jnp.moveaxis(split, 2, 0)
        seen = jax.nn.softmax(jnp.einsum("bihc,bjhc->bhij", q, k) / q.shape[-1] ** 0.5)
        x = x + linear(f"{part}.attn.proj", jnp.einsum("bhij,bjhc->bihc", seen, v).reshape(b, n, d))
        inner = jax.nn.gelu(linear(f"{part}.mlp.fc1", norm(f"{part}.norm2", x)), approximate=False)
        return x + linear(f"{part}.mlp.fc2", inner)

    def apply(x, t, y):
        b, rows, _, channels = x.shape
        kernel = w["patch_embed.proj.weight"]
        d, _, p, _ = kernel.shape
        patches = x.reshape(b, rows // p, p, rows // p, p, channels).transpose(0, 1, 3, 5, 2, 4)
        tokens = patches.reshape(b, -1, channels * p * p) @ kernel.reshape(d, -1).T + w["patch_embed.proj.bias"]
        angles = t[:, None] * 10000 ** (-jnp.arange(d // 2) / (d // 2))
        time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)[:, None]
        extras = [time]
        if name == "uncond":
            extras = [linear("time_embed.2", jax.nn.silu(linear("time_embed.0", time)))]
        elif name == "class":
            extras = [jnp.asarray(w["label_emb.weight"])[y][:, None], time]
        else:
            extras = [time, linear("context_embed", y)]
        h = jnp.concatenate([*extras, tokens], 1) + w["pos_embed"]
        half = sum(part.endswith("skip_linear.weight") for part in w)
        skips = []
        for i in range(half):
            h = block(f"in_blocks.{i}", h)
            skips.append(h)
        h = block("mid_block", h)
        for i in range(half):
            h = linear(f"out_blocks.{i}.skip_linear", jnp.concatenate([h, skips.pop()], -1))
            h = block(f"out_blocks.{i}", h)
        out = linear("decoder_pred", norm("norm", h))[:, -tokens.shape[1] :]
        out = out.reshape(b, rows // p, rows // p, p, p, channels).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
        if "final_layer.weight" in w:
            kernel = w["final_layer.weight"].transpose(2, 3, 1, 0)
            layout = ("NHWC", "HWIO", "NHWC")
            out = jax.lax.conv_general_dilated(out, kernel, (1, 1), "SAME", dimension_numbers=layout)
            out = out + w["final_layer.bias"]
        return out, (out,)

    return apply


def condition(gold):
    """(y, null)."""
    if "context" in gold:
        return jnp.asarray(gold["context"]), jnp.asarray(gold["empty_context"])
    return jnp.asarray(gold.get("y", np.zeros(3, int)), jnp.int32), np.int32(10)


def test_the_schedule_of_betas_is_u_vits():
    gold = numbers("class")
    np.testing.assert_allclose(SCHEDULE.alphas_bar[gold["schedule_n"] - 1], gold["schedule_cum_alpha"], rtol=1e-12)
    alpha, sigma = discrete.at_times(SCHEDULE, gold["vp_discrete_t"].astype(np.float64))
    np.testing.assert_allclose(alpha, gold["vp_discrete_alpha"], rtol=1e-5)
    rounding = 2.0**-24 / (2 * sigma**2)  # the reference takes sigma^2 = 1 - alpha^2 in float32: 3.5e-5 at t = 1 / 1000
    assert (np.abs(sigma / gold["vp_discrete_sigma"] - 1) < 1e-5 + rounding).all()
    assert (np.abs(np.log(alpha / sigma) - gold["vp_discrete_lambda"]) < 1e-5 + rounding).all()


def test_times_and_orders_are_u_vits(monkeypatch):
    gold, seen = numbers("class"), []
    np.testing.assert_array_equal(dpm_solver.orders(10), gold["dpmpp_orders_10"])
    monkeypatch.setattr(dpm_solver, "dpm_solver_pp", lambda predict, x, times, *rest: seen.append(times))
    solve.make("dpm_solver_pp", Diffusion(SCHEDULE), solve.Options(steps=10))(lambda convert: None, None, None)
    np.testing.assert_allclose(seen[0], gold["dpmpp_timesteps_10"], rtol=1e-6)


@EVERY
def test_the_discrete_objective_is_u_vits(name):
    gold = numbers(name)
    predicts = objectives.make("ddpm", betas="scaled_linear", first_step=1, learn_sigma=False).predicts
    forward = jax.jit(partial(ddpm.regress, network(name), predicts.schedule, learn_sigma=False))(
        gold["x0"], gold["eps"], jnp.asarray(gold["n"] - 1, jnp.int32), condition(gold)[0]
    )
    close(forward.x_t, gold["xn"], 1e-5)
    close(forward.loss, gold["loss"], 1e-5)
    close(forward.features[0], gold["out"], 1e-5)


@EVERY
def test_the_continuous_objective_is_u_vits(name):
    gold, path = jax.tree.map(jnp.asarray, numbers(name)), paths.make("vp")
    predicts = objectives.make("flow_matching", path="vp", prediction="noise", time_scale=999.0).predicts
    assert predicts == Flow(path, "noise", time_scale=999.0)
    error, none = flow_matching.ERRORS["noise"], flow_matching.WEIGHTS["none"]
    t, y, x_t = gold["vp_t"], condition(gold)[0], gold["vp_xt"]

    @jax.jit
    def run(x0, eps):
        forward = flow_matching.regress(network(name), path, x0, eps, t, y, error, none, 999.0)
        return forward, solve.velocity_of(predicts, network(name))(x_t, t, y)[0]

    forward, velocity = run(gold["x0"], gold["eps"])
    close(forward.x_t, x_t, 1e-5)
    close(forward.loss, gold["vp_loss"], 1e-5)
    close(forward.features[0], gold["vp_noise_pred"], 1e-5)
    at = paths.over(t, x_t)
    close(paths.noise_from_velocity(path, velocity, x_t, at), gold["vp_noise_pred"], 1e-5)
    close(paths.score_from_velocity(path, velocity, x_t, at), gold["vp_score"], 1e-5)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param(name, steps, marks=[] if (name, steps) in {("class", 10), ("t2i", 11)} else pytest.mark.slow)
        for name in ("class", "t2i")
        for steps in (3, 10, 11)
    ],
)
def test_samples_are_u_vits(name, steps):
    gold = numbers(name)
    y, null = condition(gold)
    solution = solve.make("dpm_solver_pp", Diffusion(SCHEDULE), solve.Options(steps=steps))
    scale = 1 + float(gold["cfg_extra_scale"])

    @jax.jit
    def run(z):
        return solution(lambda convert: guide(convert(network(name)), y, null, scale=scale), z, None)

    close(run(gold["z"]), gold[f"dpmpp_fast_{steps}"], 1e-4)
