"""Ways of learning are compared on the same stream, with the same number of tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.learnings import TokenOrigin
from paceline.trainer.checkpoint import load_draft, target_head
from paceline.trainer.compare import compare
from paceline.trainer.compare_options import CompareOptions, RecordOptions, from_json, to_json
from paceline.trainer.judging import judge
from paceline.trainer.recording import origins, record
from paceline.trainer.samples import text_of
from paceline.trainer.stream_file import read_stream, write_stream
from tests.unit.trainer.traffic import samples_of, small_draft


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return small_draft(target, tmp_path_factory.mktemp("drafts") / "draft")


def test_every_way_learns_as_much_and_is_judged_on_the_same(
    draft: Path, target: Path, tmp_path: Path
) -> None:
    samples = samples_of(target, 80, domain="a") + samples_of(target, 40, domain="b", seed=3)
    stream = tmp_path / "stream"
    assert write_stream(stream, samples) == 120
    options = CompareOptions(
        str(stream),
        str(draft),
        losses=("forward-kl", "total-variation"),
        positions=("all", "first-rejected"),
        learning_rates=(5e-3,),
        learned_ratio=8.0,
        is_quiet=True,
    )
    report = compare(options)
    ways = report["ways"]
    assert len(ways) == 4 and report["samples"] == 120
    tokens = [way["tokens"] for way in ways]
    assert max(tokens) - min(tokens) <= 512 and min(tokens) >= 8 * 120 * 32
    assert len({json.dumps(way["held_out_before"]) for way in ways}) == 1
    assert set(ways[0]["held_out_after"]["domains"]) == {"a", "b"}
    by_name = {(way["loss"], way["positions"]): way for way in ways}
    best = by_name["forward-kl", "all"]
    assert best["held_out_after"]["acceptance"] > best["held_out_before"]["acceptance"] + 0.05
    assert best["prequential_second_half"]["acceptance"] > best["prequential"]["acceptance"]
    assert best["prequential"]["positions"] == 120 * 24
    # Repeating it gives the same figures.
    assert compare(replace(options, losses=("forward-kl",), positions=("all",)))["ways"] == [best]
    # Before anything is learned, a sample counts as the draft is.
    first = CompareOptions(str(tmp_path / "one"), str(draft), is_quiet=True)
    write_stream(tmp_path / "one", samples[:1])
    model = load_draft(draft)
    judged = judge(model, text_of(samples[0], model.shape.vocab_size))
    found = compare(first)["ways"][0]["prequential"]["overlap"]
    assert found == pytest.approx(judged.overlap / 24, abs=1e-4)


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40),
    guesses=st.lists(st.integers(0, 1), min_size=40, max_size=40),
)
def test_origins_are_those_of_verified_chains(tokens: list[int], guesses: list[int]) -> None:
    found = origins(np.array(guesses[: len(tokens)]), np.array(tokens, np.int32)).tolist()
    # Round by round, as an engine does it: up to 4 accepted tokens, then one of the target's own.
    expected: list[int] = []
    while len(expected) < len(tokens):
        at, accepted = len(expected), 0
        while accepted < 4 and at + accepted < len(tokens):
            if guesses[at + accepted] != tokens[at + accepted]:
                break
            accepted += 1
        last = TokenOrigin.BONUS if accepted == 4 else TokenOrigin.CORRECTED
        expected += [TokenOrigin.ACCEPTED] * accepted + [last]
    assert found == expected[: len(tokens)]


def test_a_recorded_stream_holds_what_the_target_thought(
    draft: Path, target: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.json"
    lines = [{"token_ids": list(range(5 + i, 15 + 2 * i)), "domain": "ab"[i % 2]} for i in range(6)]
    prompts.write_text(json.dumps(lines))
    options = RecordOptions(
        str(target),
        str(draft),
        str(prompts),
        str(tmp_path / "stream"),
        temperatures=(0.0, 1.0),
        max_tokens=70,
        is_quiet=True,
    )
    command = [sys.executable, "-m", "paceline.trainer.compare", to_json(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    samples = list(read_stream(tmp_path / "stream"))
    assert report["samples"] == len(samples) >= 6
    assert report["tokens"] == sum(s.num_captured for s in samples)
    model = load_draft(target)
    texts = [text_of(s, model.shape.vocab_size) for s in samples]
    assert {t.domain for t in texts} == {"a", "b"} and {t.temperature for t in texts} == {0.0, 1.0}
    for text, sample in zip(texts, samples, strict=True):
        judged = judge(model, text)
        if sample.first_position == 0:
            # The target as its own draft sees what it saw, so it agrees with itself.
            assert judged.num_agreed == judged.num_positions
        assert sample.num_captured <= 64
    assert texts[0].domain == "a"


def test_a_damaged_stream_and_unknown_names_are_refused(
    draft: Path, target: Path, tmp_path: Path
) -> None:
    stream = tmp_path / "stream"
    write_stream(stream, samples_of(target, 2))
    options = CompareOptions(str(stream), str(draft), is_quiet=True)
    with pytest.raises(ValueError, match="no loss 'x'"):
        compare(replace(options, losses=("x",)))
    with pytest.raises(ValueError, match="no choice of positions 'y'"):
        compare(replace(options, positions=("y",)))
    stream.write_bytes(stream.read_bytes()[:-9])
    with pytest.raises(ValueError, match="sample 2"):
        compare(options)
    stream.write_bytes(b"")
    with pytest.raises(ValueError, match="no samples"):
        compare(options)


def test_options_travel_whole() -> None:
    for options in (
        RecordOptions("m", "d", "p", "o", temperatures=(0.5,)),
        CompareOptions("s", "d", losses=("a", "b"), minutes=2.0),
    ):
        assert from_json(to_json(options)) == options


def test_kinds_of_drafts_are_compared_for_the_same_time(
    draft: Path, target: Path, tmp_path: Path
) -> None:
    samples = samples_of(target, 60, temperature=0.0, domain="a", has_hidden=True)
    stream = tmp_path / "stream"
    write_stream(stream, [*samples, replace(samples[0], hidden=b"")])
    options = CompareOptions(
        str(stream),
        str(draft),
        drafters=("model", "medusa"),
        target=str(target),
        depth=3,
        learning_rates=(5e-3,),
        seconds=1.0,
        batch_tokens=256,
        is_quiet=True,
    )
    report = compare(options)
    model, medusa = report["ways"]
    assert [way["drafter"] for way in (model, medusa)] == ["model", "medusa"]
    for way in (model, medusa):
        assert 1.0 <= way["trained_s"] < 1.5
        before, after = way["held_out_before"]["chain"], way["held_out_after"]["chain"]
        assert before["roots"] == after["roots"] > 0
        assert len(after["acceptance_by_depth"]) == 3
        assert after["tokens_per_pass"] > before["tokens_per_pass"]
    assert model["held_out_after"]["chain"]["roots"] == medusa["held_out_after"]["chain"]["roots"]
    assert (model["left_out"], medusa["left_out"]) == (0, 1)
    assert medusa["parameters"] == 3 * (64 * 64 + 64)
    assert model["parameters"] == sum(p.numel() for p in load_draft(draft).parameters())
    best = max(report["ways"], key=lambda way: way["held_out_after"]["chain"]["tokens_per_pass"])
    assert report["best"] == best["name"]
    with pytest.raises(ValueError, match="no drafter 'eagle'; there are model, medusa"):
        compare(replace(options, drafters=("eagle",)))
    with pytest.raises(ValueError, match="name one of them"):
        compare(replace(options, minutes=1.0))
    write_stream(stream, samples_of(target, 2))
    with pytest.raises(ValueError, match="no sample has what medusa learns from"):
        compare(replace(options, drafters=("medusa",)))


def test_recorded_hidden_states_are_those_the_target_drew_from(
    draft: Path, target: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"token_ids": list(range(5, 15)), "domain": "a"}]))
    options = RecordOptions(
        str(target),
        str(draft),
        str(prompts),
        str(tmp_path / "stream"),
        temperatures=(0.0,),
        max_tokens=90,
        has_hidden=True,
        is_quiet=True,
    )
    report = record(options)
    samples = list(read_stream(tmp_path / "stream"))
    assert report["samples"] == len(samples) >= 1
    assert samples[0].num_captured == 64 and samples[0].num_context == 10
    plain = replace(options, has_hidden=False, out=str(tmp_path / "plain"))
    record(plain)
    head_VE = target_head(target)
    without = next(read_stream(tmp_path / "plain"))
    assert (samples[0].token_ids, samples[0].origins) == (without.token_ids, without.origins)
    for sample in samples:
        hidden_NE = torch.from_numpy(np.frombuffer(sample.hidden, "<f2").copy()).view(-1, 64)
        probs_NV = (hidden_NE.float() @ head_VE.t()).softmax(-1)
        top_NK = np.frombuffer(sample.top_probs, "<f2").reshape(sample.num_captured, -1)
        best_N = torch.from_numpy(top_NK[:, 0].astype(np.float32))
        torch.testing.assert_close(probs_NV.max(-1).values, best_N, rtol=0.02, atol=0.005)
        assert sample.domain == "a" and sample.temperature == 0.0
