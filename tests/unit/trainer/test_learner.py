"""The learner learns what the target says, in bounded time, and does not ruin its draft."""

from __future__ import annotations

import itertools
import logging
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paceline.domain.learnings import Sample
from paceline.engine.models.config import UnsupportedModelError
from paceline.trainer.checkpoint import load_draft
from paceline.trainer.judging import judge
from paceline.trainer.learner import OnlineLearner
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.micro_batches import Pace, cut
from paceline.trainer.samples import text_of
from paceline.trainer.state import load_states, resumed_learner, save_state
from tests.unit.trainer.learning import equal, feed, train, weights
from tests.unit.trainer.traffic import poisoned, samples_of, small_draft


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return small_draft(target, tmp_path_factory.mktemp("drafts") / "draft")


@pytest.fixture(scope="module")
def samples(target: Path) -> list[Sample]:
    return samples_of(target, 64, domain="a")


def learner(draft: Path, **changes: object) -> OnlineLearner:
    options = LearnerOptions(
        str(draft),
        learning_rate=5e-3,
        batch_tokens=512,
        micro_tokens=256,
        held_out_every=4,
        judges_first=False,
    )
    return OnlineLearner(replace(options, **changes))  # type: ignore[arg-type]


def acceptance(one: OnlineLearner) -> float:
    texts = [text for domain in one.replay.domains for text in one.replay.held_out(domain)]
    judged = [judge(one.model, text) for text in texts]
    return sum(j.overlap for j in judged) / sum(j.num_positions for j in judged)


@pytest.mark.parametrize("loss", ["forward-kl", "lk"])
def test_acceptance_on_held_out_samples_rises(
    loss: str, draft: Path, samples: list[Sample]
) -> None:
    one = learner(draft, loss=loss)
    feed(one, samples)
    before = acceptance(one)
    train(one, 60)
    assert acceptance(one) > before + 0.1
    assert one.counters.num_tokens >= 60 * 512
    assert one.counters.samples_by_domain == {"a": 64}


def test_accumulated_micro_steps_are_one_big_step(draft: Path, samples: list[Sample]) -> None:
    changed = []
    for micro_tokens in (32, 1024):
        one = learner(
            draft, micro_tokens=micro_tokens, batch_tokens=1024, recent_ratio=0.0, warm_up_steps=0
        )
        feed(one, samples)
        train(one, 1)
        changed.append(weights(one))
    for small, big in zip(*changed, strict=True):
        torch.testing.assert_close(small, big, rtol=1e-3, atol=1e-5)


def test_the_same_samples_and_seed_give_the_same_weights(
    draft: Path, samples: list[Sample]
) -> None:
    found = []
    for seed in (1, 1, 2):
        one = learner(draft, seed=seed)
        feed(one, samples)
        train(one, 5)
        found.append(weights(one))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_only_chosen_positions_are_learned(draft: Path, samples: list[Sample]) -> None:
    untouched = [replace(s, origins=b"\x01" * s.num_captured) for s in samples]
    one = learner(draft, positions="first-rejected")
    feed(one, untouched)
    assert not one.micro_step(time.monotonic() + 60)
    feed(one, samples)
    assert one.micro_step(time.monotonic() + 60)


