"""The target with layers left out: what it drafts, what it leaves alone, what the search finds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from paceline.engine.models.config import UnsupportedModelError, load_model_config
from paceline.engine.models.load import Model, ModelOptions, load_model
from paceline.engine.page_table import PageIds
from paceline.engine.spec.builders import branching
from paceline.engine.spec.drafter import DraftContext, Round
from paceline.engine.spec.drafters.layer_skip import LayerSkipDrafter, make
from paceline.engine.spec.drafters.passes import PassLayout, Run
from paceline.engine.spec.drafters.skip_search import SkipSearch, SkipSet
from paceline.engine.spec.tree import EMPTY_TREE
from tests.checkpoints import random_checkpoint
from tests.unit.engine.spec.drafting import (
    Heard,
    budget,
    context,
    generated,
    prompt,
)

NUM_LAYERS, NUM_PAGES, BLOCK_SIZE = 6, 48, 16
NOTHING = ((False, False),) * NUM_LAYERS
SKIPPED = tuple((i in (1, 4), i in (2, 4)) for i in range(NUM_LAYERS))
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("targets")
    return {
        name: random_checkpoint(name, root / name, num_hidden_layers=NUM_LAYERS)
        for name in ("llama", "mistral")
    }


@cache
def loaded(directory: Path) -> Model:
    config = load_model_config(directory)
    return load_model(directory, config, ModelOptions("f32", BLOCK_SIZE, 1024, threads=1))


class Lender:
    """A target with its pages, as the engine has it between two steps."""

    block_size = BLOCK_SIZE
    max_context_tokens = 1024

    def __init__(self, directory: Path) -> None:
        self.model = loaded(directory)
        config = self.model.config
        self.kv_PL2KTD = torch.full(
            (NUM_PAGES, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim),
            float("nan"),
        )
        self._free = random.Random(0).sample(range(NUM_PAGES), NUM_PAGES)
        self._pages: dict[int, PageIds] = {}
        self.lends = True

    @torch.inference_mode()
    def compute(self, seen: DraftContext, room: int) -> None:
        """Compute all tokens but the last one."""
        tokens = seen.token_ids
        count = -(-(len(tokens) + room) // BLOCK_SIZE)
        ids = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
        self._pages[seen.sequence_id] = ids
        if len(tokens) > 1:
            layout, end = PassLayout(BLOCK_SIZE), len(tokens) - 1
            layout.set_tables([ids])
            batch = layout.lay_out([Run(tokens[:end], range(end), end)])
            self.model.forward(
                batch.tokens_N, batch.positions_N, self.kv_PL2KTD, batch.slots_N, batch.attention
            )

    def pages_of(self, sequence_id: int) -> PageIds:
        return self._pages[sequence_id]

    def lend_pages(self, count: int) -> Sequence[int]:
        return self._free[:count] if self.lends else ()

    def context_bytes(self, seen: DraftContext) -> list[bytes]:
        """The KV of all tokens but the last one, and of nobody's pages none."""
        ids = self._pages[seen.sequence_id]
        return [
            self.kv_PL2KTD[ids[i // BLOCK_SIZE], :, :, :, i % BLOCK_SIZE].numpy().tobytes()
            for i in range(len(seen.token_ids) - 1)
        ]


def drafter(target: Lender, skip: SkipSet, width: int = 1) -> LayerSkipDrafter:
    return LayerSkipDrafter(target, builder=branching(width), skip=skip, tune_every_rounds=4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_with_nothing_left_out_it_drafts_what_the_target_generates(
    checkpoints: dict[str, Path], name: str
) -> None:
    directory, target = checkpoints[name], Lender(checkpoints[name])
    contexts = [context(i, prompt(length)) for i, length in enumerate((45, 1, 16))]
    for seen in contexts:
        target.compute(seen, room=8)
    before = [target.context_bytes(seen) for seen in contexts]
    drafts = drafter(target, NOTHING)
    budgets = [budget(8, 8), budget(3, 3), budget(5, 5)]
    # Twice: what the first round left in the slots behind the context does not matter.
    for _ in range(2):
        for seen, given_, tree in zip(
            contexts, budgets, drafts.propose(contexts, budgets), strict=True
        ):
            assert list(tree.tokens) == generated(directory, seen.token_ids, given_.depth)
    assert [target.context_bytes(seen) for seen in contexts] == before


@torch.inference_mode()
def skipped_logits(directory: Path, tokens: Sequence[int], path: Sequence[int]) -> torch.Tensor:
    """Logits behind `path`, for which the sublayers add nothing from the last token on."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    at = len(tokens) - 1

    def add_nothing(_: object, __: object, output_1NE: torch.Tensor) -> torch.Tensor:
        output_1NE[:, at:] = 0.0
        return output_1NE

    for layer, (skips_attention, skips_mlp) in zip(model.model.layers, SKIPPED, strict=True):
        if skips_attention:
            layer.self_attn.o_proj.register_forward_hook(add_nothing)
        if skips_mlp:
            layer.mlp.down_proj.register_forward_hook(add_nothing)
    return torch.as_tensor(model(torch.tensor([[*tokens, *path]])).logits[0, -1])


def test_sublayers_are_left_out_for_the_draft_and_not_for_its_context(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, target = checkpoints["llama"], Lender(checkpoints["llama"])
    seen = context(1, prompt(30))
    target.compute(seen, room=6)
    heard = Heard(monkeypatch)
    drafts = drafter(target, SKIPPED, width=2)
    tree = drafts.propose([seen], [budget(6, 2)])[0]
    assert tree.parents == (-1, -1, 0, 0, 1, 1)
    for path, logits_V in zip([(), tree.tokens[:1], tree.tokens[1:2]], heard.logits, strict=True):
        expected_V = skipped_logits(directory, seen.token_ids, path)
        torch.testing.assert_close(logits_V.double(), expected_V, atol=TOLERANCE, rtol=0)


def test_no_tree_without_room_for_it(checkpoints: dict[str, Path]) -> None:
    target = Lender(checkpoints["llama"])
    seen = context(1, prompt(28))
    target.compute(seen, room=0)
    drafts = drafter(target, NOTHING)
    assert len(drafts.propose([seen], [budget(4, 4)])[0]) == 4
    assert drafts.propose([seen], [budget(5, 4)]) == [EMPTY_TREE]
    target.max_context_tokens = 30
    assert len(drafts.propose([seen], [budget(4, 3)])[0]) == 3
    assert drafts.propose([seen], [budget(4, 4)]) == [EMPTY_TREE]


def test_matchness_is_the_share_of_what_was_emitted(checkpoints: dict[str, Path]) -> None:
    directory, target = checkpoints["llama"], Lender(checkpoints["llama"])
    start = prompt(21)
    emitted = generated(directory, start, 40)
    for at in (8, 20, 31, 35, 39):
        emitted[at] = (emitted[at] + 1) % 4096
    seen = context(1, start + emitted, num_prompt=21)
    target.compute(seen, room=1)
    before = target.context_bytes(seen)
    drafts = drafter(target, NOTHING)
    # What follows a changed token was not generated behind it: ask the target itself.
    logits = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        .eval()(torch.tensor([seen.token_ids]))
        .logits[0]
    )
    expected = [int(t) for t in logits.argmax(-1)[-33:-1]]
    share = sum(a == b for a, b in zip(expected, seen.token_ids[-32:], strict=True)) / 32
    assert 0.1 < share < 0.9
    scores = []
    drafts.search = Scorer(NOTHING, scores)  # type: ignore[assignment]
    assert drafts.tune(seen)
    assert scores == [share]
    assert target.context_bytes(seen) == before


class Scorer:
    """A search that asks for one score."""

    is_done = False

    def __init__(self, best: SkipSet, scores: list[float]) -> None:
        self.best, self._scores = best, scores

    def try_one(self, score: object) -> None:
        self._scores.append(score(self.best))  # type: ignore[operator]


def test_trials_run_every_few_rounds_on_lent_pages_and_never_lose_matchness(
    checkpoints: dict[str, Path],
) -> None:
    directory, target = checkpoints["llama"], Lender(checkpoints["llama"])
    start = prompt(20)
    seen = context(1, start + generated(directory, start, 40), num_prompt=20)
    short = context(2, prompt(50), num_prompt=20)
    for each in (seen, short):
        target.compute(each, room=4)
    before = target.context_bytes(seen)
    drafts = make(target=target, builder=branching(1), tune_every_rounds=4)
    first = tuple(drafts.search.best)
    assert first == tuple((i in (1, 3),) * 2 for i in range(NUM_LAYERS))
    step = [Round(each, EMPTY_TREE, (), (1,)) for each in (short, seen)]
    target.lends = False
    for _ in range(4):
        drafts.observe(step)
    assert drafts.search.num_trials == 0
    target.lends = True
    history = []
    for _ in range(80):
        drafts.observe(step)
        history.append(drafts.search.matchness)
    assert drafts.search.num_trials == 40
    found = [m for m in history if m is not None]
    assert found == sorted(found)
    assert found[-1] > found[0]
    assert drafts.search.best != first
    assert target.context_bytes(seen) == before
    assert not drafts.tune(context(3, prompt(51), num_prompt=20))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), num_layers=st.integers(4, 12))
def test_the_search_finds_the_sublayers_that_do_not_matter(seed: int, num_layers: int) -> None:
    rng = random.Random(seed)
    search = SkipSearch(num_layers, rng)
    size = sum(map(sum, search.best))
    places = [(i, j) for i in range(1, num_layers - 1) for j in range(2)]
    harmless = set(rng.sample(places, size))

    def score(skip: SkipSet) -> float:
        assert not any(skip[0]) and not any(skip[-1])
        left_out = {(i, j) for i, layer in enumerate(skip) for j in range(2) if layer[j]}
        assert len(left_out) == size
        return len(left_out & harmless) / size

    start = last = score(search.best)
    while not search.is_done:
        search.try_one(score)
        assert search.matchness is not None and search.matchness >= last
        last = search.matchness
    # The last exchange of two is one of a hundred: 300 trials may miss it.
    assert last >= 0.75
    assert score(search.best) == last >= start


def test_the_search_ends_where_nothing_is_found() -> None:
    search = SkipSearch(8, random.Random(0))
    first = search.best
    while not search.is_done:
        search.try_one(lambda skip: 0.5)
    assert search.num_trials == 300
    assert search.best == first
    assert SkipSearch(8, random.Random(0), first=((False, False),) * 8).is_done


def test_a_model_of_two_layers_cannot_skip_any() -> None:
    with pytest.raises(UnsupportedModelError, match="2 layers"):
        SkipSearch(2, random.Random(0))
