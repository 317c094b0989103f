"""The default: as many replicas as the targets need, by forecast and step cost.

    observation -> load at the time a replica is ready (demand.py, start_up.py)
                -> replicas that keep it within the targets (capacity.py), times what experience
                   says about the model (feedback.py)
                -> up at once, down late (stabilise.py), within bounds and budget (outcome.py)

Both pools are sized apart, each by its own target, and know of each other: idle decode workers
compute prompts, so prefill needs less; prompts that prefill may not grow for go to decode. Both go
to zero together, and both come back together, to what they had when traffic ended.
"""

from __future__ import annotations

from collections.abc import Mapping

from paceline.autoscaler.capacity import known
from paceline.autoscaler.outcome import decide, hold, within_rules
from paceline.autoscaler.policies.rules import ScalingRules
from paceline.autoscaler.sizing import Sizing
from paceline.autoscaler.stabilise import Stabiliser
from paceline.autoscaler.start_up import StartUpTracker
from paceline.autoscaler.values import POOLS, Decision, Observation
from paceline.domain.member import Role


class SloPolicy:
    """Owns what is remembered between decisions."""

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._sizing = Sizing(rules)
        self._stabilisers = {role: Stabiliser() for role in POOLS}
        self._start_ups = {role: StartUpTracker(rules.start_up_s) for role in POOLS}
        self._busy_s: float | None = None
        self._awake = {role: rules.bounds[role].least for role in POOLS}
        """Sizes while there was traffic last."""

    def decide(self, observation: Observation) -> Decision:
        """Return what every pool should have from now on."""
        inputs = self._note(observation)
        if observation.parked > 0 and observation.pools[Role.DECODE].requested == 0:
            return self._wake(observation, inputs)
        if observation.problems:
            return hold(observation, "; ".join(observation.problems), inputs)
        if observation.traffic is None:
            return hold(observation, "the traffic is not known", inputs)
        idle_s = self._idle_s(observation)
        inputs["idle_s"] = idle_s
        if self._rules.idle_s is not None and idle_s >= self._rules.idle_s:
            return self._sleep(observation, idle_s, inputs)
        return self._size(observation, inputs)

    def _note(self, observation: Observation) -> dict[str, float]:
        inputs = {"parked": float(observation.parked)}
        for role in POOLS:
            pool = observation.pools[role]
            self._start_ups[role].note(observation.at_s, pool)
            inputs[f"{role.value}_start_up_s"] = self._start_ups[role].start_up_s
            inputs[f"{role.value}_requested"] = float(pool.requested)
            inputs[f"{role.value}_ready"] = float(pool.ready)
        return inputs

    def _idle_s(self, observation: Observation) -> float:
        traffic = observation.traffic
        workers = [worker for role in POOLS for worker in observation.pools[role].workers]
        is_busy = (
            (traffic is not None and known(traffic.requests_per_s) > 0)
            or observation.parked > 0
            or any(worker.num_running or worker.num_waiting for worker in workers)
        )
        if is_busy or self._busy_s is None:
            self._busy_s = observation.at_s
        return observation.at_s - self._busy_s

    # -- to zero and back -----------------------------------------------------------------

    def _sleep(
        self, observation: Observation, idle_s: float, inputs: Mapping[str, float]
    ) -> Decision:
        for stabiliser in self._stabilisers.values():
            stabiliser.note_forced(observation.at_s)
        reason = f"all pools 0: no request for {idle_s:.0f} of {self._rules.idle_s:.0f} s"
        return decide(observation, dict.fromkeys(POOLS, 0), reason, inputs)

    def _wake(self, observation: Observation, inputs: Mapping[str, float]) -> Decision:
        self._busy_s = observation.at_s
        wanted = {role: max(self._awake[role], observation.pools[role].requested) for role in POOLS}
        # Decode workers can compute prompts; nobody else can decode.
        wanted[Role.DECODE] = max(1, wanted[Role.DECODE])
        sizes = within_rules(self._rules, wanted)
        for stabiliser in self._stabilisers.values():
            stabiliser.note_forced(observation.at_s)
        reason = f"{observation.parked} requests are parked; to the sizes of before: " + ", ".join(
            f"{role.value} {sizes[role]}" for role in POOLS
        )
        return decide(observation, sizes, reason, inputs)

    # -- sizes ----------------------------------------------------------------------------

    def _size(self, observation: Observation, inputs: dict[str, float]) -> Decision:
        start_ups = {role: tracker.start_up_s for role, tracker in self._start_ups.items()}
        needs = self._sizing.needs(observation, start_ups)
        if needs is None:
            return hold(observation, "no worker has said yet what it can do", inputs)
        inputs |= needs.inputs
        settled = {
            role: self._stabilisers[role].settle(
                observation.at_s, observation.pools[role].requested, needs.replicas[role]
            )
            for role in POOLS
        }
        sizes = within_rules(self._rules, settled)
        allowed = within_rules(self._rules, needs.replicas)
        is_limited = any(allowed[role] < needs.replicas[role] for role in POOLS)
        traffic = observation.traffic
        if traffic is not None and known(traffic.requests_per_s) > 0:
            self._awake = sizes
        parts = []
        for role in (Role.DECODE, Role.PREFILL):
            now, size = observation.pools[role].requested, sizes[role]
            change = f"{now} -> {size}" if now != size else f"{size}"
            note = needs.notes[role]
            if size != needs.replicas[role]:
                note += f", needs {needs.replicas[role]}"
                note += " (limited)" if size < needs.replicas[role] else ", kept for a while"
            parts.append(f"{role.value} {change}: {note}")
        return decide(observation, sizes, "; ".join(parts), inputs, is_limited=is_limited)
