"""Drafts with heads on the target's last hidden state (Medusa): no model of its own, no KV.

    tokens        ... t      t+1 = root      t+2        t+3
    from h_t                 the LM head     head 1     head 2
                             (drawn)         depth 1    depth 2 of the tree

No head sees what another one proposes, so one pass brings the candidates of all depths, the
same ones behind every node of a depth. Cai et al. 2024, sections 2.1 and 2.3; what a candidate
is worth is counted per head instead of measured once.

Shape legend: S sequences, K heads, E hidden size, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from paceline.domain.request import SamplingParams
from paceline.engine.kernels import PackedLinear, has_cpp_kernels
from paceline.engine.models.config import ModelConfig, UnsupportedModelError, load_model_config
from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.candidates import candidates
from paceline.engine.spec.drafter import DraftBudget, DraftContext, DrafterNeeds, Round
from paceline.engine.spec.drafters.levels import base_spec
from paceline.engine.spec.drafters.medusa_file import MedusaConfig, MedusaHead, load_medusa
from paceline.engine.spec.growth import Candidates, TreeBuilder
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree
from paceline.engine.step import SampleSpec
from paceline.engine.weights import load_tensors, model_digest

NUM_CANDIDATES = 10
"""Best tokens of a head; the paper's trees use no more."""
_VERSION_DIGITS = 12
_NOTHING = Candidates((), ())
_Product = Callable[[torch.Tensor], torch.Tensor]
_GREEDY = SamplingParams(temperature=0.0)


class MedusaHeads:
    """The heads' products."""

    def __init__(
        self, config: MedusaConfig, heads: Sequence[MedusaHead], lm_head_VE: torch.Tensor
    ) -> None:
        """Join the heads' weights.

        Args:
            config: their sizes.
            heads: their tensors.
            lm_head_VE: the target's, for heads that have none of their own.
        """
        self.num_heads = config.num_heads
        self._blocks = [[_product(*block) for block in head.blocks] for head in heads]
        lm_head = _product(lm_head_VE)
        self._heads = [
            lm_head if head.head_VE is None else _product(head.head_VE) for head in heads
        ]
        self._is_one_product = all(head is lm_head for head in self._heads)

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Return what each head says of each sequence, float32 [S, K, V]."""
        x_KSE = [self._through_blocks(k, hidden_SE.float()) for k in range(self.num_heads)]
        if self._is_one_product:
            logits_NV = self._heads[0](torch.cat(x_KSE))
            return torch.stack(logits_NV.split(len(hidden_SE)), dim=1)
        return torch.stack([head(x_SE) for head, x_SE in zip(self._heads, x_KSE, strict=True)], 1)

    def _through_blocks(self, head: int, x_SE: torch.Tensor) -> torch.Tensor:
        for block in self._blocks[head]:
            x_SE = x_SE + F.silu(block(x_SE))
        return x_SE


def _product(weight_OE: torch.Tensor, bias_O: torch.Tensor | None = None) -> _Product:
    """Return x W^T + b in float32, with packed bf16 weights where there are C++ kernels.

    For one row of 896 and 32,768 outputs these take 1.9 ms, torch's bf16 6.2, its float32 8.3.
    """
    if has_cpp_kernels():
        return PackedLinear(weight_OE, bias_O, weight_type="bf16")
    return partial(
        F.linear, weight=weight_OE.float(), bias=None if bias_O is None else bias_O.float()
    )


@dataclass(slots=True)
class _State:
    """What is known of a sequence between two rounds."""

    length: int
    """Tokens of the sequence whose last but one the hidden state is of."""
    hidden_E: torch.Tensor
    candidates: list[Candidates] | None = None
    """By head, with the heads' own probabilities; None until there was a draft."""


