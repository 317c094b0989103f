"""Compares ways of learning on one recorded stream, by acceptance: `paceline bench training`.

Every way starts from the same draft, meets the samples in the same order and learns from as many
tokens, or for as long. Prequential acceptance judges each sample before it is learned from, as
live traffic does; held-out acceptance is of samples that are never learned from, before and after.
Drafts of different kinds guess different tokens; what compares them is how far their chains get
(chains.py). Run as
`python -m paceline.trainer.compare OPTIONS_JSON`; cli/bench/training.py starts it.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paceline.domain.drafts import MEDUSA_DRAFTER
from paceline.domain.errors import PacelineError
from paceline.domain.learnings import Sample
from paceline.trainer.chains import ChainTally
from paceline.trainer.compare_options import CompareOptions, RecordOptions, from_json
from paceline.trainer.guessing import GuessingModel
from paceline.trainer.judging import Judged, judge
from paceline.trainer.learnables import LEARNABLES
from paceline.trainer.learner import OnlineLearner
from paceline.trainer.learner_options import (
    HEADS_BATCH_TOKENS,
    MODEL_BATCH_TOKENS,
    LearnerOptions,
)
from paceline.trainer.losses import LOSSES
from paceline.trainer.positions import POSITIONS
from paceline.trainer.stream_file import read_stream

_MICRO_TOKENS = 512
"""Of every micro-step, so that results do not depend on the machine's speed."""
_REPLAY_BYTES = 1 << 30
"""All of the stream, in general."""
_PILOT_SAMPLES = 24


@dataclass(slots=True)
class _Tally:
    positions: int = 0
    accepted: float = 0.0
    agreed: int = 0
    overlap: float = 0.0

    def add(self, judged: Judged) -> None:
        self.positions += judged.num_positions
        self.accepted += judged.num_accepted
        self.agreed += judged.num_agreed
        self.overlap += judged.overlap

    def figures(self) -> dict[str, float | int]:
        count = max(1, self.positions)
        return {
            "acceptance": round(self.accepted / count, 4),
            "greedy_agreement": round(self.agreed / count, 4),
            "overlap": round(self.overlap / count, 4),
            "positions": self.positions,
        }


@dataclass(slots=True)
class _Tallies:
    total: _Tally = field(default_factory=_Tally)
    domains: dict[str, _Tally] = field(default_factory=lambda: defaultdict(_Tally))

    def add(self, domain: str, judged: Judged) -> None:
        self.total.add(judged)
        self.domains[domain].add(judged)

    def figures(self) -> dict[str, Any]:
        domains = {name: tally.figures() for name, tally in sorted(self.domains.items())}
        return {**self.total.figures(), "domains": domains}


def compare(options: CompareOptions) -> dict[str, Any]:
    """Learn in every way and return the report.

    Raises:
        ValueError: the stream is damaged or empty, or there is no such loss or choice.
        UnsupportedModelError: the draft cannot be trained.
    """
    _check(options)
    torch.set_num_threads(options.threads)
    samples = list(read_stream(Path(options.stream)))
    ways = list(itertools.product(options.losses, options.positions, options.learning_rates))
    if options.minutes is not None:
        samples = samples[: _affordable(options, samples, len(ways))]
    if not samples:
        raise ValueError(f"{options.stream}: no samples")
    results = []
    for drafter, (loss, positions, rate) in itertools.product(options.drafters, ways):
        how = replace(_way(options, drafter), loss=loss, positions=positions, learning_rate=rate)
        result = _learn(options, samples, how)
        results.append(result)
        if not options.is_quiet:
            print(_line(result), flush=True)
    return {
        "bench": "training",
        "stream": options.stream,
        "draft": options.draft,
        "samples": len(samples),
        "learned_ratio": options.learned_ratio,
        "seconds": options.seconds,
        "depth": options.depth,
        "threads": options.threads,
        "seed": options.seed,
        "ways": results,
        "best": max(results, key=partial(_merit, len(options.drafters)))["name"],
    }


def _way(options: CompareOptions, drafter: str) -> LearnerOptions:
    is_heads = drafter == MEDUSA_DRAFTER
    usual = HEADS_BATCH_TOKENS if is_heads else MODEL_BATCH_TOKENS
    return LearnerOptions(
        options.heads if is_heads else options.draft,
        drafter=drafter,
        target=options.target,
        num_heads=options.depth,
        seed=options.seed,
        batch_tokens=options.batch_tokens or usual,
        micro_tokens=_MICRO_TOKENS,
        replay_bytes=_REPLAY_BYTES,
        judges_first=False,
        max_passes=math.inf,
    )


def _merit(num_drafters: int, result: dict[str, Any]) -> float:
    """Return what ways are ranked by: drafts of one kind by what they meet, others by chains."""
    if num_drafters == 1:
        return float(result["prequential"]["acceptance"])
    return float(result["held_out_after"]["chain"]["tokens_per_pass"])


