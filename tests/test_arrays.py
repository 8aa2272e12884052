"""Losses and similarities take any array, under any axes of a mesh and any setting of JAX, with the same values."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diversedit_jax.errors import ConfigError
from diversedit_jax.losses import dispersive, diversity, repa, sra
from diversedit_jax.metrics import similarity

BATCH, TOKENS, WIDTH = 8, 4, 6
BLOCKS = [np.random.default_rng(i).standard_normal((BATCH, TOKENS, WIDTH), np.float32) for i in range(4)]
ROWS = [block.reshape(-1, WIDTH) for block in BLOCKS]
KEY = jax.random.key(1)


def redrawn(*blocks):
    pairs = diversity.select_pairs(4, "random_pairs", key=KEY, k=2)
    return diversity.mutual_information(blocks, pairs)


def by_preset(preset, *blocks, groups=1):
    return diversity.diversity_loss(blocks, settings=diversity.PRESETS[preset], key=KEY, groups=groups)


def of_texts(preset, *blocks, groups=1):
    """The features are of texts with 1 to 4 tokens."""
    mask = np.arange(TOKENS) <= np.arange(len(blocks[0]))[:, None] % TOKENS
    return diversity.diversity_loss(blocks, settings=diversity.PRESETS[preset], key=KEY, groups=groups, mask=mask)


# name -> (function of arrays, the arrays). The leading axis of each is split, then the last.
LOSSES = {
    f"dispersive {form}": (partial(dispersive.dispersive_loss, form=form), BLOCKS[:1]) for form in dispersive.FORMS
}
LOSSES |= {f"diversity {preset}": (partial(by_preset, preset), BLOCKS) for preset in diversity.PRESETS}
LOSSES |= {f"diversity {preset} of texts": (partial(of_texts, preset), BLOCKS) for preset in diversity.PRESETS}
LOSSES |= {f"repa {form}": (partial(repa.repa_loss, similarity=form), BLOCKS[:2]) for form in repa.SIMILARITIES}
LOSSES |= {f"sra {form}": (partial(sra.sra_loss, form=form), BLOCKS[:2]) for form in sra.DISTANCES}
LOSSES |= {
    "dispersive in groups": (partial(dispersive.dispersive_loss, groups=2), BLOCKS[:1]),
    "diversity in groups": (partial(by_preset, "paper", groups=2), BLOCKS),
    "diversity in groups of texts": (partial(of_texts, "release", groups=2), BLOCKS),
    "diversity of one array": (diversity.diversity_loss, [np.stack(BLOCKS)]),
    "pairs redrawn": (redrawn, BLOCKS),
    "projector": (partial(repa.project, repa.init_projector(KEY, WIDTH, 5, 7)), BLOCKS[:1]),
}
SIMILARITIES = {
    f"cka {name}": (lambda *rows, k=k: similarity.cka(rows, k), ROWS) for name, k in similarity.KERNELS.items()
}
SIMILARITIES |= {
    "cka of one array": (similarity.cka, [np.stack(ROWS)]),
    "cka unbiased": (lambda *rows: similarity.cka(rows, hsic=similarity.hsic_unbiased), ROWS),
    "cknna": (lambda *rows: similarity.cknna(rows, 4), ROWS),
    "procrustes": (lambda *rows: similarity.procrustes(rows), ROWS),
    "token cosine": (similarity.token_cosine, [np.stack(BLOCKS)]),
    "mean cosine": (similarity.mean_cosine, [np.stack(BLOCKS)]),
}
for measure in (similarity.effective_rank, similarity.participation_ratio, similarity.channel_usage):
    SIMILARITIES[measure.__name__] = (measure, [np.stack([np.cov(rows.T, dtype=np.float32) for rows in ROWS])])
FUNCTIONS = LOSSES | SIMILARITIES

# One of each family and what reads the batch in parts; the others are slow tests.
QUICK = {"dispersive hinge", "diversity release", "diversity in groups", "pairs redrawn", "repa cosine", "sra l1"}
QUICK |= {"projector", "cka linear", "cknna", "token cosine"}


def each_of(functions):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in functions]


def assert_same(found, wanted):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), found, wanted)


def values_and_gradient(function, arrays):
    """The outputs, and the gradient of their sum."""

    def total(*arrays):
        found = function(*arrays)
        return sum(leaf.sum() for leaf in jax.tree.leaves(found)), found

    (_, found), gradient = jax.value_and_grad(total, tuple(range(len(arrays))), has_aux=True)(*arrays)
    return found, gradient


def mesh_of(kind):
    return jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=jax.devices()[:2])


@pytest.mark.parametrize("name", each_of(FUNCTIONS))
@pytest.mark.parametrize(
    ("kind", "axis"),
    [
        (AxisType.Explicit, 0),
        *(pytest.param(AxisType.Explicit, axis, marks=pytest.mark.slow) for axis in (1, -1)),
        *(pytest.param(AxisType.Auto, axis, marks=pytest.mark.slow) for axis in (0, 1, -1)),
    ],
)
def test_arrays_may_be_split_over_any_axis(name, kind, axis):
    function, arrays = FUNCTIONS[name]
    spec = [None] * arrays[0].ndim
    spec[axis] = "d"
    split = [jax.device_put(array, NamedSharding(mesh_of(kind), PartitionSpec(*spec))) for array in arrays]
    both = partial(values_and_gradient, function)
    assert_same(jax.jit(both)(split), jax.jit(both)(arrays))


def test_no_jit_is_needed_on_a_mesh():
    (block,) = LOSSES["dispersive hinge"][1]
    split = jax.device_put(block, NamedSharding(mesh_of(AxisType.Explicit), PartitionSpec("d")))
    assert_same(dispersive.dispersive_loss(split), dispersive.dispersive_loss(block))
    blocks = [jax.device_put(block, split.sharding) for block in BLOCKS]
    settings = diversity.PRESETS["release_const"]
    assert_same(
        diversity.diversity_loss(blocks, settings=settings), diversity.diversity_loss(BLOCKS, settings=settings)
    )


@pytest.mark.parametrize("name", each_of(FUNCTIONS))
def test_under_manual_axes_a_shard_is_an_array(name):
    """As in groups: each device computes the value of its examples."""
    function, arrays = FUNCTIONS[name]
    if "groups" in name or len(arrays[0]) < BATCH:
        arrays = [np.concatenate([array, array[::-1]]) for array in arrays]

    def each(*shards):
        return jax.tree.map(lambda leaf: leaf[None], function(*shards))

    mesh, over = mesh_of(AxisType.Explicit), PartitionSpec("d")
    split = [jax.device_put(array, NamedSharding(mesh, over)) for array in arrays]
    found = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=over, out_specs=over))(*split)
    halves = zip(*(np.split(array, 2) for array in arrays), strict=True)
    assert_same(found, jax.tree.map(lambda *leaves: np.stack(leaves), *[function(*half) for half in halves]))


@pytest.mark.parametrize("name", each_of(LOSSES))
def test_nothing_is_implied(name):
    """No broadcast between ranks and no change of type that JAX can be told to refuse; no NaN on the way."""
    function, arrays = LOSSES[name]
    with contextlib.ExitStack() as stack:
        for setting in (
            jax.numpy_rank_promotion("raise"),
            jax.numpy_dtype_promotion("strict"),
            jax.debug_nans(True),
            jax.check_tracer_leaks(True),
        ):
            stack.enter_context(setting)
        jax.jit(partial(values_and_gradient, function))([jnp.asarray(array, jnp.bfloat16) for array in arrays])


@pytest.mark.parametrize("name", each_of(LOSSES))
def test_64_bits_change_rounding_alone(name):
    function, arrays = LOSSES[name]
    wanted = function(*arrays)
    with jax.enable_x64(True):
        found = function(*(array.astype(np.float64) for array in arrays))
        if name != "projector":  # its output is float32
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float64)}
    assert_same(found, wanted)


class Foreign:
    """An array of another framework."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype


