"""SentencePiece models and Hugging Face tokenizer folders behind one interface, read from local files only."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

_END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
"""Pieces that mark the end of a text where the tokenizer itself does not say which one does."""


_OLD_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json")
"""Files of a Hugging Face folder without tokenizer.json."""


class Tokenizer(Protocol):
    """What pre-training needs of a tokenizer. Encoding never adds a beginning- or end-of-text token."""

    path: str
    """The file or folder it was loaded from."""
    vocab_size: int
    """One more than the largest id it can emit, special and added tokens included."""
    eod_id: int
    """Id of the token that ends a document."""
    bos_id: int | None
    """Id of the token that begins a text, where there is one."""
    fingerprint: str
    """sha256 of what decides its ids, in hexadecimal; equal fingerprints give equal ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around them."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; the same as `encode` one by one, and faster."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece `.model` file or a Hugging Face tokenizer folder. Nothing is looked up on the network.

    Raises FileNotFoundError where there is nothing at `path`, and ValueError where it is no tokenizer, or has no token
    that can end a document.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no tokenizer at {path}: give a SentencePiece .model file or a folder with a Hugging Face tokenizer.json"
        )
    if path.name == "tokenizer.json":
        path = path.parent
    if path.is_file():
        return SentencePieceTokenizer(path)
    if (path / "tokenizer.json").is_file() or not (path / "tokenizer.model").is_file():
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path / "tokenizer.model")


def fitting_tokenizer(path: str, vocab_size: int, fingerprint: str | None) -> Tokenizer:
    """The tokenizer at `path`, if it is that of a model with `vocab_size` tokens.

    `fingerprint` is that of the tokenizer which the model was trained with, where it is known.

    Raises ValueError if it is not, and FileNotFoundError if there is none.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.vocab_size:,} tokens, but the model's vocabulary has {vocab_size:,}: "
            "give the tokenizer that it was trained with, with --tokenizer"
        )
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise ValueError(f"{path} is not the tokenizer that the model was trained with: give that one with --tokenizer")
    return tokenizer


class SentencePieceTokenizer:
    """A SentencePiece model of any kind (BPE, unigram, ...)."""

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = str(path)
        model = Path(path).read_bytes()
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model, or is damaged") from error
        self.vocab_size: int = self._processor.GetPieceSize()
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eod_id = self._end_of_document_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def _end_of_document_id(self) -> int:
        candidates = [self._processor.eos_id()]
        candidates += [index for index in map(self._processor.PieceToId, _END_OF_TEXT) if index != self._unknown_id()]
        found = [index for index in candidates if index >= 0]
        if not found:
            raise ValueError(f"{self.path} has no token to end a document: train it with an end-of-text piece (</s>)")
        return found[0]

    def _unknown_id(self) -> int:
        return int(self._processor.unk_id())

    def encode(self, text: str) -> list[int]:
        """The ids of a text; pieces such as `</s>` written out in the text are text."""
        return self._processor.Encode(text, out_type=int, add_bos=False, add_eos=False, enable_sampling=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on one thread."""
        return self._processor.Encode(
            list(texts), out_type=int, add_bos=False, add_eos=False, enable_sampling=False, num_threads=1
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control pieces (bos, eos) give nothing."""
        return self._processor.Decode([int(index) for index in ids])


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer folder: tokenizer.json, or older files that transformers can turn into one."""

    def __init__(self, folder: str | Path) -> None:
        self.path = str(folder)
        self._tokenizer = _load_backend(Path(folder))
        # Both can be stored in tokenizer.json and would cut or fill every document without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"the tokenizer in {folder} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id = _special_id(Path(folder), "bos", vocabulary)
        eod_id = _special_id(Path(folder), "eos", vocabulary)
        if eod_id is None:
            eod_id = next((vocabulary[piece] for piece in _END_OF_TEXT if piece in vocabulary), None)
        if eod_id is None:
            raise ValueError(
                f"the tokenizer in {folder} has no token to end a document: set eos_token in its tokenizer_config.json"
            )
        self.eod_id: int = eod_id
        self.fingerprint = _folder_fingerprint(Path(folder), eod_id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens written out in the text become their ids, as in transformers."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens written out."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)


def _load_backend(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder."""
    file = folder / "tokenizer.json"
    if file.is_file():
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file} is not a tokenizer, or is damaged: {error}") from error
    if not any((folder / name).is_file() for name in _OLD_FILES):
        raise ValueError(f"{folder} holds no tokenizer: tokenizer.json or tokenizer.model is missing")
    from transformers import AutoTokenizer  # seconds to import, and only old folders need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers cannot load the tokenizer in {folder}: {reason}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"the tokenizer in {folder} has no fast form: save it once with a fast tokenizer")
    return backend


def _folder_fingerprint(folder: Path, eod_id: int) -> str:
    """Of the files with the vocabulary, and of the one id that other files decide; chat templates do not count."""
    names = ("tokenizer.json",) if (folder / "tokenizer.json").is_file() else _OLD_FILES
    digest = hashlib.sha256(f"eod={eod_id}\n".encode())
    for name in names:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\n" + (folder / name).read_bytes())
    return digest.hexdigest()


def _special_id(folder: Path, name: str, vocabulary: dict[str, int]) -> int | None:
    """Id of the `bos` or `eos` token that a folder's files name, or None."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(folder / file).get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in vocabulary:
            return vocabulary[content]
    index = _read_json(folder / "config.json").get(f"{name}_token_id")
    index = index[0] if isinstance(index, list) and index else index
    return index if isinstance(index, int) and index in vocabulary.values() else None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None
