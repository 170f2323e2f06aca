"""Train a model: torchrun --nproc-per-node N -m megatron_step.train --config FILE [--section.key VALUE ...]"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from megatron_step.config.load import load_config
from megatron_step.engine.messages import discard_unwritten
from megatron_step.engine.signals import EXIT_STOPPED, Stopped, StopRequest, stop_requests


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit status: 0 at the end, 75 if a signal stopped the run, 2 for bad input, 1 otherwise."""
    with stop_requests() as stop:  # before the slow imports, so that signals are handled during them
        try:
            return _train(sys.argv[1:] if arguments is None else arguments, stop)
        except Stopped as stopped:
            _say(f"{stopped}: nothing was changed")
            return EXIT_STOPPED
        finally:
            discard_unwritten()


def _train(arguments: Sequence[str], stop: StopRequest) -> int:
    config, problem = None, None
    try:
        config = load_config(arguments)
    except ValueError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            _say(f"error: {error}")
            return 2
        problem = error  # the other ranks must learn of it
    # Not at the top: --help and the error of a bad config come before torch and megatron-core are imported.
    from megatron_step.engine.agreement import exit_status, is_expected
    from megatron_step.engine.world import open_world
    from megatron_step.training.run import run

    try:
        if config is None:
            with open_world(problem):
                raise AssertionError("the world opened despite the error")
        return 0 if run(config, stop) else EXIT_STOPPED
    except Exception as error:
        if not is_expected(type(error)):
            raise
        if not getattr(error, "is_told", False):
            _say(f"error: {error}")
        return exit_status(type(error))


def _say(line: str) -> None:
    with suppress(OSError):  # the log's disk is full
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
