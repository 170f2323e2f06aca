"""One interface for SentencePiece models and Hugging Face tokenizer folders, read from local files only."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_step.config.counts import counted
from megatron_step.data.end_of_document import end_of_document_id
from megatron_step.data.hf_tokenizer import HuggingFaceTokenizer, is_hf_folder
from megatron_step.data.probes import first_difference, marked_texts, plain_texts


class Tokenizer(Protocol):
    """A tokenizer. Encoding never adds a beginning-of-text or end-of-text token."""

    path: str
    """File or folder that the tokenizer was loaded from."""
    vocab_size: int
    """Largest id plus 1, with special and added tokens."""
    eod_id: int
    """Id of the token that ends a document."""
    bos_id: int | None
    """Id of the token that begins a text; None if there is none."""
    fingerprint: str
    """Hexadecimal sha256 of everything that the ids depend on; equal fingerprints mean equal ids."""
    marks: dict[str, int]
    """Ids of the texts that always become one token, such as special tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around them."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, but faster."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...

    def token(self, index: int) -> str:
        """Return the token of an id, as the vocabulary holds it."""
        ...


def load_tokenizer(path: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """Load a SentencePiece `.model` file or a Hugging Face tokenizer folder, without the network.

    A file gives SentencePiece's ids, and so does a folder whose only tokenizer file is `tokenizer.model`. Other folders
    give the ids of transformers' AutoTokenizer. `end_of_document` is the token that ends documents; None takes the
    tokenizer's end-of-text token.

    Raises FileNotFoundError if `path` does not exist, and ValueError if it is not a tokenizer, or has no token that can
    end a document.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"the tokenizer {path} does not exist: give a SentencePiece .model file or a folder with a Hugging Face "
            "tokenizer.json"
        )
    if path.name == "tokenizer.json":
        path = path.parent
    if path.is_file():
        return SentencePieceTokenizer(path, end_of_document)
    if is_hf_folder(path) or not (path / "tokenizer.model").is_file():
        tokenizer = HuggingFaceTokenizer(path, end_of_document)
        if not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file():
            _share_fingerprint(tokenizer, path / "tokenizer.model")
        return tokenizer
    return SentencePieceTokenizer(path / "tokenizer.model", end_of_document)


def _share_fingerprint(tokenizer: HuggingFaceTokenizer, model: Path) -> None:
    """Give a folder's tokenizer the fingerprint of its SentencePiece model, if both have the same tokens and ids."""
    try:
        plain = SentencePieceTokenizer(model, tokenizer.token(tokenizer.eod_id))
    except ValueError:
        return
    same_tokens = (plain.vocab_size, plain.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)
    if same_tokens and same_ids(plain, tokenizer) is None:
        tokenizer.fingerprint = plain.fingerprint


def fitting_tokenizer(
    path: str,
    vocab_size: int,
    fingerprint: str | None,
    trained_with: str | None = None,
    end_of_document: str | None = None,
) -> Tokenizer:
    """Load the tokenizer at `path` and check that it fits a model with `vocab_size` tokens.

    `fingerprint` and `trained_with` are the fingerprint and the path of the tokenizer that the model was trained with,
    if they are known. Another tokenizer fits, too, if both give the same ids on texts that reveal differences; it then
    gets the same fingerprint.

    Raises ValueError if the tokenizer does not fit, and FileNotFoundError if it does not exist.
    """
    tokenizer = load_tokenizer(path, end_of_document)
    if tokenizer.vocab_size > vocab_size:
        excess = sorted((index, mark) for mark, index in tokenizer.marks.items() if index >= vocab_size)
        named = f" ({', '.join(f'{mark} is {index:,}' for index, mark in excess[:3])})" if excess else ""
        raise ValueError(
            f"the tokenizer {path} has {counted(tokenizer.vocab_size, 'token')}{named}, but the model's vocabulary has "
            f"{vocab_size:,}: give the tokenizer that the model was trained with (--tokenizer)"
        )
    if fingerprint is None or tokenizer.fingerprint == fingerprint:
        return tokenizer
    difference = _difference_from(trained_with, path, tokenizer, fingerprint, end_of_document)
    if difference:
        raise ValueError(
            f"{path} is not the tokenizer that the model was trained with{difference}: give that one (--tokenizer)"
        )
    tokenizer.fingerprint = fingerprint
    return tokenizer


def _difference_from(
    trained_with: str | None, path: str, tokenizer: Tokenizer, fingerprint: str, end_of_document: str | None
) -> str:
    """Describe how a tokenizer differs from the one at `trained_with`; return "" if both give the same ids."""
    if trained_with is None or Path(trained_with) == Path(path):
        return " (its files differ)"
    try:
        original = load_tokenizer(trained_with, end_of_document)
    except (ValueError, OSError):
        return f" (its files differ, and {trained_with} no longer exists to compare the ids)"
    if original.fingerprint != fingerprint:
        return f" (its files differ, and {trained_with} has changed since)"
    if original.eod_id != tokenizer.eod_id:
        ends = [f"{one.token(one.eod_id)} ({one.eod_id})" for one in (tokenizer, original)]
        return f" (documents end with {ends[0]} instead of {ends[1]})"
    text = same_ids(original, tokenizer)
    return "" if text is None else f" (the ids of {text!r} differ)"


def same_ids(first: Tokenizer, second: Tokenizer) -> str | None:
    """Return a text for which the tokenizers give different ids, or None if there is none.

    Texts with marks count only if both tokenizers have marks: SentencePiece reads a special token in a text as text.
    """
    text = first_difference(first.encode_batch, second.encode_batch, list(plain_texts(first)))
    if text is None and first.marks and second.marks:
        marks = list({**first.marks, **second.marks})
        text = first_difference(first.encode_batch, second.encode_batch, list(marked_texts(marks)))
    return text


def end_of_document_line(tokenizer: Tokenizer) -> str:
    """Return a report line about the token that ends documents."""
    return f"documents end with {tokenizer.token(tokenizer.eod_id)!r} (id {tokenizer.eod_id})"


class SentencePieceTokenizer:
    """A SentencePiece model of any kind (BPE, unigram, ...).

    Raises ValueError if the file is not a SentencePiece model, or has no token that can end a document.
    """

    def __init__(self, path: str | Path, end_of_document: str | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = str(path)
        model = Path(path).read_bytes()
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model, or is damaged: for another kind of tokenizer, give a folder "
                "with tokenizer.json"
            ) from error
        self.vocab_size: int = self._processor.GetPieceSize()
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.marks: dict[str, int] = {}
        default = end_of_document_id(self.path, self._id_of, None, _id_or_none(self._processor.eos_id()))
        self.eod_id = end_of_document_id(self.path, self._id_of, end_of_document, default)
        chosen = b"" if self.eod_id == default else f"\neod={self.eod_id}\n".encode()
        self.fingerprint = hashlib.sha256(model + chosen).hexdigest()

    def _id_of(self, piece: str) -> int | None:
        index = self._processor.PieceToId(piece)
        return None if index == self._processor.unk_id() else index

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens such as `</s>` in the text are read as text."""
        return self._processor.Encode(text, out_type=int, add_bos=False, add_eos=False, enable_sampling=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on one thread."""
        return self._processor.Encode(
            list(texts), out_type=int, add_bos=False, add_eos=False, enable_sampling=False, num_threads=1
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens (bos, eos) give no text."""
        return self._processor.Decode([int(index) for index in ids])

    def token(self, index: int) -> str:
        """Return the token of an id."""
        return self._processor.IdToPiece(index)


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None
