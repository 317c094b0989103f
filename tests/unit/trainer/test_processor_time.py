"""The clock of another process counts what it computes and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time

from paceline.trainer.processor_time import processor_time_s

BUSY = "import time\nprint(flush=True)\ninput()\nend = time.process_time() + 0.3\n"
BUSY += "while time.process_time() < end: pass\nprint(time.process_time(), flush=True)\ninput()"


def test_it_is_what_the_process_itself_sees() -> None:
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        before = processor_time_s(process.pid)
        time.sleep(0.1)
        assert before is not None
        at_rest = processor_time_s(process.pid)
        assert at_rest is not None and at_rest - before < 0.05
        process.stdin.write("\n")
        process.stdin.flush()
        own = float(process.stdout.readline())
        found = processor_time_s(process.pid)
        assert found is not None and own <= found < own + 0.1
        process.kill()
        process.wait()
        assert processor_time_s(process.pid) is None
