"""What goes wrong in a step ends the requests of that step, or of one row, and nothing else."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from paceline.domain.errors import InternalError
from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.events import EngineEvent, FailedEvent, LookupEvent, OutputEvent, SavedEvent
from paceline.engine.options import EngineOptions
from paceline.engine.step import StepPlan
from tests.checkpoints import random_checkpoint
from tests.unit.engine.fake_runner import FakeRunner, expected_tokens, fake_engine, prompt_of
from tests.unit.engine.memory_arena import MemoryArena, tokens_of


def spec_of(name: str, length: int = 10, **fields: object) -> GenerationSpec:
    prompt = prompt_of(name, length)
    defaults: dict[str, object] = {"max_tokens": 8, "ignore_eos": True}
    return GenerationSpec(name, prompt, **{**defaults, **fields})  # type: ignore[arg-type]


def run(engine: Engine) -> tuple[dict[str, list[OutputEvent]], dict[str, list[str]]]:
    """Run to the end; return outputs and the reasons of failures."""
    outputs: dict[str, list[OutputEvent]] = {}
    failures: dict[str, list[str]] = {}
    for _ in range(10_000):
        events: list[EngineEvent] = engine.step()
        assert engine.check_integrity() == []
        for event in events:
            if isinstance(event, OutputEvent):
                outputs.setdefault(event.request_id, []).append(event)
            elif isinstance(event, FailedEvent):
                failures.setdefault(event.request_id, []).append(event.reason)
        if not events and engine.num_requests == 0:
            return outputs, failures
    raise AssertionError("the engine did not come to rest")


def fail_at(runner: FakeRunner, step: int, error: Exception) -> None:
    def on_run(plan: StepPlan) -> frozenset[int]:
        if len(runner.plans) == step:
            raise error
        return frozenset()

    runner.on_run = on_run


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124]"), "step-failed"),
        (MemoryError(), "step-failed"),
        (IndexError("index out of range"), "step-failed"),
        (InternalError("no", reason="engine-bug"), "engine-bug"),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_failing_step_ends_only_the_requests_in_it(
    error: Exception, reason: str, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine, runner = fake_engine(num_pages=16, max_num_seqs=2)
    specs = [spec_of(f"r{i}") for i in range(4)]
    fail_at(runner, step, error)
    for spec in specs:
        engine.submit(spec)
    with caplog.at_level(logging.ERROR):
        outputs, failures = run(engine)
    in_step = {row.sequence_id for row in runner.plans[step - 1].rows}
    assert failures == {f"r{i - 1}": [reason] for i in in_step}
    for spec in specs:
        if spec.request_id not in failures:
            assert tokens_of(outputs[spec.request_id]) == expected_tokens(spec, 0, context=64)
    assert engine.load().free_blocks == 16
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_a_runner_that_always_fails_ends_every_request_with_a_reason() -> None:
    engine, runner = fake_engine(num_pages=16)

    def on_run(plan: StepPlan) -> frozenset[int]:
        raise RuntimeError("broken")

    runner.on_run = on_run
    for i in range(20):
        engine.submit(spec_of(f"r{i}", n=1 + i % 3), is_prefill_only=i % 4 == 0)
    _, failures = run(engine)
    assert failures == {f"r{i}": ["step-failed"] for i in range(20)}
    assert engine.load().free_blocks == 16


def test_a_fork_whose_first_step_fails_leaves_no_sibling_behind() -> None:
    """Copies of a failed step may not have happened: whoever waited for one fails too."""
    for chunk_tokens in (1, 64):
        engine, runner = fake_engine(chunk_tokens=chunk_tokens, max_num_seqs=3)
        spec = spec_of("r", length=7, n=5)
        fail_at(
            runner, step=len(spec.prompt_token_ids) if chunk_tokens == 1 else 2, error=OSError()
        )
        engine.submit(spec)
        _, failures = run(engine)
        assert failures == {"r": ["step-failed"]}
        assert engine.load().free_blocks == 32


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_a_row_with_nan_fails_alone(step: int) -> None:
    engine, runner = fake_engine(num_pages=64, chunk_tokens=24)
    runner.on_run = lambda plan: frozenset([1] if len(runner.plans) == step else [])
    specs = [spec_of(name, length=22, n=n) for name, n in [("a", 1), ("b", 2), ("c", 1)]]
    for spec in specs:
        engine.submit(spec)
    outputs, failures = run(engine)
    assert list(failures.values()) == [["nan-logits"]]
    for spec in specs:
        if spec.request_id not in failures:
            for index in range(spec.n):
                output = tokens_of(outputs[spec.request_id], index)
                assert output == expected_tokens(spec, index, context=256)
    assert engine.load().free_blocks == 64


def test_what_a_failed_row_computed_is_not_cached() -> None:
    engine, runner = fake_engine(num_pages=16, chunk_tokens=4)
    runner.on_run = lambda plan: frozenset([0] if len(runner.plans) == 2 else [])
    engine.submit(spec_of("r", length=12))
    assert run(engine)[1] == {"r": ["nan-logits"]}
    engine.submit(spec_of("r", length=12))
    outputs, failures = run(engine)
    assert not failures
    assert outputs["r"][0].local_hit_tokens == 4
    assert tokens_of(outputs["r"]) == expected_tokens(spec_of("r", length=12), 0, context=64)


def _poisoned(directory: Path, token: int) -> Path:
    """Make a token's embedding NaN in a checkpoint."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def test_nan_in_a_chunk_is_found_before_anybody_can_reuse_it(tmp_path: Path) -> None:
    """Also where nothing is drawn yet: the chunk's blocks are neither cached nor saved."""
    directory = _poisoned(random_checkpoint("qwen2", tmp_path / "qwen2"), 1234)
    options = EngineOptions(model=str(directory), num_kv_blocks=64, chunk_tokens=32)
    engine, card = build_engine(options)
    arena = MemoryArena(64, card.block_bytes)
    engine.attach_arena(arena)
    engine.grant_slots([arena.free.pop() for _ in range(64)])
    spec = GenerationSpec("bad", (*range(40), 1234, *range(100)), max_tokens=4)
    engine.submit(spec, is_prefill_only=True)
    (lookup,) = engine.step()
    assert isinstance(lookup, LookupEvent)
    engine.answer_lookup(lookup.lookup_id, ())
    events = [*engine.step(), *engine.step(), *engine.step()]
    assert [e.reason for e in events if isinstance(e, FailedEvent)] == ["nan-logits"]
    # Two blocks of the first chunk are sound; nothing of the second is found by anybody.
    saved = [b.key for e in events if isinstance(e, SavedEvent) for b in e.blocks]
    assert len(saved) == 2
    assert engine.load().num_steps == 2
    assert engine.load().free_blocks == 64


