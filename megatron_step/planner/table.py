"""The memory of a plan as plain text."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_step.config.run import RunConfig
from megatron_step.planner.memory import RankMemory, stage_memory
from megatron_step.planner.operators import GrownLayer
from megatron_step.planner.stages import Stage, StagePlan

_HEADERS = (
    "stage", "layers", "steps", "layout", "frozen", "trained", "adapters", "gradients", "optimizer", "states",
    "states/vanilla", "activations", "peak", "peak/vanilla",
)  # fmt: skip


def stage_table(config: RunConfig, plan: StagePlan, vocab_size: int, dp_size: int) -> str:
    """A line for each stage of `plan`, and one for vanilla training: the whole depth in one stage, all of it trained.

    The bytes are those of the pipeline rank with the highest peak. `states` are the bytes of weights (frozen, trained,
    adapters), gradients and optimizer states; shares are of the same bytes in vanilla training.
    """
    vanilla = _vanilla(plan)
    whole = _heaviest(config, vanilla, vocab_size, dp_size)
    rows: list[tuple[str, ...]] = [_HEADERS]
    for name, stage in [*((str(stage.index + 1), stage) for stage in plan.stages), ("vanilla", vanilla)]:
        memory = _heaviest(config, stage, vocab_size, dp_size)
        rows.append((name, *_stage_cells(stage), *_memory_cells(memory, whole)))
    return aligned(rows)


def format_bytes(count: int) -> str:
    """`count` bytes in MiB, or from 1 GiB on in GiB."""
    mebibytes = count / 2**20
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"


def _vanilla(plan: StagePlan) -> Stage:
    """The last stage's model as a first stage, over all steps of the plan."""
    last = plan.stages[-1]
    layers = (GrownLayer((), born=0),) * last.num_layers
    return replace(last, index=0, layers=layers, first_step=0, last_step=plan.num_steps)


def _heaviest(config: RunConfig, stage: Stage, vocab_size: int, dp_size: int) -> RankMemory:
    return max(stage_memory(config, stage, vocab_size, dp_size), key=lambda memory: memory.peak_bytes)


def _stage_cells(stage: Stage) -> tuple[str, ...]:
    old = stage.num_layers - stage.num_new_layers
    steps = stage.last_step - stage.first_step
    return (
        f"{old}+{stage.num_new_layers}" if old else str(stage.num_layers),
        str(steps),
        "/".join(map(str, stage.layout)),
    )


def _memory_cells(memory: RankMemory, vanilla: RankMemory) -> tuple[str, ...]:
    return (
        format_bytes(memory.frozen_weight_bytes),
        format_bytes(memory.trained_weight_bytes),
        format_bytes(memory.adapter_weight_bytes),
        format_bytes(memory.gradient_bytes),
        format_bytes(memory.optimizer_bytes),
        format_bytes(memory.model_state_bytes),
        f"{memory.model_state_bytes / vanilla.model_state_bytes:.1%}",
        format_bytes(memory.activation_bytes),
        format_bytes(memory.peak_bytes),
        f"{memory.peak_bytes / vanilla.peak_bytes:.1%}",
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines of columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
