"""The diversity loss: the published numbers in float64, pairs, the weight and its gradient, groups, frameworks."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from math import comb

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diversedit_jax import losses, models, registry
from diversedit_jax.api import Conditions, Context, Features, Forward, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses import diversity
from diversedit_jax.losses.diversity import (
    CHOICES,
    PRESETS,
    Settings,
    adaptive_weight,
    dispersion,
    diversity_loss,
    linear_cka,
    mutual_information,
    mutual_information_among,
    orthogonality,
    select_pairs,
)
from diversedit_jax.metrics import similarity as block_similarity
from diversedit_jax.models import Keys
from diversedit_jax.models.dit import Merge
from tests import ROOT
from tests.jaxprs import equations

RELEASE = PRESETS["release"]
SIGNED = Settings(
    weights=(0.33,) * 3,
    mutual_information="signed",
    dispersion_absolute=False,
    dispersion_scale=1.0,
    dispersion_clamp=False,
)
L, B, N, D = 6, 4, 5, 16


def normal(seed: int = 0, shape=(L, B, N, D)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def similar(seed: int = 0, share: float = 2.0, shape=(L, B, N, D)) -> np.ndarray:
    """Blocks with a common part, so that the loss is in the range where its weight is not 0."""
    return share * normal(seed + 1, (1, *shape[1:])) + normal(seed, shape)


def as_forward(features) -> Forward:
    """A pass with these features, the embedding first; a diversity loss reads nothing else of it."""
    image, t = jnp.zeros((len(features[0]), 2, 2, 1)), jnp.zeros(len(features[0]))
    return Forward(t, image, image, t, image, t.astype(int), features, metrics={}, rerun=None)


def apply(loss, features, step: int = 0, seed: int = 0):
    forward = as_forward((features[0], *features))
    return loss.apply(forward, {}, Context(jax.random.key(seed), step=jnp.int32(step)))


# --- The published numbers.


def oracle_features() -> np.ndarray:
    layer, n, t, k = np.ogrid[:12, :2, :4, :8]
    return np.sin(0.07 * (layer + 1) * (k + 1) + 0.37 * n + 0.11 * t * (layer + 1)) + 0.3 * np.cos(
        0.05 * k * t + 0.2 * layer
    )


ORACLE = {
    "release": (RELEASE, None, (0.0898317732, 0.4699869673, -0.0007256254, 0.1863643717)),
    "release, depth 5 aligned": (RELEASE, 5, (0.0932587298, 0.4604203595, -0.0007256254, 0.1843178213)),
    "release, depth 8 aligned": (RELEASE, 8, (-0.0910446513, 0.4235895947, -0.0007256254, 0.1106064393)),
    "as the paper writes it": (SIGNED, None, (0.0898317732, 0.1770681920, -0.1128262814, 0.0508443157)),
}


@pytest.mark.parametrize("case", ORACLE)
def test_terms_equal_the_oracle_in_float64(case):
    settings, aligned, wanted = ORACLE[case]
    with jax.enable_x64(True):
        features = jnp.asarray(oracle_features())
        _, terms = diversity_loss(features, settings=settings, aligned=aligned)
        assert {value.dtype for value in terms.values()} == {np.dtype("float64")}, "float64 features, float32 terms"
        found = [terms[name] for name in ("orthogonality", "mutual_information", "dispersion", "loss")]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9, err_msg=case)


def test_identical_blocks_have_cosine_one():
    features = [jnp.asarray(normal()[0])] * L
    _, terms = diversity_loss(features)
    np.testing.assert_allclose([terms["orthogonality"], terms["mutual_information"]], 1, rtol=1e-6)


@pytest.fixture(scope="module")
def embedding():
    """SiT-B's embedding at initialisation, 4 examples of 256 tokens; its blocks are identities then (see test_dit)."""
    model = models.make("dit", Space((32, 32, 4), Conditions.labels(1000)), size="B", depth=2)
    x, t = jax.random.normal(jax.random.key(1), (4, 32, 32, 4)), jnp.array([0.1, 0.4, 0.6, 0.9])
    return jax.jit(lambda key: model.apply(model.init(key), x, t, jnp.arange(4))[1][0])(jax.random.key(0))


def test_values_at_initialisation_without_skips(embedding):
    weighted, terms = diversity_loss((embedding,) * 2)
    np.testing.assert_allclose(terms["dispersion"], -0.023, atol=1e-3)
    np.testing.assert_allclose(terms["loss"], 0.659, atol=1e-3)
    np.testing.assert_allclose(weighted, terms["loss"], rtol=1e-6, err_msg="above 0.5 the weight is 1")


def test_values_at_initialisation_with_skips(embedding):
    """Section 3.4's table for B: aligned at depth 4 or 5 the loss starts switched off."""

    def features(key):
        x, deep = embedding, []
        for k in jax.random.split(key, 6):
            x = Merge(768, True, "xavier", jnp.float32, rngs=Keys(k))(x, embedding)
            deep.append(x)
        return jnp.stack([embedding] * 6 + deep)

    features = jax.jit(features)(jax.random.key(0))
    table = {None: (0.507, 0.513, 0.48), 4: (0.005, 0.013, 0), 5: (0.094, 0.111, 0), 8: (0.40, 0.41, 0.34)}
    for aligned, (orth, mi, weight) in table.items():
        _, terms = jax.jit(partial(diversity_loss, aligned=aligned))(features)
        # One draw of the kernels: means of up to ten cosines of random directions, 1 / sqrt(768) = 0.036 each.
        np.testing.assert_allclose(terms["orthogonality"], orth, atol=0.03, err_msg=f"aligned {aligned}")
        np.testing.assert_allclose(terms["mutual_information"], mi, atol=0.03, err_msg=f"aligned {aligned}")
        np.testing.assert_allclose(terms["dispersion"], -0.007, atol=1e-3, err_msg=f"aligned {aligned}")
        np.testing.assert_allclose(terms["weight"], weight, atol=0.05, err_msg=f"aligned {aligned}")


