"""promtool of a Prometheus installation, for tests; without one they are skipped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_TIMEOUT_S = 60


def promtool(*arguments: str | Path, text: str = "") -> None:
    """Run promtool on arguments and standard input; fail with what it says."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: it comes with the package prometheus")
    done = subprocess.run(
        [program, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
