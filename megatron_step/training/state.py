"""All that changes while a run trains."""

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import build_model
from megatron_step.optim.optimizer import build_optimizer, wrap_data_parallel


@dataclass
class TrainState:
    """Weights, optimizer and position of a run; what a checkpoint holds."""

    step: int
    """Finished optimizer steps; the position in the data follows from it."""
    chunks: list[DistributedDataParallel]
    """This rank's model chunks, one for each virtual pipeline rank."""
    optimizer: MegatronOptimizer
    """AdamW over their trainable weights."""


def initial_state(config: RunConfig, vocab_size: int, parallel: Parallel) -> TrainState:
    """A model with initial weights and its optimizer, before the first step."""
    precision = config.training.precision
    chunks = wrap_data_parallel(
        build_model(config.model, vocab_size, parallel, precision, config.training.seed), parallel
    )
    return TrainState(step=0, chunks=chunks, optimizer=build_optimizer(config.optimizer, chunks, precision))
