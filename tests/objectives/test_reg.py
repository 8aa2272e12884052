"""REG: the class token through network, objective, sampler and release, against a slow reference and known numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import codecs, models, objectives, sample, sharding, train
from diversedit_jax.api import Conditions, Context, Model, Objective, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.diffusion import image_and_token, paths, solvers
from diversedit_jax.diffusion.guidance import guide
from diversedit_jax.diffusion.predictions import Flow
from diversedit_jax.errors import ConfigError
from diversedit_jax.objectives import reg
from diversedit_jax.runs import trained as runs
from diversedit_jax.sampling import sampler as samplers
from diversedit_jax.training.step import initializer, train_step
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tests import reference
from tests.diffusion.test_solvers import noise_of
from tests.training.test_step import assert_close, layout_of, parts
from tools import convert_checkpoint

LINEAR = paths.make("linear")
SHAPE, CLASSES, K, BATCH = (4, 4, 2), 5, 3, 16
SPACE = Space(SHAPE, Conditions.labels(CLASSES))
CONTEXT = Context(jax.random.key(0), SPACE.conditions.null)


def normal(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def batch():
    return {"x": normal(0, BATCH, *SHAPE), "y": jnp.arange(BATCH) % CLASSES, "token/dinov2": normal(1, BATCH, K)}


def make(read_blocks=(), inputs=None, **options) -> Model:
    given = {"depth": 4, "width": 16, "heads": 2, "mlp_ratio": 2.0} | options
    return models.make("dit", SPACE, {"token": (K,)} if inputs is None else inputs, read_blocks, **given)


def trained(model: Model):
    """Parameters none of which is zero, so that every part of the network takes part."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), shapes)


def inputs():
    return normal(2, BATCH, *SHAPE), jnp.linspace(0.1, 0.9, BATCH), batch()["y"], normal(3, BATCH, K)


# --- The network, against the published names.


