"""perplexity.py FOLDER TEXT LENGTH: the loss of a text by transformers alone, in windows of LENGTH tokens."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text, length = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8"), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
end = tokenizer.eos_token_id
ids = [end, *tokenizer(text, add_special_tokens=False).input_ids, end]  # a document between ends of documents
nats = 0.0
with torch.no_grad():
    for first in range(0, len(ids) - 1, length):
        window = torch.tensor(ids[first : first + length + 1])
        logits = model(window[None, :-1]).logits[0].double()  # torch adds exponentials of fp32 logits in fp32
        nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
print(f"{folder}: loss {nats / (len(ids) - 1):.6f} by transformers")
