"""The config of a run: one frozen value that is checked when it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from megatron_step.config.cluster import PlannerConfig
from megatron_step.config.counts import counted
from megatron_step.config.data import DataConfig
from megatron_step.config.model import ModelConfig
from megatron_step.config.numbers import check_seed, nearest, remedy
from megatron_step.config.optimization import OptimizerConfig, ScheduleConfig
from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.paths import expand_path
from megatron_step.config.presets import Preset, preset_values
from megatron_step.config.sections import as_section, default_section, merged, section_keys
from megatron_step.config.stages import (
    AdapterConfig,
    FreezeConfig,
    GrowthConfig,
    OldLayersConfig,
    StagesConfig,
    old_layer_policy,
)


@dataclass(frozen=True)
class RampUpConfig:
    """Growth of the global batch over the first samples of the run (Megatron's batch-size ramp-up)."""

    start: int
    """Global batch size of the first step, in samples."""
    increment: int
    """Samples that each increase adds to the global batch."""
    samples: int
    """Samples after which the global batch has its full size."""

    def __post_init__(self) -> None:
        for name in ("start", "increment", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.ramp_up.{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class TrainingConfig:
    """The batch, the number format and the seed."""

    global_batch_size: int
    """Samples of one optimizer step, over all ranks."""
    micro_batch_size: int
    """Samples that a rank processes at once."""
    ramp_up: RampUpConfig | None = None
    """Growth of the global batch at the start; null for a constant batch."""
    precision: Literal["bf16", "bf16_weights", "fp32"] = "bf16"
    """Number format of weights and activations. bf16 keeps fp32 main weights and gradients; bf16_weights does as well,
    and has activations and all arithmetic in fp32, for CPUs without bf16 instructions."""
    seed: int = 1
    """Seed of the initial weights and of dropout."""

    def __post_init__(self) -> None:
        check_seed("training.seed", self.seed)
        for name in ("global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, not {getattr(self, name)}")
        if self.ramp_up is not None:
            growth = self.global_batch_size - self.ramp_up.start
            if growth < 0 or growth % self.ramp_up.increment:
                increments = nearest(self.ramp_up.increment, lambda size: growth > 0 and growth % size == 0)
                raise ValueError(
                    f"training.ramp_up must reach training.global_batch_size {self.global_batch_size} from "
                    f"{self.ramp_up.start} in increments of {self.ramp_up.increment}: "
                    + remedy(("training.ramp_up.increment", increments))
                )

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every global batch size that the run uses, in order."""
        if self.ramp_up is None:
            return (self.global_batch_size,)
        return tuple(range(self.ramp_up.start, self.global_batch_size + 1, self.ramp_up.increment))


@dataclass(frozen=True)
class EvaluationConfig:
    """Interval and size of the evaluations on validation text."""

    interval: int = 100
    """Steps between evaluations; 0 evaluates only at the end of the run."""
    steps: int = 20
    """Global batches of the fixed validation set; 0 never evaluates."""

    def __post_init__(self) -> None:
        for name in ("interval", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name} must be at least 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class CheckpointConfig:
    """Interval of the checkpoints, and which of them are kept."""

    interval: int = 100
    """Steps between checkpoints; 0 saves only at the end of the run."""
    keep: int = 3
    """Number of newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Steps between checkpoints that are never deleted; 0 for none."""
    asynchronous: bool = False
    """Whether a checkpoint is written while training continues."""
    resume: str = "auto"
    """`auto` for the newest complete checkpoint of the output folder, `none` for a fresh start, or a path."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name} must be at least 0, not {getattr(self, name)}")
        if not self.resume:
            raise ValueError("checkpoint.resume is empty: set it to auto, none or the path of a checkpoint")
        object.__setattr__(self, "resume", expand_path(self.resume))


@dataclass(frozen=True)
class LoggingConfig:
    """Logs of a run; metrics.jsonl is always written."""

    interval: int = 10
    """Steps between log lines, TensorBoard points and memory readings."""
    tensorboard: bool = True
    """Whether to write TensorBoard events to OUTPUT_DIR/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project to log to; null for none."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"logging.interval must be at least 1, not {self.interval}")
        if self.wandb is not None and (not 1 <= len(self.wandb) <= 128 or set(self.wandb) & set("/\\#?%:")):
            raise ValueError(
                f"logging.wandb {self.wandb!r} is not a valid name of a Weights & Biases project: "
                "take 1 to 128 characters without / \\ # ? % :"
            )


@dataclass(frozen=True)
class RunConfig:
    """The config of a run. A section may be a dict: `RunConfig(model={"num_layers": 4, ...}, ...)`.

    Raises ValueError if a value is not valid, or if values do not fit together.
    """

    output_dir: str
    """Folder of the run: its config, metrics, checkpoints and TensorBoard events."""
    model: ModelConfig
    """The shape of the model."""
    data: DataConfig
    """The text and the tokenizer."""
    stages: StagesConfig
    """The growth stages."""
    optimizer: OptimizerConfig
    """The optimizer."""
    training: TrainingConfig
    """The batch, the precision and the seed."""
    schedule: ScheduleConfig = field(default_factory=partial(default_section, ScheduleConfig))
    """The learning rate over the steps of a stage or of the run."""
    growth: GrowthConfig = field(default_factory=partial(default_section, GrowthConfig))
    """The growth operator."""
    freeze: FreezeConfig = field(default_factory=partial(default_section, FreezeConfig))
    """The weights that are frozen after growth."""
    old_layers: OldLayersConfig = field(default_factory=partial(default_section, OldLayersConfig))
    """The policy for the layers of earlier stages."""
    adapter: AdapterConfig = field(default_factory=partial(default_section, AdapterConfig))
    """The adapters on frozen linears."""
    parallel: ParallelConfig = field(default_factory=partial(default_section, ParallelConfig))
    """The layout of the model over ranks."""
    planner: PlannerConfig = field(default_factory=partial(default_section, PlannerConfig))
    """The planner, which chooses each stage's layers and their layout."""
    evaluation: EvaluationConfig = field(default_factory=partial(default_section, EvaluationConfig))
    """The evaluation on validation text."""
    checkpoint: CheckpointConfig = field(default_factory=partial(default_section, CheckpointConfig))
    """The checkpoints, and how to resume."""
    logging: LoggingConfig = field(default_factory=partial(default_section, LoggingConfig))
    """The logs of the run."""
    preset: Preset | None = None
    """Named set of keys, which keys of this config replace (docs/recipes.md); null for none."""
    plugins: list[str] = field(default_factory=list)
    """Modules outside the package, as in [my_plugin], that add hooks, trackers, growth operators and policies for old
    layers."""

    @property
    def old_layer_policy(self) -> str:
        """Name of the policy for the layers of earlier stages."""
        return old_layer_policy(self.old_layers.policy, self.freeze.layers, self.adapter.rank)

    def _make_sections(self) -> None:
        """Make sections from dicts; the preset's values are in sections that are dicts or left out."""
        preset = preset_values(self.preset, vars(self))
        for name, key in section_keys(RunConfig).items():
            given, values = getattr(self, name), preset.get(name, {})
            if isinstance(given, Mapping):
                object.__setattr__(self, name, as_section(merged(values, given), key.kind, f"{name}."))
            elif values and given is key.default:  # left out
                object.__setattr__(self, name, as_section(values, key.kind, f"{name}."))

    def __post_init__(self) -> None:
        self._make_sections()
        if not self.output_dir:
            raise ValueError("output_dir is empty: name the folder of the run")
        object.__setattr__(self, "output_dir", expand_path(self.output_dir))
        _check_splits(self.model, self.parallel)
        _check_stages(self)
        if self.evaluation.steps and self.evaluation.interval and not self.data.has_validation:
            raise ValueError(
                f"evaluation.steps is {self.evaluation.steps}, but there is no validation text: set data.validation or "
                "data.split, or set evaluation.steps to 0"
            )


def _check_splits(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError unless every tensor-parallel rank gets whole heads, channels and vocabulary rows."""
    tensor = parallel.tensor_parallel_size
    sizes = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.query_groups,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.vocab_size_multiple": model.vocab_size_multiple,
    }
    if parallel.sequence_parallel:
        sizes["model.seq_length"] = model.seq_length
    fitting_all = nearest(tensor, lambda other: all(size % other == 0 for size in sizes.values()))
    for name, size in sizes.items():
        if size % tensor:
            needs = ", which parallel.sequence_parallel needs" if name == "model.seq_length" else ""
            other = nearest(size, partial(_fits, name, model, tensor))
            raise ValueError(
                f"{name} {size} is not divisible by parallel.tensor_parallel_size {tensor}{needs}: "
                + remedy((name, other), ("parallel.tensor_parallel_size", fitting_all))
            )


def _fits(name: str, model: ModelConfig, tensor: int, size: int) -> bool:
    """Return whether the key `name` could be `size` with `tensor` ranks and the model's other sizes."""
    if name == "model.num_query_groups" and model.num_attention_heads % size:
        return False
    if name == "model.num_attention_heads":
        own_groups = model.num_query_groups is not None and size % model.num_query_groups
        return (
            not own_groups
            and size % tensor == 0
            and (model.head_size is not None or model.hidden_size % (2 * size) == 0)
        )
    return size % tensor == 0


def _check_stages(config: RunConfig) -> None:
    """Raise ValueError unless the stages add up to the model and the adapters fit the layout."""
    stages, num_layers = config.stages, config.model.num_layers
    if isinstance(stages.layers, list) and sum(stages.layers) != num_layers:
        raise ValueError(
            f"stages.layers {stages.layers} add up to {counted(sum(stages.layers), 'layer')}, but model.num_layers is "
            f"{num_layers}: make the two equal"
        )
    if stages.layers == "auto" and stages.count > num_layers:
        raise ValueError(
            f"stages.count {stages.count} is more than model.num_layers {num_layers}, but each stage adds a layer: "
            f"set stages.count to {num_layers} or less"
        )
    if config.planner.recipe is not None and config.training.precision == "fp32":
        raise ValueError(
            f"planner.recipe {config.planner.recipe} counts weights in 16 bits: set training.precision to bf16 or "
            "bf16_weights"
        )
    if config.training.precision == "fp32":
        for key, default in (("states", "full"), ("gradients", None)):
            value = getattr(config.optimizer, key)
            if value not in (default, "fp32"):
                raise ValueError(
                    f"optimizer.{key} {value} needs weights in 16 bits: set training.precision to bf16 or "
                    f"bf16_weights, or optimizer.{key} to {'null' if default is None else default}"
                )
    if config.stages.count > 1 and config.old_layer_policy == "adapters":
        check_adapter_rank(config)


def check_adapter_rank(config: RunConfig) -> None:
    """Raise ValueError if tensor-parallel ranks cannot split the adapters."""
    if config.adapter.rank % config.parallel.tensor_parallel_size:
        raise ValueError(
            f"adapter.rank {config.adapter.rank} is not divisible by parallel.tensor_parallel_size "
            f"{config.parallel.tensor_parallel_size}, which splits the adapters: {_other_ranks(config)}"
        )


def _other_ranks(config: RunConfig) -> str:
    tensor = config.parallel.tensor_parallel_size
    return remedy(("adapter.rank", nearest(config.adapter.rank, lambda rank: rank % tensor == 0)))


def check_world(config: RunConfig, world_size: int) -> None:
    """Raise ValueError if a world of `world_size` ranks cannot run `config`."""
    training, parallel = config.training, config.parallel
    data_parallel_size = parallel.data_parallel_size(world_size)
    samples = training.micro_batch_size * data_parallel_size
    interleaved = parallel.virtual_pipeline_size > 1
    unit = samples * (parallel.pipeline_parallel_size if interleaved else 1)
    for batch_size in training.batch_sizes:
        if batch_size % samples:
            raise ValueError(
                f"a global batch of {counted(batch_size, 'sample')} is not divisible by training.micro_batch_size "
                f"{training.micro_batch_size} x data-parallel size {data_parallel_size}: "
                + _other_batches(training, batch_size, unit)
            )
        microbatches = batch_size // samples
        if interleaved and microbatches % parallel.pipeline_parallel_size:
            raise ValueError(
                f"the number of micro-batches, {microbatches}, is not a multiple of parallel.pipeline_parallel_size "
                f"{parallel.pipeline_parallel_size}, as interleaved pipelines need: "
                + _other_batches(training, batch_size, unit)
            )


def _other_batches(training: TrainingConfig, batch_size: int, unit: int) -> str:
    """Return an error's suggestion: keys and values that make the batch a multiple of `unit` samples."""
    if training.ramp_up is not None:
        return f"set training.global_batch_size, ramp_up.start and ramp_up.increment to multiples of {unit}"
    micro_unit = unit // training.micro_batch_size
    return remedy(
        ("training.global_batch_size", nearest(batch_size, lambda size: size % unit == 0)),
        (
            "training.micro_batch_size",
            nearest(training.micro_batch_size, lambda size: batch_size % (size * micro_unit) == 0),
        ),
    )


def batch_size_at(training: TrainingConfig, consumed_samples: int) -> int:
    """Global batch size, in samples, of the step that starts after `consumed_samples` samples."""
    ramp = training.ramp_up
    if ramp is None or consumed_samples >= ramp.samples or ramp.start == training.global_batch_size:
        return training.global_batch_size
    increments = (training.global_batch_size - ramp.start) // ramp.increment
    return ramp.start + consumed_samples * increments // ramp.samples * ramp.increment


def consumed_samples(training: TrainingConfig, steps: int) -> int:
    """Samples that the first `steps` steps of a run take."""
    consumed = 0
    for step in range(steps):
        if training.ramp_up is None or consumed >= training.ramp_up.samples:
            return consumed + (steps - step) * training.global_batch_size
        consumed += batch_size_at(training, consumed)
    return consumed
