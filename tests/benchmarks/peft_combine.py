"""What users do today: `add_weighted_adapter`. `python peft_combine.py BASE ADAPTER OTHER TYPE` prints its seconds.

The model is loaded before the clock starts; what is timed is the combination alone, in memory.
"""

import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, other, kind = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter, "a")
model.load_adapter(other, "b")
more = {"density": 0.5} if kind.startswith("ties") else {}
rank = {} if kind == "cat" else {"svd_rank": 16}
begun = time.perf_counter()
model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum", combination_type=kind, **rank, **more)
print(time.perf_counter() - begun)
