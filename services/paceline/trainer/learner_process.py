"""Main of the learner's process: commands in, micro-steps while a grant lasts, news out.

`python -m paceline.trainer.learner_process FD OPTIONS_JSON SERVICE LOG_LEVEL`, started by
trainer/learner_link.py with one end of a socket pair. It looks at the socket between two
micro-steps, so a pause is obeyed within one; without a grant it waits in the kernel. It runs at
idle priority: what serving needs of a core it gets first. It ends when the other end closes.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import torch
from google.protobuf.message import DecodeError

from paceline.domain.errors import PacelineError
from paceline.process.lifecycle import die_with_parent
from paceline.process.logs import setup_logging
from paceline.rpc.draft_codec import sample_from_proto
from paceline.rpc.frames import ConnectionClosedError, FrameSocket
from paceline.trainer.commission import Commission
from paceline.trainer.learner import OnlineLearner
from paceline.trainer.learner_events import Judging, failure_of, progress_of
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.state import resumed_learner, save_state
from paceline.v1 import learner_pb2, samples_pb2

logger = logging.getLogger("paceline.trainer.learner_process")

_REPORT_EVERY_S = 0.5
_IDLE_S = 0.05
"""Wait between two tries of a grant with nothing to learn from."""

_INTAKE_S = 0.01
"""Longest time for samples between two looks at the socket."""
_MAX_INBOX = 1024
"""Samples that may wait for it; with more the socket waits."""

_STREAM_ID = "stream_id"


def main(argv: list[str]) -> int:
    """Run the learner until the other end goes away; return the exit code."""
    fd, options, service, log_level = argv
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    yield_cores()
    setup_logging(service, log_level)
    sock = FrameSocket(socket.socket(fileno=int(fd)))
    try:
        return _serve(sock, LearnerOptions.from_json(options))
    except ConnectionClosedError:
        return 0
    except Exception:
        logger.exception("learner-crashed")
        return 1


def yield_cores() -> None:
    """Run only where nothing else wants to; threads that are started later inherit it."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def _serve(sock: FrameSocket, options: LearnerOptions) -> int:
    extra: dict[str, Any] = {}
    try:
        learner = resumed_learner(options, extra)
    except (PacelineError, ValueError, KeyError, OSError) as error:
        sock.send(learner_pb2.LearnerEvent(failed=failure_of(0, error)))
        return 1
    # A full collection of what importing torch leaves takes longer than a micro-step.
    gc.collect()
    gc.freeze()
    LearnerLoop(learner, sock, str(extra.get(_STREAM_ID, ""))).run()


