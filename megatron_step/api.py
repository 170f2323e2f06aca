"""The Python API: the names that `import megatron_step` offers. Only the calls that need torch import it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_step.config.cluster import Cluster
from megatron_step.config.load import config_from_values, load_cluster, read_config_file
from megatron_step.config.plugins import import_plugins
from megatron_step.config.run import RunConfig, check_world
from megatron_step.config.sections import merged
from megatron_step.plan.resolved import resolve
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
    """Load a config from a YAML file and from `keys`, which replace the file's; without a file, from `keys` alone.

    Give a section as a dict: its keys replace the file's, and the file's other keys of this section stay, as in
    `load_config("a.yaml", training={"seed": 2})`.

    Raises ValueError if the file cannot be read, a key is unknown or missing, or a value is not valid.
    """
    values = read_config_file(Path(path)) if path is not None else {}
    return config_from_values(merged(values, keys))


def forecast(config: RunConfig, world_size: int | None = None) -> Forecast:
    """Plan a run, without a process group: bytes of every rank in every stage, and seconds.

    `world_size` is the number of ranks; None takes the GPUs of planner.cluster, or without a cluster one model copy.

    Raises ValueError if the config cannot be planned, and FileNotFoundError if the tokenizer is missing and
    model.vocab_size is null. A plan that does not fit the cluster has `status` "infeasible".
    """
    import_plugins(config.plugins)
    cluster = load_cluster(Path(config.planner.cluster)) if config.planner.cluster else None
    world_size = planned_world_size(config, cluster, world_size)
    check_world(config, world_size)
    if config.planner.plan:
        config = planner.with_plan(config, Path(config.planner.plan))
    dp_size = config.parallel.data_parallel_size(world_size)
    return planner.forecast(resolve(config, planned_vocab_size(config), dp_size), cluster)


def planned_world_size(config: RunConfig, cluster: Cluster | None, world_size: int | None) -> int:
    """Return the number of ranks that a run is planned for: `world_size`, else the cluster's GPUs, else one model copy.

    Raises ValueError if the cluster has too few GPUs for the layout, or if `world_size` is below 1.
    """
    needed = config.parallel.model_parallel_size
    if cluster is not None and cluster.num_gpus < needed:
        raise ValueError(
            f"the cluster has {cluster.num_gpus} GPUs, fewer than parallel.tensor_parallel_size "
            f"{config.parallel.tensor_parallel_size} x parallel.pipeline_parallel_size "
            f"{config.parallel.pipeline_parallel_size} = {needed}: reduce one of these sizes, or add nodes"
        )
    if world_size is not None and world_size < 1:
        raise ValueError(f"the world size is {world_size}: it must be at least 1")
    return world_size or (cluster.num_gpus if cluster else needed)


def planned_vocab_size(config: RunConfig) -> int:
    """Return the number of tokens in the vocabulary: model.vocab_size, else the tokenizer's."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from megatron_step.data.tokenizer import load_tokenizer

    return load_tokenizer(config.data.tokenizer, config.data.end_of_document).vocab_size


def run(config: RunConfig, hooks: Sequence["Hook"] = (), trackers: Sequence["MakeTracker"] = ()) -> bool:
    """Train as `config` says, in this process alone or as one of torchrun's ranks.

    `hooks` are called after each step, before the trackers; each gets a `StepContext` (training/stage.py).
    `trackers` are classes or functions that make a `Tracker` (training/trackers/tracker.py); rank 0 calls them.

    Returns True at the end of training, and False if a signal stopped the run; the run saves a checkpoint first.
    Signals are handled in the main thread only. The process group is destroyed however the run ends, so that another
    run can follow in the same process.

    Raises ValueError, FileNotFoundError or OSError for bad input, before anything is written. Raises NonFiniteError,
    NoGradientError or SaveError if training cannot go on.
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
    """Load a model from a checkpoint, from a run's folder (its newest checkpoint) or from a Hugging Face folder.

    `tokenizer` is the tokenizer's path; None takes the path that the run used. `seq_length` is the number of tokens in
    a window; None takes the model's context length. `model.logits(tokens)` maps tokens [b, s] to logits [b, s, v].

    Raises FileNotFoundError if there is no model at `path`, and ValueError if the model is damaged.
    """
    from megatron_step.evaluation.models import open_model as opened

    with opened(Path(path), tokenizer, seq_length) as model:
        yield model


def export_model(checkpoint: str | Path, out: str | Path, **options: Any) -> "Comparison | None":
    """Write the model of a checkpoint, or of a run's newest checkpoint, as a Hugging Face model.

    `options` are the fields of `ExportOptions` (huggingface/to_hf.py): dtype, max_shard_bytes, adapter_only, check and
    tokenizer.

    Returns the comparison of logits with `check=True`, else None. Raises ValueError, FileNotFoundError or
    FileExistsError for bad input, and DifferentModelError if the comparison fails. After an error `out` does not exist.
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

    `seq_length` is the number of tokens in a training sample; None takes the model's context length. `tokenizer` is the
    tokenizer's path; None takes `source`. `progress` is called with the bytes written so far and the total bytes.

    Raises ValueError, FileNotFoundError or FileExistsError for bad input. After an error `out` does not exist.
    """
    from megatron_step.huggingface.from_hf import import_model as import_from_hf

    return import_from_hf(Path(source), Path(out), seq_length, tokenizer, progress)
