"""What a learner's process tells: progress, comparisons, failures, as messages.

learner_process.py sends them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

from paceline.domain.errors import PacelineError
from paceline.trainer.first_sight import Pair
from paceline.trainer.judging import Judged
from paceline.trainer.learner import OnlineLearner
from paceline.trainer.texts import Text
from paceline.v1 import learner_pb2


def progress_of(
    learner: OnlineLearner, *, is_training: bool, max_micro_step_s: float, stream_id: str
) -> learner_pb2.LearnerProgress:
    """Return how far a learner is."""
    counters = learner.counters
    return learner_pb2.LearnerProgress(
        is_training=is_training,
        num_micro_steps=counters.num_micro_steps,
        num_steps=counters.num_steps,
        num_tokens=counters.num_tokens,
        loss=counters.last_loss,
        trained_s=counters.trained_s,
        last_micro_step_s=counters.last_micro_step_s,
        max_micro_step_s=max_micro_step_s,
        samples_by_domain=counters.samples_by_domain,
        num_samples=counters.num_samples,
        num_corrupt=counters.num_corrupt,
        num_skipped=counters.num_skipped,
        num_restored=counters.num_restored,
        replay_bytes=learner.replay.num_bytes,
        stream_id=stream_id,
    )


class Judging:
    """A comparison under way."""

    def __init__(self, command_id: int, pairs: Iterator[Pair], new: Sequence[Pair] = ()) -> None:
        """Take `pairs` one by one; `new` were judged before they were learned from."""
        self.command_id = command_id
        self._pairs = pairs
        self._samples: dict[str, list[learner_pb2.JudgedSample]] = defaultdict(list)
        self._new = [_sample(text, pair, text.domain) for text, pair in new]

    def advance(self, until_s: float) -> bool:
        """Compare until it is time, on one sample at least; tell whether that was all."""
        for text, pair in self._pairs:
            self._samples[text.domain].append(_sample(text, pair))
            if time.monotonic() >= until_s:
                return False
        return True

    def result(self) -> learner_pb2.DraftsJudged:
        """Return all that was compared."""
        domains = [
            learner_pb2.JudgedDomain(domain=domain, samples=samples)
            for domain, samples in sorted(self._samples.items())
        ]
        return learner_pb2.DraftsJudged(
            command_id=self.command_id, domains=domains, new_samples=self._new
        )


def _sample(text: Text, pair: tuple[Judged, Judged], domain: str = "") -> learner_pb2.JudgedSample:
    candidate, incumbent = pair
    return learner_pb2.JudgedSample(
        temperature=text.temperature,
        num_positions=candidate.num_positions,
        candidate=_score(candidate),
        incumbent=_score(incumbent),
        domain=domain,
    )


def _score(judged: Judged) -> learner_pb2.JudgedScore:
    return learner_pb2.JudgedScore(num_agreed=judged.num_agreed, overlap=judged.overlap)


def failure_of(command_id: int, error: Exception) -> learner_pb2.LearnerFailed:
    """Return what tells that a command failed."""
    reason = error.reason if isinstance(error, PacelineError) else "learner-failed"
    if isinstance(error, OSError):
        reason = "disk-failed"
    return learner_pb2.LearnerFailed(command_id=command_id, reason=reason, message=str(error))
