"""Score samples of a run, of a release or in a file: FID, sFID, IS, precision, recall, KID against a reference; CLIP.

    python -m diversedit_jax.evaluate --workdir=DIR --preset=repa --reference=VIRTUAL_imagenet256_labeled.npz \\
        --extractor=inception=classify_image_graph_def.pb
    python -m diversedit_jax.evaluate --checkpoint=SiT-XL-2-256.pt --family=official_sit --vae=sd-vae-ft-ema \\
        --preset=sit --reference=... --extractor=... --sweep cfg_scale=1.0,1.35,1.8 guidance_interval=0:0.7,0:1
    python -m diversedit_jax.evaluate --samples=samples.npz --reference=... --extractor=...

If the program is killed, the same command goes on and ends in the same scores: image i depends only on the seed, on i
and on its label. It writes scores.json, with everything that can change a score, and grid.png (videos: also grid.gif)
to a folder of the run (or --out). A sweep also writes sweep.csv and sweep.png.

--reference: an .npz of ADM, torch-fidelity, MeanFlow, MAR or tools.reference_stats, a .pkl of EDM2, or images.
--extractor: inception, dinov2 or digits, with the file of its weights; moving_digits for videos of them; or clip, for
    the CLIP score of images that are drawn for captions, which needs no reference.
A run needs neither if its config has evaluators of the kind `scores`: those are used.
"""

import contextlib
import functools
import hashlib
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from diversedit_jax import conditioning, registry, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Condition
from diversedit_jax.diffusion import solve
from diversedit_jax.errors import ConfigError, check_machine
from diversedit_jax.evaluation import extractors as networks
from diversedit_jax.evaluation import feature_cache, image_files, presets, scoring, tables
from diversedit_jax.evaluation.extractors import Extractor
from diversedit_jax.evaluation.reference_statistics import Reference, open_reference
from diversedit_jax.evaluation.tables import Point
from diversedit_jax.reading import read_json
from diversedit_jax.registry import INT32, UINT32, in_range
from diversedit_jax.runs import flags as run_flags
from diversedit_jax.runs.check import check
from diversedit_jax.runs.trained import Source
from diversedit_jax.runtime import cli, pictures, processes, workdir_lock
from diversedit_jax.runtime.files import check_same, writable_folder, write_json
from diversedit_jax.runtime.progress import Ticker, done, say
from diversedit_jax.runtime.versions import versions
from diversedit_jax.sampling import sampler
from diversedit_jax.sampling.sampler import Sampler

SCORES, SAMPLES = "scores.json", "samples.npz"
NUM = presets.NUM
READ_WITH_SAMPLES = ("samples", "reference", "extractor", "num", "few", "out")
FILE_BATCH = 256  # images of a file at a time
GUIDANCE = ("cfg_scale", "guidance_interval")  # one compiled sampler serves all their values


class Images(NamedTuple):
    """Images to score, or videos. shape: (h, w, c) of one, or (f, h, w, c). read: (first, count) -> uint8 [count *s c].

    labels: [num]; None if they are unknown or conditions are not labels.
    about: where the images come from, for the record. name: the same for people.
    conditions: stored conditions y [num ...] of the images; None if they are unknown.
    named: conditions -> what they say, or None. preset: the protocol that was asked for.
    video: the first spatial axis is time.
    """

    num: int
    shape: tuple[int, ...]
    batch: int
    read: Callable[[int, int], np.ndarray]
    labels: np.ndarray | None
    about: dict[str, Any]
    name: str
    conditions: Condition = None
    named: Callable[[Condition], list[str] | None] = lambda conditions: None
    preset: str | None = None
    video: bool = False


class Judges(NamedTuple):
    """Feature networks and references. few: allow fewer images than features."""

    extractors: Sequence[Extractor]
    references: Sequence[Reference]
    few: bool = False


def of_file(path: str | Path, num: int | None) -> Images:
    """The first `num` images of a file or folder; by default all. What has three axes is shown as a video."""
    found = image_files.open_samples(path)
    count = found.count if num is None else num
    if count > found.count:
        raise ConfigError(f"--num={num}: {path} has {found.count} images")
    about = {"kind": "file", "name": Path(path).name, "of": found.count, "sha256": found.digest()}
    name, video = f"{count} images of {found.path}", len(found.shape) == 4
    return Images(count, found.shape, FILE_BATCH, found.read, None, about, name, video=video)


