"""From a data set to batches: one global order of examples and draws, of which every process reads its rows.

Global batch k and its random draws depend on the data set, the seed and the batch size alone, not on the number of
processes or threads, so that a run may resume at batch k on another number of hosts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError, DataError


@dataclass(frozen=True)
class Checked:
    """A source whose failures are DataErrors that name the record: grain would lose the index, or skip a None."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        try:
            example = self.source[index]
        except DataError as error:
            raise DataError(f"record {index}: {error}") from error
        except Exception as error:
            raise DataError(f"record {index}: {type(error).__name__}: {error}") from error
        if example is None:
            raise DataError(f"record {index}: the source gave None")
        return example


class HostRows(grain.MapDataset):
    """The rows of one process: rows p*b .. (p+1)*b of every global batch, b = batch_size / process_count.

    It stands before the batching, so that a process decodes its own rows only.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, process_index: int, process_count: int):
        super().__init__(parent)
        self.batch_size = batch_size
        self.rows = batch_size // process_count
        self.offset = process_index * self.rows

    def __len__(self) -> int:
        return len(self._parent) // self.batch_size * self.rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self.rows)
        return self._parent[batch * self.batch_size + self.offset + row]


def check(dataset: Dataset, batch_size: int, start: int, process_index: int, process_count: int) -> None:
    """Raise ConfigError or DataError for what could not give batches."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be positive, given {batch_size}")
    if batch_size % process_count:
        raise ConfigError(f"batch_size {batch_size} is not divisible by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index {process_index} is not in 0 .. {process_count - 1}")
    if start < 0:
        raise ConfigError(f"start must be a number of batches, given {start}")
    if len(dataset.source) == 0:
        raise DataError("the data set is empty")


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches `start`, `start + 1`, ... without end, each dict of [b ...] arrays.

    batch_size: of the global batch; epochs follow each other without a gap, every one in an order of its own.
    start: how many global batches were consumed before. num_threads: each prepares a whole batch ahead; 0 reads in
    the calling thread. The result is a generator: its threads end with `close()`, with `contextlib.closing`, or when
    it is dropped. Raises ConfigError at once; DataError, naming the record, at the batch that has it, and then ends.
    """
    check(dataset, batch_size, start, process_index, process_count)
    examples = grain.MapDataset.source(Checked(dataset.source)).seed(seed).shuffle().repeat()
    if dataset.transform is not None:
        examples = examples.random_map(dataset.transform)
    rows = HostRows(examples, batch_size, process_index, process_count)
    ready = rows.batch(batch_size // process_count, drop_remainder=True)
    # A buffer of one batch a thread: grain's own default, 500 batches, would fill the host's memory.
    return iterate(ready.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads)), start)


def iterate(dataset: grain.IterDataset, start: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches from number `start` on; grain's threads are ended whatever ends the loop."""
    iterator = iter(dataset)
    try:
        iterator.set_state({"next_index": start})
        for batch in iterator:
            yield batch | {"y": np.asarray(batch["y"], np.int32)}
    finally:
        iterator.close()
