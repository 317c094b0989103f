"""How many replicas a load needs, by the calibrated step cost. Pure; no NaN goes in or out.

**Prefill** is sized for the wait that the TTFT target leaves. A pool of n replicas is a queue with
n servers whose service time is what a prompt takes to compute. With a = work arriving per second
(in seconds, the offered load), S and Cs^2 mean and squared coefficient of variation of the service
time, and Ca^2 that of the gaps between arrivals:

    P(wait > t) = C(n, a) * exp(-t * (n - a) / (S * (Ca^2 + Cs^2) / 2))

and of prompts that alone keep the target, a share of 1 - goal may wait longer than it leaves them.

C is Erlang's formula for the share that waits. The mean of this wait is that of Allen and Cunneen
(A. O. Allen, "Probability, statistics and queueing theory", 1990, 5.3.5: the M/M/n wait times
(Ca^2 + Cs^2) / 2; for n = 1 and Poisson arrivals it is Pollaczek-Khinchine), its tail exponential,
as that of M/M/n is and that of GI/G/n in heavy traffic (Kingman 1961). Ca^2 is 1 within a window:
what varies between windows is the forecast's.

**Decode** is sized for the ITL target and for room. A replica holds as many rows as keep a step,
divided by the tokens that it brings per sequence, within the target. Sequences under way at that
pace are, by Little's law, tokens per second times seconds per token. With N of them on average,
taken as Poisson, and contexts c,

    sequences that the goal's share of moments does not exceed   N + z * sqrt(N)
    tokens of KV, alike                                          N * E[c] + z * sqrt(N * E[c^2])

z is the normal's quantile. A replica counts with its KV less one long context: a sequence needs
its room in one place, and a long one waits for it while others run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

from paceline.autoscaler.values import Replica, Traffic
from paceline.domain.cost import StepShape

_NORMAL = NormalDist()
_PARTS = 32
_EDGES = tuple(_NORMAL.inv_cdf(i / _PARTS) for i in range(1, _PARTS))
"""Between equally likely parts of a normal distribution."""
_P95 = _NORMAL.inv_cdf(0.95)
MOST_KNOWN = 1e9
"""No rate or size is larger: what is has been measured wrong, and would only overflow."""
_MOST_REPLICAS = 4096
"""Where a search ends that has no other bound."""


@dataclass(frozen=True, slots=True)
class PromptWork:
    """What prompts take on one replica, cached tokens left out."""

    mean_s: float
    variation: float
    """Squared coefficient of variation, Cs^2."""
    seconds: tuple[float, ...]
    """What equally likely prompts take, rising."""

    def slacks_s(self, ttft_s: float) -> list[float]:
        """Return the wait that the target leaves to each of those that can keep it."""
        return [ttft_s - seconds for seconds in self.seconds if seconds < ttft_s]

    def late_ratio(self, ttft_s: float) -> float:
        """Return the share that alone takes longer: no size brings them in time."""
        return 1.0 - len(self.slacks_s(ttft_s)) / len(self.seconds)


@dataclass(frozen=True, slots=True)
class PrefillSize:
    """What prompts need."""

    replicas: int
    wait_s: float
    """Wait that all but a share of 1 - goal stay below; inf if there is none."""
    slack_s: float
    """Wait that the target leaves to the median of prompts that can keep it."""


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """What one replica can take of a kind of traffic."""

    rows: int
    """Sequences, by the ITL target and by the rows that it has."""
    itl_s: float
    """Seconds per token of a sequence at so many rows."""
    room_tokens: float
    """KV for contexts, one long one left free."""
    context_tokens: float
    """Mean of a sequence under way."""
    context_square: float
    """Mean of squares."""
    is_reachable: bool
    """Whether one row alone is within the target."""


@dataclass(frozen=True, slots=True)
class DecodeSize:
    """What streams need."""

    replicas: int
    sequences: float
    """Under way at a time, what the goal's share of moments does not exceed."""
    is_by_room: bool
    """Whether KV decides, not ITL."""


def prompt_work(traffic: Traffic, replica: Replica) -> PromptWork | None:
    """Return what prompts take; None if nothing sensible is known of them.

    Sizes are taken as log-normal with the mean and the 95th percentile seen: prompts of chats and
    code are skewed, and two numbers fix no more.
    """
    mean, p95 = known(traffic.prompt_tokens), known(traffic.prompt_tokens_p95)
    if mean <= 0:
        return None
    seconds = [_compute_s(tokens, traffic, replica) for tokens in _sizes(mean, p95)]
    mean_s = sum(seconds) / len(seconds)
    if not (0 < mean_s < math.inf):
        return None
    variance = sum((s - mean_s) ** 2 for s in seconds) / len(seconds)
    return PromptWork(mean_s, variance / mean_s**2, tuple(sorted(seconds)))


def _sizes(mean: float, p95: float) -> list[float]:
    """Return equally likely sizes: the means within the parts of a log-normal distribution."""
    # ln(p95 / mean) = 1.645 sigma - sigma^2 / 2, its smaller root; no log-normal goes beyond
    # the vertex.
    ratio = math.log(max(p95, mean) / mean)
    sigma = _P95 - math.sqrt(max(0.0, _P95**2 - 2 * ratio))
    # A part [a, b] of the normal holds Phi(b - sigma) - Phi(a - sigma) of the sum of sizes.
    held = [0.0, *(_NORMAL.cdf(edge - sigma) for edge in _EDGES), 1.0]
    return [mean * _PARTS * (b - a) for a, b in pairwise(held)]


