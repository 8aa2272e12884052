"""Plans of runs on TPU slices: compiled by the TPU compiler, counted in the program, estimated from both."""

import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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

# For the compiler in a machine without TPU: no backend but the CPU, no question to the metadata server, several
# compilers at a time, and no warnings about a machine that is not there. On a TPU VM they would break the start.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
MISSING = 'plans need the TPU compiler: pip install "libtpu==0.0.42.*" (205 MB, terms of Google Cloud)'
PROGRAMS = ("train", "init", "sample", "checksum")
GIB = 2**30

SOURCES = {
    "fits, memory": "compiler",
    "flops": "counted: products in the traced step; `performed` with what remat computes again",
    "hbm_bytes": "counted: operands and results in HBM of what the compiled program runs, loops as often as they turn",
    "sent_bytes": "counted: collectives in the compiled program; a ring's bytes for each chip",
    "compute_ms": "estimated: performed FLOPs at `efficiency` of the published peak",
    "hbm_ms": "estimated: hbm_bytes at the published bandwidth",
    "ici_ms": "estimated: sent_bytes within a slice over two links of a chip, in one direction each",
    "dcn_ms": "estimated: sent_bytes between slices at a chip's share of its host's network",
    "compiler_ms": "estimated: the compiler's cycles for fusions, one after another; the clock that the peak implies",
    "hidden": "estimated: the largest of compute_ms, hbm_ms, ici_ms and dcn_ms (`bound`) hides all else: the best",
    "in_turn": "estimated: compiler_ms, ici_ms and dcn_ms, one after another: the worst, but for the host and the data",
}


class Plan(NamedTuple):
    """What is planned: the words that ask for it, the config, and where it would run."""

    words: str
    config: ConfigDict
    place: tpu.Slice
    slices: int

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.place.chips * self.slices


