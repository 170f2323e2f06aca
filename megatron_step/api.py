"""The package from Python: what `import megatron_step` offers. torch is imported by the calls that need it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_step.config.cluster import Cluster
from megatron_step.config.load import config_from_values, load_cluster, read_config_file
from megatron_step.config.plugins import import_plugins
from megatron_step.config.run import RunConfig, check_world
from megatron_step.planner import forecast as planner
from megatron_step.planner.forecast import Forecast

if TYPE_CHECKING:
    from megatron_step.evaluation.models import LanguageModel
    from megatron_step.huggingface.comparison import Comparison
    from megatron_step.huggingface.from_hf import Imported
    from megatron_step.training.stage import Hook
    from megatron_step.training.trackers.tracker import MakeTracker

__all__ = ["RunConfig", "export_model", "forecast", "import_model", "load_config", "open_model", "run"]


def load_config(path: str | Path | None = None, /, **keys: Any) -> RunConfig:
    """The config of a YAML file, with `keys` in place of the file's; without a file, of `keys` alone.

    A section is a dict, of which only the keys given replace the file's: `load_config("a.yaml", training={"seed": 2})`.

    Raises ValueError if the file cannot be read, a key is unknown or missing, or a value is not valid.
    """
    values = read_config_file(Path(path)) if path is not None else {}
    return config_from_values(_merged(values, keys))


def _merged(values: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `keys`, section by section."""
    merged = dict(values)
    for name, value in keys.items():
        inside = merged.get(name)
        merged[name] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, Mapping) else value
    return merged


def forecast(config: RunConfig, world_size: int | None = None) -> Forecast:
    """The plan of a run and what it will need: bytes of every rank in every stage, and time. No world is made.

    `world_size` are the ranks; None for all GPUs of planner.cluster, or for one copy of the model without a cluster.

    Raises ValueError if there is no such plan, and FileNotFoundError without the tokenizer, where it says the
    vocabulary. A plan that does not fit the cluster has `status` "infeasible".
    """
    import_plugins(config.plugins)
    cluster = load_cluster(Path(config.planner.cluster)) if config.planner.cluster else None
    world_size = planned_world_size(config, cluster, world_size)
    check_world(config, world_size)
    if config.planner.plan:
        config = planner.with_plan(config, Path(config.planner.plan))
    dp_size = config.parallel.data_parallel_size(world_size)
    return planner.forecast(config, planned_vocab_size(config), dp_size, cluster)


def planned_world_size(config: RunConfig, cluster: Cluster | None, world_size: int | None) -> int:
    """The ranks that a run is planned for: those given, or all of the cluster, or one copy of the model.

    Raises ValueError if the cluster is too small for the layout, or fewer than one rank are given.
    """
    needed = config.parallel.model_parallel_size
    if cluster is not None and cluster.num_gpus < needed:
        raise ValueError(
            f"the cluster has {cluster.num_gpus} GPUs, fewer than parallel.tensor_parallel_size "
            f"{config.parallel.tensor_parallel_size} x parallel.pipeline_parallel_size "
            f"{config.parallel.pipeline_parallel_size} = {needed}"
        )
    if world_size is not None and world_size < 1:
        raise ValueError(f"the world size must be at least 1, not {world_size}")
    return world_size or (cluster.num_gpus if cluster else needed)


def planned_vocab_size(config: RunConfig) -> int:
    """Tokens of the vocabulary: model.vocab_size, or else the tokenizer's."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from megatron_step.data.tokenizer import load_tokenizer

    return load_tokenizer(config.data.tokenizer, config.data.end_of_document).vocab_size


def run(config: RunConfig, hooks: Sequence["Hook"] = (), trackers: Sequence["MakeTracker"] = ()) -> bool:
    """Train as `config` says, with this process as the world or as one of torchrun's ranks.

    `hooks` are called after each step, before the trackers; each gets a `StepContext` (training/stage.py).
    `trackers` are classes or functions that make a `Tracker` (training/trackers/tracker.py); rank 0 makes them.

    Returns whether training got to its end; False if a signal asked it to stop, which saves first. Signals are watched
    in the main thread only. The process leaves its process group however the run ends, so that the next run can begin.

    Raises ValueError, FileNotFoundError or OSError for input that cannot be used, before anything is written, and
    NonFiniteError, NoGradientError or SaveError where training cannot go on.
    """
    from megatron_step.engine.parallel import stop_world
    from megatron_step.training.run import run as train

    try:
        return train(config, hooks=hooks, trackers=trackers)
    finally:
        stop_world()


@contextmanager
def open_model(
    path: str | Path, tokenizer: str | None = None, seq_length: int | None = None
) -> Iterator["LanguageModel"]:
    """Load the model of a checkpoint, of the newest one of a run's folder, or of a Hugging Face model's folder.

    `tokenizer` is where the tokenizer lies, None for where the run had it; `seq_length` are the tokens of a window,
    None for as many as the model is made for. `model.logits(tokens)` takes tokens [b, s] to logits [b, s, v].

    Raises FileNotFoundError or ValueError if there is no such model or it is damaged.
    """
    from megatron_step.evaluation.models import open_model as opened

    with opened(Path(path), tokenizer, seq_length) as model:
        yield model


def export_model(checkpoint: str | Path, out: str | Path, **options: Any) -> "Comparison | None":
    """Write the model of a checkpoint, or of the newest one of a run's folder, as a Hugging Face model.

    `options` are those of `ExportOptions` (huggingface/to_hf.py): dtype, max_shard_bytes, adapter_only, check and
    tokenizer.

    Returns the comparison of logits that `check=True` asks for. Raises ValueError, FileNotFoundError or FileExistsError
    for input that cannot be used, and DifferentModelError where the comparison fails; nothing is left at `out` then.
    """
    from megatron_step.huggingface.to_hf import ExportOptions
    from megatron_step.huggingface.to_hf import export_model as export
    from megatron_step.report.run_report import metrics_of_checkpoint

    return export(Path(checkpoint), Path(out), ExportOptions(**options), metrics_of_checkpoint(Path(checkpoint)))


def import_model(
    source: str | Path,
    out: str | Path,
    seq_length: int | None = None,
    tokenizer: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "Imported":
    """Write a Hugging Face model as a checkpoint that a run can start from.

    `seq_length` are the tokens of a training sample, None for as many as the model is made for; `tokenizer` is where
    its tokenizer lies, None for `source`. `progress` gets the bytes written and those to write.

    Raises ValueError, FileNotFoundError or FileExistsError for input that cannot be used; nothing is left at `out`.
    """
    from megatron_step.huggingface.from_hf import import_model as import_from_hf

    return import_from_hf(Path(source), Path(out), seq_length, tokenizer, progress)
