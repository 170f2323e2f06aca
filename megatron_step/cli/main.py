"""The command `megatron-step`, which `python -m megatron_step` also starts."""

import difflib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version

from megatron_step.cli.output import reader_may_go

COMMANDS = {
    "init": "write a commented config for a model size and a machine",
    "tokenizer": "train a tokenizer on text files",
    "preprocess": "turn text files into a corpus of tokens",
    "plan": "plan a run: layers of each stage, memory of each rank, time",
    "train": "train in one process (with torchrun, use the command below)",
    "evaluate": "measure perplexity, or generate text",
    "report": "compare runs: tables and a plot",
    "compare": "train several ways of training on the same tokens, and compare them",
    "import-hf": "turn a Hugging Face model into a checkpoint",
    "export-hf": "turn a checkpoint into a Hugging Face model",
}
"""Help texts by command; each command is a file of this folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status: 0, 2 for bad input, or another one of the command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"megatron-step {version('megatron-step')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(f"error: unknown command {name}; did you mean {nearest}? See megatron-step --help", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `python -m` finds plugins in the working folder; do the same here
    command = import_module(f"megatron_step.cli.{name.replace('-', '_')}")
    # Training has its own way: it says once that nobody reads.
    with nullcontext() if name == "train" else reader_may_go():
        try:
            return int(command.main(rest, f"megatron-step {name}"))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


def _help() -> str:
    lines = [f"  {name:12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-step COMMAND [OPTIONS]",
            "",
            "Pre-train language models in growing stages on Megatron-Core.",
            "",
            *lines,
            "",
            "megatron-step COMMAND --help explains a command. Several processes train with",
            "torchrun --nproc-per-node N -m megatron_step.train --config FILE",
        ]
    )