class Exchanged(Foreign):
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Convertible(Foreign):
    def __jax_array__(self):
        return jnp.asarray(self.array)


@pytest.mark.parametrize("wrapped", [Exchanged, Convertible, nnx.Param, jnp.asarray])
@pytest.mark.parametrize("name", ["dispersive hinge", "diversity release", "repa cosine", "sra l1", "projector"])
def test_arrays_of_any_framework(name, wrapped):
    function, arrays = FUNCTIONS[name]
    given = [jnp.asarray(array) for array in arrays] if wrapped is nnx.Param else arrays
    assert_same(function(*map(wrapped, given)), function(*arrays))


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    for name in ("dispersive hinge", "diversity release", "repa cosine", "sra l1"):
        function, arrays = FUNCTIONS[name]
        assert_same(function(*map(torch.from_numpy, arrays)), function(*arrays))


def test_features_of_other_shapes_are_refused():
    student, teacher = BLOCKS[:2]
    with pytest.raises(ConfigError, match=r"the student's features are \[8, 4, 6\], the teacher's \[8, 1, 6\]"):
        sra.sra_loss(student, teacher[:, :1])
    with pytest.raises(ConfigError, match=r"the projected features are \[8, 4, 6\] .*, the targets \[1, 4, 6\]"):
        repa.repa_loss(student, teacher[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(diversity.orthogonality, detach="frist"), "detach = 'frist' is unknown; did you mean 'first'"),
        (partial(diversity.orthogonality, of_cosine="sgned"), "orthogonality = 'sgned' .* did you mean 'signed'"),
        (partial(diversity.mutual_information, detach="frist"), "detach = 'frist' is unknown"),
        (partial(diversity.mutual_information, of_cosine="sgned"), "mutual_information = 'sgned' is unknown"),
    ],
)
def test_words_of_terms_are_checked(call, message):
    with pytest.raises(ConfigError, match=message):
        call(BLOCKS, [(0, 1)])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"weight": "adaptve"}, {}, "weight = 'adaptve' is unknown; did you mean 'adaptive'"),
        ({"dispersion_blocks": "slected"}, {}, "dispersion_blocks = 'slected' is unknown; did you mean 'selected'"),
        ({"mutual_information": "sgned"}, {}, "mutual_information = 'sgned' is unknown"),
        ({"denominator": "lo"}, {}, "denominator = 'lo' is unknown"),
        ({"weights": (1.0, 1.0)}, {}, "wanted three, of L_orth, L_MI and L_disp"),
        ({}, {"detach": "frist"}, "detach = 'frist' is unknown"),
        ({"rule": "random_pairs", "redraw": True}, {}, "rule 'random_pairs' with redraw = True needs a key"),
    ],
)
def test_words_of_the_diversity_loss_are_checked(changes, options, message):
    with pytest.raises(ConfigError, match=message):
        diversity.diversity_loss(BLOCKS, settings=diversity.Settings(**changes), **options)


def test_words_of_other_losses_are_checked():
    with pytest.raises(ConfigError, match="distance = 'smooth' is unknown; did you mean 'smooth_l1'"):
        sra.sra_loss(*BLOCKS[:2], "smooth")
    with pytest.raises(ConfigError, match="similarity = 'cosin' is unknown; did you mean 'cosine'"):
        repa.repa_loss(*BLOCKS[:2], "cosin")
    with pytest.raises(ConfigError, match="form = 'infonce' is unknown"):
        dispersive.dispersive_loss(BLOCKS[0], "infonce")
