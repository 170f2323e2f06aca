"""Write a tokenizer's files into a Hugging Face model's folder, and check that AutoTokenizer gives the same ids."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_step.config.counts import counted
from megatron_step.config.yaml_json import read_json
from megatron_step.data.hf_tokenizer import (
    HuggingFaceTokenizer,
    deterministic_json,
    ids_in_transformers,
    load_in_transformers,
)
from megatron_step.data.probes import Encode, first_difference, marked_texts, plain_texts
from megatron_step.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron_step.huggingface.fast_tokenizer import fast_tokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
_TEMPLATES = "additional_chat_templates"
_FOLLOWED_BY_A_CLASS = ("auto_map", "added_tokens_decoder", "add_prefix_space", "legacy", "use_fast")
"""Settings that a class of transformers has already applied to tokenizer.json."""
_CHAT = [{"role": "user", "content": "Hello,  you!"}, {"role": "assistant", "content": "Yes?\n"}]

_CLASS_MODULE = '''"""The tokenizer class of this folder, with trust_remote_code: it reads tokenizer.json unchanged."""

from transformers import PreTrainedTokenizerFast


class TokenizerOfFile(PreTrainedTokenizerFast):
    pass
'''
_CLASS_FILE = "tokenizer_of_file.py"


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the files of a tokenizer of either kind into the new folder `folder`, so that the copy can be loaded."""
    folder.mkdir()
    if isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    else:
        _copy_files(Path(tokenizer.path), folder, (*_FILES, "config.json"))  # AutoTokenizer reads config.json, too


def _copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if name == "tokenizer.json" and (source / name).is_file():
            (folder / name).write_bytes(deterministic_json(source / name))
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)


def write_tokenizer(tokenizer: Tokenizer, seq_length: int, folder: Path) -> None:
    """Write tokenizer files beside a model's config.json, so that AutoTokenizer gives the ids of `tokenizer`.

    The files of a Hugging Face tokenizer are copied. A SentencePiece model is converted, and also copied. The model
    type in config.json may make AutoTokenizer choose a class that gives other ids. Then the files are written such that
    AutoTokenizer uses tokenizer.json unchanged.

    Raises ValueError if AutoTokenizer still gives other ids, or if the tokenizer cannot be converted.
    """
    written = _WrittenTokenizer(tokenizer, seq_length, folder)
    attempts = [written.write_file, written.write_file_and_class]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        attempts.insert(0, written.copy)
    for attempt in attempts:
        attempt()
        difference = written.difference()
        if difference is None:
            return
    raise ValueError(
        f"AutoTokenizer does not give the ids of the tokenizer {tokenizer.path} beside a model of this type: "
        f"{difference}. PreTrainedTokenizerFast does: give a folder that AutoTokenizer loads correctly (--tokenizer)"
    )


def check_exportable(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Raise ValueError, as `write_tokenizer` does, if the tokenizer cannot be written beside this config.json."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_tokenizer(tokenizer, 1, Path(folder))


class _WrittenTokenizer:
    """A tokenizer and a model's folder, with several ways to write its files there."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, folder: Path) -> None:
        self._tokenizer, self._folder = tokenizer, folder
        self._encode: Encode = tokenizer.encode_batch
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._backend = tokenizer.backend
            self._texts = [*plain_texts(tokenizer), *marked_texts(list(tokenizer.marks))]
            self._template = tokenizer.chat_template
            self._settings: dict[str, Any] = {**_read_settings(Path(tokenizer.path)), **tokenizer.special_tokens}
        else:
            assert isinstance(tokenizer, SentencePieceTokenizer)
            self._backend = fast_tokenizer(tokenizer)
            self._encode = lambda texts: [self._backend.encode(text, add_special_tokens=False).ids for text in texts]
            self._texts, self._template = list(plain_texts(tokenizer)), None
            self._settings = {
                "model_max_length": seq_length,
                "bos_token": None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id),
                "eos_token": tokenizer.token(tokenizer.eod_id),
                "add_bos_token": False,
                "add_eos_token": False,
                "clean_up_tokenization_spaces": False,
            }

    def copy(self) -> None:
        """Copy the files of a Hugging Face tokenizer."""
        _copy_files(Path(self._tokenizer.path), self._folder, _FILES)

    def write_file(self) -> None:
        """Write tokenizer.json with the tokenizer's ids, and settings for PreTrainedTokenizerFast."""
        self._backend.save(str(self._folder / "tokenizer.json"))
        if isinstance(self._tokenizer, SentencePieceTokenizer):
            shutil.copyfile(self._tokenizer.path, self._folder / "tokenizer.model")
        self._write_settings({})

    def write_file_and_class(self) -> None:
        """Write a tokenizer class as well: with `auto_map`, AutoTokenizer obeys `tokenizer_class`."""
        (self._folder / _CLASS_FILE).write_text(_CLASS_MODULE, encoding="utf-8")
        name = f"{Path(_CLASS_FILE).stem}.TokenizerOfFile"
        self._write_settings({"auto_map": {"AutoTokenizer": [None, name]}})

    def _write_settings(self, more: dict[str, Any]) -> None:
        kept = {name: value for name, value in self._settings.items() if name not in _FOLLOWED_BY_A_CLASS}
        settings = {**kept, "tokenizer_class": "PreTrainedTokenizerFast", **more}
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (self._folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def difference(self) -> str | None:
        """Describe how AutoTokenizer's tokenizer differs from the original; None if it does not."""
        theirs = load_in_transformers(self._folder)
        named = f"its {type(theirs).__name__}"
        text = first_difference(self._encode, ids_in_transformers(theirs), self._texts)
        if text is not None:
            return f"{named} gives other ids for {text!r}"
        if len(theirs) > self._tokenizer.vocab_size:
            return f"{named} has {counted(len(theirs), 'token')}, not {self._tokenizer.vocab_size:,}"
        if theirs.chat_template != self._template:
            return f"{named} has another chat template"
        return self._chat_difference(theirs, named)

    def _chat_difference(self, theirs: Any, named: str) -> str | None:
        """Describe a chat for which AutoTokenizer gives other ids than the original; None if there is none."""
        if not isinstance(self._template, str):
            return None
        try:
            text = theirs.apply_chat_template(_CHAT, tokenize=False)
        except Exception:  # the tokenizer's template rejects this chat, with an error of any class
            return None
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        return None if ids == self._encode([text])[0] else f"{named} gives other ids for the chat {text!r}"


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}
