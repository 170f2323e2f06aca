"""Write a commented config that fits a model size to a machine."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_step.cli.machines import cluster_text, machines
from megatron_step.cli.sizes import SIZES
from megatron_step.cli.starting_config import starting_config, starting_text
from megatron_step.config.cluster import Cluster
from megatron_step.config.paths import path_argument
from megatron_step.engine.files import atomic_write
from megatron_step.report.text_table import format_bytes


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog="example: megatron-step init mine --size 125m --machine 8x80gb"
    )
    parser.add_argument("folder", type=path_argument, metavar="DIR", help="folder for config.yaml")
    parser.add_argument("--size", choices=SIZES, default="2m", help="parameters of the model (default: %(default)s)")
    parser.add_argument(
        "--machine",
        default="cpu",
        metavar="MACHINE",
        help="cpu, GPUS x MEMORY as in 8x80gb, or NODES x GPUS x MEMORY as in 4x8x80gb (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the run (default: 20 tokens per parameter)")
    arguments = parser.parse_args(argv)
    try:
        print(_init(arguments.folder, arguments.size, arguments.machine, arguments.steps))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _init(folder: Path, size_name: str, machine: str, steps: int | None) -> str:
    """Write the files, and return a text with the next commands.

    Raises ValueError for bad options, and if a file exists.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"--steps must be at least 1, not {steps}")
    cluster = machines(machine)
    on_cpu = machine == "cpu"
    config, planned = starting_config(SIZES[size_name], cluster, on_cpu, steps)
    files = {"config.yaml": starting_text(config, size_name, machine, planned)}
    if not on_cpu:
        files = {"cluster.yaml": cluster_text(cluster), **files}
    existing = [folder / name for name in files if (folder / name).exists()]
    if existing:
        raise ValueError(f"{existing[0]} already exists: choose another folder, or remove the file")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        atomic_write(folder / name, text)
    return "\n".join(
        [
            f"wrote {', '.join(str(folder / name) for name in files)}",
            f"planned peak memory {format_bytes(planned.peak_bytes)} a rank, "
            f"{format_bytes(planned.vanilla.peak_bytes)} in ordinary training",
            "",
            "Next, with your text (.txt, .jsonl or .parquet files, or folders of them) in place of TEXT:",
            f"  cd {folder}",
            f"  megatron-step tokenizer --input TEXT --vocab-size {config.model.vocab_size} "
            f"--output {config.data.tokenizer}",
            f"  megatron-step preprocess --input TEXT --document-separator '\\n\\n' "
            f"--tokenizer {config.data.tokenizer} --output {config.data.train[0][1]}",
            f"  {_start(cluster, on_cpu)} --config config.yaml",
            "The separator splits .txt files into documents at blank lines; without it a .txt file is one document.",
        ]
    )


def _start(cluster: Cluster, on_cpu: bool) -> str:
    """Return the command that starts training, without its options."""
    if on_cpu:
        return "megatron-step train"
    nodes, gpus = cluster.nodes[0].count, cluster.nodes[0].gpus_per_node
    several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {gpus} -m megatron_step.train"
