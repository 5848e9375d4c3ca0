"""Pointing the real huggingface_hub client at a local Hub, in this process or in one of its own.

huggingface_hub freezes its constants at import, so setting HF_ENDPOINT later has no effect in this process:
`aim` patches the constants, `api` passes the endpoint, and `run` starts a process with the environment set.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from tests.hub.server.hub import LocalHub

ROOT = Path(__file__).parents[3]


def api(hub: LocalHub, token: str | None = LocalHub.token) -> HfApi:
    """Return a client of `hub`; token None sends no credential at all."""
    return HfApi(endpoint=hub.endpoint, token=token or False)


def environment(
    hub: LocalHub, home: Path, *, token: str | None = LocalHub.token, xet: bool = False, **more: str
) -> dict[str, str]:
    """Return the environment for a process that is to use `hub`, free of this machine's own settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **{name: value for name, value in own.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **({} if xet else {"HF_HUB_DISABLE_XET": "1"}),
        **({"HF_TOKEN": token} if token else {}),
        **more,
    }


def run(
    hub: LocalHub, home: Path, *command: str, token: str | None = LocalHub.token, xet: bool = False, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command against `hub` and return it with its output; `more` are further environment variables."""
    env: Mapping[str, str] = environment(hub, home, token=token, xet=xet, **more)
    return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=120, check=False)


def aim(monkeypatch: pytest.MonkeyPatch, hub: LocalHub, home: Path) -> None:
    """Make `hub` the default Hub of this process, with its own cache and token folder, without xet."""
    cache = str(home / "hub")
    values = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": cache,
        "HUGGINGFACE_HUB_CACHE": cache,
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in environment(hub, home).items():
        if name.startswith("HF_"):
            monkeypatch.setenv(name, value)
