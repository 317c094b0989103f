"""A drafter is one class and one line, and whatever it does, requests get their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.events import OutputEvent
from paceline.engine.options import EngineOptions
from paceline.engine.spec import drafters
from paceline.engine.spec.drafter import NO_NEEDS, DraftBudget, DraftContext, Round
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree
from tests.checkpoints import random_checkpoint
from tests.unit.engine.memory_arena import run_until_idle, tokens_of


class LastTokenAgain:
    """Proposes that the last token comes once more."""

    name = "again"
    version = ""
    needs = NO_NEEDS
    state_bytes = 0
    state_entries = 0

    def __init__(self) -> None:
        self.num_rounds = 0
        self.live: set[int] = set()

    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        self.live |= {context.sequence_id for context in contexts}
        return [self._tree(context) for context in contexts]

    def observe(self, rounds: Sequence[Round]) -> None:
        self.num_rounds += len(rounds)

    def forget(self, sequence_id: int) -> None:
        self.live.discard(sequence_id)

    def _tree(self, context: DraftContext) -> DraftTree:
        return DraftTree((context.token_ids[-1],), (-1,), (0.5,), (0.5,), ("again",))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    kept = dict(drafters._DRAFTERS)
    yield
    drafters._DRAFTERS.clear()
    drafters._DRAFTERS.update(kept)


def engine_with(checkpoint: Path, drafter: Any, **options: Any) -> Engine:
    drafters.register("again", lambda: drafter)
    names = ("again", *options.pop("beside", ()))
    return build_engine(
        EngineOptions(model=str(checkpoint), num_kv_blocks=64, drafters=names, **options)
    )[0]


def outputs(engine: Engine, mode: str = "again", count: int = 4) -> list[list[int]]:
    for i in range(count):
        engine.submit(
            GenerationSpec(
                request_id=str(i),
                prompt_token_ids=tuple(range(5 + i, 25 + i)),
                sampling=SamplingParams(temperature=0.0),
                max_tokens=12,
                ignore_eos=True,
                speculation=mode,
            )
        )
    brought = run_until_idle(engine)
    assert engine.check_integrity() == []
    return [tokens_of(brought[str(i)]) for i in range(count)]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> list[list[int]]:
    engine = build_engine(EngineOptions(model=str(checkpoint), num_kv_blocks=64, drafters=()))[0]
    return outputs(engine, "OFF")


def test_a_drafter_is_registered_and_used(checkpoint: Path, plain: list[list[int]]) -> None:
    drafter = LastTokenAgain()
    engine = engine_with(checkpoint, drafter)
    assert outputs(engine) == plain
    report = engine.load().speculation
    assert report is not None
    assert [r.name for r in report.drafters] == ["again"]
    assert drafter.num_rounds > 0
    assert not drafter.live, "what was kept for sequences outlives them"


def test_requests_say_off_or_name_what_there_is_not(
    checkpoint: Path, plain: list[list[int]]
) -> None:
    drafter = LastTokenAgain()
    engine = engine_with(checkpoint, drafter)
    for mode in ("OFF", "no-such"):
        assert outputs(engine, mode) == plain
    assert not drafter.live


class Raises(LastTokenAgain):
    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        raise RuntimeError("drafters may fail")


class RaisesLater(LastTokenAgain):
    def observe(self, rounds: Sequence[Round]) -> None:
        raise RuntimeError("drafters may fail")


class LosesSequences(LastTokenAgain):
    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        return []


class UnknownToken(LastTokenAgain):
    def _tree(self, context: DraftContext) -> DraftTree:
        return DraftTree((1 << 20,), (-1,), (0.5,), (0.5,), ("again",))


class OwnParent(LastTokenAgain):
    def _tree(self, context: DraftContext) -> DraftTree:
        return DraftTree((5,), (0,), (0.5,), (0.5,), ("again",))


class TooMany(LastTokenAgain):
    def _tree(self, context: DraftContext) -> DraftTree:
        ones = (1.0,) * 1000
        return DraftTree((5,) * 1000, (-1,) * 1000, ones, ones, ("again",) * 1000)


@pytest.mark.parametrize(
    "kind", [Raises, RaisesLater, LosesSequences, UnknownToken, OwnParent, TooMany]
)
def test_a_drafter_that_fails_is_left_out(
    checkpoint: Path, plain: list[list[int]], kind: type[LastTokenAgain]
) -> None:
    engine = engine_with(checkpoint, kind(), beside=("trie",))
    for mode in ("again", "AUTO", "again", "trie"):
        assert outputs(engine, mode) == plain


def test_a_token_that_is_not_finite_spoils_only_drafts(
    checkpoint: Path, plain: list[list[int]], tmp_path: Path
) -> None:
    """One token of the vocabulary is broken: who drafts it must not end who never says it."""
    broken_token = 4000
    assert not any(broken_token in output for output in plain)
    directory = tmp_path / "broken"
    directory.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "model.safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    tied = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = tied.clone()
    tensors["model.embed_tokens.weight"] = tied.clone()
    tensors["model.embed_tokens.weight"][broken_token] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    config = (directory / "config.json").read_text()
    assert '"tie_word_embeddings": true' in config
    (directory / "config.json").write_text(
        config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )

    class Broken(LastTokenAgain):
        def _tree(self, context: DraftContext) -> DraftTree:
            if len(context.token_ids) % 3:
                return EMPTY_TREE
            return DraftTree((broken_token,), (-1,), (0.5,), (0.5,), ("again",))

    assert outputs(engine_with(directory, Broken())) == plain


def test_chunks_say_what_was_drafted_and_accepted(checkpoint: Path) -> None:
    class Knows(LastTokenAgain):
        """Proposes what came last time."""

        version = "v1"

        def _tree(self, context: DraftContext) -> DraftTree:
            known = expected[len(context.token_ids) - 20 :][:3]
            size = len(known)
            ones = (0.9,) * size
            return DraftTree(
                tuple(known), tuple(range(-1, size - 1)), ones, ones, ("again",) * size
            )

    expected = outputs(engine_with(checkpoint, LastTokenAgain()), "OFF", count=1)[0]
    engine = engine_with(checkpoint, Knows())
    engine.submit(
        GenerationSpec(
            request_id="0",
            prompt_token_ids=tuple(range(5, 25)),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=12,
            ignore_eos=True,
            speculation="again",
            logprobs=1,
        )
    )
    events: list[OutputEvent] = run_until_idle(engine)["0"]
    chunks = [chunk for event in events for chunk in event.chunks]
    assert [token for chunk in chunks for token in chunk.token_ids] == expected
    assert sum(chunk.target_steps for chunk in chunks) < 12
    assert sum(chunk.accepted_tokens for chunk in chunks) == 12 - len(chunks)
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
    assert all(chunk.accepted_tokens <= chunk.drafted_tokens for chunk in chunks)
    assert {chunk.draft_version for chunk in chunks if chunk.drafted_tokens} == {"v1"}
