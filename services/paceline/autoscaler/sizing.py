"""From an observation to the replicas that each pool needs, with the numbers that say why.

policies/slo.py calls it; what is remembered of loads and of the model's errors lives here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from paceline.autoscaler import capacity
from paceline.autoscaler.capacity import DecodeFit, PrefillSize, PromptWork, known
from paceline.autoscaler.demand import Demand
from paceline.autoscaler.feedback import Correction
from paceline.autoscaler.policies.rules import ScalingRules
from paceline.autoscaler.usual import UsualTraffic
from paceline.autoscaler.values import POOLS, Observation, Replica, Traffic
from paceline.domain.member import Role

_CATCH_UP_S = 30.0
"""In which prompts that already wait too long are to be computed, once there are replicas for it:
as long as the metrics need to show it."""

_QUEUED_RATIO = 0.25
"""Of the TTFT target: prompt work per worker from which a request is said to wait."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What each pool needs, before bounds."""

    replicas: Mapping[Role, int]
    notes: Mapping[Role, str]
    """The numbers that decided, for people."""
    inputs: Mapping[str, float]
    """All numbers."""


class Sizing:
    """Owns the forecasts and corrections."""

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._usual = UsualTraffic()
        self._prompt = Demand()
        self._output = Demand()
        self._corrections = {role: Correction() for role in POOLS}

    def needs(self, observation: Observation, start_ups: Mapping[Role, float]) -> Needs | None:
        """Return what is needed `start_ups` from now; None while no worker said what it can do."""
        traffic, replicas = observation.traffic, _replicas(observation)
        assert traffic is not None, "sizes need traffic"
        if replicas is None:
            return None
        rules = self._rules
        usual = self._usual.note(observation.at_s, traffic)
        work = capacity.prompt_work(usual, replicas[Role.PREFILL])
        fit = capacity.decode_fit(usual, replicas[Role.DECODE], rules.itl_s)
        self._note(observation, traffic, replicas[Role.PREFILL], work)
        decode, decode_note, decode_inputs = self._decode(observation, start_ups[Role.DECODE], fit)
        prefill, prefill_note, prefill_inputs = self._prefill(
            observation, start_ups[Role.PREFILL], work, decode_inputs
        )
        unmet = prefill - rules.bounds[Role.PREFILL].most
        if unmet > 0:
            decode += unmet
            decode_note += f", {unmet} more for prompts"
            prefill -= unmet
        inputs = _traffic_inputs(traffic) | decode_inputs | prefill_inputs
        inputs |= {"prefill_required": float(prefill), "decode_required": float(decode)}
        return Needs(
            {Role.PREFILL: prefill, Role.DECODE: decode},
            {Role.PREFILL: prefill_note, Role.DECODE: decode_note},
            {name: value for name, value in inputs.items() if math.isfinite(value)},
        )

    def _note(
        self,
        observation: Observation,
        traffic: Traffic,
        replica: Replica,
        usual: PromptWork | None,
    ) -> None:
        at_s, rate, latency = observation.at_s, known(traffic.requests_per_s), observation.latency
        work = capacity.prompt_work(traffic, replica)
        self._prompt.note(at_s, rate * work.mean_s if work else 0.0, rate)
        self._output.note(at_s, rate * known(traffic.output_tokens), rate)
        goal, ttft_s = self._rules.goal_ratio, self._rules.ttft_s
        reachable = 1.0 - (usual.late_ratio(ttft_s) if usual else 0.0)
        ready = max(1, sum(observation.pools[role].ready for role in POOLS))
        wait_s = _backlog_s(observation, usual) / ready if usual else 0.0
        waiting = any(worker.num_waiting for worker in observation.pools[Role.DECODE].workers)
        for role, within, allowed, is_queued in (
            (
                Role.PREFILL,
                latency.ttft_within_ratio,
                1.0 - goal * reachable,
                wait_s > _QUEUED_RATIO * ttft_s,
            ),
            (Role.DECODE, latency.itl_within_ratio, 1.0 - goal, waiting),
        ):
            self._corrections[role].note(
                at_s,
                observation.pools[role],
                within,
                allowed,
                rate,
                known(traffic.window_s),
                is_queued=is_queued,
            )

    def _horizon_s(self, start_up_s: float) -> float:
        return start_up_s + self._rules.period_s

    def _decode(
        self, observation: Observation, start_up_s: float, fit: DecodeFit
    ) -> tuple[int, str, dict[str, float]]:
        horizon_s = self._horizon_s(start_up_s)
        factor = self._corrections[Role.DECODE].factor
        expected = self._output.expected(horizon_s)
        size = capacity.decode_size(expected * factor, fit, self._rules.goal_ratio)
        now = self._output.now * fit.itl_s
        workers = [worker for role in POOLS for worker in observation.pools[role].workers]
        # Prompts that wait all decode once they are computed.
        under_way = sum(worker.num_running + worker.num_waiting for worker in workers)
        under_way += observation.parked
        num = max(size.replicas, math.ceil(under_way / fit.rows))
        target_s = self._rules.itl_s
        note = (
            f"{size.sequences:.1f} sequences expected in {horizon_s:.0f} s (now {now:.1f}, "
            f"{under_way} under way), "
        )
        if fit.is_reachable:
            note += f"{fit.rows} rows keep ITL at {fit.itl_s:.3f} of {target_s:.3f} s"
        else:
            note += f"one row alone has ITL {fit.itl_s:.3f} of {target_s:.3f} s: out of reach"
        return (
            num,
            note,
            {
                "output_tokens_per_s": self._output.now,
                "output_tokens_per_s_expected": expected,
                "decode_sequences": size.sequences,
                "decode_context_tokens": fit.context_tokens,
                "decode_under_way": float(under_way),
                "decode_rows": float(fit.rows),
                "decode_itl_s": fit.itl_s,
                "decode_correction": factor,
            },
        )

    def _prefill(
        self,
        observation: Observation,
        start_up_s: float,
        work: PromptWork | None,
        decode_inputs: Mapping[str, float],
    ) -> tuple[int, str, dict[str, float]]:
        if work is None:
            return 0, "no prompts", {}
        rules = self._rules
        expected = self._prompt.expected(self._horizon_s(start_up_s))
        burst, factor = self._prompt.burst_ratio, self._corrections[Role.PREFILL].factor
        size = capacity.prefill_size(expected, work, rules.ttft_s, rules.goal_ratio)
        backlog_s = _backlog_s(observation, work)
        behind = self._behind(observation, start_up_s, backlog_s, size)
        decoders = observation.pools[Role.DECODE].ready
        rows = decode_inputs["decode_sequences"] / max(1, decoders)
        spare = capacity.prompt_spare(decoders, rows)
        num = max(0, math.ceil(max(size.replicas * burst * factor, behind) - spare - 1e-9))
        note = (
            f"{expected:.2f} s of prompts per s (now {self._prompt.now:.2f}), "
            f"wait {size.wait_s:.1f} of {size.slack_s:.1f} s, bursts x{burst:.1f}"
        )
        if factor > 1.005:
            note += f", missed before x{factor:.2f}"
        if behind > size.replicas * burst * factor:
            note += f", {backlog_s:.0f} s of work waits"
        late = work.late_ratio(rules.ttft_s)
        if late > 0:
            note += f", {late:.0%} of prompts alone take over {rules.ttft_s:g} s: out of reach"
        return (
            num,
            note,
            {
                "prompt_load": self._prompt.now,
                "prompt_load_expected": expected,
                "prompt_s": work.mean_s,
                "prompts_out_of_reach_ratio": late,
                "prefill_wait_s": size.wait_s,
                "prefill_slack_s": size.slack_s,
                "prefill_backlog_s": backlog_s,
                "prefill_spare": spare,
                "burst_ratio": burst,
                "prefill_correction": factor,
            },
        )

    def _behind(
        self, observation: Observation, start_up_s: float, backlog_s: float, size: PrefillSize
    ) -> float:
        """Return the replicas that catch up with prompts that wait too long; 0 if none do."""
        ready = sum(observation.pools[role].ready for role in POOLS)
        if backlog_s <= max(1, ready) * size.slack_s:
            return 0.0
        grown_s = backlog_s + max(0.0, self._prompt.now - ready) * start_up_s
        return self._prompt.now + grown_s / _CATCH_UP_S


