"""Every config builds, and one training step of it traces at full size; the config files say what they must."""

import contextlib
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from ml_collections import ConfigDict, config_flags

from diversedit_jax import codecs, models, objectives, registry, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Conditions, Space
from diversedit_jax.configs import default
from diversedit_jax.data import pipeline
from diversedit_jax.data.latents import FORMAT, MOMENTS
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build
from diversedit_jax.runs.check import KEYS, check
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import flat
from diversedit_jax.sampling import sampler
from diversedit_jax.training import optimizer
from diversedit_jax.training.step import initializer, train_step
from tests import ROOT, captioned
from tests.data.test_latents import png, write
from tests.reference import DATA

NAMES = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "variants"})
RECIPES = ("sit", "diversedit", "repa", "sra", "disp", "mean_flow")  # in all sizes
# By default the largest of each kind; the others differ in a size or lack a loss. Tracing takes seconds.
CHOSEN = ["diversedit:xl2,512", "dit:", "repa:l2,diversedit", "repa:dinov2@5,mae@10", "disp:b2,diversedit,sra"]
CHOSEN += ["mean_flow:xl2,diversedit", "reg:b2", "photos:", "mmdit:repa,diversedit", "video:xl2,repa,diversedit"]
CHOSEN += ["uvit:l4,sra,disp,diversedit_const"]
OTHERS = ["default:", "digits:", "diversedit:b2,gated", "dit:512", "reg:xl2", "reg:xl2,diversedit", "reg:b2,512"]
OTHERS += [f"mmdit:coco{method}" for method in ("", ",repa", ",sra", ",disp", ",diversedit", ",sra,disp")]
OTHERS += ["captioned_digits:", "moving_digits:", "solids:", "mmdit:uvit,repa"]
OTHERS += ["video:l2,joint", "video:b2,joint,diversedit", "video:l2,sra,repa"]
OTHERS += ["uvit:h2", "uvit:l2", "uvit:coco,stored", "uvit:coco,repa,sra,disp,diversedit", "uvit:h4,repa,diversedit"]
OTHERS += [f"{name}:{size},{side}" for name in RECIPES for size in ("b2", "l2", "xl2") for side in (256, 512)]
OTHERS += [f"{name}:{size},diversedit" for name in RECIPES[2:] for size in ("b2", "l2", "xl2")]
VARIANTS = CHOSEN + [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name not in CHOSEN]
MILLIONS = {"sit:b2": 130.30, "sit:l2": 457.82, "sit:xl2": 674.82}
MILLIONS["mmdit:coco"] = 505.07
MILLIONS |= {"video:xl2,repa,diversedit": 712.06, "video:l2,joint": 457.82}  # attention over frames has no parameters
MILLIONS |= {"uvit:h2": 500.83, "uvit:l2": 286.76}  # its authors: 501 and 287
MILLIONS["dit:"] = 674.83  # its authors count the position table too: 675.13
MILLIONS |= {"diversedit:b2": 137.40, "diversedit:l2": 483.05, "diversedit:xl2": 712.06}
MILLIONS |= {"mean_flow:xl2": 676.44, "mean_flow:xl2,diversedit": 713.68}
MILLIONS |= {"reg:b2": 131.49, "reg:xl2": 676.59, "reg:xl2,diversedit": 713.83}


