"""The page of all benchmarks, from their records: tools/benchmarks/README.md and its plots.

    python -m tools.benchmark_page

Reads the records that `tools.benchmark` has written there. Run it after that; a test compares.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diversedit_jax import program
from diversedit_jax.analysis.drawing import COLOURS, DPI, STYLE
from diversedit_jax.errors import ConfigError
from tools import timing

FOLDER = Path(__file__).parent / "benchmarks"
Record = Mapping[str, Any]
Records = Mapping[str, Record]


def row(record: Record, name: str) -> Record:
    """The row of this name."""
    return next(found for found in record["rows"] if found["name"] == name)


def torch_row(record: Record) -> Record:
    """PyTorch's row."""
    return next(found for found in record["rows"] if found["name"].startswith("PyTorch"))


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
    memory = row(torch, "diversedit_b2")["peak_gib"] / row(torch, "sit_b2")["peak_gib"]

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
            "DiverseDiT's memory over SiT's: at most 1.05",
            f"{memory:.3f} (CPU, S/2)",
            verdict(memory <= 1.05),
        ),
        (
            "dispatch of a step at depth 28: under 1 ms",
            f"{dispatch['rows'][0]['dispatch_ms']:.2f} ms",
            verdict(dispatch["rows"][0]["dispatch_ms"] < 1),
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
    """A record, what is said of it, and how it is drawn. Its table stands beside it, as the benchmark wrote it."""

    record: str
    title: str
    text: str
    draw: Callable[[Record, Figure], None] | None = None
    height: float = 2.2


SECTIONS = [
    Section(
        "torch_cpu",
        "Training step, beside PyTorch's",
        "Both have the same weights, batch and number of threads; PyTorch's is `tools/torch_sit.py`: scaled dot product"
        " attention, torch.compile, fused AdamW. Losses and updates of both are equal (tests/test_torch_twin.py).",
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
    for name in {section.record for section in SECTIONS}:
        path = folder / f"{name}.json"
        if not path.exists():
            raise ConfigError(f"{path} is missing: it is a record of the page")
        records[name] = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m tools.benchmark_page` from the records (JSON) beside it, which name command, commit,"
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
        lines.append(table(folder, section))
    return "\n".join(lines) + "\n"


def table(folder: Path, section: Section) -> str:
    """The table that the benchmark has written beside its record."""
    return (folder / f"{section.record}.md").read_text(encoding="utf-8").rstrip()


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
    program.launch(main)
