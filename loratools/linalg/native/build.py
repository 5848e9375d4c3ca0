"""Hatchling's hook: compile `rows.c` when the package is built or installed, where there is a compiler."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")


class NativeRows(BuildHookInterface[Any]):
    """Adds the library to the wheel; without a compiler the wheel is pure Python, and slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what became of it to hatchling."""
        folder = Path(self.root, "loratools", "linalg", "native")
        library = folder / "librows.so"
        library.unlink(missing_ok=True)
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
        try:
            line = [compiler, *FLAGS, str(folder / "rows.c"), "-o", str(library), "-lm"]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
        except OSError as error:
            self.app.display_warning(f"{compiler}: {error.strerror}; merges will run in torch alone, slower")
            return
        if done.returncode:
            library.unlink(missing_ok=True)
            self.app.display_warning(
                f"{compiler} could not compile rows.c; merges will run in torch alone, slower:\n{done.stderr}"
            )
            return
        build_data["artifacts"].append("loratools/linalg/native/librows.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
