"""Make a checkpoint of a Hugging Face model (Llama, Mistral, Qwen2, Qwen3), to train on or to grow from."""

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from megatron_step.config.paths import expand_path, path_argument


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit status: 0, or 2 for bad input."""
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
        "--seq-length", type=int, metavar="N", help="tokens of a training sample (default: the model's context)"
    )
    parser.add_argument(
        "--tokenizer", type=expand_path, metavar="PATH", help="where its tokenizer lies (default: in MODEL)"
    )
    arguments = parser.parse_args(argv)

    # Not at the top: --help is answered before torch and megatron-core are imported.
    from megatron_step.huggingface.from_hf import import_model

    try:
        with tqdm(unit="B", unit_scale=True, disable=None) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            imported = import_model(arguments.model, arguments.out, arguments.seq_length, arguments.tokenizer, show)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {arguments.out}, weights in {', '.join(imported.dtypes)} kept in {imported.precision}")
    print(imported.end_of_document)
    print(f"a run that starts from it has in its config:\n\n{imported.config_sections(arguments.out)}")
    return 0