def _check(options: CompareOptions) -> None:
    for kind, names, table in (
        ("drafter", options.drafters, LEARNABLES),
        ("loss", options.losses, LOSSES),
        ("choice of positions", options.positions, POSITIONS),
    ):
        for name in names:
            if name not in table:
                raise ValueError(f"no {kind} {name!r}; there are {', '.join(table)}")
    if options.seconds is not None and options.minutes is not None:
        raise ValueError("seconds train on the whole stream, minutes cut it: name one of them")


def _affordable(options: CompareOptions, samples: Sequence[Sample], num_ways: int) -> int:
    """Return how many samples all ways can learn from in the time there is."""
    assert options.minutes is not None
    begun_s = time.monotonic()
    pilot = samples[:_PILOT_SAMPLES]
    for drafter in options.drafters:
        _learn(options, pilot, _way(options, drafter))
    sample_s = (time.monotonic() - begun_s) / max(1, len(pilot))
    return max(_PILOT_SAMPLES, int(60.0 * options.minutes / num_ways / sample_s))


def _learn(
    options: CompareOptions, samples: Sequence[Sample], how: LearnerOptions
) -> dict[str, Any]:
    # The processor's time, so that what else runs on the machine favours nobody.
    learner = OnlineLearner(how, time.process_time)
    prequential, late = _Tallies(), _Tallies()
    num_arrived = 0
    for i, sample in enumerate(samples):
        text = learner.text(sample)
        if text is not None:
            judged = judge(learner.model, text)
            prequential.add(sample.domain, judged)
            if 2 * i >= len(samples):
                late.add(sample.domain, judged)
        learner.feed(sample)
        num_arrived += len(sample.token_ids)
        while _may_learn(options, learner, num_arrived, (i + 1) / len(samples)):
            if not learner.micro_step(float("inf")):
                break
        learner.settle()
    if not len(learner.replay):
        raise ValueError(f"{options.stream}: no sample has what {how.drafter} learns from")
    counters = learner.counters
    return {
        "name": f"{how.drafter} {how.loss} {how.positions} {how.learning_rate:g}",
        "drafter": how.drafter,
        "parameters": learner.model.num_weights,
        # By tokens a way has the same figures whenever it is repeated, and time is none of them.
        **({} if options.seconds is None else {"trained_s": round(counters.trained_s, 3)}),
        "left_out": counters.num_left_out,
        "loss": how.loss,
        "positions": how.positions,
        "learning_rate": how.learning_rate,
        "tokens": counters.num_tokens,
        "steps": counters.num_steps,
        "skipped": counters.num_skipped,
        "restored": counters.num_restored,
        "prequential": prequential.figures(),
        "prequential_second_half": late.figures(),
        "held_out_before": _held_out(learner, LEARNABLES[how.drafter](how).model, options.depth),
        "held_out_after": _held_out(learner, learner.model, options.depth),
    }


def _may_learn(
    options: CompareOptions, learner: OnlineLearner, num_arrived: int, share: float
) -> bool:
    """Tell whether there is something left of what `share` of the stream allows."""
    if options.seconds is None:
        return learner.counters.num_tokens < options.learned_ratio * num_arrived
    return learner.counters.trained_s < options.seconds * share


def _held_out(learner: OnlineLearner, model: GuessingModel, depth: int) -> dict[str, Any]:
    tallies, chains = _Tallies(), ChainTally(depth)
    for domain in learner.replay.domains:
        for text in learner.replay.held_out(domain):
            tallies.add(domain, judge(model, text))
            chains.add(model, text)
    return {**tallies.figures(), "chain": chains.figures()}


def _line(result: dict[str, Any]) -> str:
    parts = [result["prequential"], result["prequential_second_half"]]
    parts += [result["held_out_before"], result["held_out_after"]]
    figures = "  ".join(f"{part['acceptance']:.4f}" for part in parts)
    domains = "  ".join(
        f"{name} {figures['acceptance']:.3f}"
        for name, figures in result["held_out_after"]["domains"].items()
    )
    before, after = (part["chain"]["tokens_per_pass"] for part in parts[2:])
    return f"{result['name']:34s} {figures}  {before:.3f} {after:.3f}  {domains}"


_HEADER = (
    f"{'way':34s} preq.   2nd half  held-out before, after, tokens per pass before, after,"
    " held-out after by domain"
)


def main(argv: list[str]) -> int:
    """Run one job and print its report as the last line; return the exit code."""
    (text,) = argv
    options = from_json(text)
    try:
        if isinstance(options, RecordOptions):
            from paceline.trainer.recording import record

            report = record(options)
        else:
            if not options.is_quiet:
                print(_HEADER, flush=True)
            report = compare(options)
    except (PacelineError, ValueError, OSError) as error:
        print(f"paceline bench training: {error}", file=sys.stderr, flush=True)
        return 1
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
