"""The tests, one folder for each room of the package; what they share stands here."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
