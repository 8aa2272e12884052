"""Train and measure several runs of one row as one program: other seeds and learning rates, many steps a call."""

import contextlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from diversedit_jax.analysis.features import features, forward
from diversedit_jax.api import Batch, Params
from diversedit_jax.codecs import encoded
from diversedit_jax.data import pipeline
from diversedit_jax.diffusion.predictions import network_time
from diversedit_jax.metrics import similarity
from diversedit_jax.runs import build
from diversedit_jax.sampling.sampler import FINITE
from diversedit_jax.training.step import Components, initializer, train_step
from tools.studies.evidence.settings import PIECES, Size, config_of

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which the error of the velocity is measured
BLOCK_TIMES = (0.25, 0.5, 0.75)  # at which blocks are compared
SAMPLE_SEED = 0  # of the noise of the samples, the same for all rows and seeds
ONCE = {"xla_backend_optimization_level": 0}  # compiler options of programs that run once
SPREAD, SHARED = PartitionSpec("lanes"), PartitionSpec()


class Lane(NamedTuple):
    """A run of a row. factor: of the row's learning rate."""

    seed: int
    factor: float


class Engine:
    """The programs of a row. A program takes `width` lanes, spread over all devices and vmapped on each of them.

    Lanes share no arithmetic: each gives the numbers of its run alone, up to rounding.
    """

    def __init__(self, size: Size, row: str):
        config = config_of(size, row)
        dataset, self.size = build.open_data(config), size
        built = build.build(config, dataset.space, jax.devices()[:1])
        self.dataset, self.experiment = dataset, build.resident(built, dataset)
        self.mesh = jax.make_mesh((jax.device_count(),), ("lanes",))
        self.width = jax.device_count() * size.lanes
        self.frozen = self.put(self.experiment.components.codec.init(), SHARED)
        self._compiled: dict[Any, Callable] = {}
        self._examples = build.open_data(config, "test").source

    def put(self, tree: Any, spec: PartitionSpec) -> Any:
        """Put arrays on the devices: SPREAD by lane, or SHARED by all."""
        return jax.device_put(tree, NamedSharding(self.mesh, spec))

    def call(self, function: Callable, spread: Sequence[Any], shared: Sequence[Any]) -> Any:
        """Compute `function` for each lane. spread: arguments with an axis of lanes. shared: arguments without."""
        return self.compiled(function, spread, shared)()

    def compiled(
        self, function: Callable, spread: Sequence[Any], shared: Sequence[Any], **options: Any
    ) -> Callable[[], Any]:
        """Prepare a call. It compiles at the first call with arguments of these shapes. options: of the compiler."""
        spread, shared = self.put(tuple(spread), SPREAD), self.put(tuple(shared), SHARED)
        name = function, str(jax.tree.map(jnp.shape, (spread, shared)))
        if name not in self._compiled:

            def lanes(spread: Any, shared: Any) -> Any:
                return jax.vmap(lambda arguments: function(*arguments, *shared))(spread)

            specs = {"in_specs": (SPREAD, SHARED), "out_specs": SPREAD}
            program = jax.jit(jax.shard_map(lanes, mesh=self.mesh, check_vma=False, **specs))
            self._compiled[name] = program.lower(spread, shared).compile(options)
        return partial(self._compiled[name], spread, shared)

    def init(self, key: Array, batch: Batch) -> Any:
        """Initialise a lane as a run does."""
        return initializer(self.experiment.components, batch)(key)

    def steps(self, state: Any, batches: Batch, key: Array, factor: Array, frozen: Any) -> tuple[Any, dict[str, Array]]:
        """Train a lane on batches [steps b ...]."""
        components = scaled(self.experiment.components, factor)
        return jax.lax.scan(lambda state, batch: train_step(components, state, frozen, batch, key), state, batches)

    def samples(self, params: Params, y: Array, keys: Array, frozen: Any) -> UInt8[Array, "b h w c"]:
        """Draw samples of a lane, by the program of `Sampler`."""
        sampler = self.experiment.sampler()
        guidance = sampler.scales(sampler.cfg_scale), tuple(map(jnp.float32, sampler.guidance_interval))
        return inspect.unwrap(sampler.run)(params, None, frozen, y, keys, *guidance, jnp.int32(FINITE))[0]

    def velocity(self, params: Params, batch: Batch, frozen: Any) -> Float[Array, " t"]:
        """Compute the mean squared error of a lane's velocity, per element, on held-out images at TIMES."""
        parts, keys = self.experiment.components, jax.random.split(jax.random.key(0))
        ready = encoded(parts.codec, frozen, batch, keys[0])
        seen = forward(self.experiment, {"params": params}, frozen, ready, keys[1])

        def error(t: Array) -> Array:
            time = network_time(parts.objective.predicts, jnp.full(len(seen.x), t))
            found, _ = seen.rerun(parts.model.network(params), time)
            return jnp.mean((found - (seen.noise - seen.x)) ** 2)

        return jax.lax.map(error, jnp.array(TIMES))

    def blocks(self, params: Params, batch: Batch, frozen: Any) -> dict[str, Array]:
        """Compare the blocks of a lane on held-out images: means over BLOCK_TIMES, each [l l], [l] or [l d d]."""

        def at(t: Array) -> dict[str, Array]:
            stack = features(self.experiment, {"params": params}, frozen, batch, t, jax.random.key(0), False)
            tokens = stack.reshape(len(stack), -1, stack.shape[-1])
            centred = tokens - tokens.mean(axis=1, keepdims=True)
            return {
                "cka": similarity.cka(tokens),
                "cosine": similarity.token_cosine(stack),
                "centred_cosine": similarity.centred_cosine(stack),
                "mean_share": similarity.mean_share(stack),
                "norm": jnp.linalg.norm(tokens, axis=-1).mean(axis=1),
                "covariance": jnp.einsum("lnd,lne->lde", centred, centred, precision="highest") / tokens.shape[1],
            }

        return jax.tree.map(lambda found: found.mean(axis=0), jax.lax.map(at, jnp.array(BLOCK_TIMES)))

    def held_out(self, num: int) -> Batch:
        """The first held-out images."""
        return pipeline.stacked([self._examples[i] for i in range(num)])


