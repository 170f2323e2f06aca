"""The run's output folder: rank 0 locks it, and every rank must see the same folder and be able to write to it."""

import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

from megatron_step.engine.agreement import Ranks
from megatron_step.engine.output_lock import output_lock, read_token
from megatron_step.engine.signals import StopRequest

_LOCK = ".lock"
_SEEN_SECONDS = 10.0  # a network file system may take so long to show a new file to another machine
_PROBE_BYTES = 1 << 16


@contextmanager
def output_folder(folder: Path, ranks: Ranks, stop: StopRequest) -> Iterator[None]:
    """Keep other runs out of `folder` during the block. Every rank must enter it.

    Raises ValueError, on every rank, if another run uses the folder or a rank does not see rank 0's folder. Raises
    OSError if a rank cannot write to the folder or to its folder for temporary files.
    """
    lock = folder / _LOCK
    with ExitStack() as stack:
        token = ranks.from_main(lambda: stack.enter_context(output_lock(lock, folder, lambda: bool(stop))))
        host = ranks.from_main(socket.gethostname)
        with ranks.together():
            if ranks.rank > 0:
                _check_seen(lock, token, host)
            _check_writable(folder)
        yield


def _check_seen(lock: Path, token: str, host: str) -> None:
    """Raise ValueError unless this rank sees the lock file that rank 0 has made on `host`."""
    deadline = monotonic() + _SEEN_SECONDS
    while read_token(lock) != token:
        if monotonic() > deadline:
            raise ValueError(
                f"output_dir {lock.parent} is on this machine another folder than on {host}, where rank 0 runs: choose "
                "a folder on a file system that all machines share"
            )
        sleep(0.2)


def _check_writable(folder: Path) -> None:
    """Raise OSError, naming the folder, if a small file cannot be written there or among temporary files."""
    for place in (folder, Path(tempfile.gettempdir())):
        probe = place / f".probe_{uuid.uuid4().hex}"
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        except OSError as error:
            raise OSError(f"cannot write to {place}: {error.strerror}") from error
        finally:
            probe.unlink(missing_ok=True)
