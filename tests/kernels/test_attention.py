"""Paged attention against torch's attention over contiguous keys and values."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from paceline_kernels import AttentionBatch, paged_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest error over values of size about 1: float32 sums in another order, bf16's 8 bits."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@dataclass
class Case:
    """A batch and the contiguous tensors of its rows, [K, C, D] each."""

    q_NHD: torch.Tensor
    pool: torch.Tensor
    batch: AttentionBatch
    rows: list[tuple[torch.Tensor, torch.Tensor]]
    q_lens: list[int]


def make_case(
    lengths: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    size: int,
    block_size: int,
    dtype: torch.dtype,
    junk: float = float("nan"),
    tails: list[list[int]] | None = None,
    seed: int = 0,
) -> Case:
    """Scatter rows of (context before, new tokens) over shuffled pages; the rest is junk.

    `tails` are the parents of each row's tail; empty where it has none.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-(before + new) // block_size) for before, new in lengths]
    num_pages = sum(num_blocks) + 3
    pages = random.Random(seed).sample(range(num_pages), num_pages)
    # Two layers of a pool: the attended one is a strided view, as in the engine.
    pool = torch.full((num_pages, 2, 2, kv_heads, block_size, size), junk, dtype=dtype)
    layer = pool[:, 1]
    # Entries behind the context name pages that do not exist.
    tables = torch.full((len(lengths), max(num_blocks) + 2), 1 << 20, dtype=torch.int32)
    rows = []
    for r, (before, new) in enumerate(lengths):
        k, v = torch.randn(2, kv_heads, before + new, size, generator=generator).to(dtype)
        for b in range(num_blocks[r]):
            page = pages.pop()
            tables[r, b] = page
            part = slice(b * block_size, (b + 1) * block_size)
            count = k[:, part].shape[1]
            layer[page, 0, :, :count], layer[page, 1, :, :count] = k[:, part], v[:, part]
        rows.append((k, v))
    q_lens = [new for _, new in lengths]
    q = torch.randn(sum(q_lens), heads, size, generator=generator).to(dtype)
    cu_q = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32)
    batch = AttentionBatch(
        cu_q=cu_q,
        kv_lens=torch.tensor([before + new for before, new in lengths], dtype=torch.int32),
        block_tables=tables,
        block_size=block_size,
        max_q=max(q_lens),
        **{} if tails is None else tree_fields(tails),
    )
    return Case(q, layer, batch, rows, q_lens)


def tree_fields(tails: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return the tails as a batch has them."""
    lengths = torch.tensor([0, *map(len, tails)])
    return {
        "cu_tree": lengths.cumsum(0).int(),
        "tree_parents": torch.tensor([p for tail in tails for p in tail], dtype=torch.int32),
    }


def path_to(node: int, parents: list[int]) -> list[int]:
    """Return a node and its ancestors, the oldest first."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def explicit_mask(kv_len: int, q_len: int, window: int | None, parents: list[int]) -> torch.Tensor:
    """Say for every query and token of the context whether one sees the other, [Q, C]."""
    begin = kv_len - len(parents)
    seen = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for query in range(q_len):
        at = kv_len - q_len + query
        if parents:
            tokens = [*range(begin), *(begin + node for node in path_to(at - begin, parents))]
        else:
            tokens = list(range(at + 1))
        # Whatever a query sees lies on one line: its place there is its position.
        seen[query, tokens if window is None else tokens[-window:]] = True
    return seen


def reference(
    case: Case, window: int | None = None, tails: list[list[int]] | None = None
) -> torch.Tensor:
    """Row by row with torch's attention in float64 over repeated heads."""
    outputs = []
    for r, ((k, v), q) in enumerate(zip(case.rows, case.q_NHD.split(case.q_lens), strict=True)):
        seen = explicit_mask(k.shape[1], len(q), window, [] if tails is None else tails[r])
        repeat = q.shape[1] // k.shape[0]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).double(),
            k.double().repeat_interleave(repeat, 0),
            v.double().repeat_interleave(repeat, 0),
            attn_mask=seen,
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def assert_equal_to_reference(
    case: Case, window: int | None = None, tails: list[list[int]] | None = None
) -> None:
    scale = case.q_NHD.shape[-1] ** -0.5
    ours = paged_attention(case.q_NHD, case.pool, case.batch, scale, window=window)
    expected = reference(case, window, tails)
    assert ours.dtype == case.q_NHD.dtype
    tolerance = TOLERANCE[case.q_NHD.dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


MIXED = [(40, 1), (0, 1), (0, 17), (33, 1), (15, 1), (16, 16), (100, 7), (0, 2), (31, 1)]
"""Decode rows, whole prompts and later chunks side by side."""


@DTYPES
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_heads_and_sizes(dtype: torch.dtype, size: int, heads: int, kv_heads: int) -> None:
    case = make_case(MIXED, heads=heads, kv_heads=kv_heads, size=size, block_size=16, dtype=dtype)
    assert_equal_to_reference(case)


@DTYPES
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 33, 1000])
def test_pages_and_windows(dtype: torch.dtype, block_size: int, window: int | None) -> None:
    case = make_case(MIXED, heads=4, kv_heads=2, size=16, block_size=block_size, dtype=dtype)
    assert_equal_to_reference(case, window)


