"""The growth of a model: its stages, the growth operator, frozen weights, and the adapters on them."""

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_step.config.counts import counted
from megatron_step.config.numbers import check_finite
from megatron_step.config.paths import expand_path

Target = Literal["qkv", "proj", "fc1", "fc2"]
"""A linear of a layer: qkv is query, key and value; proj the attention projection; fc1 gate and up; fc2 down."""

_LAST_SHARE = 0.4
"""Share of a run that its last stage trains by default."""


@dataclass(frozen=True)
class StagesConfig:
    """The growth stages of the run. Each stage adds layers, and trains all weights that are not frozen."""

    steps: int | list[int] | None = None
    """Optimizer steps of each stage's schedule: one number for all stages, or a list with one per stage. With `shares`,
    optimizer steps of the whole run: one number."""
    tokens: int | list[int] | None = None
    """Tokens of each stage's schedule, in place of `steps`; rounded up to whole steps."""
    count: int = 1
    """Growth stages; 1 is ordinary (vanilla) training."""
    layers: Literal["auto"] | list[int] = "auto"
    """Layers that each stage adds, such as [5, 4, 3]; with auto the planner chooses the plan of least peak memory."""
    grow_at: float | list[float] = 0.75
    """Share of a stage's steps after which the model grows; the last stage runs all its steps. One number for all
    stages, or a list with one per stage but the last."""
    shares: Literal["auto"] | list[float] | None = None
    """Share of the run's steps that each stage trains, such as [0.3, 0.3, 0.4], in place of `grow_at`. auto: 0.4 for
    the last stage, and equal shares of the rest for the others."""
    learning_rates: list[float] | None = None
    """Peak learning rate of each stage; null for optimizer.learning_rate in every stage."""
    layouts: Literal["auto", "even"] | list[list[int]] = "auto"
    """For each stage, the number of layers on each pipeline rank; with virtual pipelines, in each chunk in layer order.
    With auto the planner chooses the layout of least peak memory; even splits the layers evenly."""
    start_from: str | None = None
    """Checkpoint whose weights the first stage starts from; null for random weights."""

    def __post_init__(self) -> None:
        check_finite("stages", self)
        if self.count < 1:
            raise ValueError(f"stages.count must be at least 1, not {self.count}")
        if (self.steps is None) == (self.tokens is None):
            state = (
                "neither stages.steps nor stages.tokens is set"
                if self.steps is None
                else ("stages.steps and stages.tokens are both set")
            )
            raise ValueError(f"{state}: set one of them")
        self._check_budgets()
        if self.start_from is not None:
            object.__setattr__(self, "start_from", expand_path(self.start_from))
        self._check_growth_times()
        for name in ("layers", "learning_rates", "layouts"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != self.count:
                raise ValueError(
                    f"stages.{name} has {counted(len(values), 'entry', 'entries')}, but stages.count is {self.count}"
                )
        if isinstance(self.layers, list) and (self.layers[0] < 1 or min(self.layers) < 0):
            raise ValueError(
                f"stages.layers is {self.layers}: the first entry must be at least 1, and the others at least 0"
            )
        if self.learning_rates is not None and not min(self.learning_rates) > 0:
            raise ValueError(f"stages.learning_rates must be positive, not {self.learning_rates}")

    @property
    def run_shares(self) -> list[float] | None:
        """The share of the run's steps that each stage trains; None if `grow_at` says when the model grows."""
        if self.shares != "auto":
            return self.shares
        others = self.count - 1
        return [*[(1 - _LAST_SHARE) / others] * others, _LAST_SHARE] if others else [1.0]

    @property
    def growth_times(self) -> list[float]:
        """The share of each stage's steps after which it ends."""
        if self.shares is not None:
            return [1.0] * self.count
        return [*self.grow_at, 1.0] if isinstance(self.grow_at, list) else [self.grow_at] * (self.count - 1) + [1.0]

    def with_count(self, count: int) -> "StagesConfig":
        """Return this section with another number of stages, whose layers and layouts the planner chooses."""
        shares: Literal["auto"] | None = None if self.shares is None else "auto"
        return replace(self, count=count, layers="auto", layouts="auto", shares=shares)

    def _check_growth_times(self) -> None:
        if self.shares is not None:
            self._check_shares()
        elif isinstance(self.grow_at, list) and len(self.grow_at) != self.count - 1:
            raise ValueError(
                f"stages.grow_at has {counted(len(self.grow_at), 'entry', 'entries')}, but the model grows "
                f"{counted(self.count - 1, 'time')} (stages.count {self.count})"
            )
        elif not all(0 < time <= 1 for time in ([*self.grow_at] if isinstance(self.grow_at, list) else [self.grow_at])):
            raise ValueError(f"stages.grow_at must lie in (0, 1], not {self.grow_at}")

    def _check_shares(self) -> None:
        shares = self.run_shares
        assert shares is not None
        if len(shares) != self.count:
            raise ValueError(
                f"stages.shares has {counted(len(shares), 'entry', 'entries')}, but stages.count is {self.count}"
            )
        if isinstance(self.steps, list) or isinstance(self.tokens, list):
            key = "steps" if isinstance(self.steps, list) else "tokens"
            raise ValueError(
                f"stages.shares divides the whole run, but stages.{key} is a list for its stages: set stages.{key} to "
                f"one number, the {key} of the run, or leave stages.shares out"
            )
        if self.grow_at != StagesConfig.grow_at:
            raise ValueError(
                "stages.shares and stages.grow_at both say when the model grows: leave one of the two keys out"
            )
        trained = shares[1:] if self.may_begin_trained and shares[0] == 0 else shares
        if not min(trained) > 0:
            raise ValueError(f"stages.shares must be positive, not {shares}")
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"stages.shares {shares} add up to {sum(shares):g}: make them add up to 1")

    @property
    def may_begin_trained(self) -> bool:
        """Whether the first stage may take no step: it is then a model that an earlier run trained."""
        return self.start_from is not None and self.count > 1

    def _check_budgets(self) -> None:
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.count:
                raise ValueError(
                    f"stages.{name} has {counted(len(value), 'entry', 'entries')}, but stages.count is {self.count}"
                )
            budgets = value if isinstance(value, list) else [value]
            first_may_be_zero = self.may_begin_trained and isinstance(value, list)
            for index, budget in enumerate(budgets):
                if budget is not None and budget < (0 if index == 0 and first_may_be_zero else 1):
                    raise ValueError(f"stages.{name} must be at least 1, not {budget}")


