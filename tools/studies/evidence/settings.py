"""What the study compares, and how: sizes, rows, and the statistics, which are fixed here before anything runs.

Primary endpoint: the Frechet distance at the last step, of the EMA network, as the ratio to SiT of the same seed, with
its 95% interval over seeds (`statistics`). Everything else is exploratory.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import default
from diversedit_jax.registry import one_of

PIECES = 8  # a run trains in so many turns
MEASURED = (2, 4, 8)  # after these it is measured: at 25%, 50% and 100% of its steps
FACTORS = (1.0, 0.5)  # of the learning rate, from which each row takes the better one
TUNING_SEED = 1000  # of the runs that choose the factor; seeds of results are below it
BASELINE = "sit"

Change = Callable[[ConfigDict], None]


class Size(NamedTuple):
    """A size of the study.

    data: name and options of the data set. features: the file of its classifier, beside this program.
    batch, steps: of training. model: options of the network. rate: the learning rate before FACTORS.
    seeds: how many by default. rows: of ROWS, by default.
    num: samples that are scored. held_out: images for the error of the velocity. blocks: images for measures of blocks.
    sampler: options of the sampler. lanes: runs that train at a time on each device.
    """

    data: tuple[str, Mapping[str, Any]]
    features: str
    batch: int
    steps: int
    model: dict[str, Any]
    rate: float
    ema: float
    seeds: int
    rows: tuple[str, ...]
    num: int
    held_out: int
    blocks: int
    sampler: dict[str, Any]
    lanes: int


class Row(NamedTuple):
    """A row of the study: its label in tables, and its changes to the plain SiT."""

    label: str
    changes: tuple[Change, ...]


def skips(form: str, init: str | None = None) -> Change:
    """Long residual connections."""

    def change(config: ConfigDict) -> None:
        config.model.update({"skip": form, "skip_init": init})

    return change


def diversity(**options: Any) -> Change:
    """The diversity loss."""

    def change(config: ConfigDict) -> None:
        config.losses.diversity = slot("losses", "diversity", **options)

    return change


def sra(config: ConfigDict) -> None:
    """SRA at the places of its paper: 3 -> 8 of 12 blocks, in proportion for other depths."""
    depth = config.model.depth
    places = {"block": max(1, depth // 4), "teacher_block": max(2, depth * 2 // 3)}
    config.losses.sra = slot("losses", "sra", **places, decay_epochs=None)


def dispersive(config: ConfigDict) -> None:
    """The dispersive loss at a quarter of the depth, over 16 examples at a time, as in its paper."""
    blocks = (max(1, config.model.depth // 4),)
    config.losses.dispersive = slot("losses", "dispersive", blocks=blocks, groups=max(1, config.batch_size // 16))


def deeper(config: ConfigDict) -> None:
    """One block more: a network whose step costs about as much as one with long residual connections."""
    config.model.depth += 1


def late(config: ConfigDict) -> None:
    """The diversity loss grows from 0 over the first half of the steps."""
    config.losses.diversity.warmup_steps = config.total_steps // 2


def decorrelated(config: ConfigDict) -> None:
    """The covariance form of the dispersive loss, at three blocks."""
    depth = config.model.depth
    blocks = tuple(max(1, depth * part // 4) for part in (1, 2, 3))
    config.losses.dispersive = slot("losses", "dispersive", form="covariance", blocks=blocks)


METHODS = {
    "sit": Row("SiT", ()),
    "deeper": Row("SiT, one block more", (deeper,)),
    "skips": Row("+ long residuals", (skips("release"),)),
    "loss": Row("+ diversity loss", (diversity(),)),
    "both": Row("DiverseDiT (both)", (skips("release"), diversity())),
    "identity": Row("both, identity at start", (skips("release", "identity"), diversity())),
    "paper": Row("both, merge before block", (skips("paper"), diversity())),
    "sra": Row("SRA", (sra,)),
    "sra_both": Row("SRA + DiverseDiT", (sra, skips("release"), diversity())),
    "disp": Row("DispLoss", (dispersive,)),
}

IDENTITY = skips("release", "identity")
ALONE = {"weights": (0.0, 1.0, 0.0)}  # L_MI only: L_orth of centred features is 0

# Further forms of the method. Only the best go on to the seeds that count.
FORMS = {
    "id_skips": Row("identity skips, no loss", (IDENTITY,)),
    "gate": Row("gated skips, no loss", (skips("gate"),)),
    "gate_loss": Row("gated skips, loss", (skips("gate"), diversity())),
    "gate_all": Row("gated skips, all pairs", (skips("gate"), diversity(rule="all"))),
    "gate_updates": Row("gated, updates, all pairs", (skips("gate"), diversity(target="updates", rule="all", **ALONE))),
    "uvit": Row("U-ViT's skips, no loss", (skips("uvit"),)),
    "centred": Row("identity, centred features", (IDENTITY, diversity(target="centred", **ALONE))),
    "updates": Row("identity, centred updates", (IDENTITY, diversity(target="updates", **ALONE))),
    "updates_all": Row("identity, updates, all pairs", (IDENTITY, diversity(target="updates", rule="all", **ALONE))),
    "cka": Row("identity, CKA, later block learns", (IDENTITY, diversity(compare="cka", detach="first", **ALONE))),
    "mirror": Row("identity, mirror pairs", (IDENTITY, diversity(rule="mirror"))),
    "adjacent": Row("identity, adjacent pairs", (IDENTITY, diversity(rule="adjacent"))),
    "all": Row("identity, all pairs", (IDENTITY, diversity(rule="all"))),
    "smooth": Row("identity, continuous ramp", (IDENTITY, diversity(denominator="hi-lo", detach_weight=True))),
    "late": Row("identity, late start", (IDENTITY, diversity(), late)),
    "constant": Row("identity, weight 0.001", (IDENTITY, diversity(preset="release_const"))),
    "weight_1": Row("both, constant weight 1", (skips("release"), diversity(weight="constant"))),
    "range_2_7": Row("both, range [0.2, 0.7]", (skips("release"), diversity(lo=0.2, hi=0.7))),
    "range_3_9": Row("both, range [0.3, 0.9]", (skips("release"), diversity(lo=0.3, hi=0.9))),
    "decorrelated": Row("identity, decorrelated channels", (IDENTITY, decorrelated)),
}
ROWS = METHODS | FORMS


class Contrast(NamedTuple):
    """A number of one row, compared with that of another. measure: of `report.COLUMNS`."""

    question: str
    measure: str
    row: str
    against: str


CONTRASTS = (
    Contrast("both parts, at equal cost", "frechet", "both", "deeper"),
    Contrast("the loss, beside long residuals", "frechet", "both", "skips"),
    Contrast("long residuals, beside the loss", "frechet", "both", "loss"),
    Contrast("identity at start", "frechet", "identity", "both"),
    Contrast("merge before the block", "frechet", "paper", "both"),
    Contrast("DiverseDiT, beside SRA", "frechet", "sra_both", "sra"),
    Contrast("SRA, beside DiverseDiT", "frechet", "sra_both", "both"),
    Contrast("the loss, beside identity skips", "frechet", "identity", "id_skips"),
    Contrast("gated skips", "frechet", "gate", "skips"),
    Contrast("gated skips, loss of updates", "frechet", "gate_updates", "both"),
    Contrast("constant weight 1", "frechet", "weight_1", "both"),
    Contrast("range [0.2, 0.7]", "frechet", "range_2_7", "both"),
    Contrast("range [0.3, 0.9]", "frechet", "range_3_9", "both"),
    *(
        Contrast(f"{name}: {parts}", measure, row, BASELINE)
        for measure, name in (("cka", "CKA of blocks"), ("rank", "effective rank"))
        for row, parts in (
            ("skips", "long residuals"),
            ("loss", "the loss"),
            ("both", "both parts"),
            ("gate_updates", "gated, loss of updates"),
        )
    ),
)

SIZES = {
    "cpu": Size(
        data=("fashion", {"size": 16}),
        features="fashion.safetensors",
        batch=32,
        steps=400,
        model={"depth": 12, "width": 64, "heads": 4, "patch": 4, "unroll": False, "remat": "none"},
        rate=6e-3,
        ema=0.98,
        seeds=4,
        rows=tuple(METHODS),
        num=1_000,
        held_out=500,
        blocks=64,
        sampler={"solver": "heun", "steps": 6, "cfg_scale": 1.0, "batch_size": 500},
        lanes=1,
    ),
    "gpu": Size(
        data=("fashion", {"size": 32}),
        features="fashion.safetensors",
        batch=256,
        steps=4000,
        model={"depth": 12, "width": 256, "heads": 4, "patch": 4, "dtype": "bfloat16", "remat": "none"},
        rate=5e-4,
        ema=0.999,
        seeds=3,
        rows=("sit", "skips", "loss", "both", "sra"),
        num=10_000,
        held_out=2_000,
        blocks=64,  # 4,096 tokens: CKA holds matrices of tokens x tokens, for every block and lane
        sampler={"solver": "heun", "steps": 25, "cfg_scale": 1.0, "batch_size": 2_000},
        lanes=3,
    ),
}

# Eight times the training of `cpu`, for the parts of DiverseDiT: do they pay off later?
SIZES["cpu_long"] = SIZES["cpu"]._replace(steps=3200, ema=0.99, rows=("sit", "skips", "both", "gate"))

# For further turns of a GPU: colour photographs, and a deeper network, which takes longer than 9 minutes.
SIZES["gpu_cifar10"] = SIZES["gpu"]._replace(data=("cifar10", {}), features="cifar10.safetensors")
SIZES["gpu_deep"] = SIZES["gpu"]._replace(model=SIZES["gpu"].model | {"depth": 28})

SIZES["small"] = SIZES["gpu"]._replace(  # only to try whether the program runs
    batch=8,
    steps=16,
    model=SIZES["gpu"].model | {"depth": 4, "width": 32, "heads": 2},
    seeds=1,
    rows=("sit", "both"),
    num=40,
    held_out=20,
    blocks=20,
    sampler=SIZES["gpu"].sampler | {"steps": 2, "batch_size": 40},
)


def config_of(size: Size, row: str, seed: int = 0) -> ConfigDict:
    """Make the config of a run. A run by `diversedit_jax.train` with it gives the same network."""
    name, options = size.data
    config = default.get_config()
    config.seed, config.total_steps, config.batch_size = seed, size.steps, size.batch
    config.data = slot("data", name, **options)
    config.input.resident = True
    config.codec = slot("codecs", "pixels")
    config.model.update(size.model)
    config.optim.learning_rate, config.ema_decay = size.rate, size.ema
    config.sampler.update(size.sampler)
    for change in ROWS[one_of("--rows", row, ROWS)].changes:
        change(config)
    return config
