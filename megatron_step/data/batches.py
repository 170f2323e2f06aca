"""Batches by sample number: the samples of each step do not depend on the parallel layout."""

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch
from torch.utils.data import Dataset

from megatron_step.config.counts import counted

Batch = dict[str, torch.Tensor]


def micro_batch_samples(
    first_sample: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[range]:
    """Return the samples of each micro-batch of a data-parallel rank.

    Micro-batch m of rank d starts at first_sample + (m * dp_size + d) * micro_batch_size. In every layout the ranks'
    micro-batches together are the samples from `first_sample` to `first_sample + global_batch_size`.

    Raises ValueError if the global batch is not a multiple of micro_batch_size * dp_size.
    """
    if global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
        raise ValueError(
            f"a global batch of {counted(global_batch_size, 'sample')} does not divide into micro-batches of "
            f"{micro_batch_size} on {counted(dp_size, 'data-parallel rank')}: set training.global_batch_size to a "
            f"multiple of {micro_batch_size * dp_size}"
        )
    stride = micro_batch_size * dp_size
    starts = range(first_sample + dp_rank * micro_batch_size, first_sample + global_batch_size, stride)
    return [range(start, start + micro_batch_size) for start in starts]


def batches(
    dataset: Dataset[Batch],
    first_sample: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> list[Batch]:
    """Return this rank's micro-batches of the global batch that begins at sample `first_sample`.

    Each micro-batch holds `tokens` and `labels`, [b, s] int64.

    Raises ValueError if the dataset has too few samples.
    """
    num_samples = len(dataset)  # type: ignore[arg-type]
    if not 0 <= first_sample <= num_samples - global_batch_size:
        raise ValueError(
            f"the step needs samples {first_sample} to {first_sample + global_batch_size}, but the dataset has "
            f"{counted(num_samples, 'sample')}: build it for more steps"
        )
    made: list[Batch] = []
    for samples in micro_batch_samples(first_sample, global_batch_size, micro_batch_size, dp_rank, dp_size):
        items = [dataset[sample] for sample in samples]
        tokens = torch.stack([item["tokens"] for item in items])
        labels = torch.stack([item["labels"] for item in items])
        made.append({"tokens": tokens, "labels": labels})
    return made


class BatchStream:
    """A stream of each step's micro-batches, which a background thread reads a few steps ahead.

    `schedule` gives (first_sample, global_batch_size) for each step. Iterating gives the result of `batches` for each
    step, in order, and raises the errors of the thread. Use the stream in a `with` block, or call `close`, to end the
    thread.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        schedule: Iterable[tuple[int, int]],
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        ahead: int = 2,
    ) -> None:
        self._read = (batches(dataset, first, size, micro_batch_size, dp_rank, dp_size) for first, size in schedule)
        self._queue: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        end: BaseException | None = None
        try:
            for step in self._read:
                if not self._put(step):
                    return
        except BaseException as error:
            end = error
        self._put(end)

    def _put(self, item: list[Batch] | BaseException | None) -> bool:
        """Put an item into the queue once there is room; return False if the stream is closed first."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, list):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop reading ahead, and wait until the thread ends."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