def recipe(name: str):
    """The config that `configs/FILE.py:VARIANT` names, given as `FILE:VARIANT`."""
    file, _, variant = name.partition(":")
    build = importlib.import_module(f"diversedit_jax.configs.{file}").get_config
    return build(variant) if variant else build()


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Small data sets in the layout of ImageNet latents, by the side of a latent."""

    def image(side: int):
        shape = (8 * side, 8 * side, 3)
        feature = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
        return {"image": (feature, lambda index: np.zeros(shape, np.uint8))}

    label = tfds.features.ClassLabel(num_classes=1000)
    made = {
        side: write(tmp_path_factory.mktemp(f"l{side}"), 4, (2, side, side, 8), label=label, more=image(side))
        for side in (32, 64)
    }
    frame = np.zeros((256, 256, 3), np.uint8)
    frames = tfds.features.Sequence(tfds.features.Image(shape=frame.shape, encoding_format="png"), length=16)
    pictures = {"image": (frames, lambda index: [png(frame)] * 16)}
    videos = write(tmp_path_factory.mktemp("videos"), 2, (2, 16, 32, 32, 8), label=label, more=pictures)
    (Path(videos) / "latents.json").write_text(json.dumps({"format": FORMAT, "moments": MOMENTS, "video": True}))
    return made | {16: videos}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_step_traces_at_full_size(name, latents):
    config = recipe(name)
    small = {"digits:": 8, "moving_digits:": 8, "captioned_digits:": 16, "solids:": 16}
    side = small.get(name, 64 if re.search("512|[hl]4", name) else 32)
    side = 16 if name.startswith("video:") else side  # the frames of a clip
    if config.data.name == "latents":
        config.data.data_dir = latents[side]
    for encoder in config.encoders.values():  # a small DINOv2 stands for any, which has the file's names
        encoder.update({"name": "dinov2", "file": str(DATA / "dinov2.safetensors"), "heads": 4})
    if config.text_encoder is not None and config.text_encoder.name == "clip_text":  # a small one as wide stands for it
        config.text_encoder.file = str(captioned.encoder(768))
        config.data = configs.slot("data", "tests.captioned:make_latents", image=config.data.image)
    if "vae" in config.codec:
        config.codec.vae = None  # decoding has tests of its own
    dataset = build.open_data(config)
    assert dataset.space.shape[0] == side
    parts = build.build(config, dataset.space).components
    wanted = MILLIONS.get(name.removesuffix(",256").replace("512", "256").removesuffix(",256"))
    if wanted is not None:
        bare = configs.copied(config)
        bare.encoders, bare.losses = ConfigDict(), ConfigDict()
        init = build.build(bare, build.open_data(config).space).components.model.init
        count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
        assert count / 1e6 == pytest.approx(wanted, abs=0.01)
    if "width" in config.objective:
        config.objective.width = 48  # of the class token of that small DINOv2
        parts = build.build(config, dataset.space).components
    loader = pipeline.batches(dataset, 1, seed=config.seed, num_threads=0)
    one = next(loader)
    loader.close()
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype), one)
    key = jax.random.key(0)
    state = jax.eval_shape(initializer(parts, batch), key)
    after, metrics = jax.eval_shape(partial(train_step, parts), state, parts.codec.init(), batch, key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [leaf.shape for leaf in jax.tree.leaves(state)]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state["params"], state["ema"])))
    assert {"loss/total", "loss/objective", "grad_norm"} <= metrics.keys()
    assert ("loss/diversity" in metrics) == ("diversedit" in name or name.endswith(("digits:", "photos:", "solids:")))
    words = name.replace("reg:", "repa:").replace(":", ",").split(",")
    for word, loss in {"repa": "repa", "sra": "sra", "disp": "dispersive"}.items():
        assert any(key.startswith(f"loss/{loss}") for key in metrics) == (word in words)


def test_the_training_step_lowers_for_tpus():
    """Without one, and without libtpu: the rules that turn each operation into what a TPU runs. It is not compiled."""
    config = recipe("digits:")
    dataset = build.open_data(config)
    parts = build.build(config, dataset.space).components
    with contextlib.closing(pipeline.batches(dataset, config.batch_size, seed=0, num_threads=0)) as batches:
        batch = jax.tree.map(jnp.asarray, next(batches))
    key = jax.random.key(0)
    state = jax.eval_shape(initializer(parts, batch), key)
    traced = jax.jit(partial(train_step, parts)).trace(state, jax.eval_shape(parts.codec.init), batch, key)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("stablehlo.dot_general") > 50


@pytest.mark.parametrize("name", [name for name in NAMES if name != "default"])
def test_a_config_says_its_command_hardware_and_expected_numbers(name):
    text = importlib.import_module(f"diversedit_jax.configs.{name}").__doc__
    assert f"python -m diversedit_jax.train --config=configs/{name}.py" in text
    assert "Hardware: " in text
    assert "Expected" in text
    command = re.search(rf"--config=configs/({name}).py:?([\w,]*)", text)
    recipe(f"{command[1]}:{command[2]}")
    for row in re.findall(r"^    \|(.*)\|$", text, re.MULTILINE):  # each variant in a table is one
        for cell in (cell.strip() for cell in row.split("|")):
            if re.fullmatch(r"(b2|l2|xl2|[hl][24]|coco|\w+@\d+)(,\S+)*", cell):
                recipe(f"{name}:{cell}")


def test_default_holds_every_option_at_the_signatures_default():
    config = default.get_config()
    for held, make in [(config.optim, optimizer.make), (config.sampler, sampler.make)]:
        given = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
        for name, value in held.to_dict().items():
            assert value == given[name], name


def test_slots_hold_all_options_and_know_the_types_of_those_not_set():
    config = configs.slot("losses", "diversity", k=5)
    assert config.name == "diversity"
    assert config.k == 5
    assert config.lo is None
    config.lo = 0.2
    with pytest.raises(TypeError):
        config.rule = 7
    with pytest.raises(ConfigError, match="no option 'kk'; did you mean 'k'"):
        configs.slot("losses", "diversity", kk=5)


def test_check_names_each_required_option_that_is_not_set():
    config = recipe("repa:dinov2@5,mae@10")
    for place in ("data.data_dir", "encoders.dinov2.file", "encoders.mae.file"):
        with pytest.raises(ConfigError, match=rf"^config\.{place} is not set; give it with --config\.{place}=VALUE$"):
            check(config)
        config.update_from_flattened_dict({place: "somewhere"})
    check(config)
    config.losses.repa_mae_10.name = "repaa"
    with pytest.raises(ConfigError, match=r"config.losses.repa_mae_10.name: unknown name 'repaa'; did you mean 'repa'"):
        check(config)


def test_the_launcher_knows_by_the_text_of_a_config_whether_it_needs_data():
    script = (
        'source launch/common.sh; for file in "$@"; do if needs_data "configs/$file.py"; then echo "$file"; fi; done'
    )
    done = subprocess.run(["bash", "-c", script, "bash", *NAMES], cwd=ROOT, capture_output=True, text=True, check=True)
    found = []
    for name in NAMES:
        try:
            check(recipe(name))
        except ConfigError as error:
            found += [name] * ("config.data.data_dir" in str(error))
    assert done.stdout.split() == found


def test_a_config_survives_its_file(tmp_path):
    config = default.get_config()
    config.sampler.guidance_interval = (0.0, 0.7)
    assert configs.claim(tmp_path, config) == []
    assert configs.claim(tmp_path, config) == [], "tuples and lists are the same in JSON"
    assert flat(configs.load(tmp_path).to_dict()) == flat(config.to_dict())
    config.log_every = 7
    assert configs.claim(tmp_path, config) == ["config.log_every: 100 -> 7"]
    config.objective.path = "cosine"
    with pytest.raises(ConfigError, match=r"objective.path: 'linear' there, 'cosine' given"):
        configs.claim(tmp_path, config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 1, "seed: 0 there, 1 given"),
        ("batch_size", 512, "batch_size: 256 there, 512 given"),
        ("data.data_dir", "other", "data.data_dir: None there, 'other' given"),
        ("optim.learning_rate", 1e-3, "optim.learning_rate: 0.0001 there, 0.001 given"),
        ("data.num_classes", 10, None),
        ("total_steps", 7, None),
        ("log_every", 7, None),
        ("watchdog", 7.0, None),
        ("mesh.fsdp", 4, None),
        ("input.num_workers", 2, None),
        ("checkpoint.every", 7, None),
        ("samples.every", 7, None),
    ],
)
def test_a_run_goes_on_with_the_same_training_and_other_reports(key, value, message, tmp_path):
    config = default.get_config()
    configs.claim(tmp_path, config)
    old = flat(config.to_dict())[key]
    config.update_from_flattened_dict({key: value})
    if message is None:
        assert configs.claim(tmp_path, config) == [f"config.{key}: {old!r} -> {value!r}"]
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            configs.claim(tmp_path, config)


def test_a_damaged_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0')
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        configs.load(tmp_path)


def test_several_alignments_share_the_coefficient():
    config = recipe("repa:dinov2@5,mae@10")
    assert set(config.encoders) == {"dinov2", "mae"}
    assert {(c.encoder, c.block, c.coefficient) for c in config.losses.values()} == {
        ("dinov2", 5, 0.25),
        ("mae", 10, 0.25),
    }


@pytest.mark.parametrize(("size", "block"), [("b2", 5), ("l2", 8), ("xl2", 8)])
def test_with_repa_the_diversity_loss_knows_the_aligned_block(size, block):
    config = recipe(f"repa:{size},diversedit")
    assert config.losses.diversity.aligned == config.losses.repa.block == block


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sit:xl", "variant = 'xl' is unknown; did you mean 'xl2'? known: b2, l2, xl2, 256, 512"),
        ("sit:diversedit", "variant = 'diversedit' is unknown; known: b2, l2, xl2, 256, 512"),
        ("dit:b2", "variant = 'b2' is unknown; "),
        ("repa:b2,256,xl2", "variant 'b2,256,xl2': give one of b2, xl2"),
        ("sra:256,512", "variant '256,512': give one of 256, 512"),
        ("uvit:h2,l4", "variant 'h2,l4': give one of h2, l4"),
        ("uvit:stored", "variant 'stored': only coco has stored text features"),
        ("uvit:diversedit,diversedit_const", "give one of diversedit, diversedit_const"),
        ("repa:dinov2@x", "variant 'dinov2@x': an alignment is encoder@block, such as dinov2@5"),
    ],
)
def test_a_variant_that_does_not_exist_is_named(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe(name)


MISTAKES = {  # the text of a config file, and its error
    "config = digits.get_config()\n    config.losses.div = slot('losses', 'diversty')": (
        "line 5: losses: unknown name 'diversty'; did you mean 'diversity'?"
    ),
    "config = digits.get_config()\n    config.losses.div = slot('losses', 'repa', taw=1)": (
        "line 5: diversedit_jax.losses.repa: no option 'taw'; did you mean 'tau'?"
    ),
    "config = digits.get_config()\n    config.modl.patch = 3": "line 5: no key 'modl'; did you mean 'model'?",
    "return digts.get_config()": "line 4: NameError: name 'digts' is not defined",
    "import numpyy": "line 4: No module named 'numpyy'",
    "return None.foo": "line 4: AttributeError: 'NoneType' object has no attribute 'foo'",
    "return 1 / 0": "line 4: ZeroDivisionError: division by zero",
    "return (": "line 4: '(' was never closed",
    "pass": " get_config() returns None, wanted the config",
}


@pytest.fixture
def parsed(monkeypatch):
    """Arguments of a program with --config -> what they mean."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])  # ml_collections looks there for overrides
        monkeypatch.delitem(sys.modules, "config_config", raising=False)
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
        flags.mark_flags_as_required(["config"], flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        return cli.parse(sys.argv)

    return parse


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # how ml_collections imports a file
@pytest.mark.parametrize("body", MISTAKES)
def test_a_mistake_in_a_config_file_is_named_with_its_line(body, parsed, tmp_path):
    head = "from diversedit_jax.configs import digits\nfrom diversedit_jax.config import slot\ndef get_config():\n    "
    (tmp_path / "mine.py").write_text(f"{head}{body}\n")
    with pytest.raises(ConfigError) as caught:
        parsed(f"--config={tmp_path}/mine.py")
    assert re.search(rf"mine.py[,:] ?{re.escape(MISTAKES[body])}", str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sit.py:xl"],
            r"sit.py, line \d+: variant = 'xl' is unknown; did you mean 'xl2'\? known: b2, l2, xl2, 256, 512",
        ),
        (["digits.py:small"], "digits.py has no variants: leave out what follows the colon"),
        (["digit.py"], "config: file .*digit.py not found"),
        (["digits.py", "--config.model.pach=3"], "config.model.pach: no key 'pach'; did you mean 'patch'?"),
        (["digits.py", "--config.modle.patch=3"], "config.modle.patch: no key 'modle'; did you mean 'model'?"),
        (["digits.py", "--config.model.patch=two"], "flag --config.model.patch=two: invalid literal"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_with_its_key(arguments, message, parsed):
    file, *more = arguments
    with pytest.raises(ConfigError, match=message):
        parsed(f"--config={ROOT}/configs/{file}", *more)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_without_a_config_is_named(parsed, tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"mine.py has no function get_config\(\)"):
        parsed(f"--config={tmp_path}/mine.py")


SIGNED = {"coefficient", "dispersion_scale", "time_mean", "bias", "token_cfg_scale"}  # numbers that may be below 0
SPACE = Space((8, 8, 1), Conditions.labels(10))
SLOTS = [(kind, name) for kind in ("losses", "objectives", "models") for name in registry.known(kind)]
SLOTS += [("codecs", "vae")]


def numbers(config):
    """The numbers of a config: key -> its type."""
    kinds = {key: config.get_type(key) if value is None else type(value) for key, value in config.items()}
    return {key: kind for key, kind in kinds.items() if kind in (int, float)}


@pytest.mark.parametrize(("kind", "name"), [*SLOTS, ("", "sampler"), ("", "optim")])
def test_every_number_of_a_slot_has_its_range(kind, name):
    """-1 is refused where only a count or a share can be meant, and what is not finite everywhere, by the full key."""
    build_slot = {"sampler": sampler.make, "optim": optimizer.make}.get(name)
    first = configs.options(build_slot) if build_slot else configs.slot(kind, name)
    place = f"config.{name}"
    more = (SPACE, {}, ()) if kind == "models" else ()
    parts = models.make("dit", SPACE, depth=2, width=16, heads=2), codecs.make("pixels"), SPACE
    trained = objectives.make("flow_matching")

    def make(config):
        if name == "sampler":
            given = configs.keywords(config, place, sampler.make)
            with configs.named(place, given):
                return sampler.make(*parts, trained, sharding.make(), **given)
        if name == "optim":
            return optimizer.grouped(10, configs.keywords(config, place, optimizer.make), {})
        return configs.make(kind, config, place, *more)

    for key, number in numbers(first).items():
        for wrong in (number(-1), *([math.nan, math.inf] if number is float else [])):
            if wrong == -1 and key in SIGNED:
                continue
            if key in ("block", "teacher_block", "hi", "out_channels") and wrong == -1:
                continue  # the network knows how many blocks it has; the others are told in other words
            config = configs.copied(first)
            config[key] = wrong
            with pytest.raises(ConfigError, match=rf"^config.{name}.{key} = {wrong}: must be"):
                make(config)


def test_every_other_number_of_a_config_has_its_range():
    config = default.get_config()
    own = [key for key in config if isinstance(config[key], int | float) and not isinstance(config[key], bool)]
    inside = [f"{top}.{key}" for top in ("checkpoint", "samples") for key in numbers(config[top])]
    ranged = {key for key, (_, limits) in KEYS.items() if limits and not key.startswith(("mesh.", "init_from."))}
    assert {*own, *inside} - {"checkpoint.lower"} == ranged
    for key in ranged:
        for wrong in (-1, 2**32, math.nan):
            if wrong == 2**32 and key != "seed":
                continue
            tree, (place, _, last) = config.to_dict(), key.rpartition(".")
            (tree[place] if place else tree)[last] = wrong
            with pytest.raises(ConfigError, match=rf"config.{key} = {wrong}: must be"):
                check(ConfigDict(tree))
