"""Compares an exported model in transformers with the model that was trained: tensors, config and logits.

The weights must be the trained ones, number by number, and config.json must say what the trained model is. Then both
implementations compute logits in fp32 from the same weights, and so does a formula in fp64. Depth, width and the
weights decide how far rounding in fp32 carries two right implementations from fp64, but it carries both about as far;
a part that is wrong carries one of them much farther. With e_t and e_x their root mean square errors:

    e_t <= K max(e_x, floor)   and   e_x <= K max(e_t, floor)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_step.checkpoint.load import FoundCheckpoint
from megatron_step.checkpoint.sharding import sharded_weights
from megatron_step.config.model import ModelConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.growth.whole_model import whole_model
from megatron_step.huggingface.architectures import model_config
from megatron_step.huggingface.reference import reference_logits
from megatron_step.huggingface.saved_weights import SavedWeights
from megatron_step.huggingface.transformers_model import load_in_transformers
from megatron_step.plan.names import factor_keys

_SEQUENCES, _LONGEST = 2, 128
_RATIO = 8.0  # K above: right models of 2 to 30 layers stay below 2
_FLOOR = 4 * torch.finfo(torch.float32).eps  # of the largest logit: below it a model is as good as exact

Logits = Callable[[Tensor], Tensor]
"""From tokens [b, s] to logits [b, s, v or more]."""


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two models are from each other, and from those in fp64."""

    max_difference: float
    """Largest difference of two logits."""
    mean_difference: float
    """Mean difference of two logits."""
    largest_logit: float
    """Largest magnitude of the trained model's."""
    agreement: float
    """Share of the positions at which both hold the same token for the likeliest."""
    trained_error: float
    """Root mean square difference of the trained model's logits from those in fp64."""
    exported_error: float
    """The same of the exported model's."""

    def __str__(self) -> str:
        return (
            f"logits up to {self.largest_logit:.4g} differ by {self.max_difference:.2e} at most, "
            f"{self.mean_difference:.2e} on average; their errors against fp64 are {self.exported_error:.2e} "
            f"(exported) and {self.trained_error:.2e} (trained); top-1 agreement {100 * self.agreement:.2f} %"
        )

    @property
    def is_within_rounding(self) -> bool:
        """Whether rounding in fp32 explains the errors; a part that is wrong makes one of them much larger."""
        floor = _FLOOR * self.largest_logit
        return self.trained_error <= _RATIO * max(self.exported_error, floor) and (
            self.exported_error <= _RATIO * max(self.trained_error, floor)
        )


def logits_of(model: Logits, tokens: Tensor, vocab_size: int) -> Tensor:
    """Logits [b, s, v] on the CPU, a sequence at a time."""
    with torch.no_grad():
        return torch.cat([model(one[None])[..., :vocab_size].cpu() for one in tokens])


def compare_logits(trained: Tensor, exported: Tensor, exact: Tensor) -> Comparison:
    """Compare logits [b, s, v] of two models, and those of the formula in fp64."""
    difference = (trained.double() - exported.double()).abs()
    return Comparison(
        float(difference.max()),
        float(difference.mean()),
        float(trained.abs().max()),
        float((trained.argmax(-1) == exported.argmax(-1)).double().mean()),
        *(float((one.double() - exact).square().mean().sqrt()) for one in (trained, exported)),
    )


def compare(
    found: FoundCheckpoint,
    saved: SavedWeights,
    folder: Path,
    adapter: Path | None,
    dtype: torch.dtype,
    seq_length: int,
    parallel: Parallel,
) -> Comparison:
    """Compare the model of a checkpoint, its weights rounded to `dtype`, with the exported one in `folder`, with or
    without a PEFT adapter. One model at a time is in memory."""
    vocab_size = found.manifest.vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (_SEQUENCES, min(seq_length, _LONGEST)), generator=generator)
    tokens = tokens.to(parallel.device)
    exact = logits_of(lambda one: reference_logits(folder, adapter, one), tokens, vocab_size)
    exported = logits_of(exported_model(folder, adapter, parallel.device), tokens, vocab_size)
    trained = logits_of(trained_model(found, saved, adapter is not None, dtype, parallel), tokens, vocab_size)
    return compare_logits(trained, exported, exact)


def exported_model(folder: Path, adapter: Path | None, device: torch.device) -> Logits:
    """The model in `folder` in transformers, in fp32, with the adapter in its folder in peft, if there is one."""
    model = load_in_transformers(folder, torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model = model.to(device).eval()
    return lambda tokens: model(tokens, use_cache=False).logits


def trained_model(
    found: FoundCheckpoint, saved: SavedWeights, is_apart: bool, dtype: torch.dtype, parallel: Parallel
) -> Logits:
    """The checkpoint's model in fp32, its weights rounded to `dtype`: merged ones, or each factor of an adapter."""
    model = whole_model(found, "fp32", parallel)
    for shard in sharded_weights([model], parallel).values():
        key, live = shard.key, shard.data.data
        if key not in saved.adapted:
            live.copy_(live.to(dtype))
        elif is_apart:
            weight, a, b = (tensor.to(dtype).double() for tensor in saved.read([key, *factor_keys(key)]).values())
            live.copy_(weight.addmm_(b, a, alpha=saved.scaling))
        else:
            live.copy_(saved.read_merged([key])[key].to(dtype))
    return lambda tokens: model(input_ids=tokens, position_ids=None, attention_mask=None)


def wrong_setting(folder: Path, model: ModelConfig, vocab_size: int) -> str | None:
    """What the config.json in `folder` says otherwise than the trained model; None if nothing."""
    written = model_config(folder, model.seq_length)
    for name in _SETTINGS:
        found, trained = (getattr(one, name) for one in (written, model))
        if found != trained:
            return f"its config.json gives {name} {found}, not {trained}"
    if written.vocab_size != vocab_size:
        return f"its config.json gives vocab_size {written.vocab_size}, not {vocab_size}"
    if written.rope_scaling.factor != model.rope_scaling.factor or (
        model.rope_scaling.factor > 1.0 and written.rope_scaling != model.rope_scaling
    ):
        return f"its config.json gives {written.rope_scaling}, not {model.rope_scaling}"
    return None


_SETTINGS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "query_groups", "attention_head_size"),
    *("tie_embeddings", "qkv_bias", "qk_norm", "norm_epsilon", "rope_theta"),
)
