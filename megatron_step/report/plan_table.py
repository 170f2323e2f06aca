"""Tables of a plan's memory as plain text."""

from megatron_step.planner.forecast import Forecast, StageForecast
from megatron_step.report.text_table import aligned, format_bytes

_HEADERS = (
    "stage", "layers", "steps", "layout", "frozen", "trained", "adapters", "gradients", "optimizer", "states",
    "states/vanilla", "activations", "peak", "peak/vanilla", "slack", "share of time", "step time/vanilla",
)  # fmt: skip


def stage_table(forecast: Forecast) -> str:
    """Return a table with a line for each stage of a plan, and one for vanilla training: one stage trains all layers,
    with optimizer.states full.

    The bytes are those of the pipeline rank that needs the largest share of its memory. `states` sums the bytes of
    weights (frozen, trained, adapters), gradients and optimizer states. `peak` is the larger peak of training the stage
    and of growing into it. Percentages compare with the same bytes in vanilla training. `slack` is the free memory of
    that rank. `share of time` is the stage's share of the plan's computed time. A stage of 0 steps has no bytes.
    """
    vanilla = forecast.vanilla
    rows: list[tuple[str, ...]] = [_HEADERS]
    for stage in forecast.stages:
        rows.append((str(stage.stage.number), *_cells(stage, vanilla, stage.seconds / forecast.seconds)))
    rows.append(("vanilla", *_cells(vanilla, vanilla, vanilla.seconds / forecast.seconds)))
    return aligned(rows)


def rank_table(forecast: Forecast) -> str:
    """Return a table with a line for each pipeline rank of each stage that has steps."""
    rows: list[tuple[str, ...]] = [_RANK_HEADERS]
    for stage in (stage for stage in forecast.stages if stage.stage.num_steps > 0):
        for pp_rank, rank in enumerate(stage.ranks):
            layers = f"{rank.old_layers}+{rank.new_layers}"
            memory = rank.memory
            kinds = (
                memory.frozen_weight_bytes,
                memory.trained_weight_bytes,
                memory.adapter_weight_bytes,
                memory.gradient_bytes,
                memory.optimizer_bytes,
                memory.activation_bytes,
                rank.growth_bytes,
                rank.peak_bytes,
            )
            cells, host = map(format_bytes, kinds), map(format_bytes, (rank.host.save_bytes, rank.host.load_bytes))
            rows.append((str(stage.stage.number), str(pp_rank), layers, *cells, _slack(stage, pp_rank), *host))
    return aligned(rows)


_RANK_HEADERS = (
    "stage", "rank", "old+new", "frozen", "trained", "adapters", "gradients", "optimizer", "activations", "growth",
    "peak", "slack", "host at a save", "host at a load",
)  # fmt: skip


def _slack(stage: StageForecast, pp_rank: int) -> str:
    rank = stage.ranks[pp_rank]
    if rank.capacity_bytes is None:
        return "-"
    left = rank.capacity_bytes - rank.peak_bytes
    return format_bytes(left) if left >= 0 else f"-{format_bytes(-left)}"


def _cells(stage: StageForecast, vanilla: StageForecast, time: float) -> tuple[str, ...]:
    plan, rank = stage.stage, stage.fullest
    old = plan.num_layers - plan.num_new_layers
    layers = f"{old}+{plan.num_new_layers}" if old else str(plan.num_layers)
    if plan.num_steps == 0:
        return layers, "0", *["-"] * (len(_HEADERS) - 3)
    memory, whole = rank.memory, vanilla.fullest.memory
    return (
        layers,
        str(plan.num_steps),
        "/".join(map(str, plan.layout)),
        format_bytes(memory.frozen_weight_bytes),
        format_bytes(memory.trained_weight_bytes),
        format_bytes(memory.adapter_weight_bytes),
        format_bytes(memory.gradient_bytes),
        format_bytes(memory.optimizer_bytes),
        format_bytes(memory.model_state_bytes),
        f"{memory.model_state_bytes / whole.model_state_bytes:.1%}",
        format_bytes(memory.activation_bytes),
        format_bytes(rank.peak_bytes),
        f"{rank.peak_bytes / whole.peak_bytes:.1%}",
        _slack(stage, stage.ranks.index(rank)),
        f"{time:.1%}",
        f"{stage.step_seconds / vanilla.step_seconds:.1%}",
    )
