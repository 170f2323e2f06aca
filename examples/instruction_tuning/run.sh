#!/usr/bin/env bash
# The two models that `make demo` leaves learn to answer questions, side by side:
# examples/instruction_tuning/run.sh [VANILLA_RUN STEP_RUN], for other runs on the same text. STEPS=N tunes for N steps.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# = 0 ] || [ $# = 2 ] || { echo "usage: $0 [VANILLA_RUN STEP_RUN]" >&2; exit 2; }
out=runs/instruction_tuning
text=$(mktemp --suffix .txt)
trap 'rm -f "$text"' EXIT
python - "$text" <<'END' # the twentieth of the chapters that data.split in the examples' configs keeps from training
import sys
from pathlib import Path

separator = "\n\nCHAPTER "
chapters = Path("examples/data/austen.txt").read_text(encoding="utf-8").split(separator)
Path(sys.argv[1]).write_text(separator.join(chapters[round(0.95 * len(chapters)) :]), encoding="utf-8")
END
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 # all that is needed is here
python examples/instruction_tuning/tune.py "${1:-runs/step_vanilla}" "${2:-runs/step}" \
  --output "$out" --text "$text" --steps "${STEPS:-150}"
