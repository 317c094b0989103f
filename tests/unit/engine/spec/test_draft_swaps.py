"""Draft models change under a running engine: outputs, books and prefix hits stay what they are."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.domain.cost import StepCost
from paceline.domain.drafts import DraftState, HeldDraft, StagedDraft
from paceline.domain.learnings import SequenceOutcome
from paceline.domain.request import GenerationSpec, SamplingParams, TokenChunk
from paceline.engine import build
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.events import (
    DraftsEvent,
    EngineEvent,
    FailedEvent,
    LearningsEvent,
    OutputEvent,
)
from paceline.engine.options import EngineOptions
from paceline.engine.spec.report import SpeculationReport
from paceline.engine.spec.speculator import Speculator
from paceline.engine.spec.step_times import StepTimes
from tests.checkpoints import random_checkpoint
from tests.unit.engine.spec.simulated import MEMORY_BOUND

GREEDY = SamplingParams(temperature=0.0)
STALL_S = 0.002
"""A swap may keep a step waiting so long, on a machine with nothing else to do."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target and drafts for it: nearly itself, noise, and noise of another shape."""
    root = tmp_path_factory.mktemp("swaps")
    # Some tokens are likely, so that a model says something of its own.
    made = {
        "target": random_checkpoint("llama", root / "target", initializer_range=1.0),
        "noise": random_checkpoint("llama", root / "noise", seed=5, initializer_range=1.0),
        "deeper": random_checkpoint("llama", root / "deeper", seed=6, num_hidden_layers=4),
    }
    made["near"] = changed(made["target"], root / "near", lambda name, tensor: 1.001 * tensor)
    return made


