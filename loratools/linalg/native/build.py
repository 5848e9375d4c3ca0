"""Hatchling's hook: compile the C files here when the package is built or installed, where there is a compiler."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
LOSS = {
    "rows": "merges will run in torch alone, slower",
    "codes": "quantized weights will be decoded in NumPy alone, slower",
    "proof": "merges will be verified in NumPy alone, slower",
    "residual": "residuals will be kept and read in NumPy alone, slower",
    "delta": "changes will be extracted in torch alone, slower",
    "thin": "adapters in a running model train in torch alone",
}


class NativeRows(BuildHookInterface[Any]):
    """Adds the libraries to the wheel; without a compiler the wheel is pure Python, and slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what became of it to hatchling."""
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # each waits for a compiler of its own
            compiled = list(threads.map(lambda each: self._compile(compiler, *each), LOSS.items()))
        for name, made in zip(LOSS, compiled, strict=True):
            if not made:
                continue
            build_data["artifacts"].append(f"loratools/linalg/native/lib{name}.so")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _compile(self, compiler: str, name: str, loss: str) -> bool:
        folder = Path(self.root, "loratools", "linalg", "native")
        library = folder / f"lib{name}.so"
        library.unlink(missing_ok=True)
        try:
            line = [compiler, *FLAGS, str(folder / f"{name}.c"), "-o", str(library), "-lm"]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
        except OSError as error:
            self.app.display_warning(f"{compiler}: {error.strerror}; {loss}")
            return False
        if done.returncode:
            library.unlink(missing_ok=True)
            self.app.display_warning(f"{compiler} could not compile {name}.c; {loss}:\n{done.stderr}")
        return not done.returncode
