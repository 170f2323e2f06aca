"""Generate text with a model."""

import torch

from megatron_step.evaluation.models import LanguageModel


@torch.no_grad()
def generate(model: LanguageModel, prompt: str, num_tokens: int, temperature: float, seed: int) -> str:
    """Return `prompt` with up to `num_tokens` generated tokens; generation stops at the end-of-document token.

    Temperature 0 takes the most probable token. Above 0, tokens are sampled from softmax(logits / temperature). Each
    token is predicted from the `seq_length` tokens before it.
    """
    tokenizer = model.tokenizer
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    for _ in range(num_tokens):
        context = torch.tensor([ids[-model.seq_length :]], device=model.parallel.device)  # [1, s]
        logits = model.logits(context)[0, -1]  # [v]
        token = _draw(logits[: tokenizer.vocab_size].float().cpu(), temperature, generator)
        if token == tokenizer.eod_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
