"""Open a model for evaluation, from a checkpoint or from a Hugging Face folder, with one interface for both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_step.config.counts import counted
from megatron_step.config.parallel import ParallelConfig
from megatron_step.data.tokenizer import Tokenizer, fitting_tokenizer
from megatron_step.engine.launcher import started_by_torchrun
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world
from megatron_step.huggingface.hf_folder import open_folder
from megatron_step.huggingface.transformers_model import load_in_transformers
from megatron_step.training.inspection import Inspected, open_checkpoint


@dataclass(frozen=True)
class LanguageModel:
    """A whole model on each data-parallel rank, in the number format of its run or of its files."""

    path: Path
    """Path of the checkpoint or of the Hugging Face folder."""
    logits: Callable[[Tensor], Tensor]
    """Function from tokens [b, s] to logits [b, s, v] for all tokens of the model's vocabulary."""
    seq_length: int
    """Largest number of tokens from which the next one is predicted."""
    tokenizer: Tokenizer
    """The model's tokenizer."""
    parallel: Parallel
    """This process's ranks."""
    inspected: Inspected | None = None
    """The opened checkpoint; None for a Hugging Face model."""


@contextmanager
def open_model(
    path: Path, tokenizer: str | None = None, seq_length: int | None = None, end_of_document: str | None = None
) -> Iterator[LanguageModel]:
    """Load a model from a checkpoint, from a run's folder (its newest checkpoint) or from a Hugging Face folder.

    `tokenizer` is the tokenizer's path; None takes the path that the run used, or the model's folder. `seq_length` is
    the number of tokens in a window; None takes the model's context length. `end_of_document` is the token that ends
    documents; None takes the token of the run, or the tokenizer's end-of-text token.

    Raises FileNotFoundError if `path` or a file in it is missing. Raises ValueError if `path` is not a model or is
    damaged, if the tokenizer does not fit, or if the window is too long.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a checkpoint, a run's folder or a Hugging Face model")
    if (path / "config.json").is_file():
        opened = _open_exported(path, tokenizer, seq_length, end_of_document)
    elif (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        opened = _open_checkpoint(path, tokenizer, seq_length, end_of_document)
    else:
        raise ValueError(
            f"{path} is not a model: give a checkpoint (with manifest.json), a run's output folder (with checkpoints/) "
            "or a Hugging Face model (with config.json)"
        )
    with opened as model:
        yield model


@contextmanager
def _open_checkpoint(
    path: Path, tokenizer: str | None, seq_length: int | None, end_of_document: str | None
) -> Iterator[LanguageModel]:
    with open_checkpoint(path, tokenizer, end_of_document) as inspected:
        (model,), longest = inspected.chunks, inspected.config.model.seq_length
        if seq_length is not None and not 1 <= seq_length <= longest:
            raise ValueError(f"--seq-length is {seq_length}, but {path} is made for 1 to {counted(longest, 'token')}")
        vocab_size = inspected.found.manifest.vocab_size

        def logits(tokens: Tensor) -> Tensor:
            padded: Tensor = model(input_ids=tokens, position_ids=None, attention_mask=None)
            return padded[..., :vocab_size]

        yield LanguageModel(
            inspected.found.path, logits, seq_length or longest, inspected.tokenizer, inspected.parallel, inspected
        )


@contextmanager
def _open_exported(
    path: Path, tokenizer: str | None, seq_length: int | None, end_of_document: str | None
) -> Iterator[LanguageModel]:
    config = open_folder(path, seq_length).model
    assert config.vocab_size is not None
    own_tokenizer = fitting_tokenizer(tokenizer or str(path), config.vocab_size, None, None, end_of_document)
    try:
        with parallel_layout(ParallelConfig(), seed=1, alone=not started_by_torchrun()) as parallel:
            model = load_in_transformers(path, "auto").to(parallel.device)
            yield LanguageModel(
                path, lambda tokens: model(tokens, use_cache=False).logits, config.seq_length, own_tokenizer, parallel
            )
    finally:
        stop_world()
