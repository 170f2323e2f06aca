"""Compare megatron_step with other packages, in turns, and print tables of medians with their spread."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks.configs import MODEL
from benchmarks.timing import Row, machine, table, use_all_cores, write_json
from megatron_step.config.model import ModelConfig
from megatron_step.config.paths import path_argument

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length", "vocab_size")


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.exit(2, f"{parser.prog}: error: --json {arguments.json}: its folder does not exist: make it first\n")
    use_all_cores()
    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    try:
        rows = arguments.benchmark(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print("\n" + table(rows))
    if arguments.json is not None:
        write_json(arguments.json, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python tools/benchmark.py train --repeats 10 --json train.json"
    )
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    _add(commands, "ops", _ops, 20, "every C++ operation compared with torch's, forward and backward")
    _add(
        commands, "adapter", _adapter, 7, "a frozen linear's adapter compared with plain torch and, if installed, peft"
    )
    _add(commands, "kernels", _kernels, 20, "the CUDA kernels compared with a roofline; timed on a GPU")
    train = _add(
        commands, "train", _train, 10, "the training step compared with megatron-core's stock layers and transformers"
    )
    _add_sizes(train)
    train.add_argument(
        "--precision", choices=("fp32", "bf16", "both"), default="both", help="number format (default: both)"
    )
    _add(commands, "stage", _stage, 10, "a step of a grown stage compared with an ordinary step; cost of adapters")
    _add(
        commands,
        "states",
        _states,
        1,
        "model states of a 24-layer model by stage and recipe; needs 16 GiB; runs once",
    )
    _add(commands, "memory", _memory, 1, "planned and measured memory of every rank in 30 layouts; runs once")
    _add(commands, "optimizer", _optimizer, 20, "an optimizer step by every recipe compared with torch's AdamW")
    _add(commands, "saves", _saves, 1, "planned and measured memory of a save and a load; runs once")
    _add(commands, "engine", _engine, 5, "two ways to run megatron-core without CUDA; repeats are processes")
    _add_sizes(_add(commands, "loop", _loop, 10, "time that the training loop adds to a step; repeats are steps"))
    _add(commands, "export", _export, 3, "export of a model of 1.1 billion weights, and its memory; needs 9 GB of disk")
    _add(commands, "preprocess", _preprocess, 5, "preprocessing compared with a plain loop, and its memory")
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    benchmark: Callable[[argparse.Namespace], list[Row]],
    repeats: int,
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(benchmark=benchmark)
    command.add_argument(
        "--repeats", type=int, default=repeats, metavar="N", help=f"measurements of each arm (default: {repeats})"
    )
    command.add_argument("--json", type=path_argument, metavar="PATH", help="also write the figures to PATH")
    return command


def _add_sizes(command: argparse.ArgumentParser) -> None:
    for name in _SIZES:
        default = getattr(MODEL, name)
        command.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"default: {default}"
        )
    command.add_argument("--micro-batch-size", type=int, default=4, metavar="N", help="samples of a step (default: 4)")


def _model(arguments: argparse.Namespace) -> ModelConfig:
    return replace(MODEL, **{name: getattr(arguments, name) for name in _SIZES})


# Each function imports its benchmark, because the benchmarks need different packages.
def _ops(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import ops

    return ops.run(arguments.repeats)


def _adapter(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import adapter

    return adapter.run(arguments.repeats)


def _kernels(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import kernels

    return kernels.run(arguments.repeats)


def _train(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import train

    precisions = ("fp32", "bf16") if arguments.precision == "both" else (arguments.precision,)
    return train.run(arguments.repeats, _model(arguments), arguments.micro_batch_size, precisions)


def _stage(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import stage

    return stage.run(arguments.repeats)


def _states(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import recipes, states

    return [*states.run(), *recipes.run()]


def _memory(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import memory

    return memory.run()


def _optimizer(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import optimizer

    return optimizer.run(arguments.repeats)


def _saves(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import saves

    return saves.run()


def _engine(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import engine

    return engine.run(arguments.repeats)


def _loop(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import loop

    return loop.run(arguments.repeats, _model(arguments), arguments.micro_batch_size)


def _export(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import export

    return export.run(arguments.repeats)


def _preprocess(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks import preprocess

    return preprocess.run(arguments.repeats)


if __name__ == "__main__":
    main()
