"""From a data set to batches, in one global order of examples; every process reads its own rows.

Global batch k and its random draws depend only on the data set, the seed and the batch size. So a run may resume at
batch k with another number of hosts, threads or workers.
"""

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags

from diversedit_jax.data import Dataset
from diversedit_jax.data.levels import numbered
from diversedit_jax.errors import ConfigError, DataError, check_machine
from diversedit_jax.registry import in_range

Bad = dict[int, str]  # a record that cannot be read -> why


class HostBatches(grain.MapDataset):
    """This process's rows of global batch start + index, as (batch, bad records that were replaced).

    A whole batch is read at once: sources that read many records at a time are about twice as fast.
    """

    def __init__(self, dataset: Dataset, seed: int, start: int, batch_size: int, rows: Sequence[int], max_bad: int):
        super().__init__(grain.MapDataset.range(len(dataset.source)).seed(seed).shuffle().repeat())
        self.dataset, self.seed, self.start, self.batch_size = dataset, seed, start, batch_size
        self.rows, self.max_bad = rows, max_bad

    def __len__(self) -> int:
        return len(self._parent) // self.batch_size - self.start

    def positions(self, index: int) -> list[int]:
        """The places of the rows in the endless order of examples."""
        return [(self.start + index) * self.batch_size + row for row in self.rows]

    def records(self, index: int) -> list[int]:
        return [self._parent[position] for position in self.positions(index)]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        examples, bad = read(self.dataset.source, self.records(index), self.max_bad)
        if self.dataset.transform is not None:
            draws = (generator(self.seed, position) for position in self.positions(index))
            examples = [self.dataset.transform(example, rng) for example, rng in zip(examples, draws, strict=True)]
        return stacked(examples), bad


def stacked(examples: Sequence[Any]) -> Any:
    """Stack examples to one batch: every array in nested dicts gets a leading axis. 64-bit numbers become 32-bit."""
    if isinstance(examples[0], Mapping):
        return {name: stacked([example[name] for example in examples]) for name in examples[0]}
    array = np.stack(examples)
    narrow = {"int64": np.int32, "float64": np.float32}.get(array.dtype.name)
    return array if narrow is None else array.astype(narrow)


def generator(seed: int, position: int) -> np.random.Generator:
    """The random numbers for the example at one position. Philox finds them without drawing those before."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position << 64))


def read(source: Any, records: Sequence[int], max_bad: int) -> tuple[list[dict], Bad]:
    """Read these records. Returns the examples, and the bad records: each is replaced by the next good one.

    Raises DataError if more than `max_bad` records in a row are bad.
    """
    if hasattr(source, "__getitems__"):
        with contextlib.suppress(Exception):  # reading one by one, below, finds the bad record
            return list(source.__getitems__(records)), {}
    bad: Bad = {}
    return [_good(source, record, max_bad, bad) for record in records], bad


def _good(source: Any, record: int, max_bad: int, bad: Bad) -> dict:
    for candidate in range(record, record + max_bad + 1):
        number = candidate % len(source)
        try:
            if (example := source[number]) is not None:
                return example
            bad[number] = f"record {number}: the source gave None"  # grain would skip it
        except Exception as error:
            check_machine(error)
            text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            bad[number] = text if f"record {number}" in text else f"record {number}: {text}"
    raise DataError(bad[record])


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    report: Callable[[str], None] | None = None,
    *,
    num_threads: int = 4,
    num_workers: int = 0,
    max_bad_records: int = 0,
    timeout: float = 900.0,
    resident: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield this process's rows of the global batches `start`, `start + 1`, ... without end: dicts of arrays [b ...].

    batch_size: of the global batch. Epochs follow each other without a gap, each in a new order.
    rows: of every global batch, those that this process reads, see `sharding.rows`; None: all.
    report: gets a line for each bad record that is replaced.
    num_threads: each prepares a whole batch ahead; 0 reads in the calling thread.
    num_workers: processes with `num_threads` threads each, for images whose decoding is too slow. Latents need none.
    max_bad_records: replace so many unreadable records, each by the next readable one. One more is an error.
    timeout: seconds to wait for a batch before DataError; 0: for ever. It ends a run whose network mount hangs.
    resident: yield numbers of examples, for data that lie on the devices, see `codecs.resident`.

    Raises ConfigError at once, and DataError at the batch of a bad record. `close()` ends the threads and processes.
    """
    dataset = numbered(dataset) if resident else dataset
    rows = range(batch_size) if rows is None else rows
    in_range("batch_size", batch_size, 1)
    in_range("start", start, 0)
    in_range("num_threads", num_threads, 0, 1024)
    in_range("num_workers", num_workers, 0, 1024)
    in_range("timeout", timeout, 0, threading.TIMEOUT_MAX)
    in_range("max_bad_records", max_bad_records, 0)
    if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ConfigError(f"rows = {list(rows)}: wanted some of 0 .. {batch_size - 1}")
    if len(dataset.source) == 0:
        raise DataError("the data set is empty")
    mine = HostBatches(dataset, seed, start, batch_size, rows, max_bad_records)
    # A buffer of one batch a thread: grain's own default, 500 batches, would fill the host's memory.
    ahead = mine.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags, which a notebook never parses
            flags.FLAGS.mark_as_parsed()
        end_too = partial(_end_with, os.getpid())
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers), worker_init_fn=end_too)
    return _reported(within(ahead, timeout, mine.records), max_bad_records, report)


def _end_with(parent: int, index: int, count: int) -> None:
    """In a worker: end it soon after its parent process, even after SIGKILL. A worker of grain would live for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with the trainer").start()


def _reported(
    ahead: Iterator[tuple[dict[str, np.ndarray], Bad]], max_bad: int, report: Callable[[str], None] | None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches alone. Each bad record is reported once; too many of them are an error."""
    found: Bad = {}
    with contextlib.closing(ahead):
        for batch, bad in ahead:
            for record in sorted(bad.keys() - found.keys()):
                found[record] = bad[record]
                if len(found) > max_bad:
                    raise DataError(f"{bad[record]} (more than max_bad_records = {max_bad} cannot be read)")
                if report is not None:
                    report(f"replaced {bad[record]} ({len(found)} of at most {max_bad})")
            yield batch


def within(endless: Iterable, timeout: float, records: Callable[[int], list[int]]) -> Iterator:
    """Yield the items of `endless`. DataError names the `records` of one that does not arrive within `timeout` seconds.

    A daemon thread draws the items, one ahead. If it hangs, it is left behind, because it cannot be interrupted.
    """
    if not timeout:
        with contextlib.closing(iter(endless)) as items:
            yield from items
        return
    arrived: queue.Queue = queue.Queue()  # (item, None) or (None, error)
    wanted, done = threading.Semaphore(1), threading.Event()

    def draw() -> None:
        try:
            with contextlib.closing(iter(endless)) as items:
                for item in items:
                    arrived.put((item, None))
                    wanted.acquire()
                    if done.is_set():
                        return
        except BaseException as error:
            arrived.put((None, error))

    thread = threading.Thread(target=draw, name="batches", daemon=True)
    thread.start()
    hangs = False
    try:
        for index in itertools.count():
            try:
                item, error = arrived.get(timeout=timeout)
            except queue.Empty:
                hangs = True
                late = f"records {', '.join(map(str, records(index)[:8]))}, ..."
                raise DataError(f"no batch arrived within {timeout:g} s (config.input.timeout): {late}") from None
            if error is not None:
                raise error
            wanted.release()
            yield item
    finally:
        done.set()
        wanted.release()
        if not hangs:
            thread.join()
