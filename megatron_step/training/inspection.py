"""A quick look at what a checkpoint has learnt, on one process: its validation loss, and text that it writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_step.checkpoint.load import FoundCheckpoint, find_at
from megatron_step.checkpoint.manifest import saved_config
from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import RunConfig
from megatron_step.data.tokenizer import Tokenizer, load_tokenizer
from megatron_step.engine.parallel import Parallel, parallel_layout, start_world, stop_world
from megatron_step.growth.whole_model import whole_model
from megatron_step.planner.stages import plan_from_dict
from megatron_step.training.batches import run_datasets, validation_reader
from megatron_step.training.evaluation import validation_loss


@dataclass(frozen=True)
class Inspected:
    """A checkpoint's model on one process, its adapters merged."""

    found: FoundCheckpoint
    """Where it came from."""
    config: RunConfig
    """The config of its run, with the layout of one process."""
    tokenizer: Tokenizer
    """The run's tokenizer."""
    chunks: list[torch.nn.Module]
    """The model, in evaluation mode."""
    parallel: Parallel
    """The one process's place."""


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Inspected]:
    """Load the model of a checkpoint, or of the newest whole one of a run's folder.

    Raises ValueError if there is none, or it does not fit its tokenizer.
    """
    start_world()
    with parallel_layout(ParallelConfig(), seed=1) as parallel:
        found = find_at(path, parallel)
        config = replace(saved_config(found.manifest), parallel=ParallelConfig())
        tokenizer = load_tokenizer(config.data.tokenizer)
        if tokenizer.vocab_size > found.manifest.vocab_size:
            raise ValueError(f"{config.data.tokenizer} is not the tokenizer that {found.path} was trained with")
        model = whole_model(found, config.training.precision, parallel)
        yield Inspected(found, config, tokenizer, [model], parallel)
    stop_world()


def checkpoint_loss(inspected: Inspected) -> float | None:
    """Mean loss over the run's validation set, in nats per token; None if it has no such set."""
    config = inspected.config
    if not (config.data.has_validation and config.evaluation.steps):
        return None
    num_steps = plan_from_dict(inspected.found.manifest.plan).num_steps
    datasets = run_datasets(config, num_steps, inspected.tokenizer, inspected.parallel)
    read_batch = validation_reader(datasets, config, inspected.parallel)
    return validation_loss(inspected.chunks, read_batch, config, inspected.parallel)


@torch.no_grad()
def generate(inspected: Inspected, prompt: str, num_tokens: int, temperature: float, seed: int) -> str:
    """`prompt` and up to `num_tokens` tokens that the model adds to it, until it ends the document.

    Temperature 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
    """
    tokenizer, (model,) = inspected.tokenizer, inspected.chunks
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    for _ in range(num_tokens):
        context = torch.tensor([ids[-inspected.config.model.seq_length :]], device=inspected.parallel.device)  # [1, s]
        logits = model(input_ids=context, position_ids=None, attention_mask=None)[0, -1]  # [v]
        token = _draw(logits[: tokenizer.vocab_size].float().cpu(), temperature, generator)
        if token == tokenizer.eod_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
