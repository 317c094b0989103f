"""Samples of a real engine: their distributions are the target's, and nobody else's tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paceline.domain.learnings import Sample, TokenOrigin, tenant_digest
from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine import recording
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.events import EngineEvent, LearningsEvent, OutputEvent
from paceline.engine.options import EngineOptions
from paceline.engine.spec.capture import CONTEXT_TOKENS, MIN_TOKENS, WINDOW_TOKENS
from tests.checkpoints import random_checkpoint
from tests.unit.engine.memory_arena import tokens_of
from tests.unit.engine.spec.drafting import transformers_logits, transformers_model

VOCAB, HIDDEN, TOP = 4096, 64, 16
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("target") / "llama")


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("qwen3", tmp_path_factory.mktemp("draft") / "qwen3")


def engine_for(target: Path, **options: Any) -> Engine:
    settings: dict[str, Any] = {"num_kv_blocks": 80, "chunk_tokens": 32, "max_num_seqs": 4}
    settings |= {"capture_share": 1.0, "capture_top": TOP, "drafters": ()}
    return build_engine(EngineOptions(model=str(target), **{**settings, **options}))[0]


def request(name: str, length: int = 40, **fields: Any) -> GenerationSpec:
    rng = random.Random(name)
    # Few different tokens, so that there is something to look up.
    prompt = tuple(rng.choices(rng.sample(range(4, VOCAB), 6), k=length))
    values = {"max_tokens": 40, "ignore_eos": True, "allow_training": True, "domain": "d"}
    sampling = SamplingParams(temperature=0.7, top_k=8, repetition_penalty=1.1, seed=len(name))
    return GenerationSpec(name, prompt, sampling, **{**values, **fields})


class Ran:
    """All that came of some requests."""

    def __init__(self, engine: Engine, specs: Sequence[GenerationSpec]) -> None:
        self.outputs: dict[str, list[OutputEvent]] = {}
        self.samples: list[Sample] = []
        self.capture_s = 0.0
        self.specs = specs
        for spec in specs:
            engine.submit(spec)
        while engine.has_work or engine.num_requests:
            self.book(engine.step())
        assert engine.check_integrity() == []

    def book(self, events: list[EngineEvent]) -> None:
        assert sum(isinstance(event, LearningsEvent) for event in events) <= 1
        for event in events:
            if isinstance(event, LearningsEvent):
                self.samples += event.samples
                self.capture_s += event.capture_s
            if isinstance(event, OutputEvent):
                self.outputs.setdefault(event.request_id, []).append(event)

    def sequences(self) -> dict[tuple[str, int], list[int]]:
        """Prompt and output of every output."""
        return {
            (spec.request_id, i): [
                *spec.prompt_token_ids,
                *tokens_of(self.outputs[spec.request_id], i),
            ]
            for spec in self.specs
            for i in range(spec.n)
        }

    def sources(self, sample: Sample) -> list[str]:
        """Requests of which a sample's tokens are a run, at its position."""
        first, run = sample.first_position, list(sample.token_ids)
        sequences = self.sequences().items()
        return [id_ for (id_, _), s in sequences if s[first : first + len(run)] == run]

    def check(self, target: Path) -> None:
        """Compare every sample with transformers."""
        assert self.samples
        for sample in self.samples:
            assert MIN_TOKENS <= sample.num_captured <= WINDOW_TOKENS
            assert 1 <= sample.num_context <= CONTEXT_TOKENS
            first, run = sample.first_position, list(sample.token_ids)
            whole = next(s for s in self.sequences().values() if s[first : first + len(run)] == run)
            # The last captured token is drawn behind the one in front of it.
            begin = first + sample.num_context - 1
            logits_NV = transformers_logits(target, whole)[begin : begin + sample.num_captured]
            check_distributions(sample, logits_NV.softmax(dim=-1).numpy())


def check_distributions(sample: Sample, probs_NV: np.ndarray) -> None:
    ids_NK, named_NK, tail_N = arrays(sample)
    expected_NK = np.take_along_axis(probs_NV, ids_NK.astype(np.int64), axis=1)
    assert np.abs(named_NK - expected_NK).max() < 1e-3
    best_NK = -np.sort(-probs_NV, axis=1)[:, : sample.top]
    assert np.abs(named_NK - best_NK).max() < 1e-3
    assert all(len(set(row)) == sample.top for row in ids_NK.tolist())
    assert np.abs(tail_N - (1 - best_NK.sum(axis=1))).max() < 1e-3


