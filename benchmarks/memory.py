"""Compare planned memory of every rank in every stage with the memory measured in its steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.configs import Precision, run_config
from benchmarks.timing import Row
from benchmarks.world import in_world
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig, TrainingConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import Stage, StagePlan
from megatron_step.planner.costs.memory import RankMemory, stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import measure_step
from megatron_step.training.state import build_state
from megatron_step.training.step import Microbatch, train_step

MODEL = ModelConfig(
    num_layers=8,
    hidden_size=192,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    seq_length=128,
    vocab_size=2048,
)
"""A model small enough for eight processes on a laptop."""
_TP: dict[str, Any] = {"tensor_parallel_size": 2}
_SP: dict[str, Any] = {**_TP, "sequence_parallel": True}
_PP: dict[str, Any] = {"pipeline_parallel_size": 2}
_VPP: dict[str, Any] = {**_PP, "virtual_pipeline_size": 2}
_REPLICATED: dict[str, Any] = {"distributed_optimizer": False}
_SELECTIVE: dict[str, Any] = {"recompute": "selective"}
_FULL: dict[str, Any] = {"recompute": "full"}
_ALL_FROZEN = {"norms": True, "embedding": True, "output_layer": True, "final_norm": True}


@dataclass(frozen=True)
class Case:
    """A config to measure."""

    world_size: int
    """Number of processes."""
    precision: Precision = "bf16"
    """Number format."""
    layout: dict[str, Any] | None = None
    """Keys of the section `parallel`."""
    layers: tuple[int, ...] = (4, 2, 2)
    """Layers that each stage adds."""
    other: dict[str, dict[str, Any]] | None = None
    """Keys of other sections, by section."""


CASES = (
    Case(1, "fp32"),
    Case(1),
    Case(1, layers=(8,)),
    Case(1, layout=_SELECTIVE),
    Case(1, "fp32", _FULL),
    Case(1, other={"adapter": {"at_stage_end": "keep"}}),
    Case(1, "fp32", other={"freeze": _ALL_FROZEN}),
    Case(1, other={"freeze": {"layers": False}}),
    Case(1, other={"model": {"tie_embeddings": True, "qk_norm": True, "qkv_bias": True}}),
    Case(1, "fp32", other={"model": {"mlp": "gelu"}, "adapter": {"targets": ["qkv", "fc2"], "dropout": 0.1}}),
    Case(2, "fp32", _TP),
    Case(2, layout=_SP),
    Case(2, layout={**_SP, **_FULL}),
    Case(2, layout=_PP),
    Case(2, "fp32", {**_PP, **_SELECTIVE}),
    Case(2, "fp32", _PP, layers=(8,)),
    Case(2, layout=_VPP),
    Case(2, "fp32", {**_VPP, **_FULL}),
    Case(2),
    Case(2, "fp32", _REPLICATED),
    Case(2, other={"model": {"tie_embeddings": True}}, layout=_PP),
    Case(4, layout={**_TP, **_PP}),
    Case(4, "fp32", {**_SP, **_PP}),
    Case(4, layout={**_SP, **_VPP, **_SELECTIVE}),
    Case(4, layout={"pipeline_parallel_size": 4}),
    Case(4, "fp32", {"pipeline_parallel_size": 4, **_FULL}),
    Case(4, layout=_PP),
    Case(4, "fp32", {**_PP, **_REPLICATED}),
    Case(4),
    Case(8, layout={**_SP, **_PP}),
)
"""Configs with every kind of parallelism, recompute, precision and stage."""


def run(cases: Sequence[Case] = CASES) -> list[Row]:
    """Return a row for each case: difference of planned from measured bytes in per cent, over all stages and ranks.

    A positive difference means that the plan is larger. A row has the largest difference of model states, and the
    smallest and largest differences of activations and of the peak.
    """
    rows: dict[int, Row] = {}
    for world_size in sorted({case.world_size for case in cases}):
        numbers = [number for number, case in enumerate(cases) if case.world_size == world_size]
        every_rank = in_world(world_size, _compare_all, [cases[number] for number in numbers])
        for number, *case_pairs in zip(numbers, *every_rank):
            rows[number] = _row(cases[number], [pair for pairs in case_pairs for pair in pairs])
    return [rows[number] for number in sorted(rows)]


_Pair = tuple[RankMemory, RankMemory]
"""Planned and measured memory of a rank in a stage."""


def _row(case: Case, pairs: list[_Pair]) -> Row:
    def excess(kind: str) -> list[float]:
        return [100 * (getattr(planned, kind) / getattr(measured, kind) - 1) for planned, measured in pairs]

    states, activations, peaks = (excess(f"{kind}_bytes") for kind in ("model_state", "activation", "peak"))
    return {
        "benchmark": "planned memory above what was measured, per cent",
        "ranks": case.world_size,
        "config": describe(case),
        "stages": len(case.layers),
        "states": max(states, key=abs),
        "activations_least": min(activations),
        "activations_most": max(activations),
        "peak_least": min(peaks),
        "peak_most": max(peaks),
    }


def describe(case: Case) -> str:
    """Return the settings of a case that are not the defaults."""
    layout = case.layout or {}
    names = {"tensor_parallel_size": "TP", "pipeline_parallel_size": "PP", "virtual_pipeline_size": "VPP"}
    words = [case.precision, *(f"{short}{layout[key]}" for key, short in names.items() if key in layout)]
    words += ["SP"] * ("sequence_parallel" in layout) + ["replicated optimizer"] * ("distributed_optimizer" in layout)
    words += [layout["recompute"]] if "recompute" in layout else []
    for keys in (case.other or {}).values():
        words += [f"{key} {value}" for key, value in keys.items()]
    return " ".join(words)


def _compare_all(cases: list[Case]) -> list[list[_Pair]]:
    """Return planned and measured memory of this rank, for each case and stage."""
    return [list(_compare(case_config(case))) for case in cases]


def case_config(case: Case, model: ModelConfig = MODEL) -> RunConfig:
    """Return the config of a case, with four micro-batches of two samples on every data-parallel rank."""
    config = run_config(model, 2, case.precision)
    stages = {"count": len(case.layers), "layers": list(case.layers)}
    sections = {"parallel": case.layout or {}, "stages": stages, **(case.other or {})}
    for section, keys in sections.items():
        config = replace(config, **{section: replace(getattr(config, section), **keys)})
    training = TrainingConfig(
        global_batch_size=8 * config.parallel.data_parallel_size(case.world_size),
        micro_batch_size=2,
        precision=config.training.precision,
    )
    return replace(config, training=training)


def _compare(config: RunConfig) -> Iterator[_Pair]:
    """Yield planned and measured memory of this rank in each stage."""
    assert config.model.vocab_size is not None
    with parallel_layout(config.parallel, seed=1) as parallel:
        plan = make_plan(resolve(config, config.model.vocab_size, parallel.dp_size))
        for stage in plan.stages:
            planned = stage_memory(resolve(config, config.model.vocab_size, parallel.dp_size), stage)[parallel.pp_rank]
            yield planned, _measured(config, plan, stage, parallel)


def _measured(config: RunConfig, plan: StagePlan, stage: Stage, parallel: Parallel) -> RankMemory:
    assert config.model.vocab_size is not None
    state = build_state(config, plan, stage, stage.first_step, config.model.vocab_size, parallel)
    batch = random_batch(config, parallel)

    def step() -> object:
        return train_step(state, batch, 1e-4, config, parallel, False)

    step()  # the first step allocates the memory that stays
    _, memory = measure_step(state, step)
    state.release()
    return memory


def random_batch(config: RunConfig, parallel: Parallel) -> list[Microbatch]:
    """Return this rank's micro-batches of random tokens."""
    assert config.model.vocab_size is not None
    samples = config.training.global_batch_size // parallel.dp_size
    generator = torch.Generator().manual_seed(parallel.dp_rank)
    shape = (samples, config.model.seq_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return [
        {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
        for rows in tokens.split(config.training.micro_batch_size)
    ]
