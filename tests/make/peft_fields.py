"""List the fields of the installed PEFT's LoraConfig with their defaults: `python -m tests.make.peft_fields`.

Run it for a new PEFT: it writes `tests/dialects/peft/fields.json`, and the tests then name every field that has no
meaning yet in `loratools/dialects/peft/fields.py`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tests.make import REPOSITORY

TABLE = REPOSITORY / "tests" / "dialects" / "peft" / "fields.json"


def listed() -> dict[str, Any]:
    """Return field -> default, as PEFT would write it; the version under `peft`."""
    import peft

    config = peft.LoraConfig()
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields |= {"peft_type": config.peft_type.value, "peft_version": None, "runtime_config": {}}
    major, minor = peft.__version__.split(".")[:2]
    return {"peft": f"{major}.{minor}", "fields": fields}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(listed(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
