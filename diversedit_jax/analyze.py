"""See how a network's representations differ from block to block: a report of figures with their numbers.

    python -m diversedit_jax.analyze --workdir=runs/digits
    python -m diversedit_jax.analyze --workdir=SiT=runs/sit --compare DiverseDiT=runs/diversedit REPA=runs/repa
    python -m diversedit_jax.analyze --checkpoint=SiT-XL-2-256.pt --family=official_sit --data=latents=LATENTS

Nothing is trained. All checkpoints of a run are compared at one time of the diffusion (--time), the last one closely.
What is compared has a name, by default that of its folder or file; of several with the same name, seeds of one setting,
means and standard deviations are shown. Writes report.html, which holds everything; every figure as .png and .svg with
its numbers in a .csv; and analysis.json, with the settings.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diversedit_jax import config as configs
from diversedit_jax import losses
from diversedit_jax.analysis import heatmaps, html_page, known_scores, measure, paper_figures
from diversedit_jax.analysis.drawing import by_label
from diversedit_jax.analysis.measure import Estimator, Settings
from diversedit_jax.analysis.study import PARTS, Study, study
from diversedit_jax.errors import CheckpointError, ConfigError
from diversedit_jax.evaluation import tables
from diversedit_jax.metrics import similarity
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.runs import flags as run_flags
from diversedit_jax.runs import trained
from diversedit_jax.runs.trained import Trained
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.cli import silence
from diversedit_jax.runtime.files import writable_folder, write_json
from diversedit_jax.runtime.versions import versions

TIME, TIMES = 0.05, (0.05, 0.25, 0.5, 0.75, 0.95)
SUPPOSED = ("diversity",)
CAPTURES = {
    "merged": "output of a block, behind its long residual connection",
    "block": "output of a block, before its long residual connection",
}
# Layouts of the paper (arXiv 2603.04239): options where nothing else is said, and the parts that are looked at. The
# final denoising step begins at t = 0.04.
FIG2 = {"kernel": "rbf", "hsic": "biased", "unit": "pooled", "time": 0.04}
PRESETS = {
    "figure2": (FIG2 | {"at": ["5000", "50000", "200000", "450000"]}, ()),
    "figure_a2": (FIG2 | {"at": ["last"], "times": [0.96, 0.8, 0.6, 0.4, 0.2, 0.04]}, ("times",)),
    "table_a2": (FIG2 | {"at": ["50000", "100000", "200000", "400000", "450000"]}, ()),
}


def named(text: str) -> tuple[str | None, Path]:
    """LABEL=PATH or PATH."""
    label, mark, path = text.partition("=")
    if not mark or Path(text).expanduser().exists():
        return None, Path(text).expanduser()
    return label or None, Path(path).expanduser()


def steps_of(found: Trained, at: Sequence[str]) -> list[int]:
    """The steps that --at chooses of a run: all, last, or numbers; those of the numbers that it has."""
    if not found.steps:
        raise CheckpointError(f"no checkpoint in {found.workdir}")
    if list(at) == ["all"] or found.workdir is None:
        return list(found.steps)
    if list(at) == ["last"]:
        return [found.steps[-1]]
    wanted = run_flags.numbers("at", list(at), int)
    chosen = [step for step in found.steps if step in wanted]
    if not chosen:
        has = ", ".join(map(str, found.steps))
        raise ConfigError(f"--at={','.join(at)}: {found.label} has no such step; it has {has}")
    return chosen


def summary(studies: Sequence[Study]) -> list[list[str]]:
    """A row for each setting: its last checkpoint in numbers, means over seeds ± standard deviations."""
    name = known_scores.column([one.looks[-1].scores for one in studies], known_scores.DISTANCES)
    rows = [
        [
            "",
            "step",
            "mean CKA",
            "neighbours",
            "effective rank",
            "best probe",
            known_scores.title(name) if name else "FID",
        ]
    ]
    for label, group in by_label(studies).items():
        looks = [one.looks[-1] for one in group]
        probes = [100 * float(np.max(one.close.probe)) for one in group if one.close.probe is not None]
        distances = [one.scores[name] for one in looks if name in one.scores]
        rows.append(
            [
                label,
                ", ".join(f"{step:,}" for step in sorted({one.step for one in looks})) if looks[0].step else "-",
                spread([1 - one.diversity["all"] for one in looks], 3),
                spread([1 - one.diversity["adjacent"] for one in looks], 3),
                spread([float(np.mean(one.rank)) for one in looks], 1),
                f"{spread(probes, 1)}%" if probes else "-",
                spread(distances, 3) if distances else "-",
            ]
        )
    return rows


def spread(values: Sequence[float], places: int) -> str:
    """The mean of some numbers and, of several, their standard deviation."""
    more = f" ± {np.std(values, ddof=1):.{places}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{places}f}{more}"


def check(chosen: Sequence[Trained]) -> None:
    """Raise ConfigError where networks of one label are not seeds of one setting."""
    for label, group in by_label(chosen).items():
        depths = {found.about["model"].get("depth") or found.about["model"].get("size") for found in group}
        if len(depths) > 1:
            raise ConfigError(f"{label} names networks of different depth: give each its own, LABEL=PATH")


def run(
    chosen: Sequence[Trained],
    folder: Path,
    settings: Settings,
    t: float = TIME,
    times: Sequence[float] = TIMES,
    at: Sequence[str] = ("all",),
    parts: Sequence[str] = tuple(PARTS),
    layout: str | None = None,
    weights: str = "ema",
    supposed: Sequence[str] = SUPPOSED,
) -> list[Study]:
    """Analyse trained networks and write the report to `folder`; returns what was found.

    weights: of `trained.WEIGHTS`. supposed: losses whose gradients are taken where a network has none.
    """
    measure.check(settings)
    for name, values in (("--time", [t]), ("--times", times)):
        for value in values:
            in_range(name, value, 0, 1)
    check(chosen)
    steps = [steps_of(found, at) for found in chosen]
    main_process = jax.process_index() == 0
    if main_process:
        writable_folder(folder, "--out")

    def say(line: str) -> None:
        if main_process:
            print(line, flush=True)

    others = {f"{name} (not trained)": losses.make(name) for name in supposed}
    options = {"weights": weights, "supposed": others}
    studies = [
        study(found, own, settings, t, times, parts, say, **options) for found, own in zip(chosen, steps, strict=True)
    ]
    if not main_process:
        return studies
    draw = heatmaps.draw_all if layout is None else paper_figures.LAYOUTS[layout]
    drawn = draw(folder, studies, settings.estimator.name())
    table = summary(studies)
    notes = list(dict.fromkeys(f"{one.label}: {note}" for one in studies for note in one.notes))
    said = described(settings, t, studies, weights)
    title = f"Representations of {', '.join(by_label(studies))}"
    html_page.write(folder / "report.html", title, table, drawn, notes, said)
    write_record(folder / "analysis.json", settings, t, times, studies)
    print(tables.aligned(table, left=1))
    for note in notes:
        print(f"note: {note}")
    print(f"written to {folder / 'report.html'} and, figure by figure, beside it")
    return studies


def described(settings: Settings, t: float, studies: Sequence[Study], weights: str) -> dict[str, str]:
    """Everything that can change a number, in words."""
    about = studies[0].about
    images = ", ".join(sorted({f"{one.about['images']} of {one.about['of']}" for one in studies}))
    return {
        "similarity": settings.estimator.name(),
        "time": f"{t:g} (0 is data, 1 is noise)",
        "images": f"{images}, split {settings.split}, order and noise by seed {settings.seed}",
        "draws of noise": str(settings.noises),
        "labels": settings.labels,
        "weights": weights if about["kind"] == "run" else "of the release",
        "features": CAPTURES.get(about["model"].get("capture"), "output of a block"),
        **versions(),
    }


def write_record(path: Path, settings: Settings, t: float, times: Sequence[float], studies: Sequence[Study]) -> None:
    """What was analysed and how, for machines; the numbers themselves are in the .csv files."""
    record = {
        "settings": settings._replace(estimator=settings.estimator._asdict())._asdict()
        | {"time": t, "times": list(times)},
        "subjects": [{"label": one.label, **one.about} for one in studies],
        "diversity": [
            {"label": one.label, "step": look.step, **look.diversity} for one in studies for look in one.looks
        ],
        "versions": versions(),
    }
    write_json(path, record, default=str)


def data_of(text: str | None) -> dict[str, Any] | None:
    """The slot that --data=NAME=DIR,OPTION=VALUE,... names."""
    if text is None:
        return None
    ((name, options),) = cli.named_files("data", [text]).items()
    given = ({"data_dir": options.pop("file")} if "file" in options else {}) | options
    return configs.slot("data", name, **given).to_dict()


def chosen_by_flags(given: flags.FlagValues, others: Sequence[str]) -> list[Trained]:
    """What the flags name, the first of --workdir or --checkpoint."""
    if (given.workdir is None) == (given.checkpoint is None):
        raise ConfigError("give --workdir=DIR of a run or --checkpoint=FILE of a release, and others with --compare")
    data = data_of(given.data)

    def opened(text: str) -> Trained:
        label, path = named(text)
        if (path / configs.FILE).exists() or (path.is_dir() and not given.checkpoint):
            found = trained.of_run(path, data=data, model={"capture": given.capture}, encoders=True)
        elif path.exists():
            about = (given.family, given.heads, given.weights, given.side)
            found = trained.of_release(path, *about, data=data, vae=given.vae, model={"capture": given.capture})
            found.data("train")  # says now what is missing
        else:
            raise ConfigError(f"{path} does not exist: wanted the directory of a run or a file of weights")
        if (has := found.about["model"].get("capture", "merged")) != given.capture:
            raise ConfigError(f"--capture={given.capture}: the model of {path} has only {has!r}")
        return found._replace(label=label or (path.name if found.workdir else path.stem))

    return [opened(text) for text in (given.workdir or given.checkpoint, *others)]


def parts_of(skipped: Sequence[str]) -> list[str]:
    """All parts but those."""
    for name in skipped:
        one_of("--skip", name, PARTS)
    return [name for name in PARTS if name not in skipped]


def applied(preset: str | None, known: Any) -> Mapping[str, Any]:
    """The values of the flags, with those of a preset where a flag is not given."""
    options = PRESETS[preset][0] if preset else {}
    return {
        name: options[name] if name in options and not known[name].present else known[name].value for name in OPTIONS
    }


OPTIONS = ("unit", "kernel", "hsic", "at", "time", "times")

if __name__ == "__main__":
    run_flags.define_release_flags()
    flags.adopt_module_key_flags(run_flags)  # so that --help lists them
    flags.DEFINE_string("workdir", None, "Directory of a run, or LABEL=DIR.")
    flags.DEFINE_multi_string("compare", [], "More runs or files of weights, [LABEL=]PATH, one after another.")
    flags.DEFINE_string(
        "data", None, "NAME=DIR,OPTION=VALUE,...: data to show, of `data`; by default those of the run."
    )
    flags.DEFINE_string("vae", None, "Autoencoder that decodes a release's latents, for pictures of what is seen.")
    flags.DEFINE_enum("preset", None, list(PRESETS), "A layout of the paper: other flags change its choices.")
    flags.DEFINE_list("at", ["all"], "Checkpoints to look at: all, last, or steps.")
    flags.DEFINE_float("time", TIME, "Where checkpoints are compared: 0 is data, 1 is noise.")
    flags.DEFINE_list("times", [f"{t:g}" for t in TIMES], "Where the last checkpoint is looked at besides.")
    flags.DEFINE_enum("unit", "pooled", list(measure.UNITS), "; ".join(f"{k}: {v}" for k, v in measure.UNITS.items()))
    flags.DEFINE_enum("kernel", "linear", list(similarity.KERNELS), "Of CKA.")
    flags.DEFINE_enum("hsic", "unbiased", measure.HSICS, "Estimator; minibatch: averaged over batches, unbiased.")
    flags.DEFINE_float("multiplier", 1.0, "Of the median distance, for the bandwidth of rbf.")
    flags.DEFINE_integer("degree", 3, "Of the polynomial kernel.")
    flags.DEFINE_integer("num", 512, "Images.")
    flags.DEFINE_integer("batch", 8, "Images at a time, over all devices.")
    flags.DEFINE_integer("noises", 1, "Draws of noise for every image.")
    flags.DEFINE_enum("labels", "real", ["real", "null"], "What the network is told: the class, or the label of none.")
    flags.DEFINE_enum(
        "capture", "merged", list(CAPTURES), "Features behind skip connections (merged), or before (block)."
    )
    flags.DEFINE_bool("online", False, "The weights that are trained, not their EMA.")
    flags.DEFINE_string("split", None, "Split of the data; by default test, where there is one.")
    flags.DEFINE_integer("seed", 0, "Of the choice of images, of noise and times.")
    flags.DEFINE_list("losses", list(SUPPOSED), "Losses whose gradients are taken where a network has none.")
    flags.DEFINE_list("skip", [], "Parts to leave out: " + "; ".join(f"{k}: {v}" for k, v in PARTS.items()) + ".")
    flags.DEFINE_string("out", None, "Directory to write to; by default `analysis` in that of the run.")

    def main(extra: list[str]) -> None:
        """Read the flags and run."""
        silence()
        given = flags.FLAGS
        if extra and not given.compare:
            raise ConfigError(f"unexpected argument {extra[0]!r}")
        option = applied(given.preset, given)
        estimator = Estimator(option["unit"], option["kernel"], option["hsic"], given.multiplier, given.degree)
        chosen = chosen_by_flags(given, [*given.compare, *extra])
        split = measure.split_of(chosen[0].data, given.split)
        settings = Settings(estimator, given.num, given.batch, given.noises, given.labels, split, given.seed)
        times = run_flags.numbers("times", list(map(str, option["times"])), float)
        first = chosen[0]
        default = first.workdir / "analysis" if first.workdir else Path(f"{first.label}_analysis").absolute()
        folder = Path(given.out).expanduser() if given.out else default
        parts = PRESETS[given.preset][1] if given.preset else parts_of(given.skip)
        more = {"weights": "online" if given.online else "ema", "supposed": given.losses}
        run(chosen, folder, settings, option["time"], times, option["at"], parts, given.preset, **more)

    cli.launch(main, arguments=True, several=True)
