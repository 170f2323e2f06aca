"""Cross-entropy of a linear output layer: loss = logsumexp(W h) - (W h)[label], over a vocabulary split over ranks.

One copy of the logits is kept, in the type of ``hidden``. Backward computes the softmax and the gradient in float32 row
by row, and writes the gradient over the logits. So the float32 logits and probabilities of the usual implementation
never exist.

With m the largest logit of a token and total = sum of exp(logit - m), both over all ranks:

    loss        = log total + (m - target logit)        the difference first: both logits may be large, the loss small
    probability = exp(logit - m) / total

m, total and the loss are float64 until the loss is returned, so that every split of the vocabulary gives the same loss.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_step.engine.compat.operations import assert_async
from megatron_step.ops.dispatch import use_kernel
from megatron_step.ops.linear import linear_input_gradient, linear_output, linear_weight_gradient, types_agree

_CHUNK_ELEMENTS = 2**24
"""Logits that the plain-torch path widens to float32 at a time."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute the loss of every token under the output layer ``weight``.

    Args:
        hidden: [..., h], equal on all ranks of ``group``
        weight: [v_local, h], rows vocab_start to vocab_start + v_local of the output layer, in the type of ``hidden``,
            or in bf16 for an fp32 ``hidden``
        labels: [...] int64 over the whole vocabulary; a negative label is ignored: loss 0, no gradient
        vocab_size: size of the vocabulary; rows from there on are padding and do not count. None means no padding
        vocab_start: first vocabulary entry of this rank
        group: tensor-parallel group over which the vocabulary is split; None for one rank

    Returns:
        losses [...] in float32, equal on all ranks of ``group``. The gradient of ``hidden`` is this rank's term of a
        sum over ``group``, which the caller reduces, as for any column-parallel layer. Backward can run once.

    Raises:
        ValueError: shapes or types do not fit together, or a label is not below ``vocab_size``.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    vocab_size = vocab_start + weight.shape[0] if vocab_size is None and ranks == 1 else vocab_size
    if vocab_size is None:
        raise ValueError("linear_cross_entropy: vocab_size is None, but the vocabulary is split over ranks: pass it")
    _check(hidden, weight, labels, vocab_size)
    columns = min(max(vocab_size - vocab_start, 0), weight.shape[0])
    labels = labels.reshape(-1)
    losses = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels,
        labels - vocab_start,
        columns,
        group if ranks > 1 else None,
    )
    return losses.view(hidden.shape[:-1])


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int | None = None
) -> Tensor:
    """Return ``linear_cross_entropy`` on one rank, computed in plain torch."""
    logits = F.linear(hidden, weight.to(hidden.dtype))[..., :vocab_size].reshape(labels.numel(), -1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels.reshape(-1).clamp(min=-1)
    return F.cross_entropy(wide, targets, reduction="none", ignore_index=-1).view(labels.shape)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> None:
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1] or not types_agree(hidden, weight):
        raise ValueError(
            "linear_cross_entropy: hidden [..., h] and weight [v, h] must agree in h and type, got "
            f"{hidden.dtype} {[*hidden.shape]} and {weight.dtype} {[*weight.shape]}"
        )
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels must be int64 {[*hidden.shape[:-1]]}, got {labels.dtype} {[*labels.shape]}"
        )
    message = f"linear_cross_entropy: a label is not below vocab_size = {vocab_size}"
    if labels.device.type != "cpu":
        assert_async((labels < vocab_size).all(), message)  # the host does not wait for the device
    elif labels.numel() > 0 and int(labels.max()) >= vocab_size:
        raise ValueError(f"{message}: {int(labels.max())}")


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss with autograd. ``local_labels`` count from this rank's first row of the output layer.

    A label outside [0, columns) belongs to another rank, or is ignored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        local_labels: Tensor,
        columns: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        logits = linear_output(hidden, weight)
        maximum, total, target = _combine(_statistics(logits, local_labels, columns), group)
        ctx.save_for_backward(hidden, weight, local_labels, maximum, total, labels >= 0)
        ctx.columns = columns
        # The logits are not a saved tensor, because backward overwrites them with their gradient.
        ctx.logits = logits if any(ctx.needs_input_grad) else None
        return (total.log() + (maximum - target)).float().masked_fill_(labels < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.logits is None:
            raise RuntimeError("linear_cross_entropy: backward ran twice, but can run once: do not use retain_graph")
        hidden, weight, local_labels, maximum, total, counted = ctx.saved_tensors
        gradient, ctx.logits = ctx.logits, None
        _softmax_gradient_(gradient, local_labels, maximum, total, grad_losses.float() * counted, ctx.columns)
        dhidden = linear_input_gradient(gradient, weight) if ctx.needs_input_grad[0] else None
        dweight = linear_weight_gradient(gradient, hidden) if ctx.needs_input_grad[1] else None
        return dhidden, dweight, None, None, None, None


def _combine(statistics: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's maximum, total and target logit [t] over all ranks, from this rank's statistics [3, t]."""
    maximum, total, target = statistics.unbind()
    if group is not None:
        highest = maximum.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack((total * torch.exp(maximum - highest), target))
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
        maximum, (total, target) = highest, sums.unbind()
    return maximum, total, target


def _statistics(logits: Tensor, labels: Tensor, columns: int) -> Tensor:
    """Return [3, t] float64: each row's maximum, sum of exp(logit - maximum), target logit (0 if on another rank)."""
    if use_kernel(logits):
        return torch.ops.megatron_step.cross_entropy_forward(logits, labels, columns)
    result = logits.new_zeros((3, logits.shape[0]), dtype=torch.float64)
    result[0] = float("-inf")
    if columns == 0:
        return result
    own_label = (labels >= 0) & (labels < columns)
    index = labels.clamp(0, columns - 1).unsqueeze(1)
    for rows in _chunks(logits):
        wide = logits[rows, :columns].float()
        highest = wide.amax(1, keepdim=True)
        result[0, rows] = highest.squeeze(1).double()
        # torch sums in pairs, so float32 is precise enough.
        result[1, rows] = (wide - highest).exp_().sum(1).double()
        result[2, rows] = wide.gather(1, index[rows]).squeeze(1).double() * own_label[rows]
    return result


def _softmax_gradient_(
    logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, scale: Tensor, columns: int
) -> None:
    """Replace the logits by their gradient, in place.

        logits[i, j] <- scale[i] * (exp(logits[i, j] - maximum[i]) / total[i] - [j = label i]); 0 from ``columns`` on

    The gradient of a label's logit is a difference of nearly equal numbers, and is therefore computed in float64.
    """
    if use_kernel(logits):
        torch.ops.megatron_step.cross_entropy_backward_(logits, labels, maximum, total, scale.contiguous(), columns)
        return
    logits[:, columns:] = 0
    if columns == 0:
        return
    own_label = ((labels >= 0) & (labels < columns)).unsqueeze(1)
    index = labels.clamp(0, columns - 1).unsqueeze(1)
    maximum, total, scale = maximum.unsqueeze(1), total.unsqueeze(1), scale.unsqueeze(1)
    for rows in _chunks(logits):
        wide = logits[rows, :columns].float()
        target = (wide.gather(1, index[rows]) - maximum[rows]).exp_() / total[rows] - own_label[rows].double()
        wide.sub_(maximum[rows].float()).exp_().mul_((scale[rows] / total[rows]).float())
        logits[rows, :columns] = wide.scatter_(1, index[rows], (scale[rows] * target).float())


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Return slices over the rows of logits, each of at most ``_CHUNK_ELEMENTS`` elements and at least one row."""
    size = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
    return (slice(begin, begin + size) for begin in range(0, logits.shape[0], size))
