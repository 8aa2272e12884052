"""What `--explain` says of the keys of a config."""

import pytest

from diversedit_jax import registry
from diversedit_jax.config import LABELED, SINGLE, slot
from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import explain
from diversedit_jax.runs.check import FACTORIES, KEYS

SLOTS = [(kind, name) for kind in (*SINGLE.values(), *LABELED) for name in registry.known(kind)]


@pytest.mark.parametrize("build", [*FACTORIES.values(), *(registry.factory(*slot) for slot in SLOTS)])
def test_every_option_has_a_meaning(build):
    meanings = explain.documented(build)
    for name in registry.options(build):
        assert meanings.get(name), f"the docstring of {build.__module__}.make does not explain {name!r}"
        assert not meanings[name].lower().startswith("see `"), f"{build.__module__}: {name} points to nothing"


def test_every_other_key_has_a_comment():
    assert not [key for key in KEYS if not explain.comments().get(key)]


def test_meanings_stand_alone_or_together_in_a_docstring():
    doc = """Do it.

    width: of the table,
        in cm. depth: of it. legs, arms: so many
        of each. Not a key: no.
    other: something else.
    height:  of it.

    Longer text.
    """
    assert explain.meanings(doc, ["width", "depth", "legs", "arms", "height", "absent"]) == {
        "width": "of the table, in cm.",
        "depth": "of it.",
        "legs": "so many of each. Not a key: no.",
        "arms": "so many of each. Not a key: no.",
        "height": "of it.",
    }


def test_a_config_is_explained():
    config = digits.get_config()
    config.losses.diversity.lo = 0.2
    text = explain.text(config)
    for line in (
        "config.losses.diversity = diversity: The diversity loss for the trainer:",
        "  lo = 0.2    (default None)\n      a number or None. Limits of the adaptive weight:",
        "  learning_rate = 0.002    (default 0.0001)\n      a number, at least 0. After the warm-up.",
        "  keep = 3\n      a whole number, at least 1. The newest so many",
        "  remat = 'named'\n      one of named, dots, full, none. What the backward pass keeps:",
        "  every = 500\n      Interval in steps; 0: only at the end of the run.",
    ):
        assert line in text
    assert max(map(len, explain.text(config, width=60).splitlines())) <= 70


@pytest.mark.parametrize("wanted", ["losses.diversity", "config.losses.diversity.", "losses"])
def test_a_part_is_explained(wanted):
    text = explain.text(digits.get_config(), wanted)
    assert text.startswith("config.losses.diversity = diversity:")
    assert "\n\n" not in text


def test_a_key_is_explained_and_a_mistyped_one_suggested():
    config = digits.get_config()
    assert explain.text(config, "optim.clip").startswith(
        "config.optim\n  clip = 1.0\n      a number or None, more than 0."
    )
    with pytest.raises(ConfigError, match=r"no key 'optim.clop'; did you mean 'optim.clip'\?"):
        explain.text(config, "optim.clop")


def test_factories_of_a_user_are_explained_as_far_as_they_say():
    config = digits.get_config()
    config.losses.mine = slot("losses", "tests.outside.loss:make")
    assert "config.losses.mine = tests.outside.loss:make" in explain.text(config, "losses.mine")
