"""Convert a SentencePiece model to a fast Hugging Face tokenizer that gives the same ids.

SentencePiece's BPE merges the pair of neighbours whose union has the highest score. A fast BPE tokenizer has a list of
pairs instead, which is written here in the order of that score. Two differences remain. Names of special and byte
pieces in a text (`</s>`, `<0x41>`) are text to SentencePiece, but may become those tokens in the fast tokenizer.
Control characters may differ if the model has a map of characters (nmt_nfkc).

transformers' converters ignore the space in front, the removal of spaces, and the order of scores.
"""

import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from megatron_step.data.probes import Encode, first_difference, marked_texts, plain_texts
from megatron_step.data.tokenizer import SentencePieceTokenizer

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # SentencePiece.Type
_PRIVATE_USE = 0x10F000  # first of the private-use characters that stand for pieces during normalization
_NEVER = -1e9  # score of a piece that SentencePiece never produces

_CONTROL_CHARACTERS = "\x00\x01\x7f\u0085"  # a map of characters may treat these differently in a fast tokenizer


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Convert a SentencePiece model, BPE or unigram, to a fast tokenizer.

    Raises ValueError if the fast tokenizer gives other ids than SentencePiece on texts that reveal differences.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(Path(tokenizer.path).read_bytes())
    fast = tokenizers.Tokenizer(_model(model, tokenizer.path))
    defined = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED and " " not in piece.piece]
    fast.normalizer = _normalizer(model.normalizer_spec, defined, _breaks_lines_by_spaces(tokenizer))
    fast.decoder = _decoder(model.normalizer_spec)
    fast.add_special_tokens([piece.piece for piece in model.pieces if piece.type == _CONTROL])
    if defined and model.trainer_spec.model_type == _BPE:
        _keep_whole(fast, defined, model.normalizer_spec)
    texts = [*plain_texts(tokenizer), *marked_texts(defined)]
    if not model.normalizer_spec.precompiled_charsmap:
        texts.append(_CONTROL_CHARACTERS)
    text = first_difference(
        _in_order(tokenizer.encode_batch, model),
        _in_order(lambda texts: [fast.encode(text, add_special_tokens=False).ids for text in texts], model),
        texts,
    )
    if text is not None:
        raise ValueError(
            f"the SentencePiece model {tokenizer.path} cannot be converted to a Hugging Face tokenizer: the ids of "
            f"{text!r} differ. Give a folder with an equivalent tokenizer (--tokenizer)"
        )
    return fast


def _in_order(encode: Encode, model: Any) -> Encode:
    """Return an encoder for comparisons; for unigram it sorts the ids, since rounding may swap two runs of spaces."""
    if model.trainer_spec.model_type != _UNIGRAM:
        return encode
    return lambda texts: [sorted(ids) for ids in encode(texts)]


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
    raise ValueError(f"{path} is neither a BPE nor a unigram model: give a Hugging Face tokenizer (--tokenizer)")


def _merges(model: Any) -> list[tuple[str, str]]:
    """Return every pair of pieces whose union is a piece, ordered by the union's score from high to low.

    Among equal scores, the pair with the longer left piece comes first. SentencePiece merges the leftmost pair, and in
    a run of one character (spaces) the left piece of that pair is the longer one.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (_NORMAL, _UNUSED)}
    pairs = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _unigram_scores(model: Any) -> list[float]:
    """Return each piece's log-probability; SentencePiece gives a user-defined piece of n bytes 0.1 (n - 1)."""
    scores = {
        _NORMAL: lambda piece: piece.score,
        _USER_DEFINED: lambda piece: 0.1 * (len(piece.piece.encode()) - 1),
    }
    return [scores.get(piece.type, lambda piece: _NEVER)(piece) for piece in model.pieces]


def _keep_whole(fast: tokenizers.Tokenizer, defined: list[str], spec: Any) -> None:
    """Make a BPE tokenizer find user-defined pieces before it merges. (In unigram their scores have this effect.)

    An added token splits the text before normalization. Normalization would then add or remove spaces in each segment,
    and pieces with U+2581 would not be found. If that matters, the pieces are split off after normalization instead.
    """
    changes = spec.add_dummy_prefix or spec.remove_extra_whitespaces or spec.precompiled_charsmap
    if not (changes or any("▁" in piece for piece in defined)):
        fast.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in defined])
        return
    longest_first = sorted(defined, key=len, reverse=True)
    pattern = Regex("|".join(re.escape(piece) for piece in longest_first))
    fast.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    fast.model.ignore_merges = True  # a text that is a piece is not merged from smaller pieces


def _breaks_lines_by_spaces(tokenizer: SentencePieceTokenizer) -> bool:
    """Return whether the tokenizer turns carriage returns and line feeds into spaces."""
    space, *others = tokenizer.encode_batch([f"a{end}b" for end in (" ", "\r", "\n")])
    return others == [space, space]


def _normalizer(spec: Any, defined: list[str], breaks_lines_by_spaces: bool) -> normalizers.Sequence:
    """Return SentencePiece's normalization: map characters, reduce spaces, add one in front, write spaces as U+2581.

    User-defined pieces are not normalized: private-use characters replace them during these steps.
    """
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        if breaks_lines_by_spaces:
            steps.append(normalizers.Replace("\r\n", "  "))  # Precompiled would treat it as one character
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        longest_first = sorted(defined, key=len, reverse=True)
        signs = [(piece, chr(_PRIVATE_USE + index)) for index, piece in enumerate(longest_first)]
        steps = [normalizers.Replace(piece, sign) for piece, sign in signs] + steps
        steps += [normalizers.Replace(sign, piece) for piece, sign in signs]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _decoder(spec: Any) -> decoders.Sequence:
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)