def published(weights, x, t, y, token=None, heads: int = 4):
    """REPA's SiT in float64, one block after another, from its state dict; REG's with a token. x [b c h w]."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name=None):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        return x if name is None else x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def attention(x, name):
        b, n, d = x.shape
        q, k, v = linear(f"{name}.qkv", x).reshape(b, n, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(-1, -2) / (d // heads) ** 0.5)
        out = scores / scores.sum(axis=-1, keepdims=True) @ v
        return linear(f"{name}.proj", out.transpose(0, 2, 1, 3).reshape(b, n, d))

    kernel = w["x_embedder.proj.weight"]
    patch = kernel.shape[-1]
    b, c, side = *x.shape[:2], x.shape[2] // patch
    patches = x.reshape(b, c, side, patch, side, patch)
    stream = np.einsum("bcipjq,dcpq->bijd", patches, kernel).reshape(b, side**2, -1) + w["x_embedder.proj.bias"]
    if token is not None:
        stream = np.concatenate([norm(linear("cls_projectors2", token), "wg_norm")[:, None], stream], axis=1)
    stream = stream + w["pos_embed"]

    angles = t[:, None] * 10000.0 ** -(np.arange(128) / 128)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    condition = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    condition = silu(condition + w["y_embedder.embedding_table.weight"][y])

    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    outputs = []
    for i in range(depth):
        ada = np.split(linear(f"blocks.{i}.adaLN_modulation.1", condition)[:, None], 6, axis=-1)
        stream = stream + ada[2] * attention(norm(stream) * (1 + ada[1]) + ada[0], f"blocks.{i}.attn")
        hidden = gelu(linear(f"blocks.{i}.mlp.fc1", norm(stream) * (1 + ada[4]) + ada[3]))
        stream = stream + ada[5] * linear(f"blocks.{i}.mlp.fc2", hidden)
        if "skip_norms.0.weight" in w and i >= depth // 2:
            j, both = i - depth // 2, np.concatenate([stream, outputs[depth - 1 - i]], axis=-1)
            stream = linear(f"skip_linears.{j}.linear", norm(both, f"skip_norms.{j}"))
        outputs.append(stream)

    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", condition)[:, None], 2, axis=-1)
    stream = norm(stream) * (1 + scale) + shift
    out = linear("final_layer.linear", stream if token is None else stream[:, 1:])
    image = np.einsum("bijpqc->bcipjq", out.reshape(b, side, side, patch, patch, c)).reshape(x.shape)
    return image if token is None else (image, linear("final_layer.linear_cls", stream[:, 0]))


def reg_weights(name: str):
    """A state dict of REG's names: a SiT's of tests/data, and random arrays for the class token."""
    weights, rng = reference.weights(name), np.random.default_rng(0)
    width = reference.CONFIG["hidden_size"]
    token = {
        "cls_projectors2.weight": (width, K),
        "cls_projectors2.bias": (width,),
        "wg_norm.weight": (width,),
        "wg_norm.bias": (width,),
        "final_layer.linear_cls.weight": (K, width),
        "final_layer.linear_cls.bias": (K,),
    }
    arrays = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in token.items()}
    table = np.pad(weights["pos_embed"], ((0, 0), (1, 0), (0, 0)))  # the token's position embedding is zero
    return weights | arrays | {"pos_embed": table}


def load(weights):
    shapes = {key: array.shape for key, array in weights.items()}
    return releases.load(weights, shapes, heads=reference.CONFIG["num_heads"])


NAMES = ["sit_plain", "sit_diversedit"]


@pytest.mark.parametrize("name", NAMES)
def test_the_slow_reference_is_the_public_one(name):
    """Without a token, where there are numbers of the public code."""
    gold = reference.numbers(name)
    x, t, y = (np.asarray(gold[key]) for key in ("xt", "t", "y"))
    found = published(reference.weights(name), np.moveaxis(x, -1, 1), t, y)
    np.testing.assert_allclose(np.moveaxis(found, 1, -1), gold["out"], atol=1e-5 * np.abs(gold["out"]).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_release_is_recognised_and_equals_the_reference(name):
    weights = reg_weights(name)
    release = load(weights)
    assert release.family == "reg"
    assert release.arch.token_width == K
    assert release.arch.skip == (name == "sit_diversedit")
    assert release.sides == reference.SHAPE[:2]
    model = models.make("dit", reference.SPACE, releases.inputs(release.arch), **releases.model_options(release.arch))
    gold = reference.numbers(name)
    token = normal(4, len(gold["t"]), K)
    (image, cls), features = jax.jit(model.apply)(release.params, gold["xt"], gold["t"], gold["y"], token=token)
    assert {f.shape[1] for f in features} == {1 + 16}
    wanted, wanted_cls = published(
        weights, np.moveaxis(np.asarray(gold["xt"]), -1, 1), np.asarray(gold["t"]), np.asarray(gold["y"]), token
    )
    np.testing.assert_allclose(image, np.moveaxis(wanted, 1, -1), atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(cls, wanted_cls, atol=1e-5 * np.abs(wanted_cls).max())


def test_export_is_exact_and_to_reg_alone():
    weights = reg_weights("sit_diversedit")
    release = load(weights)
    out = releases.export(release.params, "reg", release.arch, release.sides)
    assert out.keys() == {key for key in weights if not key.startswith("projectors.")}
    for key, array in out.items():
        if key != "pos_embed":
            np.testing.assert_array_equal(array, weights[key], err_msg=key)
    np.testing.assert_allclose(out["pos_embed"], weights["pos_embed"], atol=1e-6)
    with pytest.raises(ConfigError, match="sit cannot hold a network with a class token"):
        releases.export(release.params, "sit", release.arch)
    plain = load(reference.weights("sit_plain"))
    with pytest.raises(ConfigError, match="reg cannot hold a network without a class token"):
        releases.export(plain.params, "reg", plain.arch)


@pytest.mark.slow
def test_a_release_samples_at_once(tmp_path):
    write_safetensors(tmp_path / "reg.safetensors", reg_weights("sit_plain"))
    options = {"steps": 3, "cfg_scale": 2.3, "token_cfg_scale": 1.5, "guidance_interval": (0.0, 0.85)}
    source = runs.drawing(runs.of_release(tmp_path / "reg.safetensors", heads=4), overrides=options)
    with np.load(sample.run(source, num=2, labels=[1, 7], out=tmp_path) / "samples.npz") as file:
        assert file["arr_0"].shape == (2, *reference.SHAPE)
        assert np.isfinite(file["arr_0"]).all()


# --- The network.


def test_at_initialisation_the_token_changes_no_other_value_and_predicts_zero():
    model, plain = make(depth=2, skip="release"), make(depth=2, skip="release", inputs={})
    params, others = jax.jit(model.init)(jax.random.key(0)), jax.jit(plain.init)(jax.random.key(0))
    added = {name for name in params if name not in others}
    assert added == {"token_embed", "token_norm", "token_final"}
    jax.tree.map(np.testing.assert_array_equal, {name: params[name] for name in others}, others)
    x, t, y, token = inputs()
    (image, cls), features = jax.jit(model.apply)(params, x, t, y, token=token)
    assert not np.any(image)
    assert not np.any(cls)
    np.testing.assert_allclose(features[0][:, 0].mean(axis=-1), 0, atol=1e-6)  # LayerNorm, at position embedding 0
    np.testing.assert_allclose(features[0][:, 0].std(axis=-1), 1, atol=1e-3)


@pytest.mark.slow
def test_remat_and_cuts_change_nothing():
    x, t, y, token = inputs()

    def run(model):
        def loss(params):
            (image, cls), features = model.apply(params, x, t, y, token=token)
            return jnp.sin(image).sum() + jnp.sin(cls).sum() + jnp.sin(features[2]).sum()

        return jax.jit(jax.value_and_grad(loss))(trained(model))

    wanted = run(make(depth=3, skip="release", remat="none"))
    assert_close(run(make((1, 2), depth=3, skip="release", remat="full")), wanted, "with cuts and remat")


def test_a_token_stands_beside_a_second_time():
    model = make(inputs={"span": (), "token": (K,)})
    x, t, y, token = inputs()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    (image, cls), _ = jax.eval_shape(model.apply, shapes, x, t, y, span=t, token=token)
    assert (image.shape, cls.shape) == (x.shape, token.shape)


@pytest.mark.parametrize(
    ("takes", "given", "message"),
    [
        ({}, ["token"], "the network takes no further input, given token"),
        ({"token": (K,)}, [], "the network takes token, given no further input"),
    ],
)
def test_a_token_that_does_not_fit_is_refused(takes, given, message):
    model = make(inputs=takes)
    x, t, y, token = inputs()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, shapes, x, t, y, **dict.fromkeys(given, token))


# --- The objective.


def echo(x_t, t, y, *, token):
    """A network that predicts what it is given."""
    return (x_t, token), (token[:, None],)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_loss_is_the_images_and_the_weighted_tokens(name):
    path = paths.make(name)
    x, t, y, token = inputs()
    noise, token_noise = normal(5, BATCH, *SHAPE), normal(6, BATCH, K)
    alpha, sigma, d_alpha, d_sigma = (np.asarray(curve(t)) for curve in path[:4])
    found = reg.regress(echo, path, x, noise, token, token_noise, t, y, token_weight=0.5)
    c_t = alpha[:, None] * token + sigma[:, None] * token_noise
    np.testing.assert_allclose(found.features[0][:, 0], c_t, rtol=1e-5, atol=1e-6)
    of_token = ((c_t - d_alpha[:, None] * token - d_sigma[:, None] * token_noise) ** 2).mean(axis=1)
    alone = reg.regress(echo, path, x, noise, token, token_noise, t, y, token_weight=0.0).loss
    np.testing.assert_allclose(found.loss - alone, 0.5 * of_token, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.metrics["token"], of_token.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["image"], alone.mean(), rtol=1e-6)

    velocities = paths.velocity(path, x, noise, t), d_alpha[:, None] * token + d_sigma[:, None] * token_noise
    perfect = lambda x_t, t, y, token: (velocities, ())  # noqa: E731
    np.testing.assert_allclose(reg.regress(perfect, path, x, noise, token, token_noise, t, y).loss, 0, atol=1e-12)


def test_path_and_weight_reach_the_loss():
    found = objectives.make("reg", width=K, path="cosine", token_weight=0.5).apply(echo, batch(), CONTEXT)
    np.testing.assert_allclose(found.x_t, paths.interpolate(paths.make("cosine"), found.x, found.noise, found.t))
    wanted = found.metrics["image"] + 0.5 * found.metrics["token"]
    np.testing.assert_allclose(found.loss.mean(), wanted, rtol=1e-6)


def test_the_token_has_the_images_time_and_a_noise_of_its_own():
    large = {"x": normal(0, 256, *SHAPE), "y": jnp.zeros(256, int), "token/clip": normal(1, 256, 32)}
    result = objectives.make("reg", encoder="clip", width=32).apply(echo, large, CONTEXT)
    t, c_t = np.asarray(result.t)[:, None], np.asarray(result.features[0][:, 0])
    late = t[:, 0] > 0.2
    noise = ((c_t - (1 - t) * np.asarray(large["token/clip"])) / t)[late]
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.size) ** 0.5
    of_image = np.asarray(result.noise).reshape(256, -1)[late]
    assert abs((noise * of_image).mean()) < 4 / noise.size**0.5
    again, _ = result.rerun(echo, jnp.zeros(256))
    np.testing.assert_array_equal(again[0], large["x"])
    np.testing.assert_array_equal(again[1], large["token/clip"])


@pytest.mark.slow
def test_both_losses_reach_the_tokens_way_in():
    model = make(depth=2)

    def losses(params):
        return objectives.make("reg", width=K).apply(model.network(params), batch(), CONTEXT).metrics

    for part, gradient in jax.jit(jax.jacrev(losses))(trained(model)).items():
        for name in ("token_embed", "token_norm", "shallow", "deep"):
            for leaf in jax.tree.leaves(gradient[name]):
                assert np.abs(leaf).max() > 0, f"{part}: no gradient reaches {name}"
        heads = {name: bool(np.any(gradient[name]["kernel"])) for name in ("final", "token_final")}
        assert heads == {"final": part == "image", "token_final": part == "token"}


def test_what_is_missing_or_wrong_is_said():
    objective = objectives.make("reg", encoder="clip")
    with pytest.raises(ConfigError, match=r"needs the class tokens token/clip, .*token/dinov2.*config\.encoders\.clip"):
        objective.apply(echo, batch(), CONTEXT)
    with pytest.raises(ConfigError, match=r"token/dinov2 are 3 wide: set config\.objective\.width = 3"):
        objectives.make("reg", width=7).apply(echo, batch(), CONTEXT)
    x, t, y, token = inputs()
    short = lambda *inputs, token: ((inputs[0][..., :1], token), ())  # noqa: E731
    with pytest.raises(
        ConfigError, match=r"predicts \(4, 4, 1\) and a token \(3,\), but REG needs \(4, 4, 2\) and \(3,\)"
    ):
        reg.regress(short, LINEAR, x, x, token, token, t, y)
    for options in ({"condition_drop": 1.5}, {"token_weight": -1.0}, {"width": 0}):
        ((name, value),) = options.items()
        with pytest.raises(ConfigError, match=f"{name} = {value}: must be at least"):
            objectives.make("reg", **options)


# --- The sampler.


def gaussian(mean, std):
    """The exact velocity of x ~ N(mean, std^2) on the linear path: E[noise - x | x_t]."""

    def velocity(x, t, t_step=None):
        gain = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return gain * (x - (1 - t) * mean) - mean

    return velocity


@pytest.mark.parametrize("solver", ["heun", "euler_maruyama", "sde_heun"])
def test_a_decoupled_pair_is_sampled_as_its_two_parts(solver):
    of_image, of_token = gaussian(0.7, 0.4), gaussian(-1.0, 1.5)

    def network(x_t, t, y, *, token):
        return (of_image(x_t, t[:, None, None, None]), of_token(token, t[:, None])), ()

    def solve(velocity, x, draws):
        if solver == "heun":
            return solvers.heun(velocity, x, solvers.uniform_times(20))
        times = solvers.last_step_times(20)
        return getattr(solvers, solver)(velocity, x, times, lambda i: jnp.asarray(draws)[i])

    image, token = normal(0, BATCH, *SHAPE), normal(1, BATCH, K)
    images, tokens = normal(2, 20, BATCH, *SHAPE), normal(3, 20, BATCH, K)
    velocity = guide(image_and_token.packed(network, SHAPE), batch()["y"], SPACE.conditions.null)
    together = jax.jit(partial(solve, velocity))(
        image_and_token.pack(image, token), jax.vmap(image_and_token.pack)(images, tokens)
    )
    found, found_token = image_and_token.unpack(together, SHAPE)
    np.testing.assert_allclose(found, jax.jit(partial(solve, of_image))(image, images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_token, jax.jit(partial(solve, of_token))(token, tokens), rtol=1e-4, atol=1e-5)


def test_the_sde_keeps_the_joint_marginal():
    """A pixel and a token that depend on each other: mean and covariance of the data."""
    mean, covariance = np.array([0.7, -0.3]), np.array([[0.16, 0.1], [0.1, 0.25]])
    values, vectors = np.linalg.eigh(covariance)

    def network(x_t, t, y, *, token):
        independent = jnp.concatenate([x_t[:, 0, 0], token], axis=1) @ vectors
        v = gaussian(mean @ vectors, values**0.5)(independent, t[:, None]) @ vectors.T
        return (v[:, :1, None, None], v[:, 1:]), ()

    count = 40_000
    noise = noise_of((count, 2))
    velocity = guide(image_and_token.packed(network, (1, 1, 1)), jnp.zeros(count, int), np.int32(1))
    times = solvers.last_step_times(400, last=0.005)
    pairs = np.asarray(solvers.euler_maruyama(velocity, noise(400), times, noise))
    # four standard errors, and the bias of a first-order method at 400 steps
    spread = np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(np.abs(pairs.mean(axis=0) - mean), 4 * spread / count**0.5 + 2e-3)
    of_covariance = np.sqrt((covariance**2 + np.outer(spread**2, spread**2)) / count)
    np.testing.assert_array_less(np.abs(np.cov(pairs.T) - covariance), 4 * of_covariance + 2e-3)


def labelled(x_t, t, y, *, token):
    """A network whose image's velocity is its label and whose token's is ten times that."""
    y = y.astype(jnp.float32)
    return (jnp.broadcast_to(y[:, None, None, None], x_t.shape), jnp.broadcast_to(10 * y[:, None], token.shape)), ()


@pytest.mark.parametrize(
    ("image", "token", "channels", "wanted"),
    [
        (3.0, 2.0, None, (4, 4, 30)),  # 1 + 3 (2 - 1), 10 + 2 (20 - 10)
        (3.0, 1.0, None, (4, 4, 20)),
        (1.0, 2.0, None, (2, 2, 30)),
        (3.0, 2.0, 1, (4, 2, 30)),
    ],
)
def test_each_scale_acts_on_its_own_part(image, token, channels, wanted):
    scales = jnp.asarray(image_and_token.scales(SHAPE, K, image, token, channels))
    network, interval = image_and_token.packed(labelled, SHAPE), (0.0, 0.85)
    velocity = guide(network, jnp.array([2]), np.int32(1), scale=scales, interval=interval)
    state, t = image_and_token.pack(jnp.zeros((1, *SHAPE)), jnp.zeros((1, K))), jnp.float32(0.5)
    found, found_token = image_and_token.unpack(velocity(state, t, t), SHAPE)
    np.testing.assert_array_equal(found, np.broadcast_to(wanted[:2], found.shape))
    np.testing.assert_array_equal(found_token, np.full((1, K), wanted[2]))
    outside, outside_token = image_and_token.unpack(velocity(state, jnp.float32(0.9), jnp.float32(0.9)), SHAPE)
    assert (outside == 2).all()
    assert (outside_token == 20).all()


def test_pairs_pack_and_unpack():
    image, token = normal(0, 3, *SHAPE), normal(1, 3, K)
    jax.tree.map(
        np.testing.assert_array_equal, image_and_token.unpack(image_and_token.pack(image, token), SHAPE), (image, token)
    )


def entangled():
    """A model whose image follows its token, and whose token follows the label."""

    def apply(params, x_t, t, y, *, token):
        v = jnp.tanh(token.sum(axis=1)) + 0.1 * y
        return (jnp.broadcast_to(v[:, None, None, None], x_t.shape), 0 * token + y[:, None]), ()

    return Model(lambda key: {}, apply)


def sampler(model, batch_size=8, token=K, **options):
    """labels -> images of `model`, as they are."""
    pixels = codecs.make("pixels")._replace(decode=None)
    given = {"solver": "euler", "steps": 4, "batch_size": batch_size} | options
    draw = samplers.make(model, pixels, SPACE, Objective(None, Flow(token=token)), sharding.make(), **given)
    return lambda labels: draw({}, {}, np.asarray(labels), 0)


def test_the_sampler_returns_images_that_depend_on_their_own_label_alone():
    labels = np.arange(11) % CLASSES
    run, at_once = (sampler(entangled(), size, solver="euler_maruyama") for size in (8, 16))
    images = run(labels)
    assert images.shape == (11, *SHAPE)
    np.testing.assert_allclose(at_once(labels), images, rtol=1e-5, atol=1e-6)
    changed = run(np.where(np.arange(11) == 3, (labels + 1) % CLASSES, labels))
    assert [i for i in range(11) if np.any(changed[i] != images[i])] == [3]


def test_the_tokens_scale():
    """None is cfg_scale, 0 and less are no guidance of the token; in the image the token's guidance is seen."""

    def run(scale):
        return sampler(entangled(), cfg_scale=2.0, token_cfg_scale=scale)(np.arange(8) % CLASSES)

    default, double, none, one, negative = map(run, (None, 2.0, 0.0, 1.0, -1.0))
    np.testing.assert_array_equal(default, double)
    np.testing.assert_array_equal(none, one)
    np.testing.assert_array_equal(negative, one)
    assert np.abs(one - double).max() > 1e-3
    with pytest.raises(ConfigError, match=r"token_cfg_scale = 2.0: the network has no class token"):
        sampler(make(inputs={}), token=None, token_cfg_scale=2.0)
    with pytest.raises(ConfigError, match=r"token_cfg_scale = inf: must be finite"):
        sampler(entangled(), token_cfg_scale=float("inf"))


