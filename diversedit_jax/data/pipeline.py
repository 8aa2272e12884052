"""From a data set to batches: one global order of examples and draws, of which every process reads its rows.

Global batch k and its random draws depend on the data set, the seed and the batch size alone, not on the number of
processes, threads or workers, so that a run may resume at batch k on another number of hosts.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags

from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.registry import in_range

Bad = dict[int, str]  # a record that cannot be read, and why


class HostBatches(grain.MapDataset):
    """This process's rows of every global batch from `start` on, as (batch, bad records that were replaced).

    A whole batch is read at once: sources that read many records at a time are about twice as fast.
    """

    def __init__(
        self,
        order: grain.MapDataset,
        dataset: Dataset,
        seed: int,
        *,
        first: int,
        rows: Sequence[int],
        stride: int,
        replace: int,
    ):
        super().__init__(order)
        self.dataset, self.seed = dataset, seed
        self.first, self.rows, self.stride, self.replace = first, rows, stride, replace

    def __len__(self) -> int:
        return (len(self._parent) - self.first) // self.stride

    def positions(self, index: int) -> list[int]:
        """The places of the rows in the endless order of examples."""
        begin = self.first + index * self.stride
        return [begin + row for row in self.rows]

    def records(self, index: int) -> list[int]:
        """The records in these places."""
        return [self._parent[position] for position in self.positions(index)]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        examples, bad = read(self.dataset.source, self.records(index), self.replace)
        if self.dataset.transform is not None:
            draws = (generator(self.seed, position) for position in self.positions(index))
            examples = [self.dataset.transform(example, rng) for example, rng in zip(examples, draws, strict=True)]
        return stacked(examples), bad


def stacked(examples: Sequence[Any]) -> Any:
    """Examples as one batch: arrays in dicts, however deep, get a leading axis. 64-bit numbers become 32-bit."""
    if isinstance(examples[0], Mapping):
        return {name: stacked([example[name] for example in examples]) for name in examples[0]}
    array = np.stack(examples)
    narrow = {"int64": np.int32, "float64": np.float32}.get(array.dtype.name)
    return array if narrow is None else array.astype(narrow)


def generator(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one draw of an example: those of no other, and found without walking through others."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position << 64))


def read(source: Any, records: Sequence[int], replace: int) -> tuple[list[dict], Bad]:
    """The examples of these records, and those that could not be read.

    In the place of a bad record stands the next good one, of at most `replace`. DataError names one that has none.
    """
    if hasattr(source, "__getitems__"):
        try:
            return list(source.__getitems__(records)), {}
        except Exception:  # one of them: which, is found below
            pass
    bad: Bad = {}
    return [_good(source, record, replace, bad) for record in records], bad


def _good(source: Any, record: int, replace: int, bad: Bad) -> dict:
    for other in range(record, record + replace + 1):
        try:
            return _one(source, other % len(source))
        except DataError as error:
            bad[other % len(source)] = str(error)
    raise DataError(bad[record])


def _one(source: Any, record: int) -> dict:
    """An example; grain would lose the number of one that fails, or skip a None."""
    try:
        example = source[record]
    except DataError as error:
        if f"record {record}" in str(error):
            raise
        raise DataError(f"record {record}: {error}") from error
    except Exception as error:
        raise DataError(f"record {record}: {type(error).__name__}: {error}") from error
    if example is None:
        raise DataError(f"record {record}: the source gave None")
    return example


def check(dataset: Dataset, batch_size: int, start: int, rows: Sequence[int]) -> None:
    """Raise ConfigError or DataError for what could not give batches."""
    in_range("batch_size", batch_size, 1)
    in_range("start", start, 0)
    if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ConfigError(f"rows = {list(rows)}: wanted some of 0 .. {batch_size - 1}")
    if len(dataset.source) == 0:
        raise DataError("the data set is empty")


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
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches `start`, `start + 1`, ... without end, each dict of [b ...] arrays.

    batch_size: of the global batch; epochs follow each other without a gap, every one in an order of its own.
    start: how many global batches were consumed before. rows: those of every global batch that this process reads
    (None: all), see `sharding.rows`. report: gets a line for each bad record that is replaced.

    num_threads: each prepares a whole batch ahead; 0 reads in the calling thread.
    num_workers: processes, with such threads each: where decoding images keeps one process from keeping up. Latents
    need none.
    max_bad_records: so many records that cannot be read are replaced, each by the next one that can, and reported; one
    more is an error. Without faults no batch changes.
    timeout: seconds after which a batch that does not come is an error that names its records: a network mount that
    hangs would hang the run. 0: wait for ever.

    The result is a generator: its threads and processes end with `close()`, with `contextlib.closing`, or when it is
    dropped. Raises ConfigError at once; DataError, naming the record, at the batch that has it, and then ends.
    """
    rows = range(batch_size) if rows is None else rows
    check(dataset, batch_size, start, rows)
    in_range("num_threads", num_threads, 0)
    in_range("num_workers", num_workers, 0)
    in_range("timeout", timeout, 0)
    in_range("max_bad_records", max_bad_records, 0)
    order = grain.MapDataset.range(len(dataset.source)).seed(seed).shuffle().repeat()
    first = start * batch_size
    ready = HostBatches(order, dataset, seed, first=first, rows=rows, stride=batch_size, replace=max_bad_records)
    # A buffer of one batch a thread: grain's own default, 500 batches, would fill the host's memory.
    ahead = ready.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own, which a notebook never parses
            flags.FLAGS.mark_as_parsed()
        die_too = partial(_end_with, os.getpid())
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers), worker_init_fn=die_too)
    return _counted(_closing(ahead), ready, max_bad_records, timeout, report)


