"""Volumes from end to end: a small network learns, draws a grid, and its samples and real solids are judged."""

import json

import numpy as np
import pytest

import diversedit_jax
from diversedit_jax import data, train
from diversedit_jax.configs import solids


@pytest.mark.slow
def test_a_short_run_on_volumes_learns_samples_and_is_judged(tmp_path):
    config = solids.get_config()
    config.update({"total_steps": 200, "batch_size": 32, "ema_decay": 0.9, "log_every": 50})
    config.model.update({"depth": 2, "width": 48})
    config.sampler.update({"steps": 4, "batch_size": 32})
    config.samples.num, config.evaluators.solids.num = 8, 64
    config.checkpoint.every = config.samples.every = config.evaluators.solids.every = 0
    train.run(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    source = data.make("solids", "test").source
    spread = np.var(np.stack([source[i]["x"] for i in range(400)]), axis=0).mean()
    losses = [one["loss/objective"] for one in records if "loss/objective" in one]
    assert losses[-1] < spread, "the mean of all solids would have the loss `spread`"
    judged = next(one for one in records if "solids/accuracy" in one)
    assert judged["solids/real/accuracy"] > 0.97
    assert judged["solids/accuracy"] > 1 / 8
    assert list((tmp_path / "samples").glob("*.png"))
    samples = diversedit_jax.load(tmp_path).sample(labels=[0, 7], num=4, steps=2)
    assert (samples.shape, samples.dtype) == ((4, 16, 16, 16, 1), np.uint8)
    assert samples.names == ["ball", "cross", "ball", "cross"]
