"""Sequences of a bank go to the draft that knows their domain; trying the others stays cheap."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from paceline.domain.cost import StepCost
from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine import build
from tests.checkpoints import random_checkpoint
from tests.unit.engine.spec.test_draft_swaps import (
    Host,
    changed,
    engine_for,
    prompt,
    speculator_of,
    staged,
)

RANGES = {"a": (100, 200), "b": (200, 300)}
"""Tokens of each domain."""
COST = StepCost(base_s=0.05, row_s=0.0, token_s=1e-3, context_s=0.0)
TICK_S = 0.5e-3
"""What drafting takes, by the speculator's clock, whatever this machine does meanwhile."""
EXPLORED_RATIO = 0.01
"""Of the time that may go to drafters other than the best (controller.py)."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """An engine with a draft for each domain, and one for everybody that knows neither."""
    monkeypatch.setattr(build, "_step_cost", lambda *args: COST)
    target = random_checkpoint("llama", tmp_path / "target", initializer_range=1.0)

    def without(name: str, *domains: str) -> Path:
        """Copy the target so that it takes the tokens of some domains for others."""

        def mixed(tensor_name: str, tensor: torch.Tensor) -> torch.Tensor:
            if tensor_name == "model.embed_tokens.weight":
                for low, high in (RANGES[domain] for domain in domains):
                    tensor[low:high] = tensor[low:high].flip(0).flip(1)
            return tensor

        return changed(target, tmp_path / name, mixed)

    found = Host(engine_for(target, drafters=("model",)))
    ticks = itertools.count()
    speculator_of(found.engine)._clock_s = lambda: next(ticks) * TICK_S
    found.change(
        staged(without("neither", "a", "b"), "neither"),
        staged(without("knows-a", "b"), "a", drafter="model:a"),
        staged(without("knows-b", "a"), "b", drafter="model:b"),
    )
    return found


def test_each_domain_is_drafted_by_what_fits_it_after_a_bounded_search(host: Host) -> None:
    speculator = speculator_of(host.engine)
    assert speculator.arms == ("model", "model:a", "model:b")
    used: dict[str, Counter[str]] = {name: Counter() for name in RANGES}
    num_steps = 0
    for i in range(30):
        for name, (low, high) in RANGES.items():
            host.engine.submit(
                GenerationSpec(
                    f"{name}{i}",
                    prompt(i, 40, low, high),
                    SamplingParams(temperature=0.0),
                    max_tokens=24,
                    ignore_eos=True,
                    domain=name,
                )
            )
        while host.engine.num_requests:
            host.step()
            num_steps += 1
        if i >= 10:
            for name, counts in used.items():
                for chunk in host.chunks[f"{name}{i}"]:
                    counts[chunk.draft_version] += chunk.drafted_tokens
    for name, counts in used.items():
        assert counts[name] > 0.8 * counts.total() > 0, used
    explored = sum(n for (_, why), n in speculator.report().decisions.items() if why == "explore")
    # Every arm is tried a few times whatever it costs; all else is paid out of the allowance.
    longest_step_s = COST.base_s + COST.token_s * 2
    cheapest_s = TICK_S + COST.token_s * 4
    first_trials = 4 * len(speculator.arms) * 2
    assert explored <= first_trials + EXPLORED_RATIO * num_steps * longest_step_s / cheapest_s
