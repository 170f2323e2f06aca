"""A tokenizer from a Hugging Face folder, with the ids of transformers' AutoTokenizer.

AutoTokenizer reads all files of a folder: tokenizer.json or older vocabulary files, the added tokens, and config.json,
whose model type can select a class with additional rules. AutoTokenizer therefore loads every folder here. If it gives
other ids than tokenizer.json alone, these ids enter the fingerprint.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_step.config.yaml_json import parse_json, read_json
from megatron_step.data.end_of_document import end_of_document_id
from megatron_step.data.probes import first_difference, marked_texts, plain_texts

_OLD_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json")
"""Files that define a tokenizer in a folder without tokenizer.json."""
_BESIDE_A_MODEL = (
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files beside tokenizer.model that AutoTokenizer reads."""
_SETTINGS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json")
"""JSON files beside tokenizer.json that AutoTokenizer follows."""
_RANDOM = ("dropout", "alpha", "nbest_size")
"""Settings of a BPE or unigram model that make its ids random."""


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder holds tokenizer files of Hugging Face, not a SentencePiece model alone."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *_BESIDE_A_MODEL))


class HuggingFaceTokenizer:
    """A tokenizer from tokenizer.json, or from older files that transformers can convert.

    Raises ValueError if the folder holds no usable tokenizer.
    """

    def __init__(self, folder: str | Path, end_of_document: str | None = None) -> None:
        folder = Path(folder)
        self.path = str(folder)
        for name in _SETTINGS:
            if (folder / name).is_file():
                read_json(
                    folder / name
                )  # raises an error for a key given twice; transformers would take the last value
        described = _described_backend(folder)
        theirs = load_in_transformers(folder)
        self.backend = make_deterministic(_backend(folder, theirs))
        vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"the tokenizer in {folder} has an empty vocabulary: choose another tokenizer")
        self.vocab_size = max(vocabulary.values()) + 1
        self.marks = {token.content: index for index, token in self.backend.get_added_tokens_decoder().items()}
        self.special_tokens = {name: str(token) for name, token in theirs.special_tokens_map.items() if _is_one(token)}
        self.chat_template: Any = theirs.chat_template
        default = _named_id(folder, "eos", theirs.eos_token_id, vocabulary)
        self.bos_id = _named_id(folder, "bos", theirs.bos_token_id, vocabulary)
        self.eod_id = end_of_document_id(self.path, vocabulary.get, end_of_document, default)
        self._split_special = bool(getattr(self.backend, "encode_special_tokens", False))
        try:
            texts = [*plain_texts(self), *marked_texts(list(self.marks))]
            self._check(theirs, texts)
            changed = described is None or _ids(described, texts) != self.encode_batch(texts)
        except ValueError:
            raise
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(
                f"the tokenizer in {self.path} cannot tokenize text ({error}): choose another tokenizer"
            ) from error
        self.fingerprint = self._fingerprint(folder, texts if changed else [])

    def _check(self, theirs: Any, texts: Sequence[str]) -> None:
        """Raise ValueError if AutoTokenizer gives other ids than its backend, as a class with additional rules may."""
        text = first_difference(self.encode_batch, ids_in_transformers(theirs), texts)
        if text is not None:
            raise ValueError(
                f"{type(theirs).__name__} gives other ids for {text!r} than the tokenizer.json that it saves: "
                f"save the tokenizer in {self.path} again as a PreTrainedTokenizerFast"
            )

    def _fingerprint(self, folder: Path, changed_texts: Sequence[str]) -> str:
        """Return a hash of the vocabulary's files, the end-of-document token, and the ids that other files change."""
        if (folder / "tokenizer.json").is_file():
            parts = [("tokenizer.json", deterministic_json(folder / "tokenizer.json"))]
        elif (folder / "tokenizer.model").is_file():
            parts = [("tokenizer.model", (folder / "tokenizer.model").read_bytes())]
        else:
            parts = [(name, (folder / name).read_bytes()) for name in _OLD_FILES if (folder / name).is_file()]
            changed_texts = []  # the hash covers all files, so it needs no ids
        digest = hashlib.sha256(f"eod={self.eod_id}\n".encode())
        for name, content in parts:
            digest.update(name.encode() + b"\n" + content)
        if changed_texts:
            digest.update(json.dumps(self.encode_batch(changed_texts)).encode())
        return digest.hexdigest()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.backend.encode_special_tokens = self._split_special  # pickling the backend loses this setting

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens in the text become their ids, as in transformers."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return _ids(self.backend, texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, with special tokens."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=False)

    def token(self, index: int) -> str:
        """Return the token of an id, as the vocabulary holds it."""
        return self.backend.id_to_token(index)


def _ids(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def load_in_transformers(folder: Path) -> Any:
    """Load a folder with AutoTokenizer.

    Raises ValueError if AutoTokenizer cannot load the folder.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds of errors for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"transformers cannot load the tokenizer in {folder} ({reason}): correct its files, or choose another "
            "tokenizer"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def ids_in_transformers(tokenizer: Any) -> Any:
    """Return a function from texts to their ids by a transformers tokenizer, without special tokens around them."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode


def make_deterministic(backend: Any) -> Any:
    """Switch off a `tokenizers.Tokenizer`'s stored settings for random ids, truncation and padding."""
    backend.no_truncation()
    backend.no_padding()
    for name in _RANDOM:
        if getattr(backend.model, name, None) is not None:
            setattr(backend.model, name, None)
    return backend


def deterministic_json(file: Path) -> bytes:
    """Return the content of a tokenizer.json without random ids; a file without random ids stays byte for byte."""
    content = file.read_bytes()
    parsed = parse_json(content)
    model = parsed.get("model") if isinstance(parsed, dict) else None
    drawn = [name for name in _RANDOM if isinstance(model, dict) and model.get(name) is not None]
    if not isinstance(model, dict) or not drawn:
        return content
    model.update(dict.fromkeys(drawn))
    return json.dumps(parsed, ensure_ascii=False).encode()


def _described_backend(folder: Path) -> Any:
    """Load the `tokenizers.Tokenizer` of tokenizer.json; return None if the folder has other tokenizer files.

    Raises ValueError if tokenizer.json is damaged, or if the folder holds no tokenizer.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        import tokenizers

        try:
            content = file.read_text(encoding="utf-8")
            parse_json(content)  # raises an error for a key given twice; the library would take the last value
            return make_deterministic(tokenizers.Tokenizer.from_str(content))
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"{file} is not a tokenizer, or is damaged: {error}") from error
    if not any((folder / name).is_file() for name in (*_OLD_FILES, "tokenizer.model")):
        raise ValueError(f"{folder} has neither tokenizer.json nor tokenizer.model: give the folder of a tokenizer")
    return None


def _backend(folder: Path, theirs: Any) -> Any:
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"transformers loads the tokenizer in {folder} as {type(theirs).__name__}, which has no tokenizer.json: "
            "save it once as a PreTrainedTokenizerFast"
        )
    return backend


def _is_one(token: Any) -> bool:
    return token is not None and not isinstance(token, (list, tuple, dict))


def _named_id(folder: Path, name: str, index: int | None, vocabulary: dict[str, int]) -> int | None:
    """Return the id of the `bos` or `eos` token: `index` unless it is None, else the id in config.json, else None."""
    if index is not None:
        return index
    file = folder / "config.json"
    content = read_json(file) if file.is_file() else {}
    written = content.get(f"{name}_token_id") if isinstance(content, dict) else None
    written = written[0] if isinstance(written, list) and written else written
    return written if isinstance(written, int) and written in vocabulary.values() else None
