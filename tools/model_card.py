"""The README.md of a published run, as the Hugging Face Hub shows it: what the weights are, scores, samples, use."""

import shutil
from pathlib import Path
from typing import Any

from diversedit_jax import config as configs
from diversedit_jax.analysis import known_scores
from diversedit_jax.api import Params
from diversedit_jax.config import FILE, PATHS
from diversedit_jax.reading import read_json
from diversedit_jax.runs.trained import Trained
from diversedit_jax.runtime.files import flat, write_text
from diversedit_jax.runtime.versions import parameter_count, versions
from diversedit_jax.weights import hub

GRID, MOVING = "samples.png", "samples.gif"
LIBRARIES = ("diversedit_jax", "jax", "flax", "python")
CARD = """---
license: unknown  # say which before you publish
library_name: diversedit_jax
pipeline_tag: {task}
tags:
{tags}
---

# {title}

{grid}

{facts}

## Scores

{scores}

## Use

With `pip install "diversedit_jax[hub]"`, and OWNER/NAME as on this page:

```bash
python -m diversedit_jax.sample --checkpoint=hf:OWNER/NAME {flags}
```

```python
from diversedit_jax.network import load

model = load("hf:OWNER/NAME")
images = model.sample({arguments})  # uint8 [n *s c], or latents
```

{own}config.json is the config of the run. model.safetensors has the parameters by their names in the network.
"""
WITHOUT = "It was published without samples."
OWN = """The config names code outside of the package: {}. Get it. If you trust it, add `--trust_workdir`, or
`trust_workdir=True` to `load`.

"""


def write(folder: Path, found: Trained, params: Params, weights: str) -> None:
    """Write README.md, and the run's grid of samples beside it, of videos also the one that moves.

    folder: of the published run. weights: which of `trained.WEIGHTS` the parameters are.
    """
    step = found.last
    grids = [found.workdir / "samples" / f"{step:07d}.png", found.workdir / GRID]
    if (grid := next(filter(Path.is_file, grids), None)) is not None and grid != folder / GRID:
        shutil.copyfile(grid, folder / GRID)
        if grid.with_suffix(".gif").is_file():
            shutil.copyfile(grid.with_suffix(".gif"), folder / MOVING)
    config = configs.stored(found.workdir).to_dict()
    scores = {name: f"{value:.6g}" for name, value in known_scores.found(found.workdir).get(step, {}).items()}
    kinds = [config["model"]["name"], config["objective"]["name"], *(one["name"] for one in config["losses"].values())]
    tags = ["jax", "flax", "diffusion", "diffusion-transformer", *(kind for kind in kinds if ":" not in kind)]
    own = [name for key, name in flat(config).items() if key.split(".")[-1] in configs.NAMES and ":" in str(name)]
    facts = {
        "network": described(config["model"]),
        "objective": described(config["objective"]),
        "auxiliary losses": "; ".join(map(described, config["losses"].values())) or "none",
        "data": f"{config['data']['name']}, examples {list(found.space.shape)}, {conditions(found)}",
        "codec": described(config["codec"]),
        "sampler": described(config["sampler"]),
        "parameters": f"{parameter_count(params):,}",
        "step": f"{step:,}, batch size {config['batch_size']}",
        "weights": f"EMA, decay {config['ema_decay']}" if weights == "ema" else "trained, without EMA",
        "written by": ", ".join(f"{name} {value}" for name, value in versions().items() if name in LIBRARIES),
    }
    if text := config["text_encoder"]:
        facts["text encoder"] = described(text)
        use = {"task": "text-to-image", "flags": '--prompts="a red bus"', "arguments": 'prompts=["a red bus"]'}
    else:
        use = {"task": "unconditional-image-generation", "flags": "--num=16", "arguments": "num=16"}
    card = CARD.format(
        tags="\n".join(f"- {tag}" for tag in dict.fromkeys(tags)),
        title=folder.absolute().name,
        grid=next((f"![samples]({name})" for name in (MOVING, GRID) if (folder / name).is_file()), WITHOUT),
        facts=table(facts),
        scores=table(scores) if scores else "None are known.",
        own=OWN.format(", ".join(dict.fromkeys(own))) if own else "",
        **use,
    )
    write_text(folder / "README.md", card)


def paths(workdir: Path) -> dict[str, str]:
    """The paths of this machine that the config of a run names, by key: others do not have them."""
    given = flat(read_json(workdir / FILE))
    return {
        key: path
        for key, path in given.items()
        if key.split(".")[-1] in (*PATHS, "reference") and path is not None and not hub.on_hub(path)
    }


def described(slot: dict[str, Any]) -> str:
    """A part of a config in a line: its name, and its options that are set."""
    given = {
        key: value
        for key, value in slot.items()
        if key != "name" and value is not None and (key not in PATHS or hub.on_hub(value))
    }
    return f"{slot.get('name', '')} ({', '.join(f'{key} {value}' for key, value in given.items())})".strip()


def conditions(found: Trained) -> str:
    """What its samples are conditioned on."""
    if found.experiment.config.text_encoder is not None:
        return "with texts"
    classes = found.space.conditions.classes
    return f"{classes} classes" if classes else "not conditioned on labels"


def table(rows: dict[str, str]) -> str:
    """A table of Markdown with two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