def of_source(source: Source, varied: Point, draw: Sampler, num: int, rule: str | None, seed: int) -> Images:
    """`num` images to sample. varied: options that a sweep changes. rule: of `conditioning.RULES`."""
    in_range("--num", num, 1, INT32)
    in_range("--seed", seed, 0, UINT32)
    scoring.check_images(source.name, source.shape)
    options = source.options | dict(varied)
    batch = sharding.filled(options["batch_size"])
    labelled = source.space.conditions.classes is not None
    rule = rule or ("balanced" if labelled else "data")
    conditions = source.conditions(rule, num, seed)
    guidance = {name: options[name] for name in GUIDANCE}

    def read(first: int, count: int) -> np.ndarray:
        y = conditioning.taken(conditions, first, batch)  # always a whole batch, so that one program serves all
        return draw(source.params, source.frozen, y, seed, source.weak, first=first, **guidance)[:count]

    about = source.about | {
        "sampler": {name: value for name, value in options.items() if name != "batch_size"},
        "evaluations": solve.evaluations(options["solver"], options["steps"], options["last_step_kind"]),
        "labels": rule,
        "seed": seed,
    }
    if rule in conditioning.HELD_OUT:
        about["conditions"] = digest(conditions)
    labels, name = conditions if labelled else None, f"{num} samples of {source.name}"
    shown = {"conditions": conditions, "named": source.named, "video": source.space.video}
    return Images(num, source.shape, batch, read, labels, about, name, **shown)


def digest(conditions: Condition) -> str:
    """A name for the values of conditions, 16 hex digits."""
    found = hashlib.sha256()
    for name, leaf in sorted(sharding.by_name(conditions).items()):
        found.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:16]


def plan_of(images: Images, judges: Judges) -> dict[str, Any]:
    """Everything that can change a score, except software versions."""
    return {
        "images": images.about,
        "num": images.num,
        "size": list(images.shape),
        "batch": images.batch,
        "extractors": {one.name: dict(one.about) for one in judges.extractors},
        "references": [reference.about for reference in judges.references]
        or [{"name": one.name, "format": "images of the extractor"} for one in judges.extractors],
        "settings": {
            "inception_score_split": scoring.SPLIT,
            "precision_recall_nearest": scoring.NEAREST,
            "kernel_distance_subsets": scoring.SUBSETS,
            "kernel_distance_subset_size_at_most": scoring.SUBSET_SIZE,
            "statistics": "float64",
        },
    }


