"""What a worker tells: the newest of what changes, all of what adds up, what is urgent first."""

from __future__ import annotations

import asyncio
import time

from paceline.domain.drafts import DraftState, HeldDraft
from paceline.domain.learnings import SequenceOutcome
from paceline.domain.slack import Slack
from paceline.rpc.draft_codec import outcome_from_proto, slack_from_proto, state_from_proto
from paceline.v1.drafts_pb2 import AttendRequest
from paceline.worker.outbox import BEAT_S, MAX_OUTCOMES, PERIOD_S, Outbox

IDLE = Slack()
BUSY = Slack(num_running=1, predicted_step_s=0.01)
BUSIER = Slack(num_running=2, predicted_step_s=0.02)


def outcome(number: int) -> SequenceOutcome:
    return SequenceOutcome("model", "v", b"", "", number, 0, 0, 0)


class Dropped:
    num = 0

    def __call__(self, num: int) -> None:
        self.num += num


async def timed(outbox: Outbox) -> tuple[AttendRequest, float]:
    started_s = time.monotonic()
    async with asyncio.timeout(2 * BEAT_S):
        message = await outbox.next()
    return message, time.monotonic() - started_s


async def started() -> Outbox:
    """Return one that has just sent something."""
    outbox = Outbox(time.monotonic, Dropped())
    message = outbox.introduce()
    assert message.HasField("slack") and message.HasField("state")
    return outbox


async def test_becoming_busy_or_idle_goes_out_at_once() -> None:
    outbox = await started()
    for slack in (BUSY, IDLE, BUSIER):
        outbox.put_slack(slack)
        message, elapsed_s = await timed(outbox)
        assert slack_from_proto(message.slack) == slack
        assert elapsed_s < PERIOD_S / 2


async def test_other_news_keep_a_pace_and_only_the_newest_counts() -> None:
    outbox = await started()
    outbox.put_slack(BUSY)
    await timed(outbox)
    outbox.put_slack(BUSIER)
    outbox.put_slack(BUSY)
    outbox.put_slack(BUSIER)
    first, second = DraftState((HeldDraft("model", "a"),)), DraftState((HeldDraft("model", "b"),))
    outbox.put_state(first)
    outbox.put_state(second)
    outbox.put_outcomes([outcome(1)])
    outbox.put_outcomes([outcome(2), outcome(3)])
    message, elapsed_s = await timed(outbox)
    assert 0.5 * PERIOD_S < elapsed_s < 0.9 * BEAT_S
    assert slack_from_proto(message.slack) == BUSIER
    assert state_from_proto(message.state) == second
    assert [outcome_from_proto(o).num_rounds for o in message.outcomes] == [1, 2, 3]


async def test_news_that_become_urgent_end_the_wait() -> None:
    outbox = await started()
    outbox.put_outcomes([outcome(1)])
    sending = asyncio.create_task(timed(outbox))
    await asyncio.sleep(PERIOD_S / 4)
    outbox.put_slack(BUSY)
    message, elapsed_s = await sending
    assert elapsed_s < 0.7 * PERIOD_S
    assert slack_from_proto(message.slack) == BUSY and len(message.outcomes) == 1


async def test_without_news_the_slack_is_said_again_as_a_sign_of_life() -> None:
    outbox = await started()
    outbox.put_slack(BUSY)
    await timed(outbox)
    outbox.put_slack(BUSY)
    message, elapsed_s = await timed(outbox)
    assert elapsed_s > 0.8 * BEAT_S
    assert slack_from_proto(message.slack) == BUSY and not message.HasField("state")


async def test_outcomes_that_nobody_hears_are_dropped_oldest_first_and_counted() -> None:
    dropped = Dropped()
    outbox = Outbox(time.monotonic, dropped)
    outbox.put_outcomes([outcome(i) for i in range(MAX_OUTCOMES)])
    assert dropped.num == 0
    outbox.put_outcomes([outcome(MAX_OUTCOMES), outcome(MAX_OUTCOMES + 1)])
    message, _ = await timed(outbox)
    rounds = [o.num_rounds for o in message.outcomes]
    assert rounds == list(range(2, MAX_OUTCOMES + 2)) and dropped.num == 2
    message, _ = await timed(outbox)
    assert not message.outcomes


async def test_an_introduction_says_all_but_what_is_told_once() -> None:
    outbox = Outbox(time.monotonic, Dropped())
    state = DraftState((HeldDraft("model", "a"),))
    outbox.put_slack(BUSY)
    outbox.put_state(state)
    outbox.put_outcomes([outcome(1)])
    for _ in range(3):
        message = outbox.introduce()
        assert slack_from_proto(message.slack) == BUSY
        assert state_from_proto(message.state) == state and not message.outcomes
    message, elapsed_s = await timed(outbox)
    assert len(message.outcomes) == 1 and elapsed_s < 0.9 * BEAT_S
