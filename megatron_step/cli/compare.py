"""Train several ways of training (arms) on the same tokens, and compare their perplexity, memory and operations."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_step.compare.arms import ARMS, ArmRun, arm_config, arm_name, arm_run, check_comparable
from megatron_step.compare.figure import draw
from megatron_step.compare.results import Result, read_results, result_of, summaries, table, write_results
from megatron_step.compare.runs import RunError, train_all
from megatron_step.config.command_line import override, split_arguments
from megatron_step.config.load import read_config_file
from megatron_step.config.paths import path_argument
from megatron_step.config.run import RunConfig
from megatron_step.engine.output_lock import lock_beside, output_lock


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, 1 if a run failed, or 2 for bad input."""
    parser = _parser(prog)
    arguments, keys = parser.parse_known_args(argv)
    try:
        if arguments.config.suffix == ".json":
            results = read_results(arguments.config)
        else:
            with output_lock(lock_beside(arguments.output), arguments.output):
                results = _compare(arguments, _config_values(arguments.config, keys))
        print(table(results))
        draw(results, arguments.output / "comparison.png")
        print(f"wrote {arguments.output / 'comparison.png'}: perplexity against model states and operations")
    except RunError as error:
        print(f"error: {error}\nThe other runs are saved: start the same command again to go on", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="example: megatron-step compare mine.yaml --arms vanilla parity --rates 1e-3 2e-3 --output compared",
    )
    parser.add_argument(
        "config",
        type=path_argument,
        metavar="CONFIG",
        help="config of the runs, or the results.json of a comparison, to show it again",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["vanilla", "parity", "lean", "paper"],
        metavar="ARM",
        help=f"{', '.join(ARMS)}, or YAML files of config keys (default: vanilla parity lean paper)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        metavar="R",
        help="peak learning rates that each arm tries with the first seed (default: the config's)",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: one for each GPU, or for each core)"
    )
    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="folder of the comparison")
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [--section.key VALUE ...]"
    return parser


def _config_values(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Return the values of a config file, with `keys` such as `--training.seed 2` in place of the file's.

    Raises ValueError if the file or a key is not valid.
    """
    _, overrides = split_arguments(["--config", str(path), *keys], RunConfig)
    values = read_config_file(path)
    for name, text in overrides:
        override(values, name, text, RunConfig)
    return values


def _compare(arguments: argparse.Namespace, base: dict[str, Any]) -> list[Result]:
    """Train what is not finished yet, and return all results.

    Raises ValueError if the arms cannot be compared, before a run starts.
    """
    if arguments.seeds < 1 or (arguments.jobs is not None and arguments.jobs < 1):
        raise ValueError("--seeds and --jobs must be at least 1")
    names = list(map(arm_name, arguments.arms))
    if len(set(names)) < len(names):
        raise ValueError(f"--arms {' '.join(names)} names an arm twice")
    configs = {name: arm_config(name, base, arguments.output) for name in arguments.arms}
    check_comparable(list(configs.values()))
    results: list[Result] = []

    def finished(run: ArmRun) -> None:
        results.append(result_of(run))
        write_results(results, arguments.output / "results.json")
        done = results[-1]
        print(f"{run.arm}, rate {run.learning_rate:g}, seed {run.seed}: perplexity {done.perplexity:.2f}", flush=True)

    jobs = arguments.jobs or _num_devices()
    train_all(list(_sweep(configs, arguments.rates)), jobs, finished)
    train_all(list(_more_seeds(configs, results, arguments.seeds)), jobs, finished)
    order = {name: index for index, name in enumerate(names)}
    return sorted(results, key=lambda result: (order[result.arm], result.learning_rate, result.seed))


def _sweep(configs: dict[str, RunConfig], rates: Sequence[float] | None) -> list[ArmRun]:
    """Return the runs of every arm with each learning rate and the first seed."""
    return [
        arm_run(config, name, rate, 1)
        for name, config in configs.items()
        for rate in rates or [config.optimizer.learning_rate]
    ]


def _more_seeds(configs: dict[str, RunConfig], results: Sequence[Result], seeds: int) -> list[ArmRun]:
    """Return the runs of every arm with its best learning rate and the other seeds."""
    best = {arm.name: arm.results[0].learning_rate for arm in summaries(results)}
    return [
        arm_run(config, name, best[arm_name(name)], seed)
        for seed in range(2, seeds + 1)
        for name, config in configs.items()
    ]


def _num_devices() -> int:
    """Return the number of GPUs, or of cores where there is none."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))
