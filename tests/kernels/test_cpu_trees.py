"""A token of a tree comes out of the C++ decoder as its path would as a plain sequence, bit by bit.

test_cpu_ops.py runs this file with every instruction set.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_kernels import AttentionBatch, move_kv
from paceline_kernels.cpu import library
from paceline_kernels.cpu.decoder import DecoderShape, FusedDecoder, LayerTensors
from tests.kernels.test_attention import path_to, random_tree, tree_fields

pytestmark = pytest.mark.skipif(
    library.library() is None, reason="the C++ kernels need a compiler at set-up"
)

HIDDEN, INNER, KV_HEADS, VOCAB = 32, 48, 2, 40
CONTEXT, CHUNK = 640, 512
TYPES = [("f32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)]
BY_TYPE = pytest.mark.parametrize(("weight_type", "kv_dtype"), TYPES, ids=["f32", "bf16", "int8"])

angles = torch.outer(torch.arange(float(CONTEXT)), torch.tensor([1.0, 0.1, 0.01, 0.003]))


@cache
def decoder(
    weight_type: str, kv_dtype: torch.dtype, group: int, size: int, block_size: int, threads: int
) -> FusedDecoder:
    """Two layers of random weights, the second with a window."""
    library.set_threads(threads)
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    heads = group * KV_HEADS
    shape = DecoderShape(HIDDEN, INNER, 2, heads, KV_HEADS, size, VOCAB, block_size, 1e-5)
    fused = FusedDecoder(shape, weight_type=weight_type, kv_dtype=kv_dtype)
    kv_size = KV_HEADS * size
    for layer in range(2):
        tensors = LayerTensors(
            # Scores far apart, so that one token more or less shows.
            qkv=(
                3 * weight(heads * size, HIDDEN),
                weight(kv_size, HIDDEN),
                weight(kv_size, HIDDEN),
            ),
            o=weight(HIDDEN, heads * size),
            gate_up=(weight(INNER, HIDDEN), weight(INNER, HIDDEN)),
            down=weight(HIDDEN, INNER),
            input_norm=torch.ones(HIDDEN),
            post_norm=torch.ones(HIDDEN),
            window=70 if layer else None,
        )
        fused.set_layer(layer, tensors)
    embedding = weight(VOCAB, HIDDEN)
    fused.set_ends(embedding, embedding, torch.ones(HIDDEN))
    library.set_threads(1)
    return fused


class Sequence:
    """Rows of pages behind each other in a pool of their own, and what is computed there."""

    def __init__(self, fused: FusedDecoder, kv: torch.Tensor) -> None:
        self.fused, self.kv = fused, kv
        self.block_size, self.size = kv.shape[4], kv.shape[5]

    @classmethod
    def empty(
        cls, fused: FusedDecoder, rows: int, size: int, block_size: int, kv_dtype: torch.dtype
    ) -> Sequence:
        pages = rows * -(-CONTEXT // block_size)
        # What lies behind a context may be anything.
        kv = torch.full((pages, 2, 2, KV_HEADS, block_size, size), float("nan"), dtype=kv_dtype)
        return cls(fused, kv)

    def copy(self) -> Sequence:
        return Sequence(self.fused, self.kv.clone())

    def compute(
        self,
        rows: list[tuple[int, list[int]]],
        tails: list[list[int]] | None = None,
        first: int = 0,
    ) -> list[torch.Tensor]:
        """Return the residuals of rows (context before, tokens), each [tokens, E].

        Row r has the pages of row `first + r` of the pool.
        """
        positions, slots = [], []
        width = -(-CONTEXT // self.block_size)
        for r, (before, tokens) in enumerate(rows):
            tail = tails[r] if tails else []
            begin = before + len(tokens) - len(tail)
            for at in range(before, before + len(tokens)):
                depth = len(path_to(at - begin, tail)) - 1 if tail else 0
                positions.append(begin + depth if tail else at)
                slots.append((first + r) * width * self.block_size + at)
        lengths = torch.tensor([len(tokens) for _, tokens in rows])
        batch = AttentionBatch(
            cu_q=torch.cat((torch.zeros(1), lengths.cumsum(0))).int(),
            kv_lens=torch.tensor([before + len(tokens) for before, tokens in rows]).int(),
            block_tables=torch.arange(first * width, (first + len(rows)) * width)
            .view(len(rows), width)
            .int(),
            block_size=self.block_size,
            max_q=int(lengths.max()),
            **tree_fields(tails) if tails else {},
        )
        rotated = torch.cat((angles, angles), dim=1).repeat(1, -(-self.size // 8))[:, : self.size]
        out = self.fused.forward(
            torch.tensor([token for _, tokens in rows for token in tokens]),
            torch.tensor(positions),
            torch.stack((rotated.cos(), rotated.sin()), dim=1),
            self.kv,
            torch.tensor(slots),
            batch,
        )
        assert out.isfinite().all()
        return list(out.split(lengths.tolist()))


def leaves(parents: list[int]) -> Iterator[int]:
    return (node for node in range(len(parents)) if node not in parents)


@settings(max_examples=40, deadline=None)
@given(
    fronts=st.lists(
        st.sampled_from([0, 1, 15, 47, 59, 63, 64, 120, 190, 250, 255, 256, 300, 440, 509]),
        min_size=1,
        max_size=3,
    ),
    sizes=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    group=st.sampled_from([1, 3, 8]),
    size=st.sampled_from([16, 24]),
    block_size=st.sampled_from([5, 16]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@BY_TYPE
def test_nodes_are_what_their_paths_are_as_sequences(
    weight_type: str,
    kv_dtype: torch.dtype,
    fronts: list[int],
    sizes: list[int],
    group: int,
    size: int,
    block_size: int,
    threads: int,
    seed: int,
) -> None:
    """Contexts put the trees across blocks of 64, splits of 256 and pages; rows are mixed."""
    rng = random.Random(seed)
    fused = decoder(weight_type, kv_dtype, group, size, block_size, threads)
    fronts_and_sizes = list(zip(fronts, sizes, strict=False))
    prompts = [[rng.randrange(VOCAB) for _ in range(front)] for front in fronts]
    tokens = [[rng.randrange(VOCAB) for _ in range(count)] for _, count in fronts_and_sizes]
    tails = [random_tree(count, rng) for _, count in fronts_and_sizes]
    plain = rng.choice([None, 0])
    if plain is not None:
        tails[plain] = []
    start = Sequence.empty(fused, len(fronts), size, block_size, kv_dtype)
    for r, prompt in enumerate(prompts):
        if prompt:
            start.compute([(0, prompt)], first=r)

    trees = start.copy()
    rows = list(zip(fronts, tokens, strict=True))
    together = trees.compute(rows, tails)
    for r, (front, row_tokens) in enumerate(rows):
        parents = tails[r] or list(range(-1, len(row_tokens) - 1))
        for leaf in leaves(parents):
            path = path_to(leaf, parents)
            line = start.copy().compute([(front, [row_tokens[i] for i in path])], first=r)[0]
            assert torch.equal(together[r][path], line)

    # Grown level by level: what was computed before is part of the tail, not of the step.
    grown = start.copy()
    for r, (front, row_tokens) in enumerate(rows):
        parents = tails[r] or list(range(-1, len(row_tokens) - 1))
        at = 0
        while at < len(parents):
            to = rng.randint(at + 1, len(parents))
            part = grown.compute([(front + at, row_tokens[at:to])], [parents[:to]], first=r)[0]
            assert torch.equal(part, together[r][at:to])
            at = to


@BY_TYPE
def test_long_paths_and_many_lanes(weight_type: str, kv_dtype: torch.dtype) -> None:
    """Paths of more than a block, and more lanes than one item of work has."""
    rng = random.Random(3)
    fused = decoder(weight_type, kv_dtype, 3, 16, 16, 1)
    parents = list(range(-1, 149))
    for at, parent in ((70, 2), (90, 69), (140, 50)):
        parents[at] = parent
    prompt = [rng.randrange(VOCAB) for _ in range(200)]
    tokens = [rng.randrange(VOCAB) for _ in parents]
    start = Sequence.empty(fused, 1, 16, 16, kv_dtype)
    start.compute([(0, prompt)])
    (tree,) = start.copy().compute([(200, tokens)], [parents])
    for leaf in leaves(parents):
        path = path_to(leaf, parents)
        line = start.copy().compute([(200, [tokens[i] for i in path])])[0]
        assert torch.equal(tree[path], line)


@BY_TYPE
def test_decoding_goes_on_behind_an_accepted_path(weight_type: str, kv_dtype: torch.dtype) -> None:
    """Its KV, moved forwards, is what decoding one by one would have stored."""
    rng = random.Random(5)
    fused = decoder(weight_type, kv_dtype, 3, 16, 16, 1)
    prompt = [rng.randrange(VOCAB) for _ in range(250)]
    parents, tokens = [-1, -1, 0, 0, 1, 2, 2, 3, 5, 7], [rng.randrange(VOCAB) for _ in range(10)]
    tree = Sequence.empty(fused, 1, 16, 16, kv_dtype)
    tree.compute([(0, prompt)])
    line = tree.copy()
    (computed,) = tree.compute([(250, tokens)], [parents])
    path = path_to(8, parents)
    for i, node in enumerate(path):
        (one,) = line.compute([(250 + i, [tokens[node]])])
        assert torch.equal(one[0], computed[node])
    slots = torch.arange(250, 250 + len(path))
    move_kv(tree.kv, torch.tensor([250 + node for node in path]), slots)
    pages, offsets = slots // 16, slots % 16
    assert torch.equal(
        tree.kv[pages, :, :, :, offsets].float(), line.kv[pages, :, :, :, offsets].float()
    )
    after = (250 + len(path), [7])
    assert torch.equal(tree.compute([after])[0], line.compute([after])[0])
