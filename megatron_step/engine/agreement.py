"""Agreement between ranks: an error on one rank reaches all ranks within seconds, and all ranks raise it.

Each rank does its work in a block of `together`. At the end of the block the ranks exchange their errors through the
store of the world, which needs no process group, and all raise the first one. A rank that fails elsewhere reports its
failure to the store. The other ranks look for reports, also while they wait in a collective (`watch`). Waits poll the
store from Python, so that signals are handled.

    key of the store        holds
    calls/RANK              the number of exchanges that the rank has begun
    said/CALL/RANK          the rank's value in an exchange
    answer/CALL             the values of all ranks in an exchange
    alive/RANK              a number that changes while the rank lives
    failure                 the first reported failure
    heard/RANK              set once the rank knows the failure and no longer needs the store
    told/...                the number of ranks that were about to print the failure
"""

import os
import pickle
import signal
import socket
import sys
import threading
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from time import monotonic, sleep
from typing import Any, TypeVar

import torch
from torch.distributed import PrefixStore, Store

from megatron_step.engine.compat.groups import default_store
from megatron_step.engine.signals import EXIT_STOPPED, STOP_SIGNALS, Stopped

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 60.0  # silence after which a rank counts as dead
_ARRIVAL_SECONDS = 1800.0  # time for all ranks to start
_WAITING_SECONDS = 15.0  # wait after which rank 0 prints the rank that it waits for
_HEARD_SECONDS = 5.0  # time that a failing rank 0 keeps the store open for the others
_GRACE_SECONDS = 10.0  # time that a rank has to end by itself after another one failed

Value = TypeVar("Value")


class OtherRankError(RuntimeError):
    """Error that ranks raise when another rank is gone, or failed for a reason other than bad input."""


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank."""

    rank: int
    """The rank in the world."""
    host: str
    """Name of the rank's machine."""
    kind: type[BaseException]
    """The class of the exception."""
    text: str
    """The text of the exception."""
    is_shared: bool
    """Whether all ranks raise the same text, so that the text needs no rank in front."""

    @property
    def status(self) -> int:
        """Exit status of the process."""
        return exit_status(self.kind)

    def raised_elsewhere(self) -> BaseException:
        """Return the exception that the other ranks raise."""
        return _shared(self.kind if is_expected(self.kind) else OtherRankError, str(self))

    def __str__(self) -> str:
        return self.text if self.is_shared else f"rank {self.rank} on {self.host}: {self.text}"


