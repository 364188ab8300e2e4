"""Loads an exported directory as a receiver would, and prints its loss on prepared rows as a Trainer computes it.

`python loss_of.py DIRECTORY PREPARED_ROWS BATCH`; knows nothing of outlast.
"""

import json
import os
import sys

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, rows, batch = sys.argv[1], load_from_disk(sys.argv[2]), int(sys.argv[3])
assert not any(key.startswith("OUTLAST") for key in os.environ)
if os.path.exists(f"{directory}/adapter_config.json"):
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(directory)
else:
    model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
total = 0.0
for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    length = max(map(len, part["input_ids"]))

    def padded(name: str, value: int, part=part, length=length) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in part[name]])

    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in part["input_ids"]])
    with torch.inference_mode():
        loss = model(input_ids=padded("input_ids", 0), attention_mask=mask, labels=padded("labels", -100)).loss
    total += float(loss) * len(part["input_ids"])
answer = {"loss": total / len(rows), "dtype": str(model.dtype), "tied": bool(model.config.tie_word_embeddings)}
answer["vocabulary"] = model.get_input_embeddings().weight.shape[0]
print(json.dumps(answer | {"template": bool(tokenizer.chat_template)}))
