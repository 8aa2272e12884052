"""Plans of runs on TPU slices: what the TPU compiler says, what its program contains, and estimates from both."""

import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from diversedit_jax import sharding
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.runs import build
from diversedit_jax.runtime import flops
from diversedit_jax.runtime.versions import versions
from diversedit_jax.training import checksums
from diversedit_jax.training.step import initializer, train_step
from tools.benchmark import stand_ins, timing, variants
from tools.benchmark.timing import say
from tools.pod_plan import hlo, tpu

# For the compiler on a machine without TPU: only the CPU as backend, no request to the metadata server, several
# compilers at a time, no warnings about a missing TPU. On a TPU VM these values would break the start.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
PROGRAMS = ("train", "init", "sample", "checksum")
GIB = 2**30

SOURCES = {
    "fits, memory": "compiler",
    "flops": "counted: products in the traced step; `performed` with the recomputation of remat",
    "hbm_bytes": "counted: operands and results in HBM of the compiled program, with every turn of its loops",
    "sent_bytes": "counted: collectives in the compiled program; a ring's bytes for each chip",
    "compute_ms": "estimated: performed FLOPs at `efficiency` of the published peak",
    "hbm_ms": "estimated: hbm_bytes at the published bandwidth",
    "ici_ms": "estimated: sent_bytes within a slice over two links of a chip, in one direction each",
    "dcn_ms": "estimated: sent_bytes between slices at a chip's share of its host's network",
    "compiler_ms": "estimated: the compiler's cycles for fusions, one after another; the clock that the peak implies",
    "hidden": "estimated, the best case: the largest of compute_ms, hbm_ms, ici_ms and dcn_ms (`bound`) hides all else",
    "in_turn": "estimated, the worst case without host and data: compiler_ms, ici_ms and dcn_ms one after another",
}


class Plan(NamedTuple):
    """A config on `slices` slices `place`. words: its changes of the first plan's config."""

    words: str
    config: ConfigDict
    place: tpu.Slice
    slices: int

    @property
    def chips(self) -> int:
        """The chips of all slices."""
        return self.place.chips * self.slices


def varied(plan: Plan, words: str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan with other values: keys of the config (see `variants.varied`), `topology` and `slices`."""
    config, found = variants.varied(plan.config, words, {"topology": tpu.parse, "slices": int}, overrides)
    return Plan(words, config, found.get("topology", plan.place), found.get("slices", plan.slices))


def remedies(plan: Plan) -> list[str]:
    """Words to try, in this order, for a plan that does not fit.

    Parameters are split over few chips first, because fewer parts are less work for the compiler.
    """
    config, chips = plan.config, plan.place.chips
    meshes = [f"mesh.data=-1 mesh.fsdp={parts} mesh.tensor=1" for parts in sorted({min(4, chips), chips})]
    found = [words for words in meshes if f"mesh.fsdp={config.mesh.fsdp} " not in words]
    words = f"{meshes[-1]} model.remat=full"
    found += [words] if config.model.get("remat") != "full" else []
    each = config.batch_size // plan.chips
    found += [f"{words} accumulate={parts}" for parts in (2, 4) if each % parts == 0 and parts > config.accumulate]
    found += [f"{words} batch_size={config.batch_size // parts}" for parts in (2, 4, 8) if each % parts == 0]
    return found


def compiled(plan: Plan, programs: Sequence[str]) -> dict[str, Any]:
    """The compiler's facts about a plan, and counts. Set ENVIRONMENT before jax looks for its devices."""
    config, place = plan.config, plan.place
    options = place.options | ({"num_slices": plan.slices} if plan.slices > 1 else {})
    name = f"{place.generation}:{place.topology}"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # libtpu raises several kinds
        raise ConfigError(f"--topology={name}: the compiler refuses it: {error}".splitlines()[0]) from error
    space = stand_ins.space(config)
    with tempfile.TemporaryDirectory() as folder:
        stand_ins.replace_files(config, Path(folder))
        experiment = build.build(config, space, devices=devices)
        frozen = jax.eval_shape(experiment.components.codec.init)
    layout, parts = experiment.layout, experiment.components
    parts = parts._replace(codec=parts.codec._replace(init=lambda: frozen))
    experiment = experiment._replace(components=parts)
    frozen = sharding.placed(frozen, sharding.shardings(frozen, layout))
    batch = stand_ins.stored(config, space)
    batch = sharding.placed(batch, jax.tree.map(lambda _: sharding.over_batch(layout), batch))
    replicated = sharding.replicated(layout)
    key = sharding.placed(jax.eval_shape(jax.random.key, 0), replicated)
    init = initializer(parts, batch)
    abstract = jax.eval_shape(init, key)
    where = sharding.shardings(abstract, layout)
    state = sharding.placed(abstract, where)
    count = partial(build.work, experiment, abstract, batch)
    found = {
        "device_kind": devices[0].device_kind,
        "mesh": {axis: size for axis, size in layout.mesh.shape.items() if size > 1},
        "batch_per_chip": config.batch_size / layout.shards,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract["params"])),
        "flops": {"needed": count(), "performed": count(again=True)},
        "programs": {},
    }

    def train() -> jax.stages.Lowered:
        step = jax.jit(partial(train_step, parts), donate_argnums=0, out_shardings=(where, replicated))
        with jax.set_mesh(layout.mesh):
            return step.lower(state, frozen, batch, key)

    lowered = {
        "train": train,
        "init": lambda: jax.jit(init, out_shardings=where).lower(key),
        "sample": lambda: experiment.sampler().lower(state["ema"], frozen),
        "checksum": lambda: checksums.checksum.lower(max(jax.tree.leaves(state), key=lambda leaf: leaf.size)),
    }
    for name in programs:
        begin = time.monotonic()
        try:
            facts = facts_of(lowered[name]().compile(), place.chips, plan.slices)
        except jax.errors.JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            facts = {"fits": False, "needs_gib": needed}
        facts["compile_s"] = round(time.monotonic() - begin, 1)
        found["programs"][name] = facts
        say(f"{name}: {'compiled' if facts['fits'] else 'does not fit'}, {facts['compile_s']:.0f} s")
    return found


