"""Trained networks from Python: open one, sample, look inside, score and analyze it, in a line each.

model = load("runs/digits")                       # or load("hf:owner/name"), or the file of a release
images = model.sample(labels=[3, 5], num=16)      # uint8 [16 h w c]; in a notebook it shows as a grid
blocks = model.features(images, t=0.5)            # [blocks 16 tokens width]
scores = model.evaluate(num=1000)                 # {"fd_digits": ..., ...}
model.analyze()                                   # in a notebook it shows the figures
"""

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from diversedit_jax import analyze, evaluate, sharding
from diversedit_jax import config as configs
from diversedit_jax import sample as sampling
from diversedit_jax.analysis import features
from diversedit_jax.analysis.measure import Estimator, Settings, split_of
from diversedit_jax.analysis.study import PARTS, Study
from diversedit_jax.api import Condition, Params, Space
from diversedit_jax.codecs import network_space
from diversedit_jax.codecs import vae as vae_codec
from diversedit_jax.data.levels import VALUES
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import tables
from diversedit_jax.registry import one_of
from diversedit_jax.runs import flags as run_flags
from diversedit_jax.runs import trained
from diversedit_jax.runs.trained import Source, Trained
from diversedit_jax.runtime import cli, pictures, versions
from diversedit_jax.sampling import sampler
from diversedit_jax.weights import hub


class Samples(np.ndarray):
    """Samples [n ...] on the host, uint8 images or float32 latents. A notebook shows them as a grid; videos move in it.

    labels: the condition of each. names: of their classes. Parts and copies have neither: their order may be another.
    video:  they are videos [n f h w c], and so are parts with as many axes.
    """

    labels: Any = None
    names: list[str] | None = None
    video: bool = False

    def __array_finalize__(self, source: Any) -> None:
        self.video = getattr(source, "video", False)

    def __repr__(self) -> str:
        return f"<Samples {self.dtype} {list(self.shape)}>" if self.ndim else super().__repr__()

    def _repr_png_(self) -> bytes | None:
        return pictures.png(self._picture().still) if self.dtype == np.uint8 and self.ndim >= 4 else None

    def _repr_html_(self) -> str | None:  # every notebook shows it, but not every one a GIF by itself
        if self.dtype != np.uint8 or self.ndim != 5 or not self.video:
            return None
        moving = base64.b64encode(self._picture().moving).decode()
        return f'<img alt="{html.escape(repr(self))}" src="data:image/gif;base64,{moving}">'

    def _picture(self) -> pictures.Picture:
        return pictures.picture(np.asarray(self[:256]), self.names and self.names[:256], self.video)


class Report:
    """The findings of an analysis. A notebook shows the summary and the figures with their captions.

    page: report.html; the figures, and their numbers as .csv, lie beside it. studies: the numbers themselves.
    """

    def __init__(self, page: Path, studies: Sequence[Study]):
        self.page, self.studies = page, studies

    def __repr__(self) -> str:
        return f"{tables.aligned(analyze.summary(self.studies), left=1)}\n{self.page}"

    def _repr_html_(self) -> str:
        figures = re.findall(r"<h2>.*?</h2><p>.*?</p>|<img [^>]*>", self.page.read_text(encoding="utf-8"))
        return "\n".join([f"<pre>{html.escape(repr(self))}</pre>", *figures])


