"""What `loratools demo` shows: a small trained model, an adapter for it, and held-out text, inside the package.

tour       every capability once
stop       one stop of it
trained    the stop at training in a running model
quantized  the stop at a base of 8-bit codes
recorded   which command is said to have made what the tour makes
llama      the model's forward pass: what an adapter does to it
data       model, adapter and text
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def data_folder() -> Path:
    """Give the folder of the demo's data: `base/`, `adapter/`, `bible.txt`, `plays.txt` and `PROVENANCE.md`.

    The path is that of an ordinary installation, where the package lies unpacked on the disk.
    """
    return Path(str(files("loratools.demo"))) / "data"
