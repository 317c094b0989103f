"""Samples become texts whose rows predict the captured tokens; corrupt ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.domain.learnings import Sample, TokenOrigin
from paceline.rpc.draft_codec import sample_from_proto, sample_to_proto
from paceline.trainer.checkpoint import load_draft
from paceline.trainer.judging import judge, tempered
from paceline.trainer.positions import POSITIONS, weighed
from paceline.trainer.samples import text_of
from paceline.trainer.texts import pack
from tests.unit.trainer.traffic import poisoned, samples_of


@pytest.fixture(scope="module")
def sample(target: Path) -> Sample:
    return samples_of(target, 1, temperature=0.0)[0]


@pytest.fixture(scope="module")
def vocab(target: Path) -> int:
    return load_draft(target).shape.vocab_size


def test_each_row_predicts_the_token_behind_it(sample: Sample, vocab: int, target: Path) -> None:
    text = text_of(sample_from_proto(sample_to_proto(sample)), vocab)
    batch = pack([[text]], len(text.tokens_T))
    assert len(batch.learned_N) == sample.num_captured
    assert batch.target.drawn_N.tolist() == list(sample.token_ids[sample.num_context :])
    # Greedy, so the likeliest token of each row is the one that was drawn.
    assert batch.target.token_ids_NK[:, 0].tolist() == batch.target.drawn_N.tolist()
    # The target itself as a draft would have had all accepted: nothing is shifted.
    judged = judge(load_draft(target), text)
    assert judged.num_agreed == judged.num_positions == judged.num_accepted == 24
    named = float(batch.target.probs_NK.sum())
    assert judged.overlap == pytest.approx(named, rel=2e-3)


def test_a_window_is_the_same_text_in_fewer_tokens(sample: Sample, vocab: int) -> None:
    text = text_of(sample, vocab)
    for begin, end in ((0, 32), (4, 20), (7, 12), (10, 30), (15, 16)):
        part = text.window(begin, end)
        batch, whole = pack([[part]], end - begin), pack([[text]], 32)
        kept = [i for i, place in enumerate(whole.learned_N.tolist()) if begin <= place < end - 1]
        assert (batch.learned_N + begin).tolist() == whole.learned_N[kept].tolist()
        assert torch.equal(batch.target.token_ids_NK, whole.target.token_ids_NK[kept])
        assert torch.equal(batch.target.probs_NK, whole.target.probs_NK[kept])
        assert torch.equal(batch.target.drawn_N, whole.target.drawn_N[kept])


def test_samples_that_name_fewer_tokens_share_a_batch(target: Path, vocab: int) -> None:
    texts = [text_of(samples_of(target, 1, top=k)[0], vocab) for k in (16, 4)]
    batch = pack([texts], 64)
    assert batch.target.token_ids_NK.shape == (48, 4)
    assert torch.equal(batch.target.probs_NK[:24], batch.target.probs_NK[24:])


def ids(sample: Sample, index: int, value: int) -> Sample:
    array = np.frombuffer(sample.top_ids, "<i4").copy()
    array[index] = value
    return replace(sample, top_ids=array.tobytes())


@pytest.mark.parametrize(
    ("corrupt", "why"),
    [
        (lambda s: replace(s, token_ids=(9999, *s.token_ids[1:])), "token_ids"),
        (lambda s: replace(s, token_ids=(-1, *s.token_ids[1:])), "token_ids"),
        (lambda s: ids(s, 3, 9999), "top_ids"),
        (lambda s: ids(s, 3, -7), "top_ids"),
        (lambda s: ids(s, 1, int.from_bytes(s.top_ids[:4], "little")), "twice"),
        (lambda s: poisoned(s, "top_probs", 5, float("nan")), "not finite"),
        (lambda s: poisoned(s, "top_probs", 0, float("inf")), "not finite"),
        (lambda s: poisoned(s, "tail_mass", 0, float("nan")), "not finite"),
        (lambda s: poisoned(s, "top_probs", 15, -0.25), "no probabilities"),
        (lambda s: poisoned(s, "top_probs", 0, 1.5), "no probabilities"),
        (lambda s: poisoned(s, "top_probs", 15, 0.9), "best first"),
        (lambda s: poisoned(s, "tail_mass", 0, 1.0), "with the tail"),
        (lambda s: replace(s, origins=b"\x09" * 24), "origins"),
        (lambda s: replace(s, origins=b"\x00" * 23), "origins: 23 bytes"),
        (lambda s: replace(s, top_probs=s.top_probs[2:]), "top_probs"),
        (lambda s: replace(s, temperature=float("nan")), "temperature"),
        (lambda s: replace(s, num_context=0), "no context"),
        (lambda s: replace(s, num_context=32), "no context"),
    ],
)
def test_a_corrupt_sample_is_refused_with_a_reason(
    corrupt: Callable[[Sample], Sample], why: str, sample: Sample, vocab: int
) -> None:
    with pytest.raises(ValueError, match=why):
        text_of(corrupt(sample), vocab)


def test_positions_are_chosen_by_the_origin_of_the_token_they_predict(
    sample: Sample, vocab: int
) -> None:
    text = text_of(sample, vocab)
    origins = np.frombuffer(sample.origins, np.uint8)
    captured = np.array(sample.token_ids[sample.num_context :])
    for name, wanted in (
        ("first-rejected", origins == TokenOrigin.CORRECTED),
        ("accepted", origins == TokenOrigin.ACCEPTED),
        ("all", origins >= 0),
    ):
        batch = pack([[weighed(text, name)]], 32)
        assert batch.target.drawn_N.tolist() == captured[wanted].tolist()
    heavy = pack([[weighed(text, "rejected-heavy")]], 32)
    is_corrected = torch.from_numpy(origins == TokenOrigin.CORRECTED)
    assert heavy.weights_N[is_corrected].min() > heavy.weights_N[~is_corrected].max() == 1.0
    assert set(POSITIONS) == {"all", "first-rejected", "accepted", "rejected-heavy"}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_overlap_is_that_of_the_tempered_distributions(
    temperature: float, target: Path, vocab: int
) -> None:
    (whole,) = samples_of(target, 1, temperature=temperature, top=vocab)
    text = text_of(whole, vocab)
    torch.manual_seed(5)
    draft = load_draft(target)
    for parameter in draft.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    tokens = torch.from_numpy(text.tokens_T.astype(np.int64))[None]
    visible = torch.ones(1, 32, 32, dtype=torch.bool).tril()
    with torch.no_grad():
        p, q = (
            (m.logits(m(tokens, torch.arange(32)[None], visible))[0, 7:-1] / temperature).softmax(
                -1
            )
            for m in (load_draft(target), draft)
        )
    expected = float(torch.minimum(p, q).sum())
    assert judge(draft, text).overlap == pytest.approx(expected, rel=5e-3)
    named = torch.tensor([[0.5, 0.2]])
    assert float(tempered(named, temperature).sum()) < 1.0
