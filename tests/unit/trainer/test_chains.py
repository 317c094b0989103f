"""Chains are counted as verification would accept them, for every kind of draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.trainer.chains import ChainTally
from paceline.trainer.checkpoint import load_draft, target_head
from paceline.trainer.guessing import Guesses, GuessingModel
from paceline.trainer.heads import new_heads
from paceline.trainer.samples import text_of
from paceline.trainer.texts import Text
from tests.unit.trainer.traffic import samples_of, small_draft

DEPTH = 3


class Known(GuessingModel):
    """A draft of which it is known what it gets right."""

    def __init__(self, matches: list[list[bool]], depth: int) -> None:
        super().__init__()
        self._matches_RD = torch.tensor(matches, dtype=torch.bool).view(-1, depth)

    def guesses(self, texts: Sequence[Text]) -> Iterator[Guesses]:
        raise NotImplementedError

    def chain_matches(self, text: Text, depth: int) -> torch.Tensor:
        return self._matches_RD


@pytest.fixture(scope="module")
def text(target: Path) -> Text:
    (sample,) = samples_of(target, 1, temperature=0.0, num_captured=12, has_hidden=True)
    return text_of(sample, load_draft(target).shape.vocab_size, 64)


@given(st.lists(st.lists(st.booleans(), min_size=DEPTH, max_size=DEPTH), max_size=30))
def test_tokens_per_pass_are_what_is_accepted_and_the_targets_own(
    matches: list[list[bool]],
) -> None:
    tally = ChainTally(DEPTH)
    nothing = np.zeros((0, 1), np.float16)
    empty = np.zeros(0, np.float32)
    text = Text(empty.astype(np.int32), nothing.astype(np.int32), nothing, empty)
    for part in (matches[:4], matches[4:]):
        tally.add(Known(part, DEPTH), text)
    found = tally.figures()
    runs = [next((d for d, right in enumerate(m) if not right), DEPTH) for m in matches]
    assert found["roots"] == len(matches)
    mean = 1 + sum(runs) / max(1, len(matches))
    assert found["tokens_per_pass"] == pytest.approx(mean, abs=1e-4)
    product, total = 1.0, 1.0
    for share in found["acceptance_by_depth"]:
        product *= share
        total += product
    assert total == pytest.approx(mean, abs=1e-3)
    for d, share in enumerate(found["agreement_by_depth"]):
        right = sum(m[d] for m in matches)
        assert share == pytest.approx(right / max(1, len(matches)), abs=1e-4)


def test_a_small_model_drafts_on_behind_its_own_tokens(
    text: Text, target: Path, tmp_path: Path
) -> None:
    """Run as an engine does it, one token after the other, from every root."""
    torch.manual_seed(0)
    tokens = text.tokens_T.tolist()
    roots = range(text.first + 1, len(tokens) - DEPTH)
    for draft in (load_draft(target), load_draft(small_draft(target, tmp_path / "draft"))):
        accepted = 0
        for root in roots:
            seen = tokens[: root + 1]
            for _ in range(DEPTH):
                length = len(seen)
                visible = torch.ones(1, length, length, dtype=torch.bool).tril()
                with torch.no_grad():
                    hidden = draft(torch.tensor([seen]), torch.arange(length)[None], visible)
                    token = int(draft.logits(hidden[0, -1]).argmax())
                if token != tokens[length]:
                    break
                accepted += 1
                seen.append(token)
        tally = ChainTally(DEPTH)
        tally.add(draft, text)
        found = tally.figures()
        assert found["roots"] == len(roots) == 9
        assert found["tokens_per_pass"] == pytest.approx(1 + accepted / len(roots), abs=1e-4)
    # The target's own greedy text: as its draft it gets all of it, the other one next to nothing.
    assert accepted < 4


def test_heads_guess_from_the_state_in_front_of_the_root(text: Text, target: Path) -> None:
    model = new_heads(target, DEPTH, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert text.hidden_TE is not None
    head_VE = target_head(target)
    tokens = text.tokens_T.tolist()
    expected = []
    for root in range(text.first + 1, len(tokens) - DEPTH):
        # The state behind which the root was drawn is that of the token before it.
        state_E = torch.from_numpy(text.hidden_TE[root - 1 - text.first]).float()
        row = []
        for k in range(DEPTH):
            block = model.blocks[k][0]  # type: ignore[index]
            y_E = block.weight @ state_E + block.bias
            guess = int((head_VE @ (state_E + y_E * torch.sigmoid(y_E))).argmax())
            row.append(guess == tokens[root + k + 1])
        expected.append(row)
    with torch.no_grad():
        assert model.chain_matches(text, DEPTH).tolist() == expected
        two = model.chain_matches(text, 2)
        assert len(two) == len(expected) + 1 and two[:-1].tolist() == [r[:2] for r in expected]
        short = text.window(0, text.first + 1 + DEPTH)
        assert model.chain_matches(short, DEPTH).shape == (0, DEPTH)
        assert load_draft(target).chain_matches(short, DEPTH).shape == (0, DEPTH)
    with pytest.raises(ValueError, match="chains of 4 tokens, there are 3 heads"):
        model.chain_matches(text, 4)
