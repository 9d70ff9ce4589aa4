"""The merge that people do with transformers and PEFT: BASE ADAPTER OUT ROWS."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, out, rows = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
model.resize_token_embeddings(int(rows), mean_resizing=False)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, max_shard_size="2GB")
