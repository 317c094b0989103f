"""Compares ways of learning on one recorded stream, by acceptance: `paceline bench training`.

Every way starts from the same draft, meets the samples in the same order and learns from as many
tokens. Prequential acceptance judges each sample before it is learned from, as live traffic does;
held-out acceptance is of samples that are never learned from, before and after. Run as
`python -m paceline.trainer.compare OPTIONS_JSON`; cli/bench/training.py starts it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paceline.domain.errors import PacelineError
from paceline.domain.learnings import Sample
from paceline.trainer.checkpoint import load_draft
from paceline.trainer.compare_options import CompareOptions, RecordOptions, from_json
from paceline.trainer.decoder import DraftModel
from paceline.trainer.judging import Judged, judge
from paceline.trainer.learner import OnlineLearner
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.losses import LOSSES
from paceline.trainer.positions import POSITIONS
from paceline.trainer.samples import text_of
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
    for loss, positions, rate in ways:
        result = _learn(
            options,
            samples,
            LearnerOptions(
                options.draft,
                seed=options.seed,
                loss=loss,
                positions=positions,
                learning_rate=rate,
                micro_tokens=_MICRO_TOKENS,
                replay_bytes=_REPLAY_BYTES,
                judges_first=False,
            ),
        )
        results.append(result)
        if not options.is_quiet:
            print(_line(result), flush=True)
    return {
        "bench": "training",
        "stream": options.stream,
        "draft": options.draft,
        "samples": len(samples),
        "learned_ratio": options.learned_ratio,
        "threads": options.threads,
        "seed": options.seed,
        "ways": results,
        "best": max(results, key=lambda r: float(r["prequential"]["acceptance"]))["name"],
    }


def _check(options: CompareOptions) -> None:
    for kind, names, table in (
        ("loss", options.losses, LOSSES),
        ("choice of positions", options.positions, POSITIONS),
    ):
        for name in names:
            if name not in table:
                raise ValueError(f"no {kind} {name!r}; there are {', '.join(table)}")


def _affordable(options: CompareOptions, samples: Sequence[Sample], num_ways: int) -> int:
    """Return how many samples all ways can learn from in the time there is."""
    assert options.minutes is not None
    begun_s = time.monotonic()
    pilot = samples[:_PILOT_SAMPLES]
    _learn(
        options,
        pilot,
        LearnerOptions(options.draft, micro_tokens=_MICRO_TOKENS, judges_first=False),
    )
    sample_s = (time.monotonic() - begun_s) / max(1, len(pilot))
    return max(_PILOT_SAMPLES, int(60.0 * options.minutes / num_ways / sample_s))


def _learn(
    options: CompareOptions, samples: Sequence[Sample], how: LearnerOptions
) -> dict[str, Any]:
    learner = OnlineLearner(how)
    prequential, late = _Tallies(), _Tallies()
    num_arrived = 0
    for i, sample in enumerate(samples):
        judged = judge(learner.model, text_of(sample, learner.model.shape.vocab_size))
        prequential.add(sample.domain, judged)
        if 2 * i >= len(samples):
            late.add(sample.domain, judged)
        learner.feed(sample)
        num_arrived += len(sample.token_ids)
        while learner.counters.num_tokens < options.learned_ratio * num_arrived:
            if not learner.micro_step(float("inf")):
                break
        learner.settle()
    counters = learner.counters
    return {
        "name": f"{how.loss} {how.positions} {how.learning_rate:g}",
        "loss": how.loss,
        "positions": how.positions,
        "learning_rate": how.learning_rate,
        "tokens": counters.num_tokens,
        "steps": counters.num_steps,
        "skipped": counters.num_skipped,
        "restored": counters.num_restored,
        "prequential": prequential.figures(),
        "prequential_second_half": late.figures(),
        "held_out_before": _held_out(learner, load_draft(Path(how.draft))),
        "held_out_after": _held_out(learner, learner.model),
    }


def _held_out(learner: OnlineLearner, model: DraftModel) -> dict[str, Any]:
    tallies = _Tallies()
    for domain in learner.replay.domains:
        for text in learner.replay.held_out(domain):
            tallies.add(domain, judge(model, text))
    return tallies.figures()


def _line(result: dict[str, Any]) -> str:
    parts = [result["prequential"], result["prequential_second_half"]]
    parts += [result["held_out_before"], result["held_out_after"]]
    figures = "  ".join(f"{part['acceptance']:.4f}" for part in parts)
    domains = "  ".join(
        f"{name} {figures['acceptance']:.3f}"
        for name, figures in result["held_out_after"]["domains"].items()
    )
    return f"{result['name']:34s} {figures}  {domains}"


_HEADER = f"{'way':34s} preq.   2nd half  held-out before, after, after by domain"


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
