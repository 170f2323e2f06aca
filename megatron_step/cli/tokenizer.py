"""Train a SentencePiece tokenizer on text files."""

import argparse
from collections.abc import Sequence

from megatron_step.cli.options import add_input, add_records
from megatron_step.config.paths import expand_path
from megatron_step.data.text_files import find_text_files
from megatron_step.data.train_tokenizer import train_tokenizer


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, or 2 for bad input."""
    parser = _parser(prog)
    arguments = parser.parse_args(argv)
    try:
        found = find_text_files(arguments.input)
        train_tokenizer(
            found.files,
            arguments.output,
            arguments.vocab_size,
            model_type=arguments.model_type,
            key=arguments.key,
            skip_invalid=arguments.skip_invalid,
            sample_bytes=arguments.sample_mib << 20,
            seed=arguments.seed,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{arguments.output}: {arguments.vocab_size} tokens")
    for line in found.report:
        print(line)
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="example: megatron-step tokenizer --input books/ --vocab-size 8192 --output data/my.model",
    )
    add_input(parser)
    parser.add_argument(
        "--output", type=expand_path, required=True, metavar="FILE", help="file of the new tokenizer, NAME.model"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="algorithm (default: bpe)")
    add_records(parser)
    parser.add_argument(
        "--sample-mib", type=int, default=256, help="train on an even sample of at most this many MiB (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample (default: 1)")
    return parser
