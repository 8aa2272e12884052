"""The page of all benchmarks, from their records: tools/benchmark/records/README.md and its plots.

    python -m tools.benchmark.page

Reads the records that `tools.benchmark` and `tools.pod_plan` have written there. Run it after either; a test compares.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diversedit_jax.analysis.drawing import COLOURS, DPI, STYLE
from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import cli
from tools.benchmark import timing
from tools.pod_plan import plan as pod_plan

FOLDER = Path(__file__).parent / "records"
Record = Mapping[str, Any]
Records = Mapping[str, Record]


def row(record: Record, name: str) -> Record:
    """The row of this name."""
    return next(found for found in record["rows"] if found["name"] == name)


def torch_row(record: Record) -> Record:
    """PyTorch's row."""
    return next(found for found in record["rows"] if found["name"].startswith("PyTorch"))


def plans(record: Record) -> list[Record]:
    """The plans of a record, in order, each with a label: its config, and what differs beside slice and mesh."""
    found = []
    for command, made in record["plans"].items():
        first = re.search(r"--config=(\S+)", command)[1]
        for one in made["rows"]:
            words = one["setting"].split()
            given = next((word.removeprefix("config=") for word in words if word.startswith("config=")), first)
            name = re.sub(r".*?(\w+)\.py:?", r"\1 ", given).strip()
            others = [word for word in words if not word.startswith(("config=", "topology=", "mesh."))]
            found.append(dict(one) | {"label": " ".join([name, *others])})
    return found


def of_plan(record: Record, label: str) -> Record:
    """The plan whose label begins so."""
    return next(found for found in plans(record) if found["label"].startswith(label))


def ends(plan: Record, key: str, factor: float = 1) -> list[float]:
    """An estimate at best and at worst, where both are known."""
    return [run[key] * factor for run in (plan["estimate"]["hidden"], plan["estimate"]["in_turn"]) if run]


# --- Plots.


def bar(axes: Axes, found: Mapping[str, float], place: float, colour: str) -> None:
    """A bar to the median and a line between the quartiles."""
    axes.barh(place, found["median"], color=colour, height=0.7)
    axes.plot([found["low"], found["high"]], [place, place], color="black", linewidth=0.8)


