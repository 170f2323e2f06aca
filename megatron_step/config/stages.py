"""How a model grows: its stages, the growth operator, what is frozen, and the adapters on what is frozen."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_step.config.numbers import check_finite
from megatron_step.config.paths import expand_path

Target = Literal["qkv", "proj", "fc1", "fc2"]
"""A linear of a layer: query, key and value; attention projection; gate and up; down."""


@dataclass(frozen=True)
class StagesConfig:
    """The growth stages of the run. Each adds layers, and trains them with what is not frozen."""

    steps: int | list[int] | None = None
    """Optimizer steps that the schedule of each stage is laid out for: one number for all, or one for each."""
    tokens: int | list[int] | None = None
    """The same in tokens, in place of `steps`; rounded up to whole steps."""
    count: int = 1
    """Growth stages; 1 is ordinary (vanilla) training."""
    layers: Literal["auto"] | list[int] = "auto"
    """Layers that each stage adds, as [5, 4, 3]; auto lets the planner choose those of the smallest peak memory."""
    grow_at: float = 0.75
    """Share of a stage's steps after which the model grows; the last stage trains them all."""
    learning_rates: list[float] | None = None
    """Peak learning rate of each stage; null for optimizer.learning_rate in all."""
    layouts: Literal["auto", "even"] | list[list[int]] = "auto"
    """For each stage, the layers of each pipeline rank (with virtual pipelines of each chunk, in the order of the
    layers); auto lets the planner choose those of the smallest peak memory, even spreads them evenly."""
    start_from: str | None = None
    """Checkpoint whose weights the first stage begins with; null for random weights."""

    def __post_init__(self) -> None:
        check_finite("stages", self)
        if self.count < 1:
            raise ValueError(f"stages.count must be at least 1, not {self.count}")
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("set one of stages.steps and stages.tokens, and not both")
        self._check_budgets()
        if self.start_from is not None:
            object.__setattr__(self, "start_from", expand_path(self.start_from))
        if not 0 < self.grow_at <= 1:
            raise ValueError(f"stages.grow_at must lie in (0, 1], not {self.grow_at}")
        for name in ("layers", "learning_rates", "layouts"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != self.count:
                raise ValueError(f"stages.{name} has {len(values)} entries for stages.count {self.count}")
        if isinstance(self.layers, list) and (self.layers[0] < 1 or min(self.layers) < 0):
            raise ValueError(f"stages.layers {self.layers}: the first stage needs a layer, and no stage removes any")
        if self.learning_rates is not None and not min(self.learning_rates) > 0:
            raise ValueError(f"stages.learning_rates must be positive, not {self.learning_rates}")

    def _check_budgets(self) -> None:
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.count:
                raise ValueError(f"stages.{name} has {len(value)} entries for stages.count {self.count}")
            budgets = value if isinstance(value, list) else [value]
            # A first stage of no steps is a model that was trained before.
            first_may_be_zero = self.start_from is not None and self.count > 1 and isinstance(value, list)
            for index, budget in enumerate(budgets):
                if budget is not None and budget < (0 if index == 0 and first_may_be_zero else 1):
                    raise ValueError(f"stages.{name} must be at least 1, not {budget}")


@dataclass(frozen=True)
class GrowthConfig:
    """The growth operator: where new layers come, and what weights they begin with."""

    operator: str = "interpolate"
    """interpolate puts new layers between old ones (Chang et al., 2018); stack repeats the whole model on top of
    itself (G_stack, Du et al., 2024); or the name of a registered operator (plan/operators.py)."""
    position: Literal["upper", "intermediate", "lower", "random"] = "upper"
    """Between which old layers interpolate puts new ones first: the upper ones, those in the middle, the lower ones,
    or any."""
    init: Literal["mean", "copy", "identity", "random"] = "mean"
    """Weights of a new layer: the mean of its two neighbours (STEP), a copy of the layer below it, that copy with its
    two output projections zero, which keeps the model's function (LLaMA Pro, Wu et al., 2024), or random ones."""


@dataclass(frozen=True)
class FreezeConfig:
    """What is no longer trained once the model has grown; frozen weights have no gradient and no optimizer state."""

    layers: bool = True
    """The matrices and biases of the layers of earlier stages."""
    norms: bool = False
    """Their norms."""
    embedding: bool = False
    """The token embedding (and with it a tied output layer)."""
    output_layer: bool = False
    """The output layer, where it has its own weights."""
    final_norm: bool = False
    """The norm before the output layer."""


@dataclass(frozen=True)
class OldLayersConfig:
    """What happens to the layers of earlier stages once the model has grown."""

    policy: str | None = None
    """frozen, adapters, trained, or the name of a registered policy (plan/old_layers.py). null follows the other keys:
    trained if freeze.layers is false, frozen if adapter.rank is 0, otherwise adapters."""


def old_layer_policy(policy: str | None, freezes_layers: bool, adapter_rank: int) -> str:
    """Return the name of the policy for old layers, from old_layers.policy, freeze.layers and adapter.rank."""
    if policy is not None:
        return policy
    if not freezes_layers:
        return "trained"
    return "adapters" if adapter_rank else "frozen"


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters on the frozen linears (LoRA, Hu et al., 2022): y = x W^T + alpha / rank (drop(x) A^T) B^T."""

    rank: int = 16
    """Rows of A and columns of B; 0 for no adapters."""
    alpha: float = 32.0
    """Numerator of the scaling alpha / rank."""
    targets: list[Target] = field(default_factory=lambda: ["qkv", "proj", "fc1", "fc2"])
    """Linears that get an adapter."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are set to zero in training."""
    restart_interval: int = 0
    """Steps between restarts: adapters are merged into the base and start again (ReLoRA, Lialin et al., 2023); 0 for
    none."""
    restart_prune: float = 0.9
    """Share of the adapters' optimizer states, the smallest ones, that a restart sets to zero."""
    at_stage_end: Literal["merge", "keep"] = "merge"
    """Whether adapters are merged into the base when the model grows, or go on training."""

    def __post_init__(self) -> None:
        check_finite("adapter", self)
        if self.rank < 0:
            raise ValueError(f"adapter.rank must not be negative, not {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"adapter.alpha must be positive, not {self.alpha}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"adapter.targets must name linears, each once, not {self.targets}; rank 0 is for none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout must lie in [0, 1), not {self.dropout}")
        if self.restart_interval < 0:
            raise ValueError(f"adapter.restart_interval must not be negative, not {self.restart_interval}")
        if not 0 <= self.restart_prune <= 1:
            raise ValueError(f"adapter.restart_prune must lie in [0, 1], not {self.restart_prune}")

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / self.rank