# --- Pairs.


def row(i: int, first: int, last: int) -> list[tuple[int, int]]:
    return [(i, j) for j in range(first, last + 1)]


# Section 3.2's table: (blocks, aligned) -> pairs.
RELEASED = {
    (12, 4): row(5, 6, 11) + row(6, 7, 10),
    (24, 4): row(5, 6, 15),
    (28, 4): row(5, 6, 15),
    (12, 5): [*row(4, 5, 11), (5, 6), (5, 7), (5, 8)],
    (24, 5): row(4, 5, 14),
    (28, 5): row(4, 5, 14),
    (12, 10): row(11, 0, 9),
    (24, 10): row(23, 0, 9),
    (28, 10): row(27, 0, 9),
    **{(blocks, 8): row(1, 2, 11) for blocks in (12, 24, 28)},
    **{(blocks, aligned): row(0, 1, 10) for blocks in (12, 24, 28) for aligned in (None, 9)},
}


@pytest.mark.parametrize(("blocks", "aligned"), RELEASED)
def test_released_pairs(blocks, aligned):
    pairs = select_pairs(blocks, aligned=aligned)
    assert list(map(tuple, pairs.tolist())) == RELEASED[blocks, aligned]


@pytest.mark.parametrize("blocks", [2, 3, 8, 13])
@pytest.mark.parametrize("rule", CHOICES["rule"])
def test_every_rule_gives_valid_pairs(rule, blocks):
    count = {
        "release": min(10, comb(blocks, 2)),
        "random_layers": comb(min(10, blocks), 2),
        "random_pairs": min(10, comb(blocks, 2)),
        "all": comb(blocks, 2),
        "adjacent": blocks - 1,
        "mirror": blocks // 2,
    }[rule]
    pairs = select_pairs(blocks, rule)
    assert pairs.shape == (count, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all(), f"{rule}: a pair is not i < j: {pairs.tolist()}"
    assert pairs.min() >= 0
    assert pairs.max() < blocks
    assert len(np.unique(pairs, axis=0)) == count, f"{rule}: a pair occurs twice: {pairs.tolist()}"


@pytest.mark.parametrize("rule", [rule for rule in CHOICES["rule"] if rule != "all"])
@pytest.mark.parametrize("keyed", [False, True])
def test_with_two_kinds_pairs_are_of_one_kind(rule, keyed):
    key = jax.random.key(0) if keyed else None
    pairs = np.asarray(select_pairs(12, rule, k=4, aligned=4, key=key, kinds=2))
    assert (pairs[:, 0] % 2 == pairs[:, 1] % 2).all()
    assert {0, 1} == set(pairs[:, 0] % 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    if rule not in ("random_layers", "random_pairs"):  # the rule among the six of each kind
        own = select_pairs(6, rule, k=4, aligned=2)
        np.testing.assert_array_equal(pairs, np.concatenate([2 * own, 2 * own + 1]))


@pytest.mark.parametrize("preset", PRESETS)
def test_with_two_kinds_the_loss_is_that_of_its_pairs(preset):
    x, key = jnp.asarray(similar()), jax.random.key(3)
    settings = PRESETS[preset]._replace(kinds=2, k=3, mutual_information="signed")
    blocks = len(x) - (settings.target == "updates")
    pairs = select_pairs(blocks, settings.rule, k=3, key=key if settings.redraw else None, kinds=2)
    found, _ = diversity_loss(x, settings=settings, key=key)
    wanted, _ = diversity_loss(x, pairs, settings._replace(kinds=1), key=key)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_adjacent_and_mirror():
    assert select_pairs(4, "adjacent").tolist() == [[0, 1], [1, 2], [2, 3]]
    assert select_pairs(5, "mirror").tolist() == [[0, 4], [1, 3]]


@pytest.mark.parametrize("blocks", range(2, 29))
def test_released_pairs_never_compare_a_block_with_itself(blocks):
    for aligned in range(1, blocks + 1):
        try:
            pairs = select_pairs(blocks, aligned=aligned)
        except ValueError as error:
            assert "gives no pair" in str(error)  # noqa: PT017 (few blocks, aligned early: the release would start outside)
            continue
        assert (pairs[:, 0] != pairs[:, 1]).all()
        assert pairs.min() >= 0
        assert pairs.max() < blocks


@pytest.mark.parametrize("rule", ["random_layers", "random_pairs"])
def test_random_pairs_are_fixed_by_the_seed_and_redrawn_by_the_key(rule):
    def draw(key):
        return select_pairs(12, rule, k=5, key=key)

    keys = jax.random.split(jax.random.key(0), 20)
    drawn = [draw(key) for key in keys]
    for key, pairs in zip(keys[:3], drawn, strict=False):
        np.testing.assert_array_equal(jax.jit(draw)(key), pairs, err_msg="traced and concrete draws differ")
    assert len({str(pairs) for pairs in drawn}) > 15, "20 keys, hardly any different draws"
    appear = np.unique(np.concatenate(drawn))
    np.testing.assert_array_equal(appear, np.arange(12), err_msg="blocks that 20 draws never reach")

    jax.jit(lambda: np.asarray(select_pairs(12, rule, k=5)))()  # without a key they are known inside of jit as well
    one, again, other = (select_pairs(12, rule, k=5, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(), "two seeds, one draw"


@pytest.mark.parametrize(
    ("form", "detach"), [("signed", None), ("abs", None), ("squared", None), ("abs", "first"), ("abs", "second")]
)
def test_traced_pairs_equal_known_pairs(form, detach):
    features, pairs = jnp.asarray(similar()), select_pairs(L, "random_pairs", k=7)
    settings = Settings(orthogonality=form, mutual_information=form, dispersion_blocks="selected")

    def loss(features, pairs):
        return diversity_loss(features, pairs, settings, detach=detach)

    gradient = jax.value_and_grad(loss, has_aux=True)
    (known, terms), wanted = jax.jit(lambda features: gradient(features, pairs))(features)
    (traced, traced_terms), found = jax.jit(gradient)(features, jnp.asarray(pairs))
    np.testing.assert_allclose(traced, known, rtol=1e-5)
    for name in terms:
        np.testing.assert_allclose(traced_terms[name], terms[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
    assert np.abs(wanted).max() > 0


# --- Forms that are not the paper's.


def test_an_offset_meets_the_released_loss_and_not_its_centred_forms():
    """Offsets that all tokens share lower the cosines of plain features, and change nothing in the other targets."""
    x = np.repeat(normal(shape=(1, B, N, D)), L, axis=0)  # all blocks alike
    offsets = 30 * np.linalg.qr(normal(3, (D, D)))[0][:L, None, None]
    for target, other in (("features", 0.2), ("centred", 1.0)):
        settings = RELEASE._replace(target=target, weights=(0, 1, 0))
        alike, apart = (float(diversity_loss(f, settings=settings)[1]["loss"]) for f in (x, x + offsets))
        assert alike == pytest.approx(1, abs=1e-5)
        assert apart < other + 1e-4 if target == "features" else apart == pytest.approx(other, abs=1e-3)
    updates = RELEASE._replace(target="updates", weights=(0, 1, 0))
    stream = np.cumsum(normal(), axis=0)
    found = [float(diversity_loss(f, settings=updates)[1]["loss"]) for f in (stream, stream + offsets)]
    assert found[1] == pytest.approx(found[0], abs=1e-3)
    centred = np.diff(stream, axis=0)
    centred = centred - centred.mean(axis=(1, 2), keepdims=True)
    wanted = mutual_information(centred, select_pairs(L - 1))
    assert found[0] == pytest.approx(float(wanted), rel=1e-5)


def test_updates_begin_with_what_the_first_block_adds():
    stream = jnp.asarray(np.cumsum(normal(shape=(L + 1, B, N, D)), axis=0))
    loss = diversity.make(target="updates", rule="all", weight="constant")
    term = loss.apply(as_forward(stream), {}, Context(jax.random.key(0)))
    settings = RELEASE._replace(target="updates", rule="all", weight="constant")
    np.testing.assert_allclose(term.loss, diversity_loss(stream, settings=settings)[0], rtol=1e-6)
    moved = diversity_loss(stream.at[0].add(normal(9, (B, N, D))), settings=settings)[0]
    assert abs(moved - term.loss) > 1e-3


def test_cka_is_that_of_the_analysis_and_only_later_blocks_learn():
    x, pairs = jnp.asarray(similar(share=0.5)), select_pairs(L, "all")
    rows = x.reshape(L, B * N, D)
    wanted = block_similarity.cka(rows)[pairs[:, 0], pairs[:, 1]].mean()
    np.testing.assert_allclose(linear_cka(x, pairs), wanted, rtol=1e-4)
    settings = RELEASE._replace(compare="cka", rule="all", weights=(0, 1, 0))
    _, terms = diversity_loss(x, settings=settings, detach="first")
    np.testing.assert_allclose(terms["mutual_information"], wanted, rtol=1e-4)
    gradient = jax.grad(lambda f: linear_cka(f, [(0, 1), (1, 3)], detach="first"))(x)
    learns = np.abs(gradient).max(axis=(1, 2, 3)) > 0
    np.testing.assert_array_equal(learns, [False, True, False, True, False, False])


@pytest.mark.parametrize(("rule", "redraw", "groups"), [("all", False, 1), ("random_layers", True, 2)])
def test_all_pairs_of_some_blocks_cost_no_pair(rule, redraw, groups):
    """Values to 1e-6 and gradients to 1e-5 of those pair by pair, also rematerialised and for features of zero."""
    x = similar(share=0.3)
    x[1], x[2, 0], x[3, :, :, 2] = 0, 0, 0  # a block, an example, a channel
    settings = PRESETS["paper"]._replace(rule=rule, k=5, redraw=redraw, weight="constant")

    def given(x, key):
        pairs = select_pairs(L, rule, k=5, key=key if redraw else None)
        return diversity_loss(x, pairs, settings, groups=groups)

    def own(x, key):
        return diversity_loss(x, settings=settings, key=key, groups=groups)

    key = jax.random.key(3)
    (wanted, terms), gradient = jax.jit(jax.value_and_grad(given, has_aux=True))(jnp.asarray(x), key)
    (loss, found), ours = jax.jit(jax.value_and_grad(jax.checkpoint(own), has_aux=True))(jnp.asarray(x), key)
    np.testing.assert_allclose(loss, wanted, atol=1e-6)
    for name, term in terms.items():
        np.testing.assert_allclose(found[name], term, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(ours, gradient, atol=1e-5 * np.abs(gradient).max())
    assert np.abs(gradient).max() > 0


def test_weights_of_blocks_are_those_of_their_pairs():
    x, weights = similar(), np.linspace(0.1, 1, L)
    pairs = np.stack(np.triu_indices(L, 1), axis=1)
    cosines = [mutual_information(x, pair[None], of_cosine="signed") for pair in pairs]
    wanted = np.average(cosines, weights=weights[pairs].prod(axis=1))
    np.testing.assert_allclose(mutual_information_among(x, jnp.asarray(weights, jnp.float32)), wanted, rtol=1e-5)


def test_features_as_tuple_list_stack_or_numpy():
    x = similar()
    blocks = [jnp.asarray(block) for block in x]
    wanted, _ = diversity_loss(tuple(blocks))
    assert wanted > 0
    for given in (blocks, jnp.asarray(x), x, list(x), tuple(x)):
        assert diversity_loss(given)[0] == wanted
    for pairs in ([(0, 1), (2, 4)], np.array([(0, 1), (2, 4)]), jnp.array([(0, 1), (2, 4)])):
        for term in (orthogonality, mutual_information):
            assert term(x, pairs) == term(blocks, np.array([(0, 1), (2, 4)]))


# --- The terms.


def test_cosines_do_not_see_scale():
    x, pairs = similar(), select_pairs(L, "all")
    scaled = x * np.float32(2.0) ** np.arange(-3, 3).reshape(L, 1, 1, 1)
    for term in (orthogonality, mutual_information):
        np.testing.assert_allclose(term(scaled, pairs), term(x, pairs), rtol=1e-6, err_msg=term.__name__)
    token_scale = np.abs(normal(5, (L, B, N, 1))) + 0.1
    np.testing.assert_allclose(mutual_information(x * token_scale, pairs), mutual_information(x, pairs), rtol=1e-5)


def test_forms_of_the_cosine():
    x, pairs = normal(2), np.array([(0, 1), (0, 2), (3, 5)])
    for term in (orthogonality, mutual_information):
        signed = np.array([term(x, pair[None], of_cosine="signed") for pair in pairs])
        assert signed.min() < 0 < signed.max(), "the example does not tell the forms apart"
        np.testing.assert_allclose(term(x, pairs, of_cosine="signed"), signed.mean(), rtol=1e-5)
        np.testing.assert_allclose(term(x, pairs, of_cosine="abs"), np.abs(signed).mean(), rtol=1e-5)
        np.testing.assert_allclose(term(x, pairs, of_cosine="squared"), (signed**2).mean(), rtol=1e-5)


def test_dispersion_of_selected_blocks():
    x = np.abs(normal()) * np.linspace(0.2, 3, D, dtype=np.float32) ** np.arange(L).reshape(L, 1, 1, 1)
    settings = RELEASE._replace(dispersion_blocks="selected")
    _, terms = diversity_loss(x, [(1, 3), (3, 4)], settings)
    np.testing.assert_allclose(terms["dispersion"], dispersion(x[[1, 3, 4]]), rtol=1e-5)
    _, of_all = diversity_loss(x, [(1, 3), (3, 4)])
    np.testing.assert_allclose(of_all["dispersion"], dispersion(x), rtol=1e-6)


def test_dispersion_clamp_and_scale():
    x = np.zeros((2, B, N, D), np.float32)
    x[..., : D // 2] = 1  # half of the channels always on, half never: the largest variance there is, 1/4
    np.testing.assert_allclose(dispersion(x), -1, rtol=1e-5)
    np.testing.assert_allclose(dispersion(x, scale=1.0), -0.25, rtol=1e-5)
    np.testing.assert_allclose(dispersion(x, scale=0.125), -1, rtol=1e-6, err_msg="clamped")
    np.testing.assert_allclose(dispersion(x, scale=0.125, clamp=False), -2, rtol=1e-5)


@pytest.mark.parametrize("detach", ["first", "second"])
@pytest.mark.parametrize("term", [orthogonality, mutual_information])
def test_detach_stops_one_side_of_a_pair(term, detach):
    gradient = jax.jit(jax.grad(lambda x: term(x, [(1, 4)], detach=detach)))(jnp.asarray(similar()))
    reached = [i for i in range(L) if np.abs(gradient[i]).max() > 0]
    assert reached == [4 if detach == "first" else 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_zero_features_are_finite(preset):
    x = similar()
    x[1], x[2, 0], x[3, :, :, 2] = 0, 0, 0  # a block, an example, a channel
    for features in (x, np.zeros_like(x)):
        loss, gradient = jax.value_and_grad(
            lambda f: diversity_loss(f, settings=PRESETS[preset], key=jax.random.key(0))[0]
        )(jnp.asarray(features))
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


def test_bfloat16_features_are_computed_in_float32():
    x = jnp.asarray(similar()).astype(jnp.bfloat16)
    for settings in PRESETS.values():
        found, terms = diversity_loss(x, settings=settings, key=jax.random.key(0))
        wanted, _ = diversity_loss(x.astype(jnp.float32), settings=settings, key=jax.random.key(0))
        assert found == wanted
        assert {value.dtype for value in terms.values()} == {np.dtype("float32")}
    gradient = jax.grad(lambda f: diversity_loss(f)[0])(x)
    assert gradient.dtype == jnp.bfloat16


def test_forward_mode_equals_reverse_mode():
    x, direction = jnp.asarray(similar()), jnp.asarray(normal(9))
    for settings in PRESETS.values():

        def loss(f, settings=settings):
            return diversity_loss(f, settings=settings, key=jax.random.key(0))[0]

        _, forward = jax.jvp(loss, (x,), (direction,))
        reverse = jnp.vdot(jax.grad(loss)(x), direction)
        np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-7)


# --- The text stream: only some tokens count.

FORMS = PRESETS | {
    "cka": RELEASE._replace(compare="cka"),
    "centred": RELEASE._replace(target="centred"),
    "selected": SIGNED._replace(rule="random_layers", k=4, dispersion_blocks="selected"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [(3, 3, 3, 3), (2, 5, 1, 3)])
def test_tokens_that_do_not_count_are_as_if_they_were_not_there(form, lengths):
    """Values and gradients, in float64. The statistics are over all tokens, so texts may stand one after another."""
    mask = np.random.default_rng(0).permuted(np.arange(N) < np.array(lengths)[:, None], axis=1)
    assert mask.sum(axis=1).tolist() == list(lengths)
    rows = (B, 3) if len(set(lengths)) == 1 else (1, -1)

    @partial(jax.jit, static_argnums=1)
    def run(x, whole):
        def loss(x):
            features = x if whole else x[:, mask].reshape(L, *rows, D)
            given = mask if whole else None
            return diversity_loss(features, settings=FORMS[form], key=jax.random.key(1), mask=given)

        return jax.value_and_grad(loss, has_aux=True)(x)

    with jax.enable_x64(True):
        x = jnp.asarray(similar(share=1.2).astype(np.float64))
        (wanted, terms), gradient = jax.device_get(run(x, False))
        (loss, found), ours = jax.device_get(run(jnp.where(mask[..., None], x, jnp.nan), True))
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    for name, term in terms.items():
        np.testing.assert_allclose(found[name], term, rtol=1e-12, atol=1e-15, err_msg=name)
    np.testing.assert_allclose(ours, gradient, rtol=1e-9, atol=1e-12 * np.abs(gradient).max())
    assert np.abs(ours[:, mask]).max() > 0
    assert (ours[:, ~mask] == 0).all()


@pytest.mark.parametrize("term", [orthogonality, mutual_information, mutual_information_among, dispersion, linear_cka])
def test_each_term_takes_a_mask(term):
    x, mask = similar(), np.arange(N) < np.array([2, 5, 1, 3])[:, None]
    pairs = [] if term in (mutual_information_among, dispersion) else [select_pairs(L, "adjacent")]
    found, wanted = term(x, *pairs, mask=mask), term(x[:, mask][:, None], *pairs)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert abs(term(x, *pairs) - wanted) > 1e-4


def test_traced_pairs_and_groups_take_a_mask():
    x, mask = similar(share=1.2), np.arange(N) < np.array([2, 5, 1, 3])[:, None]
    halves = [diversity_loss(x[:, i : i + 2][:, mask[i : i + 2]][:, None])[0] for i in (0, 2)]
    np.testing.assert_allclose(diversity_loss(x, groups=2, mask=mask)[0], np.mean(halves), rtol=1e-5)
    pairs = jnp.asarray(select_pairs(L))
    traced = jax.jit(lambda x, p, mask: diversity_loss(x, p, groups=2, mask=mask)[0])(x, pairs, mask)
    np.testing.assert_allclose(traced, np.mean(halves), rtol=1e-5)


def of_two_streams(y):
    """A forward pass of a network with two streams: seven entries of the image, six of a text half as wide."""
    image, text = normal(shape=(L + 1, B, N, D)), similar(shape=(L, B, 3, D // 2))
    forward = as_forward(Features(list(jnp.asarray(image)), list(jnp.asarray(text))))
    return forward._replace(y=y)


@pytest.mark.parametrize("preset", ["release", "updates"])
def test_the_text_stream_is_chosen_by_an_option(preset):
    mask = np.arange(3) < np.array([1, 2, 3, 2])[:, None]
    forward, context = of_two_streams({"mask": jnp.asarray(mask)}), Context(jax.random.key(0))
    image, text = (losses.make("diversity", preset=preset, stream=stream) for stream in ("image", "text"))
    begin = 0 if preset == "updates" else 1  # at the embedding, or at the first block
    wanted, terms = diversity_loss(forward.features.text[begin:], settings=PRESETS[preset], mask=mask)
    found = text.apply(forward, {}, context)
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(found.metrics["weight"], terms["weight"], rtol=1e-6)
    own, _ = diversity_loss(forward.features[begin:], settings=PRESETS[preset])
    np.testing.assert_allclose(image.apply(forward, {}, context).loss, own, rtol=1e-6)


def test_errors_of_the_text_stream():
    loss, context = losses.make("diversity", stream="text"), Context(jax.random.key(0))
    with pytest.raises(ConfigError, match="stream = 'text' needs a network with a text stream, such as mmdit"):
        loss.apply(as_forward(normal()), {}, context)
    for y in ({"context": normal()}, np.zeros(B)):
        with pytest.raises(ConfigError, match="stream = 'text' needs the `mask` of the texts in the conditions, and"):
            loss.apply(of_two_streams(y), {}, context)
    with pytest.raises(ConfigError, match="diversity: stream = 'texts' is unknown; did you mean 'text'"):
        losses.make("diversity", stream="texts")


# --- The weight.


def weighted_slope(loss: float, **options) -> float:
    return jax.grad(lambda x: adaptive_weight(x, **options) * x)(jnp.float32(loss))


def test_adaptive_weight():
    table = {-0.5: 0, 0.05: 0, 0.1: 0, 0.2: 0.2, 0.3: 0.4, 0.5: 0.8, 0.5001: 1, 0.66: 1}
    for loss, wanted in table.items():
        np.testing.assert_allclose(adaptive_weight(jnp.float32(loss)), wanted, atol=1e-6, err_msg=f"weight at {loss}")
    np.testing.assert_allclose(adaptive_weight(jnp.float32(0.45), 0.2, 0.7), 0.25 / 0.7, rtol=1e-5)
    np.testing.assert_allclose(adaptive_weight(jnp.float32(0.45), 0.2, 0.7, denominator="hi-lo"), 0.5, rtol=1e-5)


def test_gradient_through_the_weight():
    """d(w L)/dL = (2 L - 0.1) / 0.5 in the ramp if the gradient passes through the weight, else w."""
    through = {0.05: 0, 0.10001: 0.2, 0.3: 1.0, 0.49999: 1.8, 0.50001: 1, 0.6: 1}
    stopped = {0.05: 0, 0.10001: 0.0, 0.3: 0.4, 0.49999: 0.8, 0.50001: 1, 0.6: 1}
    for loss in through:
        np.testing.assert_allclose(weighted_slope(loss), through[loss], atol=1e-4, err_msg=f"slope at {loss}")
        found = weighted_slope(loss, detach=True)
        np.testing.assert_allclose(found, stopped[loss], atol=1e-4, err_msg=f"slope at {loss}, weight detached")


def test_the_ramp_is_continuous_with_hi_minus_lo():
    def jump(denominator):
        below, above = (adaptive_weight(jnp.float32(x), denominator=denominator) for x in (0.4999999, 0.5000001))
        return above - below

    np.testing.assert_allclose(jump("hi"), 0.2, atol=1e-5)
    np.testing.assert_allclose(jump("hi-lo"), 0, atol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_detach_weight_reaches_the_loss(detach):
    x = jnp.asarray(similar(share=1.2))
    settings = RELEASE._replace(detach_weight=detach)

    def of(name):
        return jax.grad(lambda f: diversity_loss(f, settings=settings)[1][name])(x)

    _, terms = diversity_loss(x, settings=settings)
    assert 0.15 < terms["loss"] < 0.45, f"L_div = {terms['loss']}: the example is not on the ramp"
    multiplier = terms["weight"] if detach else 4 * terms["loss"] - 0.2
    found = jax.grad(lambda f: diversity_loss(f, settings=settings)[0])(x)
    np.testing.assert_allclose(found, multiplier * of("loss"), rtol=1e-4, atol=1e-8)


# --- Groups, presets, warm-up.


def test_groups_are_means_over_slices():
    x = normal()
    x[:, :2] = 4 * normal(1, (1, 2, N, D)) + x[:, :2]  # the first two examples: similar blocks, weight 1
    slices = [diversity_loss(x[:, :2]), diversity_loss(x[:, 2:])]
    weights = [terms["weight"] for _, terms in slices]
    assert weights[0] == 1, weights
    assert weights[1] == 0, weights
    loss, terms = diversity_loss(x, groups=2)
    np.testing.assert_allclose(loss, np.mean([loss for loss, _ in slices]), rtol=1e-6)
    for name in terms:
        np.testing.assert_allclose(terms[name], np.mean([terms[name] for _, terms in slices]), rtol=1e-5, err_msg=name)
    pairs = select_pairs(L, "release")
    traced = jax.jit(lambda x, p: diversity_loss(x, p, groups=2)[0])(x, jnp.asarray(pairs))
    np.testing.assert_allclose(traced, loss, rtol=1e-5)
    assert abs(diversity_loss(x)[0] - loss) > 0.01, "the example does not tell groups from none"
    np.testing.assert_allclose(apply(losses.make("diversity", groups=2), x)[0], loss, rtol=1e-6)


def test_presets():
    x = similar()
    loss, terms, full, _ = apply(losses.make("diversity", preset="release_const"), x)
    np.testing.assert_allclose(full, loss, rtol=1e-6)
    np.testing.assert_allclose(terms["weight"], 0.001, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.001 * terms["loss"], rtol=1e-6)

    loss, terms, full, _ = apply(losses.make("diversity"), x)
    assert full == terms["loss"], "the full term has no adaptive weight"
    np.testing.assert_allclose(terms["loss"], sum(terms[t] for t in list(terms)[:3]) / 3, rtol=1e-5)
    np.testing.assert_allclose(loss, adaptive_weight(terms["loss"]) * terms["loss"], rtol=1e-6)

    paper = PRESETS["paper"]
    assert (paper.rule, paper.k, paper.redraw, paper.weights) == ("random_layers", 10, True, (0.33, 0.33, 0.33))
    assert paper._replace(rule="release", redraw=False, dispersion_blocks="all") == SIGNED
    loss, terms, *_ = apply(losses.make("diversity", preset="paper"), x)
    np.testing.assert_allclose(terms["loss"], 0.33 * sum(terms[t] for t in list(terms)[:3]), rtol=1e-5)
    assert loss == adaptive_weight(terms["loss"]) * terms["loss"]


def test_the_pairs_are_those_of_the_aligned_block():
    x = jnp.asarray(similar())

    def found(aligned):
        loss = losses.make("diversity", aligned=aligned)
        return jax.jit(lambda x: apply(loss, x).metrics["orthogonality"])(x)

    wanted = jax.jit(orthogonality)
    np.testing.assert_allclose(found(5), wanted(x, select_pairs(L, aligned=5)), rtol=1e-6)
    np.testing.assert_allclose(found(None), wanted(x, select_pairs(L)), rtol=1e-6)
    assert abs(found(5) - found(None)) > 0.01, "the example does not tell the aligned block from none"


@pytest.mark.parametrize(("detach", "reached"), [(None, range(L)), ("first", (3, 4, 5)), ("second", (0, 1, 2))])
def test_detach_is_an_option(detach, reached):
    loss = losses.make("diversity", rule="mirror", detach=detach)
    slope = jax.jit(jax.grad(lambda x: apply(loss, x).metrics["orthogonality"]))(jnp.asarray(similar()))
    assert [i for i in range(L) if np.abs(slope[i]).max() > 0] == list(reached)


def test_options_change_a_preset():
    x = similar()
    loss = losses.make("diversity", weight="constant", coefficient=2.0, weights=(1.0, 0.0, 0.0), rule="adjacent")
    wanted = 2 * orthogonality(x, select_pairs(L, "adjacent"))
    np.testing.assert_allclose(apply(loss, x)[0], wanted, rtol=1e-5)
    assert losses.make("diversity").init is None, "the loss has no parameters"


def test_every_setting_is_an_option():
    assert set(Settings._fields) <= set(registry.options(diversity.make)), "a setting that a config cannot set"


def test_pairs_are_redrawn_by_the_step_key_only_where_asked():
    x = similar()
    moving = losses.make("diversity", preset="paper", k=3)
    assert apply(moving, x, seed=0)[0] == apply(moving, x, seed=0)[0]
    assert len({float(apply(moving, x, seed=seed)[0]) for seed in range(6)}) > 1
    fixed = losses.make("diversity", preset="paper", k=3, redraw=False)
    assert len({float(apply(fixed, x, seed=seed)[0]) for seed in range(6)}) == 1
    others = [losses.make("diversity", preset="paper", k=3, redraw=False, seed=seed) for seed in range(6)]
    assert len({float(apply(other, x)[0]) for other in others}) > 1


def test_warm_up():
    x = similar(share=4)
    whole = apply(losses.make("diversity"), x)
    warming = losses.make("diversity", warmup_steps=10)
    for step, share in [(0, 0), (1, 0.1), (5, 0.5), (10, 1), (25, 1)]:
        loss, metrics, full, _ = apply(warming, x, step=step)
        assert full == whole.full, "the full term has no warm-up"
        np.testing.assert_allclose(loss, share * whole.loss, rtol=1e-6, err_msg=f"step {step}")
        np.testing.assert_allclose(loss, metrics["weight"] * metrics["loss"], rtol=1e-5, err_msg=f"step {step}")


# --- Cost.


def trace(loss: Callable, *args):
    return list(equations(jax.make_jaxpr(loss)(*args).jaxpr))


@pytest.mark.parametrize(
    ("options", "most"),
    [({"rule": "release"}, 12), ({"rule": "random_pairs", "redraw": True}, 12), ({"preset": "paper"}, 1)],
)
def test_nothing_larger_than_the_features_is_made(options, most):
    """most: features of how many blocks, in one array; the paper's form never has those of two."""
    blocks, shape = 12, (2, 32, 64)
    features = [jnp.ones(shape)] * blocks
    loss = losses.make("diversity", **options)

    def run(features, key):
        return jax.value_and_grad(lambda f: loss.apply(as_forward((f[0], *f)), {}, Context(key)).loss)(features)

    largest = max(np.prod(v.aval.shape) for e in trace(run, features, jax.random.key(0)) for v in e.outvars)
    assert largest <= most * np.prod(shape), f"an intermediate of {largest} elements for {blocks} blocks of {shape}"


def test_cost_is_linear_in_the_pairs_and_in_the_blocks():
    def reductions(blocks, k):
        """Reductions and products over whole features, forward and backward."""
        features, size = [jnp.ones((2, 16, 64))] * blocks, 2 * 16 * 64
        pairs = select_pairs(blocks, "release", k=k)
        made = trace(jax.grad(lambda f: diversity_loss(f, pairs)[0]), features)
        names = ("reduce_sum", "dot_general", "mul", "div")
        return sum(e.primitive.name in names and e.invars[0].aval.size >= size for e in made)

    by_pair = (reductions(30, 20) - reductions(30, 10)) / 10
    assert reductions(30, 29) - reductions(30, 20) == 9 * by_pair
    assert by_pair <= 6, f"{by_pair} passes over a feature for each pair"
    by_block = (reductions(30, 10) - reductions(20, 10)) / 10
    assert by_block <= 25, f"{by_block} passes over a feature for each block"

    gram = trace(mutual_information, [jnp.ones((2, 16, 64))] * 30, jnp.array([(0, 1)]))
    assert sum(e.primitive.name == "dot_general" for e in gram) == 1, "traced pairs: one product for all cosines"


# --- Errors.


def test_errors_of_pairs():
    with pytest.raises(ValueError, match="number of blocks = 1: must be at least 2"):
        select_pairs(1)
    for aligned in (0, 13, -1):
        with pytest.raises(ValueError, match=f"aligned = {aligned}: must be at least 1 and at most 12"):
            select_pairs(12, aligned=aligned)
    with pytest.raises(ValueError, match="rule = 'nearest' is unknown; known: release, random_layers"):
        select_pairs(12, "nearest")
    for rule, k, least in [("random_layers", 1, 2), ("random_pairs", 0, 1), ("release", 0, 1)]:
        with pytest.raises(ValueError, match=f"k of rule '{rule}' = {k}: must be at least {least}"):
            select_pairs(12, rule, k=k)
    for outside in ([(0, 1), (2, L)], np.array([(-1, 0)]), jnp.array([(0, 99)])):
        with pytest.raises(ValueError, match=rf"pairs = \[\[.*\]\]: the network has blocks 0 to {L - 1}"):
            diversity_loss(normal(), outside)
    with pytest.raises(ValueError, match=r"pairs have shape \(2,\), wanted"):
        mutual_information(normal(), np.array([0, 1]))


def test_errors_of_features_and_groups():
    with pytest.raises(ValueError, match="number of blocks = 1: must be at least 2"):
        diversity_loss(normal()[:1])
    with pytest.raises(ValueError, match="groups = 3 must divide the batch of 4"):
        diversity_loss(normal(), groups=3)
    with pytest.raises(ValueError, match="groups = 0 must divide the batch of 4"):
        diversity_loss(normal(), groups=0)
    odd = [jnp.ones((2, 3, 4))] * 3 + [jnp.ones((2, 5, 4))]
    with pytest.raises(
        ValueError, match=r"block 3: features have shape \(2, 5, 4\), wanted .* block 0 has \(2, 3, 4\)"
    ):
        diversity_loss(odd)


def test_errors_of_options():
    unknown = r"preset = 'paperr' is unknown; did you mean 'paper'\? known: release, release_const, paper"
    with pytest.raises(ValueError, match=unknown):
        losses.make("diversity", preset="paperr")
    for field, choices in diversity.CHOICES.items():
        with pytest.raises(ValueError, match=f"diversity: {field} = 'wrong' is unknown; known: {choices[0]}"):
            losses.make("diversity", **{field: "wrong"})
    with pytest.raises(ValueError, match=r"lo = 0\.5: must be at least 0 and less than 0\.1"):
        adaptive_weight(jnp.float32(0.3), 0.5, 0.1)
    with pytest.raises(ValueError, match="no option 'weigths'; did you mean 'weights'"):
        losses.make("diversity", weigths=(1, 1, 1))


ALONE = """
import sys
import jax.extend
import jax.numpy as jnp
from diversedit_jax.losses.diversity import diversity_loss
loaded = {"flax", "optax", "orbax", "ml_collections"} & set(sys.modules)
assert not loaded, f"diversedit_jax.losses.diversity brings {loaded}"
for second, mask in ((jnp.ones((2, 4)), None), (jnp.ones((2, 3, 4)), jnp.ones((2, 1), bool))):
    try:
        diversity_loss([jnp.ones((2, 3, 4)), second], mask=mask)
    except ValueError as error:
        print(error)
"""


def test_the_loss_stands_alone_and_names_a_block_of_wrong_rank_and_a_mask_of_wrong_shape():
    # In a process without this suite's checks of annotations, which would see the wrong rank first.
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    block, mask = done.stdout.splitlines()
    assert block.startswith("block 1: features have shape (2, 4), wanted [batch, tokens, width], ")
    assert mask == "mask has shape (2, 1), wanted (2, 3), as the tokens of the features"


# --- The same loss in networks of four frameworks.

DEPTH = 4


def plain_jax(x):
    keys = jax.random.split(jax.random.key(0), DEPTH)
    params = [{"w": jax.random.normal(key, (D, D)) / D**0.5, "b": jnp.zeros(D)} for key in keys]

    def features(params):
        h, outputs = x, []
        for layer in params:
            h = h + jnp.tanh(h @ layer["w"] + layer["b"])
            outputs.append(h)
        return outputs

    return params, features


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        outputs = []
        for _ in range(DEPTH):
            x = x + nn.tanh(nn.Dense(D)(x))
            outputs.append(x)
        return outputs


def flax_linen(x):
    model = LinenStack()
    return model.init(jax.random.key(0), x), lambda params: model.apply(params, x)


class NNXStack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(DEPTH)])

    def __call__(self, x):
        outputs = []
        for layer in self.layers:
            x = x + nnx.tanh(layer(x))
            outputs.append(x)
        return tuple(outputs)


def flax_nnx(x):
    graphdef, state = nnx.split(NNXStack(nnx.Rngs(0)))
    return state, lambda state: nnx.merge(graphdef, state)(x)


class EquinoxStack(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        self.layers = [eqx.nn.Linear(D, D, key=k) for k in jax.random.split(key, DEPTH)]

    def __call__(self, x):
        outputs = []
        for layer in self.layers:
            x = x + jnp.tanh(jax.vmap(jax.vmap(layer))(x))
            outputs.append(x)
        return jnp.stack(outputs)


def equinox(x):
    params, static = eqx.partition(EquinoxStack(jax.random.key(0)), eqx.is_array)
    return params, lambda params: eqx.combine(params, static)(x)


@pytest.mark.parametrize("build", [plain_jax, flax_linen, flax_nnx, equinox])
def test_the_loss_trains_networks_of_any_framework(build):
    params, features = build(jnp.asarray(normal(3, (B, N, D))))
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: diversity_loss(features(p))[0]))(params)
    assert loss > 0
    largest = {
        jax.tree_util.keystr(path): float(jnp.abs(leaf).max()) for path, leaf in jax.tree.leaves_with_path(gradient)
    }
    assert len(largest) == 2 * DEPTH
    unreached = [name for name, size in largest.items() if not size > 0]
    assert not unreached, f"the gradient does not reach {unreached}"
    smaller = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
    assert diversity_loss(features(smaller))[0] < loss, "a step down the gradient does not lower the loss"
