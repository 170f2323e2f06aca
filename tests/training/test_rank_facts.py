"""Ranks that differ end before training: in a world of four that a launcher starts, one line says where and in what."""

import functools
import os
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from time import monotonic
from unittest import mock

import pytest
import torch
from small_run import small_config
from worlds import Worlds, free_port, launched

from megatron_step import train
from megatron_step.config.data import DataConfig
from megatron_step.config.load import config_text
from megatron_step.data.fingerprint import data_fingerprint
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.ops import dispatch
from megatron_step.training import output_folder
from megatron_step.training.rank_facts import ADVICE, rank_facts

FILES = ("tokenizer.model", "corpus.bin", "corpus.idx", "corpus.json")

# What makes one rank differ, in its folder, which stands for the disk of its machine.


def other_config(stack: ExitStack) -> None:
    sys.argv += ["--optimizer.learning_rate", "1e-4"]


def missing_config(stack: ExitStack) -> None:
    Path("config.yaml").unlink()


def bad_option(stack: ExitStack) -> None:
    sys.argv += ["--training.sede", "2"]


def missing_tokenizer(stack: ExitStack) -> None:
    Path("tokenizer.model").unlink()


def missing_corpus(stack: ExitStack) -> None:
    Path("corpus.idx").unlink()


def other_bytes(stack: ExitStack) -> None:
    with Path("corpus.bin").open("r+b") as file:
        file.write(b"\1\1")


def other_side_file(stack: ExitStack) -> None:
    Path("corpus.json").unlink()


def other_tokenizer(stack: ExitStack) -> None:
    text = Path("text.txt")
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    from megatron_step.data.train_tokenizer import train_tokenizer

    train_tokenizer([text], "tokenizer.model", vocab_size=300)


def other_version(stack: ExitStack) -> None:
    installed = Path("sentencepiece-0.0.1.dist-info")
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: sentencepiece\nVersion: 0.0.1\n")
    stack.enter_context(mock.patch.object(sys, "path", [os.getcwd(), *sys.path]))


def other_environment(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.dict(os.environ, {"ONEDNN_MAX_CPU_ISA": "SSE41"}))


def other_threads(stack: ExitStack) -> None:
    torch.set_num_threads(2)
    stack.callback(torch.set_num_threads, 1)


def no_extension(stack: ExitStack) -> None:
    """Pretend that the extension is not built."""
    stack.enter_context(mock.patch.dict(sys.modules, {"megatron_step._C": None}))
    stack.enter_context(
        mock.patch.object(dispatch, "_load_extension", functools.cache(dispatch._load_extension.__wrapped__))
    )


def full_disk(stack: ExitStack) -> None:
    """A quota: files of this rank cannot grow beyond 32 KiB."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, kept[1]))
    stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, kept)


def other_output(stack: ExitStack) -> None:
    """A path that leads to a disk of this machine alone."""
    Path("shared").unlink()
    Path("shared").mkdir()
    stack.enter_context(mock.patch.object(output_folder, "_SEEN_SECONDS", 0.5))


HOST = gethostname()
KINDS: dict[str, tuple[Callable[[ExitStack], None], str, int]] = {
    "config": (
        other_config,
        f"optimizer.learning_rate differs between ranks: 0.0001 for rank 2 on {HOST}, 0.002 for rank 0 on {HOST}. "
        "Start every rank with the same config and options",
        2,
    ),
    "no config": (missing_config, f"rank 2 on {HOST}: cannot read the config config.yaml: No such file", 2),
    "bad option": (bad_option, f"rank 2 on {HOST}: unknown option --training.sede", 2),
    "no tokenizer": (missing_tokenizer, f"rank 2 on {HOST}: the tokenizer tokenizer.model does not exist", 2),
    "no corpus": (missing_corpus, f"rank 2 on {HOST}: corpus.idx does not exist", 2),
    "data of the same size": (other_bytes, "corpus.bin differs between ranks: ", 2),
    "no side file": (other_side_file, f"corpus.json differs between ranks: no file for rank 2 on {HOST}", 2),
    "tokenizer": (other_tokenizer, "tokenizer.model differs between ranks: ", 2),
    "version": (other_version, "the version of sentencepiece differs between ranks: 0.0.1 for rank 2", 2),
    "environment": (other_environment, "ONEDNN_MAX_CPU_ISA differs between ranks: SSE41 for rank 2", 2),
    "threads": (other_threads, "the number of threads (OMP_NUM_THREADS) differs between ranks: 2 for rank 2", 2),
    "kernels": (no_extension, "the backend of the operations differs between ranks: torch for rank 2", 2),
    "full disk": (full_disk, f"rank 2 on {HOST}: cannot write to shared/run: File too large", 1),
    "output folder": (
        other_output,
        f"rank 2 on {HOST}: output_dir shared/run is on this machine another folder than on",
        2,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_differs_is_found_before_training(
    worlds: Worlds, small_data: DataConfig, tmp_path: Path, kind: str
) -> None:
    change, message, status = KINDS[kind]
    if change is no_extension and not dispatch.extension_available():
        pytest.skip("the extension is not built: no rank can lack it alone")
    shared = tmp_path / "shared"
    shared.mkdir()
    for rank in range(4):
        _lay_out_machine(tmp_path / str(rank), shared, small_data)
    answers = worlds(4).run(start_different, folder=tmp_path, change=change, port=free_port())
    assert [answer for answer, _ in answers] == [status] * 4
    assert max(seconds for _, seconds in answers) < 30
    shown = (tmp_path / "log").read_text()
    assert f"error: {message}" in shown
    assert len([line for line in shown.splitlines() if line.startswith("error: ")]) == 1, shown
    assert "c10d" not in shown, "no rank lost its store"
    assert list(shared.iterdir()) == []


def _lay_out_machine(folder: Path, shared: Path, data: DataConfig) -> None:
    """Make a machine's folder with files on its local disk, and a link to the shared files."""
    folder.mkdir()
    for name in FILES:
        shutil.copy(Path(data.tokenizer).parent / name, folder)
    (folder / "shared").symlink_to(shared)
    local = replace(data, train=[(1.0, "corpus")], tokenizer="tokenizer.model", cache_dir="shared/cache")
    (folder / "config.yaml").write_text(config_text(small_config("shared/run", data=local)))


def start_different(folder: Path, change: Callable[[ExitStack], None], port: int) -> tuple[int, float]:
    """The command's exit status and its seconds on each rank, of which rank 2 differs."""
    with ExitStack() as stack:
        rank = stack.enter_context(launched(port))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder / str(rank))
        stack.enter_context(mock.patch.object(sys, "argv", ["train", "--config", "config.yaml"]))
        log = stack.enter_context((folder / "log").open("a"))
        stack.callback(os.dup2, os.dup(2), 2)
        os.dup2(log.fileno(), 2)
        start = monotonic()
        if rank == 2:
            with ExitStack() as changed:
                change(changed)
                return train.main(), monotonic() - start
        return train.main(), monotonic() - start


def test_every_section_has_its_advice(small_data: DataConfig) -> None:
    config = small_config(data=small_data)
    tokenizer = load_tokenizer(small_data.tokenizer)
    facts = rank_facts(config, data_fingerprint(small_data, tokenizer, config.model.seq_length, 0))
    assert facts.keys() == ADVICE.keys()
    assert facts["config"]["model.hidden_size"] == 64
    assert facts["config"]["checkpoint.resume"] == "auto"
    assert facts["versions"]["the version of torch"] == torch.__version__
    assert rank_facts(config, data_fingerprint(small_data, tokenizer, 32, 0)) == facts, "twice the same"