class Network:
    """A trained network at one step: of a run, or of a release.

    params: of the network. config: of the run, or made for the release. step: of the checkpoint, 0 for a release.
    """

    def __init__(self, found: Trained, source: Source, weights: str, reopen: Callable[[], Trained], trusted: bool):
        self._found, self._source, self._weights, self._reopen, self._trusted = found, source, weights, reopen, trusted
        self._samplers: dict[str, sampler.Sampler] = {}
        self.params: Params = source.params
        self.step: int = source.about.get("step", 0)
        self.workdir: Path | None = found.workdir
        self.config: ConfigDict = found.experiment.config if found.workdir is None else configs.stored(found.workdir)

    def __repr__(self) -> str:
        count, space = versions.parameter_count(self.params), self._found.space
        kind = "conditions" if (classes := space.conditions.classes) is None else f"{classes} classes"
        return f"<Network {self._source.name}: {count:,} parameters, examples {list(space.shape)}, {kind}>"

    def sample(
        self,
        labels: Sequence[int] | int | None = None,
        num: int | None = None,
        seed: int = 0,
        *,
        prompts: Sequence[str] | str | None = None,
        negative_prompt: str | None = None,
        **options: Any,
    ) -> Samples:
        """Draw samples: uint8 images [n h w c], videos [n f h w c], ..., or float32 latents if there is no decoder.

        labels:  taken in turn. None: every class in turn, or the conditions of held-out data.
        num:     how many; by default one for each label or prompt given, else 16.
        seed:    image i depends on the seed, on i and on its label or prompt.
        prompts: texts, taken in turn. negative_prompt: guide away from it instead of from the empty text.
        options: of the sampler, such as steps, cfg_scale, guidance_interval, solver (`sampling.sampler.make`).
        """
        given = None if labels is None else np.atleast_1d(np.asarray(labels)).tolist()
        texts = [prompts] if isinstance(prompts, str) else prompts
        num = num or len(given or texts or range(16))
        y = sampling.conditions(self._source, num, seed, given, texts)
        negative = None if negative_prompt is None else sampling.one(self._source.prompts([negative_prompt]))
        found = self._sampler(options)(
            self.params,
            self._source.frozen,
            y,
            seed,
            negative=negative,
            **{name: value for name, value in options.items() if name in evaluate.GUIDANCE},
        ).view(Samples)
        found.labels, found.names, found.video = y, self._source.named(y), self._source.space.video
        return found

    def _sampler(self, options: Mapping[str, Any]) -> sampler.Sampler:
        """The compiled sampler of these options. One serves all scales and intervals of guidance."""
        for name in options:
            one_of("option of the sampler", name, run_flags.SAMPLER)
        changed = {name: value for name, value in options.items() if name not in evaluate.GUIDANCE}
        key = repr(sorted(changed.items()))
        if key not in self._samplers:
            source = self._source
            self._samplers[key] = source.make(**(source.options | changed)) if changed else source.sampler
        return self._samplers[key]

    def features(
        self, images: Array | np.ndarray, t: float, y: Condition | None = None, seed: int = 0
    ) -> Float[Array, "l b n d"]:
        """Compute the output of every block, without prefix tokens.

        images: uint8 [b *s c], or float in the network's space [b *s c]: pixels in [-1, 1], or scaled latents.
        t:      time in [0, 1]: 0 is data, 1 is noise. seed: of the noise.
        y:      condition of each, such as labels [b]. None: the null condition.
        """
        experiment = self._found.experiment
        if more := experiment.components.objective.reads:
            raise ConfigError(
                f"the network also takes {', '.join(more)}: `analyze` computes its features from its data"
            )
        x, count = self._in_network_space(images), len(images)
        if y is None:
            null = self._found.space.conditions.null
            y = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *np.shape(leaf))), null)
        y = experiment.components.codec.condition(self._source.frozen, y)
        batch = sharding.put({"x": x, "y": y}, sharding.replicated(experiment.layout))
        with jax.set_mesh(experiment.layout.mesh):
            return self._passes({"params": self.params}, self._source.frozen, batch, t, jax.random.key(seed))

    @cached_property
    def _passes(self) -> Callable:
        return jax.jit(partial(features.of_encoded, self._found.experiment))

    def _in_network_space(self, images: Array | np.ndarray) -> Array | np.ndarray:
        """Images as x. Floating point numbers are x already."""
        images = np.asarray(images)
        if images.dtype != np.uint8:
            x = images.astype(np.float32)
        elif self._codec.name != "vae":
            x = VALUES[images]
        elif self._codec.vae is None:
            raise ConfigError("these images have to be encoded: open the network with vae=FILE, or give latents")
        else:
            x = self._encoder(images)
        if x.shape[1:] != (wanted := self._space.shape):
            raise ConfigError(f"one image is {list(x.shape[1:])} to the network, which takes {list(wanted)}")
        return x

    @property
    def _codec(self) -> ConfigDict:
        return self._found.experiment.config.codec  # with the changes of `load`

    @cached_property
    def _space(self) -> Space:
        return network_space(self._found.experiment.components.codec, self._found.space)

    @cached_property
    def _encoder(self) -> Callable:
        codec = self._codec
        return vae_codec.mean_encoder(codec.vae, codec.scale, codec.bias, codec.precision)

    def evaluate(
        self,
        num: int = evaluate.NUM,
        *,
        reference: str | Sequence[str] = (),
        extractor: str | Sequence[str] = (),
        labels: str | None = None,
        seed: int = 0,
        few: bool = False,
        out: str | Path | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Score `num` samples against a reference. An evaluation that was interrupted goes on.

        reference, extractor, labels, few, out: as the flags of `python -m diversedit_jax.evaluate`. A run needs
        neither of the first two if its config has evaluators of the kind `scores`.
        options: of the sampler, see `sample`.
        """
        many = [[given] if isinstance(given, str) else list(given) for given in (extractor, reference)]
        judges = evaluate.judges_of(*many, self.workdir and str(self.workdir), few, trust=self._trusted)
        source = self._source._replace(options=self._source.options | options)
        place = source.folder.parent / "evaluations" / source.folder.name.removeprefix("samples_")
        images = partial(evaluate.of_source, source, draw=self._sampler(options), num=num, rule=labels, seed=seed)
        ((_, scores),) = evaluate.run(judges, [{}], lambda point: images(varied=point), Path(out or place))
        return scores

    def analyze(
        self,
        *others: "Network",
        num: int = 512,
        split: str | None = None,
        skip: Sequence[str] = (),
        estimator: Estimator | None = None,
        out: str | Path | None = None,
    ) -> Report:
        """Find out how features differ from block to block, for this network and others, without training.

        All checkpoints of a run are compared, or the one it was opened at with `step`.

        num, split, skip, out: as the flags of `python -m diversedit_jax.analyze`.
        """
        cli.silence()
        chosen = [one._reopen() for one in (self, *others)]
        settings = Settings(estimator or Estimator(), num, split=split_of(chosen[0].data, split))
        default = self._found.folder / "analysis" if self.workdir else Path(f"{self._found.label}_analysis").absolute()
        folder, parts = Path(out or default), [part for part in PARTS if part not in skip]
        studies = analyze.run(chosen, folder, settings, parts=parts, weights=self._weights)
        return Report(folder / "report.html", studies)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    online: bool = False,
    trust_workdir: bool = False,
    **options: Any,
) -> Network:
    """Open a run, or the weights of a public release.

    path:          the workdir of a run, or a file or folder of weights; also a name on the hub, see `weights.hub`.
    step:          of a run: of its checkpoint; None: the last. online: take the trained weights, not their EMA.
    trust_workdir: of a run: run code outside this package that its stored config names.
    options:       vae, rounding, data (a slot of `data`: `config.slot`); of a release also family, heads, weights and
                   sides (`runs.trained.of_release`).

    ConfigError and others of `errors` if it is no such thing.
    """
    place = hub.local(path)
    if configs.holds_run(place) or (place / "checkpoints").is_dir():
        reopen = partial(trained.of_run, path, trust=trust_workdir, **options)
        analyzed = partial(reopen, losses=True)
    elif step is not None or online:
        raise ConfigError(f"{path}: step and online are for a run; this is no workdir of one")
    else:
        reopen = analyzed = partial(trained.of_release, path, **options)
    weights = "online" if online else "ema"
    found = reopen()

    def again() -> Trained:
        """The same with its losses, and all checkpoints unless one was asked for."""
        return analyzed() if step is None else analyzed()._replace(steps=(step,))

    return Network(found, trained.drawing(found, step, weights=weights), weights, again, trust_workdir)
