"""A SentencePiece model as a fast Hugging Face tokenizer that gives the same ids.

Where SentencePiece merges the pair of neighbours whose union has the highest score, a fast BPE tokenizer has a list of
pairs in the order of that score. Where they differ: the names of special and byte pieces, written out in a
text (`</s>`, `<0x41>`), are text to SentencePiece, and can be those tokens to the other; so can control characters
differ where a model has a map of characters (nmt_nfkc).
"""

import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.models import BPE, Unigram

from megatron_step.data.tokenizer import SentencePieceTokenizer

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # SentencePiece.Type
_NEVER = -1e9  # the score of a piece that no text may become: SentencePiece looks for it nowhere

_PROBES = [
    "",
    " ",
    "a",
    "The quick brown fox jumps over 1234567890 lazy dogs.",
    "  leading,   inner  and trailing spaces  ",
    "line\nline\n\nline\n\n\n\r\n\tindented",
    "\n",
    " \n ",
    "café naïve Ωμέγα Привет 你好 こんにちは 🎉👩‍👩‍👧 \u00a0\u200b\ufeff ﬁ Å Å",
    "▁ ▁▁a",
    "aaaaaaaaaaaaa ababababab !!!???...---___",
]
_CONTROL_CHARACTERS = "\x00\x01\x7f\u0085"  # which a map of characters can treat in another way there
_NUM_MIXED_PROBES, _PIECES_OF_A_PROBE = 200, 30


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """The fast tokenizer of a SentencePiece model, of BPE or unigram.

    Raises ValueError if it does not give the ids that SentencePiece gives, on texts made to tell them apart.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(Path(tokenizer.path).read_bytes())
    fast = tokenizers.Tokenizer(_model(model, tokenizer.path))
    fast.normalizer = _normalizer(model.normalizer_spec)
    fast.decoder = _decoder(model.normalizer_spec)
    fast.add_special_tokens([piece.piece for piece in model.pieces if piece.type == _CONTROL])
    if model.trainer_spec.model_type == _BPE:  # found in the text before all merging; unigram gives them a score
        fast.add_tokens([_as_it_is(piece.piece) for piece in model.pieces if piece.type == _USER_DEFINED])
    probes = _probes([piece.piece for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED)])
    for text in chain(probes, [] if model.normalizer_spec.precompiled_charsmap else [_CONTROL_CHARACTERS]):
        if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise ValueError(
                f"no Hugging Face tokenizer gives the ids of {tokenizer.path}: they differ on {text!r}; "
                "give the folder of one that does with --tokenizer"
            )
    return fast


def _model(model: Any, path: str) -> BPE | Unigram:
    pieces = [piece.piece for piece in model.pieces]
    bytes_for_unknown = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == _BPE:
        return BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=_merges(model),
            unk_token=model.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=bytes_for_unknown,
        )
    if model.trainer_spec.model_type == _UNIGRAM:
        scores = _unigram_scores(model)
        unknown = next(index for index, piece in enumerate(pieces) if piece == model.trainer_spec.unk_piece)
        return Unigram(vocab=list(zip(pieces, scores)), unk_id=unknown, byte_fallback=bytes_for_unknown)
    raise ValueError(f"{path} is neither a BPE nor a unigram model: give a Hugging Face tokenizer with --tokenizer")


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every pair of pieces whose union is a piece, by the union's score, the highest first."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (_NORMAL, _UNUSED)}
    pairs = [
        (-score, len(piece[:cut]), piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _unigram_scores(model: Any) -> list[float]:
    """Each piece's log-probability; of one that the user defined what SentencePiece takes, n max - 0.1 for n bytes."""
    highest = max(piece.score for piece in model.pieces if piece.type == _NORMAL)
    of_type = {
        _NORMAL: lambda piece: piece.score,
        _USER_DEFINED: lambda piece: len(piece.piece.encode()) * highest - 0.1,
    }
    return [of_type.get(piece.type, lambda piece: _NEVER)(piece) for piece in model.pieces]


def _normalizer(spec: Any) -> normalizers.Sequence:
    """SentencePiece's: characters by its map, spaces kept or reduced, one more in front, each written as U+2581."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _decoder(spec: Any) -> decoders.Sequence:
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)


def _as_it_is(piece: str) -> AddedToken:
    return AddedToken(piece, normalized=False, special=False)


def _probes(pieces: list[str]) -> Iterator[str]:
    """Texts that would show another order of merging, another treatment of spaces, line feeds or unknown characters."""
    yield from _PROBES
    chance = random.Random(1)
    for _ in range(_NUM_MIXED_PROBES):
        yield "".join(chance.choices(pieces, k=_PIECES_OF_A_PROBE)).replace("▁", " ")
