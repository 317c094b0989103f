"""Texts in rows: nothing is lost, mixed up or kept for ever."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.trainer.decoder import DraftModel, DraftShape
from paceline.trainer.texts import Text, TextPool, pack
from paceline.trainer.train import learned_logits

VOCAB, TOP = 50, 3


def text(seed: int, length: int) -> Text:
    rng = np.random.default_rng(seed)
    weights_T = rng.choice([0.0, 0.5, 1.0], length).astype(np.float32)
    weights_T[0] = 1.0
    return Text(
        rng.integers(0, VOCAB, length, dtype=np.int32),
        np.stack([rng.permutation(VOCAB)[:TOP] for _ in range(length)]).astype(np.int32),
        np.log(rng.dirichlet(np.ones(TOP + 1), length)[:, :TOP]).astype(np.float16),
        weights_T,
    )


def test_packed_texts_bring_what_each_brings_alone() -> None:
    model = DraftModel(DraftShape(VOCAB, 16, 24, 2, 2, 1, 8, 64))
    texts = [text(i, length) for i, length in enumerate((7, 5, 12, 3))]
    together = pack([texts[:2], texts[2:]], 16)
    alone = [pack([[t]], len(t.tokens_T)) for t in texts]
    with torch.no_grad():
        expected = torch.cat([learned_logits(model, batch) for batch in alone])
        torch.testing.assert_close(learned_logits(model, together), expected)
    for name in ("token_ids_NK", "probs_NK", "drawn_N"):
        parts = torch.cat([getattr(batch.target, name) for batch in alone])
        torch.testing.assert_close(getattr(together.target, name), parts)
    assert together.num_tokens == 27


def test_a_position_is_learned_with_the_token_behind_it() -> None:
    one = text(1, 9)
    batch = pack([[one]], 9)
    places = np.flatnonzero(one.weights_T[:-1])
    assert batch.learned_N.tolist() == places.tolist()
    assert batch.target.drawn_N.tolist() == one.tokens_T[places + 1].tolist()
    assert batch.target.token_ids_NK.tolist() == one.top_ids_TK[places].tolist()


def test_what_is_too_long_loses_its_end() -> None:
    batch = pack([[text(2, 30)]], 10)
    assert batch.tokens_BR.shape == (1, 10)
    assert int(batch.learned_N.max()) < 9


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    num_rows=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_rows_hold_whole_texts_and_each_text_is_met_equally_often(
    lengths: list[int], num_rows: int, seed: int
) -> None:
    pool = TextPool(1 << 30, seed)
    texts = [text(i, length) for i, length in enumerate(lengths)]
    pool.add(texts)
    met: Counter[int] = Counter()
    for _ in range(12):
        rows = pool.draw(num_rows, 40)
        assert len(rows) == num_rows and all(rows)
        assert all(sum(len(t.tokens_T) for t in row) <= 40 for row in rows)
        met.update(id(t) for row in rows for t in row)
    counts = [met[id(t)] for t in texts]
    assert max(counts) - min(counts) <= 1


def test_the_pool_keeps_the_newest_within_its_bounds() -> None:
    texts = [text(i, 20) for i in range(10)]
    pool = TextPool(3 * texts[0].nbytes, seed=0)
    for one in texts:
        pool.add([one])
    assert len(pool) == 3
    for _ in range(10):
        pool.draw(2, 20)
    kept = {id(t) for _ in range(10) for row in pool.draw(2, 20) for t in row}
    assert kept == {id(t) for t in texts[-3:]}
