"""Measure a model's perplexity and bits per byte on a text, or generate a text with it."""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_step.cli.options import add_documents, add_records, add_tokenizer
from megatron_step.cli.progress_bar import progress_bar
from megatron_step.config.counts import counted
from megatron_step.config.paths import expand_path, path_argument
from megatron_step.engine.launcher import speaks

if TYPE_CHECKING:
    from megatron_step.evaluation.models import LanguageModel


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, or 2 for bad input."""
    arguments = _parser(prog).parse_args(argv)
    is_main = speaks()
    try:
        _check(arguments)

        # Not at the top: --help prints before torch and megatron-core are imported.
        from megatron_step.evaluation.models import open_model

        with open_model(arguments.path, arguments.tokenizer, arguments.seq_length, arguments.end_of_document) as model:
            shown = _generated(model, arguments) if arguments.generate is not None else _evaluated(model, arguments)
            if is_main:
                print(shown)
    except (ValueError, OSError) as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Find the text files, and raise ValueError or FileNotFoundError for bad options before a model is loaded."""
    from megatron_step.data.text_files import find_text_files

    if arguments.temperature < 0:
        raise ValueError(f"--temperature must be at least 0, not {arguments.temperature}")
    if arguments.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, not {arguments.tokens}")
    if arguments.text is not None:
        found = find_text_files(arguments.text)
        arguments.text = found.files
        if speaks():
            print(*found.report, sep="\n", end="\n" if found.report else "", file=sys.stderr)
    if arguments.stride is not None and arguments.text is None and arguments.data is None:
        raise ValueError(f"--stride {arguments.stride} needs a text: give --text or --data")
    if arguments.document_separator == "":
        raise ValueError("--document-separator is empty: omit it to make each .txt file one document")


def _generated(model: "LanguageModel", arguments: argparse.Namespace) -> str:
    from megatron_step.evaluation.generation import generate

    return generate(model, arguments.generate, arguments.tokens, arguments.temperature, arguments.seed)


def _evaluated(model: "LanguageModel", arguments: argparse.Namespace) -> str:
    """Return a report of the loss on the given text, or on the validation set of the checkpoint's run.

    Raises ValueError without a text and a validation set.
    """
    from megatron_step.evaluation.perplexity import text_loss
    from megatron_step.evaluation.text import text_of_corpus, text_of_files
    from megatron_step.training.inspection import checkpoint_loss

    if arguments.text is not None:
        text = text_of_files(
            arguments.text, model.tokenizer, arguments.key, arguments.document_separator, arguments.skip_invalid
        )
    elif arguments.data is not None:
        text = text_of_corpus(arguments.data, model.tokenizer)
    else:
        loss = checkpoint_loss(model.inspected) if model.inspected else None
        if loss is None:
            raise ValueError(f"{model.path} has no validation set: give --text or --data")
        return f"{model.path}: validation loss {loss:.6f}, perplexity {math.exp(min(loss, 700.0)):.3f}"
    with progress_bar("window", is_hidden=not model.parallel.is_main) as show:
        result = text_loss(model, text, arguments.stride, show)
    lines = [
        f"{model.path}: loss {result.loss:.6f}, perplexity {result.perplexity:.3f}, "
        f"{result.bits_per_byte:.4f} bits per byte",
        f"on {counted(text.num_documents, 'document')}, {counted(result.num_tokens, 'token')}, "
        f"{counted(result.num_bytes, 'byte')}, "
        f"in windows of {counted(model.seq_length, 'token')}, {arguments.stride or model.seq_length:,} apart",
        *(f"skipped {count:,}: {reason}" for reason, count in text.skipped.items()),
    ]
    return "\n".join(lines)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog="example: megatron-step evaluate runs/step --text novel.txt --stride 64"
    )
    parser.add_argument(
        "path",
        type=path_argument,
        help="a checkpoint, a run's output folder (its newest checkpoint), or a Hugging Face model's folder",
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        "--text",
        type=expand_path,
        nargs="+",
        metavar="FILE",
        help="evaluate on text files, or folders",
    )
    task.add_argument(
        "--data", type=expand_path, metavar="PREFIX", help="evaluate on a corpus, PREFIX.bin and PREFIX.idx"
    )
    task.add_argument(
        "--generate",
        metavar="TEXT",
        help="let the model continue TEXT (without these three options: evaluate on the run's validation set)",
    )
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens of a window (default: the model's context length)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the starts of windows (default: a window's length, for disjoint windows)",
    )
    add_tokenizer(parser, "the path that the run used, or the model's folder")
    add_records(parser)
    add_documents(parser, "the run's token, or the tokenizer's end-of-text token")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to add to TEXT (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 takes the most probable token each time (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampled tokens (default: %(default)s)")
    return parser
