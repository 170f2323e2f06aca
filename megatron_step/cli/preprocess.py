"""Tokenize text files into a corpus (PREFIX.bin, PREFIX.idx) to train on."""

import argparse
import os
from collections.abc import Sequence

from tqdm import tqdm

from megatron_step.config.paths import expand_path
from megatron_step.data.preprocess import preprocess


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit status: 0, or 2 for bad input."""
    parser = _parser(prog)
    arguments = parser.parse_args(argv)
    separator = arguments.document_separator
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def show(bytes_read: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(bytes_read - bar.n)

        try:
            summary = preprocess(
                arguments.input,
                arguments.output,
                arguments.tokenizer,
                key=arguments.key,
                separator=separator and separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t"),
                skip_invalid=arguments.skip_invalid,
                workers=arguments.workers,
                end_of_document=arguments.end_of_document,
                progress=show,
            )
        except (ValueError, OSError, RuntimeError) as error:
            bar.close()
            parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{arguments.output}: {summary.documents:,} documents, {summary.tokens:,} tokens; {summary.end_of_document}")
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
    parser.add_argument(
        "--input",
        type=expand_path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files (.txt, .jsonl, .json, .parquet; .gz, .zst, .bz2, .xz), or folders",
    )
    parser.add_argument(
        "--tokenizer",
        type=expand_path,
        required=True,
        metavar="PATH",
        help="a SentencePiece .model file or a Hugging Face tokenizer folder",
    )
    parser.add_argument(
        "--output",
        type=expand_path,
        required=True,
        metavar="PREFIX",
        help="where to write: PREFIX.bin, PREFIX.idx and PREFIX.json",
    )
    parser.add_argument(
        "--key", default="text", help="key or column of the text in .jsonl and .parquet (default: text)"
    )
    parser.add_argument(
        "--document-separator",
        metavar="TEXT",
        help="split .txt files into documents at TEXT; \\n stands for a line feed, so '\\n\\n' splits at blank lines "
        "(default: a .txt file is one document)",
    )
    parser.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help="token that ends each document, as '<|endoftext|>' (default: the tokenizer's end-of-text token)",
    )
    parser.add_argument(
        "--skip-invalid", action="store_true", help="leave out and count invalid or empty text instead of stopping"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="tokenizing processes (default: one a core)"
    )
    return parser
