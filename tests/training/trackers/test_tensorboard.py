"""TensorBoard reads what was written, also after a full disk and a restart."""

from pathlib import Path
from typing import Any

from file_size_limit import file_size_limit
from small_run import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_step.training.trackers.tensorboard import TensorBoard
from megatron_step.training.trackers.tracker import TrackedRun


def _open(output: Path, first_step: int = 0) -> TensorBoard:
    return TensorBoard(TrackedRun(small_config(str(output)), num_steps=10, first_step=first_step))


def _read(output: Path, name: str) -> list[Any]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_shown_and_evaluated_steps_have_points(tmp_path: Path) -> None:
    board = _open(tmp_path)
    board.write({"step": 1, "loss": 0.5}, False)
    board.write({"step": 2, "loss": 0.25, "memory": {"peak_bytes": 8 << 20}}, True)
    board.write({"step": 3, "loss": 0.125, "validation_loss": 2.0}, False)
    board.close()
    assert _read(tmp_path, "loss") == [(2, 0.25), (3, 0.125)]
    assert _read(tmp_path, "memory/peak_bytes") == [(2, 8 << 20)]
    assert _read(tmp_path, "validation_loss") == [(3, 2.0)]


def test_points_wait_for_room_on_a_full_disk(tmp_path: Path) -> None:
    board = _open(tmp_path)
    with file_size_limit(150):  # in the middle of a point
        for step in range(1, 5):
            board.write({"step": step, "loss": 0.5}, True)
    board.write({"step": 5, "loss": 0.5}, True)
    board.close()
    assert _read(tmp_path, "loss") == [(step, 0.5) for step in range(1, 6)]


def test_steps_that_are_trained_again_lose_their_earlier_points(tmp_path: Path) -> None:
    for first_step, loss in ((0, 0.5), (2, 0.25)):
        board = _open(tmp_path, first_step)
        for step in range(first_step + 1, 5):
            board.write({"step": step, "loss": loss}, True)
        board.close()
    assert _read(tmp_path, "loss") == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]
