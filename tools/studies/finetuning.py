"""Ask whether a trained SiT gets better when it is given the parts of DiverseDiT, on the digits.

    python -m tools.studies.finetuning --steps=1000 --out=tools/studies/records/finetuning.json

For each seed a plain SiT is trained and written as an official release. From that file it goes on as it is, with long
residual connections that change nothing at first, with the diversity loss, and with both; all for as many steps, by the
rates of configs/finetune.py. The same command goes on after the seeds that OUT holds. Writes OUT (.json) and the table
beside it (.md). The flags are those of tools.studies.methods.
"""

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax.config import slot
from diversedit_jax.runs import starting
from diversedit_jax.runtime import cli
from diversedit_jax.training import optimizer
from diversedit_jax.training.step import started_from
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tools.studies import methods
from tools.studies.evidence.statistics import paired_ratio
from tools.studies.methods import BATCH, NUM, STEPS, Method, Results

FAMILY, PLAIN = "official_sit", "goes on as it is"
SCORES = {"frechet": ("Fréchet distance", 3), "accuracy": ("accuracy, %", 1), "similarity": ("similarity of blocks", 3)}


def official(config: ConfigDict) -> None:
    """Train the network of the official SiT, of the same size."""
    size = {name: config.model[name] for name in ("depth", "width", "heads", "patch")}
    config.model = slot("models", FAMILY, **size)


def go_on(config: ConfigDict) -> None:
    """Go on from the release of a seed, at a tenth of the rate."""
    official(config)
    config.init_from.update({"file": "set for each seed", "family": FAMILY, "heads": config.model.heads})
    config.optim.learning_rate /= 10


def residuals(config: ConfigDict) -> None:
    """Add long residual connections that change nothing at first, at the whole rate."""
    config.model.update({"skip": "release", "skip_init": "identity"})
    same = {name: config.optim[name] for name in ("decay", "warmup_steps")}
    config.groups.new = optimizer.group("^params/merges/", learning_rate=10 * config.optim.learning_rate, **same)


def diversity(config: ConfigDict) -> None:
    """Add the diversity loss, as released, over a tenth of the steps."""
    methods.diversity(config)
    config.losses.diversity.warmup_steps = STEPS.value // 10


ROWS = {
    PLAIN: (go_on,),
    "+ long residuals": (go_on, residuals),
    "+ diversity loss": (go_on, diversity),
    "+ both": (go_on, residuals, diversity),
}


def trained(method: Method, seed: int, file: Path | None = None) -> Any:
    """Train a method with one seed, from a release if one is given. Return its EMA."""
    key_init, key_run = jax.random.split(jax.random.key(seed))
    config = configs.copied(method.built.config)
    state = method.init(key_init)
    if file is not None:
        config.init_from.file = str(file)
        shapes = jax.eval_shape(lambda: state["params"])
        state = started_from(state, starting.start(method.built._replace(config=config), shapes).params)
    loader = methods.batches(config, seed)
    for _ in range(STEPS.value):
        state, _ = method.step(state, method.frozen, next(loader), key_run)
    return state["ema"]


def scores(method: Method, params: Any, seed: int) -> dict[str, float]:
    """Score a network: its samples, and the similarity of its blocks."""
    found = dict(method.judge(partial(method.sampler, params, method.frozen, seed=seed)))
    similarity = methods.similarity(method, params)
    return {"frechet": found["frechet"], "accuracy": 100 * found["accuracy"], "similarity": similarity}


def write_release(method: Method, params: Any, file: Path) -> None:
    """Write a network as the official SiT writes it."""
    model, space = method.built.config.model, method.built.space
    channels = space.shape[-1]
    arch = releases.Architecture(
        **{name: model[name] for name in ("depth", "width", "heads", "patch")},
        channels=channels,
        out_channels=2 * channels,
        num_classes=space.conditions.classes,
    )
    write_safetensors(file, releases.export(jax.device_get(params), FAMILY, arch, space.shape[:2]))


def of_seed(first: Method, rows: Mapping[str, Method], seed: int) -> Results:
    """Train a SiT with one seed, and let all rows start from its file."""
    ema = trained(first, seed)
    results = {"before": scores(first, ema, seed)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sit.safetensors")
        write_release(first, ema, file)
        for name, method in rows.items():
            results[name] = scores(method, trained(method, seed, file), seed)
            print(f"seed {seed}: {name}: {results[name]}; before: {results['before']}", flush=True)
    return results


def table(results: Mapping[str, Results]) -> str:
    """Write means over seeds ± standard deviations as a Markdown table, and the ratio to the first row."""
    titles = [*(title for title, _ in SCORES.values()), "Fréchet distance, times the first row"]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    distances = {
        row: {int(seed): found[row]["frechet"] for seed, found in results.items()} for row in ("before", *ROWS)
    }
    for row in distances:
        cells = []
        for column, (_, places) in SCORES.items():
            values = [found[row][column] for found in results.values()]
            spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{places}f}{spread}")
        cells.append("1" if row == PLAIN else str(paired_ratio(distances[row], distances[PLAIN])))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def of_seeds(seeds: Sequence[int]) -> Iterator[tuple[int, Results]]:
    """Train all rows with each seed."""
    first = methods.prepare((official,))
    rows = {name: methods.prepare(changes) for name, changes in ROWS.items()}
    yield from ((seed, of_seed(first, rows, seed)) for seed in seeds)


def main() -> None:
    """Train the seeds that --out does not hold yet."""
    cli.silence()
    methods.study({"steps": STEPS.value, "batch_size": BATCH.value, "num": NUM.value}, of_seeds, table)


if __name__ == "__main__":
    flags.adopt_module_key_flags(methods)
    cli.launch(main)
