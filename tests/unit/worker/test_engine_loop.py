"""The engine's loop tells of speculation now and then, and to the end."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from typing import Any

from paceline.domain.request import GenerationSpec
from paceline.engine.engine import Engine
from paceline.engine.events import EngineLoad
from paceline.engine.spec.report import (
    REPORT_PERIOD_S,
    DrafterReport,
    PacedReport,
    SpeculationReport,
)
from paceline.rpc import codec
from paceline.rpc.frames import ConnectionClosedError, FrameSocket
from paceline.v1 import engine_pb2
from paceline.worker.engine_process import EngineLoop
from tests.unit.engine.fake_runner import fake_engine, prompt_of


class ReportingEngine:
    """An engine whose every step counts as a round of a drafter; it reports as engines do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reports = PacedReport(self._report)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def load(self) -> EngineLoad:
        return replace(self._engine.load(), speculation=self._reports.at(time.monotonic()))

    def _report(self) -> SpeculationReport:
        return SpeculationReport((DrafterReport("trie", rounds=self._engine.load().num_steps),))


def events_of(engine: Any, num_tokens: int, seconds: float) -> list[engine_pb2.StepOutput]:
    """Run one request and return all the steps told of within some time."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        try:
            EngineLoop(engine, FrameSocket(theirs)).run()
        except ConnectionClosedError:
            theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    sock, steps = FrameSocket(ours), []
    spec = GenerationSpec("r", prompt_of("r", 5), max_tokens=num_tokens, ignore_eos=True)
    submit = engine_pb2.SubmitRequest(spec=codec.spec_to_proto(spec), fleet_request_id="r")
    sock.send(engine_pb2.EngineCommand(submit=submit))
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        sock.wait(0.05)
        for event in sock.recv_ready(engine_pb2.EngineEvent):
            assert event.WhichOneof("event") == "step"
            steps.append(event.step)
    ours.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    return steps


def test_reports_are_few_and_the_last_one_tells_of_the_last_step() -> None:
    engine, _ = fake_engine(num_pages=64)
    started_s = time.monotonic()
    steps = events_of(ReportingEngine(engine), 200, 2.2 * REPORT_PERIOD_S)
    elapsed_s = time.monotonic() - started_s
    reports = [s.load.speculation for s in steps if s.load.HasField("speculation")]
    assert 2 <= len(reports) <= elapsed_s / REPORT_PERIOD_S + 2 < len(steps)
    assert reports[-1].drafters[0].rounds == engine.load().num_steps > 100


def test_an_engine_without_speculation_tells_nothing_of_it() -> None:
    engine, _ = fake_engine()
    steps = events_of(engine, 20, 0.5)
    assert len(steps) >= 20
    assert not any(step.load.HasField("speculation") for step in steps)
