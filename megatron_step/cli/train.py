"""Train a model as a config says, with one process."""

import os
import sys
from collections.abc import Sequence

from megatron_step import train
from megatron_step.config.load import load_config


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit status: as `megatron_step.train`, or 2 where the config needs several processes and this is one."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "RANK" not in os.environ:
        try:
            processes = load_config(arguments).parallel.model_parallel_size
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if processes > 1:
            command = f"torchrun --nproc-per-node {processes} -m megatron_step.train {' '.join(arguments)}"
            print(f"error: the config needs {processes} processes, and this is one: {command}", file=sys.stderr)
            return 2
    return train.main(arguments)
