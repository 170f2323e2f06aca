import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TINY = ["--num-layers", "1", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4"]
TINY += ["--seq-length", "16", "--vocab-size", "128", "--micro-batch-size", "2"]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import runpy; sys.argv[0] = 'benchmark.py'; "
    code += f"runpy.run_path({str(REPOSITORY / 'tools/benchmark.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


def test_train_prints_the_tables_and_writes_the_figures(tmp_path):
    done = run_tool("train", *TINY, "--repeats", "1", "--precision", "fp32", "--json", str(tmp_path / "train.json"))
    assert done.returncode == 0, done.stderr
    for text in ("megatron-core, local layers", "transformers Llama, SDPA", "matrix products alone", "threads"):
        assert text in done.stdout
    written = json.loads((tmp_path / "train.json").read_text())
    assert {row["precision"] for row in written["rows"]} == {"fp32"}


def test_help_names_every_benchmark():
    done = run_tool("--help")
    assert done.returncode == 0
    for name in ("ops", "train", "engine", "loop", "preprocess"):
        assert f"\n    {name}" in done.stdout


def test_bad_input_is_one_line(tmp_path):
    missing = run_tool("ops", "--json", str(tmp_path / "nowhere" / "figures.json"))
    zero = run_tool("loop", "--repeats", "0")
    shape = run_tool("train", *TINY, "--num-attention-heads", "5")
    for done, text in ((missing, "does not exist"), (zero, "at least 1"), (shape, "not divisible")):
        assert done.returncode == 2
        assert text in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().count("\n") == 0
