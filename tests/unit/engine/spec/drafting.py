"""What tests of drafting models share: shapes of trees, candidates, contexts, and transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.domain.request import SamplingParams
from paceline.engine.spec.builders import branching
from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.candidates import candidates
from paceline.engine.spec.drafter import DraftBudget, DraftContext
from paceline.engine.spec.drafters import levels
from paceline.engine.spec.growth import Candidates, GrownNode, TreeGrowth
from paceline.engine.spec.tree import ROOT
from paceline.engine.step import SampleSpec

GREEDY = SamplingParams(temperature=0.0)


def budget(nodes: int, depth: int) -> DraftBudget:
    return DraftBudget(nodes, depth, 0.0, Calibration())


def context(
    sequence_id: int,
    tokens: Sequence[int],
    sampling: SamplingParams = GREEDY,
    num_prompt: int | None = None,
    is_coupled: bool = True,
) -> DraftContext:
    return DraftContext(
        sequence_id,
        tenant=b"",
        token_ids=list(tokens),
        num_prompt=len(tokens) if num_prompt is None else num_prompt,
        sampling=sampling,
        stream=0,
        is_coupled=is_coupled,
    )


def prompt(length: int, seed: int = 0, vocab: int = 4096) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(4, vocab) for _ in range(length)]


class Asked:
    """So many children behind every node; notes the nodes that candidates were wanted for."""

    def __init__(self, *counts: int) -> None:
        self._builder = branching(*counts)
        self.paths: list[list[tuple[int, ...]]] = []
        """[tree][question] the tokens from the root's child to the node."""

    def start(self, budget: DraftBudget, source: str, *, is_greedy: bool = False) -> AskedGrowth:
        self.paths.append([])
        growth = self._builder.start(budget, source, is_greedy=is_greedy)
        return AskedGrowth(growth, self.paths[-1])


class AskedGrowth:
    def __init__(self, growth: TreeGrowth, paths: list[tuple[int, ...]]) -> None:
        self._growth, self._paths = growth, paths
        self.frontier, self.tree = growth.frontier, growth.tree

    @property
    def nodes(self) -> Sequence[GrownNode]:
        return self._growth.nodes

    def expand(self, candidates: Sequence[Candidates]) -> None:
        self._paths += [path_to(self, node) for node in self.frontier()]
        self._growth.expand(candidates)


def path_to(growth: TreeGrowth, node: int) -> tuple[int, ...]:
    """The tokens from the root's child to a node."""
    if node == ROOT:
        return ()
    at = growth.nodes[node]
    return (*path_to(growth, at.parent), at.token)


class Heard:
    """Notes what is made candidates of, while it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: list[torch.Tensor] = []
        self.specs: list[SampleSpec] = []
        monkeypatch.setattr(levels, "candidates", self._listen)

    def _listen(
        self,
        logits_MV: torch.Tensor,
        specs: Sequence[SampleSpec],
        lanes: Sequence[int | None],
        count: int,
    ) -> list[Candidates]:
        self.logits += list(logits_MV.clone())
        self.specs += specs
        return candidates(logits_MV, specs, lanes, count)


@lru_cache(maxsize=8)
def transformers_model(directory: Path) -> torch.nn.Module:
    """In float64, so that only our own rounding is measured."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


@torch.inference_mode()
def transformers_logits(directory: Path, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary]"""
    return transformers_model(directory)(torch.tensor([list(tokens)])).logits[0]


@torch.inference_mode()
def generated(directory: Path, tokens: Sequence[int], count: int) -> list[int]:
    """What transformers' greedy generation brings."""
    model = transformers_model(directory)
    ids = model.generate(
        torch.tensor([list(tokens)]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )
    return [int(token) for token in ids[0, len(tokens) :]]
