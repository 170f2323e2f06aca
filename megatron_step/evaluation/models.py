"""A model to evaluate: that of a checkpoint, or an exported one in transformers, behind one interface."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_step.config.parallel import ParallelConfig
from megatron_step.data.tokenizer import Tokenizer, fitting_tokenizer
from megatron_step.engine.launcher import started_by_torchrun
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world
from megatron_step.huggingface.hf_folder import open_folder
from megatron_step.huggingface.transformers_model import load_in_transformers
from megatron_step.training.inspection import Inspected, open_checkpoint


@dataclass(frozen=True)
class LanguageModel:
    """A whole model on each data-parallel rank, in the number format in which its run trained or it was written."""

    path: Path
    """The checkpoint, or the exported model's folder."""
    logits: Callable[[Tensor], Tensor]
    """From tokens [b, s] to logits [b, s, v] for all tokens of the model's vocabulary."""
    seq_length: int
    """Most tokens to predict the next one from."""
    tokenizer: Tokenizer
    parallel: Parallel
    inspected: Inspected | None = None
    """The checkpoint's run, if it is one."""


@contextmanager
def open_model(
    path: Path, tokenizer: str | None = None, seq_length: int | None = None, end_of_document: str | None = None
) -> Iterator[LanguageModel]:
    """Load the model of a checkpoint, of the newest one of a run's folder, or of a Hugging Face model's folder.

    `tokenizer` is where the tokenizer lies, None for where the run had it or for the model's folder; `seq_length` are
    the tokens of a window, None for as many as the model is made for; `end_of_document` is the token that ends
    documents, None for that of the checkpoint's run or the tokenizer's own.

    Raises FileNotFoundError if there is nothing at `path` or a file is missing, and ValueError if it is nothing of this
    or damaged, if the tokenizer does not fit, or the window is too long.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint, no run and no Hugging Face model at {path}")
    if (path / "config.json").is_file():
        opened = _open_exported(path, tokenizer, seq_length, end_of_document)
    elif (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        opened = _open_checkpoint(path, tokenizer, seq_length, end_of_document)
    else:
        raise ValueError(
            f"{path} is neither a checkpoint (manifest.json), nor a run's output folder (checkpoints/), nor a Hugging "
            "Face model (config.json)"
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
            raise ValueError(f"--seq-length is {seq_length}: {path} is made for 1 to {longest:,} tokens")
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
