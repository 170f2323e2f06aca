"""Tokenize text files into a corpus (PREFIX.bin, PREFIX.idx) to train on."""

import argparse
import os
from collections.abc import Sequence

from megatron_step.cli.options import add_documents, add_input, add_records, add_tokenizer
from megatron_step.cli.progress_bar import progress_bar
from megatron_step.config.counts import counted
from megatron_step.config.paths import expand_path
from megatron_step.data.preprocess import preprocess


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, or 2 for bad input."""
    parser = _parser(prog)
    arguments = parser.parse_args(argv)
    try:
        with progress_bar("B") as show:
            summary = preprocess(
                arguments.input,
                arguments.output,
                arguments.tokenizer,
                key=arguments.key,
                separator=arguments.document_separator,
                skip_invalid=arguments.skip_invalid,
                workers=arguments.workers,
                end_of_document=arguments.end_of_document,
                progress=show,
            )
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(
        f"{arguments.output}: {counted(summary.documents, 'document')}, "
        f"{counted(summary.tokens, 'token')}; {summary.end_of_document}"
    )
    for reason, count in summary.skipped.items():
        print(f"skipped {count:,}: {reason}")
    for line in summary.left_out:
        print(line)
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="example: megatron-step preprocess --input books/ --tokenizer data/my.model --output data/train",
    )
    add_input(parser)
    add_tokenizer(parser)
    parser.add_argument(
        "--output",
        type=expand_path,
        required=True,
        metavar="PREFIX",
        help="path prefix of the files to write: PREFIX.bin, PREFIX.idx and PREFIX.json",
    )
    add_records(parser)
    add_documents(parser, "the tokenizer's end-of-text token")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="tokenizing processes (default: one per core)"
    )
    return parser
