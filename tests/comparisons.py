"""A config to compare ways of training with, and results of a comparison."""

from dataclasses import replace
from typing import Any

from megatron_step.compare.results import Result

BASE: dict[str, Any] = {
    "output_dir": "unused",
    "model": {"num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 32},
    "data": {"train": [[1.0, "a"]], "tokenizer": "t.model", "split": [90, 10]},
    "stages": {"steps": 100},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"global_batch_size": 8, "micro_batch_size": 2},
}

ONE = Result("vanilla", 1e-3, 1, 1000, 4.0, 50.0, 180 << 20, 200 << 20, 10**12, 60.0)
RESULTS = [
    ONE,
    replace(ONE, learning_rate=2e-3, perplexity=48.0),
    replace(ONE, learning_rate=2e-3, seed=2, perplexity=52.0),
    replace(ONE, arm="parity", learning_rate=1e-3, perplexity=47.04, model_state_bytes=81 << 20, flops=8 * 10**11),
    replace(ONE, arm="parity", learning_rate=2e-3, perplexity=60.0),
    replace(ONE, arm="parity", learning_rate=1e-3, seed=2, perplexity=52.0, model_state_bytes=81 << 20),
]
