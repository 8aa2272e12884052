"""The losses in other people's frameworks: each example trains, and the loss makes its blocks differ more."""

import importlib
import math

import pytest

from tests import ROOT

FOLDER = ROOT / "tools" / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


SLOW = {"equinox_mixer", "linen_vit", "nnx_language_model"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else []) for n in NAMES])
def test_example_trains_and_its_blocks_differ_more(name):
    results = importlib.import_module(f"tools.examples.{name}").main(steps=12)
    assert all(math.isfinite(value) for value in results.values())
    assert results["diverse L_div"] < results["plain L_div"] - 0.005
