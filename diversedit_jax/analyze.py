"""Report how a network's representations differ from block to block, without training.

    python -m diversedit_jax.analyze --workdir=runs/digits
    python -m diversedit_jax.analyze --workdir=SiT=runs/sit --compare DiverseDiT=runs/diversedit REPA=runs/repa
    python -m diversedit_jax.analyze --checkpoint=SiT-XL-2-256.pt --family=official_sit --data=latents=LATENTS

All checkpoints of a run are compared at one time of the diffusion (--time), the last one also in detail. Networks with
the same LABEL (by default the name of the folder or file) count as seeds of one setting: the report shows means and
standard deviations. report.html holds everything. Each figure is also a .png and a .svg, with its numbers in a .csv.
analysis.json holds the settings.
"""

import time
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
from diversedit_jax.analysis.study import PARTS, Study, faults, study
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.evaluation import tables
from diversedit_jax.metrics import similarity
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.runs import flags as run_flags
from diversedit_jax.runs import trained
from diversedit_jax.runs.trained import Trained
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.cli import silence
from diversedit_jax.runtime.files import writable_folder, write_json
from diversedit_jax.runtime.progress import done, say
from diversedit_jax.runtime.versions import versions
from diversedit_jax.weights import hub

TIME, TIMES = 0.05, (0.05, 0.25, 0.5, 0.75, 0.95)
SUPPOSED = ("diversity",)
CAPTURES = {
    "merged": "output of a block, behind its long residual connection",
    "block": "output of a block, before its long residual connection",
}
# Layouts of the paper (arXiv 2603.04239): defaults of the flags, and the parts to analyse. The final denoising step
# begins at t = 0.04.
FIG2 = {"kernel": "rbf", "hsic": "biased", "unit": "pooled", "time": 0.04}
PRESETS = {
    "figure2": (FIG2 | {"at": ["5000", "50000", "200000", "450000"]}, ()),
    "figure_a2": (FIG2 | {"at": ["last"], "times": [0.96, 0.8, 0.6, 0.4, 0.2, 0.04]}, ("times",)),
    "table_a2": (FIG2 | {"at": ["50000", "100000", "200000", "400000", "450000"]}, ()),
}
GROUPS = {
    "The networks": [
        "workdir",
        "checkpoint",
        "compare",
        "at",
        "online",
        "trust_workdir",
        "family",
        "heads",
        "weights",
        "side",
        "vae",
    ],
    "What they are shown": ["data", "split", "num", "batch", "labels", "noises", "seed", "time", "times"],
    "How features are compared": ["unit", "kernel", "hsic", "multiplier", "degree", "capture"],
}
OPTIONS = ("unit", "kernel", "hsic", "at", "time", "times")  # the flags that a preset may change


def named(text: str) -> tuple[str | None, Path]:
    """Split LABEL=PATH. The label is None if only a path is given."""
    label, mark, path = text.partition("=")
    if not mark or Path(text).expanduser().exists():
        return None, Path(text).expanduser()
    return label or None, Path(path).expanduser()


def steps_of(found: Trained, at: Sequence[str]) -> list[int]:
    """Choose the steps of a run that --at names: all, last, or those of the given numbers that it has."""
    words = {"last": [found.last], "all": found.steps}
    name = "all" if found.workdir is None else ",".join(at)
    if name in words:
        return list(words[name])
    wanted = run_flags.numbers("at", list(at), int)
    chosen = [step for step in found.steps if step in wanted]
    if not chosen:
        has = ", ".join(map(str, found.steps))
        raise ConfigError(f"--at={name}: {found.label} has no such step; it has {has}")
    return chosen


def summary(studies: Sequence[Study]) -> list[list[str]]:
    """Return a table with a row for each setting: its last checkpoint, as means over seeds ± standard deviations."""
    name = known_scores.column([one.looks[-1].scores for one in studies], known_scores.DISTANCES)
    distance = known_scores.title(name) if name else "FID"
    rows = [["", "step", "mean CKA", "neighbours", "effective rank", "best probe", distance]]
    texts = any(one.looks[-1].text is not None for one in studies)
    if texts:
        rows[0][4:4] = ["text: mean CKA", "neighbours"]
    for label, group in by_label(studies).items():
        looks = [one.looks[-1] for one in group]
        probes = [100 * float(np.max(one.probe)) for one in group if one.probe is not None]
        distances = [look.scores[name] for look in looks if name in look.scores]
        rows.append(
            [
                label,
                ", ".join(f"{step:,}" for step in sorted({look.step for look in looks})) if looks[0].step else "-",
                spread([look.mean_similarity for look in looks], 3),
                spread([1 - look.diversity["adjacent"] for look in looks], 3),
                spread([float(np.mean(look.rank)) for look in looks], 1),
                f"{spread(probes, 1)}%" if probes else "-",
                spread(distances, 3) if distances else "-",
            ]
        )
        if texts:
            found = [look.text_diversity for look in looks if look.text_diversity is not None]
            said = [spread([1 - one[name] for one in found], 3) if found else "-" for name in ("all", "adjacent")]
            rows[-1][4:4] = said
    return rows


