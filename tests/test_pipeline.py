"""Batches: one global order and one stream of draws, whatever the number of processes, threads and restarts."""

import contextlib
import itertools

import numpy as np
import pytest

from diversedit_jax.data import Dataset, pipeline
from diversedit_jax.errors import ConfigError, DataError

SIZE = 20


class Numbers:
    """Twenty examples that carry their index; `bad` ones cannot be read."""

    def __init__(self, size=SIZE, bad=None):
        self.size, self.bad = size, bad

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == self.bad:
            raise RuntimeError("chunk data hash mismatch")
        return {"x": np.full((2, 2, 1), index, np.float32), "y": index}  # a Python int, as tfds gives


def add_noise(example, rng):
    return example | {"noise": rng.normal(size=3)}


def numbers(**options) -> Dataset:
    return Dataset(Numbers(**options), add_noise, (2, 2, 1), SIZE)


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
    parts = [take(7, numbers(), 8, seed=3, process_index=p, process_count=process_count) for p in range(process_count)]
    assert all(len(batch["y"]) == 8 // process_count for part in parts for batch in part)
    joined = [{name: np.concatenate([part[name] for part in k]) for name in k[0]} for k in zip(*parts, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize("num_threads", [0, 1, 6])
def test_batches_do_not_depend_on_the_number_of_threads(num_threads):
    assert_same(take(5, numbers(), 8, seed=0, num_threads=num_threads), take(5, numbers(), 8, seed=0))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2)])
def test_resuming_equals_not_stopping(before, after):
    wanted = take(9, numbers(), 8, seed=1, process_count=before)
    resumed = take(4, numbers(), 8, seed=1, start=5, process_count=after)
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
    batches = pipeline.batches(numbers(bad=17), SIZE, seed=0, num_threads=num_threads)
    with contextlib.closing(batches):
        with pytest.raises(DataError, match="record 17: RuntimeError: chunk data hash mismatch"):
            next(batches)
        with pytest.raises(StopIteration):  # the batch is not skipped
            next(batches)


def test_a_record_of_nothing_is_not_skipped():
    with pytest.raises(DataError, match="record 0: the source gave None"):
        take(1, Dataset([None], None, (2, 2, 1), 1), 1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 250, "process_count": 8}, "^batch_size 250 is not divisible by 8 processes$"),
        ({"batch_size": 0}, "batch_size must be positive, given 0"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not in 0 .. 1"),
        ({"start": -1}, "start must be a number of batches, given -1"),
    ],
)
def test_what_cannot_be_is_said_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.batches(numbers(), seed=0, **{"batch_size": 8} | options)


def test_an_empty_data_set_is_a_data_error():
    with pytest.raises(DataError, match="empty"):
        pipeline.batches(numbers(size=0), 8, seed=0)
