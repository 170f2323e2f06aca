"""The model of a checkpoint on one process computes what the trained one did, also in fp32 after bf16."""

from pathlib import Path

import pytest
import torch
from hf_checkpoints import grown_config, save_stages, word_tokenizer
from small_run import made_up_batch
from worlds import Worlds

from megatron_step.checkpoint.load import find_at
from megatron_step.engine.parallel import Parallel
from megatron_step.growth.whole_model import whole_model
from megatron_step.training.step import evaluate_batch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_loss_is_that_of_the_trained_model(worlds: Worlds, tmp_path: Path, alone: Parallel, precision: str) -> None:
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    config = grown_config("llama", "TP2", tokenizer, training={"precision": precision})
    ((loss,),) = worlds(2).run(save_stages, configs=[config], folders=[tmp_path], merges=False)[0]
    model = whole_model(find_at(next((tmp_path / "live").iterdir()), alone), "fp32", alone)
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert len(model.decoder.layers) == 3, "the stage's depth, not the run's"
    one = grown_config("llama", "one", tokenizer)
    found = evaluate_batch([model], made_up_batch(one, 7, alone), one, alone)
    assert found == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 1e-2)
