"""A draft for one domain that was asked for, on its way: work in slices, and the answer.

learner_process.py holds at most one.
"""

from __future__ import annotations

import time
from pathlib import Path

from paceline.domain.errors import PacelineError
from paceline.trainer.learner import OnlineLearner
from paceline.trainer.learner_events import failure_of
from paceline.trainer.specialist import Order, Specialist
from paceline.v1 import learner_pb2


class Commission:
    """One order of the trainer."""

    def __init__(
        self, command_id: int, wanted: learner_pb2.SpecialiseDraft, learner: OnlineLearner
    ) -> None:
        """Begin, with the learner's options and samples.

        Raises:
            UnsupportedModelError, ValueError, OSError: it cannot be made.
        """
        self.command_id = command_id
        order = Order(
            base=Path(wanted.base),
            domain=wanted.domain,
            rank=wanted.rank,
            num_steps=wanted.num_steps,
            directory=Path(wanted.directory),
        )
        self._specialist = Specialist(order, learner.replay, learner.options)
        self._counters = learner.counters

    def work(self, deadline_s: float) -> learner_pb2.LearnerEvent | None:
        """Do one micro-step; return the answer once there is one."""
        made, begun_s = self._specialist, time.monotonic()
        try:
            if made.micro_step(deadline_s):
                self._counters.trained_s += time.monotonic() - begun_s
            if not made.is_done:
                return None
            made.export()
        except (PacelineError, ArithmeticError, OSError) as error:
            return learner_pb2.LearnerEvent(failed=failure_of(self.command_id, error))
        exported = learner_pb2.DraftExported(
            command_id=self.command_id,
            directory=str(made.order.directory),
            num_samples=made.num_samples,
            num_tokens=made.num_tokens,
        )
        return learner_pb2.LearnerEvent(exported=exported)