def spread(values: Sequence[float], places: int) -> str:
    """Write the mean of some numbers and, if there are several, their standard deviation."""
    more = f" ± {np.std(values, ddof=1):.{places}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{places}f}{more}"


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
    """Analyse trained networks, write the report to `folder` and return the findings.

    NonFiniteError, after the report is written, if a number in it is not finite.

    t, times: where all checkpoints are compared, and where the last one is. at: steps, as `steps_of` reads them.
    parts: of PARTS. layout: of `paper_figures.LAYOUTS`. weights: of `trained.WEIGHTS`.
    supposed: if a network was trained without auxiliary losses, the gradients of these are taken.
    """
    begin = time.monotonic()
    measure.check(settings)
    for name, values in (("--time", [t]), ("--times", times)):
        for value in values:
            in_range(name, value, 0, 1)
    for label, group in by_label(chosen).items():
        if len({found.about["model"].get("depth") or found.about["model"].get("size") for found in group}) > 1:
            raise ConfigError(f"{label} names networks of different depth: give each its own, LABEL=PATH")
    steps = [steps_of(found, at) for found in chosen]
    main_process = jax.process_index() == 0
    if main_process:
        writable_folder(folder, "--out")
    tell = say if main_process else lambda line: None
    others = {f"{name} (not trained)": losses.make(name) for name in supposed}
    studies = [
        study(found, own, settings, t, times, parts, tell, weights, others)
        for found, own in zip(chosen, steps, strict=True)
    ]
    wrong = {one.label: lines for one in studies if (lines := faults(one))}
    if main_process:
        write_report(folder, studies, settings, t, times, layout, weights, wrong)
        done(time.monotonic() - begin, {"report": folder / "report.html", "figures": folder})
    for label, lines in wrong.items():
        raise NonFiniteError(f"{label}: {lines[0]}; the report notes all such numbers")
    return studies


def write_report(
    folder: Path,
    studies: Sequence[Study],
    settings: Settings,
    t: float,
    times: Sequence[float],
    layout: str | None,
    weights: str,
    wrong: Mapping[str, Sequence[str]],
) -> None:
    """Write figures, tables and report.html to `folder`. wrong: label -> what is not finite. Others: see `run`."""
    draw = heatmaps.draw_all if layout is None else paper_figures.LAYOUTS[layout]
    drawn, table = draw(folder, studies, settings.estimator.name()), summary(studies)
    said = [(one.label, note) for one in studies for note in (*one.notes, *wrong.get(one.label, ()))]
    notes = list(dict.fromkeys(f"{label}: {note}" for label, note in said))
    title = f"Representations of {', '.join(by_label(studies))}"
    html_page.write(folder / "report.html", title, [table], drawn, notes, described(settings, t, studies, weights))
    write_record(folder / "analysis.json", settings, t, times, studies)
    print(tables.aligned(table, left=1))
    for note in notes:
        print(f"note: {note}")


def described(settings: Settings, t: float, studies: Sequence[Study], weights: str) -> dict[str, str]:
    """Describe everything that can change a number, in words."""
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
    """Write what was analysed and how, for programs. The numbers themselves are in the .csv files."""
    options = settings._asdict() | {"estimator": settings.estimator._asdict(), "time": t, "times": list(times)}
    looks = [look for one in studies for look in one.looks]
    record = {
        "settings": options,
        "subjects": [{"label": one.label, **one.about} for one in studies],
        "diversity": [
            {"label": look.label, "step": look.step, **look.diversity}
            | ({} if look.text_diversity is None else {"text": look.text_diversity})
            for look in looks
        ],
        "versions": versions(),
    }
    write_json(path, record, default=str)


def chosen_by_flags(given: flags.FlagValues, others: Sequence[str]) -> list[Trained]:
    """Open what --workdir or --checkpoint names, then the others."""
    if (given.workdir is None) == (given.checkpoint is None):
        raise ConfigError("give --workdir=DIR of a run or --checkpoint=FILE of a release, and others with --compare")
    data, model = run_flags.data_of(given.data), {"capture": given.capture}

    def opened(text: str) -> Trained:
        label, name = named(text)
        path = hub.local(name)
        if configs.holds_run(path) or (path.exists() and text == given.workdir):
            found = trained.of_run(name, data=data, model=model, losses=True, trust=given.trust_workdir)
        elif path.exists():
            about = (given.family, given.heads, given.weights, run_flags.sides(given.side))
            found = trained.of_release(name, *about, data=data, vae=given.vae, model=model)
            found.data("train")  # raises now if the data are missing
        else:
            raise ConfigError(f"{path} does not exist: wanted the directory of a run or a file of weights")
        if (has := found.about["model"].get("capture", "merged")) != given.capture:
            raise ConfigError(f"--capture={given.capture}: the model of {path} has only {has!r}")
        return found._replace(label=label or found.folder.name)

    return [opened(text) for text in (given.workdir or given.checkpoint, *others)]


