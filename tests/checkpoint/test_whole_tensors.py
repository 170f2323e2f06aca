"""A checkpoint's tensors are read as torch's own loading reads them, saved in one piece or in several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from serial_oracle import PP2, TP2
from small_run import VOCAB_SIZE, manifest_facts, read_checkpoint, small_config
from worlds import Worlds

from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.checkpoint.streamed import write_streamed
from megatron_step.checkpoint.whole_tensors import WholeTensors
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.plan.states import training_recipe
from megatron_step.training.state import initial_state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (4, {**TP2, **PP2})])
def test_they_are_those_of_the_checkpoint(
    worlds: Worlds, tmp_path: Path, world_size: int, layout: dict[str, Any], precision: str
) -> None:
    config = small_config(parallel=layout, training={"precision": precision})
    worlds(world_size).run(save, config=config, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    expected, tensors = read_checkpoint(path), WholeTensors(path)
    assert set(tensors.keys) == expected.keys()
    for key, tensor in expected.items():
        whole = tensors.read(key)
        assert whole.dtype == tensor.dtype
        assert torch.equal(whole, tensor), key


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    written = {"good": torch.ones(3), "bad": torch.tensor([1.0, torch.inf])}
    shapes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in written.items()}
    tensors = WholeTensors(write_streamed(tmp_path, shapes, written.__getitem__, manifest_facts(small_config())))
    assert torch.equal(tensors.read("good"), written["good"])
    with pytest.raises(ValueError, match="has infinite or NaN values in bad"):
        tensors.read("bad")
    with pytest.raises(ValueError, match="lacks the tensor missing"):
        tensors.read("missing")


# What the ranks run.


def save(config: RunConfig, folder: Path) -> None:
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        saver.save(state.chunks, state.optimizer, training_recipe(config), 0, manifest_facts(config))
