"""Settings and fixtures for the tests of all packages."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings
from small_corpus import small_corpus
from worlds import Worlds

# megatron_step comes before any test file that imports megatron-core.
from megatron_step.config.data import DataConfig
from megatron_step.config.parallel import ParallelConfig
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world

# The same examples in every run: a failure belongs to a change. `pytest --hypothesis-profile default` looks further.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("long", max_examples=2000)  # twenty times as many, and other ones in every run
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def control_c_is_heard() -> None:
    """A shell's background job ignores SIGINT, and so do the processes that it starts: tests send it to both."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """`worlds(n)` is a world of n gloo processes; see worlds.py."""
    made = Worlds()
    yield made
    made.close()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A small corpus with its tokenizer; see small_corpus.py."""
    return small_corpus(tmp_path_factory.mktemp("small_data"))


@pytest.fixture
def alone() -> Iterator[Parallel]:
    """The world of the process that runs the tests, on its own."""
    with parallel_layout(ParallelConfig(), seed=1) as parallel:
        yield parallel
    stop_world()


@pytest.fixture(autouse=True)
def no_world_is_left() -> Iterator[None]:
    """A test that a run's error ends leaves the process in a world, which the next test would find."""
    yield
    stop_world()
