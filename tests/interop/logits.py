"""Compute logits in an environment that has transformers and nothing of ours: `python logits.py JOBS.json`.

JOBS.json lists `{"class", "model", "inputs", "output"}`: a model class, the folder to load, a file of inputs that
`torch.save` wrote, and where its logits go.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Load every model as its class does, and save its logits."""
    import torch
    import transformers

    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        model = getattr(transformers, job["class"]).from_pretrained(job["model"]).eval()
        with torch.no_grad():
            torch.save(model(**torch.load(job["inputs"])).logits, job["output"])
    Path(sys.argv[1]).with_suffix(".version").write_text(transformers.__version__, encoding="utf-8")


if __name__ == "__main__":
    main()