@dataclass(frozen=True)
class Ranks:
    """The ranks of a world, seen from one of them."""

    store: Store
    """The store through which the ranks exchange values."""
    rank: int
    """This rank."""
    size: int
    """Number of ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks; every rank must call it.

        Raises the failure that another rank reported meanwhile, and OtherRankError if a rank is gone.
        """
        if self.size == 1:
            return [value]
        call = self.store.add(f"calls/{self.rank}", 1)
        said = [f"said/{call}/{rank}" for rank in range(self.size)]
        self.store.set(said[self.rank], _packed(value))
        if self.rank == 0:
            for rank, key in enumerate(said):
                self._wait(key, rank)
            self.store.set(f"answer/{call}", _packed(self.store.multi_get(said)))
            for key in [*said, f"answer/{call - 1}"]:  # every rank has read the last answer, since it has called again
                self.store.delete_key(key)
        self._wait(f"answer/{call}", 0)
        return [_unpacked(one) for one in _unpacked(self.store.get(f"answer/{call}"))]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that may fail on some ranks only; if it does, all ranks raise the error of the lowest such rank.

        Every rank must enter the block, and the block must not hold a collective. The error names rank and host, unless
        all ranks raise the same text.
        """
        own = None
        try:
            yield
        except Exception as error:
            own = error
        failures = self.gather(None if own is None else self._failure(own))
        first = next((failure for failure in failures if failure is not None), None)
        if first is None:
            return
        if own is not None and all(failure is not None and failure.text == first.text for failure in failures):
            own.is_shared = True  # type: ignore[attr-defined]
            raise own
        if first.rank == self.rank and own is not None and not is_expected(type(own)):
            raise own  # with the traceback of a fault in the program
        raise first.raised_elsewhere() from own

    def from_main(self, make: Callable[[], Value]) -> Value:
        """Call `make` on rank 0 and return its result on every rank; if it raises, all ranks raise the same text."""
        value, failure = None, None
        if self.rank == 0:
            try:
                value = make()
            except Exception as error:
                error.is_shared = is_expected(type(error))  # type: ignore[attr-defined]
                if self.size == 1:
                    raise
                failure = self._failure(error)
        value, failure = self.gather((value, failure))[0]
        if failure is not None:
            raise failure.raised_elsewhere()
        return value

    def agree(self, facts: dict[str, dict[str, Any]], advice: dict[str, str]) -> None:
        """Raise ValueError on every rank unless all ranks have the same `facts` (values by section and name).

        The error names the first value that differs, a rank that differs from most others, and the section's `advice`.
        """
        flat = {(section, name): str(value) for section, values in facts.items() for name, value in values.items()}
        if len(set(self.gather(sha256(repr(sorted(flat.items())).encode()).hexdigest()))) == 1:
            return
        everyone = self.gather((socket.gethostname(), flat))
        for section, name in dict.fromkeys(key for _, own in everyone for key in own):
            found = [own.get((section, name), "nothing") for _, own in everyone]
            usual = Counter(found).most_common(1)[0][0]  # the lowest rank's value among equally common ones
            if len(set(found)) > 1:
                other, peer = next(rank for rank, value in enumerate(found) if value != usual), found.index(usual)
                raise _shared(
                    ValueError,
                    f"{name} differs between ranks: {found[other]} for rank {other} on {everyone[other][0]}, "
                    f"{usual} for rank {peer} on {everyone[peer][0]}. {advice[section]}",
                )

    def failure(self) -> Failure | None:
        """Return the first failure that a rank reported, or None."""
        if self.size == 1 or not self.store.check(["failure"]):
            return None
        found: Failure = _unpacked(self.store.get("failure"))
        return found

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Report and print the error that ends the block; end this process if another rank fails and this one waits.

        In a world of one rank this does nothing: the caller sees the error.
        """
        if self.size == 1:
            yield
            return
        done = threading.Event()
        beat = threading.Thread(target=self._beat, args=(done,), daemon=True)
        beat.start()
        try:
            yield
        except BaseException as error:
            done.set()
            beat.join(_HEARD_SECONDS)
            self._report(error)
            raise
        finally:
            done.set()

    def _beat(self, done: threading.Event) -> None:
        """Report that this rank lives, and look for another rank's failure, over a separate connection."""
        with suppress(RuntimeError):  # the store is gone: the main thread gets the same error
            ranks = Ranks(getattr(self.store, "clone", lambda: self.store)(), self.rank, self.size)
            while not done.is_set():
                ranks.store.add(f"alive/{self.rank}", 1)
                failure = ranks.failure()
                if failure is not None and failure.rank != self.rank:
                    if not done.wait(_GRACE_SECONDS):
                        ranks.tell(failure)
                        os._exit(failure.status)
                    return
                done.wait(_BEAT_SECONDS)

    def _report(self, error: BaseException) -> None:
        """Report this rank's failure unless another rank reported one first, and print the first failure.

        The store may end with rank 0, so rank 0 waits until all ranks have read the failure, for a few seconds at most.
        """
        failure = self._failure(error)
        with suppress(RuntimeError):  # the store is gone
            self.store.compare_set("failure", "", _packed(failure))
            failure = self.failure() or failure
        self.tell(failure)
        error.is_told = True  # type: ignore[attr-defined]
        deadline = monotonic() + _HEARD_SECONDS
        with suppress(RuntimeError):
            self.store.set(f"heard/{self.rank}", "")
            while self.rank == 0 and not self._all_heard() and monotonic() < deadline:
                sleep(0.02)

    def _all_heard(self) -> bool:
        return self.store.check([f"heard/{rank}" for rank in range(self.size)])

    def tell(self, failure: Failure) -> None:
        """Print a failure once on each machine, and once into each log file of a machine's first rank.

        The first rank that gets here prints, because torchrun ends the other ranks soon after one of them ends.
        """
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            if self._is_first_to_tell():
                with suppress(OSError):  # the log's disk is full
                    print(f"{'' if failure.kind is Stopped else 'error: '}{failure}", file=sys.stderr, flush=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)

    def _is_first_to_tell(self) -> bool:
        stream, place = os.fstat(2), f"told/{socket.gethostname()}"
        try:
            first_here = self.store.add(place, 1) == 1
            first_there = self.store.add(f"{place}/{stream.st_dev}:{stream.st_ino}", 1) == 1
        except RuntimeError:  # the store is gone: printing twice is better than not at all
            return True
        return first_here or (first_there and os.environ.get("LOCAL_RANK", "0") == "0")

    def _wait(self, key: str, other: int) -> None:
        """Wait until the store holds `key`, which rank `other` sets, as long as that rank lives."""
        start = heard = monotonic()
        pause, beat, said = 0.001, -1, False
        while not self._has(key):
            sleep(pause)
            pause = min(pause * 1.5, 0.25)
            failure = self.failure()
            if failure is not None and failure.rank != self.rank:
                raise failure.raised_elsewhere()
            now, alive = monotonic(), self.store.add(f"alive/{other}", 0)
            if alive != beat:
                beat, heard = alive, now
            if now - heard > (_SILENT_SECONDS if beat else _ARRIVAL_SECONDS):
                raise OtherRankError(
                    f"rank {other} did not answer for {now - heard:.0f} s: it did not start, was killed, or its "
                    "machine failed. Look for its error in the log of its machine"
                )
            if now - start > _WAITING_SECONDS and not said and self.rank == 0:
                said = True
                print(f"waiting for rank {other}", file=sys.stderr, flush=True)

    def _has(self, key: str) -> bool:
        """Return whether the store holds a key.

        Raises OtherRankError if the store is gone with the rank that held it.
        """
        try:
            return bool(self.store.check([key]))
        except torch.distributed.DistNetworkError as error:
            raise OtherRankError("rank 0 ended, or the connection to it broke: look at the log of rank 0") from error

    def _failure(self, error: BaseException) -> Failure:
        text = str(error) if is_expected(type(error)) else f"{type(error).__name__}: {error}"
        return Failure(self.rank, socket.gethostname(), type(error), text, getattr(error, "is_shared", False))


