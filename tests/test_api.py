"""The package from Python: quick to import, and a run leaves the process as it found it."""

import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_config

import megatron_step
from megatron_step.config.data import DataConfig
from megatron_step.config.load import config_text
from megatron_step.training.stage import StepContext
from megatron_step.training.trackers.tracker import Metrics, TrackedRun


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, megatron_step\n"
        "heavy = {'torch', 'numpy', 'yaml', 'jsonargparse', 'megatron.core'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "config = megatron_step.RunConfig\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(megatron_step.__all__) <= set(dir(megatron_step))\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(callable(getattr(megatron_step, name)) for name in megatron_step.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        megatron_step.runn  # noqa: B018


def test_a_config_comes_from_a_file_or_from_keywords(tmp_path: Path) -> None:
    config = small_config("runs/x")
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config))
    assert megatron_step.load_config(path) == megatron_step.load_config(str(path)) == config
    assert megatron_step.load_config(**asdict(config)) == config
    changed = megatron_step.load_config(path, output_dir="runs/y", training={"seed": 7})
    assert (changed.output_dir, changed.training.seed) == ("runs/y", 7)
    assert changed.training.global_batch_size == config.training.global_batch_size
    assert megatron_step.RunConfig(**asdict(config)) == config


def test_sections_of_a_config_may_be_dicts_and_are_checked() -> None:
    values = asdict(small_config())
    ramp = {"start": 4, "increment": 2, "samples": 16}
    config = megatron_step.RunConfig(**{**values, "training": {**values["training"], "ramp_up": ramp}})
    assert config.training.ramp_up is not None
    assert config.training.ramp_up.start == 4

    def refused(section: str, **keys: Any) -> str:
        with pytest.raises(ValueError) as caught:
            megatron_step.RunConfig(**{**values, section: keys})
        return str(caught.value)

    assert refused("model", num_layer=2) == "unknown config key model.num_layer; did you mean model.num_layers?"
    assert "model.hidden_size" in refused("model", num_layers=2)
    assert "training" in refused("training", **{**values["training"], "micro_batch_size": "two"})


def test_a_forecast_needs_no_world(tmp_path: Path) -> None:
    config = small_config(str(tmp_path), model={"vocab_size": 250}, stages={"count": 2})
    found = megatron_step.forecast(config, world_size=2)
    assert found.peak_bytes < found.vanilla.peak_bytes
    assert sum(stage.stage.num_new_layers for stage in found.stages) == 4
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="world size is 0: it must be at least 1"):
        megatron_step.forecast(config, world_size=0)


class Collected:
    """A tracker that keeps what it gets."""

    losses: list[float]

    def __init__(self, run: TrackedRun) -> None:
        Collected.losses = []

    def write(self, metrics: Metrics, shown: bool) -> None:
        Collected.losses.append(metrics["doubled"] / 2)

    def close(self) -> None:
        pass


def doubled(context: StepContext) -> None:
    """A hook that adds to the metrics."""
    context.metrics["doubled"] = 2 * context.metrics["loss"]


def _in_a_thread(work: Any) -> Any:
    """Return the result of `work` in another thread, as a notebook may run it."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    assert results, "the thread raised"
    return results[0]


_PLUGIN = """
losses = []

class Kept:
    def __init__(self, run): ...
    def write(self, metrics, shown): losses.append(metrics["halved"] * 2)
    def close(self): ...

hooks = [lambda context: context.metrics.update(halved=context.metrics["loss"] / 2)]
trackers = [Kept]
"""


def test_runs_one_after_the_other_in_one_process(
    tmp_path: Path, small_data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(str(tmp_path / "a"), data=small_data, steps=2)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert megatron_step.run(config, hooks=[doubled], trackers=[Collected])
    first = Collected.losses
    assert len(first) == 2
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plugin_of_a_run.py").write_text(_PLUGIN)
    other = replace(small_config(str(tmp_path / "b"), data=small_data, steps=2), plugins=["plugin_of_a_run"])
    assert _in_a_thread(lambda: megatron_step.run(other))
    assert sys.modules["plugin_of_a_run"].losses == first
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert not torch.distributed.is_initialized()


def test_an_error_leaves_no_process_group(tmp_path: Path, small_data: DataConfig) -> None:
    def fails(context: StepContext) -> None:
        raise RuntimeError("a fault of the hook")

    config = small_config(str(tmp_path / "a"), data=small_data, steps=2)
    with pytest.raises(RuntimeError, match="a fault of the hook"):
        megatron_step.run(config, hooks=[fails])
    assert not torch.distributed.is_initialized()
    assert megatron_step.run(config)


def test_a_trained_model_is_opened_exported_and_imported(tmp_path: Path, small_data: DataConfig) -> None:
    megatron_step.run(small_config(str(tmp_path / "run"), data=small_data, steps=1))
    megatron_step.export_model(tmp_path / "run", tmp_path / "hf", dtype="float32")
    imported = megatron_step.import_model(tmp_path / "hf", tmp_path / "again")
    assert imported.model.num_layers == 4
    tokens = torch.arange(8)[None]
    logits = []
    for path in (tmp_path / "run", tmp_path / "hf", tmp_path / "again"):
        with megatron_step.open_model(path) as model:
            logits.append(model.logits(tokens))
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
