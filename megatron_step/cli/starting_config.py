"""Make a first config for a model size and machines: choose a layout that fits, and write a commented YAML file."""

from collections.abc import Iterator

from megatron_step.cli.sizes import Size
from megatron_step.config.cluster import Cluster, PlannerConfig
from megatron_step.config.counts import counted
from megatron_step.config.data import DataConfig
from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.presets import Preset
from megatron_step.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    RunConfig,
    TrainingConfig,
    check_world,
)
from megatron_step.plan.resolved import resolve
from megatron_step.planner.forecast import Forecast, forecast

_PRESET: Preset = "parity"
_TOKENS_PER_PARAMETER = 20  # Hoffmann et al., 2022
_CPU_SAMPLES = 16
_MICRO_BATCH_SIZES = (4, 1)


def starting_config(size: Size, cluster: Cluster, on_cpu: bool, steps: int | None) -> tuple[RunConfig, Forecast]:
    """Return a config of the preset `parity` in the simplest layout that fits the machines, and its forecast.

    `steps` is the number of steps of the run; None takes 20 tokens per parameter (Hoffmann et al., 2022).

    Raises ValueError if no layout fits.
    """
    for parallel in _layouts(cluster):
        dp_size = parallel.data_parallel_size(cluster.num_gpus)
        for micro_batch_size in _MICRO_BATCH_SIZES:
            try:
                config = _config(size, parallel, micro_batch_size, dp_size, on_cpu, steps)
                check_world(config, cluster.num_gpus)
                planned = forecast(resolve(config, size.vocab_size, dp_size), cluster)
            except ValueError:
                continue  # this layout does not fit the model's sizes
            if planned.status != "infeasible":
                return config, planned
    group = cluster.nodes[0]
    raise ValueError(
        f"no layout of this model fits {counted(cluster.num_gpus, 'process' if on_cpu else 'GPU')} with "
        f"{group.memory_gib:g} GiB each: choose a smaller --size or a larger --machine"
    )


def _layouts(cluster: Cluster) -> Iterator[ParallelConfig]:
    """Yield layouts to try, those with the fewest ranks per model copy first."""
    shapes = [
        (tensor, pipeline)
        for tensor in (1, 2, 4, 8)
        for pipeline in (1, 2, 4, 8, 16)
        if cluster.nodes[0].gpus_per_node % tensor == 0 and cluster.num_gpus % (tensor * pipeline) == 0
    ]
    for tensor, pipeline in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        yield ParallelConfig(tensor, pipeline, sequence_parallel=tensor > 1, recompute="none")
        yield ParallelConfig(tensor, pipeline, sequence_parallel=tensor > 1, recompute="full")