def evaluate(
    images: Images, judges: Judges, extract: scoring.Extract, statistics: Mapping, folder: Path, keep_samples: bool
) -> dict[str, float]:
    """Score images, and write the results to `folder`. An evaluation that was begun there goes on.

    ConfigError if another evaluation runs there.
    """
    plan = plan_of(images, judges)
    if (done := finished(folder, plan)) is not None:
        if keep_samples and not (folder / SAMPLES).exists():
            raise ConfigError(f"{folder} was done without --keep_samples: choose another --out or remove {SCORES}")
        return done
    held = workdir_lock.held(writable_folder(folder, "--out"), say)
    with contextlib.ExitStack() as lock:
        processes.first_alone(lambda: lock.enter_context(held))  # two would remove each other's parts
        started, parts = time.monotonic(), folder / "parts"
        if images.labels is not None:
            rows = tables.grid_rows(images.labels)
        else:
            rows = [list(range(i, i + 10)) for i in range(0, min(100, images.num) // 10 * 10, 10)]
        firsts = list(range(0, images.num, images.batch))
        whole = []
        if jax.process_index() == 0 and feature_cache.claim(parts, plan | {"keep_samples": keep_samples}):
            whole = [first for first in firsts if feature_cache.read(parts, first) is not None]
            if whole:
                say(f"going on: {len(whole)} of {len(firsts)} parts are there")
        whole = sharding.agreed(whole)
        with Ticker(images.num, "samples", sum(min(images.batch, images.num - first) for first in whole)) as ticker:
            for first in [first for first in firsts if first not in whole]:
                count = min(images.batch, images.num - first)
                batch = images.read(first, count)
                y = None if images.conditions is None else conditioning.taken(images.conditions, first, count)
                features = extract(batch, y)
                if jax.process_index() == 0:
                    shown = {n: batch[n - first] for row in rows for n in row if first <= n < first + count}
                    feature_cache.write(parts, first, features, batch if keep_samples else batch[:0], shown)
                ticker.update(count)
        sharding.wait_for_all("features are written")
        if jax.process_index() != 0:
            return {}
        say(f"computing the scores of {images.num:,} images")
        scores: dict[str, float] = {}
        for one in judges.extractors:
            features = feature_cache.features(parts, firsts, one.name)
            scores |= scoring.scores(one.name, features, statistics.get(one.name))
        seconds = round(time.monotonic() - started, 1)
        record = {"scores": scores, "preset": images.preset, "plan": plan, "versions": versions()}
        record |= {"seconds": seconds, "resumed": bool(whole)}
        with feature_cache.writing(folder):
            if rows:
                shown = feature_cache.shown(parts, firsts)
                numbers = [number for row in rows for number in row]
                names = images.named(jax.tree.map(lambda leaf: leaf[np.array(numbers)], images.conditions))
                samples = np.stack([shown[number] for number in numbers])
                pictures.save(folder / "grid.png", pictures.picture(samples, names, images.video, len(rows[0])))
            if keep_samples:
                feature_cache.join_images(parts, firsts, images.num, images.labels, folder / SAMPLES)
            write_json(folder / SCORES, record)
        feature_cache.remove(parts, firsts)
        return scores


def finished(folder: Path, plan: Mapping[str, Any]) -> dict[str, float] | None:
    """The scores in a folder, None if there are none. ConfigError if they are of another plan."""
    if not (folder / SCORES).exists():
        return None
    try:
        record = read_json(folder / SCORES)
        before, scores = record["plan"], {name: float(score) for name, score in record["scores"].items()}
        if not isinstance(before, dict):
            raise ValueError("its plan is no JSON object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        check_machine(error)
        raise ConfigError(f"{folder / SCORES} is damaged ({error!s:.200}): remove it") from error
    check_same(f"{folder} holds an evaluation", before, plan, "choose another --out")
    return scores


def sweep_of(given: Sequence[str], extra: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All combinations of several `NAME=VALUE,VALUE`; [{}] for none. extra: the arguments that follow --sweep."""
    for text in extra:
        if not given or "=" not in text:
            raise ConfigError(f"unexpected argument {text!r}")
    known = registry.options(sampler.make)
    axes = {}
    for text in [*given, *extra]:
        name, _, values = text.partition("=")
        if name not in known or name == "batch_size" or not values:
            raise ConfigError(f"--sweep {text}: wanted NAME=VALUE,VALUE with NAME one of {', '.join(known)}")
        axes[name] = [_value(name, value, text) for value in values.split(",")]
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _value(name: str, value: str, text: str) -> Any:
    """A value of a sweep with the type of its option; an interval is lo:hi."""
    if isinstance(registry.options(sampler.make)[name].default, str):
        return value
    try:
        if name == "guidance_interval":
            low, high = value.split(":")
            return float(low), float(high)
        return int(value) if name in ("steps", "guidance_channels") else float(value)
    except ValueError:
        form = "lo:hi" if name == "guidance_interval" else "a number"
        raise ConfigError(f"--sweep {text}: {value!r} is no {name}, wanted {form}") from None


def judges_of(
    extractors: Sequence[str], references: Sequence[str], workdir: str | None, few: bool = False, trust: bool = False
) -> Judges:
    """The networks and references that the flags name; by default those of the evaluators `scores` of the run.

    trust: see `config.load`.
    """
    chosen = cli.named_files("extractor", extractors)
    places, paths = dict.fromkeys(chosen, "--extractor"), dict.fromkeys(references, "--reference")
    if workdir is not None and not chosen:
        config = configs.load(Path(workdir).expanduser(), ["evaluators"], trust=trust)
        check(config, ["evaluators"])
        for label, one in config.evaluators.items():
            if one.name == "scores":
                name, place = one.get("extractor", "inception"), f"config.evaluators.{label}"
                chosen[name], places[name] = {"file": one.file} if one.get("file") else {}, place
                if one.get("reference") and not references:
                    paths[one.reference] = place
    if not chosen:
        raise ConfigError("give a feature network: --extractor=inception=FILE, with the weights of FID's Inception")
    made, opened = [], []
    for name, options in chosen.items():
        with configs.named(places[name], options):
            made.append(networks.make(name, **options))
    for path, place in paths.items():
        with configs.named(place, ()):
            opened.append(open_reference(path))
    return Judges(made, opened, few)


def run(
    judges: Judges, points: Sequence[Point], images_at: Callable[[Point], Images], folder: Path, keep: bool = False
) -> list[tables.Row]:
    """Evaluate every point of a sweep, [{}] for none, in a folder of its own. keep: also write samples.npz."""
    begin = time.monotonic()
    opened = [images_at(point) for point in points]
    for images in opened:
        in_range("--num", images.num, 2)
        given = (images.shape, images.num, judges.few, images.conditions)
        compared = scoring.compared(judges.extractors, judges.references, *given)
    extract = scoring.extraction(judges.extractors, sharding.make(), opened[0].batch)
    for reference in judges.references if jax.process_index() == 0 else ():
        say(f"reference: {reference.about['name']}")
    statistics = scoring.references_for(compared, judges.references, extract, opened[0].batch)
    speaks, swept = jax.process_index() == 0, len(points) > 1
    rows: list[tables.Row] = []
    for point, images in zip(points, opened, strict=True):
        place = folder / tables.label(point) if point else folder
        if speaks:
            say(f"{images.name}{', ' + tables.label(point) if point else ''}")
        rows.append((point, evaluate(images, judges, extract, statistics, place, keep)))
        if speaks and swept:
            tables.write_csv(folder / "sweep.csv", rows)
    if speaks:
        print(tables.table(rows))
        if swept:
            for suffix in (".png", ".svg"):
                tables.plot_sweep(folder / f"sweep{suffix}", rows, opened[0].name)
        names = {"scores": SCORES, "grid": "grid.png", "moving": "grid.gif"}
        names = {"table": "sweep.csv", "picture": "sweep.png"} if swept else names
        places = {what: folder / name for what, name in names.items()}
        done(time.monotonic() - begin, {what: place for what, place in places.items() if place.exists()})
    return rows


if __name__ == "__main__":
    run_flags.define_flags()
    flags.adopt_module_key_flags(run_flags)
    of_file = "Images to score instead: an .npz with `arr_0`, uint8 [n h w 3] (videos: [n f h w 3]), or a folder."
    flags.DEFINE_string("samples", None, of_file)
    flags.DEFINE_multi_string("reference", [], "Statistics or images to compare with, see above; may be repeated.")
    flags.DEFINE_multi_string("extractor", [], "NAME=FILE or NAME=FILE,OPTION=VALUE; may be repeated.")
    about = "; ".join(f"{name}: {protocol.about}" for name, protocol in presets.PROTOCOLS.items())
    flags.DEFINE_enum("preset", None, list(presets.PROTOCOLS), f"A paper's protocol; other flags change it. {about}.")
    flags.DEFINE_integer("num", None, f"Number of images; by default as the preset says, {NUM:,}, or all in a file.")
    rules = "balanced: every class in turn; uniform: at random; data: the conditions of held-out examples in order"
    rules += "; shuffled: in an order drawn from --seed, no example twice, of several captions one drawn"
    flags.DEFINE_enum("labels", None, conditioning.RULES, f"{rules}. By default balanced for labels, else data.")
    flags.DEFINE_integer("seed", 0, "Image i depends only on the seed, on i and on its label.")
    flags.DEFINE_multi_string("sweep", [], "OPTION=VALUE,VALUE of the sampler, intervals as lo:hi; all combinations.")
    flags.DEFINE_bool("keep_samples", False, "Also write samples.npz, which the script of ADM reads.")
    flags.DEFINE_bool("few", False, "Allow fewer images than features; the scores compare with no others.")
    flags.DEFINE_string("out", None, "Directory to write to; by default DIR/evaluations/... of the run.")

    def main(extra: list[str]) -> None:
        """Read the flags and run."""
        given = flags.FLAGS
        points = sweep_of(given.sweep, extra)
        judges = judges_of(given.extractor, given.reference, given.workdir, given.few, given.trust_workdir)
        if given.samples is not None:
            for flag in given.get_key_flags_for_module(sys.argv[0]):
                if flag.present and flag.name not in READ_WITH_SAMPLES:
                    raise ConfigError(f"--samples are finished images: --{flag.name} does nothing to them")
            path = Path(given.samples).expanduser().absolute()
            folder = Path(given.out).expanduser() if given.out else path.with_name(f"{path.stem}_scores")
            run(judges, points, lambda point: of_file(path, given.num), folder)
            return
        protocol = presets.PROTOCOLS.get(given.preset)
        defaults = dict(protocol.sampler) | {"rounding": protocol.rounding} if protocol else {}
        source = run_flags.source(defaults)
        source = source._replace(conditions=functools.cache(source.conditions))  # a sweep reads them once
        rule = given.labels or (protocol.labels if protocol else None)
        num = (protocol.num if protocol else NUM) if given.num is None else given.num
        name = source.folder.name.removeprefix("samples_") + (f"_{given.preset}" if given.preset else "")
        folder = Path(given.out).expanduser() if given.out else source.folder.parent / "evaluations" / name
        samplers: dict[str, Sampler] = {}

        def images_at(point: Point) -> Images:
            changed = {name: value for name, value in point.items() if name not in GUIDANCE}
            key = tables.label(changed)
            if key not in samplers:
                samplers[key] = source.make(**(source.options | changed)) if changed else source.sampler
            images = of_source(source, point, samplers[key], num, rule, given.seed)
            return images._replace(preset=given.preset)

        run(judges, points, images_at, folder, given.keep_samples)

    cli.launch(main, arguments=True, several=True, groups=run_flags.GROUPS)
