"""What tests of drafting models share: shapes of trees, candidates, contexts, and transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from paceline.domain.request import SamplingParams
from paceline.engine.sampling.sampler import sample
from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.drafter import DraftBudget, DraftContext
from paceline.engine.spec.growth import Candidates
from paceline.engine.spec.tree import ROOT, DraftTree
from paceline.engine.step import SampleSpec

GREEDY = SamplingParams(temperature=0.0)


def budget(nodes: int, depth: int) -> DraftBudget:
    return DraftBudget(nodes, depth, 0.0, Calibration())


def context(
    sequence_id: int,
    tokens: Sequence[int],
    sampling: SamplingParams = GREEDY,
    num_prompt: int | None = None,
) -> DraftContext:
    return DraftContext(
        sequence_id,
        tenant=b"",
        token_ids=list(tokens),
        num_prompt=len(tokens) if num_prompt is None else num_prompt,
        sampling=sampling,
        stream=0,
    )


def prompt(length: int, seed: int = 0, vocab: int = 4096) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(4, vocab) for _ in range(length)]


@dataclass
class Bushy:
    """The k best children behind every node, level by level, until the budget is spent."""

    width: int
    asked: list[list[tuple[int, ...]]] = field(default_factory=list)
    """[tree][question] the tokens from the root's child to the node candidates were wanted for."""

    def start(self, budget: DraftBudget, source: str) -> BushyGrowth:
        self.asked.append([])
        return BushyGrowth(self.width, budget, source, self.asked[-1])


class BushyGrowth:
    def __init__(
        self, width: int, budget: DraftBudget, source: str, asked: list[tuple[int, ...]]
    ) -> None:
        self._width, self._budget, self._source, self._asked = width, budget, source, asked
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._confidences: list[float] = []
        self._frontier: list[int] = [ROOT]

    def frontier(self) -> Sequence[int]:
        return self._frontier

    def expand(self, candidates: Sequence[Candidates]) -> None:
        tree, level = self.tree(), []
        for node, found in zip(self._frontier, candidates, strict=True):
            self._asked.append(tuple(tree.tokens[i] for i in tree.path_to(node)))
            for token, confidence in list(zip(found.tokens, found.confidences, strict=True))[
                : self._width
            ]:
                if len(self._tokens) < self._budget.nodes:
                    level.append(len(self._tokens))
                    self._tokens.append(token)
                    self._parents.append(node)
                    self._confidences.append(confidence)
        depths = self.tree().depths
        is_over = len(self._tokens) == self._budget.nodes
        self._frontier = (
            [] if is_over else [node for node in level if depths[node] < self._budget.depth]
        )

    def tree(self) -> DraftTree:
        count = len(self._tokens)
        return DraftTree(
            tuple(self._tokens),
            tuple(self._parents),
            tuple(self._confidences),
            (1.0,) * count,
            (self._source,) * count,
        )


@dataclass
class LikeliestFirst:
    """What would be drawn comes first, then the likeliest; notes what it was given."""

    width: int = 1
    logits: list[torch.Tensor] = field(default_factory=list)
    specs: list[SampleSpec] = field(default_factory=list)

    def __call__(
        self, logits_MV: torch.Tensor, specs: Sequence[SampleSpec], is_coupled: Sequence[bool]
    ) -> list[Candidates]:
        self.logits += list(logits_MV.clone())
        self.specs += specs
        drawn = sample(logits_MV, list(specs))
        found = []
        for logits_V, token in zip(logits_MV, drawn, strict=True):
            assert token is not None
            best = [t for t in logits_V.topk(self.width).indices.tolist() if t != token.token_id]
            tokens = (token.token_id, *best)[: self.width]
            probs_V = logits_V.softmax(dim=-1)
            found.append(Candidates(tokens, tuple(float(probs_V[t]) for t in tokens)))
        return found


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