class MedusaDrafter:
    """Heads, and how often they have been right."""

    name = "medusa"
    needs = DrafterNeeds(hidden=True)

    def __init__(self, heads: MedusaHeads, *, version: str, builder: TreeBuilder) -> None:
        """Draft with heads.

        Args:
            heads: computes them.
            version: their version.
            builder: the shape of trees; one that picks the best nodes first fits.
        """
        self.version = version
        self._heads = heads
        self._builder = builder
        self._states: dict[int, _State] = {}
        self._worth = [Calibration() for _ in range(heads.num_heads)]

    @property
    def state_bytes(self) -> int:
        """Memory of the hidden states kept."""
        return sum(state.hidden_E.nbytes for state in self._states.values())

    @property
    def state_entries(self) -> int:
        """Hidden states kept."""
        return len(self._states)

    def swap(self, heads: MedusaHeads, version: str) -> None:
        """Draft with other heads from the next round on."""
        self._heads, self.version = heads, version
        self._worth = [Calibration() for _ in range(heads.num_heads)]
        for state in self._states.values():
            state.candidates = None

    @torch.inference_mode()
    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        """Return a tree for each sequence whose last step was observed, else an empty one."""
        known = [
            (context, state)
            for context in contexts
            if (state := self._states.get(context.sequence_id)) is not None
            and state.length == len(context.token_ids)
        ]
        if known:
            self._compute(known)
        return [
            self._grow(context, budget) for context, budget in zip(contexts, budgets, strict=True)
        ]

    def observe(self, rounds: Sequence[Round]) -> None:
        """Count which candidates were right, and keep the hidden states for the next draft."""
        for done in rounds:
            self._count(done)
            sequence_id = done.context.sequence_id
            if done.hidden_E is None:
                self._states.pop(sequence_id, None)
            else:
                length = len(done.context.token_ids)
                self._states[sequence_id] = _State(length, done.hidden_E)

    def forget(self, sequence_id: int) -> None:
        """Drop a sequence's hidden state."""
        self._states.pop(sequence_id, None)

    def _compute(self, known: Sequence[tuple[DraftContext, _State]]) -> None:
        hidden_SE = torch.stack([state.hidden_E for _, state in known])
        logits_SKV = self._heads.logits(hidden_SE)
        specs = [
            _spec(context, depth) for context, _ in known for depth in range(logits_SKV.shape[1])
        ]
        rows = candidates(logits_SKV.flatten(0, 1), specs, [None] * len(specs), NUM_CANDIDATES)
        per_sequence = logits_SKV.shape[1]
        for s, (_, state) in enumerate(known):
            state.candidates = rows[s * per_sequence : (s + 1) * per_sequence]

    def _grow(self, context: DraftContext, budget: DraftBudget) -> DraftTree:
        state = self._states.get(context.sequence_id)
        if state is None or state.candidates is None or state.length != len(context.token_ids):
            return EMPTY_TREE
        levels = [
            Candidates(own.tokens, tuple(worth.rate(p) for p in own.confidences))
            for own, worth in zip(state.candidates, self._worth, strict=True)
        ]
        growth = self._builder.start(budget, self.name, is_greedy=context.sampling.is_greedy)
        depth_of = {ROOT: 0}
        while frontier := growth.frontier():
            for node in frontier:
                if node != ROOT:
                    depth_of[node] = depth_of[growth.nodes[node].parent] + 1
            depths = [depth_of[node] for node in frontier]
            growth.expand([levels[d] if d < len(levels) else _NOTHING for d in depths])
        return growth.tree()

    def _count(self, done: Round) -> None:
        """Learn from candidates of which it is known whether they were right.

        That is up to the token behind the accepted path: deeper ones would have had to follow
        tokens that were not drawn.
        """
        state = self._states.get(done.context.sequence_id)
        if state is None or state.candidates is None:
            return
        if state.length + len(done.emitted) != len(done.context.token_ids):
            return
        for token, own, worth in zip(done.emitted, state.candidates, self._worth, strict=False):
            for candidate, confidence in zip(own.tokens, own.confidences, strict=True):
                worth.add(confidence, candidate == token)


def _spec(context: DraftContext, depth: int) -> SampleSpec:
    """Return how the target draws the token `depth` tokens behind the root's child.

    Penalties are those at the root. Where children are not guesses of what the target draws
    with its noise, they are point masses: the head's likeliest tokens.
    """
    base = base_spec(context)
    sampling = base.sampling if context.is_coupled else _GREEDY
    return replace(base, sampling=sampling, position=base.position + depth)


def load_medusa_heads(directory: Path, target: Path) -> tuple[MedusaHeads, str]:
    """Load heads for a target's checkpoint; return them and their version.

    Raises:
        UnsupportedModelError: they cannot be loaded, or are another model's.
    """
    config, heads, lm_head_VE = load_for_target(directory, target)
    return MedusaHeads(config, heads, lm_head_VE), model_digest(directory)[:_VERSION_DIGITS]


def load_for_target(
    directory: Path, target: Path
) -> tuple[MedusaConfig, list[MedusaHead], torch.Tensor]:
    """Return heads and the target's own head [V, E].

    Raises:
        UnsupportedModelError: they cannot be loaded, or are another model's.
    """
    config, heads = load_medusa(directory)
    target_config = load_model_config(target)
    for key in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(config, key), getattr(target_config, key)
        if ours != theirs:
            raise UnsupportedModelError(f"{key}: {ours}, the target has {theirs}")
    digest = config.base_model_digest
    if digest is not None and digest != model_digest(target):
        raise UnsupportedModelError(f"base_model_digest: {digest} is not that of the target")
    return config, heads, lm_head_of(target, target_config)


def lm_head_of(target: Path, config: ModelConfig) -> torch.Tensor:
    """Return a target's output matrix as it is stored, [V, E].

    Raises:
        UnsupportedModelError: the checkpoint has none.
    """
    name = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    for found, tensor in load_tensors(target):
        if found == name:
            return tensor
    raise UnsupportedModelError(f"tensor {name} is missing from the checkpoint")


def make(
    *,
    directory: str | Path,
    target: str | Path,
    builder: TreeBuilder,
    version: str | None = None,
) -> MedusaDrafter:
    """Return a drafter from a checkpoint of heads.

    Raises:
        UnsupportedModelError: they cannot be loaded, or are another model's.
    """
    heads, digest = load_medusa_heads(Path(directory), Path(target))
    return MedusaDrafter(heads, version=version or digest, builder=builder)