def scaled(components: Components, factor: Array) -> Components:
    """Make the learning rate `factor` times as large."""
    optimizer = components.optimizer

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.tree.scale(factor, updates), state

    return components._replace(optimizer=optax.GradientTransformation(optimizer.init, update))


class Group:
    """At most `engine.width` runs of one row, which train together: states with an axis of lanes, and their progress.

    The last lane is repeated up to the width. seconds: of training, all lanes together, without compiling.
    trace: for each piece, the means of metrics over its steps, name -> one value per lane.
    """

    def __init__(self, engine: Engine, lanes: Sequence[Lane]):
        self.engine, self.lanes = engine, tuple(lanes)
        self.pieces, self.seconds, self.trace = 0, 0.0, []
        padded = self.lanes + self.lanes[-1:] * (engine.width - len(lanes))
        keys = jax.vmap(jax.random.split)(jnp.stack([jax.random.key(lane.seed) for lane in padded]))
        self._run_keys, self._factors = keys[:, 1], np.float32([lane.factor for lane in padded])
        self._seeds = [lane.seed for lane in padded]
        with contextlib.closing(self._feed(lanes[0].seed, 0)) as feed:
            example = next(feed)
        self.states = engine.compiled(engine.init, [keys[:, 0]], [example], **ONCE)()

    def _feed(self, seed: int, start: int) -> Iterator[Batch]:
        options = {"num_threads": 0, "timeout": 0.0, "resident": True}
        return pipeline.batches(self.engine.dataset, self.engine.size.batch, seed, start, **options)

    def train(self) -> None:
        """Train all lanes for one piece of their steps."""
        engine, count = self.engine, self.engine.size.steps // PIECES
        first = self.pieces * count

        def batches(seed: int) -> Batch:
            with contextlib.closing(self._feed(seed, first)) as feed:
                return jax.tree.map(lambda *parts: np.stack(parts), *itertools.islice(feed, count))

        read = {seed: batches(seed) for seed in set(self._seeds)}
        numbers = jax.tree.map(lambda *parts: np.stack(parts), *(read[seed] for seed in self._seeds))
        spread = self.states, numbers, self._run_keys, self._factors
        run = engine.compiled(engine.steps, spread, [engine.frozen])
        started = time.perf_counter()
        self.states, metrics = jax.block_until_ready(run())
        self.seconds += time.perf_counter() - started
        metrics = {name: np.asarray(values) for name, values in metrics.items()}
        if "diversity/weight" in metrics:
            metrics["diversity/active"] = metrics["diversity/weight"] > 0
        lanes = range(len(self.lanes))
        self.trace.append({name: [float(values[i].mean()) for i in lanes] for name, values in metrics.items()})
        self.pieces += 1

    def measure(self, conditions: Any) -> tuple[list[dict[str, Any]], UInt8[np.ndarray, "lanes n h w c"]]:
        """Measure the EMA network of each lane. Returns numbers, and samples for these conditions [n ...]."""
        engine, size, ema = self.engine, self.engine.size, self.states["ema"]
        errors = engine.call(engine.velocity, [ema], [engine.held_out(size.held_out), engine.frozen])
        blocks = jax.device_get(engine.call(engine.blocks, [ema], [engine.held_out(size.blocks), engine.frozen]))
        # here, because XLA's eigenvalues never end if two CPU devices ask for them at once
        blocks["rank"] = jax.device_get(similarity.effective_rank(jnp.asarray(blocks.pop("covariance"))))
        num, chunk = len(jax.tree.leaves(conditions)[0]), size.sampler["batch_size"]
        keys = jax.random.key_data(jax.vmap(partial(jax.random.fold_in, jax.random.key(SAMPLE_SEED)))(np.arange(num)))
        drawn = []
        for begin in range(0, num, chunk):
            y, some = jax.tree.map(lambda leaf, begin=begin: leaf[begin : begin + chunk], (conditions, keys))
            drawn.append(np.asarray(engine.call(engine.samples, [ema], [y, some, engine.frozen])))
        found = []
        for lane in range(len(self.lanes)):
            of_lane = {name: values[lane].tolist() for name, values in blocks.items()}
            found.append({"velocity": np.asarray(errors)[lane].tolist(), "blocks": of_lane})
        return found, np.concatenate(drawn, axis=1)[: len(self.lanes)]
