"""Whatever verb is killed, whenever: old or new is there, whole; the next run succeeds, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, clean_env
from tests.faults.kill_verbs import VERBS, judge


@pytest.mark.slow
@pytest.mark.kills
def test_killed_verbs(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """500 kills, or eight in the sample."""
    pytest.importorskip("huggingface_hub")
    kills = 500 if pytestconfig.option.whole else 8
    command = [sys.executable, "-m", "tests.faults.kill_verbs", tmp_path, str(pytestconfig.option.seed), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env(), cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["crashes"] == 0
    assert [fault for trial in outcome["trials"] for fault in judge(trial)] == []
    killed = Counter(trial["verb"] for trial in outcome["trials"] if trial["code"] == -9)
    assert killed.total() == kills
    assert len(killed) >= 0.8 * min(kills, len(VERBS))  # a run may be over before its parent kills it


RIGHT = {
    "verb": "merge", "code": -9, "before": "absent", "left": [".out.partial-0123abcd"], "failed": 1,
    "meanwhile": "absent", "left_then": [], "rerun": 0, "after": "new", "left_last": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"before": "BROKEN", "meanwhile": "BROKEN"}, "the output was half there"),
        ({"before": "old", "meanwhile": "old"}, "the output was half there"),
        ({"code": 1}, "the run failed by itself"),
        ({"failed": 0}, "the broken command did not fail"),
        ({"meanwhile": "new"}, "a command that failed changed the output"),
        ({"left_then": [".out.partial-0123abcd"]}, "a command that failed did not sweep"),
        ({"rerun": 1}, "the next run did not go well"),
        ({"after": "BROKEN"}, "the output is not right"),
        ({"left_last": [".out.partial-0123abcd"]}, "something was left behind"),
    ],
)
def test_the_judge_sees_what_is_wrong(change: dict[str, object], said: str) -> None:
    assert judge(RIGHT) == []
    (fault,) = judge({**RIGHT, **change})
    assert fault.startswith(said)
