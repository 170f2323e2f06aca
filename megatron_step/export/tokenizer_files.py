"""The tokenizer's files in the folder of a Hugging Face model."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_step.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron_step.export.fast_tokenizer import fast_tokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the files of a tokenizer of either kind into the new folder `folder`, from which it loads again."""
    folder.mkdir()
    if isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    else:
        _copy_files(Path(tokenizer.path), folder, (*_FILES, "config.json"))  # which can name the end-of-text token


def _copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_tokenizer(tokenizer: Tokenizer, seq_length: int, folder: Path) -> None:
    """Write the files with which transformers' AutoTokenizer gives the ids of `tokenizer`, into `folder`.

    Those of a Hugging Face tokenizer are copied; a SentencePiece model is converted, and lies beside the result.

    Raises ValueError if it cannot be converted.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        _copy_files(Path(tokenizer.path), folder, _FILES)
        return
    fast = fast_tokenizer(tokenizer)
    fast.save(str(folder / "tokenizer.json"))
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "bos_token": None if tokenizer.bos_id is None else fast.id_to_token(tokenizer.bos_id),
        "eos_token": fast.id_to_token(tokenizer.eod_id),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