def methods(record: Record, figure: Figure) -> None:
    """Step time of each method over the baseline's."""
    axes = figure.subplots()
    rows = record["rows"]
    for place, found in enumerate(rows):
        bar(axes, found["ratio"], -place, COLOURS[1] if "diversedit" in found["name"] else COLOURS[0])
        axes.text(found["ratio"]["high"] + 0.02, -place, f"{found['ratio']['median']:.3f}", va="center", fontsize=6)
    axes.set_yticks([-place for place in range(len(rows))], [found["name"] for found in rows])
    axes.axvline(1, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("step time, times the baseline's (median and quartiles)")


SCALES = ("depth", "width", "tokens")


def scaling(record: Record, figure: Figure) -> None:
    """Step time against FLOPs, as depth, width or tokens grow."""
    for axes, what in zip(figure.subplots(1, 3, sharey=True), SCALES, strict=True):
        rows = sorted(grown(record, what), key=lambda found: found[0])
        at, ms = [value for value, _ in rows], [1e3 * found["s"]["median"] for _, found in rows]
        work = [found["gflop_per_image"] for _, found in rows]
        axes.plot(at, ms, "o-", color=COLOURS[0], label="measured")
        axes.plot(at, [ms[0] * value / work[0] for value in work], ":", color="black", label="in proportion to FLOPs")
        axes.set(xscale="log", yscale="log", xlabel=what, xticks=at, xticklabels=at)
        axes.set_yticks(ticks := [250, 500, 1000, 2000, 4000, 8000], [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("ms a step")
    figure.axes[0].legend()


def grown(record: Record, what: str) -> list[tuple[int, Record]]:
    """The rows of the record in which depth, width or tokens were changed, and its first, which has 6, 384 and 256."""
    found = [({"depth": 6, "width": 384, "tokens": 256}[what], record["rows"][0])]
    key = {"depth": "model.depth=", "width": "model.width=", "tokens": "data.shape=("}[what]
    for one in record["rows"][1:]:
        word = next((word for word in one["name"].split() if word.startswith(key)), None)
        if word:
            value = int(word.removeprefix(key).split(",")[0])
            found.append(((value // 2) ** 2 if what == "tokens" else value, one))
    return found


def between(axes: Axes, found: Sequence[float], place: float, colour: str) -> None:
    """A bar from one end to the other."""
    axes.barh(place, max(found) - min(found), left=min(found), color=colour, height=0.7)


def sizes(record: Record, figure: Figure) -> None:
    """Images/s of a chip and MFU by model, from the worst to the best estimate."""
    left, right = figure.subplots(1, 2, sharey=True)
    for place, found in enumerate(plans(record)):
        colour = COLOURS[1] if "diversedit" in found["label"] else COLOURS[0]
        between(left, ends(found, "images_per_sec", 1 / found["chips"]), -place, colour)
        between(right, ends(found, "mfu", 100), -place, colour)
    left.set(xscale="log", xlabel="images/s a chip, worst to best (estimated)")
    left.set_xticks(ticks := [50, 100, 200, 500, 1000], [f"{tick:,}" for tick in ticks])
    left.minorticks_off()
    right.set(xlabel="MFU %, worst to best (estimated)", xlim=(0, 60))
    named(left, record)


def forms(record: Record, figure: Figure) -> None:
    """Memory of a chip and the estimated step, by what the backward pass keeps and by the kernel of attention."""
    left, right = figure.subplots(1, 2, sharey=True)
    for place, found in enumerate(plans(record)):
        left.barh(-place, found["programs"]["train"]["needs_gib"], color=COLOURS[0], height=0.7)
        if "estimate" in found:
            between(right, ends(found, "step_ms"), -place, COLOURS[0])
    left.set_xlabel("GiB a chip needs (compiler)")
    right.set(xlabel="ms a step, best to worst (estimated)", xlim=(0, None))
    named(left, record)


def named(axes: Axes, record: Record) -> None:
    """The labels of the plans, downwards."""
    found = plans(record)
    axes.set_yticks([-place for place in range(len(found))], [plan["label"] for plan in found])


# --- Targets: what was aimed at, and the figure that stands beside it.


def inverse(found: Mapping[str, float]) -> dict[str, float]:
    """The spread of the ratio that is turned round."""
    return {"median": 1 / found["median"], "low": 1 / found["high"], "high": 1 / found["low"]}


NO_GPU = "not measured: no GPU was at hand"


def targets(records: Records) -> list[tuple[str, str, str]]:
    """(target, figure, whether it is met and by what)."""
    torch, sample, dispatch = records["torch_cpu"], records["sample_cpu"], records["dispatch_cpu"]
    over, vs = inverse(row(torch, "sit_b2")["ratio"]), inverse(torch_row(torch)["ratio"])  # the record's are theirs
    always = row(sample, "sampler.guidance_interval=(0,1)")["ratio"]["median"]
    sit, diverse = (of_plan(records["plan_sizes"], name) for name in ("sit_b2", "diversedit_b2"))
    best, worst = (d / s for d, s in zip(ends(diverse, "step_ms"), ends(sit, "step_ms"), strict=True))
    held = [found["programs"]["train"]["needs_gib"] for found in (sit, diverse)]
    chip = [found["programs"]["train"]["compile_s"] for found in plans(records["plan_chip"])]  # unrolled, loop

    def verdict(met: bool) -> str:
        return "met" if met else "missed"

    return [
        ("H200, XL/2 training: 600 img/s for SiT, 550 for DiverseDiT, 1.3x PyTorch", NO_GPU, ""),
        ("H200, B/2 with DiverseDiT: 2,600 img/s", NO_GPU, ""),
        ("H200, sampling XL/2, 250 SDE steps, guidance 1.8 in [0, 0.7]: 4 img/s", NO_GPU, ""),
        (
            "DiverseDiT's step over SiT's: at most 1.09",
            f"{timing.spread_of(over, 3)} (CPU, S/2)",
            verdict(over["median"] <= 1.09),
        ),
        (
            "the same on TPUs",
            f"{best:.3f} at best, {worst:.3f} by the compiler's cycles (v5e, B/2, estimated)",
            verdict(worst <= 1.09),
        ),
        (
            "DiverseDiT's memory over SiT's: at most 1.05",
            f"{held[1] / held[0]:.3f} (v5e, B/2, 16 images a chip; {held[0]:.2f} and {held[1]:.2f} GiB, compiler)",
            verdict(held[1] / held[0] <= 1.05),
        ),
        (
            "dispatch of a step at depth 28: under 1 ms",
            f"{dispatch['rows'][0]['dispatch_ms']:.2f} ms",
            verdict(dispatch["rows"][0]["dispatch_ms"] < 1),
        ),
        (
            "XL/2's training step compiles for one TPU chip, ahead of time on two cores: under 60 s",
            f"{chip[0]:.0f} s; {chip[1]:.0f} s with model.unroll=False",
            f"{verdict(chip[0] < 60)}; {verdict(chip[1] < 60)}",
        ),
        (
            "CPU, float32, S/2: at most 0.9 of PyTorch's time",
            timing.spread_of(vs, 3),
            verdict(vs["median"] <= 0.9),
        ),
        (
            "CPU: guidance in [0, 0.7] saves 12% of guiding always",
            f"{1 - 1 / always:.1%}",
            verdict(1 - 1 / always >= 0.12),
        ),
    ]


# --- The page.


class Section(NamedTuple):
    """A record, what is said of it, and how it is drawn. A benchmark has written its table; a plan's is made here."""

    record: str
    title: str
    text: str
    draw: Callable[[Record, Figure], None] | None = None
    height: float = 2.2


SECTIONS = [
    Section(
        "torch_cpu",
        "Training step, beside PyTorch's",
        "Both have the same weights, batch and number of threads; PyTorch's is `tools/benchmark/torch_sit.py`: scaled"
        " dot product attention, torch.compile, fused AdamW. Losses and updates of both are equal"
        " (tests/tools/test_torch_twin.py).",
    ),
    Section(
        "methods_cpu",
        "What each method costs",
        "The same network (S/2, 8 blocks) and batch for all; encoders (DINOv2-B) run in the step, and take most of it"
        " beside a network this small. MeanFlow differentiates its network in forward mode besides.",
        methods,
        2.8,
    ),
    Section(
        "scaling_cpu",
        "Step time as depth, width and tokens grow",
        "The dotted line grows as the products do. Where the measured line is less steep, small arrays cost more than"
        " their products.",
        scaling,
    ),
    Section(
        "plan_sizes",
        "By size, on TPU v5e, as compiled",
        "No TPU ran this. Memory is the compiler's; times are estimates, from the best to the worst:"
        " [launch/README.md](../../../launch/README.md) says what they rest on.",
        sizes,
    ),
    Section(
        "plan_forms",
        "Loops, what the backward pass keeps, and the kernel of attention, on TPU v5e, as compiled",
        "By default it is unrolled, with remat `named`. The compiler tells no cycles of a kernel: the worst of `splash`"
        " lacks them.",
        forms,
    ),
    Section("pod_plan", "TPU slices, as compiled", "400K steps at batch 256, as in the paper; the default remat."),
    Section("unroll_cpu", "Loop over blocks or not, on a CPU", "`model.unroll`; by default only on TPUs."),
    Section("remat_cpu", "What the backward pass keeps, on a CPU", "`model.remat`; the default is `named`."),
    Section(
        "dispatch_cpu",
        "Dispatch",
        "A network 28 blocks deep and very narrow: what a step costs the host. Blocks are stacked, so that it does not"
        " grow with their number.",
    ),
    Section(
        "sample_cpu",
        "Sampling",
        "One program for all steps; an image is guided only while t is in the interval.",
    ),
    Section("loss_cpu", "Losses alone", "With their gradients, on features of random numbers."),
    Section("data_cpu", "Reading data", ""),
    Section("eval_cpu", "Evaluation beside sampling", ""),
]


def page(folder: Path) -> str:
    """The text of the page, from the records in a folder."""
    records = {}
    for name in {section.record for section in SECTIONS} | {"plan_chip"}:
        path = folder / f"{name}.json"
        if not path.exists():
            raise ConfigError(f"{path} is missing: it is a record of the page")
        records[name] = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m tools.benchmark.page` from the records (JSON) beside it, which name command, commit,"
        " versions and machine. Times are medians with quartiles; ratios are taken within rounds, to the first row. `of"
        " product` is the share of what one large matrix product reaches on this machine. Compare ratios: the seconds"
        " are those of a small machine.",
        "",
        timing.table(("target", "figure", ""), targets(records)),
    ]
    for section in SECTIONS:
        lines += ["", f"## {section.title}", ""]
        lines += [section.text, ""] if section.text else []
        if section.draw:
            lines += [f"![{section.title}]({section.record}.png)", ""]
        record = records[section.record]
        lines.append(plan_table(record) if "plans" in record else table(folder, section))
    return "\n".join(lines) + "\n"


def table(folder: Path, section: Section) -> str:
    """The table that the benchmark has written beside its record."""
    return (folder / f"{section.record}.md").read_text(encoding="utf-8").rstrip()


def plan_table(record: Record) -> str:
    """The plans of a record, estimates from the best to the worst."""
    commands = "\n\n".join(timing.about({"command": command, **made}) for command, made in record["plans"].items())
    estimates = {
        "ms a step": ("step_ms", 0, 1),
        "images/s": ("images_per_sec", 0, 1),
        "MFU %": ("mfu", 0, 100),
        "days": ("days", 1, 1),
        "chip-hours": ("chip_hours", 0, 1),
    }
    heads = ("", "slice", "mesh", "images a chip", "GiB a chip", *estimates)
    lines = []
    for found in plans(record):
        held = f"{found['programs']['train']['needs_gib']:.2f} of {found['hbm_gib']:.2f}"
        mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
        cells = [found["label"], found["slice"], mesh, f"{found['batch_per_chip']:g}"]
        cells.append(held if found["fits"] else f"{held}: does not fit")
        cells += [pod_plan.span(found["estimate"], *key) if "estimate" in found else "" for key in estimates.values()]
        lines.append(cells)
    return f"{commands}\n\n{timing.table(heads, lines)}"


def draw(folder: Path) -> None:
    """The plots of the page."""
    for section in SECTIONS:
        if section.draw:
            record = json.loads((folder / f"{section.record}.json").read_text(encoding="utf-8"))
            with matplotlib.rc_context(STYLE):
                figure = Figure(figsize=(7.0, section.height))
                section.draw(record, figure)
                figure.savefig(folder / f"{section.record}.png", dpi=DPI)


def main() -> None:
    """Write the page and its plots."""
    (FOLDER / "README.md").write_text(page(FOLDER), encoding="utf-8")
    draw(FOLDER)
    print(FOLDER / "README.md")


if __name__ == "__main__":
    cli.launch(main)
