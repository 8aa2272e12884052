"""Text to image from end to end: a third of the run already draws the right size and colour at the right place."""

import json

import pytest

from diversedit_jax import train
from diversedit_jax.configs import captioned_digits


@pytest.mark.slow
def test_a_short_run_learns_what_captions_say(tmp_path):
    config = captioned_digits.get_config()
    config.update({"total_steps": 700, "ema_decay": 0.98})
    config.sampler.steps, config.evaluators.captioned_digits.num = 10, 128
    config.checkpoint.every = config.samples.every = config.evaluators.captioned_digits.every = 0
    train.run(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = next(one for one in records if "captioned_digits/seen/all" in one)
    for kind in ("seen", "held_out"):
        for name in ("colour", "size", "place"):
            assert found[f"captioned_digits/{kind}/{name}"] > 0.9, f"{kind}/{name}"
