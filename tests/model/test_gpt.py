"""The model gives logits, or each token's loss over the true vocabulary."""

import pytest
import torch
from small_run import PLAIN, TIED, VOCAB_SIZE, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import build_model


@pytest.mark.parametrize("model", [PLAIN, TIED], ids=["untied", "tied"])
def test_losses_are_the_cross_entropy_of_the_logits(alone: Parallel, model: dict) -> None:
    (chunk,) = build_model(small_config(model=model).model, VOCAB_SIZE, alone, "fp32", seed=1)
    tokens, labels = torch.randint(0, VOCAB_SIZE, (2, 3, 32)).unbind()
    with torch.no_grad():
        logits = chunk(input_ids=tokens, position_ids=None, attention_mask=None)  # [b, s, padded v]
        losses = chunk(input_ids=tokens, position_ids=None, attention_mask=None, labels=labels)  # [b, s]
    assert logits.shape == (3, 32, 256)
    expected = torch.nn.functional.cross_entropy(
        logits[..., :VOCAB_SIZE].flatten(0, 1), labels.flatten(), reduction="none"
    )
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-5, atol=1e-5)


def test_a_token_does_not_see_those_after_it(alone: Parallel) -> None:
    (chunk,) = build_model(small_config().model, VOCAB_SIZE, alone, "fp32", seed=1)
    tokens = torch.randint(0, VOCAB_SIZE, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % VOCAB_SIZE
    with torch.no_grad():
        before, after = (chunk(input_ids=ids, position_ids=None, attention_mask=None) for ids in (tokens, changed))
    torch.testing.assert_close(before[0, :20], after[0, :20])
    assert not torch.allclose(before[0, 20:], after[0, 20:])
