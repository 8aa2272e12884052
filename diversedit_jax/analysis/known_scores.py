"""Collect the scores that a run has of its samples, by step: from evaluators in training and from `evaluate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from diversedit_jax.config import FILE
from diversedit_jax.evaluation import tables
from diversedit_jax.reading import parse_json, read_json

DISTANCES = ("fid", "fd", "frechet")  # how the names of distances between samples and data begin
TITLES = {"fid": "FID", "sfid": "sFID", "fd": "FD", "sfd": "sFD", "frechet": "Fréchet distance", "inception": "IS"}
LOWER = (*DISTANCES, "sfid", "sfd", "kid", "kd")  # how the names of scores begin that are better if they are lower
HIGHER = ("inception", "precision", "recall", "accuracy", "clip")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def found(workdir: Path | None) -> dict[int, dict[str, float]]:
    """Return {step: {LABEL/name: score}}, those of the run's own sampler first. Unreadable files are left out.

    LABEL is that of an evaluator, or names the preset and the settings that `evaluate` was given.
    """
    if workdir is None:
        return {}
    own, others = evaluations(workdir)
    metrics = workdir / "metrics.jsonl"
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
        try:
            record = parse_json(line)
            step = int(record["step"])
        except UNREADABLE:
            continue
        numbers = {name: x for name, x in record.items() if isinstance(x, int | float) and name not in ("step", "time")}
        if any(is_distance(name) for name in numbers):
            own.setdefault(step, {}).update(numbers)
    return {step: own.get(step, {}) | others.get(step, {}) for step in sorted(own | others)}


def evaluations(workdir: Path) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    """Return what `evaluate` found, as `found` does: with the sampler of the run, and with other settings."""
    try:
        sampler = dict(read_json(workdir / FILE)["sampler"])
    except UNREADABLE:
        sampler = {}
    own, others = {}, {}
    for path in sorted(workdir.glob("evaluations/**/scores.json")):
        try:
            record = read_json(path)
            images = record["plan"]["images"]
            if images["kind"] != "run":
                continue
            where = path.parent.relative_to(workdir / "evaluations").as_posix()
            label = where.removeprefix(str(images["step"])).strip("_/") or "evaluate"
            given = images.get("sampler", {})
            changed = {name: value for name, value in given.items() if sampler.get(name, value) != value}
            if changed and tables.label(changed) not in label:
                label = f"{label} {tables.label(changed)}"
            named = {f"{label}/{name}": float(x) for name, x in record["scores"].items()}
            (others if changed else own).setdefault(int(images["step"]), {}).update(named)
        except UNREADABLE:
            continue
    return own, others


def column(known: Sequence[Mapping[str, float]], kinds: Sequence[str]) -> str | None:
    """Choose the score of these kinds that most checkpoints have. Ties: the first kind, then the first score."""
    names = list(dict.fromkeys(name for scores in known for name in scores))
    found = [
        (sum(name in scores for scores in known), -kinds.index(kind), -names.index(name), name)
        for name in names
        if (kind := kind_of(name)) in kinds and of_samples(name)
    ]
    return max(found)[-1] if found else None


def kind_of(name: str) -> str:
    """Return how a score's name begins: fid for scores/fid, fd for scores/fd_dinov2."""
    return name.rpartition("/")[2].partition("_")[0]


def title(name: str) -> str:
    """Write a score as people do: sFD (dinov2) for scores/sfd_dinov2, with the settings that are not the run's own."""
    kind, network = kind_of(name), name.rpartition("/")[2].removeprefix("inception_score").partition("_")[2]
    label = name.rpartition("/")[0]
    settings = f", {label.removeprefix('evaluate ')}" if "=" in label else ""
    return TITLES.get(kind, kind) + (f" ({network})" if network else "") + settings


def lower_is_better(name: str) -> bool | None:
    """Whether lower values of a score are better; None for a score of unknown kind."""
    kind = kind_of(name)
    return kind in LOWER if kind in (*LOWER, *HIGHER) else None


def is_distance(name: str) -> bool:
    """Whether a score is a Fréchet distance of samples: lower is better."""
    return kind_of(name) in DISTANCES and of_samples(name)


def is_about(name: str) -> bool:
    """Whether a score tells about another one: its spread, its limit, its value in half precision."""
    return name.endswith(("_std", "_floor")) or "float16" in name


def of_samples(name: str) -> bool:
    """Whether a score is of samples: not about another one, and not of real data, LABEL/real/NAME."""
    return not is_about(name) and "/real/" not in name
