"""The trainer's end of its learner: starts the process and speaks with it; no torch here.

Frames are protobuf (proto/paceline/v1/learner.proto) over a socket pair. Every question has a
deadline. When the process dies or hangs, all that is asked fails as retryable and `run` raises: its
owner starts another one, which goes on from the last saved state.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.domain.errors import (
    DeadlineError,
    ExhaustedError,
    InternalError,
    PacelineError,
    UnavailableError,
)
from paceline.rpc.frames import FrameReader, encode
from paceline.trainer.learner_options import LearnerOptions
from paceline.v1 import learner_pb2

START_TIMEOUT_S = 120.0
"""Importing torch at idle priority on a busy machine takes its time."""

STOP_TIMEOUT_S = 2.0
"""The learner ends within a micro-step once the socket closes."""

MAX_BUFFERED_BYTES = 16 << 20
"""Frames waiting for a learner that does not read; beyond this samples are refused."""

MAX_PENDING = 16
"""Questions that wait for answers at a time."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A checkpoint that was written."""

    directory: str
    num_samples: int
    num_tokens: int


class LearnerLink:
    """Owns the learner process. `start` it, keep `run` running, `close` it."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._frames = FrameReader()
        self._has_ended = False
        self._numbers = itertools.count(1)
        self._judging = asyncio.Lock()
        """Held while drafts are compared: the learner drops a comparison for the next one."""
        self._pending: dict[int, asyncio.Future[learner_pb2.LearnerEvent]] = {}
        self.progress = learner_pb2.LearnerProgress()
        """The last that was reported."""
        self.on_progress: Callable[[learner_pb2.LearnerProgress], None] = lambda progress: None
        """Receives every report."""

    # -- life -----------------------------------------------------------------------------

    async def start(
        self,
        options: LearnerOptions,
        *,
        service: str = "learner",
        log_level: str = "INFO",
        timeout_s: float = START_TIMEOUT_S,
    ) -> learner_pb2.LearnerReady:
        """Start the process and wait until it takes commands.

        Raises:
            UnavailableError: it did not come up; the message says why.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                fd = theirs.fileno()
                module = ["-m", "paceline.trainer.learner_process"]
                args = [*module, str(fd), options.to_json(), service, log_level]
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, *args, pass_fds=[fd]
                )
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        try:
            async with asyncio.timeout(timeout_s):
                event = await self._frames.read(self._reader, learner_pb2.LearnerEvent)
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise UnavailableError("the learner did not start", reason="learner-died") from error
        if event.WhichOneof("event") != "ready":
            raise UnavailableError(event.failed.message, reason=event.failed.reason)
        self.progress = event.ready.progress
        return event.ready

    async def run(self) -> None:
        """Carry news until the learner ends; then raise.

        Raises:
            UnavailableError: the process ended; all questions have failed.
        """
        assert self._reader is not None
        try:
            while True:
                event = await self._frames.read(self._reader, learner_pb2.LearnerEvent)
                self._handle(event)
        except (EOFError, ConnectionError) as error:
            raise _learner_died() from error
        finally:
            self._has_ended = True
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(_learner_died())

    async def close(self) -> None:
        """End the process and wait for it."""
        if self._writer is not None:
            self._writer.close()
        if self._process is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    # -- commands -------------------------------------------------------------------------

    def feed(self, samples: Sequence[tuple[str, bytes]]) -> None:
        """Hand over samples, each with its stream id and serialized.

        Raises:
            ExhaustedError: the learner does not read; nothing was handed over.
            UnavailableError: it is gone.
        """
        message = learner_pb2.FeedSamples(
            samples=[
                learner_pb2.StreamedSample(stream_id=stream_id, sample=sample)
                for stream_id, sample in samples
            ]
        )
        assert self._writer is not None
        if self._writer.transport.get_write_buffer_size() > MAX_BUFFERED_BYTES:
            raise ExhaustedError("the learner does not read", reason="learner-busy")
        self._send(learner_pb2.LearnerCommand(feed=message))

    def grant(self, threads: int, seconds: float) -> None:
        """Let the learner compute for a while from now on; replaces an earlier grant.

        Raises:
            UnavailableError: it is gone.
        """
        grant = learner_pb2.GrantTraining(threads=threads, seconds=seconds)
        self._send(learner_pb2.LearnerCommand(grant=grant))

    async def pause(self, timeout_s: float = 5.0) -> None:
        """End a grant; returns once the learner stands still.

        Raises:
            DeadlineError, UnavailableError: it does not answer, or is gone.
        """
        await self._ask(timeout_s, pause=learner_pb2.PauseTraining())

    async def judge(
        self,
        incumbent: str,
        candidate: str = "",
        domain: str = "",
        *,
        is_own: bool = False,
        timeout_s: float = 600.0,
    ) -> learner_pb2.DraftsJudged:
        """Compare a draft with the incumbent on held-out samples, of one domain or all.

        One comparison at a time, each taking as much as is granted; others wait.

        `is_own`: the learner exported it; what it was like on new samples comes, too.

        Raises:
            DeadlineError, UnavailableError: there was no answer, or the learner is gone.
            InternalError: a draft cannot be loaded; says why.
        """
        judge = learner_pb2.JudgeDrafts(
            incumbent=incumbent, candidate=candidate, domain=domain, is_own=is_own
        )
        async with self._judging:
            event = await self._ask(timeout_s, judge=judge)
        return event.judged

    async def export(self, directory: str, timeout_s: float = 60.0) -> Exported:
        """Let the draft be written.

        Raises:
            DeadlineError, UnavailableError: there was no answer, or the learner is gone.
            InternalError: it could not be written ("disk-failed"), and nothing was.
        """
        event = await self._ask(timeout_s, export=learner_pb2.ExportDraft(directory=directory))
        exported = event.exported
        return Exported(exported.directory, exported.num_samples, exported.num_tokens)

    async def specialise(
        self,
        base: str,
        domain: str,
        directory: str,
        *,
        rank: int,
        num_steps: int,
        timeout_s: float = 3600.0,
    ) -> Exported:
        """Let a draft for one domain be made from a checkpoint, beside what is learned anyway.

        One at a time: another one ends the one before. Takes as much as is granted.

        Raises:
            DeadlineError, UnavailableError: there was no answer, or the learner is gone.
            InternalError: it went wrong, or could not be written ("disk-failed").
        """
        specialise = learner_pb2.SpecialiseDraft(
            base=base, domain=domain, rank=rank, num_steps=num_steps, directory=directory
        )
        event = await self._ask(timeout_s, specialise=specialise)
        exported = event.exported
        return Exported(exported.directory, exported.num_samples, exported.num_tokens)

    async def reset(self, directory: str, timeout_s: float = 60.0) -> None:
        """Start again from a checkpoint; samples stay.

        Raises:
            DeadlineError, UnavailableError: there was no answer, or the learner is gone.
            InternalError: the checkpoint cannot be loaded.
        """
        await self._ask(timeout_s, reset=learner_pb2.ResetLearner(directory=directory))

    async def save(self, timeout_s: float = 60.0) -> None:
        """Let the state be written.

        Raises:
            DeadlineError, UnavailableError: there was no answer, or the learner is gone.
            InternalError: it could not be written ("disk-failed"); the last one stays.
        """
        await self._ask(timeout_s, save=learner_pb2.SaveLearner())

    async def _ask(self, timeout_s: float, **command: Any) -> learner_pb2.LearnerEvent:
        if len(self._pending) >= MAX_PENDING:
            raise ExhaustedError("the learner has questions enough", reason="learner-busy")
        number = next(self._numbers)
        future: asyncio.Future[learner_pb2.LearnerEvent] = (
            asyncio.get_running_loop().create_future()
        )
        self._send(learner_pb2.LearnerCommand(command_id=number, **command))
        self._pending[number] = future
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise DeadlineError("the learner does not answer", reason="learner-busy") from error
        finally:
            del self._pending[number]

    def _send(self, command: learner_pb2.LearnerCommand) -> None:
        if self._has_ended or self._writer is None or self._writer.is_closing():
            raise _learner_died()
        self._writer.write(encode(command))

    def _handle(self, event: learner_pb2.LearnerEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "progress":
            self.progress = event.progress
            self.on_progress(event.progress)
            return
        if kind is None:
            return
        future = self._pending.get(getattr(event, kind).command_id)
        if future is None or future.done():
            return
        if kind == "failed":
            future.set_exception(_failure(event.failed))
        else:
            future.set_result(event)


def _failure(failed: learner_pb2.LearnerFailed) -> PacelineError:
    return InternalError(failed.message, reason=failed.reason)


def _learner_died() -> UnavailableError:
    return UnavailableError("the learner process ended", reason="learner-died")