def test_one_poisoned_token_of_a_real_model_fails_one_request(tmp_path: Path) -> None:
    poisoned = 1234
    sound = random_checkpoint("qwen2", tmp_path / "sound")
    directory = _poisoned(shutil.copytree(sound, tmp_path / "poisoned"), poisoned)
    engine, _ = build_engine(EngineOptions(model=str(directory), num_kv_blocks=64))
    greedy = SamplingParams(temperature=0.0)
    prompts = {f"r{i}": tuple(range(10 + i, 50 + i)) for i in range(4)}
    prompts["bad"] = (*range(20), poisoned, *range(20))
    for name, prompt in prompts.items():
        engine.submit(GenerationSpec(name, prompt, sampling=greedy, max_tokens=6, ignore_eos=True))
    outputs, failures = run(engine)
    assert failures == {"bad": ["nan-logits"]}
    # The pages of the failed request hold NaN and belong to somebody else now.
    fresh, _ = build_engine(EngineOptions(model=str(sound), num_kv_blocks=64))
    for round_ in range(3):
        for e in (engine, fresh):
            for i in range(8):
                prompt = tuple((37 * j + i + 100 * round_) % 4096 for j in range(5 + 9 * i))
                e.submit(
                    GenerationSpec(str(i), prompt, sampling=greedy, max_tokens=6, ignore_eos=True)
                )
        again, expected = run(engine), run(fresh)
        assert not again[1]
        for i in range(8):
            assert tokens_of(again[0][str(i)]) == tokens_of(expected[0][str(i)])
    for i in range(4):
        assert len(tokens_of(outputs[f"r{i}"])) == 6
