"""Functions that run in their own process, as a user's run does: what one process keeps has no effect on another.

An allocator that holds on to freed memory, for one, would hand it to the next arm of the same process.
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
    """A function that calls one of `build`'s by its name, in a process that is held for the length of the block.

    What `build` makes stays in that process: only names go in, and results come out.

    Raises RuntimeError, from the call, if that process fails; its traceback is then on standard error.
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
            raise RuntimeError(f"the process of an arm ended with exit code {process.exitcode}") from None

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
