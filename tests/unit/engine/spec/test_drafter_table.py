"""Drafters are found by name, and one more is one line."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paceline.engine.spec import drafters
from paceline.engine.spec.drafter import DraftBudget, DraftContext, DrafterNeeds, Round
from paceline.engine.spec.drafters import drafter_names, make_drafter, register
from paceline.engine.spec.tree import DraftTree
from tests.unit.engine.spec.retrieval_cases import budget, context


class EchoDrafter:
    """Drafts a token that it was told of at the start."""

    name = "echo"
    version = ""
    needs = DrafterNeeds()

    def __init__(self, token: int = 0) -> None:
        self._token = token

    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        return [DraftTree((self._token,), (-1,), (0.5,), (0.5,), (self.name,)) for _ in contexts]

    def observe(self, rounds: Sequence[Round]) -> None:
        pass

    def forget(self, sequence_id: int) -> None:
        pass


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafters, "_DRAFTERS", dict(drafters._DRAFTERS))


def test_every_named_drafter_that_needs_no_weights_can_be_made() -> None:
    for name in ("trie", "recycling"):
        assert name in drafter_names()
        assert make_drafter(name).name == name


@pytest.mark.parametrize("factory", [EchoDrafter, f"{__name__}:EchoDrafter"])
def test_one_more_drafter_is_one_line(factory: str | type[EchoDrafter]) -> None:
    register("echo", factory)
    drafter = make_drafter("echo", {"echo": {"token": 7}, "trie": {"tenants": 1}})
    assert drafter.propose([context(1, [1], 1)], [budget()])[0].tokens == (7,)
    assert make_drafter("trie+echo", {"echo": {"token": 7}}).name == "trie+echo"


def test_unknown_and_impossible_names_are_refused() -> None:
    with pytest.raises(KeyError):
        make_drafter("no-such")
    with pytest.raises(KeyError):
        make_drafter("trie+no-such")
    with pytest.raises(ValueError, match="name"):
        register("a+b", EchoDrafter)
