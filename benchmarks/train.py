"""Compare the training step with megatron-core's stock layers, with transformers, and with its matrix products."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch

from benchmarks.breakdown import step_breakdown
from benchmarks.configs import MODEL, Precision, run_config
from benchmarks.own_process import Functions, own_process
from benchmarks.products import product_arms, product_flops
from benchmarks.timing import Row, check_repeats, interleave, spread, use_all_cores
from benchmarks.train_arms import (
    Arm,
    Batch,
    Weights,
    megatron_core_arm,
    megatron_step_arm,
    one_rank,
    random_batch,
    transformers_arm,
    weights_of,
)
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.engine.formats import tensor_type
from megatron_step.engine.host_memory import keep_freed_memory
from megatron_step.engine.parallel import Parallel
from megatron_step.plan.states import weight_format
from megatron_step.training.state import TrainState, initial_state

_OURS = "megatron_step"
_STEP, _PARTS = "step", "parts"
_LOSS_TOLERANCE = 1e-3
_PROFILED_STEPS = 3


def run(
    repeats: int,
    model: ModelConfig = MODEL,
    micro_batch_size: int = 4,
    precisions: Sequence[Precision] = ("fp32", "bf16"),
) -> list[Row]:
    """Return rows of three tables for each precision: speed of the arms, the step and its products, kinds of operation.

    Raises RuntimeError if the arms do not start with the same loss, since they would train different models.
    """
    check_repeats(repeats)
    use_all_cores()
    rows: list[Row] = []
    for precision in precisions:
        rows += _precision_rows(repeats, model, micro_batch_size, precision)
    return rows


def _precision_rows(repeats: int, model: ModelConfig, micro_batch_size: int, precision: Precision) -> list[Row]:
    config = run_config(model, micro_batch_size, precision)
    tokens = micro_batch_size * model.seq_length
    processes = {name: own_process(partial(build, config)) for name, build in _PROCESSES.items()}
    with ExitStack() as stack:
        calls = {name: stack.enter_context(process) for name, process in processes.items()}
        arms: dict[str, Arm] = {name: partial(call, _STEP) for name, call in calls.items()}
        check_same_loss(arms)
        stack.enter_context(keep_freed_memory())  # for the products, which run in this process
        products = product_arms(model, tokens, tensor_type(weight_format(precision)))
        seconds = interleave({**arms, **products}, repeats)
        parts = calls[_OURS](_PARTS)
    flops = product_flops(model, tokens)
    return [
        *(_speed_row(name, precision, seconds, tokens) for name in arms),
        *(_product_row(name, precision, seconds, flops) for name in (_OURS, *products)),
        *(_part_row(part, precision, share) for part, share in parts.items()),
    ]


@contextmanager
def _our_process(config: RunConfig) -> Iterator[Functions]:
    with keep_freed_memory(), one_rank(config) as parallel:
        step = megatron_step_arm(_first_state(config, parallel), _batch(config), config, parallel)
        yield {_STEP: step, _PARTS: lambda: step_breakdown(step, _PROFILED_STEPS)}


@contextmanager
def _peer_process(
    make_arm: Callable[[Weights, Batch, RunConfig], Arm], config: RunConfig, keeps_memory: bool = False
) -> Iterator[Functions]:
    with keep_freed_memory() if keeps_memory else nullcontext(), one_rank(config) as parallel:
        yield {_STEP: make_arm(weights_of(_first_state(config, parallel)), _batch(config), config)}


_PROCESSES: dict[str, Callable[[RunConfig], AbstractContextManager[Functions]]] = {
    _OURS: _our_process,
    "megatron-core, local layers": partial(_peer_process, megatron_core_arm),
    "megatron-core, freed memory kept": partial(_peer_process, megatron_core_arm, keeps_memory=True),
    "transformers Llama, SDPA": partial(_peer_process, transformers_arm),
}


def _first_state(config: RunConfig, parallel: Parallel) -> TrainState:
    """Make the initial state, which is the same in every process: weights depend on the seed and their names."""
    assert config.model.vocab_size is not None
    return initial_state(config, config.model.vocab_size, parallel)


def _batch(config: RunConfig) -> Batch:
    return random_batch(config.model, config.training.micro_batch_size)


def check_same_loss(arms: dict[str, Arm]) -> None:
    """Take each arm's first step, and raise RuntimeError unless the first losses agree within rounding."""
    losses = {name: arm() for name, arm in arms.items()}
    reference = losses[_OURS]
    for name, loss in losses.items():
        if abs(loss - reference) > _LOSS_TOLERANCE * abs(reference):
            raise RuntimeError(f"{name} starts with loss {loss}, but {_OURS} with {reference}: the models differ")


def _speed_row(name: str, precision: Precision, seconds: dict[str, list[float]], tokens: int) -> Row:
    return {
        "benchmark": f"training step, {torch.get_num_threads()} threads",
        "precision": precision,
        "arm": name,
        **spread([tokens / value for value in seconds[name]], "tokens_per_second"),
        "megatron_step_is_faster_by": statistics.median(seconds[name]) / statistics.median(seconds[_OURS]),
    }


def _product_row(name: str, precision: Precision, seconds: dict[str, list[float]], flops: int) -> Row:
    return {
        "benchmark": "the step against its matrix products",
        "precision": precision,
        "arm": "whole step" if name == _OURS else name,
        **spread(seconds[name], "seconds"),
        "gflops_per_second_of_products": flops / statistics.median(seconds[name]) / 1e9,
        "share_of_step": statistics.median(seconds[name]) / statistics.median(seconds[_OURS]),
    }


def _part_row(part: str, precision: Precision, share: float) -> Row:
    return {"benchmark": "parts of the step", "precision": precision, "part": part, "share": share}
