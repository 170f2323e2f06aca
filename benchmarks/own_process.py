"""Run an arm's functions in a separate process, as a user's run, so that arms do not affect each other.

In one process, for example, the allocator would give memory that one arm freed to the next arm.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import Any

Functions = Mapping[str, Callable[[], Any]]
Build = Callable[[], AbstractContextManager[Functions]]


@contextmanager
def own_process(build: Build) -> Iterator[Callable[[str], Any]]:
    """Start a process that runs `build`, and give the block a function that calls one of its functions by name.

    The objects that `build` makes stay in that process; only names and results are exchanged. The process ends with
    the block.

    The given function raises RuntimeError if the process fails; the process prints its traceback on standard error.
    """
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(build, theirs), daemon=True)
    process.start()
    theirs.close()

    def call(name: str) -> Any:
        try:
            connection.send(name)
            return connection.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise RuntimeError(f"the process of an arm ended with exit code {process.exitcode}: see above") from None

    try:
        yield call
    finally:
        connection.close()
        process.join()


def _serve(build: Build, connection: Connection) -> None:
    with build() as functions:
        while True:
            try:
                name = connection.recv()
            except EOFError:
                return
            connection.send(functions[name]())