def current_ranks() -> Ranks:
    """Return the ranks of torch's default process group; without one, this process alone."""
    if not torch.distributed.is_initialized():
        return Ranks(torch.distributed.HashStore(), 0, 1)
    return Ranks(agreement_store(default_store()), torch.distributed.get_rank(), torch.distributed.get_world_size())


def agreement_store(store: Store) -> Store:
    """Return the section of a world's store through which its ranks exchange values."""
    return PrefixStore("agreement", store)


def exit_status(kind: type[BaseException]) -> int:
    """Exit status of a process that ends with an exception of this class: 2 for bad input, 75 if stopped, else 1."""
    if issubclass(kind, (ValueError, FileNotFoundError)):
        return 2
    return EXIT_STOPPED if issubclass(kind, Stopped) else 1


def is_expected(kind: type[BaseException]) -> bool:
    """Return whether an exception's text says enough; a fault in the program also needs its traceback."""
    return issubclass(kind, (ValueError, OSError)) or kind.__module__.startswith("megatron_step.")


def _packed(value: Any) -> str:
    return b64encode(pickle.dumps(value)).decode()


def _unpacked(content: bytes) -> Any:
    return pickle.loads(b64decode(content))


def _shared(kind: type[BaseException], text: str) -> BaseException:
    """Return an exception with a text that all ranks raise."""
    try:
        error = kind(text)
    except TypeError:  # a class with more arguments, such as UnicodeDecodeError
        error = ValueError(text) if issubclass(kind, ValueError) else OSError(text)
    error.is_shared = True  # type: ignore[attr-defined]
    return error
