"""Perplexity and bits per byte of a text, by windows that are disjoint or slide.

The tokens of all documents, an end-of-document token behind each, are one sequence x_1 ... x_n, as in training; x_0 is
an end-of-document token, too. Each of x_1 ... x_n is scored once, ends of documents included: a document's first token
is predicted from the end-of-document token before it. With windows of s tokens that begin r apart (the stride, 1 to s),
token i is scored in the first window that reaches it:

    nats          = - sum over i = 1 ... n of ln p(x_i | x_b ... x_i-1),    b = r max(0, ceil((i - s) / r))
    perplexity    = exp(nats / n)
    bits per byte = nats / (ln 2 * bytes of the text)

r = s makes the windows disjoint. With a smaller stride each token beyond the first window is predicted from at least
s - r + 1 tokens, for s / r times the work.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.evaluation.models import LanguageModel
from megatron_step.evaluation.text import TokenizedText

_TOKENS_AT_ONCE = 4096
_FLOAT64_ELEMENTS = 2**22
"""Logits that are widened to float64 at a time, 32 MiB."""


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts a text."""

    nats: float
    """-ln p, summed over all tokens."""
    num_tokens: int
    """Tokens that were scored."""
    num_bytes: int
    """Bytes of the text in UTF-8."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Of a token; it depends on the tokenizer."""
        return math.exp(min(self.loss, 700.0))  # exp(710) is beyond a float

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


class Window(NamedTuple):
    """Inputs x_start ... x_end-1, which predict x_start+1 ... x_end; the last `num_scored` of these are scored."""

    start: int
    end: int
    num_scored: int


def windows(num_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """The windows over tokens 1 to `num_tokens`; the last may be shorter than `length`.

    Raises ValueError unless the stride lies between 1 and `length`.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"--stride is {stride}: it must be between 1 and the window's {length:,} tokens")
    scored = 0
    for start in range(0, num_tokens, stride):
        end = min(start + length, num_tokens)
        yield Window(start, end, end - scored)
        scored = end
        if end == num_tokens:
            return


@torch.no_grad()
def text_loss(
    model: LanguageModel,
    text: TokenizedText,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextLoss:
    """The loss of `text` by windows of the model's `seq_length`; `stride` None for disjoint ones.

    Each data-parallel rank takes a part of the windows, and all get the result. `progress` is told the windows that
    this rank has done, and its total.
    """
    num_tokens = len(text.tokens) - 1
    every = list(windows(num_tokens, model.seq_length, model.seq_length if stride is None else stride))
    own = every[model.parallel.dp_rank :: model.parallel.dp_size]
    nats, done = 0.0, 0
    for batch in _batches(own):
        nats += _nats(model, text.tokens, batch)
        done += len(batch)
        progress(done, len(own))
    total = torch.tensor(nats, dtype=torch.float64, device=model.parallel.device)
    torch.distributed.all_reduce(total, group=model.parallel.groups.dp)
    return TextLoss(float(total), num_tokens, text.num_bytes)


def _batches(own: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows of equal length together, as many as the memory for logits allows."""
    for length, group in groupby(own, key=lambda window: window.end - window.start):
        equal, size = list(group), max(1, _TOKENS_AT_ONCE // length)
        yield from (equal[first : first + size] for first in range(0, len(equal), size))


def _nats(model: LanguageModel, tokens: np.ndarray, batch: Sequence[Window]) -> float:
    """-ln p of the scored tokens of some windows of equal length, summed in fp64."""
    rows = np.stack([tokens[window.start : window.end + 1] for window in batch])  # [b, s + 1]
    ids = torch.from_numpy(rows.astype(np.int64)).to(model.parallel.device)
    logits = model.logits(ids[:, :-1])  # [b, s, v]
    nats = 0.0
    for window, window_logits, window_ids in zip(batch, logits, ids):
        scored = slice(-window.num_scored, None)
        nats += float(_cross_entropy(window_logits[scored], window_ids[scored]))
    return nats


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -ln p over all labels in float64: logits [t, v], labels [t] -> []. It widens a block of rows at a time."""
    rows = max(1, _FLOAT64_ELEMENTS // logits.shape[1])
    blocks = zip(logits.split(rows), labels.split(rows))
    return torch.stack([F.cross_entropy(block.double(), part, reduction="sum") for block, part in blocks]).sum()
