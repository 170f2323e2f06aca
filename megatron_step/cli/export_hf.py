"""Export a checkpoint of any stage and any layout as a Hugging Face model, which transformers loads; no GPU needed."""

import argparse
import sys
from collections.abc import Sequence

from megatron_step.cli.options import add_tokenizer
from megatron_step.cli.progress_bar import progress_bar
from megatron_step.config.paths import path_argument


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, 2 for bad input, or 1 if --check finds a difference."""
    arguments = _parser(prog).parse_args(argv)

    # Not at the top: --help prints before torch and megatron-core are imported.
    from megatron_step.huggingface.to_hf import DifferentModelError, ExportOptions, export_model
    from megatron_step.report.run_report import metrics_of_checkpoint

    options = ExportOptions(
        dtype=arguments.dtype,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        adapter_only=arguments.adapter_only,
        check=arguments.check,
        tokenizer=arguments.tokenizer,
    )
    path, changes = arguments.checkpoint, list[str]()
    try:
        metrics = metrics_of_checkpoint(path)
        with progress_bar("B") as show:
            comparison = export_model(path, arguments.out, options, metrics, show, changes.append)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DifferentModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}")
    for change in changes:
        print(f"changed since the import: {change}")
    if comparison is not None:
        print(f"checked: all tensors equal the trained ones; {comparison}")
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog="example: megatron-step export-hf runs/step models/step --check"
    )
    parser.add_argument(
        "checkpoint",
        type=path_argument,
        metavar="CHECKPOINT",
        help="a checkpoint, or a run's output folder (its newest checkpoint)",
    )
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the model's folder, which must not exist yet")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format of the weights (default: the checkpoint's)",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="size of the largest .safetensors file (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="write the model without adapters to OUT/base, and the adapters for peft to OUT/adapter",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare tensors, config and logits with the trained model; needs memory for the model in fp32",
    )
    add_tokenizer(parser, "the path that the run used")
    return parser