@pytest.mark.parametrize("lengths", [[(0, 1)], [(7, 1)], [(0, 50)], [(64, 64)], [(5, 1)] * 20])
def test_batches_of_one_kind(lengths: list[tuple[int, int]]) -> None:
    case = make_case(lengths, heads=4, kv_heads=2, size=32, block_size=16, dtype=torch.float32)
    assert_equal_to_reference(case)


def random_tree(size: int, rng: random.Random) -> list[int]:
    """Return parents: bushy and thin trees, and several side by side."""
    reach = rng.choice([1, 2, 4, size])
    return [rng.randrange(max(-1, node - reach), node) for node in range(size)]


def random_tails(lengths: list[tuple[int, int]], rng: random.Random) -> list[list[int]]:
    """Return a tail for each row: none, the step's tokens, or some in front of them as well."""
    tails = []
    for before, new in lengths:
        size = rng.choice([0, new, new + rng.randint(0, min(before, 12)), new + before])
        tails.append(random_tree(size if size < 100 else new, rng))
    return tails


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 3, 12])
@pytest.mark.parametrize("seed", range(6))
def test_trees(dtype: torch.dtype, window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    lengths = [(rng.randrange(40), rng.choice([1, 2, 9, 20])) for _ in range(6)]
    tails = random_tails(lengths, rng)
    case = make_case(
        lengths, heads=4, kv_heads=2, size=16, block_size=4, dtype=dtype, tails=tails, seed=seed
    )
    assert_equal_to_reference(case, window, tails)


@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_a_node_attends_as_its_path_would_as_a_sequence(window: int | None) -> None:
    rng = random.Random(7)
    tail = random_tree(14, rng)
    case = make_case(
        [(20, 9)],
        heads=4,
        kv_heads=2,
        size=16,
        block_size=4,
        dtype=torch.float32,
        tails=[tail],
    )
    ours = paged_attention(case.q_NHD, case.pool, case.batch, 0.25, window=window)
    ((k, v),) = case.rows
    for query in range(9):
        path = path_to(5 + query, tail)
        line = [*range(29 - len(tail)), *(29 - len(tail) + node for node in path)]
        if window is not None:
            line = line[-window:]
        out = F.scaled_dot_product_attention(
            case.q_NHD[query, :, None],
            k[:, line].repeat_interleave(2, 0),
            v[:, line].repeat_interleave(2, 0),
        )
        torch.testing.assert_close(ours[query], out[:, 0], rtol=2e-6, atol=2e-6)


def test_a_chain_as_a_tree_is_a_chunk() -> None:
    lengths = [(13, 6), (0, 1), (5, 9), (30, 2), (9, 1)]
    tails = [list(range(-1, new - 1)) for _, new in lengths[:3]] + [list(range(-1, 6)), []]
    shape = {"heads": 4, "kv_heads": 2, "size": 16, "block_size": 4, "dtype": torch.float32}
    plain = make_case(lengths, **shape)  # type: ignore[arg-type]
    tree = make_case(lengths, **shape, tails=tails)  # type: ignore[arg-type]
    for window in (None, 4):
        a, b = (
            paged_attention(c.q_NHD, c.pool, c.batch, 0.25, window=window) for c in (plain, tree)
        )
        assert torch.equal(a, b)


@DTYPES
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_what_lies_behind_a_context_never_matters(
    dtype: torch.dtype, window: int | None, junk: float
) -> None:
    shape = {"heads": 4, "kv_heads": 2, "size": 16, "block_size": 16, "dtype": dtype}
    clean = make_case(MIXED, **shape, junk=0.0)  # type: ignore[arg-type]
    dirty = make_case(MIXED, **shape, junk=junk)  # type: ignore[arg-type]
    a, b = (paged_attention(c.q_NHD, c.pool, c.batch, 0.25, window=window) for c in (clean, dirty))
    assert torch.equal(a, b)


def test_the_pool_is_only_read() -> None:
    case = make_case(
        MIXED, heads=4, kv_heads=2, size=16, block_size=16, dtype=torch.float32, junk=7.0
    )
    before = case.pool.clone()
    paged_attention(case.q_NHD, case.pool, case.batch, 0.25, window=3)
    assert torch.equal(case.pool, before)
