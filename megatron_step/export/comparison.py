"""Compares an exported model in transformers with the model that was trained, by the logits that both give."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_step.checkpoint.load import FoundCheckpoint
from megatron_step.engine.parallel import Parallel
from megatron_step.export.transformers_model import load_in_transformers
from megatron_step.growth.whole_model import whole_model

_SEQUENCES, _LONGEST = 4, 256


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two models are from each other."""

    max_difference: float
    """Largest difference of two logits."""
    mean_difference: float
    """Mean difference of two logits."""
    largest_logit: float
    """Largest magnitude of the trained model's."""
    agreement: float
    """Share of the positions at which both hold the same token for the likeliest."""

    def __str__(self) -> str:
        return (
            f"logits up to {self.largest_logit:.4g} differ by {self.max_difference:.2e} at most, "
            f"{self.mean_difference:.2e} on average; top-1 agreement {100 * self.agreement:.2f} %"
        )

    def is_within_rounding(self, dtype: str) -> bool:
        """Whether weights rounded to `dtype` explain the difference; a part that is wrong makes a much larger one."""
        return self.max_difference <= max(1e-5, 16 * torch.finfo(getattr(torch, dtype)).eps) * self.largest_logit


@torch.no_grad()
def compare_logits(
    trained: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], vocab_size: int, length: int
) -> Comparison:
    """Compare two models, each from tokens [b, s] to logits [b, s, v or more], on random tokens."""
    generator = torch.Generator().manual_seed(1)
    largest = total = magnitude = agreeing = 0.0
    for _ in range(_SEQUENCES):
        tokens = torch.randint(0, vocab_size, (1, length), generator=generator)
        ours, theirs = (logits(tokens)[0, :, :vocab_size].float().cpu() for logits in (trained, exported))  # [s, v]
        difference = (ours - theirs).abs()
        largest = max(largest, float(difference.max()))
        magnitude = max(magnitude, float(ours.abs().max()))
        total += float(difference.mean()) / _SEQUENCES
        agreeing += float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) / _SEQUENCES
    return Comparison(largest, total, magnitude, agreeing)


def compare(
    found: FoundCheckpoint, model: Path, adapter: Path | None, seq_length: int, parallel: Parallel
) -> Comparison:
    """Compare the model of a checkpoint, in fp32, with an exported one, with or without a PEFT adapter."""
    trained = whole_model(found, "fp32", parallel)
    exported = load_in_transformers(model, torch.float32)
    if adapter is not None:
        from peft import PeftModel

        exported = PeftModel.from_pretrained(exported, adapter)
    exported = exported.to(parallel.device).eval()
    return compare_logits(
        lambda tokens: trained(input_ids=tokens.to(parallel.device), position_ids=None, attention_mask=None),
        lambda tokens: exported(tokens.to(parallel.device)).logits,
        found.manifest.vocab_size,
        min(seq_length, _LONGEST),
    )
