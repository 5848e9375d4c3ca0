"""What the tests are run on: `tiny` models in kilobytes, and real ones, which `python -m tests.make` makes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def real_models_folder() -> Path:
    """Return where the real models lie once they are made; the folder is there whole or not at all.

    It is a folder of $LORATOOLS_REAL_MODELS (default: .real-models in the checkout) that is named after the script that
    makes them, so that models of another script are never taken for these.
    """
    script = Path(__file__).with_name("real_models.py").read_bytes()
    parent = os.environ.get("LORATOOLS_REAL_MODELS") or REPOSITORY / ".real-models"
    return Path(parent).absolute() / hashlib.sha256(script).hexdigest()[:12]