def arrays(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (sample.num_captured, sample.top)
    return (
        np.frombuffer(sample.top_ids, "<i4").reshape(shape),
        np.frombuffer(sample.top_probs, "<f2").astype(np.float64).reshape(shape),
        np.frombuffer(sample.tail_mass, "<f2").astype(np.float64),
    )


def origins(samples: Sequence[Sample]) -> set[int]:
    return {origin for sample in samples for origin in sample.origins}


def test_without_a_speculator_distributions_are_the_targets(target: Path) -> None:
    specs = [request("long", length=250, max_tokens=150), request("n", n=2), request("b")]
    ran = Ran(engine_for(target, max_num_seqs=4), specs)
    ran.check(target)
    assert origins(ran.samples) == {TokenOrigin.UNDRAFTED}
    assert {sample.draft_version for sample in ran.samples} == {""}
    assert {(s.domain, s.tenant, s.top) for s in ran.samples} == {("d", tenant_digest(b""), TOP)}
    assert {round(s.temperature, 3) for s in ran.samples} == {0.7}
    assert any(s.num_captured == WINDOW_TOKENS for s in ran.samples)
    assert any(s.num_context == CONTEXT_TOKENS for s in ran.samples)
    assert ran.capture_s > 0


UNDRAFTED, ACCEPTED, CORRECTED, BONUS = TokenOrigin


@pytest.mark.parametrize(
    ("mode", "draft_is_target", "verifier", "wanted"),
    [
        ("trie+recycling", False, "coupled", {ACCEPTED, BONUS}),
        ("model", False, "coupled", {CORRECTED}),
        ("model", True, "coupled", {ACCEPTED, BONUS}),
        ("AUTO", False, "coupled", set()),
        ("model", True, "rejection", {ACCEPTED, BONUS}),
        ("trie+model", False, "rejection", {ACCEPTED, CORRECTED}),
    ],
)
def test_with_drafts_distributions_are_the_targets(
    target: Path,
    draft: Path,
    mode: str,
    draft_is_target: bool,
    verifier: str,
    wanted: set[TokenOrigin],
) -> None:
    engine = engine_for(
        target,
        drafters=("trie", "recycling", "model", "trie+recycling", "trie+model"),
        draft=str(target if draft_is_target else draft),
        draft_nodes=4,
        draft_depth=3,
        draft_builder="rsd-s",
        verifier=verifier,
    )
    is_free = verifier == "rejection"
    specs = [
        request("a", max_tokens=48, speculation=mode, is_seed_drawn=is_free),
        replace(request("g", max_tokens=48, speculation=mode), sampling=GREEDY),
        request("n", n=2, speculation=mode, is_seed_drawn=is_free),
        request("off", speculation="OFF"),
    ]
    # What was generated before is what a trie drafts.
    unseen = Ran(engine, [replace(s, allow_training=False) for s in specs])
    assert not unseen.samples
    ran = Ran(engine, specs)
    ran.check(target)
    assert wanted <= origins(ran.samples)
    for sample in ran.samples:
        is_drafted = origins([sample]) != {UNDRAFTED}
        if mode != "AUTO":
            assert bool(sample.draft_version) == (is_drafted and "model" in mode)
        assert not (is_drafted and ran.sources(sample) == ["off"])


def test_origins_agree_with_what_clients_are_told(target: Path) -> None:
    """One sequence, whose single window covers its whole output."""
    spec = replace(request("told", max_tokens=48, speculation="trie"), sampling=GREEDY)
    engine = engine_for(target, drafters=("trie",), max_num_seqs=1)
    # The trie knows the answer from the first time, and the first window costs nothing.
    Ran(engine, [replace(spec, request_id="first", allow_training=False)])
    ran = Ran(engine, [replace(spec, request_id="second")])
    (sample,) = ran.samples
    assert sample.num_captured == 48
    chunks = [chunk for event in ran.outputs["second"] for chunk in event.chunks]
    expected: list[int] = []
    for chunk in chunks:
        expected += [TokenOrigin.ACCEPTED] * chunk.accepted_tokens
        if chunk.accepted_tokens < len(chunk.token_ids):
            is_refused = chunk.accepted_tokens < chunk.drafted_tokens
            last = TokenOrigin.CORRECTED if is_refused else TokenOrigin.BONUS
            expected.append(last if chunk.drafted_tokens else TokenOrigin.UNDRAFTED)
    # A trie's drafts may branch: then what is left unaccepted need not hang under the last node.
    told = [o if o != TokenOrigin.BONUS else TokenOrigin.CORRECTED for o in sample.origins]
    assert told == [o if o != TokenOrigin.BONUS else TokenOrigin.CORRECTED for o in expected]
    assert TokenOrigin.ACCEPTED in sample.origins


def test_windows_survive_preemption(target: Path) -> None:
    engine = engine_for(target, num_kv_blocks=12, max_num_seqs=4)
    ran = Ran(engine, [request(name, max_tokens=70) for name in ("a", "b", "c", "d")])
    assert engine.load().num_preemptions > 0
    ran.check(target)


def test_resumed_outputs_are_context_or_captured(target: Path) -> None:
    engine = engine_for(target)
    spec = request("again", max_tokens=60)
    whole = Ran(engine, [spec])
    output = tokens_of(whole.outputs["again"])
    engine.submit(replace(spec, request_id="more"), resumed={0: tuple(output[:20])})
    ran = Ran(engine, [])
    ran.specs = [spec]
    ran.outputs["again"] = whole.outputs["again"]
    ran.check(target)


def test_what_is_emitted_is_the_same_with_and_without(target: Path) -> None:
    specs = [request(name, max_tokens=50, speculation="trie") for name in "abcd"]
    drafters = ("trie", "recycling")
    plain = Ran(engine_for(target, capture_share=0.0, drafters=drafters), specs)
    captured = Ran(engine_for(target, drafters=drafters), specs)
    assert plain.sequences() == captured.sequences()
    assert captured.samples
    assert not plain.samples


def test_none_of_an_opted_out_requests_tokens_is_in_a_sample(target: Path) -> None:
    def runs(tokens: Sequence[int]) -> set[tuple[int, ...]]:
        return set(zip(*[islice(tokens, i, None) for i in range(4)], strict=False))

    hot = SamplingParams(temperature=1.0, seed=3)
    specs = [
        replace(
            request(f"{i}", length=70, max_tokens=60, n=1 + i % 2, allow_training=i % 3 == 0),
            sampling=replace(hot, seed=i),
        )
        for i in range(12)
    ]
    ran = Ran(engine_for(target, drafters=("trie", "recycling")), specs)
    ran.check(target)
    private = {spec.request_id for spec in specs if not spec.allow_training}
    secret = {
        run
        for (id_, _), tokens in ran.sequences().items()
        if id_ in private
        for run in runs(tokens)
    }
    assert len(secret) > 500
    for sample in ran.samples:
        assert not secret & runs(sample.token_ids)
        assert set(ran.sources(sample)).isdisjoint(private)


def test_a_cancelled_sequence_leaves_what_it_had(target: Path) -> None:
    engine = engine_for(target)
    ran = Ran(engine, [])
    for name, num_tokens in (("enough", MIN_TOKENS), ("short", MIN_TOKENS - 1)):
        engine.submit(request(name))
        while sum(len(tokens_of(e)) for e in ran.outputs.values()) < num_tokens:
            ran.book(engine.step())
        engine.cancel(name)
        assert engine.has_work
        while engine.has_work:
            ran.book(engine.step())
        assert [s.num_captured for s in ran.samples] == [MIN_TOKENS]
        ran.outputs.clear()


def test_prompts_alone_and_prefill_bring_nothing(target: Path) -> None:
    engine = engine_for(target)
    engine.submit(request("prefill"), is_prefill_only=True)
    ran = Ran(engine, [request("one", max_tokens=1), request("few", max_tokens=MIN_TOKENS - 1)])
    assert not ran.samples


def test_hidden_states_are_those_behind_the_tokens(target: Path) -> None:
    ran = Ran(engine_for(target, capture_hidden=True), [request("h", max_tokens=20)])
    (sample,) = ran.samples
    hidden_NE = np.frombuffer(sample.hidden, "<f2").astype(np.float64).reshape(20, HIDDEN)
    with torch.inference_mode():
        whole = torch.tensor([list(sample.token_ids)])
        states = transformers_model(target)(whole, output_hidden_states=True).hidden_states
    begin = sample.num_context - 1
    expected_NE = states[-1][0, begin : begin + 20].numpy()
    assert np.abs(hidden_NE - expected_NE).max() < 1e-2 * np.abs(expected_NE).max()


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_whole_vocabulary_may_be_named(
    monkeypatch: pytest.MonkeyPatch, has_kernels: bool
) -> None:
    if not has_kernels:
        monkeypatch.setattr(recording, "has_cpp_kernels", lambda: False)
    found = recording.name_likeliest(torch.randn(3, 40), [2, 0], 40)
    ids_PK = np.frombuffer(found.ids_PK, "<i4").reshape(2, 40)
    assert [sorted(row) for row in ids_PK.tolist()] == [list(range(40))] * 2


@pytest.mark.parametrize("has_kernels", [True, False])
def test_likeliest_is_softmax(monkeypatch: pytest.MonkeyPatch, has_kernels: bool) -> None:
    if not has_kernels:
        monkeypatch.setattr(recording, "has_cpp_kernels", lambda: False)
    logits_MV = torch.randn(6, VOCAB) * 4
    logits_MV[1, 5:] = float("-inf")
    places = [5, 1, 0, 3, 4]
    found = recording.name_likeliest(logits_MV, places, 8)
    best = logits_MV[places].double().softmax(dim=-1).topk(8, dim=-1)
    probs_PK = np.frombuffer(found.probs_PK, "<f2").reshape(5, 8)
    tail_P = np.frombuffer(found.tail_P, "<f2")
    assert np.abs(probs_PK - best.values.numpy()).max() < 1e-3
    assert np.abs(tail_P - (1 - best.values.sum(dim=-1).numpy())).max() < 1e-3
    finite = [0, 2, 3, 4]
    ids_PK = np.frombuffer(found.ids_PK, "<i4").reshape(5, 8)
    assert (ids_PK[finite] == best.indices.numpy()[finite]).all()