def changed(
    directory: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Path:
    """Copy a checkpoint with other weights."""
    shutil.copytree(directory, out)
    tensors = load_file(out / "model.safetensors")
    tensors = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps count as slow ones, so that drafting pays whatever this machine is like."""
    monkeypatch.setattr(build, "_step_cost", lambda *args: MEMORY_BOUND)


def engine_for(target: Path, **options: Any) -> Engine:
    usual = dict(num_kv_blocks=128, chunk_tokens=64, draft_nodes=6, draft_depth=4)
    return build_engine(EngineOptions(model=str(target), **{**usual, **options}))[0]


def staged(
    directory: Path, version: str, share: float = 1.0, drafter: str = "model"
) -> StagedDraft:
    return StagedDraft(drafter, version, str(directory), share)


def prompt(seed: int, length: int = 24, low: int = 4, high: int = 60) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(low, high) for _ in range(length))


def specs(mode: str = "AUTO") -> list[GenerationSpec]:
    """Greedy and sampled requests, some with log-probabilities, some with two outputs."""
    kinds = [
        GREEDY,
        SamplingParams(temperature=0.8, top_k=8),
        SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2),
    ]
    return [
        GenerationSpec(
            request_id=str(i),
            prompt_token_ids=prompt(i, 8 + 3 * i),
            sampling=replace(kinds[i % 3], seed=i),
            max_tokens=24 + 2 * i,
            ignore_eos=True,
            logprobs=2 if i % 2 else 0,
            n=2 if i == 4 else 1,
            speculation=mode,
        )
        for i in range(12)
    ]


class Host:
    """Runs an engine and keeps what it tells."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.states: list[DraftState] = []
        self.chunks: dict[str, list[TokenChunk]] = {}
        self.ended: set[str] = set()
        self.hits: dict[str, int] = {}
        self.outcomes: list[SequenceOutcome] = []

    def step(self) -> None:
        for event in self.engine.step():
            self._note(event)

    def until(self, is_done: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline_s = time.monotonic() + seconds
        while not is_done():
            assert time.monotonic() < deadline_s, "nothing more happens"
            self.step()

    def change(self, *drafts: StagedDraft) -> DraftState:
        """Change the drafts and go on until that is done."""
        num_before = len(self.states)
        self.engine.change_drafts(drafts)
        self.until(lambda: len(self.states) > num_before)
        return self.states[-1]

    def finish(self) -> None:
        self.until(lambda: self.engine.num_requests == 0)
        assert self.engine.check_integrity() == []

    def output(self, request_id: str) -> list[tuple[int, tuple[int, ...], tuple[Any, ...]]]:
        """Tokens and log-probabilities by output."""
        chunks = self.chunks[request_id]
        return [
            (
                index,
                tuple(t for c in chunks if c.index == index for t in c.token_ids),
                tuple(p for c in chunks if c.index == index for p in c.logprobs),
            )
            for index in sorted({c.index for c in chunks})
        ]

    @property
    def report(self) -> SpeculationReport:
        return speculator_of(self.engine).report()

    def _note(self, event: EngineEvent) -> None:
        match event:
            case DraftsEvent():
                self.states.append(event.state)
            case OutputEvent():
                self.chunks.setdefault(event.request_id, []).extend(event.chunks)
                self.hits[event.request_id] = (
                    self.hits.get(event.request_id, 0) + event.local_hit_tokens
                )
                if event.is_finished:
                    self.ended.add(event.request_id)
            case LearningsEvent():
                self.outcomes += event.outcomes
            case FailedEvent():
                raise AssertionError(f"{event.request_id}: {event.message}")


def speculator_of(engine: Engine) -> Speculator:
    assert engine._speculator is not None
    return engine._speculator


def held_pages(engine: Engine) -> int:
    """Pages of draft KV that sequences hold."""
    models = [d for n, d in speculator_of(engine).drafters.items() if n.startswith("model")]
    return sum(drafter.state_entries for drafter in models)


@pytest.fixture(scope="module")
def plain(checkpoints: dict[str, Path]) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_step_cost", lambda *args: MEMORY_BOUND)
        host = Host(engine_for(checkpoints["target"], drafters=()))
    for spec in specs("OFF"):
        host.engine.submit(spec)
    host.finish()
    return [host.output(spec.request_id) for spec in specs()]


@pytest.mark.parametrize(
    ("concurrency", "num_blocks", "num_swaps"), [(1, 8, 8), (4, 14, 17), (12, 30, 25)]
)
def test_fifty_swaps_under_load_change_no_output(
    checkpoints: dict[str, Path],
    plain: list[Any],
    concurrency: int,
    num_blocks: int,
    num_swaps: int,
) -> None:
    target, noise = checkpoints["target"], checkpoints["noise"]
    host = Host(
        engine_for(target, draft=str(noise), num_kv_blocks=num_blocks, max_num_seqs=concurrency)
    )
    engine, rng = host.engine, random.Random(concurrency)
    wanted = itertools.cycle([(target, "v1"), (noise, "v2"), (checkpoints["deeper"], "v3")])
    modes = itertools.cycle(["model", "AUTO", "trie+recycling+model"])
    number, cancelled = 0, set()
    swaps_in_flight = 0
    while len(host.states) < num_swaps or engine.num_requests:
        if len(host.states) < num_swaps:
            while engine.num_requests < 2 * concurrency:
                spec = specs(next(modes))[number % 12]
                engine.submit(replace(spec, request_id=f"r{number}"))
                number += 1
        num_running, num_states = engine.load().num_running, len(host.states)
        if engine._bank is not None and not engine._bank.is_loading and num_states < num_swaps:
            engine.change_drafts((staged(*next(wanted)),))
        if number % 7 == 3 and f"r{number - 2}" not in host.ended and rng.random() < 0.3:
            cancelled.add(f"r{number - 2}")
            engine.cancel(f"r{number - 2}")
        host.step()
        swaps_in_flight += len(host.states) > num_states and num_running > 0
    assert engine.check_integrity() == []
    assert held_pages(engine) == 0
    assert [state.error for state in host.states] == [""] * num_swaps
    assert host.states[-1].num_swaps == num_swaps
    # How many meet a running request is a matter of the machine's pace.
    assert swaps_in_flight >= num_swaps // 2
    assert host.states[-1].max_swap_stall_s < 10 * STALL_S, "of a machine that others use too"
    if concurrency > 1:
        assert engine.load().num_preemptions > 0
    for i in range(number):
        if f"r{i}" not in cancelled:
            assert host.output(f"r{i}") == plain[i % 12], f"r{i}"
    drafted = {c.draft_version for chunks in host.chunks.values() for c in chunks}
    assert "v1" in drafted


def test_prefix_blocks_outlive_a_swap(checkpoints: dict[str, Path]) -> None:
    host = Host(engine_for(checkpoints["target"], draft=str(checkpoints["noise"])))
    spec = GenerationSpec("first", prompt(1, 80), GREEDY, max_tokens=8)
    for name in ("first", "before"):
        host.engine.submit(replace(spec, request_id=name))
        host.finish()
    host.change(staged(checkpoints["target"], "v1"))
    host.engine.submit(replace(spec, request_id="after"))
    host.finish()
    assert host.hits["first"] == 0
    assert host.hits["before"] == host.hits["after"] == 64


def test_noise_in_place_of_a_good_draft_costs_nothing_but_steps(
    checkpoints: dict[str, Path],
) -> None:
    host = Host(engine_for(checkpoints["target"], draft=str(checkpoints["target"])))
    spec = GenerationSpec(
        "good", prompt(2), GREEDY, max_tokens=60, ignore_eos=True, speculation="model"
    )
    outputs, steps = [], []
    for name, directory in (("good", None), ("noise", "noise"), ("again", "target")):
        if directory is not None:
            host.change(staged(checkpoints[directory], name))
        before = host.engine.load().num_steps
        host.engine.submit(replace(spec, request_id=name))
        host.finish()
        outputs.append(host.output(name)[0][1])
        steps.append(host.engine.load().num_steps - before)
    assert outputs[0] == outputs[1] == outputs[2]
    assert steps[0] < 0.5 * steps[1] > 0.7 * steps[2]


def test_a_swap_amid_a_sequence_reaches_its_next_round(checkpoints: dict[str, Path]) -> None:
    host = Host(engine_for(checkpoints["target"]))
    host.change(staged(checkpoints["near"], "v1"))
    spec = GenerationSpec(
        "r", prompt(3), GREEDY, max_tokens=600, ignore_eos=True, speculation="model"
    )
    host.engine.submit(spec)
    host.until(lambda: any(c.draft_version for c in host.chunks.get("r", ())))
    host.change(staged(checkpoints["target"], "v2"))
    host.finish()
    versions = [c.draft_version for c in host.chunks["r"] if c.drafted_tokens]
    assert versions == sorted(versions), "no way back"
    outcomes = {o.draft_version: o for o in host.outcomes}
    assert outcomes.keys() == set(versions) == {"v1", "v2"}
    for outcome in outcomes.values():
        assert outcome.num_accepted > 0.5 * outcome.num_tried, "old KV serves the new weights"


def broken(checkpoints: dict[str, Path], kind: str, directory: Path) -> tuple[StagedDraft, ...]:
    noise = checkpoints["noise"]
    match kind:
        case "missing":
            return (staged(directory / "nowhere", "v"),)
        case "no-weights":
            shutil.copytree(noise, directory / "d")
            (directory / "d" / "model.safetensors").unlink()
            return (staged(directory / "d", "v"),)
        case "damaged":
            shutil.copytree(noise, directory / "d")
            (directory / "d" / "model.safetensors").write_bytes(b"\0" * 64)
            return (staged(directory / "d", "v"),)
        case "not-finite":
            directory.mkdir()
            nan = {"model.norm.weight": float("nan")}
            changed(noise, directory / "d", lambda name, tensor: tensor * nan.get(name, 1.0))
            return (staged(directory / "d", "v"),)
        case "other-vocabulary":
            random_checkpoint("llama", directory / "d", vocab_size=512)
            return (staged(directory / "d", "v"),)
        case "second-of-two":
            return (staged(noise, "good"), staged(directory / "no", "v", drafter="model:code"))
        case "shares":
            return (staged(noise, "a", 0.5), staged(noise, "b", 0.4))
        case "negative-share":
            return (staged(noise, "a", 1.5), staged(noise, "b", -0.5))
        case "nan-share":
            return (staged(noise, "a", float("nan")),)
        case "twice":
            return (staged(noise, "a", 0.5), staged(noise, "a", 0.5))
        case "other-name":
            return (staged(noise, "a", drafter="trie"),)
        case "union-name":
            return (staged(noise, "a", drafter="model:a+b"),)
        case _:
            return tuple(staged(noise, "a", drafter=f"model:{i}") for i in range(9))


KINDS = {
    "missing": "config.json",
    "no-weights": "model.safetensors is missing",
    "damaged": "model.safetensors",
    "not-finite": "model.norm.weight",
    "other-vocabulary": "vocab_size",
    "second-of-two": "config.json",
    "shares": "sum of 1",
    "negative-share": "shares",
    "nan-share": "shares",
    "twice": "versions",
    "other-name": "drafter 'trie'",
    "union-name": "drafter 'model:a[+]b'",
    "too-many": "at most 8",
}


def test_what_cannot_be_loaded_leaves_what_is_in_use(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    host = Host(engine_for(checkpoints["target"], draft=str(checkpoints["noise"])))
    kept = host.change(staged(checkpoints["target"], "kept"))
    assert kept.held == (HeldDraft("model", "kept"),)
    for kind, message in KINDS.items():
        state = host.change(*broken(checkpoints, kind, tmp_path / kind))
        assert (state.held, state.num_swaps) == (kept.held, 1), kind
        assert re.search(message, state.error), (kind, state.error)
    assert host.change(staged(checkpoints["noise"], "next")).error == ""


def test_an_engine_without_models_refuses(checkpoints: dict[str, Path]) -> None:
    for drafters in ((), ("trie",)):
        host = Host(engine_for(checkpoints["target"], drafters=drafters))
        assert "does not draft" in host.change(staged(checkpoints["noise"], "v")).error


def test_a_newer_change_replaces_one_that_loads(checkpoints: dict[str, Path]) -> None:
    host = Host(engine_for(checkpoints["target"]))
    for version in ("v1", "v2", "v3"):
        host.engine.change_drafts((staged(checkpoints["noise"], version),))
    host.until(lambda: bool(host.states))
    assert host.states == [replace(host.states[0], held=(HeldDraft("model", "v3"),))]
    assert host.states[0].num_swaps == 1


def test_models_come_and_go(checkpoints: dict[str, Path], plain: list[Any]) -> None:
    host = Host(engine_for(checkpoints["target"], num_kv_blocks=400))
    speculator = speculator_of(host.engine)
    looked_up = ("trie", "recycling", "trie+recycling")
    assert speculator.arms == looked_up and speculator.version == ""
    for spec in specs("model"):
        host.engine.submit(replace(spec, max_tokens=400))
    host.until(lambda: len(host.chunks) >= 6)
    host.change(
        staged(checkpoints["target"], "v1"),
        staged(checkpoints["noise"], "c1", drafter="model:code"),
    )
    assert set(speculator.arms) == {
        *looked_up,
        "model",
        "trie+model",
        "trie+recycling+model",
        "model:code",
        "trie+recycling+model:code",
    }
    assert speculator.version == "v1+c1"
    host.until(lambda: any(c.draft_version == "v1" for cs in host.chunks.values() for c in cs))
    assert held_pages(host.engine) > 0
    state = host.change()
    assert state.held == () and speculator.arms == looked_up
    host.finish()
    # As far as the reference goes.
    for spec, expected in zip(specs(), plain, strict=True):
        for (_, tokens, _), (_, first, _) in zip(
            host.output(spec.request_id), expected, strict=True
        ):
            assert tokens[: len(first)] == first


def test_an_idle_engine_changes_its_drafts_soon(checkpoints: dict[str, Path]) -> None:
    host = Host(engine_for(checkpoints["target"]))
    assert not host.engine.has_work and host.engine.next_deadline_s() is None
    host.engine.change_drafts((staged(checkpoints["noise"], "v1"),))
    while not host.engine.has_work:
        deadline_s = host.engine.next_deadline_s()
        assert deadline_s is not None and deadline_s < time.monotonic() + 0.02
        time.sleep(0.002)
    host.step()
    assert host.states[0].held == (HeldDraft("model", "v1"),)
    assert not host.engine.has_work and host.engine.next_deadline_s() is None


def test_counts_and_outcomes_tell_versions_apart(checkpoints: dict[str, Path]) -> None:
    host = Host(engine_for(checkpoints["target"], max_num_seqs=16, num_kv_blocks=200))
    host.change(
        staged(checkpoints["target"], "good", 0.7), staged(checkpoints["noise"], "bad", 0.3)
    )
    for i in range(24):
        host.engine.submit(
            GenerationSpec(
                str(i),
                prompt(i),
                GREEDY,
                max_tokens=10,
                ignore_eos=True,
                speculation="model",
                cache_salt=b"ab"[i % 2 : i % 2 + 1],
                domain="even" if i % 2 else "odd",
            )
        )
    host.finish()
    outcomes = host.outcomes
    assert len(outcomes) == 24, "a sequence keeps its version"
    assert len({(o.tenant, o.domain) for o in outcomes}) == 2
    assert {len(o.tenant) for o in outcomes} == {8}
    reports = {r.version: r for r in host.report.drafters if r.name == "model"}
    assert reports.keys() == {"good", "bad"}
    for version, report in reports.items():
        own = [o for o in outcomes if o.draft_version == version]
        assert len(own) > 2
        assert sum(o.num_rounds for o in own) == report.rounds
        assert sum(o.num_accepted for o in own) == report.accepted
        assert sum(o.num_tried for o in own) == sum(report.tried_by_depth)
        assert sum(o.num_emitted for o in own) == report.emitted
    versions = {
        name: {c.draft_version for c in chunks if c.drafted_tokens}
        for name, chunks in host.chunks.items()
    }
    assert Counter(len(v) for v in versions.values()) == {1: 24}


def test_a_bank_routes_each_domain_to_the_model_that_knows_it(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Each of two models takes the tokens of the other's domain for others."""
    ranges = {"a": (100, 200), "b": (200, 300)}
    for name, other in (("a", "b"), ("b", "a")):
        low, high = ranges[other]

        def mixed(
            name: str, tensor: torch.Tensor, low: int = low, high: int = high
        ) -> torch.Tensor:
            if name == "model.embed_tokens.weight":
                tensor[low:high] = tensor[low:high].flip(0).flip(1)
            return tensor

        changed(checkpoints["target"], tmp_path / name, mixed)
    host = Host(engine_for(checkpoints["target"], drafters=("model",)))
    # Steps that are dear, so that drafting pays whatever this machine does meanwhile.
    speculator_of(host.engine)._controller._times = StepTimes(StepCost(0.05, 0.0, 1e-5, 0.0))
    host.change(*(staged(tmp_path / n, n, drafter=f"model:{n}") for n in ranges))
    used: dict[str, Counter[str]] = {name: Counter() for name in ranges}
    for i in range(60):
        for name, (low, high) in ranges.items():
            host.engine.submit(
                GenerationSpec(
                    f"{name}{i}",
                    prompt(i, 40, low, high),
                    GREEDY,
                    max_tokens=24,
                    ignore_eos=True,
                    domain=name,
                )
            )
        host.finish()
        if i >= 30:
            for name, counts in used.items():
                for chunk in host.chunks[f"{name}{i}"]:
                    counts[chunk.draft_version] += chunk.drafted_tokens
    for name, counts in used.items():
        assert counts[name] > 0.55 * counts.total() > 0, used
