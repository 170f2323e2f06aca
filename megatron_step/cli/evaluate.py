"""Shows what a model has learnt: its perplexity and bits per byte on a text, or a text that it writes."""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_step.config.paths import expand_path, path_argument
from megatron_step.engine.launcher import speaks

if TYPE_CHECKING:
    from megatron_step.evaluation.models import LanguageModel


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit status: 0, or 2 for bad input."""
    arguments = _parser(prog).parse_args(argv)
    is_main = speaks()
    try:
        _check(arguments)

        # Not at the top: --help is answered before torch and megatron-core are imported.
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
    """Raise ValueError or FileNotFoundError for what can be seen to be wrong before a model is loaded."""
    from megatron_step.data.text_files import find_text_files

    if arguments.temperature < 0 or arguments.tokens < 1:
        raise ValueError("--temperature must not be negative and --tokens must be at least 1")
    if arguments.text is not None:
        found = find_text_files(arguments.text)
        arguments.text = found.files
        if speaks():
            print(*found.report, sep="\n", end="\n" if found.report else "", file=sys.stderr)
    if arguments.stride is not None and arguments.text is None and arguments.data is None:
        raise ValueError("--stride needs a text to slide over: give --text or --data")
    if arguments.document_separator == "":
        raise ValueError("the document separator is empty: leave it out to make each .txt file one document")


def _generated(model: "LanguageModel", arguments: argparse.Namespace) -> str:
    from megatron_step.evaluation.generation import generate

    return generate(model, arguments.generate, arguments.tokens, arguments.temperature, arguments.seed)


def _evaluated(model: "LanguageModel", arguments: argparse.Namespace) -> str:
    """The loss on the given text, or else on the validation set of the checkpoint's run, in words."""
    from megatron_step.evaluation.perplexity import text_loss
    from megatron_step.evaluation.text import text_of_corpus, text_of_files
    from megatron_step.training.inspection import checkpoint_loss

    if arguments.text is not None:
        separator = arguments.document_separator
        separator = separator and separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
        text = text_of_files(arguments.text, model.tokenizer, arguments.key, separator, arguments.skip_invalid)
    elif arguments.data is not None:
        text = text_of_corpus(arguments.data, model.tokenizer)
    else:
        loss = checkpoint_loss(model.inspected) if model.inspected else None
        if loss is None:
            raise ValueError(f"{model.path} has no validation set of a run to evaluate on: give --text or --data")
        return f"{model.path}: validation loss {loss:.6f}, perplexity {math.exp(min(loss, 700.0)):.3f}"
    with tqdm(unit="window", disable=None if model.parallel.is_main else True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = text_loss(model, text, arguments.stride, show)
    lines = [
        f"{model.path}: loss {result.loss:.6f}, perplexity {result.perplexity:.3f}, "
        f"{result.bits_per_byte:.4f} bits per byte",
        f"on {text.num_documents:,} documents, {result.num_tokens:,} tokens, {result.num_bytes:,} bytes, "
        f"in windows of {model.seq_length:,} tokens, {arguments.stride or model.seq_length:,} apart",
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
        help="a checkpoint, a run's output folder for its newest one, or a Hugging Face model's folder",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--text",
        type=expand_path,
        nargs="+",
        metavar="FILE",
        help="evaluate on text files, or folders of them",
    )
    what.add_argument(
        "--data", type=expand_path, metavar="PREFIX", help="evaluate on a corpus, PREFIX.bin and PREFIX.idx"
    )
    what.add_argument(
        "--generate",
        metavar="TEXT",
        help="let the model continue TEXT (default of all three: evaluate on the run's validation set)",
    )
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens of a window (default: as many as the model is made for)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from window to window (default: a window, so they are disjoint)"
    )
    parser.add_argument(
        "--tokenizer",
        type=expand_path,
        metavar="PATH",
        help="where the tokenizer lies (default: where the run had it, or with the model)",
    )
    parser.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help="token that ends each document (default: that of the checkpoint's run, or the tokenizer's own)",
    )
    parser.add_argument(
        "--key", default="text", help="key or column of the text in .jsonl and .parquet (default: %(default)s)"
    )
    parser.add_argument(
        "--document-separator",
        metavar="TEXT",
        help="split .txt files into documents at TEXT, as megatron-step preprocess does",
    )
    parser.add_argument("--skip-invalid", action="store_true", help="leave out and count invalid or empty text")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to add to TEXT (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 for the likeliest token each time (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the drawn tokens (default: %(default)s)")
    return parser