def test_a_micro_step_keeps_to_its_time(draft: Path, samples: list[Sample]) -> None:
    """By the processor's time, so that a busy machine does not matter."""
    one = OnlineLearner(
        replace(learner(draft).options, micro_tokens=None, micro_step_s=0.02), time.process_time
    )
    feed(one, samples)
    took = []
    for _ in range(150):
        begun = time.process_time()
        one.micro_step(begun + 60)
        took.append(time.process_time() - begun)
    took = sorted(took[20:])
    assert took[len(took) * 9 // 10] < 0.02
    # It uses its time: more than a few tokens are learned at once.
    assert one.counters.num_tokens / one.counters.num_micro_steps > 64


def test_too_little_time_is_left_alone(draft: Path, samples: list[Sample]) -> None:
    one = learner(draft, micro_tokens=None)
    feed(one, samples)
    before = weights(one)
    assert not one.micro_step(time.monotonic() - 1)
    assert not one.micro_step(time.monotonic() + 1e-5)
    assert equal(before, weights(one)) and one.counters.num_micro_steps == 0


def test_a_slow_moment_does_not_stop_learning_for_ever() -> None:
    pace = Pace()
    for _ in range(30):
        pace.note(16, 100.0)
    assert pace.tokens_for(0.02, 512) == 0
    for _ in range(60):
        pace.hope()
    assert pace.tokens_for(0.02, 512) > 0


def test_a_long_text_is_cut_where_something_is_learned(target: Path) -> None:
    vocab = load_draft(target).shape.vocab_size
    (long,) = samples_of(target, 1, num_context=100, num_captured=20)
    text = text_of(long, vocab)
    for seed in range(40):
        part = cut(text, 16, seed)
        assert len(part.tokens_T) == 16 and part.weights_T[:-1].any()


def test_nothing_to_learn_is_no_error(draft: Path) -> None:
    one = learner(draft)
    assert not one.micro_step(time.monotonic() + 60)


# -- what goes wrong --------------------------------------------------------------------------


def test_corrupt_samples_are_counted_and_dropped(draft: Path, samples: list[Sample]) -> None:
    one = learner(draft)
    for name in ("top_probs", "tail_mass"):
        with pytest.raises(ValueError, match=name):
            one.feed(poisoned(samples[0], name, 0, float("nan")))
    feed(one, samples)
    assert one.counters.num_corrupt == 2 and one.counters.num_samples == 64
    train(one, 3)
    assert all(w.isfinite().all() for w in weights(one))


def test_a_gradient_that_is_no_number_skips_the_batch(draft: Path, samples: list[Sample]) -> None:
    one = learner(draft)
    feed(one, samples)
    train(one, 2)
    before = weights(one)
    hook = one.model.model.norm.weight.register_hook(lambda g: g * float("nan"))
    while one.counters.num_skipped == 0:
        one.micro_step(time.monotonic() + 60)
    hook.remove()
    assert equal(before, weights(one)) and one.counters.num_steps == 2
    train(one, 2)
    assert one.counters.num_restored == 0


def test_weights_that_are_no_numbers_are_replaced_by_good_ones(
    draft: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    one = learner(draft, snapshot_steps=2)
    feed(one, samples)
    train(one, 4)
    good = weights(one)
    one.model.model.norm.weight.data[0] = float("nan")
    with caplog.at_level(logging.WARNING):
        one.micro_step(time.monotonic() + 60)
    assert equal(good, weights(one))
    assert one.counters.num_restored == 1 and one.counters.rate_ratio == 0.5
    assert "weights-restored" in caplog.text
    train(one, 3)


def test_a_loss_that_stays_far_up_brings_good_weights_back(
    draft: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    one = learner(draft, spike_ratio=1.5, spike_steps=3, snapshot_steps=4)
    feed(one, samples)
    train(one, 12)
    good = weights(one)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.mul_(-3)
    with caplog.at_level(logging.WARNING):
        for _ in range(60):
            one.micro_step(time.monotonic() + 60)
            if one.counters.num_restored:
                break
    assert equal(good, weights(one)) and one.counters.rate_ratio == 0.5
    assert any(getattr(r, "fields", {}).get("reason") == "loss-spike" for r in caplog.records)
    # A level that stays is a new one, not an alarm for ever.
    train(one, 20)
    assert one.counters.num_restored == 1


# -- checkpoints and state --------------------------------------------------------------------


def test_an_export_is_the_draft_as_it_is(
    draft: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(draft)
    feed(one, samples)
    train(one, 3)
    one.export(tmp_path / "out", {"note": "x"})
    exported = load_draft(tmp_path / "out")
    rounded = [p.bfloat16().float() for p in one.model.parameters()]
    assert equal(rounded, [p.detach() for p in exported.parameters()])
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_full_disk_leaves_nothing_half_written(
    draft: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(draft, state=str(tmp_path / "state"))
    feed(one, samples)
    train(one, 1)
    save_state(tmp_path / "state", *one.state())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError):
            one.export(tmp_path / "out")
        with pytest.raises(OSError):
            save_state(tmp_path / "state", *one.state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["00000001"]
    one.export(tmp_path / "out")


def test_a_reset_starts_again_from_a_checkpoint_with_what_was_seen(
    draft: Path, samples: list[Sample], tmp_path: Path, target: Path
) -> None:
    one = learner(draft)
    feed(one, samples)
    fresh = weights(one)
    train(one, 3)
    one.reset(draft)
    assert equal(weights(one), fresh)
    assert len(one.replay) > 0 and one.counters.steps_since_reset == 0
    train(one, 1)
    with pytest.raises(UnsupportedModelError, match="shape"):
        one.reset(small_draft(target, tmp_path / "wider", hidden=64))


def test_judging_compares_both_drafts_on_the_same_samples(
    draft: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(draft)
    feed(one, samples)
    train(one, 30)
    pairs = list(one.judging(draft))
    assert len(pairs) == len(one.replay.held_out("a")) > 5
    assert all(c.num_positions == i.num_positions == 24 for _, (c, i) in pairs)
    assert sum(c.overlap - i.overlap for _, (c, i) in pairs) > 0
    one.export(tmp_path / "candidate")
    train(one, 5)
    again = list(one.judging(draft, tmp_path / "candidate"))
    for (_, (mine, _)), (_, (exported, _)) in zip(pairs, again, strict=True):
        # Weights in bf16 are all that differs.
        assert exported.overlap == pytest.approx(mine.overlap, rel=0.05)


def test_texts_are_judged_before_they_are_learned_from(draft: Path, samples: list[Sample]) -> None:
    one = learner(draft, judges_first=True)
    feed(one, samples[:32])
    train(one, 20)
    first = one.first_sight.pairs(draft)
    kept = [text for name in one.replay.domains for text in one.replay.held_out(name)]
    # Nothing was learned before all had been judged, so both drafts were the same.
    assert len(first) + len(kept) == 32 and len(one.replay) == len(first)
    assert all(mine == incumbents for _, (mine, incumbents) in first)
    feed(one, samples[32:])
    before = one.model
    expected = [judge(before, text_of(s, before.shape.vocab_size)) for s in samples[32:]]
    train(one, 5)
    new = one.first_sight.pairs(draft)[len(first) :]
    seen = {text.tokens_T.tobytes() for text, _ in new}
    assert [mine for _, (mine, _) in new] == [
        judged
        for judged, sample in zip(expected, samples[32:], strict=True)
        if text_of(sample, before.shape.vocab_size).tokens_T.tobytes() in seen
    ]
    assert sum(mine.overlap - theirs.overlap for _, (mine, theirs) in new) > 0


def test_scores_are_those_beside_one_incumbent(
    draft: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(draft, judges_first=True)
    feed(one, samples[:32])
    train(one, 5)
    one.export(tmp_path / "other")
    assert one.first_sight.pairs(draft)
    assert not one.first_sight.pairs(tmp_path / "other")
    feed(one, samples[32:])
    train(one, 1)
    assert all(
        mine.overlap != theirs.overlap or mine.num_positions
        for _, (mine, theirs) in one.first_sight.pairs(tmp_path / "other")
    )
    one.reset(draft)
    assert not one.first_sight.pairs(draft)


def test_learning_that_makes_worse_is_taken_back_and_slowed(
    target: Path, draft: Path, samples: list[Sample], tmp_path: Path
) -> None:
    # A draft that fits already, and a rate at which nothing is learned but noise.
    fitted = learner(draft)
    feed(fitted, samples)
    train(fitted, 80)
    fitted.export(tmp_path / "fitted")
    one = learner(tmp_path / "fitted", learning_rate=0.2, judges_first=True, warm_up_steps=0)
    start = weights(one)
    feed(one, samples[:8])
    train(one, 8)
    spoiled = weights(one)
    for _ in range(4):
        feed(one, samples[:32])
        while one.first_sight.has_waiting:
            assert one.micro_step(time.monotonic() + 60)
        if one.counters.num_restored:
            break
    assert not equal(spoiled, start) and equal(weights(one), start)
    assert one.counters.rate_ratio == 0.5


def test_an_incumbent_that_is_gone_keeps_nothing_from_being_learned(
    draft: Path, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = learner(draft, judges_first=True)
    assert not one.first_sight.pairs(tmp_path / "gone")
    feed(one, samples)
    train(one, 2)
    assert not one.first_sight.pairs(tmp_path / "gone") and len(one.replay) > 0
    assert "incumbent-not-read" in caplog.text


def test_what_waits_is_bounded_and_kept_in_the_state(draft: Path, samples: list[Sample]) -> None:
    one = learner(draft, judges_first=True, held_out_every=10**9)
    for _ in range(5):
        feed(one, samples)
    assert len(one.replay) == 5 * 64 - 256
    one.state()
    assert len(one.replay) == 5 * 64 and not one.first_sight.has_waiting


def test_a_learner_goes_on_where_its_state_was(
    draft: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(draft, state=str(tmp_path / "state"))
    feed(one, [replace(sample, domain="") for sample in samples])
    train(one, 3)
    # Between two steps, as a gradient that has begun is not kept.
    tensors, values = one.state()
    save_state(tmp_path / "state", tensors, {**values, "extra": {"stream_id": "7-1"}})
    extra: dict[str, str] = {}
    two = resumed_learner(one.options, extra)
    assert extra == {"stream_id": "7-1"} and two.counters == one.counters
    one._batches._ahead = None
    for each in (one, two):
        train(each, 3)
    assert equal(weights(one), weights(two))
    new = samples[:5]
    for each in (one, two):
        feed(each, [replace(sample, domain="") for sample in new])
    assert one.counters.samples_by_domain == two.counters.samples_by_domain


@pytest.mark.parametrize("damage", ["torn", "rotten", "no manifest", "of another draft"])
def test_a_damaged_state_falls_back_to_the_one_before(
    damage: str,
    draft: Path,
    samples: list[Sample],
    tmp_path: Path,
    target: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = tmp_path / "state"
    one = learner(draft, state=str(state))
    feed(one, samples)
    for _ in range(3):
        train(one, 1)
        save_state(state, *one.state())
    assert sorted(path.name for path in state.iterdir()) == ["00000002", "00000003"]
    file = state / "00000003" / "weights.safetensors"
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "rotten":
        data = bytearray(file.read_bytes())
        data[-5] ^= 64
        file.write_bytes(data)
    elif damage == "no manifest":
        (state / "00000003" / "manifest.json").unlink()
    else:
        other = OnlineLearner(
            replace(one.options, draft=str(small_draft(target, tmp_path / "d", hidden=64)))
        )
        save_state(state, *other.state())
        save_state(tmp_path / "before", *one.state())
        (state / "00000003").rename(state / "00000002b")
        (tmp_path / "before" / "00000001").rename(state / "00000003")
    with caplog.at_level(logging.WARNING):
        resumed = resumed_learner(one.options, {})
    assert resumed.counters.num_steps == (3 if damage == "of another draft" else 2)
    assert "state-refused" in caplog.text
    for path in state.iterdir():
        (path / "values.json").write_text("{}")
    assert list(load_states(state)) == []
    assert resumed_learner(one.options, {}).counters.num_steps == 0


def test_what_a_dead_writer_left_is_swept(
    draft: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(draft)
    (tmp_path / ".half").mkdir()
    save_state(tmp_path, *one.state())
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert len(list(itertools.islice(load_states(tmp_path), 3))) == 1
