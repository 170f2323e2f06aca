"""Shows what a checkpoint has learnt: its validation loss and perplexity, and text that it writes."""

import argparse
import math
import sys
from pathlib import Path


def main() -> int:
    """Exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, or a run's output folder for its newest one")
    parser.add_argument("--generate", metavar="TEXT", help="let the model continue TEXT instead of evaluating it")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to add to TEXT (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 for the likeliest token each time (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the drawn tokens (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.temperature < 0 or arguments.tokens < 1:
        parser.error("--temperature must not be negative and --tokens must be at least 1")

    from megatron_step.training.inspection import checkpoint_loss, generate, open_checkpoint

    try:
        with open_checkpoint(arguments.path) as inspected:
            if arguments.generate is not None:
                print(generate(inspected, arguments.generate, arguments.tokens, arguments.temperature, arguments.seed))
                return 0
            loss = checkpoint_loss(inspected)
            if loss is None:
                raise ValueError(f"the run of {arguments.path} has no validation set to evaluate on")
            print(f"{inspected.found.path}: validation loss {loss:.6f}, perplexity {math.exp(loss):.3f}")
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