def facts_of(program: jax.stages.Compiled, devices: int, slices: int) -> dict[str, Any]:
    """The memory of a compiled program on each device, and counts in its text."""
    memory, module = program.memory_analysis(), hlo.parse(program.as_text())
    sums: dict[tuple, dict[str, Any]] = {}
    for found in hlo.collectives(module, devices, slices):
        key = (found.kind, found.group, found.between)
        total = sums.setdefault(key, {"kind": found.kind, "members": found.group, "times": 0, "sent_bytes": 0})
        total["between_slices"] = found.between
        total["times"] += found.times
        total["sent_bytes"] += round(found.sent * found.times)
    return {
        "fits": True,
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "donated": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
        },
        "hbm_bytes": hlo.memory_traffic(module),
        "cycles": hlo.cycles(module),
        "collectives": sorted(sums.values(), key=lambda total: -total["sent_bytes"]),
    }


def out_of_memory(message: str) -> float | None:
    """GiB that a program needs, from the compiler's message that it does not fit; None for other messages."""
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    for pattern in (r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", r"\(([\d.]+)([KMGT])\) exceeds available HBM"):
        if found := re.search(pattern, message):
            return float(found[1]) * units[found[2]]
    return None


def estimate(found: Mapping[str, Any], plan: Plan, efficiency: float) -> dict[str, Any]:
    """Times of a training step, and the run at best and at worst. SOURCES has the assumptions."""
    chip, facts = tpu.GENERATIONS[plan.place.generation], found["programs"]["train"]
    peak = flops.peak(found["device_kind"]) * 1e12
    within, across = (
        sum(c["sent_bytes"] for c in facts["collectives"] if c["between_slices"] == between) / 1e9
        for between in (False, True)
    )
    times = {
        "compute": found["flops"]["performed"] / plan.chips / (efficiency * peak),
        "hbm": facts["hbm_bytes"] / 1e9 / chip.hbm_gbps,
        "ici": within / (2 * chip.link_gbps),
        "dcn": across / chip.dcn_gbps if across and chip.dcn_gbps else None if across else 0.0,
        "compiler": facts["cycles"] / chip.clock_ghz / 1e9 if chip.clock_ghz else None,
    }
    known = {name: time for name, time in times.items() if name != "compiler" and time is not None}
    bound = max(known, key=lambda name: known[name])

    def run(step: float) -> dict[str, float]:
        hours = plan.config.total_steps * step / 3600
        return {
            "step_ms": step * 1e3,
            "images_per_sec": plan.config.batch_size / step,
            "mfu": found["flops"]["needed"] / step / plan.chips / peak,
            "days": hours / 24,
            "chip_hours": hours * plan.chips,
        }

    in_turn = [times[name] for name in ("compiler", "ici", "dcn")]
    return {
        **{f"{name}_ms": None if time is None else time * 1e3 for name, time in times.items()},
        "bound": bound,
        "hidden": run(known[bound]),
        "in_turn": None if None in in_turn else run(max(sum(in_turn), known[bound])),
    }


def resident(name: str, programs: Mapping[str, Any]) -> int:
    """Bytes on a chip while a program of the run works: its own, and the training state and batch that stay there."""
    own = programs[name]["bytes"]
    if name in ("train", "init") or "bytes" not in programs.get("train", {}):
        return own["peak"] + own["code"]
    return programs["train"]["bytes"]["arguments"] + own["peak"] - own["arguments"] + own["code"]


def row_of(plan: Plan, found: Mapping[str, Any], efficiency: float) -> dict[str, Any]:
    """The record of a plan: its settings, the facts, the estimates."""
    chip, programs = tpu.GENERATIONS[plan.place.generation], found["programs"]
    row = {
        "setting": plan.words,
        "slice": f"{plan.place.named} ({plan.place.topology})" + (f" x {plan.slices}" if plan.slices > 1 else ""),
        "chips": plan.chips,
        "batch_size": plan.config.batch_size,
        "accumulate": plan.config.accumulate,
        "remat": plan.config.model.get("remat", ""),
        "total_steps": plan.config.total_steps,
        "hbm_gib": chip.hbm_gib,
        **found,
    }
    for name, facts in programs.items():
        if facts["fits"]:
            facts["needs_gib"] = resident(name, programs) / GIB
            facts["fits"] = name == "train" or facts["needs_gib"] <= chip.hbm_gib  # the compiler checked `train`
    row["fits"] = all(facts["fits"] for facts in programs.values())
    if "bytes" in programs["train"]:
        row["estimate"] = estimate(found, plan, efficiency)
    return row


ESTIMATES = {"step ms": ("step_ms", 0, 1), "img/s": ("images_per_sec", 0, 1), "MFU %": ("mfu", 0, 100)}
ESTIMATES |= {"days": ("days", 1, 1), "chip-h": ("chip_hours", 0, 1)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown. Estimates are best-worst."""
    lines = []
    for row in rows:
        mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "1"
        parts = f"/{row['accumulate']}" if row["accumulate"] > 1 else ""
        needs = f"{row['programs']['train']['needs_gib']:.2f}/{row['hbm_gib']:.2f}"
        shown = [word for word in row["setting"].split() if not word.startswith(("topology=", "slices=", "mesh."))]
        cells = [" ".join(shown) or "the config", row["slice"], mesh, f"{row['batch_per_chip']:g}{parts}"]
        cells += [row["remat"], needs, "yes" if row["fits"] else "NO"]
        cells += [span(row["estimate"], *form) if "estimate" in row else "" for form in ESTIMATES.values()]
        lines.append(cells)
    return timing.table(("", "slice", "mesh", "b/chip", "remat", "GiB/chip", "fits", *ESTIMATES), lines)


def span(guess: Mapping[str, Any], key: str, digits: int, factor: float) -> str:
    """An estimate, best-worst; only the best if both are equal or the worst is unknown."""
    texts = [timing.cell(run[key], digits, factor) for run in (guess["hidden"], guess["in_turn"]) if run]
    return "-".join(dict.fromkeys(texts))


def details(row: Mapping[str, Any], efficiency: float) -> str:
    """All figures of a plan with their sources."""
    kinds = ("arguments", "outputs", "donated", "temporaries", "code", "peak")
    memory = []
    for name, facts in row["programs"].items():
        held = [timing.cell(facts["bytes"][kind] / GIB, 3) if "bytes" in facts else "" for kind in kinds]
        held += [timing.cell(facts["needs_gib"], 3), timing.cell(facts["compile_s"], 0)]
        memory.append([name, *held, "" if facts["fits"] else "does not fit"])
    lines = [f"memory of a chip in GiB (compiler; of {row['hbm_gib']:.2f}; needs: with the state that stays there)"]
    lines.append(timing.table(("program", *kinds, "needs", "compile s", "fits"), memory))
    if "estimate" not in row:
        return "\n".join(lines)
    guess, train = row["estimate"], row["programs"]["train"]
    needed, performed = (row["flops"][kind] / 1e12 / row["chips"] for kind in ("needed", "performed"))
    sent: dict[bool, str] = {False: "sent within a slice (counted):", True: "sent between slices (counted):"}
    for c in train["collectives"]:
        sent[c["between_slices"]] += f" {c['times']} x {c['kind']} of {c['members']}, {c['sent_bytes'] / 1e9:.3f} GB;"
    cycles = f"{train['cycles'] / 1e6:.0f} million cycles for fusions (compiler)"
    parts = [
        ("compute", f"{needed:.2f} TFLOP needed, {performed:.2f} with remat (counted)", f"{efficiency:.0%} of peak"),
        ("hbm", f"{train['hbm_bytes'] / 1e9:.1f} GB to and from HBM (counted)", "published bandwidth"),
        ("ici", sent[False].rstrip(";"), "two links of a chip, one direction"),
        ("dcn", sent[True].rstrip(";"), "a chip's share of its host's network"),
        ("compiler", cycles, "one after another, at the clock that the peak implies"),
    ]
    lines.append("training step, each chip")
    for name, amount, assumption in parts:
        took = guess[f"{name}_ms"]
        if took != 0:
            lines.append(f"  {amount}  -> {'unknown' if took is None else f'{took:.1f} ms'} (estimated: {assumption})")
    lines.append(f"run of {row['total_steps']:,} steps, without samples, scores, checkpoints (estimated)")
    about = {"hidden": f"{guess['bound']} hides all else", "in_turn": "the compiler's cycles, then the exchanges"}
    for name, words in about.items():
        if run := guess[name]:
            lines.append(
                f"  {words}: {run['step_ms']:.1f} ms a step, {run['images_per_sec']:,.0f} images/s, "
                f"{run['images_per_sec'] / row['chips']:,.1f} a chip, MFU {run['mfu']:.1%}; "
                f"{run['days']:.2f} days, {run['chip_hours']:,.0f} chip-hours"
            )
    return "\n".join(lines)


def in_process(plan: Plan, programs: Sequence[str], seconds: float) -> dict[str, Any]:
    """`compiled` in a process of its own: a timeout can end it, and a crash of the compiler ends only it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, plan._replace(config=plan.config.to_dict()), programs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise RunError(f"{plan.words or 'the config'}: not compiled within --timeout={seconds:g} s")
        found = ours.recv()
    except EOFError:
        process.join()
        raise RunError(f"{plan.words or 'the config'}: the compiler died with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, Exception):
        raise found
    return found


def _answer(pipe, plan: Plan, programs: Sequence[str]) -> None:
    try:
        pipe.send(compiled(plan._replace(config=ConfigDict(plan.config)), programs))
    except RunError as error:
        pipe.send(type(error)(str(error)))


def record(
    path: Path, command: str, rows: Sequence[Mapping[str, Any]], efficiency: float, hardware: Mapping[str, Any]
) -> None:
    """Add the rows of a command to FILE.json, and write all tables to FILE.md. hardware: of the compiler's machine."""
    held = json.loads(path.read_text()) if path.exists() else {}
    made = {"versions": versions(), "hardware": hardware, "rows": list(rows)}
    plans = held.get("plans", {}) | {command: made}
    text = {"sources": SOURCES, "efficiency": efficiency, "plans": plans}
    path.write_text(json.dumps(text, indent=1) + "\n")
    tables = [f"{timing.about({'command': name, **plan})}\n\n{table(plan['rows'])}\n" for name, plan in plans.items()]
    path.with_suffix(".md").write_text("\n".join(tables))
