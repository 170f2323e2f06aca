#!/usr/bin/env bash
# Growth with every layer trained (preset parity) and STEP as published (preset paper) against ordinary training at the
# same tokens, each with three learning rates: examples/learning_curve/run.sh [--section.key VALUE ...]. One run a core at
# a time; run it again to go on after an interruption. STEPS=N takes N steps for each run, RATES="R R" other learning rates.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=runs/learning_curve
data=$folder/data
mkdir -p "$data"

echo "1. A tokenizer of 2,048 pieces for both texts, and the texts as tokens"
[ -f "$data/tokenizer.model" ] ||
  python tools/train_tokenizer.py --input examples/data --vocab-size 2048 --output "$data/tokenizer.model"
corpus() { # NAME SEPARATOR
  [ -f "$data/$1.json" ] || python tools/preprocess_data.py --input "examples/data/$1.txt" \
    --tokenizer "$data/tokenizer.model" --document-separator "$2" --output "$data/$1"
}
corpus austen '\n\nCHAPTER ' # a chapter is a document
corpus sotu '\n\n'           # an address is one

echo "2. A run for each way and learning rate; the last line of each is its result"
export OMP_NUM_THREADS=1
train() { # NAME [--section.key VALUE ...]
  local name=$1 && shift
  python -m megatron_step.train --config examples/learning_curve/config.yaml --output_dir "$folder/$name" "$@" \
    > "$folder/$name.log" 2>&1 || { tail -n 3 "$folder/$name.log" >&2; return 1; }
  echo "$name: $(tail -n 1 "$folder/$name.log")"
}
steps=${STEPS:-2000}
rates=${RATES:-1.5e-3 3.0e-3 6.0e-3}
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
for rate in $rates; do
  for way in parity paper vanilla; do
    keys=(--stages.steps "$steps") # of the whole run
    # Three schedules of 0.4 of the steps; the model grows after 0.75 of the first two.
    [ "$way" = paper ] && keys=(--preset paper --schedule.decay_fraction 0.4 --stages.steps "$((steps * 2 / 5))")
    [ "$way" = vanilla ] && keys+=(--stages.count 1 --stages.layers auto --optimizer.states full)
    train "${way}_$rate" --optimizer.learning_rate "$rate" "$@" "${keys[@]}" &
    while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do wait -n; done
  done
done
while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n; done

echo "3. All of them side by side"
runs=()
for way in parity paper vanilla; do
  for rate in $rates; do runs+=("$folder/${way}_$rate"); done
done
python tools/report.py "${runs[@]}" --output "$folder/report.png"
