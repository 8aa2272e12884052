"""Windows of profiling: what they may be, and that what is written opens and holds the steps."""

import warnings

import jax
import jax.numpy as jnp
import pytest

from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime.profiler import Profiler, windows


def steps_in(folder):
    """The training steps in the one profile of a folder."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    with warnings.catch_warnings():  # as an error, this one of jaxlib on Python 3.13 would abort the process
        warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        return {dict(event.stats)["step_num"] for event in events if event.name == "train"}


def test_windows():
    assert windows("") == []
    assert windows("100:105") == [(100, 105)]
    assert windows("2:2,5:7") == [(2, 2), (5, 7)]


@pytest.mark.parametrize("text", ["5", "0:3", "7:5", "1:3,3:4", "a:b", "1:2;3:4", "-1:2"])
def test_other_windows_are_refused(text):
    with pytest.raises(ConfigError, match=r"wanted FIRST:LAST of steps"):
        windows(text)


def test_the_profile_holds_the_steps_of_its_window(tmp_path):
    said = []
    profiler = Profiler("3:4", tmp_path, said.append)
    compute = jax.jit(lambda x: jnp.sin(x @ x).sum())
    x = jnp.ones((64, 64))
    for step in range(1, 7):
        with profiler.step(step):
            result = compute(x)
        profiler.after(step, result)
    profiler.close()
    assert said == [f"profiled up to step 4: xprof --logdir {tmp_path}"]
    assert steps_in(tmp_path) == {3, 4}


def test_a_window_that_the_run_does_not_reach_the_end_of_is_written(tmp_path):
    profiler = Profiler("1:9", tmp_path, print)
    with profiler.step(1):
        result = jnp.ones(1)
    profiler.after(1, result)
    profiler.close()
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
