"""How the weights are updated: AdamW and the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal


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

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        if self.weight_decay < 0 or self.clip_grad < 0:
            raise ValueError("optimizer.weight_decay and optimizer.clip_grad must not be negative")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("optimizer.beta1 and optimizer.beta2 must lie in [0, 1)")
        if self.epsilon <= 0:
            raise ValueError("optimizer.epsilon must be positive")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    kind: Literal["constant", "cosine", "wsd"] = "wsd"
    """After the warm-up: constant; cosine decay; or warm-up, stable, decay (WSD, Hu et al., 2024)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    decay_fraction: float = 0.2
    """Share of all steps, at the end, over which WSD decays."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of WSD's decay; sqrt is 1 - sqrt(x) (Hagele et al., 2024)."""
    min_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError("schedule.warmup_steps must not be negative")
        if not (0 <= self.decay_fraction <= 1 and 0 <= self.min_fraction <= 1):
            raise ValueError("schedule.decay_fraction and schedule.min_fraction must lie in [0, 1]")