def _compute_s(tokens: float, traffic: Traffic, replica: Replica) -> float:
    cached = min(1.0, known(traffic.cached_ratio)) * tokens
    left = max(1, round(tokens - cached))
    return replica.step_cost.prefill_s(left, round(cached), replica.chunk_tokens)


def prefill_size(
    load: float, work: PromptWork, ttft_s: float, goal_ratio: float, most: int = _MOST_REPLICAS
) -> PrefillSize:
    """Return the smallest pool whose queue leaves the goal's share of prompts in time.

    `load` is the work that arrives, in seconds per second. Behind `most` the search ends.
    """
    miss_ratio, load = 1.0 - goal_ratio, known(load)
    # Where no prompt can keep the target, those in time are what a wait as long would leave.
    slacks_s = work.slacks_s(ttft_s) or [ttft_s]
    slack_s = slacks_s[len(slacks_s) // 2]
    if load <= 0:
        return PrefillSize(0, 0.0, slack_s)
    most = max(1, most)
    num = min(most, math.floor(load) + 1)
    while num < most and late_ratio(num, load, work, slacks_s) > miss_ratio:
        num += 1
    return PrefillSize(num, wait_s(num, load, work, miss_ratio), slack_s)


def late_ratio(num: int, load: float, work: PromptWork, slacks_s: Sequence[float]) -> float:
    """Return the share of prompts that a pool of that size keeps waiting longer than they may."""
    if num <= load:
        return 1.0
    rate = (num - load) / _spread_s(work)
    late = sum(math.exp(max(-700.0, -slack_s * rate)) for slack_s in slacks_s)
    return erlang_c(num, load) * late / len(slacks_s)


def wait_s(num: int, load: float, work: PromptWork, miss_ratio: float) -> float:
    """Return the wait that only that share of prompts exceeds."""
    if num <= load:
        return math.inf
    waiting = erlang_c(num, load)
    if waiting <= miss_ratio:
        return 0.0
    return math.log(waiting / miss_ratio) * _spread_s(work) / (num - load)


def _spread_s(work: PromptWork) -> float:
    return work.mean_s * (1.0 + work.variation) / 2


def erlang_c(num: int, load: float) -> float:
    """Return the share that waits in M/M/num at an offered load below num."""
    blocked = 1.0
    for k in range(1, num + 1):
        blocked = load * blocked / (k + load * blocked)
    return num * blocked / (num - load * (1.0 - blocked))


def decode_fit(traffic: Traffic, replica: Replica, itl_s: float) -> DecodeFit:
    """Return what a replica can hold; never less than one row."""
    prompt, p95 = known(traffic.prompt_tokens), known(traffic.prompt_tokens_p95)
    emitted = known(traffic.output_tokens) / 2
    contexts = [max(1.0, size + emitted) for size in _sizes(max(1.0, prompt), p95)]
    context = sum(contexts) / len(contexts)
    rows = 1
    high = max(1, replica.max_rows) + 1
    while high - rows > 1:
        middle = (rows + high) // 2
        if row_itl_s(middle, traffic, replica, context) <= itl_s:
            rows = middle
        else:
            high = middle
    reached_s = row_itl_s(rows, traffic, replica, context)
    return DecodeFit(
        rows=rows,
        itl_s=reached_s,
        # Contexts that no replica can hold but alone leave half of it to others.
        room_tokens=max(1.0, replica.kv_tokens - contexts[-1], replica.kv_tokens / 2),
        context_tokens=context,
        context_square=sum(c * c for c in contexts) / len(contexts),
        is_reachable=reached_s <= itl_s,
    )


def row_itl_s(rows: int, traffic: Traffic, replica: Replica, context: float) -> float:
    """Return the seconds per token of each of so many sequences; always above 0."""
    nodes = known(traffic.nodes_per_step)
    shape = StepShape(
        rows=rows,
        tree_nodes=round(rows * nodes),
        tree_attended=round(rows * nodes * context),
        attended=round(rows * context),
    )
    step_s = replica.step_cost.step_s(shape)
    emitted = max(1.0, known(traffic.emitted_per_step))
    return max(1e-6, step_s / emitted) if math.isfinite(step_s) else 1e6


def decode_size(tokens_per_s: float, fit: DecodeFit, goal_ratio: float) -> DecodeSize:
    """Return the replicas for so many output tokens."""
    mean = known(tokens_per_s) * fit.itl_s
    if mean <= 0:
        return DecodeSize(0, 0.0, is_by_room=False)
    spread = _NORMAL.inv_cdf(goal_ratio)
    sequences = mean + spread * math.sqrt(mean)
    tokens = mean * fit.context_tokens + spread * math.sqrt(mean * fit.context_square)
    by_rows, by_room = sequences / fit.rows, tokens / fit.room_tokens
    num = math.ceil(max(by_rows, by_room) - 1e-9)
    return DecodeSize(min(_MOST_REPLICAS, max(1, num)), sequences, by_room > by_rows)


def prompt_spare(replicas: int, rows: float) -> float:
    """Return the prompt work that decode workers take, in seconds per second.

    A gateway sends a prompt to a decode worker where that is predicted to be faster, its time
    charged once more for each running stream and at least once (gateway/routing/cost.py): half
    the time of workers that run nothing, and next to nothing of others. `rows` is the mean of
    sequences per worker, taken as Poisson.
    """
    return 0.5 * replicas * math.exp(-min(700.0, known(rows)))


def known(value: float) -> float:
    """Return the value; 0 where it is none, not finite or negative, and at most MOST_KNOWN."""
    return min(value, MOST_KNOWN) if math.isfinite(value) and value > 0 else 0.0
