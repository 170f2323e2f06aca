"""Compare a step of a grown stage with an ordinary step at the same depth, and measure the cost of adapters."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch

from benchmarks.configs import Precision, run_config
from benchmarks.own_process import Functions, own_process
from benchmarks.timing import Row, check_repeats, interleave, spread, use_all_cores
from benchmarks.train_arms import megatron_step_arm, one_rank, random_batch
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.config.stages import AdapterConfig, StagesConfig
from megatron_step.engine.host_memory import keep_freed_memory
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.flops import stage_flops_per_token
from megatron_step.planner.plan import make_plan
from megatron_step.training.state import build_state

MODEL = ModelConfig(
    num_layers=8, hidden_size=1024, ffn_hidden_size=2736, num_attention_heads=16, seq_length=512, vocab_size=8192
)
"""A model of 117 million weights, with linears so wide that an adapter of rank 16 is small."""
NEW_LAYERS = 2
_VANILLA, _ADAPTED, _FROZEN = "vanilla step", "last stage", "last stage without adapters"
_STEP = "step"


def run(
    repeats: int,
    model: ModelConfig = MODEL,
    micro_batch_size: int = 4,
    rank: int = 16,
    precisions: Sequence[Precision] = ("fp32", "bf16"),
) -> list[Row]:
    """Return rows for each precision: seconds of each arm, and time and operations relative to the vanilla step.

    The last stage has `NEW_LAYERS` new layers; the other layers are frozen, with adapters of `rank` or without.
    """
    check_repeats(repeats)
    use_all_cores()
    return [
        row for precision in precisions for row in _precision_rows(repeats, model, micro_batch_size, rank, precision)
    ]


def _precision_rows(
    repeats: int, model: ModelConfig, micro_batch_size: int, rank: int, precision: Precision
) -> list[Row]:
    vanilla = run_config(model, micro_batch_size, precision)
    layers = [model.num_layers - NEW_LAYERS, NEW_LAYERS]
    staged = replace(vanilla, stages=StagesConfig(steps=1, count=2, layers=layers), adapter=AdapterConfig(rank=rank))
    configs = {_VANILLA: vanilla, _ADAPTED: staged, _FROZEN: replace(staged, adapter=AdapterConfig(rank=0))}
    processes = {name: own_process(partial(_process, config)) for name, config in configs.items()}
    with ExitStack() as stack:
        calls = {name: stack.enter_context(process) for name, process in processes.items()}
        seconds = interleave({name: partial(call, _STEP) for name, call in calls.items()}, repeats)
    flops = {name: _flops(config) for name, config in configs.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "benchmark": f"step of a stage, {torch.get_num_threads()} threads",
            "precision": precision,
            "arm": name,
            **spread(seconds[name], "seconds"),
            "time_of_vanilla": medians[name] / medians[_VANILLA],
            "operations_of_vanilla": flops[name] / flops[_VANILLA],
            "time_without_adapters": medians[name] / medians[_FROZEN],
        }
        for name in configs
    ]


@contextmanager
def _process(config: RunConfig) -> Iterator[Functions]:
    """Give a function that takes a step of the last stage, as in a run."""
    assert config.model.vocab_size is not None
    plan = make_plan(resolve(config, config.model.vocab_size))
    stage = plan.stages[-1]
    batch = random_batch(config.model, config.training.micro_batch_size)
    with keep_freed_memory(), one_rank(config) as parallel:
        state = build_state(config, plan, stage, stage.first_step, config.model.vocab_size, parallel)
        yield {_STEP: megatron_step_arm(state, batch, config, parallel)}


def _flops(config: RunConfig) -> int:
    assert config.model.vocab_size is not None
    resolved = resolve(config, config.model.vocab_size)
    return stage_flops_per_token(resolved, make_plan(resolved).stages[-1])
