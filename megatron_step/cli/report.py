"""Compare runs with the last one named: tables of runs and stages, and a plot of losses and memory."""

import argparse
import sys
from collections.abc import Sequence

from megatron_step.config.paths import path_argument
from megatron_step.engine.output_lock import lock_beside, output_lock
from megatron_step.report.run_report import comparison, plot, read_run, stage_table, table


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command, and return its exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog="example: megatron-step report runs/austen --output report.png"
    )
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN_DIR", help="output folders of runs")
    parser.add_argument("--output", type=path_argument, metavar="FILE", help=".png file of the plot")
    arguments = parser.parse_args(argv)
    if arguments.output is not None and arguments.output.suffix != ".png":
        parser.error(f"--output {arguments.output} must end in .png")
    try:
        runs = [read_run(folder) for folder in arguments.runs]
        print(f"{table(runs)}\n\n{stage_table(runs)}")
        if len(runs) > 1:
            print(f"\n{comparison(runs)}")
        if arguments.output is not None:
            with output_lock(lock_beside(arguments.output), arguments.output):
                plot(runs, arguments.output)
            print(f"wrote {arguments.output}: losses and memory over the tokens")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
