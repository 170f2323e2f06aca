"""Every token is scored once, from the context that the formula gives it, and models agree on the sum."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import Worlds

from megatron_step.config.data import DataConfig
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.engine.parallel import Parallel
from megatron_step.evaluation.models import LanguageModel, open_model
from megatron_step.evaluation.perplexity import TextLoss, text_loss, windows
from megatron_step.evaluation.text import TokenizedText, text_of_files


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 23])
@pytest.mark.parametrize("length", [1, 4, 7])
def test_each_token_is_scored_once_from_where_the_formula_says(num_tokens: int, length: int) -> None:
    for stride in range(1, length + 1):
        first_inputs = {}
        for start, end, num_scored in windows(num_tokens, length, stride):
            assert end - start <= length
            for token in range(end - num_scored + 1, end + 1):
                assert token not in first_inputs
                first_inputs[token] = start
        expected = {i: stride * max(0, math.ceil((i - length) / stride)) for i in range(1, num_tokens + 1)}
        assert first_inputs == expected


def test_disjoint_windows_are_those_of_training_samples() -> None:
    assert list(windows(10, 4, 4)) == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]


@pytest.mark.parametrize("stride", [0, -1, 5])
def test_a_stride_beyond_the_window_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="it must be between 1 and the window's 4 tokens"):
        list(windows(10, 4, stride))


def test_a_case_by_hand(alone: Parallel, exported: Path) -> None:
    # Of tokens 0 (end of document), 1 and 2: p(1 | 0) = 1/2, p(2 | 1) = 1/4, p(0 | 2) = 1/8.
    table = torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 2, 3 / 8]])
    tokenizer = load_tokenizer(exported)
    model = LanguageModel(Path(), lambda tokens: table[tokens].log(), 2, tokenizer, alone)
    text = TokenizedText(np.array([0, 1, 2, 0]), num_documents=1, num_bytes=3)
    for stride in (1, 2):
        result = text_loss(model, text, stride)
        assert result.nats == pytest.approx(math.log(64), rel=1e-6)  # 6 bits for 3 tokens, and 3 bytes
        assert result.perplexity == pytest.approx(4, rel=1e-6)
        assert result.bits_per_byte == pytest.approx(2, rel=1e-6)
        assert (result.num_tokens, result.num_bytes) == (3, 3)


def test_the_sum_is_exact_for_many_tokens_and_a_large_vocabulary(alone: Parallel, small_data: DataConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    # As in trained models: one logit stands out, and -ln p is small beside the logits that it is the difference of.
    table = torch.randn(7, 50_000, generator=generator)
    nats = torch.empty(7, dtype=torch.float64)
    for token in range(7):
        table[token, (token + 1) % 7] = 24.0
        nats[token] = table[token].double().logsumexp(0) - 24.0
    tokens = np.arange(1025) % 7
    model = LanguageModel(Path(), lambda ids: table[ids], 256, load_tokenizer(small_data.tokenizer), alone)
    result = text_loss(model, TokenizedText(tokens, num_documents=1, num_bytes=1))
    assert result.nats == pytest.approx(float(nats[torch.from_numpy(tokens[:-1])].sum()), rel=1e-8)


def test_a_hopeless_loss_has_a_perplexity() -> None:
    assert TextLoss(nats=1e6, num_tokens=10, num_bytes=10).perplexity > 1e300


def measured(path: Path, text_file: Path, strides: list[int | None]) -> list[TextLoss]:
    """The losses of a model with each stride."""
    with open_model(path) as model:
        text = text_of_files([text_file], model.tokenizer)
        return [text_loss(model, text, stride) for stride in strides]


def transformers_loop(folder: Path, paragraphs: list[str], length: int, stride: int) -> float:
    """The loss by the loop that transformers' documentation has, over the same tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end_of_document = tokenizer.eos_token_id
    ids = [end_of_document]
    for paragraph in paragraphs:
        ids += [*tokenizer(paragraph)["input_ids"], end_of_document]
    nats, scored_to = 0.0, 0
    for start in range(0, len(ids) - 1, stride):
        end = min(start + length, len(ids) - 1)
        labels = [-100] * (scored_to - start + 1) + ids[scored_to + 1 : end + 1]
        with torch.no_grad():
            output = model(torch.tensor([ids[start : end + 1]]), labels=torch.tensor([labels]))
        nats += float(output.loss) * (end - scored_to)
        scored_to = end
        if end == len(ids) - 1:
            break
    return nats / (len(ids) - 1)


def test_checkpoint_export_and_a_plain_loop_agree(
    trained: Path, exported: Path, text_file: Path, paragraphs: list[str]
) -> None:
    ours, theirs = (measured(path, text_file, [None, 32, 5]) for path in (trained, exported))
    assert [result.nats for result in theirs] == pytest.approx([result.nats for result in ours], rel=1e-5)
    assert ours[0] == ours[1], "a stride of a window is none"
    loops = [transformers_loop(exported, paragraphs, 32, stride) for stride in (32, 5)]
    assert [ours[0].loss, ours[2].loss] == pytest.approx(loops, rel=1e-5)
    assert abs(ours[2].loss / ours[0].loss - 1) > 1e-4, "more context is another loss"
    assert ours[0].num_bytes == sum(len(paragraph.encode()) for paragraph in paragraphs)


def test_ranks_share_the_windows(worlds: Worlds, trained: Path, exported: Path, text_file: Path) -> None:
    for path in (trained, exported):
        (alone,) = measured(path, text_file, [7])
        for (shared,) in worlds(2).run(measured, path=path, text_file=text_file, strides=[7]):
            assert shared.nats == pytest.approx(alone.nats, rel=1e-6)
            assert (shared.num_tokens, shared.num_bytes) == (alone.num_tokens, alone.num_bytes)
