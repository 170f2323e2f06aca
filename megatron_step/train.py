"""Trains a model: torchrun --nproc-per-node N -m megatron_step.train --config FILE [--section.key VALUE ...]"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from megatron_step.config.load import load_config
from megatron_step.config.run import RunConfig
from megatron_step.training.messages import discard_unwritten
from megatron_step.training.signals import EXIT_STOPPED, StopRequest, stop_requests


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 trained to the end, 75 saved and stopped on a signal, 2 bad input, 1 another failure."""
    try:
        config = load_config(sys.argv[1:] if arguments is None else arguments)
        with stop_requests() as stop:  # before the imports, which take seconds: a signal must not end the process there
            return _train(config, stop)
    except ValueError as error:
        return _fail(error, 2)
    finally:
        discard_unwritten()


def _train(config: RunConfig, stop: StopRequest) -> int:
    # Not at the top: --help and a bad config are answered before torch and megatron-core are imported.
    from megatron_step.checkpoint.save import SaveError
    from megatron_step.training.hooks.gradients import NoGradientError
    from megatron_step.training.run import run
    from megatron_step.training.step import NonFiniteError

    try:
        return 0 if run(config, stop) else EXIT_STOPPED
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2)
    except (OSError, SaveError, NonFiniteError, NoGradientError) as error:
        return _fail(error, 1)


def _fail(error: Exception, status: int) -> int:
    """Say what is wrong, once on each machine: it may be wrong on one of them only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