def _replicas(observation: Observation) -> dict[Role, Replica] | None:
    """Return what workers can do; a pool that was never seen is taken to be like the other."""
    seen = {role: observation.pools[role].replica for role in POOLS}
    any_seen = next((replica for replica in seen.values() if replica is not None), None)
    if any_seen is None:
        return None
    return {role: replica or any_seen for role, replica in seen.items()}


def _backlog_s(observation: Observation, work: PromptWork) -> float:
    """Return the prompt work that waits at workers of both pools."""
    traffic = observation.traffic
    assert traffic is not None
    uncached = known(traffic.prompt_tokens) * (1.0 - min(1.0, known(traffic.cached_ratio)))
    workers = [worker for role in POOLS for worker in observation.pools[role].workers]
    pending = sum(worker.pending_prefill_tokens for worker in workers)
    return pending * work.mean_s / max(1.0, uncached)


def _traffic_inputs(traffic: Traffic) -> dict[str, float]:
    return {
        "requests_per_s": known(traffic.requests_per_s),
        "prompt_tokens": known(traffic.prompt_tokens),
        "prompt_tokens_p95": known(traffic.prompt_tokens_p95),
        "output_tokens": known(traffic.output_tokens),
        "cached_ratio": min(1.0, known(traffic.cached_ratio)),
        "emitted_per_step": max(1.0, known(traffic.emitted_per_step)),
        "nodes_per_step": known(traffic.nodes_per_step),
    }
