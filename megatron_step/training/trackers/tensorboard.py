"""TensorBoard events.

TensorBoard's library makes the events and their framing. The file is written here, because a failed write ends the
thread of TensorBoard's own writer. It also leaves half an event, and TensorBoard reads no further than that.
"""

import os
import socket
import time
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_step.training.trackers.scalars import is_plotted, scalars
from megatron_step.training.trackers.tracker import Metrics, TrackedRun
from megatron_step.training.trackers.waiting_file import WaitingFile


class TensorBoard:
    """Writes the shown and evaluated steps to OUTPUT_DIR/tensorboard.

    TensorBoard drops the points of steps after `run.first_step` that an earlier, interrupted process left.
    """

    def __init__(self, run: TrackedRun) -> None:
        folder = Path(run.config.output_dir) / "tensorboard"
        name = f"events.out.tfevents.{time.time_ns() / 1e9:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = WaitingFile(folder / name)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=run.first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, metrics: Metrics, shown: bool) -> None:
        """Add the points of a step."""
        if is_plotted(metrics, shown):
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(metrics).items()]
            self._add(Event(step=metrics["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Write the events that still wait for room on the disk."""
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.add(record.getvalue())
