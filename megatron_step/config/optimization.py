"""The optimizer, AdamW or Muon, and the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from megatron_step.config.numbers import check_finite

StatesRecipe = Literal["full", "exact", "compact", "smallest"]
Rule = Literal["adamw", "muon"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), or Muon (Jordan et al., 2024) with it; norms and
    biases do not decay."""

    learning_rate: float
    """Peak learning rate."""
    rule: Rule = "adamw"
    """How weights are updated. muon: Muon trains the matrices of layers; AdamW trains embedding, output layer, norms,
    biases and adapters. One learning rate fits both."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    weight_decay: float = 0.1
    """Decay of every weight matrix and embedding, as a multiple of the learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1.0e-8
    """Number added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    new_layers_scale: float = 1.0
    """Learning rate of the layers that a stage after the first adds, as a multiple of the schedule's."""
    adapters_scale: float = 1.0
    """Learning rate of the adapters, as a multiple of the schedule's."""
    embeddings_scale: float = 1.0
    """Learning rate of the embedding and the output layer, as a multiple of the schedule's."""
    states: StatesRecipe = "full"
    """Recipe of the states beside bf16 weights (docs/states.md). full: fp32 main weights and moments. exact: the same
    numbers in 2 bytes less. compact: 8-bit moments. smallest: 8-bit moments, and weights that are rounded
    stochastically instead of main weights."""
    gradients: Literal["fp32", "bf16"] | None = None
    """Number format of the gradient buffers; null for fp32 with full and exact, bf16 with compact and smallest."""
    correction_bits: Literal[16, 8] = 16
    """Bits that compact keeps beside a bf16 weight: 16 for the whole fp32 main weight, 8 for 24 of its 32 bits."""
    momentum_bits: Literal[16, 8] = 8
    """Bits of Muon's momentum with compact and smallest: 8, or 16 for bf16."""

    def __post_init__(self) -> None:
        check_finite("optimizer", self)
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        for name in ("weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must not be negative, not {getattr(self, name)}")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("new_layers_scale", "adapters_scale", "embeddings_scale", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} must be positive, not {getattr(self, name)}")
        if self.correction_bits == 8 and self.states != "compact":
            raise ValueError(
                f"optimizer.correction_bits 8 is for optimizer.states compact, not {self.states}: set it to 16"
            )
        if self.momentum_bits == 16 and (self.rule != "muon" or self.states not in ("compact", "smallest")):
            raise ValueError(
                "optimizer.momentum_bits 16 is for optimizer.rule muon with optimizer.states compact or smallest, not "
                f"for {self.rule} with {self.states}: set it to 8"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    scope: Literal["stage", "run"] = "stage"
    """Steps that the schedule spans. stage: it starts again in each stage (STEP). run: it spans all stages, so that the
    decay is as long as in ordinary training; after growth only new weights warm up."""
    kind: Literal["constant", "cosine", "wsd"] = "wsd"
    """After the warm-up: constant; cosine decay; or warm-up, stable, decay (WSD, Hu et al., 2024)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero, in the first stage."""
    rewarm_steps: int = 0
    """Steps of linear warm-up in every later stage, and after each restart of the adapters. With scope run only new
    layers and adapters warm up then."""
    decay_fraction: float = 0.2
    """Share of the schedule's steps, at its end, over which WSD decays."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of WSD's decay; sqrt is 1 - sqrt(x) (Hagele et al., 2024)."""
    min_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        check_finite("schedule", self)
        for name in ("warmup_steps", "rewarm_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must not be negative, not {getattr(self, name)}")
        for name in ("decay_fraction", "min_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name} must lie in [0, 1], not {getattr(self, name)}")
