"""Plan a staged run without a GPU: the layers of each stage, their ranks, and the memory and time they need."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_step.api import planned_vocab_size, planned_world_size
from megatron_step.config.cluster import Cluster
from megatron_step.config.counts import counted
from megatron_step.config.load import load_cluster, load_config
from megatron_step.config.paths import expand_path, path_argument
from megatron_step.config.presets import preset_line
from megatron_step.config.run import RunConfig, check_world
from megatron_step.engine.files import atomic_write, whole_file
from megatron_step.plan.resolved import ResolvedConfig, resolve
from megatron_step.planner.forecast import Forecast, forecast, with_plan
from megatron_step.planner.lengths import length_warnings
from megatron_step.planner.paper import paper_plan
from megatron_step.report.explain import changes_that_fit, least_memory, shortages
from megatron_step.report.plan_table import rank_table, stage_table
from megatron_step.report.text_table import aligned, format_bytes


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, 1 if the plan does not fit the cluster, 2 for bad input."""
    arguments, overrides = _parser(prog).parse_known_args(argv)
    try:
        config = load_config(["--config", arguments.config, *overrides])
        if arguments.cluster:
            config = replace(config, planner=replace(config.planner, cluster=arguments.cluster))
        return _run(config, arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        allow_abbrev=False,
        epilog="Any key of the config can be overridden, as in --stages.count 4. Example: "
        "megatron-step plan --config examples/scale/70b.yaml --cluster examples/scale/64x_80gb.yaml --ranks",
    )
    parser.add_argument("--config", type=expand_path, required=True, help="YAML file with the run's config")
    parser.add_argument("--cluster", type=expand_path, help="YAML file with the machines, in place of planner.cluster")
    parser.add_argument("--world-size", type=int, help="GPUs of the run (default: the cluster's, or TP x PP)")
    parser.add_argument(
        "--count", metavar="MIN-MAX", help="choose the best number of stages in this range, such as 2-5"
    )
    parser.add_argument(
        "--json",
        type=expand_path,
        metavar="PATH",
        help="write the plan as JSON; - writes only JSON to standard output",
    )
    parser.add_argument("--paper", action="store_true", help="plan 2 to 4 stages with the paper's bytes per weight")
    parser.add_argument("--ranks", action="store_true", help="also show the memory of every rank")
    parser.add_argument(
        "--explain", action="store_true", help="show the missing memory, and changes that make the plan fit"
    )
    parser.add_argument(
        "--sweep",
        metavar="PNG",
        type=path_argument,
        nargs="?",
        const=Path("pareto.png"),
        help="plot memory over time for many settings, with a table (default: %(const)s)",
    )
    parser.add_argument(
        "--mark", metavar="NAME=SHARE", help="draw a line in the plot at this share of ordinary training's memory"
    )
    return parser


def _run(config: RunConfig, arguments: argparse.Namespace) -> int:
    cluster = load_cluster(Path(config.planner.cluster)) if config.planner.cluster else None
    world_size = planned_world_size(config, cluster, arguments.world_size)
    vocab_size = planned_vocab_size(config)
    if arguments.paper:
        print(_paper_table(resolve(config, vocab_size)))
        return 0
    if arguments.sweep:  # the sweep chooses the layouts
        config = replace(config, parallel=replace(config.parallel, **_ONE_RANK))
        return _sweep(resolve(config, vocab_size, world_size), cluster, arguments)
    config = with_plan(config, Path(config.planner.plan)) if config.planner.plan else config
    check_world(config, world_size)
    resolved = resolve(config, vocab_size, config.parallel.data_parallel_size(world_size))
    if arguments.explain:
        return _explain(resolved, cluster)
    found = _best(resolved, cluster, arguments.count)
    if arguments.json == "-":
        print(json.dumps(found.to_dict(), indent=1))
    else:
        _show(found, config, arguments)
    return 1 if found.status == "infeasible" else 0


_ONE_RANK: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "virtual_pipeline_size": 1,
    "sequence_parallel": False,
}
"""Keys of a layout in which every rank has the whole model."""


def _paper_table(resolved: ResolvedConfig) -> str:
    """Return a table of plans by the paper's bytes: 16 per trained weight and 2 per frozen weight, on one device."""
    rows = [("stages", "counted", "layers", "largest stage", "vanilla", "saved")]
    for count in range(2, min(4, resolved.config.model.num_layers) + 1):
        for weights in ("layers", "all weights"):
            plan = paper_plan(resolved, count, with_embeddings=weights == "all weights")
            layers, largest = "+".join(map(str, plan.layers)), format_bytes(max(plan.stage_bytes))
            vanilla = format_bytes(plan.vanilla_bytes)
            rows.append((str(count), weights, layers, largest, vanilla, f"{plan.reduction:.1%}"))
    return aligned(rows)


