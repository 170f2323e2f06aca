"""Where a checkpoint's writer leaves its results.

megatron-core starts a manager process on every rank for it, by a spawn that imports the main program, torch and
megatron-core again. The writer is this process or a fork of it, so a file that both have open serves as well.
"""

import pickle
import queue
import tempfile
from typing import Any


class ResultsFile:
    """A queue for one result at a time, put by this process or by a fork of it that has ended when it is asked for."""

    def __init__(self) -> None:
        # Open as long as the queue lives, and without a buffer: each process would have its own.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115

    def put(self, result: Any) -> None:
        """Leave a picklable result; replaces one that nobody took."""
        self._file.seek(0)
        self._file.truncate()
        content = memoryview(pickle.dumps(result))
        while content:
            content = content[self._file.write(content) :]

    def get_nowait(self) -> Any:
        """Take the result.

        Raises queue.Empty if there is none, or its writer was ended while it put it.
        """
        self._file.seek(0)
        try:
            result = pickle.loads(self._file.read())
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self._file.seek(0)
        self._file.truncate()
        return result
