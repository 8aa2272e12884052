"""The representation-diversity loss of DiverseDiT (arXiv 2603.04239, Eqs. 9-15), in its published readings.

The paper, the authors' release and their later constant-weight branch differ. `PRESETS` holds all three, and a form of
ours. The functions take the outputs of L blocks, one [b n d] each, as a tuple, a list, or one array [l b n d], of any
framework (`arrays.portable`). They compute in float32 (float64 for float64 input). Blocks are counted from 0 here.
`aligned` is a depth, counted from 1.

`mask` [b n] says which tokens count, such as those of a text without its padding. The result is then that of the
features without the other tokens. None: all count. At least one must.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diversedit_jax.api import AuxLoss, Forward, Term
from diversedit_jax.arrays import portable
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses._shared import in_groups, wide
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.shapes import Array, Bool, Float, PRNGKeyArray

EPS = 1e-8

Features = Sequence[Float[Array, "b n d"]] | Float[Array, "l b n d"]
Mask = Bool[Array, "b n"]
Pairs = Sequence[tuple[int, int]] | np.ndarray | Array  # [p 2]; a traced array where pairs are redrawn in the step

COSINE_FORMS = {"signed": lambda cosine: cosine, "abs": jnp.abs, "squared": lambda cosine: cosine**2}
CHOICES = {
    "rule": ("release", "random_layers", "random_pairs", "all", "adjacent", "mirror"),
    "orthogonality": tuple(COSINE_FORMS),
    "mutual_information": tuple(COSINE_FORMS),
    "dispersion_blocks": ("all", "selected"),
    "weight": ("adaptive", "constant"),
    "denominator": ("hi", "hi-lo"),
    "detach": (None, "first", "second"),
    "target": ("features", "centred", "updates"),
    "compare": ("cosine", "cka"),
}
STREAMS = ("image", "text")


def select_pairs(
    num_blocks: int,
    rule: str = "release",
    *,
    k: int = 10,
    aligned: int | None = None,
    key: PRNGKeyArray | None = None,
    seed: int = 0,
    kinds: int = 1,
) -> Pairs:
    """The pairs of blocks that are compared, [p 2], blocks counted from 0.

    release:        the released code's fixed list of at most `k` pairs, row by row. It starts at block 0. If the block
                    at depth `aligned` (from 1) is aligned to an encoder, it starts at block k - aligned - 1 (a negative
                    number counts from the end). In effect it is mostly one block against the next ten.
    random_layers:  all pairs among `k` random blocks (the paper, suppl. B).
    random_pairs:   `k` random pairs.
    all, adjacent:  every pair; each block with the next.
    mirror:         block i with block L - 1 - i, the pairs of the long residual connections.

    The random rules draw with `key` if given (traced, redrawn at every step), else once from `seed`.

    kinds: of blocks, which alternate: 2 where attention is factorised. The rule then chooses pairs of blocks of the
        same kind, among those of each kind: neighbours of different kinds are different anyway.
    """
    one_of("diversity: rule", rule, CHOICES["rule"])
    in_range("diversity: number of blocks", num_blocks, 2)
    in_range("diversity: aligned", 1 if aligned is None else aligned, 1, num_blocks)
    in_range("diversity: kinds", kinds, 1, num_blocks // 2)
    in_range(f"diversity: k of rule {rule!r}", k, 2 if rule == "random_layers" else 1)
    np_or_jnp = np if key is None else jnp  # numpy's draw is known inside jit as well

    if kinds > 1:
        found = []
        for kind in range(kinds):
            count = len(range(kind, num_blocks, kinds))
            own = None if aligned is None else min((aligned - 1) // kinds + 1, count)
            draw = {"key": None if key is None else jax.random.fold_in(key, kind), "seed": seed + kind}
            found.append(kind + kinds * select_pairs(count, rule, k=k, aligned=own, **draw))
        return np_or_jnp.concatenate(found)

    def permuted(n: int) -> np.ndarray | Array:
        return np.random.default_rng(seed).permutation(n) if key is None else jax.random.permutation(key, n)

    upper = np.stack(np.triu_indices(num_blocks, 1), axis=1)
    match rule:
        case "release":
            limit = min(k, len(upper))
            rows = range(num_blocks) if aligned is None else range(limit - aligned - 1, limit + aligned - 1)
            walk = [(i % num_blocks, j % num_blocks) for i in rows for j in range(i + 1, num_blocks)]
            pairs = np.array([(i, j) for i, j in walk if i != j][:limit])
        case "random_layers":
            chosen = np_or_jnp.sort(permuted(num_blocks)[:k])
            pairs = chosen[np.stack(np.triu_indices(len(chosen), 1), axis=1)]
        case "random_pairs":
            pairs = np_or_jnp.asarray(upper)[permuted(len(upper))[:k]]
        case "all":
            pairs = upper
        case "adjacent":
            pairs = np.array([(i, i + 1) for i in range(num_blocks - 1)])
        case "mirror":
            pairs = np.array([(i, num_blocks - 1 - i) for i in range(num_blocks // 2)])
    if len(pairs) == 0:
        raise ValueError(f"rule {rule!r} with k = {k} and aligned = {aligned} gives no pair for {num_blocks} blocks")
    return pairs


@portable
def orthogonality(
    features: Features,
    pairs: Pairs,
    *,
    of_cosine: str = "signed",
    detach: str | None = None,
    mask: Mask | None = None,
) -> Float[Array, ""]:
    """L_orth: the mean over pairs of the cosine between the blocks' mean features (Eqs. 9-10).

    of_cosine: `signed` as published, or `abs` or `squared`. detach: stop the gradient of the `first` or the `second`
    block of every pair.
    """
    _check(orthogonality=of_cosine, detach=detach)
    means = jnp.stack([_mean(f, mask) for f in _blocks(features, mask)])
    pairs = _checked_pairs(pairs, len(means))
    units = means / _norm(means, axis=1)
    first, second = _detach(units, units, detach)
    cosines = jnp.sum(first[pairs[:, 0]] * second[pairs[:, 1]], axis=1)
    return COSINE_FORMS[of_cosine](cosines).mean()


@portable
def mutual_information(
    features: Features,
    pairs: Pairs,
    *,
    of_cosine: str = "abs",
    detach: str | None = None,
    mask: Mask | None = None,
) -> Float[Array, ""]:
    """L_MI: the mean over pairs of the mean cosine between two blocks' features of the same token (Eqs. 11-12).

    of_cosine, applied to each pair's mean: `abs` as released, `signed` as in the paper, or `squared`. Known pairs cost
    one reduction each. Traced pairs cost the [l l] matrix of all mean cosines.
    """
    _check(mutual_information=of_cosine, detach=detach)
    blocks = _blocks(features, mask)
    pairs = _checked_pairs(pairs, len(blocks))
    scales = [1 / _norm(f, axis=-1) for f in blocks]  # [b n 1]: the unit features are never stored
    tokens = _tokens(blocks[0], mask)
    if isinstance(pairs, np.ndarray):
        cosines = []
        for i, j in pairs.tolist():
            (f_i, scale_i), (f_j, scale_j) = _detach((blocks[i], scales[i]), (blocks[j], scales[j]), detach)
            cosines.append(jnp.sum(jnp.sum(f_i * f_j, axis=-1, keepdims=True) * scale_i * scale_j) / tokens)
        cosines = jnp.stack(cosines)
    else:
        units = jnp.stack([f * scale for f, scale in zip(blocks, scales, strict=True)])
        first, second = _detach(units, units, detach)
        highest = jax.lax.Precision.HIGHEST
        cosines = jnp.einsum("lbnd,mbnd->lm", first, second, precision=highest)[pairs[:, 0], pairs[:, 1]] / tokens
    return COSINE_FORMS[of_cosine](cosines).mean()


@portable
def mutual_information_among(
    features: Features, block_weights: Float[Array, " l"] | None = None, *, mask: Mask | None = None
) -> Float[Array, ""]:
    """The signed L_MI over all pairs of blocks, where the pair (i, j) has the weight w_i w_j. It visits no pairs.

    The sum over pairs of w_i w_j <u_i, u_j>, u a token's unit features, is (|sum_i w_i u_i|^2 - sum_i |w_i u_i|^2) / 2.
    The work is linear in the blocks, and no unit features are stored. With `block_weights` of 0 and 1 (None: all 1) it
    is `mutual_information` over the pairs among the blocks of weight 1.
    """
    blocks = _blocks(features, mask)
    weights = jnp.ones(len(blocks), blocks[0].dtype) if block_weights is None else block_weights
    total, own = 0.0, 0.0
    for f, weight in zip(blocks, weights, strict=True):
        scale = weight / _norm(f, axis=-1)
        total += f * scale
        own += jnp.sum(f * f, axis=-1, keepdims=True) * scale**2
    pairs = weights.sum() ** 2 - jnp.sum(weights**2)  # twice
    cosines = jnp.sum(total * total, axis=-1, keepdims=True) - own
    return _mean(cosines, mask, axis=None) / pairs


@portable
def dispersion(
    features: Features,
    *,
    absolute: bool = True,
    scale: float = 0.25,
    clamp: bool = True,
    block_weights: Float[Array, " l"] | None = None,
    mask: Mask | None = None,
) -> Float[Array, ""]:
    """L_disp: minus the variance over channels of the channels' mean normalised activation (Eqs. 13-14).

    Each channel of each block is normalised along the samples (b n). The means over samples are averaged over the
    blocks (weighted by `block_weights`) and divided by the largest. Their population variance is divided by `scale`.
    absolute: average magnitudes. clamp: limit the variance to [0, 1]. The release does both. The paper does neither:
    its form divides by a signed maximum and is unbounded.
    """
    usage = []
    for f in _blocks(features, mask):
        size = jnp.abs(f) if absolute else f
        usage.append(_mean(size, mask) / _norm(f, axis=(0, 1))[0, 0])
    usage = jnp.average(jnp.stack(usage), axis=0, weights=block_weights)
    largest = usage.max()  # the release adds 1e-8 to it, which float32 does not see
    variance = jnp.var(usage / jnp.where(jnp.abs(largest) < EPS, EPS, largest)) / scale
    return -(jnp.clip(variance, 0, 1) if clamp else variance)


def targets(features: Features, target: str, mask: Mask | None = None) -> tuple[Array, ...]:
    """What is made diverse. `features`: as they are. `centred`: minus the mean token of each block. `updates`: centred
    differences of each entry and the one before, one fewer: with the embedding as first entry, what each block adds.

    An offset that all tokens share lowers every cosine of plain features, and makes no token differ from another. It
    cannot lower the other two. Their L_orth is 0, because it compares means. Tokens that do not count are 0.
    """
    one_of("diversity: target", target, CHOICES["target"])
    blocks = _blocks(features, mask)
    if target == "updates":
        blocks = tuple(after - before for before, after in itertools.pairwise(blocks))
    return blocks if target == "features" else tuple(_centred(f, mask) for f in blocks)


@portable
def linear_cka(
    features: Features, pairs: Pairs, *, detach: str | None = None, mask: Mask | None = None
) -> Float[Array, ""]:
    """The mean over pairs of the linear CKA of two blocks over all tokens, in [0, 1] (Kornblith et al., arXiv
    1905.00414). It does not change if a block is rotated, scaled or shifted."""
    _check(detach=detach)
    blocks = _blocks(features, mask)
    pairs = _checked_pairs(pairs, len(blocks))
    rows = jnp.stack([_centred(f, mask).reshape(-1, f.shape[-1]) for f in blocks])
    first, second = _detach(rows[pairs[:, 0]], rows[pairs[:, 1]], detach)

    def energy(a: Array, b: Array) -> Array:  # |A^T B|^2 of each pair
        product = jnp.einsum("pnd,pne->pde", a, b, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(product**2, axis=(1, 2))

    own = jnp.maximum(energy(first, first) * energy(second, second), EPS**2)
    return jnp.mean(energy(first, second) * jax.lax.rsqrt(own))


def adaptive_weight(
    loss: Float[Array, ""], lo: float = 0.1, hi: float = 0.5, *, denominator: str = "hi", detach: bool = False
) -> Float[Array, ""]:
    """The weight of the diversity loss (Eq. 15): 0 up to `lo`, a ramp, 1 above `hi`.

    denominator: the published ramp (loss - lo) / hi jumps from 0.8 to 1 at `hi`; `hi-lo` makes it continuous.
    detach: stop the gradient through the weight. The release lets it pass.
    """
    in_range("diversity: lo", lo, 0, below=hi)
    one_of("diversity: denominator", denominator, CHOICES["denominator"])
    loss = jax.lax.stop_gradient(loss) if detach else loss
    ramp = (loss - lo) / (hi if denominator == "hi" else hi - lo)
    return jnp.where(loss > hi, 1.0, jnp.where(loss > lo, ramp, 0.0))


class Settings(NamedTuple):
    """One reading of the loss: which features, which pairs, which form of each term, which weight.

    rule: which pairs of blocks are compared, see `select_pairs`. k: how many, or among how many blocks.
    kinds: of blocks: 2 where attention is factorised. Pairs are then of the same kind, chosen among those of each kind.
    redraw: random rules draw new pairs at every step.
    weights: of L_orth, L_MI and L_disp.
    orthogonality, mutual_information: what is minimised of a cosine: `signed`, `abs` or `squared`.
    dispersion_absolute: L_disp takes magnitudes. dispersion_scale: divides its variance. dispersion_clamp: limits it to
        [0, 1].
    dispersion_blocks: `all`, or `selected`: those in a pair.
    weight: `adaptive` (Eq. 15) or `constant`.
    lo, hi: limits of the adaptive weight: 0 up to `lo`, 1 above `hi`.
    denominator: of its ramp: `hi` as published, or `hi-lo`, which is continuous.
    detach_weight: no gradient passes through it.
    coefficient: of the whole loss.
    target: `features`, `centred` or `updates`, see `targets`; the last two are not the paper's.
    compare: L_MI by `cosine` of tokens, as in the paper, or by `cka`, see `linear_cka`.
    """

    rule: str = "release"
    k: int = 10
    kinds: int = 1
    redraw: bool = False
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    orthogonality: str = "signed"
    mutual_information: str = "abs"
    dispersion_absolute: bool = True
    dispersion_scale: float = 0.25
    dispersion_clamp: bool = True
    dispersion_blocks: str = "all"
    weight: str = "adaptive"
    lo: float = 0.1
    hi: float = 0.5
    denominator: str = "hi"
    detach_weight: bool = False
    coefficient: float = 1.0
    target: str = "features"
    compare: str = "cosine"


RANDOM = ("random_layers", "random_pairs")  # rules that draw

PRESETS = {
    "release": Settings(),
    "release_const": Settings(weight="constant", coefficient=0.001),
    "paper": Settings(
        rule="random_layers",
        redraw=True,
        weights=(0.33, 0.33, 0.33),
        mutual_information="signed",
        dispersion_absolute=False,
        dispersion_scale=1.0,
        dispersion_clamp=False,
        dispersion_blocks="selected",
    ),
    "updates": Settings(rule="all", weights=(0, 1, 0), target="updates"),
}


@portable
def diversity_loss(
    features: Features,
    pairs: Pairs | None = None,
    settings: Settings = PRESETS["release"],
    *,
    aligned: int | None = None,
    key: PRNGKeyArray | None = None,
    seed: int = 0,
    groups: int = 1,
    detach: str | None = None,
    mask: Mask | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """L_div = w_orth L_orth + w_MI L_MI + w_disp L_disp, times its adaptive weight and coefficient (Eqs. 9-15).

    pairs: [p 2], from `select_pairs`. None: those of `settings`. The rules `random_layers` and `all` then cost less
        than the same pairs given (see `mutual_information_among`).
    aligned: the depth (from 1) of the block that is aligned to an encoder, for the released pair rule.
    key, seed: draw the pairs of the random rules: a key for each step where `settings` redraw, else `seed`.
    groups: take the statistics and the weight within each of so many equal parts of the batch, and average. The
        published runs took them per GPU, 32 examples each.
    detach: stop the gradient of the `first` or the `second` block of each pair.

    Returns the weighted loss and its parts: orthogonality, mutual_information, dispersion, loss (unweighted), weight.
    ConfigError for a word that no option has, and for settings that redraw without a key.
    """
    check_settings(settings, detach)
    blocks = targets(features, settings.target, mask)
    complete = settings.rule in ("random_layers", "all") and settings.kinds == 1  # all pairs of some blocks
    complete = complete and pairs is None
    if pairs is None:
        if settings.redraw and settings.rule in RANDOM and key is None:
            raise ConfigError(f"diversity: rule {settings.rule!r} with redraw = True needs a key for each step")
        key = key if settings.redraw else None
        how = {"k": settings.k, "aligned": aligned, "key": key, "seed": seed, "kinds": settings.kinds}
        pairs = select_pairs(len(blocks), settings.rule, **how)
    pairs = _checked_pairs(pairs, len(blocks))
    compute = partial(_diversity_loss, pairs=pairs, complete=complete, settings=settings, detach=detach)
    if groups == 1:
        return compute(blocks, mask)
    parts = jax.tree.map(lambda x: in_groups(x, groups), (list(blocks), mask))
    return jax.tree.map(jnp.mean, jax.vmap(compute)(*parts))


def _diversity_loss(
    blocks: Sequence[Array],
    mask: Mask | None,
    *,
    pairs: Pairs,
    complete: bool,
    settings: Settings,
    detach: str | None,
):
    s = settings
    selected = jnp.zeros(len(blocks), blocks[0].dtype).at[pairs.reshape(-1)].set(1)
    if s.compare == "cka":
        information = linear_cka(blocks, pairs, detach=detach, mask=mask)
    elif complete and s.mutual_information == "signed" and detach is None:
        known = isinstance(pairs, np.ndarray)
        compared, weights = ([blocks[i] for i in np.unique(pairs)], None) if known else (blocks, selected)
        information = mutual_information_among(compared, weights, mask=mask)
    else:
        information = mutual_information(blocks, pairs, of_cosine=s.mutual_information, detach=detach, mask=mask)
    chosen = selected if s.dispersion_blocks == "selected" else None
    how = {"absolute": s.dispersion_absolute, "scale": s.dispersion_scale, "clamp": s.dispersion_clamp}
    # the means of centred features are 0 up to rounding, and so without a direction
    apart = 0.0
    if s.target == "features":
        apart = orthogonality(blocks, pairs, of_cosine=s.orthogonality, detach=detach, mask=mask)
    terms = {
        "orthogonality": jnp.asarray(apart, information.dtype),
        "mutual_information": information,
        "dispersion": dispersion(blocks, **how, block_weights=chosen, mask=mask),
    }
    loss = sum(weight * term for weight, term in zip(s.weights, terms.values(), strict=True))
    weight = jnp.ones_like(loss)
    if s.weight == "adaptive":
        weight = adaptive_weight(loss, s.lo, s.hi, denominator=s.denominator, detach=s.detach_weight)
    return s.coefficient * weight * loss, terms | {"loss": loss, "weight": s.coefficient * weight}


def make(
    *,
    preset: str = "release",
    stream: str = "image",
    aligned: int | None = None,
    groups: int = 1,
    detach: str | None = None,
    warmup_steps: int = 0,
    seed: int = 0,
    rule: str | None = None,
    k: int | None = None,
    kinds: int | None = None,
    redraw: bool | None = None,
    weights: tuple[float, float, float] | None = None,
    orthogonality: str | None = None,
    mutual_information: str | None = None,
    dispersion_absolute: bool | None = None,
    dispersion_scale: float | None = None,
    dispersion_clamp: bool | None = None,
    dispersion_blocks: str | None = None,
    weight: str | None = None,
    lo: float | None = None,
    hi: float | None = None,
    denominator: str | None = None,
    detach_weight: bool | None = None,
    coefficient: float | None = None,
    target: str | None = None,
    compare: str | None = None,
) -> AuxLoss:
    """The diversity loss for the trainer: a preset, and what differs from it (None: as the preset has it).

    preset: `release` (the authors' first code), `release_const` (their later branch: constant weight 0.001), `paper`,
        or `updates` (ours: only L_MI, of what each block adds, see `targets`; tools/studies/README.md has evidence).
    stream: whose blocks are made diverse, `image`; or `text`, in a network with two streams. Only tokens of the text
        itself count, by the `mask` of the condition. The last block gives no text, so there is one block fewer.
    warmup_steps: the term grows linearly from 0 over so many steps (their third branch: 10,000).
    seed: the draw of the random pair rules where `redraw` is off.

    The other options: `Settings` and `diversity_loss`.
    """
    given = locals()
    one_of("diversity: preset", preset, PRESETS)
    settings = PRESETS[preset]._replace(**{name: given[name] for name in Settings._fields if given[name] is not None})
    check_settings(settings, detach)
    one_of("diversity: stream", stream, STREAMS)
    in_range("diversity: aligned", 1 if aligned is None else aligned, 1)
    in_range("diversity: groups", groups, 1)
    in_range("diversity: warmup_steps", warmup_steps, 0)
    in_range("diversity: seed", seed, 0)

    def apply(forward, batch, context):
        draw = {"aligned": aligned, "key": context.key, "seed": seed}
        features, mask = (forward.features, None) if stream == "image" else _text(forward)
        how = draw | {"groups": groups, "detach": detach, "mask": mask}
        loss, metrics = diversity_loss(features[settings.target != "updates" :], settings=settings, **how)
        ramp = jnp.minimum(1.0, context.step / warmup_steps) if warmup_steps else 1.0
        metrics |= {"weight": ramp * metrics["weight"]}
        return Term(ramp * loss, metrics, full=settings.coefficient * metrics["loss"])

    return AuxLoss(apply)


def check_settings(settings: Settings, detach: str | None) -> None:
    """Raise ConfigError for settings that cannot be."""
    _check(**{option: getattr(settings, option) for option in CHOICES if option != "detach"}, detach=detach)
    if len(settings.weights) != 3:
        raise ConfigError(f"diversity: weights = {settings.weights}: wanted three, of L_orth, L_MI and L_disp")
    in_range("diversity: k", settings.k, 1)
    in_range("diversity: kinds", settings.kinds, 1)
    in_range("diversity: hi", settings.hi, above=0)
    in_range("diversity: lo", settings.lo, 0, below=settings.hi)


def _check(**words: str | None) -> None:
    for option, word in words.items():
        one_of(f"diversity: {option}", word, CHOICES[option])


def _text(forward: Forward) -> tuple[tuple[Array, ...], Mask]:
    """The features of the text stream, and which of its tokens are text."""
    text = getattr(forward.features, "text", None)
    if text is None:
        raise ConfigError("diversity: stream = 'text' needs a network with a text stream, such as mmdit")
    if not isinstance(forward.y, Mapping) or "mask" not in forward.y:
        raise ConfigError(
            "diversity: stream = 'text' needs the `mask` of the texts in the conditions, and they have none: give data "
            "with the tokens of captions, and config.text_encoder"
        )
    return text, forward.y["mask"]


def _blocks(features: Features, mask: Mask | None) -> tuple[Array, ...]:
    """The features of the blocks, checked, in at least float32. Tokens that do not count are 0."""
    shapes = [jnp.shape(f) for f in features]
    in_range("diversity: number of blocks", len(shapes), 2)
    for index, shape in enumerate(shapes):
        if len(shape) != 3 or shape != shapes[0]:
            wanted = f"wanted [batch, tokens, width], the same for every block; block 0 has {shapes[0]}"
            raise ValueError(f"block {index}: features have shape {shape}, {wanted}")
    blocks = tuple(map(wide, features))
    if mask is None:
        return blocks
    if mask.shape != shapes[0][:2]:
        raise ValueError(f"mask has shape {mask.shape}, wanted {shapes[0][:2]}, as the tokens of the features")
    return tuple(jnp.where(mask[..., None], f, 0) for f in blocks)


def _tokens(f: Array, mask: Mask | None) -> int | Array:
    """How many tokens count."""
    return f.shape[0] * f.shape[1] if mask is None else mask.sum().astype(f.dtype)


def _mean(f: Array, mask: Mask | None, axis: tuple[int, int] | None = (0, 1)) -> Array:
    """The mean over the tokens that count; the others are 0. axis: None for numbers, [b n 1]."""
    return f.mean(axis=axis) if mask is None else f.sum(axis=axis) / _tokens(f, mask)


def _centred(f: Array, mask: Mask | None) -> Array:
    """Features minus their mean token. Tokens that do not count stay 0."""
    centred = f - _mean(f, mask)[None, None]
    return centred if mask is None else jnp.where(mask[..., None], centred, 0)


def _checked_pairs(pairs: Pairs, num_blocks: int) -> np.ndarray | Array:
    """Known pairs as a numpy array [p 2]. Traced pairs as they are, not checked."""
    if isinstance(pairs, jax.core.Tracer):
        return pairs
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs have shape {pairs.shape}, wanted [pairs, 2]")
    if pairs.min() < 0 or pairs.max() >= num_blocks:
        raise ValueError(f"pairs = {pairs.tolist()}: the network has blocks 0 to {num_blocks - 1}")
    return pairs


def _norm(x: Array, axis: int | tuple[int, ...]) -> Array:
    """The L2 norm along `axis`, kept as an axis of size 1, at least EPS, with a gradient of zero below it."""
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), EPS**2))


def _detach(first, second, which: str | None):
    """Two pytrees, with the gradient of the `first` or the `second` stopped. None: of neither."""
    stop = jax.lax.stop_gradient
    return stop(first) if which == "first" else first, stop(second) if which == "second" else second