def _config(
    size: Size, parallel: ParallelConfig, micro_batch_size: int, dp_size: int, on_cpu: bool, steps: int | None
) -> RunConfig:
    wanted = min(size.global_batch_size, _CPU_SAMPLES) if on_cpu else size.global_batch_size
    unit = micro_batch_size * dp_size  # samples of one micro-batch on all ranks
    batch = max(unit, wanted // unit * unit)
    steps = steps if steps is not None else _steps(size, batch)
    warmup = max(1, min(steps // 50, 2000))
    return RunConfig(
        output_dir="runs/first",
        model=size.model,
        data=DataConfig(
            train=[(1.0, "data/train")], tokenizer="data/tokenizer.model", split=(95.0, 5.0) if on_cpu else (99.0, 1.0)
        ),
        preset=_PRESET,
        stages={"steps": steps},  # type: ignore[arg-type]  # sections as dicts take in the preset's keys
        optimizer={"learning_rate": size.learning_rate},  # type: ignore[arg-type]
        schedule={"warmup_steps": warmup, "rewarm_steps": max(1, warmup // 2)},  # type: ignore[arg-type]
        training=TrainingConfig(batch, micro_batch_size, precision="bf16_weights" if on_cpu else "bf16"),
        parallel=parallel,
        planner=PlannerConfig() if on_cpu else PlannerConfig(cluster="cluster.yaml"),
        evaluation=EvaluationConfig(interval=max(1, min(steps // 10, 1000)), steps=2 if on_cpu else 20),
        checkpoint=CheckpointConfig(interval=max(1, min(steps // 2, 1000)), keep=2),
        logging=LoggingConfig(interval=10),
    )


def _steps(size: Size, batch: int) -> int:
    """Steps of the run, rounded to two digits."""
    steps = _TOKENS_PER_PARAMETER * size.parameters / (batch * size.model.seq_length)
    return max(1, int(float(f"{steps:.1e}")))


def starting_text(config: RunConfig, size_name: str, machine: str, planned: Forecast) -> str:
    """Return a config of `starting_config` as the text of a YAML file, with comments."""
    model, training, parallel, schedule = config.model, config.training, config.parallel, config.schedule
    layers = " + ".join(str(stage.stage.num_new_layers) for stage in planned.stages)
    groups = "null" if model.num_query_groups is None else model.num_query_groups
    tokens, on_cpu = training.global_batch_size * model.seq_length, config.planner.cluster is None
    return f"""\
# A model of {size_name.upper()} parameters for {"a CPU" if on_cpu else machine}.
# Relative paths start in the folder where you run the command.
# megatron-step train --help lists every key with its meaning and default.
output_dir: {config.output_dir}  # for config, metrics, checkpoints, TensorBoard

model:
  num_layers: {model.num_layers}
  hidden_size: {model.hidden_size}
  ffn_hidden_size: {model.ffn_hidden_size}
  num_attention_heads: {model.num_attention_heads}
  num_query_groups: {groups}  # key and value heads; null: as many as query heads
  seq_length: {model.seq_length}  # tokens of a sample
  vocab_size: {model.vocab_size}  # at least the tokenizer's tokens; null: exactly these

data:
  tokenizer: {config.data.tokenizer}  # from megatron-step tokenizer, or a Hugging Face tokenizer folder
  train: [[1.0, {config.data.train[0][1]}]]  # weight and prefix of each corpus, from megatron-step preprocess
  split: {[*map(int, config.data.split or ())]}  # shares of the documents for training and validation

# The model grows in {config.stages.count} stages, here by {layers} layers. All layers train, with compact
# model states. Other presets: docs/recipes.md. For ordinary training: stages.count 1 and optimizer.states full.
preset: {config.preset}
stages: {{steps: {config.stages.steps}}}  # optimizer steps of the run
optimizer: {{learning_rate: {config.optimizer.learning_rate!r}}}
# warmup_steps at the start; rewarm_steps for new layers, after each growth
schedule: {{warmup_steps: {schedule.warmup_steps}, rewarm_steps: {schedule.rewarm_steps}}}

training:
  global_batch_size: {training.global_batch_size}  # samples of a step: {tokens:,} tokens
  micro_batch_size: {training.micro_batch_size}  # samples that a rank holds at once; fewer need less memory
  precision: {training.precision}{"  # bf16 weights, fp32 arithmetic" if on_cpu else ""}
  seed: 1

parallel:
  tensor_parallel_size: {parallel.tensor_parallel_size}
  pipeline_parallel_size: {parallel.pipeline_parallel_size}
  sequence_parallel: {str(parallel.sequence_parallel).lower()}
  recompute: {parallel.recompute}  # full: compute activations again in the backward pass; less memory, more time

# cluster: file with the machines, whose memory the plan must fit; null: no limit
planner: {{cluster: {"null" if on_cpu else config.planner.cluster}}}

# interval: steps between evaluations, between checkpoints, and between shown lines
evaluation: {{interval: {config.evaluation.interval}, steps: {config.evaluation.steps}}}
checkpoint: {{interval: {config.checkpoint.interval}, keep: {config.checkpoint.keep}}}
logging: {{interval: {config.logging.interval}, tensorboard: true, wandb: null}}
"""
