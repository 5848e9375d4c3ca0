from __future__ import annotations

from .contract import DialectContract


class TestFolder(DialectContract):
    name = "loratools"


class TestSingleFile(DialectContract):
    name = "loratools"
    suffix = ".safetensors"
