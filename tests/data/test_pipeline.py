"""Batches: one global order and one stream of draws, whatever the number of processes, threads and restarts."""

import contextlib
import errno
import gc
import itertools
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, pipeline
from diversedit_jax.errors import ConfigError, DataError, MachineError

SIZE = 20
SPACE = Space((2, 2, 1), Conditions.labels(SIZE))


class Numbers:
    """Twenty examples that carry their index; `bad` ones cannot be read, one of `slow` takes a while."""

    def __init__(self, size=SIZE, bad=(), slow=None):
        self.size, self.bad, self.slow = size, bad, slow

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise RuntimeError("chunk data hash mismatch")
        if index == self.slow:
            time.sleep(1)
        return {"x": np.full((2, 2, 1), index, np.float32), "y": index}  # a Python int, as tfds gives


def add_noise(example, rng):
    return example | {"noise": rng.normal(size=3)}


def numbers(**options) -> Dataset:
    return Dataset(Numbers(**options), add_noise, SPACE)


def take(count: int, *args, **kwargs) -> list[dict]:
    with contextlib.closing(pipeline.batches(*args, **kwargs)) as batches:
        return list(itertools.islice(batches, count))


def assert_same(given: list[dict], wanted: list[dict]) -> None:
    assert len(given) == len(wanted)
    for k, (a, b) in enumerate(zip(given, wanted, strict=True)):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], f"{name} of batch {k} differs")


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(process_count):
    whole = take(7, numbers(), 8, seed=3)  # 8 does not divide 20: batches run over the ends of epochs
    order = np.random.default_rng(0).permutation(8)  # the rows of a process need not lie side by side
    rows = [sorted(part.tolist()) for part in np.split(order, process_count)]
    parts = [take(7, numbers(), 8, seed=3, rows=mine) for mine in rows]
    assert all(len(batch["y"]) == 8 // process_count for part in parts for batch in part)
    back = np.argsort(np.concatenate(rows))
    joined = [
        {name: np.concatenate([part[name] for part in k])[back] for name in k[0]} for k in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("num_threads", [0, 1, 6])
def test_batches_do_not_depend_on_the_number_of_threads(num_threads):
    assert_same(take(5, numbers(), 8, seed=0, num_threads=num_threads), take(5, numbers(), 8, seed=0))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2)])
