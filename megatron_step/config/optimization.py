"""How the weights are updated: AdamW and the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from megatron_step.config.numbers import check_finite


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019); none on norms and biases."""

    learning_rate: float
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decay, as a multiple of the learning rate, of every weight matrix and embedding."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1.0e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    new_layers_scale: float = 1.0
    """Learning rate of the layers that a stage adds, as a multiple of the others'; not of the first stage's."""
    adapters_scale: float = 1.0
    """Learning rate of the adapters, as a multiple of the others'."""
    embeddings_scale: float = 1.0
    """Learning rate of the embedding and the output layer, as a multiple of the others'."""

    def __post_init__(self) -> None:
        check_finite("optimizer", self)
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        if self.weight_decay < 0 or self.clip_grad < 0:
            raise ValueError("optimizer.weight_decay and optimizer.clip_grad must not be negative")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("optimizer.beta1 and optimizer.beta2 must lie in [0, 1)")
        if min(self.new_layers_scale, self.adapters_scale, self.embeddings_scale) <= 0:
            raise ValueError("optimizer.new_layers_scale, adapters_scale and embeddings_scale must be positive")
        if self.epsilon <= 0:
            raise ValueError("optimizer.epsilon must be positive")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step; it starts again in each stage."""

    kind: Literal["constant", "cosine", "wsd"] = "wsd"
    """After the warm-up: constant; cosine decay; or warm-up, stable, decay (WSD, Hu et al., 2024)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero, in the first stage."""
    rewarm_steps: int = 0
    """The same in every stage after growth, and after each restart of the adapters."""
    decay_fraction: float = 0.2
    """Share of a stage's steps, at the end, over which WSD decays."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of WSD's decay; sqrt is 1 - sqrt(x) (Hagele et al., 2024)."""
    min_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        check_finite("schedule", self)
        if self.warmup_steps < 0 or self.rewarm_steps < 0:
            raise ValueError("schedule.warmup_steps and schedule.rewarm_steps must not be negative")
        if not (0 <= self.decay_fraction <= 1 and 0 <= self.min_fraction <= 1):
            raise ValueError("schedule.decay_fraction and schedule.min_fraction must lie in [0, 1]")