# --- Runs.


def make_with_token(*, width: int = K):
    """The codec of pixels, and as a class token a fixed linear map of the image."""
    pixels = codecs.make("pixels")

    def encode(frozen, batch, key):
        flat = batch["x"].reshape(len(batch["x"]), -1)
        return pixels.encode(frozen, batch, key) | {"token/dinov2": flat @ normal(0, flat.shape[1], width) / 8}

    return pixels._replace(encode=encode)


@pytest.mark.slow
def test_a_run_trains_and_samples(tmp_path):
    config = digits.get_config()
    config.update({"total_steps": 3, "batch_size": 16, "log_every": 1})
    config.codec = slot("codecs", "tests.objectives.test_reg:make_with_token")
    config.model.update({"depth": 2, "width": 16, "heads": 2, "skip": "none"})
    config.objective = slot("objectives", "reg", width=K)
    del config.losses["diversity"]
    config.samples.update({"every": 0, "num": 10})
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 16, "token_cfg_scale": 2.0})
    config.evaluators = ConfigDict()
    state = train.run(config, tmp_path / "run")
    assert int(state["step"]) == 3
    assert np.any(state["params"]["token_final"]["kernel"]), "the token's head has not moved"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert (tmp_path / "run" / "samples.png").exists()
    release, _ = convert_checkpoint.of_run(tmp_path / "run", trust=True)
    arrays = releases.export(release.params, release.family, release.arch, release.sides)
    again = releases.load(arrays, {name: array.shape for name, array in arrays.items()}, heads=2)
    assert (again.family, again.arch, again.sides) == ("reg", release.arch, (8, 8))
    jax.tree.map(np.testing.assert_array_equal, again.params, jax.device_get(state["ema"]))


@pytest.mark.slow
def test_one_step_on_eight_devices_equals_one():
    made = parts(model=make(depth=2), objective=objectives.make("reg", width=K), null=SPACE.conditions.null)

    def step(layout):
        init = initializer(made, batch())
        where = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), layout)
        state = jax.jit(init, out_shardings=where)(jax.random.key(0))
        shard = jax.device_put(batch(), sharding.over_batch(layout))
        return jax.jit(partial(train_step, made), out_shardings=(where, sharding.replicated(layout)))(
            state, {}, shard, jax.random.key(1)
        )

    wanted, wanted_metrics = step(layout_of(1, 1))
    found, metrics = step(layout_of(2, 4))
    assert {"image", "token", "loss/objective"} <= metrics.keys()
    assert_close(metrics, wanted_metrics, "metrics")
    assert_close(found, wanted, "state", rtol=1e-4)