def test_resuming_equals_not_stopping(before, after):
    wanted = take(9, numbers(), 8, seed=1, rows=range(8 // before))
    resumed = take(4, numbers(), 8, seed=1, start=5, rows=range(8 // after))
    rows = min(8 // before, 8 // after)  # process 0 always has the first rows
    assert_same(
        [{name: a[:rows] for name, a in batch.items()} for batch in resumed],
        [{name: a[:rows] for name, a in batch.items()} for batch in wanted[5:]],
    )


def test_a_distant_start_costs_no_reading():
    (batch,) = take(1, numbers(), 8, seed=1, start=10**9)
    assert batch["x"].shape == (8, 2, 2, 1)


def test_every_epoch_visits_every_example_once_in_its_own_order():
    y = np.concatenate([batch["y"] for batch in take(3 * SIZE // 4, numbers(), 4, seed=0)]).reshape(3, SIZE)
    for epoch in y:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(SIZE))
    assert len({epoch.tobytes() for epoch in y}) == 3
    assert not np.array_equal(y[0], np.arange(SIZE))


def test_draws_are_new_in_every_epoch_and_for_every_example():
    noise = np.concatenate([batch["noise"] for batch in take(15, numbers(), 8, seed=0)])
    assert len(np.unique(noise)) == noise.size


def test_the_seed_sets_order_and_draws():
    (a,), (b,), (c,) = (take(1, numbers(), 8, seed=seed) for seed in (0, 0, 1))
    assert_same([a], [b])
    assert not np.array_equal(a["y"], c["y"])
    assert not np.intersect1d(a["noise"], c["noise"]).size


def test_a_batch_may_be_larger_than_the_data_set():
    (batch,) = take(1, numbers(), 3 * SIZE, seed=0)
    np.testing.assert_array_equal(np.bincount(batch["y"]), 3)


def test_labels_are_int32_and_examples_without_draws_pass():
    (batch,) = take(1, numbers()._replace(transform=None), 8, seed=0)
    assert batch["y"].dtype == np.int32
    np.testing.assert_array_equal(batch["x"][:, 0, 0, 0], batch["y"])


@pytest.mark.parametrize("num_threads", [0, 4])
def test_a_record_that_fails_ends_the_run_and_is_named(num_threads):
    batches = pipeline.batches(numbers(bad=[17]), SIZE, seed=0, num_threads=num_threads)
    with contextlib.closing(batches):
        with pytest.raises(DataError, match="record 17: RuntimeError: chunk data hash mismatch"):
            next(batches)
        with pytest.raises(StopIteration):  # the batch is not skipped
            next(batches)


def test_a_record_of_nothing_is_not_skipped():
    with pytest.raises(DataError, match="record 0: the source gave None"):
        take(1, Dataset([None], None, SPACE), 1, seed=0)


class Together(Numbers):
    """The same, many at a time."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("bad", [[], [3, 4]])
def test_records_read_together_make_the_same_batches(bad):
    wanted = take(5, numbers(bad=bad), 8, seed=0, max_bad_records=2)
    assert_same(take(5, numbers()._replace(source=Together(bad=bad)), 8, seed=0, max_bad_records=2), wanted)


def test_bad_records_are_replaced_by_the_next_good_one_and_reported():
    lines = []
    whole = take(10, numbers(), 8, seed=0)
    found = take(10, numbers(bad=[3, 4, 19]), 8, seed=0, max_bad_records=3, report=lines.append)
    instead = {3: 5, 4: 5, 19: 0}
    for batch, wanted in zip(found, whole, strict=True):
        np.testing.assert_array_equal(batch["y"], [instead.get(y, y) for y in wanted["y"]])
        np.testing.assert_array_equal(batch["noise"], wanted["noise"])
    assert sorted(line.partition(" (")[0] for line in lines) == [
        f"replaced record {n}: RuntimeError: chunk data hash mismatch" for n in (19, 3, 4)
    ]
    assert lines[-1].endswith("(3 of at most 3)")
    with pytest.raises(DataError, match=r"record \d+: .*more than max_bad_records = 2 cannot be read"):
        take(10, numbers(bad=[3, 5, 19]), 8, seed=0, max_bad_records=2)
    with pytest.raises(DataError, match=r"record \d+: RuntimeError"):
        take(1, numbers(bad=range(20)), 8, seed=0, max_bad_records=2)


def test_data_that_do_not_come_are_named():
    y = take(1, numbers(), SIZE, seed=0)[0]["y"]
    begin = time.monotonic()
    with pytest.raises(
        DataError, match=rf"no batch arrived within 0.3 s \(config.input.timeout\): records {y[0]}, {y[1]}, "
    ) as error:
        take(1, numbers(slow=5), SIZE, seed=0, timeout=0.3)
    assert time.monotonic() - begin < 5, "it waited for a slow record"
    assert "\n" not in str(error.value)
    assert len(take(1, numbers(slow=5), SIZE, seed=0, timeout=0.0)) == 1


@pytest.mark.parametrize("timeout", [0.0, 60.0])
def test_threads_end_with_the_batches(timeout):
    before = threading.active_count()
    batches = pipeline.batches(numbers(), 8, seed=0, timeout=timeout)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert not any(thread.name == "batches" for thread in threading.enumerate())
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def in_shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest.mark.slow  # each worker imports jax
def test_batches_do_not_depend_on_workers_and_nothing_of_them_stays():
    wanted = take(7, numbers(), 8, seed=0, start=2)
    shared = in_shared_memory()
    for workers in (1, 2):
        assert_same(take(7, numbers(), 8, seed=0, start=2, num_workers=workers), wanted)
    lines = []
    take(5, numbers(bad=[3]), 8, seed=0, num_workers=2, max_bad_records=1, report=lines.append)
    assert lines == ["replaced record 3: RuntimeError: chunk data hash mismatch (1 of at most 1)"]
    with pytest.raises(DataError, match="record 3: RuntimeError: chunk data hash mismatch"):
        take(5, numbers(bad=[3]), 8, seed=0, num_workers=2)
    assert not multiprocessing.active_children()
    deadline = time.monotonic() + 10
    while (left := in_shared_memory() - shared) and time.monotonic() < deadline:  # grain frees it in a thread
        gc.collect()
        time.sleep(0.05)
    assert not left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "num_workers = -1: must be at least 0"),
        ({"max_bad_records": -1}, "max_bad_records = -1: must be at least 0"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"rows": [7, 8]}, r"^rows = \[7, 8\]: wanted some of 0 .. 7$"),
        ({"start": -1}, "start = -1: must be at least 0"),
    ],
)
def test_what_cannot_be_is_said_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.batches(numbers(), seed=0, **{"batch_size": 8} | options)


def test_an_empty_data_set_is_a_data_error():
    with pytest.raises(DataError, match="empty"):
        pipeline.batches(numbers(size=0), 8, seed=0)


def test_a_machine_that_lacks_files_has_no_bad_records():
    """Replacing records would train on other data than asked for, and hide the cause."""

    class Refused(list):
        def __getitem__(self, index):
            raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(MachineError, match="Too many open files"):
        pipeline.read(Refused(range(4)), [0, 1], max_bad=3)
