"""The text that a run trains and evaluates on."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from megatron_step.config.numbers import check_finite, check_seed
from megatron_step.config.paths import expand_path


@dataclass(frozen=True)
class DataConfig:
    """Weighted blends of preprocessed corpora, and the tokenizer that made them."""

    train: list[tuple[float, str]]
    """Pairs of weight and path prefix of a corpus (prefix.bin and prefix.idx) to train on."""
    tokenizer: str
    """A SentencePiece .model file, or a folder with a Hugging Face tokenizer."""
    end_of_document: str | None = None
    """Token that ends each document, such as <|endoftext|>; null for the tokenizer's end-of-text token."""
    validation: list[tuple[float, str]] | None = None
    """Pairs of weight and path prefix to evaluate on; null takes the second share of `split`, or nothing."""
    split: tuple[float, float] | None = None
    """Shares of the training documents for training and validation, such as (99, 1); excludes `validation`."""
    seed: int = 1
    """Seed of the order of the samples."""
    cache_dir: str | None = None
    """Folder for the datasets' index files; null for a folder `cache` beside the first corpus."""

    def __post_init__(self) -> None:
        check_finite("data", self)
        check_seed("data.seed", self.seed)
        for name in ("train", "validation"):
            blend = getattr(self, name)
            if blend is not None:
                object.__setattr__(self, name, [(weight, expand_path(prefix)) for weight, prefix in blend])
                _check_blend(f"data.{name}", getattr(self, name))
        object.__setattr__(self, "tokenizer", expand_path(self.tokenizer))
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", expand_path(self.cache_dir))
        if self.split is not None:
            if self.validation is not None:
                raise ValueError("data.split and data.validation exclude each other: set one of them to null")
            if len(self.split) != 2 or min(self.split) < 0 or self.split[0] == 0:
                raise ValueError(f"data.split must be two shares such as [99, 1], not {list(self.split)}")

    @property
    def has_validation(self) -> bool:
        """Return whether there is text to evaluate on."""
        return self.validation is not None or (self.split is not None and self.split[1] > 0)


DataPart = Literal["train", "validation"]


def _check_blend(name: str, blend: list[tuple[float, str]]) -> None:
    if not blend:
        raise ValueError(f"{name} is empty: give at least one [weight, path prefix]")
    for weight, prefix in blend:
        if not (isfinite(weight) and weight > 0):
            raise ValueError(f"{name}: the weight {weight} of {prefix} must be a positive number")
    prefixes = [prefix for _, prefix in blend]
    if len(set(prefixes)) < len(prefixes):
        raise ValueError(f"{name} names a corpus twice: give each prefix once, with the sum of its weights")
