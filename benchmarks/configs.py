"""Models and configs for the benchmarks."""

from typing import Literal

from megatron_step.config.data import DataConfig
from megatron_step.config.model import ModelConfig
from megatron_step.config.optimization import OptimizerConfig
from megatron_step.config.run import CheckpointConfig, EvaluationConfig, LoggingConfig, RunConfig, TrainingConfig
from megatron_step.config.stages import StagesConfig

Precision = Literal["bf16", "fp32"]

MODEL = ModelConfig(
    num_layers=8, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=8, seq_length=512, vocab_size=8192
)
"""A model of 34 million weights, whose matrix products use a CPU fully."""
SMALL_MODEL = ModelConfig(
    num_layers=4, hidden_size=128, ffn_hidden_size=344, num_attention_heads=4, seq_length=128, vocab_size=1024
)
"""A model of a million weights, whose step shows the overhead beside the arithmetic."""


def run_config(
    model: ModelConfig,
    micro_batch_size: int,
    precision: Precision,
    *,
    steps: int = 1,
    output_dir: str = "unused",
    data: DataConfig | None = None,
) -> RunConfig:
    """Return the config of a run with one micro-batch per step, one checkpoint at its end, and no evaluation."""
    return RunConfig(
        output_dir=output_dir,
        model=model,
        data=data or DataConfig(train=[(1.0, "unused")], tokenizer="unused"),
        stages=StagesConfig(steps=steps),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        training=TrainingConfig(
            global_batch_size=micro_batch_size, micro_batch_size=micro_batch_size, precision=precision
        ),
        evaluation=EvaluationConfig(steps=0),
        checkpoint=CheckpointConfig(interval=0),
        logging=LoggingConfig(),
    )
