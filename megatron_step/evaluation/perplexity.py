"""Compute the perplexity and bits per byte of a text, in disjoint or sliding windows.

The tokens of all documents, each document followed by an end-of-document token, form one sequence x_1 ... x_n, as in
training; x_0 is also an end-of-document token. Each of x_1 ... x_n is scored once, and end-of-document tokens count,
too. A document's first token is predicted from the end-of-document token before it. Windows have s tokens and start r
tokens apart (the stride, 1 to s). Token i is scored in the first window that contains it:

    nats          = - sum over i = 1 ... n of ln p(x_i | x_b ... x_i-1),    b = r max(0, ceil((i - s) / r))
    perplexity    = exp(nats / n)
    bits per byte = nats / (ln 2 * bytes of the text)

A stride r = s gives disjoint windows. With a smaller stride, each token after the first window is predicted from at
least s - r + 1 tokens, at s / r times the cost.
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

from megatron_step.config.counts import counted
from megatron_step.evaluation.models import LanguageModel
from megatron_step.evaluation.text import TokenizedText

_TOKENS_AT_ONCE = 4096
_FLOAT64_ELEMENTS = 2**22
"""Logits that are widened to float64 at a time, 32 MiB."""


@dataclass(frozen=True)
class TextLoss:
    """The loss of a model on a text."""

    nats: float
    """Sum of -ln p over all tokens."""
    num_tokens: int
    """Number of scored tokens."""
    num_bytes: int
    """Bytes of the text in UTF-8."""

    @property
    def loss(self) -> float:
        """Loss in nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token; it depends on the tokenizer."""
        return math.exp(min(self.loss, 700.0))  # exp(710) is beyond a float

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which can be compared between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


class Window(NamedTuple):
    """A window: inputs x_start ... x_end-1 predict x_start+1 ... x_end, of which the last `num_scored` are scored."""

    start: int
    """Index of the first input."""
    end: int
    """Index of the last predicted token."""
    num_scored: int
    """Number of scored tokens."""


def windows(num_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Yield the windows over tokens 1 to `num_tokens`; the last one may be shorter than `length`.

    Raises ValueError unless the stride lies between 1 and `length`.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"--stride is {stride}: it must be between 1 and the window's {counted(length, 'token')}")
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
    """Compute the loss of `text` in windows of the model's `seq_length`; `stride` None gives disjoint windows.

    Each data-parallel rank scores its share of the windows, and all ranks get the result. `progress` is called with the
    windows that this rank has scored and its total.

    Raises ValueError if the stride is not between 1 and the window's length.
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
    """Yield batches of windows of equal length, with at most `_TOKENS_AT_ONCE` tokens to limit the logits' memory."""
    for length, group in groupby(own, key=lambda window: window.end - window.start):
        equal, size = list(group), max(1, _TOKENS_AT_ONCE // length)
        yield from (equal[first : first + size] for first in range(0, len(equal), size))


def _nats(model: LanguageModel, tokens: np.ndarray, batch: Sequence[Window]) -> float:
    """Sum in fp64 of -ln p over the scored tokens of a batch of windows of equal length."""
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
