"""Options that several commands share: text files and their records, and the tokenizer."""

import argparse

from megatron_step.config.paths import expand_path


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add --input: text files and folders, which the command needs."""
    parser.add_argument(
        "--input",
        type=expand_path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files (.txt, .jsonl, .json, .parquet; .gz, .zst, .bz2, .xz), or folders",
    )


def add_records(parser: argparse.ArgumentParser) -> None:
    """Add --key and --skip-invalid: which text of a record to read, and whether to skip unusable records."""
    parser.add_argument(
        "--key", default="text", help="key or column of the text in .jsonl, .json and .parquet (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-invalid", action="store_true", help="skip and count invalid or empty text instead of stopping"
    )


def add_documents(parser: argparse.ArgumentParser, default_end: str) -> None:
    """Add --document-separator and --end-of-document; `default_end` describes the default token."""
    parser.add_argument(
        "--document-separator",
        type=_unescaped,
        metavar="TEXT",
        help="split .txt files into documents at TEXT; \\n stands for a line feed, so '\\n\\n' splits at blank lines "
        "(default: a .txt file is one document)",
    )
    parser.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help=f"token that ends each document, such as '<|endoftext|>' (default: {default_end})",
    )


def add_tokenizer(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add --tokenizer; `default` describes the path that is taken without it, and None makes it required."""
    parser.add_argument(
        "--tokenizer",
        type=expand_path,
        required=default is None,
        metavar="PATH",
        help="SentencePiece .model file or Hugging Face tokenizer folder"
        + (f" (default: {default})" if default else ""),
    )


def _unescaped(text: str) -> str:
    """Return `text` with line feeds, carriage returns and tabs for \\n, \\r and \\t."""
    return text.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
