"""What the record of an extraction says, and which adapters and models are one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.adapter.model import Adapter
from loratools.format import record
from loratools.reports.subjects import Subjects
from loratools.surgery.extract.layers import Layer, from_json

OPERATION = "extract-svd"


def parameters(adapter: Adapter) -> Mapping[str, Any]:
    """Return what the extraction that made an adapter recorded; {} for an adapter whose last operation was another."""
    step = adapter.provenance[-1] if adapter.provenance else None
    return step.parameters if step and step.operation == OPERATION else {}


def certificate(adapter: Adapter) -> tuple[Layer, ...]:
    """Return the certificate of each layer that an extraction recorded; () for any other adapter."""
    return from_json(parameters(adapter).get("certificate"))


def is_extraction(subjects: Subjects) -> bool:
    """Tell whether the inputs are one extracted adapter, alone or with its fine-tune and base."""
    models = [each.model for each in subjects.models]
    alone = len(subjects.adapters) == 1 and bool(certificate(subjects.adapters[0].adapter))
    beside = not models or (len(models) == 1 and subjects.base is not None and not record.held(record.read(models[0])))
    return alone and beside and not subjects.folders