def _best(resolved: ResolvedConfig, cluster: Cluster | None, counts: str | None) -> Forecast:
    """Return the plan; with a range of numbers of stages, the best plan in the range.

    Raises ValueError if `counts` is not a range.
    """
    if counts is None:
        return forecast(resolved, cluster)
    first, _, last = counts.partition("-")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"--count {counts} is not a range: give a smallest and a largest number of stages, such as 2-5"
        )
    plans, config = [], resolved.config
    for count in range(int(first), int(last) + 1):
        stages = config.stages.with_count(count)
        plans.append(forecast(resolved.with_config(replace(config, stages=stages)), cluster))

    def cost(plan: Forecast) -> tuple[float, float]:
        share, time = max(stage.fullest.share for stage in plan.stages), plan.seconds / plan.vanilla.seconds
        return (time, share) if config.planner.objective == "time" else (share, time)

    return min(plans, key=cost)


def _show(found: Forecast, config: RunConfig, arguments: argparse.Namespace) -> None:
    if config.preset is not None:
        print(preset_line(config.preset, config))
    print(stage_table(found))
    if arguments.ranks:
        print(f"\n{rank_table(found)}")
    print(f"\n{_summary(found)}")
    for warning in length_warnings(config, found.plan):
        print(f"warning: {warning}")
    if others := config.planner.plan_only_keys:
        print(f"warning: training does not support {others}; the plan counts it for another engine")
    if arguments.json:
        path = Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(found.to_dict(), indent=1) + "\n")


def _summary(found: Forecast) -> str:
    solution = found.plan.solution
    peak, vanilla = found.peak_bytes, found.vanilla.peak_bytes
    lines = [
        f"peak memory {format_bytes(peak)}, {1 - peak / vanilla:.1%} less than the {format_bytes(vanilla)} of ordinary "
        f"training (vanilla); computed time {found.seconds / found.vanilla.seconds:.1%} of as many ordinary steps"
    ]
    if found.status == "infeasible":
        lines.append(
            "the plan does NOT fit the cluster: --explain shows the missing memory, and changes that make it fit"
        )
    if solution is not None and solution.status == "optimal":
        lines.append(f"proven: no plan has less {solution.kind}")
    elif solution is not None and solution.bound == 0:
        lines.append("not proven: old layers differ under their policy, and the search took the mean of their costs")
    elif solution is not None:
        gap = 1 - solution.bound / solution.objective
        lines.append(
            f"the solver stopped at planner.time_limit: the best plan may have up to {gap:.1%} less {solution.kind}"
        )
    return "\n".join(lines)


def _explain(resolved: ResolvedConfig, cluster: Cluster | None) -> int:
    found = least_memory(resolved, cluster)
    short = shortages(found)
    print(stage_table(found))
    if not short:
        print("\nThe plan fits.")
        return 0
    print("\nThe plan with the least memory does not fit:")
    for shortage in short:
        print(
            f"  stage {shortage.stage.number}, pipeline rank {shortage.pp_rank}: {_gib(shortage.missing_bytes)} short"
        )
    changes = changes_that_fit(resolved, cluster)
    print("\nEach of these changes makes it fit, fastest first:" if changes else "\nNo one or two changes make it fit.")
    for name, changed in changes:
        time = changed.seconds / changed.plan.num_steps / (found.seconds / found.plan.num_steps)
        print(f"  {name}: peak {format_bytes(changed.peak_bytes)}, step time x {time:.2f}")
    return 1


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _sweep(resolved: ResolvedConfig, cluster: Cluster | None, arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megatron_step.report.sweep import candidate, front_table, pareto_front, plot, variants

    if cluster is None:
        raise ValueError("--sweep needs the speed and the memory of the machines: give --cluster")
    mark = _mark(arguments.mark)
    tried = list(variants(resolved, cluster))
    shown = tqdm(tried, unit="plan", disable=not sys.stderr.isatty(), leave=False)
    planned = (candidate(variant, cluster) for variant in shown)
    candidates = [item for item in planned if item]
    if not candidates:
        raise ValueError(
            f"no setting of the sweep can run on {resolved.world_size} GPUs: plan without --sweep to see the error"
        )
    front = pareto_front(candidates)
    print(front_table(front))
    with whole_file(arguments.sweep) as partial:
        plot(candidates, front, partial, _lines(mark, candidates))
    print(f"\n{counted(len(candidates), 'plan')}, {len(front)} of them on the Pareto front: {arguments.sweep}")
    return 0


def _mark(text: str | None) -> tuple[str, float] | None:
    """Parse NAME=SHARE into a name and a share.

    Raises ValueError for another form.
    """
    if text is None:
        return None
    name, _, share = text.rpartition("=")
    try:
        mark = name, float(share)
    except ValueError:
        mark = "", 0.0
    if not mark[0] or not mark[1] > 0:
        raise ValueError(f"--mark {text} must be a name and a share, as in 'STEP, 1.2B=0.461'")
    return mark


def _lines(mark: tuple[str, float] | None, candidates: list[Any]) -> dict[str, float]:
    """Return the bytes of the mark: its share of ordinary training's memory without tensor or pipeline parallelism."""
    ordinary = [
        item.forecast.peak_bytes
        for item in candidates
        if len(item.forecast.plan.stages) == 1
        and item.resolved.config.parallel.model_parallel_size == 1
        and item.resolved.config.parallel.recompute == "none"
    ]
    return {mark[0]: mark[1] * ordinary[0]} if mark and ordinary else {}
