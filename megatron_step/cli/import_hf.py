"""Turn a Hugging Face model (Llama, Mistral, Qwen2, Qwen3) into a checkpoint, to train or to grow it."""

import argparse
import sys
from collections.abc import Sequence

from megatron_step.cli.options import add_tokenizer
from megatron_step.cli.progress_bar import progress_bar
from megatron_step.config.paths import path_argument


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, or 2 for bad input."""
    arguments = _parser(prog).parse_args(argv)

    # Not at the top: --help prints before torch and megatron-core are imported.
    from megatron_step.huggingface.from_hf import import_model

    try:
        with progress_bar("B") as show:
            imported = import_model(arguments.model, arguments.out, arguments.seq_length, arguments.tokenizer, show)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {arguments.out}: weights in {', '.join(imported.dtypes)}, kept in {imported.precision}")
    print(imported.end_of_document)
    print(f"config sections of a run that starts from it:\n\n{imported.config_sections(arguments.out)}")
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="example: megatron-step import-hf models/llama imported/llama --seq-length 4096",
    )
    parser.add_argument(
        "model", type=path_argument, metavar="MODEL", help="folder with config.json and .safetensors files"
    )
    parser.add_argument(
        "out", type=path_argument, metavar="OUT", help="folder of the checkpoint, which must not exist yet"
    )
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens of a training sample (default: the model's context length)"
    )
    add_tokenizer(parser, "the tokenizer in MODEL")
    return parser
