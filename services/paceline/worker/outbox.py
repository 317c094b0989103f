"""What a worker has to tell the trainer, merged until it is sent. Pure but for its event.

Slack and state: only the newest. Outcomes: all that fit a bound. Becoming busy or idle is urgent,
everything else may wait for the next message of a steady pace. worker/attendance.py sends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from paceline.domain.drafts import DraftState
from paceline.domain.learnings import SequenceOutcome
from paceline.domain.slack import Slack
from paceline.rpc.draft_codec import outcome_to_proto, slack_to_proto, state_to_proto
from paceline.v1 import drafts_pb2

MAX_OUTCOMES = 4096
"""Outcomes that wait; the oldest go. Some minutes of a busy worker."""

PERIOD_S = 0.1
"""Least time between two messages, urgent ones aside."""

BEAT_S = 1.0
"""Longest time between two messages."""


class Outbox:
    """News of one worker."""

    def __init__(self, clock: Callable[[], float], on_dropped: Callable[[int], None]) -> None:
        """`on_dropped` hears how many outcomes went unheard."""
        self._clock = clock
        self._on_dropped = on_dropped
        self._slack = Slack()
        self._state = DraftState()
        self._outcomes: deque[SequenceOutcome] = deque()
        self._has_slack = self._has_state = False
        self._sent_s = -BEAT_S
        self._has_news = asyncio.Event()
        self._is_urgent = asyncio.Event()

    def put_slack(self, slack: Slack) -> None:
        """Tell what the worker could spare."""
        if slack == self._slack:
            return
        if slack.is_busy != self._slack.is_busy:
            self._is_urgent.set()
        self._slack, self._has_slack = slack, True
        self._has_news.set()

    def put_state(self, state: DraftState) -> None:
        """Tell what the engine drafts with."""
        if state != self._state:
            self._state, self._has_state = state, True
            self._has_news.set()

    def put_outcomes(self, outcomes: Sequence[SequenceOutcome]) -> None:
        """Tell what drafts brought for sequences that ended."""
        self._outcomes.extend(outcomes)
        num_surplus = len(self._outcomes) - MAX_OUTCOMES
        for _ in range(num_surplus):
            self._outcomes.popleft()
        if num_surplus > 0:
            self._on_dropped(num_surplus)
        if outcomes:
            self._has_news.set()

    def introduce(self) -> drafts_pb2.AttendRequest:
        """Return slack and state for somebody who knows nothing.

        Outcomes are told once, so they wait until somebody is known to hear.
        """
        message = drafts_pb2.AttendRequest(
            slack=slack_to_proto(self._slack), state=state_to_proto(self._state)
        )
        self._note_sent()
        if self._outcomes:
            self._has_news.set()
        return message

    async def next(self) -> drafts_pb2.AttendRequest:
        """Wait until something is to be sent, at most for a beat, and return it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._sent_s + BEAT_S - self._clock()):
                await self._has_news.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._sent_s + PERIOD_S - self._clock()):
                await self._is_urgent.wait()
        return self._take()

    def _take(self) -> drafts_pb2.AttendRequest:
        message = drafts_pb2.AttendRequest()
        has_news = self._has_slack or self._has_state or bool(self._outcomes)
        if self._has_slack or not has_news:
            message.slack.CopyFrom(slack_to_proto(self._slack))
        if self._has_state:
            message.state.CopyFrom(state_to_proto(self._state))
        message.outcomes.extend(map(outcome_to_proto, self._outcomes))
        self._outcomes.clear()
        self._note_sent()
        return message

    def _note_sent(self) -> None:
        self._has_slack = self._has_state = False
        self._has_news.clear()
        self._is_urgent.clear()
        self._sent_s = self._clock()