def _end_with(parent: int, index: int, count: int) -> None:
    """In a worker: end it soon after the process `parent` has ended, also by SIGKILL; grain's would live for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with the trainer").start()


def _closing(dataset: grain.IterDataset) -> Iterator[tuple[dict[str, np.ndarray], Bad]]:
    """The elements; grain's threads and processes are ended whatever ends the loop."""
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _counted(
    ready: Iterator[tuple[dict[str, np.ndarray], Bad]],
    source: HostBatches,
    max_bad: int,
    timeout: float,
    report: Callable[[str], None] | None,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches alone: bad records are reported once each, and too many of them are an error."""
    found: Bad = {}
    in_time = within(ready, timeout, lambda index: f"records {', '.join(map(str, source.records(index)[:8]))}, ...")
    try:
        for batch, bad in in_time:
            for record in sorted(bad.keys() - found.keys()):
                found[record] = bad[record]
                if len(found) > max_bad:
                    raise DataError(f"{bad[record]} (more than max_bad_records = {max_bad} cannot be read)")
                if report is not None:
                    report(f"replaced {bad[record]} ({len(found)} of at most {max_bad})")
            yield batch
    finally:
        in_time.close()


def within(items: Iterator, timeout: float, what: Callable[[int], str]) -> Iterator:
    """The items, each of which must come within `timeout` seconds of being asked for; DataError says `what` did not.

    They are drawn in a thread, one ahead, that is left behind if it hangs: nothing else would return.
    """
    if not timeout:
        yield from items
        return
    ahead: queue.Queue = queue.Queue(maxsize=1)
    done = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not done.is_set():
            try:
                return ahead.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def draw() -> None:
        try:
            for item in items:
                put("item", item)
                if done.is_set():
                    break
            put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            items.close()

    thread = threading.Thread(target=draw, name="batches", daemon=True)
    thread.start()
    index, hangs = 0, False
    try:
        while True:
            try:
                kind, value = ahead.get(timeout=timeout)
            except queue.Empty:
                hangs = True
                raise DataError(f"the data do not come: waited {timeout:g} s for {what(index)}") from None
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
            index += 1
    finally:
        done.set()
        if not hangs:
            thread.join()
