"""Train a model in one process."""

import os
import sys
from collections.abc import Sequence

from megatron_step import train
from megatron_step.config.load import load_config


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return the exit status of `megatron_step.train`; 2 if the config needs several processes."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "RANK" not in os.environ:
        try:
            processes = load_config(arguments).parallel.model_parallel_size
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if processes > 1:
            command = f"torchrun --nproc-per-node {processes} -m megatron_step.train {' '.join(arguments)}"
            print(f"error: the config needs {processes} processes, but this is one: start {command}", file=sys.stderr)
            return 2
    return train.main(arguments)
