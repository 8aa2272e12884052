"""The help of a program, and recipes by name."""

import pytest
from absl import flags

from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import cli, help_page


@pytest.fixture
def own():
    """Flags of every kind."""
    values = flags.FlagValues()
    flags.DEFINE_integer("num", 64, "Number of samples.", flag_values=values)
    flags.DEFINE_float("scale", None, "Scale.", flag_values=values)
    flags.DEFINE_bool("quick", False, "Do less", values)
    flags.DEFINE_list("labels", None, "Class labels.", values)
    flags.DEFINE_enum("kind", "a", ["a", "b"], "The kind.", values)
    flags.DEFINE_enum("preset", None, ["a_long_name", "another_long_name"], "Known is a_long_name.", values)
    flags.DEFINE_multi_string("sweep", [], "NAME=VALUES; may be repeated.", values)
    flags.DEFINE_string("out", None, "Directory to write to.", values)
    return [values[name] for name in values]


def test_a_page_says_what_it_does_and_shows_flags_in_groups(own):
    text = help_page.page("Do it.\n\n    python -m it\n", own, {"Others": ["scale", "absent"]}, 80)
    about, main, others = text.split("\n\n", 1)[0], text.partition("Others:")[0], text.partition("Others:")[2]
    assert about == "Do it."
    for line in (
        "--num=N                  Number of samples. Default: 64.",
        "--quick                  Do less.",
        "--labels=A,B,...         Class labels.",
        "--kind=a|b               The kind. Default: a.",
        "--preset=NAME            Known is a_long_name. One of another_long_name.",
        "--sweep=TEXT             NAME=VALUES; may be repeated.",
        "--out=DIR                Directory to write to.",
    ):
        assert f"  {line}\n" in main
    assert others.strip() == "--scale=X                Scale."


def test_a_page_fits_its_width(own):
    assert max(map(len, help_page.page("Do it.", own, {}, 60).splitlines())) <= 60


def test_recipes_are_named_with_what_they_are():
    known = help_page.recipes()
    assert known["digits"].startswith("DiverseDiT on the 1,797 handwritten digits")
    assert "variants" not in known  # no config


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = help_page.CONFIGS / "repa.py"
    assert file.exists()
    assert cli.recipe("--config=repa:xl2,512") == f"--config={file}:xl2,512"
    for other in (
        "--config=mine.py",
        "--config=sub/mine.py:a",
        "--config=/tmp/x.py",
        "--config.seed=1",
        "--workdir=repa",
    ):
        assert cli.recipe(other) == other
    with pytest.raises(ConfigError, match="--config = 'repo' is unknown; did you mean 'repa'"):
        cli.recipe("--config=repo:xl2")
