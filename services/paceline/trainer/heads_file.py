"""Writes the heads that a learner trains where an operator finds them.

Versions are of small models: the registry, the gate and the engine's bank of drafts know no heads.
So heads are not tried on live traffic; they lie in a directory that is replaced as they learn, and
workers that start with `--medusa` on it draft with them. trainer/__main__.py runs this. No torch.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from paceline.domain.errors import PacelineError, UnavailableError
from paceline.trainer.training import Training

logger = logging.getLogger(__name__)

_LOOK_PERIOD_S = 1.0
_FAILURE_PAUSE_S = 10.0


class HeadsFile:
    """A directory that holds what was learned last."""

    def __init__(
        self,
        training: Training,
        directory: Path,
        steps: int,
        look_period_s: float = _LOOK_PERIOD_S,
    ) -> None:
        """Write heads that have learned for `steps` optimiser steps since the last time."""
        self._training = training
        self._directory = directory
        self._steps = steps
        self._look_period_s = look_period_s
        self._written_steps = 0

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(self._look_period_s)
            try:
                await self.look()
            except UnavailableError:
                # Whoever keeps the learner tells that it is gone.
                continue
            except PacelineError as error:
                fields = {"reason": error.reason, "error": error.message}
                logger.warning("heads-not-written", extra={"fields": fields})
                await asyncio.sleep(_FAILURE_PAUSE_S)

    async def look(self) -> None:
        """Write heads if it is time.

        Raises:
            PacelineError: no learner runs, or it could not write.
        """
        learner = self._training.learner
        num_steps = learner.progress.num_steps
        if num_steps - self._written_steps < self._steps:
            return
        await learner.export(str(self._directory))
        self._written_steps = num_steps
        fields = {"directory": str(self._directory), "steps": num_steps}
        logger.info("heads-written", extra={"fields": fields})
