"""The results of a checkpoint's writer.

For the results, megatron-core starts a manager process on every rank, which imports the main program, torch and
megatron-core again. Here the writer is this process or a fork of it, so a file that both have open is enough.
"""

import pickle
import queue
import tempfile
from typing import Any


class ResultsFile:
    """A queue for one result, put by this process or by a fork of it that ends before the result is taken."""

    def __init__(self) -> None:
        # Open as long as the queue exists, and unbuffered, since each process would have its own buffer.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115

    def put(self, result: Any) -> None:
        """Put a picklable result; it replaces a result that nobody took."""
        self._file.seek(0)
        self._file.truncate()
        content = memoryview(pickle.dumps(result))
        while content:
            content = content[self._file.write(content) :]

    def get_nowait(self) -> Any:
        """Take the result.

        Raises queue.Empty if there is no result, or if its writer ended while it wrote the result.
        """
        self._file.seek(0)
        try:
            result = pickle.loads(self._file.read())
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self._file.seek(0)
        self._file.truncate()
        return result