def varied(plan: Plan, words: str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan with other values: those of `variants.varied`, and `topology` and `slices`."""
    others = {"topology": tpu.parse, "slices": int}
    config, found = variants.varied(plan.config, words, others, overrides)
    place, slices = found.get("topology", plan.place), found.get("slices", plan.slices)
    return plan._replace(words=words, config=config, place=place, slices=slices)


def remedies(plan: Plan) -> list[str]:
    """What to try where a plan does not fit, in this order; each step keeps those before it.

    Parameters are split over few chips first: the fewer, the less the compiler has to do for it.
    """
    config, chips = plan.config, plan.place.chips
    meshes = [f"mesh.data=-1 mesh.fsdp={parts} mesh.tensor=1" for parts in sorted({min(4, chips), chips})]
    found = [words for words in meshes if f"mesh.fsdp={config.mesh.fsdp} " not in words]
    words = f"{meshes[-1]} model.remat=full"
    if config.model.get("remat") != "full":
        found.append(words)
    each = config.batch_size // plan.chips
    found += [f"{words} accumulate={parts}" for parts in (2, 4) if each % parts == 0 and parts > config.accumulate]
    found += [f"{words} batch_size={config.batch_size // parts}" for parts in (2, 4, 8) if each % parts == 0]
    return found


# --- What is compiled, in a process of its own.


def compiled(plan: Plan, programs: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """What the compiler says of a plan, and what can be counted. Needs ENVIRONMENT, before jax knows its devices."""
    config, place = plan.config, plan.place
    options = place.options | ({"num_slices": plan.slices} if plan.slices > 1 else {})
    name = f"{place.generation}:{place.topology}"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # of no one kind
        raise ConfigError(f"--topology={name}: the compiler refuses it: {error}".splitlines()[0]) from error
    space = stand_ins.space(config)
    with tempfile.TemporaryDirectory() as folder:
        stand_ins.take_their_places(config, Path(folder), say)
        experiment = build.build(config, space, devices=devices)
        frozen = jax.eval_shape(experiment.components.codec.init)
    layout, parts = experiment.layout, experiment.components
    parts = parts._replace(codec=parts.codec._replace(init=lambda: frozen))
    experiment = experiment._replace(components=parts)
    frozen = sharding.placed(frozen, sharding.shardings(frozen, layout))
    over_batch = sharding.over_batch(layout)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over_batch), stand_ins.stored(config, space)
    )
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(layout))
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
        outputs = (where, sharding.replicated(layout))
        with jax.set_mesh(layout.mesh):
            return jax.jit(partial(train_step, parts), donate_argnums=0, out_shardings=outputs).lower(
                state, frozen, batch, key
            )

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
    """The memory of a compiled program on each device, and what its text tells."""
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
    """GiB that a program needs, by the compiler's message that it does not fit; None if it says something else."""
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    for pattern in (r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", r"\(([\d.]+)([KMGT])\) exceeds available HBM"):
        if found := re.search(pattern, message):
            return float(found[1]) * units[found[2]]
    return None


# --- What follows from it.


def estimate(found: Mapping[str, Any], plan: Plan, efficiency: float) -> dict[str, Any]:
    """Times of a training step, and the run that follows at best and at worst; see SOURCES for the assumptions."""
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
    """Bytes on a chip while a program of the run works: its own, and the training state and batch where they stay."""
    own = programs[name]["bytes"]
    if name in ("train", "init") or "bytes" not in programs.get("train", {}):
        return own["peak"] + own["code"]
    return programs["train"]["bytes"]["arguments"] + own["peak"] - own["arguments"] + own["code"]


def row_of(plan: Plan, found: Mapping[str, Any], efficiency: float) -> dict[str, Any]:
    """A plan as it is written: its settings, what was found, what is estimated."""
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
            facts["fits"] = name == "train" or facts["needs_gib"] <= chip.hbm_gib  # of that the compiler has said it
    row["fits"] = all(facts["fits"] for facts in programs.values())
    if "bytes" in programs["train"]:
        row["estimate"] = estimate(found, plan, efficiency)
    return row


# --- What a person reads.


ESTIMATES = {"step ms": ("step_ms", 0, 1), "img/s": ("images_per_sec", 0, 1), "MFU %": ("mfu", 0, 100)}
ESTIMATES |= {"days": ("days", 1, 1), "chip-h": ("chip_hours", 0, 1)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows at a glance, in Markdown; estimates from the best to the worst."""
    lines = []
    for row in rows:
        mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "1"
        parts = f"/{row['accumulate']}" if row["accumulate"] > 1 else ""
        needs = f"{row['programs']['train']['needs_gib']:.2f}/{row['hbm_gib']:.2f}"
        shown = [word for word in row["setting"].split() if not word.startswith(("topology=", "slices=", "mesh."))]
        cells = [" ".join(shown) or "the config", row["slice"], mesh, f"{row['batch_per_chip']:g}{parts}"]
        cells += [row["remat"], needs, "yes" if row["fits"] else "NO"]
        cells += [span(row["estimate"], *key) if "estimate" in row else "" for key in ESTIMATES.values()]
        lines.append(cells)
    return timing.table(("", "slice", "mesh", "b/chip", "remat", "GiB/chip", "fits", *ESTIMATES), lines)


def span(guess: Mapping[str, Any], key: str, digits: int, factor: float = 1) -> str:
    """An estimate, from the best to the worst where that is known."""
    runs = [guess["hidden"], guess["in_turn"]]
    texts = [f"{run[key] * factor:,.{digits}f}" for run in runs if run]
    return "-".join(dict.fromkeys(texts))


def details(row: Mapping[str, Any], efficiency: float) -> str:
    """All that is known of one plan, and where it comes from."""
    lines = [f"memory of a chip in GiB (compiler; of {row['hbm_gib']:.2f}; needs: while the state stays there)"]
    kinds = ("arguments", "outputs", "donated", "temporaries", "code", "peak")
    lines.append("  program   " + "".join(f"{kind:>12}" for kind in (*kinds, "needs")) + "  compile s")
    for name, facts in row["programs"].items():
        held = [facts["bytes"][kind] / GIB for kind in kinds] if "bytes" in facts else []
        numbers = "".join(f"{number:>12.3f}" for number in (*held, facts["needs_gib"]))
        verdict = "" if facts["fits"] else "  does not fit"
        lines.append(f"  {name:<10}{numbers.rjust(12 * (len(kinds) + 1))}{facts['compile_s']:>11.0f}{verdict}")
    if "estimate" not in row:
        return "\n".join(lines)
    guess, train = row["estimate"], row["programs"]["train"]
    needed, performed = (row["flops"][kind] / 1e12 / row["chips"] for kind in ("needed", "performed"))
    lines += [
        "training step, each chip",
        f"  {needed:.2f} TFLOP needed, {performed:.2f} with what remat computes again (counted)"
        f"  -> {guess['compute_ms']:.1f} ms (estimated: {efficiency:.0%} of peak)",
        f"  {train['hbm_bytes'] / 1e9:.1f} GB to and from HBM (counted)"
        f"  -> {guess['hbm_ms']:.1f} ms (estimated: published bandwidth)",
    ]
    for found in train["collectives"]:
        network = "between slices" if found["between_slices"] else "within a slice"
        lines.append(
            f"  {found['times']} x {found['kind']} of {found['members']} {network}: "
            f"{found['sent_bytes'] / 1e9:.3f} GB sent (counted)"
        )
    for name, links in (("ici", "two links of a chip, one direction"), ("dcn", "a chip's share of its host's network")):
        if guess[f"{name}_ms"] != 0:
            took = "unknown" if guess[f"{name}_ms"] is None else f"{guess[f'{name}_ms']:.1f} ms"
            lines.append(f"  -> {took} (estimated: {links})")
    if guess["compiler_ms"] is not None:
        lines.append(
            f"  {train['cycles'] / 1e6:.0f} million cycles for fusions (compiler)"
            f"  -> {guess['compiler_ms']:.1f} ms (estimated: one after another, at the clock that the peak implies)"
        )
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


# --- The program.


def in_process(plan: Plan, programs: Sequence[str], seconds: float) -> dict[str, Any]:
    """`compiled` in a process of its own: it can be ended, and a compiler that dies takes nothing with it."""
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
        pipe.send(compiled(plan._replace(config=ConfigDict(plan.config)), programs, say))
    except RunError as error:
        pipe.send(type(error)(str(error)))


def record(
    path: Path, command: str, rows: Sequence[Mapping[str, Any]], efficiency: float, hardware: Mapping[str, Any]
) -> None:
    """Write the rows of a command into FILE.json, beside those of other commands, and all tables into FILE.md.

    hardware: of the compiler's machine.
    """
    held = json.loads(path.read_text()) if path.exists() else {}
    made = {"versions": versions(), "hardware": hardware, "rows": list(rows)}
    plans = held.get("plans", {}) | {command: made}
    text = {"sources": SOURCES, "efficiency": efficiency, "plans": plans}
    path.write_text(json.dumps(text, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(plans))


def page(plans: Mapping[str, Any]) -> str:
    """The tables of a record, each behind its command, in Markdown."""
    heads = {command: timing.about({"command": command, **made}) for command, made in plans.items()}
    return "\n".join(f"{heads[command]}\n\n{table(made['rows'])}\n" for command, made in plans.items())
