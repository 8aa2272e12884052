"""A network that starts from another one gives the same at first: the other's outputs, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import models, sharding
from diversedit_jax.api import Conditions, Made, Space
from diversedit_jax.config import slot
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import adapt, patches
from diversedit_jax.training.step import started_from
from tests import untrained

SMALL = {"depth": 2, "width": 16, "heads": 2}
ONE = sharding.replicated(sharding.make(devices=jax.devices()[:1]))
NAMES = ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("official_sit", "uvit"))]
T = jnp.array([0.1, 0.9])
Y = jnp.array([1, 4])


def space(*shape: int, classes: int = 4, video: bool = False) -> Space:
    return Space((*shape, 2), Conditions.labels(classes), video)


def made(name: str, where: Space, **options):
    """A network, its functions and its place in the contract, with random weights."""
    given = slot("models", name, **SMALL | options).to_dict()
    model = models.make(given["name"], where, **without_name(given))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    model = model._replace(apply=jax.jit(model.apply))
    return model, Made(given, where, jax.tree.map(np.asarray, untrained.randomly(shapes, 0, 0.2)))


def without_name(given):
    return {name: value for name, value in given.items() if name != "name"}


def told_by(was: Made, name: str, where: Space, **options) -> list[str]:
    """What a run says that starts a network from another one."""
    model, now = made(name, where, **options)
    return list(model.adapted(was, now)[1])


def grown(was: Made, now: Made, model) -> tuple[dict, list[str]]:
    """The parameters that a run begins with, and what it says."""
    own = jax.jit(model.init, out_shardings=ONE)(jax.random.key(1))
    given, told = model.adapted(was, now._replace(params=jax.eval_shape(model.init, jax.random.key(1))))
    return started_from({"params": own}, given)["params"], told


def started(was: Made, name: str, where: Space, **options):
    """x -> the first outputs of a network that starts from another; and what the run says."""
    model, now = made(name, where, **options)
    params, told = grown(was, now, model)
    return lambda x: model.apply(params, x, T, Y)[0], told


def images(*shape: int):
    return jax.random.normal(jax.random.key(2), (2, *shape, 2))


def up(x, times: int = 2):
    for axis in (1, 2):
        x = jnp.repeat(x, times, axis=axis)
    return x


def mean(x, times: int = 2):
    b, h, w, c = x.shape
    return x.reshape(b, h // times, times, w // times, times, c).mean(axis=(2, 4))


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("name", NAMES)
def test_other_classes_keep_the_null_label(name):
    old, was = made(name, space(4, 4), **({"conv": False} if name == "uvit" else {}))
    model, now = made(name, space(4, 4, classes=6), **({"conv": False} if name == "uvit" else {}))
    params, (told,) = grown(was, now, model)
    assert told == "it knows 4 classes, the data have 6: the table of labels is new, but for the null label"
    x = images(4, 4)
    close(model.apply(params, x, T, jnp.array([6, 6]))[0], old.apply(was.params, x, T, jnp.array([4, 4]))[0])
    table = params["label_embed"]["embedding"]
    assert table.shape == (7, 16)
    assert np.abs(table[:4] - was.params["label_embed"]["embedding"][:4]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_larger_patches_see_means_and_give_every_element_the_same(name):
    more = {"conv": False} if name == "uvit" else {}
    old, was = made(name, space(4, 6), patch=1, **more)
    new, (told,) = started(was, name, space(8, 12), patch=2, **more)
    assert told == "its patches are 1 x 1, those of this run 2 x 2: its first and its last layer are resized"
    x = images(8, 12)
    close(new(x), up(old.apply(was.params, mean(x), T, Y)[0]))


@pytest.mark.parametrize("name", NAMES)
def test_smaller_patches_give_the_means_of_what_the_others_gave(name):
    more = {"conv": False} if name == "uvit" else {}
    old, was = made(name, space(8, 12), patch=4, **more)
    new, _ = started(was, name, space(4, 6), patch=2, **more)
    x = images(4, 6)
    close(new(x), mean(old.apply(was.params, up(x), T, Y)[0]))


def test_patches_that_are_no_multiple_are_refused():
    _, was = made("dit", space(6, 6), patch=3)
    with pytest.raises(
        ConfigError, match=r"its patches are 3 x 3, those of config.model 2 x 2: one must be a multiple"
    ):
        told_by(was, "dit", space(4, 4), patch=2)


def test_a_base_grid_keeps_the_range_of_positions():
    table = patches.position_table((4, 4), 16)
    np.testing.assert_array_equal(patches.position_table((4, 4), 16, base=4), table)
    spread = patches.position_table((8, 8), 16, base=4).reshape(8, 8, 16)
    np.testing.assert_allclose(spread[::2, ::2].reshape(-1, 16), table, rtol=1e-6)  # every second is a place it knows
    between = patches.position_table((8, 1), 16, base=4)[1]  # half a patch down
    np.testing.assert_allclose(between[8:12], np.sin(0.5 * 10000.0 ** -(np.arange(4) / 4)), rtol=1e-6)


def test_a_run_says_that_positions_are_others():
    _, was = made("dit", space(8, 8))
    assert told_by(was, "dit", space(8, 8)) == []
    (told,) = told_by(was, "dit", space(16, 16))
    said = "its positions are those of 4 x 4 patches, and this run has 8 x 8"
    assert told == f"{said}, some of which it never saw; to spread them: --config.model.base_grid=4"
    assert told_by(was, "dit", space(16, 16), base_grid=4) == [f"{said}: they are spread over them"]
    assert told_by(was, "dit", space(4, 4)) == [
        "its positions are those of 4 x 4 patches, and this run has 2 x 2; to spread them: --config.model.base_grid=4"
    ]
    _, spread = made("dit", space(16, 16), base_grid=4)
    assert told_by(spread, "dit", space(16, 16), base_grid=4) == []
    assert told_by(spread, "dit", space(16, 16)) == [told]


def test_learned_positions_are_resized_and_those_of_other_tokens_kept():
    _, was = made("uvit", space(8, 8), conv=False)
    rows = was.params["positions"]
    assert rows.shape == (2 + 16, 16)
    flat = was._replace(params=was.params | {"positions": np.concatenate([rows[:2], np.tile(rows[2], (16, 1))])})
    model, now = made("uvit", space(16, 16), conv=False)
    params, told = grown(flat, now, model)
    assert told == ["its learned positions are resized from 4 x 4 patches to 8 x 8"]
    np.testing.assert_array_equal(params["positions"][:2], rows[:2])
    np.testing.assert_allclose(params["positions"][2:], np.tile(rows[2], (64, 1)), rtol=1e-5)
    ramp = np.arange(8.0)[:, None] * np.ones((8, 4))  # down the rows; away from the edges it stays a ramp
    found = adapt.resized_table(ramp.reshape(32, 1).astype(np.float32), (8, 4), (16, 8)).reshape(16, 8)
    np.testing.assert_allclose(found[4:12, 3], np.arange(4, 12) / 2 - 0.25, atol=1e-5)


def test_a_last_convolution_is_told():
    _, was = made("uvit", space(8, 8))
    told = told_by(was, "uvit", space(16, 16), patch=4)
    assert told[-1].endswith("its last convolution still reaches one element, so what it gives changes at edges")


# --- From images to videos.


def still(x, frames: int = 3):
    return jnp.repeat(x[:, None], frames, axis=1)


def clip(*shape: int):
    return jax.random.normal(jax.random.key(3), (2, *shape, 2))


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("positions", ["learned_frames", pytest.param("space", marks=pytest.mark.slow)])
def test_a_joint_network_of_videos_gives_the_same_for_a_still_video(name, positions):
    old, was = made(name, space(4, 4), depth=3)
    new, told = started(was, name, space(3, 4, 4, video=True), depth=3, positions=positions)
    assert told == []
    x = images(4, 4)
    close(new(still(x)), still(old.apply(was.params, x, T, Y)[0]))


@pytest.mark.slow
def test_patches_of_several_frames_see_their_mean():
    old, was = made("dit", space(4, 4))
    new, _ = started(was, "dit", space(6, 4, 4, video=True), patch_frames=2, positions="space")
    x = images(4, 4)
    noisy = still(x, 6) + jnp.tile(jnp.array([1.0, -1.0])[None, :, None, None, None], (1, 3, 1, 1, 1))
    close(new(noisy), still(old.apply(was.params, x, T, Y)[0], 6))


FORMS = [("gate", None), ("release", "identity"), ("uvit", "identity"), ("paper", "identity")]
FORMS = [(*form, whole) for form in FORMS for whole in (True, False)] + [("none", None, False)]


@pytest.mark.parametrize(
    ("skip", "init", "whole"), [FORMS[0], *(pytest.param(*form, marks=pytest.mark.slow) for form in FORMS[1:])]
)
def test_a_factorised_network_gives_for_each_frame_what_the_image_network_gives(skip, init, whole):
    own = {"skip": skip, "skip_init": init} if whole else {}
    old, was = made("dit", space(4, 4), depth=4, **own)
    options = {"positions": "learned_frames", "skip": skip, "skip_init": init}
    if whole:
        options["pairing"] = "same_kind"
    video = {"depth": 8, "attention_axes": "factorised"}
    new, told = started(was, "dit", space(3, 4, 4, video=True), **video, **options)
    assert told == ["its 4 blocks become blocks 0, 2, .., which attend within a frame; blocks 1, 3, .. are new"]
    x = clip(3, 4, 4)
    found = new(x)
    for frame in range(3):
        close(found[:, frame], old.apply(was.params, x[:, frame], T, Y)[0])


@pytest.mark.slow
def test_the_skips_of_uvit_go_on_beside_new_ones_that_are_the_identity():
    """Their own are as they were trained: without a norm, the form does not say how they began."""
    old, was = made("dit", space(4, 4), depth=4, skip="uvit")
    options = {"skip": "uvit", "skip_init": "identity", "pairing": "same_kind", "positions": "space"}
    new, _ = started(was, "dit", space(2, 4, 4, video=True), depth=8, attention_axes="factorised", **options)
    x = clip(2, 4, 4)
    close(new(x)[:, 1], old.apply(was.params, x[:, 1], T, Y)[0])


@pytest.mark.slow
def test_positions_of_frames_are_told_and_leave_the_first_frame():
    old, was = made("dit", space(4, 4), depth=4)
    new, told = started(was, "dit", space(3, 4, 4, video=True), depth=8, attention_axes="factorised")
    assert told[-1].startswith(
        "positions of frames are added: only the first frame is at first as it was; with --config"
    )
    x = clip(3, 4, 4)
    found = new(x)
    close(found[:, 0], old.apply(was.params, x[:, 0], T, Y)[0])
    assert np.abs(found[:, 1] - old.apply(was.params, x[:, 1], T, Y)[0]).max() > 1e-3


FACTORISED = {"depth": 8, "attention_axes": "factorised"}
VIDEO = space(3, 4, 4, video=True)


@pytest.mark.parametrize(
    ("own", "where", "options", "told"),
    [
        (
            {},
            space(4, 4, 4),
            {"width": 24},
            "its network makes images, that of this run volumes: only a network of images can",
        ),
        ({}, VIDEO, {"depth": 4, "attention_axes": "factorised"}, "its depth is 4: .* needs config.model.depth = 8"),
        (
            {"skip": "gate"},
            VIDEO,
            FACTORISED | {"skip": "gate"},
            "config.model.pairing = 'same_kind' and skip = 'gate'",
        ),
        (
            {"skip": "release"},
            VIDEO,
            FACTORISED | {"skip": "release", "pairing": "same_kind"},
            "start all anew: --config",
        ),
        (
            {"skip": "release"},
            space(4, 4),
            {"skip": "release", "skip_init": "identity"},
            "which does not go on with them",
        ),
        (
            {"skip": "release"},
            space(4, 4),
            {"skip": "paper"},
            "have skip = 'release', .*, those of config.model skip = 'p",
        ),
        ({"skip": "release"}, space(4, 4), {}, "those of config.model skip = 'none'"),
    ],
)
def test_what_cannot_go_on_is_refused(own, where, options, told):
    _, was = made("dit", space(4, 4), **{"depth": 4} | own)
    with pytest.raises(ConfigError, match=told):
        told_by(was, "dit", where, **{"depth": 4} | options)


def test_another_model_with_the_same_arrays_is_refused():
    _, was = made("official_sit", space(4, 4))
    with pytest.raises(ConfigError, match=r"its network is a official_sit: --config.model.name must be 'official_sit'"):
        told_by(was, "dit", space(4, 4), out_channels=4)


def test_what_an_mmdit_cannot_know_by_its_arrays():
    where = Space((4, 4, 2), Conditions({"context": np.zeros((3, 8), np.float32)}))
    _, was = made("mmdit", where, skip="release", table=4)
    assert told_by(was, "mmdit", where, skip="release", table=4) == []
    said = "its position table has a side of 4, that of this run 8: positions are others"
    assert told_by(was, "mmdit", where, skip="release", table=8) == [said]
    with pytest.raises(ConfigError, match="which does not go on with them"):
        told_by(was, "mmdit", where, skip="release", skip_init="identity", table=4)


def test_videos_go_on_as_videos():
    own = FACTORISED | {"skip": "gate", "pairing": "same_kind"}
    _, was = made("dit", VIDEO, **own)
    assert told_by(was, "dit", VIDEO, **own) == []
    said = "its positions are of the kind 'frames', those of this run 'space'"
    assert told_by(was, "dit", VIDEO, **own, positions="space") == [said]
    with pytest.raises(ConfigError, match="have skip = 'gate', skip_init = None, pairing = 'same_kind', those of"):
        told_by(was, "dit", VIDEO, **own | {"pairing": "mirror"})
    with pytest.raises(ConfigError, match="its network makes videos, that of this run images"):
        told_by(was, "dit", space(4, 4), depth=8)


@pytest.mark.parametrize(
    ("skip", "init", "silent"),
    [
        ("release", "identity", True),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("release", None, False), ("gate", None, True))),
    ],
)
def test_new_skips_that_change_what_it_gives_are_told(skip, init, silent):
    old, was = made("dit", space(4, 4))
    new, told = started(was, "dit", space(4, 4), skip=skip, skip_init=init)
    assert [line[:47] for line in told] == [] if silent else ["its long residual connections are new and change"]
    x = images(4, 4)
    same = np.allclose(new(x), old.apply(was.params, x, T, Y)[0], atol=1e-5)
    assert same == silent
