"""The lock of a workdir: one holder, and none that a kill leaves for ever."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import workdir_lock

SAID = []


def left_by(folder, **changes):
    """A lock that somebody left."""
    path = folder / workdir_lock.FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "2026-01-01 00:00:00"} | changes))
    return path


def test_it_is_held_and_given_back(tmp_path):
    with workdir_lock.held(tmp_path, SAID.append):
        holder = json.loads((tmp_path / workdir_lock.FILE).read_text())
        assert holder["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), workdir_lock.held(tmp_path, SAID.append):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_running_process_of_this_host_keeps_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        left_by(tmp_path, host=socket.gethostname(), pid=other.pid)
        with (
            pytest.raises(ConfigError, match=rf"is in use by process {other.pid} on .*: wait until it ends"),
            workdir_lock.held(tmp_path, SAID.append),
        ):
            pass
        assert (tmp_path / workdir_lock.FILE).exists()
        other.communicate()
    with workdir_lock.held(tmp_path, SAID.append):
        pass  # it is gone: taken over at once


@pytest.mark.parametrize("content", ["", "{", '{"host": 1}'])
def test_a_torn_lock_is_taken_over_when_nobody_touches_it(tmp_path, content):
    (tmp_path / workdir_lock.FILE).write_text(content)
    with workdir_lock.held(tmp_path, SAID.append, gone=0.2):
        pass


def test_another_host_is_told_apart_by_its_touch(tmp_path):
    said = []
    path = left_by(tmp_path)
    begin = time.monotonic()
    with workdir_lock.held(tmp_path, said.append, gone=0.5):
        assert time.monotonic() - begin >= 0.5
    assert "was in use by process 1 on elsewhere, since 2026-01-01 00:00:00: waiting 0 s" in said[0]
    left_by(tmp_path)
    toucher = threading.Timer(0.2, os.utime, [path, (1, 1)])
    toucher.start()
    with (
        pytest.raises(ConfigError, match="is in use by process 1 on elsewhere"),
        workdir_lock.held(tmp_path, SAID.append, gone=5.0),
    ):
        pass
    toucher.join()


def test_the_holder_touches_it(tmp_path):
    with workdir_lock.held(tmp_path, SAID.append, touched=0.05):
        os.utime(tmp_path / workdir_lock.FILE, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / workdir_lock.FILE).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