class LearnerLoop:
    """Alternates between commands and micro-steps."""

    def __init__(self, learner: OnlineLearner, sock: FrameSocket, stream_id: str) -> None:
        """Go on behind `stream_id`."""
        self._learner = learner
        self._sock = sock
        self._stream_id = stream_id
        self._until_s = 0.0
        """When the grant ends; 0 without one."""
        self._is_dry = False
        """Whether the last micro-step had nothing to learn from."""
        self._reported_s = 0.0
        self._max_micro_step_s = 0.0
        self._judging: Judging | None = None
        self._commission: Commission | None = None
        self._is_commissions_turn = False
        self._inbox: deque[learner_pb2.StreamedSample] = deque()

    def run(self) -> NoReturn:
        """Loop until the socket closes (ConnectionClosedError)."""
        ready = learner_pb2.LearnerReady(
            pid=os.getpid(), stream_id=self._stream_id, progress=self._progress()
        )
        self._send(ready=ready)
        while True:
            self._sock.wait(self._pause_s())
            for command in self._sock.recv_ready(learner_pb2.LearnerCommand):
                self._apply(command)
            self._take_in(_INTAKE_S)
            if self._until_s:
                self._work()

    def _pause_s(self) -> float | None:
        if self._inbox:
            return 0.0
        if not self._until_s:
            return None
        left_s = max(0.0, self._until_s - time.monotonic())
        return min(_IDLE_S, left_s) if self._is_dry else 0.0

    def _work(self) -> None:
        """Do one slice of what the grant is for."""
        now_s = time.monotonic()
        if now_s >= self._until_s:
            self._end_grant()
            return
        if self._judging is not None:
            self._judge(self._judging)
            return
        self._is_commissions_turn = not self._is_commissions_turn
        if self._commission is not None and self._is_commissions_turn:
            event = self._commission.work(self._until_s)
            if event is not None:
                self._commission = None
                self._sock.send(event)
            return
        self._is_dry = not self._learner.micro_step(self._until_s)
        taken_s = 0.0 if self._is_dry else self._learner.counters.last_micro_step_s
        self._max_micro_step_s = max(self._max_micro_step_s, taken_s)
        if now_s - self._reported_s >= _REPORT_EVERY_S:
            self._report()

    def _end_grant(self) -> None:
        if self._until_s:
            self._until_s, self._is_dry = 0.0, False
            self._report()

    def _apply(self, command: learner_pb2.LearnerCommand) -> None:
        try:
            self._carry_out(command)
        except (PacelineError, ValueError, OSError) as error:
            logger.warning("command-failed", extra={"fields": {"error": str(error)}})
            self._send(failed=failure_of(command.command_id, error))

    def _carry_out(self, command: learner_pb2.LearnerCommand) -> None:
        learner, number = self._learner, command.command_id
        kind = command.WhichOneof("command")
        if kind not in ("feed", "grant", "pause"):
            # What was fed before is part of what is asked for.
            self._take_in(float("inf"))
        match kind:
            case "feed":
                self._inbox += command.feed.samples
                if len(self._inbox) > _MAX_INBOX:
                    self._take_in(float("inf"))
            case "grant":
                # Threads that wait for work must not spin: none are left from an earlier grant.
                torch.set_num_threads(max(1, command.grant.threads))
                self._until_s = time.monotonic() + command.grant.seconds
                self._is_dry = False
            case "pause":
                self._end_grant()
                self._send(done=learner_pb2.LearnerDone(command_id=number))
            case "judge":
                candidate = Path(command.judge.candidate) if command.judge.candidate else None
                self._drop_judging("another comparison was asked for")
                incumbent = Path(command.judge.incumbent)
                new = learner.first_sight.pairs(incumbent) if command.judge.is_own else ()
                pairs = learner.judging(incumbent, candidate, command.judge.domain)
                self._judging = Judging(number, pairs, new)
            case "export":
                learner.export(Path(command.export.directory))
                exported = learner_pb2.DraftExported(
                    command_id=number,
                    directory=command.export.directory,
                    num_samples=learner.counters.num_samples,
                    num_tokens=learner.counters.num_tokens,
                )
                self._send(exported=exported)
            case "specialise":
                self._drop_commission("another draft was asked for")
                self._commission = Commission(number, command.specialise, learner)
            case "reset":
                learner.reset(Path(command.reset.directory))
                self._drop_judging("the learner was reset")
                self._send(done=learner_pb2.LearnerDone(command_id=number))
            case "save":
                self._save()
                self._send(done=learner_pb2.LearnerDone(command_id=number))

    def _drop_judging(self, why: str) -> None:
        if self._judging is not None:
            failed = failure_of(self._judging.command_id, ValueError(why))
            self._judging = None
            self._send(failed=failed)

    def _drop_commission(self, why: str) -> None:
        if self._commission is not None:
            failed = failure_of(self._commission.command_id, ValueError(why))
            self._commission = None
            self._send(failed=failed)

    def _take_in(self, seconds: float) -> None:
        """Take samples in for so long."""
        until_s = time.monotonic() + seconds
        while self._inbox and time.monotonic() < until_s:
            self._feed(self._inbox.popleft())

    def _feed(self, streamed: learner_pb2.StreamedSample) -> None:
        self._stream_id = streamed.stream_id or self._stream_id
        try:
            message = samples_pb2.Sample.FromString(streamed.sample)
            sample = sample_from_proto(message)
        except (DecodeError, ValueError) as error:
            self._learner.counters.num_corrupt += 1
            self._note_corrupt(error)
            return
        try:
            self._learner.feed(sample)
        except ValueError as error:
            self._note_corrupt(error)
        self._is_dry = False

    def _note_corrupt(self, error: Exception) -> None:
        fields = {"error": str(error), "num_corrupt": self._learner.counters.num_corrupt}
        logger.debug("sample-corrupt", extra={"fields": fields})

    def _save(self) -> None:
        state = self._learner.options.state
        if not state:
            raise ValueError("this learner has no place for its state")
        tensors, values = self._learner.state()
        save_state(Path(state), tensors, {**values, "extra": {_STREAM_ID: self._stream_id}})

    def _judge(self, judging: Judging) -> None:
        until_s = min(self._until_s, time.monotonic() + self._learner.options.micro_step_s)
        if judging.advance(until_s):
            self._judging = None
            self._send(judged=judging.result())

    def _report(self) -> None:
        self._reported_s = time.monotonic()
        self._send(progress=self._progress())
        self._max_micro_step_s = 0.0

    def _progress(self) -> learner_pb2.LearnerProgress:
        return progress_of(
            self._learner,
            is_training=bool(self._until_s),
            max_micro_step_s=self._max_micro_step_s,
            stream_id=self._stream_id,
        )

    def _send(self, **event: Any) -> None:
        self._sock.send(learner_pb2.LearnerEvent(**event))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
