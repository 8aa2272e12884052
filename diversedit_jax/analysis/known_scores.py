"""Scores that a run has of its samples, by step: those of evaluators in training, and those of `evaluate`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

DISTANCES = ("fid", "fd", "frechet")  # beginnings of the names of distances between samples and data


def found(workdir: Path | None) -> dict[int, dict[str, float]]:
    """{step: {name: score}}, names as LABEL/name, with the label of an evaluator or what `evaluate`
    was asked for (its preset, a point of a sweep); what cannot be read is left out."""
    scores: dict[int, dict[str, float]] = {}
    if workdir is None:
        return scores
    for line in _lines(workdir / "metrics.jsonl"):
        numbers = {name: x for name, x in line.items() if isinstance(x, int | float) and name not in ("step", "time")}
        if any(is_distance(name) for name in numbers):
            scores.setdefault(int(line["step"]), {}).update(numbers)
    for path in sorted(workdir.glob("evaluations/**/scores.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            images = record["plan"]["images"]
            where = path.parent.relative_to(workdir / "evaluations").as_posix()
            label = where.removeprefix(str(images["step"])).strip("_/") or "evaluate"
            named = {f"{label}/{name}": float(x) for name, x in record["scores"].items()}
            if images["kind"] == "run":
                scores.setdefault(int(images["step"]), {}).update(named)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return scores


def column(known: Sequence[Mapping[str, float]], kinds: Sequence[str]) -> str | None:
    """The score of one of these kinds, beginnings of names, that most checkpoints have, so that a table compares like
    with like; of equals the kind that comes first, and of that the last that was written."""
    names = list(dict.fromkeys(name for scores in known for name in reversed(scores)))
    found = [
        (sum(name in scores for scores in known), -kinds.index(kind), -names.index(name), name)
        for name in names
        if (kind := kind_of(name)) in kinds and not name.endswith(("_std", "_floor")) and "float16" not in name
    ]
    return max(found)[-1] if found else None


def kind_of(name: str) -> str:
    """fid of scores/fid, fd of scores/fd_dinov2."""
    return name.rpartition("/")[2].partition("_")[0]


TITLES = {"fid": "FID", "sfid": "sFID", "fd": "FD", "sfd": "sFD", "frechet": "Fréchet distance", "inception": "IS"}


def title(name: str) -> str:
    """A score as people write it, and the network in brackets: scores/sfd_dinov2 as sFD (dinov2)."""
    kind, network = kind_of(name), name.rpartition("/")[2].removeprefix("inception_score").partition("_")[2]
    return TITLES.get(kind, kind) + (f" ({network})" if network else "")


def is_distance(name: str) -> bool:
    """Whether a score is a Frechet distance: lower is better."""
    return kind_of(name) in DISTANCES and not name.endswith(("_std", "_floor"))


def _lines(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and isinstance(parsed.get("step"), int):
            lines.append(parsed)
    return lines
