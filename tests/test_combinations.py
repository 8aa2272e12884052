"""Every objective trains with every choice of up to three auxiliary losses, on eight devices, with a sharded state.

So do the text-to-image network and U-ViT, with the objectives that they are trained with.
"""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import losses, models, objectives, registry, sharding
from diversedit_jax.api import Codec, Conditions, Space
from diversedit_jax.training import optimizer
from diversedit_jax.training.step import Components, initializer, train_step
from diversedit_jax.weights.dit import STEPS as DISCRETE
from diversedit_jax.weights.dit import VP_NOISE

SHAPE, CLASSES, BATCH, TOKENS, WIDTH, STEPS = (4, 4, 2), 5, 16, 4, 6, 20
CONTEXT = (3, 8)  # tokens of a text, and their width

# What an objective, the model for it, and a loss with it need beside their defaults.
OBJECTIVE = {("reg", "dit"): {"width": WIDTH}, ("ddpm", "uvit"): DISCRETE, ("flow_matching", "uvit"): VP_NOISE}
MODEL = {("ddpm", "dit"): {"out_channels": 4}}
LOSS = {
    "repa": {"block": 2, "width": 16},
    "sra": {"block": 2, "teacher_block": 2},
    "dispersive": {"blocks": (2,), "groups": 2},
    "diversity": {"groups": 2},
}
BOTH = {("ddpm", "sra"): {"num_timesteps": 1000}, ("reg", "repa"): {"class_token": True}}

LOSSES, OBJECTIVES = registry.known("losses"), registry.known("objectives")
CHOICES = [chosen for n in range(4) for chosen in combinations(LOSSES, n)]
CASES = [
    pytest.param(objective, chosen, "dit", id="-".join((objective, *chosen)))
    for objective in OBJECTIVES
    for chosen in CHOICES
]
CASES += [
    pytest.param(objective, chosen, network, id="-".join((network, objective, *chosen)))
    for network, objective in (("mmdit", "flow_matching"), ("uvit", "flow_matching"), ("uvit", "ddpm"))
    for chosen in CHOICES
]


def stored(network: str) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"x": SHAPE, "features/dinov2": (TOKENS, WIDTH), "token/dinov2": (WIDTH,)}
    batch = {key: rng.standard_normal((BATCH, *shape), dtype=np.float32) for key, shape in shapes.items()}
    y = rng.integers(CLASSES, size=BATCH, dtype=np.int32)
    if network == "mmdit":
        y = {"context": rng.standard_normal((BATCH, *CONTEXT), dtype=np.float32)}
    return jax.tree.map(jnp.asarray, batch | {"y": y})


def run_of(objective: str, chosen: tuple[str, ...], network: str) -> Components:
    made = {name: losses.make(name, **LOSS.get(name, {}), **BOTH.get((objective, name), {})) for name in chosen}
    trained = objectives.make(objective, **OBJECTIVE.get((objective, network), {}))
    conditions = Conditions.labels(CLASSES)
    if network == "mmdit":
        conditions = Conditions({"context": np.zeros(CONTEXT, np.float32)})
    cuts = [block for loss in made.values() for block in loss.blocks]
    dims = {"depth": 4, "width": 32, "heads": 2, "mlp_ratio": 2.0, "remat": "none"}
    dims |= MODEL.get((objective, network), {})
    dims |= {} if network == "uvit" else {"skip": "release"}  # U-ViT has its own skips
    model = models.make(network, Space(SHAPE, conditions), trained.inputs, cuts, **dims)
    transform, _ = optimizer.make(STEPS, learning_rate=1e-3)
    codec = Codec(dict, lambda frozen, batch, key: batch, None)
    return Components(model, codec, trained, made, transform, ema_decay=0.9, null=conditions.null)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "chosen", "network"), CASES)
def test_it_trains(objective, chosen, network):
    parts = run_of(objective, chosen, network)
    layout = sharding.make(data=2, fsdp=4).with_rules(parts.model.rules)
    batch = jax.device_put(stored(network), sharding.over_batch(layout))
    init, key = initializer(parts, batch), jax.random.key(0)
    where = sharding.shardings(jax.eval_shape(init, key), layout)
    assert any(not sharded.is_fully_replicated for sharded in jax.tree.leaves(where)), "nothing is sharded"

    def train(state, batch):
        def step(state, _):
            new, metrics = train_step(parts, state, {}, batch, key)
            return jax.lax.with_sharding_constraint(new, where), metrics

        return jax.lax.scan(step, state, length=STEPS)

    start = jax.jit(init, out_shardings=where)(key)
    state, metrics = jax.jit(train)(start, batch)
    assert state["step"] == STEPS
    for path, leaf in jax.tree.leaves_with_path((state, metrics)):
        assert jnp.isfinite(leaf).all(), jax.tree_util.keystr(path)
    assert {f"loss/{name}" for name in chosen} < metrics.keys()
    for path, first in jax.tree.leaves_with_path(start["losses"]):
        last = dict(jax.tree.leaves_with_path(state["losses"]))[path]
        assert jnp.any(first != last), f"the head {jax.tree_util.keystr(path)} does not train"