def parts_of(skipped: Sequence[str]) -> list[str]:
    """Return all parts except those that --skip names."""
    for name in skipped:
        one_of("--skip", name, PARTS)
    return [name for name in PARTS if name not in skipped]


def applied(preset: str | None, known: Any) -> Mapping[str, Any]:
    """Return the values of OPTIONS: a given flag, else the preset's value, else the flag's default."""
    given = {name: known[name].value for name in OPTIONS if known[name].present}
    return {name: known[name].value for name in OPTIONS} | (PRESETS[preset][0] if preset else {}) | given


if __name__ == "__main__":
    run_flags.define_release_flags()
    flags.adopt_module_key_flags(run_flags)
    flags.DEFINE_string("workdir", None, "Directory of a run, or LABEL=DIR.")
    flags.DEFINE_multi_string("compare", [], "More runs or files of weights, [LABEL=]PATH, one after another.")
    flags.DEFINE_string("data", None, "NAME=DIR,OPTION=VALUE,...: data to use; by default the run's own.")
    flags.DEFINE_string("vae", None, "Autoencoder that decodes a release's latents, for pictures of the examples.")
    flags.DEFINE_enum("preset", None, list(PRESETS), "Layout of the paper. Flags that are given change its choices.")
    flags.DEFINE_list("at", ["all"], "Checkpoints to analyse: all, last, or steps.")
    flags.DEFINE_float("time", TIME, "Time at which checkpoints are compared: 0 is data, 1 is noise.")
    flags.DEFINE_list("times", [f"{t:g}" for t in TIMES], "Times at which the last checkpoint is analysed.")
    flags.DEFINE_enum("unit", "pooled", list(measure.UNITS), "; ".join(f"{k}: {v}" for k, v in measure.UNITS.items()))
    flags.DEFINE_enum("kernel", "linear", list(similarity.KERNELS), "Kernel of CKA.")
    flags.DEFINE_enum("hsic", "unbiased", measure.HSICS, "Estimator of HSIC. minibatch: unbiased, a mean over batches.")
    flags.DEFINE_float("multiplier", 1.0, "Bandwidth of the rbf kernel, in median distances.")
    flags.DEFINE_integer("degree", 3, "Degree of the polynomial kernel.")
    flags.DEFINE_integer("num", 512, "Images.")
    flags.DEFINE_integer("batch", 8, "Images at a time, over all devices.")
    flags.DEFINE_integer("noises", 1, "Draws of noise for every image.")
    flags.DEFINE_enum("labels", "real", ["real", "null"], "Labels for the network: real, or the null label.")
    flags.DEFINE_enum("capture", "merged", list(CAPTURES), "; ".join(f"{k}: {v}" for k, v in CAPTURES.items()))
    flags.DEFINE_string("split", None, "Split of the data; by default test, if there is one.")
    flags.DEFINE_integer("seed", 0, "Seed of the choice of images, of noise and of times.")
    flags.DEFINE_list(
        "losses", list(SUPPOSED), "Losses whose gradients are taken if a network was trained without any."
    )
    flags.DEFINE_list("skip", [], "Parts to leave out: " + "; ".join(f"{k}: {v}" for k, v in PARTS.items()) + ".")
    flags.DEFINE_string("out", None, "Directory to write to; by default `analysis` in the run's directory.")

    def main(extra: list[str]) -> None:
        """Read the flags and run."""
        silence()
        given = flags.FLAGS
        if extra and not given.compare:
            raise ConfigError(f"unexpected argument {extra[0]!r}")
        option = applied(given.preset, given)
        estimator = Estimator(option["unit"], option["kernel"], option["hsic"], given.multiplier, given.degree)
        chosen = chosen_by_flags(given, [*given.compare, *extra])
        first = chosen[0]
        split = measure.split_of(first.data, given.split)
        settings = Settings(estimator, given.num, given.batch, given.noises, given.labels, split, given.seed)
        times = run_flags.numbers("times", list(map(str, option["times"])), float)
        default = first.folder / "analysis" if first.workdir else Path(f"{first.label}_analysis").absolute()
        folder = Path(given.out).expanduser() if given.out else default
        parts = PRESETS[given.preset][1] if given.preset else parts_of(given.skip)
        weights = "online" if given.online else "ema"
        run(chosen, folder, settings, option["time"], times, option["at"], parts, given.preset, weights, given.losses)

    cli.launch(main, arguments=True, several=True, groups=GROUPS)
