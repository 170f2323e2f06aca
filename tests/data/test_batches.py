import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_step.data.batches import BatchStream, batches, micro_batch_samples


class Numbers(torch.utils.data.Dataset):
    """Sample i is [i, i, i]."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 900:
            raise OSError("unreadable")
        return {"tokens": torch.full((3,), index), "labels": torch.full((3,), index + 1)}


@given(st.integers(0, 10**9), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_every_layout_takes_exactly_the_samples_of_the_global_batch(
    first: int, micro_batch_size: int, dp_size: int, num_microbatches: int
) -> None:
    size = micro_batch_size * dp_size * num_microbatches
    ranks = [micro_batch_samples(first, size, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    assert all(len(micro_batches) == num_microbatches for micro_batches in ranks)
    assert all(len(samples) == micro_batch_size for micro_batches in ranks for samples in micro_batches)
    taken = [sample for micro_batches in ranks for samples in micro_batches for sample in samples]
    assert sorted(taken) == list(range(first, first + size))


@pytest.mark.parametrize(("size", "micro", "dp"), [(8, 3, 1), (8, 2, 3), (2, 2, 2), (0, 1, 1)])
def test_indivisible_global_batch(size: int, micro: int, dp: int) -> None:
    with pytest.raises(ValueError, match=rf"to a multiple of {micro * dp}"):
        micro_batch_samples(0, size, micro, 0, dp)


def test_batches() -> None:
    made = batches(Numbers(), 100, 12, 2, 1, 3)
    assert [batch["tokens"][:, 0].tolist() for batch in made] == [[102, 103], [108, 109]]
    for batch in made:
        assert batch["labels"].equal(batch["tokens"] + 1)
        assert all(value.dtype == torch.int64 and value.is_contiguous() for value in batch.values())


@pytest.mark.parametrize("first", [-1, 989, 5000])
def test_beyond_the_dataset(first: int) -> None:
    with pytest.raises(ValueError, match="but the dataset has 1,000 samples"):
        batches(Numbers(), first, 12, 2, 0, 3)


def test_stream_gives_what_batches_gives() -> None:
    schedule = [(0, 4), (4, 8), (12, 8), (20, 16)]
    with BatchStream(Numbers(), iter(schedule), 2, 1, 2) as stream:
        streamed = list(stream)
    expected = [batches(Numbers(), first, size, 2, 1, 2) for first, size in schedule]
    assert len(streamed) == 4
    for ours, theirs in zip(streamed, expected, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert all(one[name].equal(other[name]) for name in ("tokens", "labels"))


def test_stream_reads_a_few_steps_ahead_and_stops() -> None:
    asked = []

    def schedule():
        for step in range(200):
            asked.append(step)
            yield step * 4, 4

    with BatchStream(Numbers(), schedule(), 4, 0, 1, ahead=2) as stream:
        next(stream)
        deadline = time.monotonic() + 30
        while len(asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # long enough to read on, were it to
        assert len(asked) == 4  # one taken, two in the queue, one waiting for room
    assert not any(thread.name == "batches" for thread in threading.enumerate())
    assert list(stream) == []


def test_stream_raises_what_reading_raised_after_the_steps_before_it() -> None:
    with BatchStream(Numbers(), [(892, 4), (896, 4), (900, 4), (904, 4)], 4, 0, 1) as stream:
        assert next(stream)[0]["tokens"][0, 0] == 892
        assert next(stream)[0]["tokens"][0, 0] == 896
        with pytest.raises(OSError, match="unreadable"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)
    with (
        BatchStream(Numbers(), [(996, 8)], 4, 0, 1) as stream,
        pytest.raises(ValueError, match="build it for more steps"),
    ):
        next(stream)
