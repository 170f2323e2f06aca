"""Compare an exported model in transformers with the trained model: tensors, config and logits.

Every weight must equal the trained one, and config.json must describe the trained model. Then both implementations
compute logits in fp32 from the same weights, and a formula computes them in fp64. Two correct implementations have
similar rounding errors against fp64, whatever the depth, the width and the weights; a wrong one has a much larger
error. With e_t and e_x the root mean square errors of the trained and the exported model:

    e_t <= K max(e_x, floor)   and   e_x <= K max(e_t, floor)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_step.checkpoint.load import FoundCheckpoint
from megatron_step.config.model import ModelConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.growth.whole_model import whole_model
from megatron_step.huggingface.architectures import model_config
from megatron_step.huggingface.reference import reference_logits
from megatron_step.huggingface.saved_weights import SavedWeights
from megatron_step.huggingface.transformers_model import load_in_transformers
from megatron_step.model.build import sharded_weights
from megatron_step.plan.names import factor_keys

_SEQUENCES, _LONGEST = 2, 128
_RATIO = 8.0  # K in the formula: for correct models of 2 to 30 layers the ratio stays below 2
_FLOOR = 4 * torch.finfo(torch.float32).eps  # share of the largest logit: a smaller error counts as exact

Logits = Callable[[Tensor], Tensor]
"""A function from tokens [b, s] to logits [b, s, v or more]."""


@dataclass(frozen=True)
class Comparison:
    """Differences between the logits of two models, and their errors against fp64."""

    max_difference: float
    """Largest difference between the two models' logits."""
    mean_difference: float
    """Mean difference between the two models' logits."""
    largest_logit: float
    """Largest magnitude of the trained model's logits."""
    agreement: float
    """Share of positions at which both models predict the same token."""
    trained_error: float
    """Root mean square error of the trained model's logits against fp64."""
    exported_error: float
    """Root mean square error of the exported model's logits against fp64."""

    def __str__(self) -> str:
        return (
            f"logits up to {self.largest_logit:.4g} differ by {self.max_difference:.2e} at most, "
            f"{self.mean_difference:.2e} on average; their errors against fp64 are {self.exported_error:.2e} "
            f"(exported) and {self.trained_error:.2e} (trained); top-1 agreement {100 * self.agreement:.2f} %"
        )

    @property
    def is_within_rounding(self) -> bool:
        """Return whether rounding in fp32 explains the errors; in a wrong model one error is much larger."""
        floor = _FLOOR * self.largest_logit
        return self.trained_error <= _RATIO * max(self.exported_error, floor) and (
            self.exported_error <= _RATIO * max(self.trained_error, floor)
        )


def logits_of(model: Logits, tokens: Tensor, vocab_size: int) -> Tensor:
    """Compute logits [b, s, v], one sequence at a time, and return them on the CPU."""
    with torch.no_grad():
        return torch.cat([model(one[None])[..., :vocab_size].cpu() for one in tokens])


def compare_logits(trained: Tensor, exported: Tensor, exact: Tensor) -> Comparison:
    """Compare the logits [b, s, v] of two models with each other and with the formula's in fp64."""
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
    """Compare a checkpoint's model, its weights rounded to `dtype`, with the export in `folder` and its PEFT adapter.

    `adapter` is the adapter's folder, or None. One model at a time is in memory.
    """
    vocab_size = found.manifest.vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (_SEQUENCES, min(seq_length, _LONGEST)), generator=generator)
    tokens = tokens.to(parallel.device)
    exact = logits_of(lambda one: reference_logits(folder, adapter, one), tokens, vocab_size)
    exported = logits_of(exported_model(folder, adapter, parallel.device), tokens, vocab_size)
    trained = logits_of(trained_model(found, saved, adapter is not None, dtype, parallel), tokens, vocab_size)
    return compare_logits(trained, exported, exact)


def exported_model(folder: Path, adapter: Path | None, device: torch.device) -> Logits:
    """Load the model in `folder` with transformers in fp32, and the adapter, if there is one, with peft."""
    model = load_in_transformers(folder, torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model = model.to(device).eval()
    return lambda tokens: model(tokens, use_cache=False).logits


def trained_model(
    found: FoundCheckpoint, saved: SavedWeights, is_apart: bool, dtype: torch.dtype, parallel: Parallel
) -> Logits:
    """Load the checkpoint's model in fp32, with weights rounded to `dtype` as the export rounds them.

    The export rounds a merged weight; with `is_apart` it rounds the base weight and both factors of the adapter.
    """
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
    """Describe the first setting in `folder`'s config.json that differs from the trained model's; None if none does."""
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
