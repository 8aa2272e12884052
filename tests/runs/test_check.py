"""What a config may be: its keys, all mistakes told at once, numbers that devices have, and options found early."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from diversedit_jax import analyze, config, evaluate, registry, sample
from diversedit_jax.analysis import drawing, measure
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import default, digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import tables
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.runs import build
from diversedit_jax.runs.check import FACTORIES, KEYS, check
from diversedit_jax.runs.trained import Source
from diversedit_jax.runtime.files import flat
from diversedit_jax.training import optimizer
from tests import ROOT

UNOPENED = Source(*[None] * len(Source._fields))
DIGITS = Space((8, 8, 1), Conditions.labels(10))


def test_every_key_of_the_default_config_is_known():
    tree = default.get_config().to_dict()
    own = {key for key in flat(tree) if key.partition(".")[0] not in (*config.SINGLE, *FACTORIES)}
    assert own == KEYS.keys()


def test_all_unknown_keys_are_told_at_once():
    made = digits.get_config()
    made.ema_deacy = 0.9
    made.model.dept = 3
    made.losses.diversity.coeficient = 1.0
    made.losses.other = slot("losses", "dispersive")  # own labels are no unknown keys
    made.groups.deep = optimizer.group("^params/deep/")
    made.groups.deep.learn_rate = 1e-3
    made.checkpoint.evry = 5
    made.evaluators.scores.rference = "x"
    del made.evaluators["digits"]
    with pytest.raises(ConfigError) as caught:
        check(made)
    assert set(re.findall(r"(config[\w.]+): no key '\w+'; did you mean '(\w+)'", str(caught.value))) == {
        ("config.ema_deacy", "ema_decay"),
        ("config.model.dept", "depth"),
        ("config.losses.diversity.coeficient", "coefficient"),
        ("config.groups.deep.learn_rate", "learning_rate"),
        ("config.checkpoint.evry", "every"),
        ("config.evaluators.scores.rference", "reference"),
    }


@pytest.mark.slow
def test_the_programs_name_an_unknown_key_of_a_config_file(tmp_path):
    lines = ["from diversedit_jax.configs import digits", "def get_config():", "    config = digits.get_config()"]
    (tmp_path / "mine.py").write_text("\n".join([*lines, "    config.ema_deacy = 0.9", "    return config"]))
    for program in ("diversedit_jax.train", "tools.check_config"):
        command = [sys.executable, "-m", program, f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 78
        assert done.stderr == "error: config.ema_deacy: no key 'ema_deacy'; did you mean 'ema_decay'?\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_backend_that_jax_does_not_find_is_one_line(tmp_path):
    command = [sys.executable, "-m", "diversedit_jax.train", "--config=configs/digits.py", f"--workdir={tmp_path}/run"]
    environment = os.environ | {"JAX_PLATFORMS": "abacus"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 78
    assert re.fullmatch(r"error: Unable to initialize backend 'abacus'.*\n", done.stderr)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("x", int, "must be a whole number"),
        (True, int, "must be a whole number"),
        (1.0, int, "must be a whole number"),
        (2**31, int, "must be at most 2147483647 in size"),
        (1e39, float, r"must be 0, or 1.2e-38 to 3.4e\+38 in size, as float32 is"),
        (1e-39, float, r"must be 0, or 1.2e-38 to 3.4e\+38 in size, as float32 is"),
        (float("nan"), float | None, "must be finite"),
        ((0.5, float("inf")), tuple[float, float], "must be finite"),
        ((0.5,), tuple[float, float], r"must be \(a number, a number\)"),
        (("a", 1), tuple[str, ...] | None, r"must be \(a word, ...\) or None"),
        ("", str, "must be a word"),
        (1, bool, "must be True or False"),
    ],
)
def test_a_value_must_be_of_the_type_that_a_signature_declares(value, kind, said):
    with pytest.raises(ConfigError, match=rf"^here = .*: {said}$"):
        registry.fits("here", value, kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(1, float), (2**31 - 1, int), (None, int | None), ([1, 2], tuple[int, ...]), ((), tuple[int, ...]), (-0.0, float)],
)
def test_other_values_pass(value, kind):
    registry.fits("here", value, kind)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_a_seed_is_not_another_seed_to_jax(seed):
    draw = build.build(digits.get_config(), DIGITS).sampler()
    for use in (
        lambda: draw(None, None, np.arange(2), seed),
        lambda: evaluate.of_source(UNOPENED, {}, draw, 10, None, seed),
        lambda: measure.check(analyze.Settings(seed=seed)),
    ):
        with pytest.raises(ConfigError, match=rf"seed = {seed}: must be at least 0 and at most {2**32 - 1}"):
            use()


@pytest.mark.parametrize("num", [0, 2**31])
def test_the_number_of_samples_fits_into_32_bits(num):
    draw = build.build(digits.get_config(), DIGITS).sampler()
    for use in (
        lambda: sample.run(UNOPENED, num=num),
        lambda: evaluate.of_source(UNOPENED, {}, draw, num, None, 0),
    ):
        with pytest.raises(ConfigError, match=rf"num = {num}: must be at least 1 and at most {2**31 - 1}"):
            use()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("similarity", {"split": "dev"}, "split = 'dev': .*known: train, test"),
        ("similarity", {"num": 4, "batch": 8}, "num=4 of 360 examples: not one batch of 8"),
        ("similarity", {"kernel": "linaer"}, "kernel = 'linaer' is unknown; did you mean 'linear'"),
        ("scores", {"extractor": "digits", "labels": "balancd"}, "labels = 'balancd' is unknown"),
        ("digits", {"data_dir": "/dev/null/x"}, "data_dir|not a directory|Not a directory"),
    ],
)
def test_evaluators_find_wrong_options_before_training(name, options, said):
    spec = SampleSpec.of(build.build(digits.get_config(), DIGITS))
    with pytest.raises(ConfigError, match=rf"^config.evaluators.mine.*({said})"):
        config.make("evaluators", slot("evaluators", name, **options), "config.evaluators.mine", spec)


def test_names_may_have_dollars(tmp_path):
    with drawing.figure(tmp_path, "one", ["x"], [], (3.0, 2.0)) as figure:
        axes = figure.subplots()
        axes.plot([1, 2], [1, 1000], label="$x^$")
        axes.set(title=r"$\frac$", yscale="log")
        axes.legend()
    assert "$x^$" in (tmp_path / "one.svg").read_text()
    rows = [({"cfg_scale": scale}, {"fid": scale}) for scale in (1.0, 2.0)]
    tables.plot_sweep(tmp_path / "sweep.png", rows, "10 samples of $x^$, step 5")
    assert (tmp_path / "sweep.png").exists()


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "5", '"x"', "{", "", "\0", "[" * 10**5, '{"a":' * 500 + "1" + "}" * 500, "[" * 900 + "]" * 900],
)
def test_a_config_json_of_another_form_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^[^\n]*config.json[^\n]*$"):
        config.load(tmp_path)
    assert not config.holds_run(tmp_path)