@dataclass(frozen=True)
class GrowthConfig:
    """The growth operator: the places of new layers and their initial weights."""

    operator: str = "interpolate"
    """Growth operator. interpolate puts new layers between old ones (Chang et al., 2018); stack repeats the whole model
    on top of itself (G_stack, Du et al., 2024). Plugins may register others (plan/operators.py)."""
    position: Literal["upper", "intermediate", "lower", "random"] = "upper"
    """Old layers between which interpolate puts new ones first: the upper, the middle, the lower or random ones."""
    init: Literal["mean", "copy", "identity", "random"] = "mean"
    """Weights of a new layer. mean: the mean of its two neighbours (STEP). copy: the layer below it. identity: the
    layer below it with both output projections zero, which preserves the function (LLaMA Pro, Wu et al., 2024).
    random: random weights."""


@dataclass(frozen=True)
class FreezeConfig:
    """The weights that are frozen after growth: frozen weights have no gradient and no optimizer state."""

    layers: bool = True
    """Whether the matrices and biases of earlier stages' layers are frozen."""
    norms: bool = False
    """Whether the norms of earlier stages' layers are frozen."""
    embedding: bool = False
    """Whether the token embedding (and a tied output layer) is frozen."""
    output_layer: bool = False
    """Whether an untied output layer is frozen."""
    final_norm: bool = False
    """Whether the norm before the output layer is frozen."""


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
    """Low-rank adapters on frozen linears (LoRA, Hu et al., 2022): y = x W^T + alpha / rank (drop(x) A^T) B^T."""

    rank: int = 16
    """Rows of A and columns of B; 0 for no adapters."""
    alpha: float = 32.0
    """Numerator of the scaling alpha / rank."""
    targets: list[Target] = field(default_factory=lambda: ["qkv", "proj", "fc1", "fc2"])
    """Linears that get an adapter."""
    dropout: float = 0.0
    """Share of the adapter's inputs that training sets to zero."""
    restart_interval: int = 0
    """Steps between restarts, which merge adapters into the base and reset them (ReLoRA, Lialin et al., 2023); 0 for
    none."""
    restart_prune: float = 0.9
    """Share of the adapters' optimizer states, by smallest magnitude, that a restart sets to zero."""
    at_stage_end: Literal["merge", "keep"] = "merge"
    """Fate of the adapters when the model grows: merge adds them to the base; keep trains them further."""

    def __post_init__(self) -> None:
        check_finite("adapter", self)
        if self.rank < 0:
            raise ValueError(f"adapter.rank must be at least 0, not {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"adapter.alpha must be positive, not {self.alpha}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"adapter.targets is {self.targets}: name at least one linear, each once; for no adapters set "
                "adapter.rank to 0"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout must lie in [0, 1), not {self.dropout}")
        if self.restart_interval < 0:
            raise ValueError(f"adapter.restart_interval must be at least 0, not {self.restart_interval}")
        if not 0 <= self.restart_prune <= 1:
            raise ValueError(f"adapter.restart_prune must lie in [0, 1], not {self.restart_prune}")

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output, alpha / rank."""
        return self.alpha / self.rank
