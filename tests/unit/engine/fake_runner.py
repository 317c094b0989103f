"""A runner without tensors whose KV can be checked: pages hold the tokens they stand for.

Every position's entry is (token, hash of the chain up to it), written from the entry in front
of it as it lies in its page. A drawn token is a hash of all entries of the context, read back
through the page table: a page that is missing, stale, shared by mistake or copied too early
or too late changes the tokens, and `expected_tokens` says what they must be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import xxhash

from paceline.domain.request import GenerationSpec
from paceline.engine.blocks import BlockPool
from paceline.engine.chunking import StepPace
from paceline.engine.engine import Engine
from paceline.engine.scheduler import Scheduler
from paceline.engine.spec.verify import verify_coupled
from paceline.engine.step import NOTHING, Row, RowResult, SampledToken, StepPlan, StepResult

VOCAB = 50
EOS = 7
KV_ROOT = b"fake-kv-root-16b"


class FakeRunner:
    """Computes plans on a numpy page pool; can be told to fail."""

    def __init__(self, num_pages: int, block_size: int) -> None:
        self._entries = np.zeros((num_pages, block_size, 2), dtype=np.int64)
        self._bytes = self._entries.reshape(num_pages, -1).view(np.uint8)
        self._block_size = block_size
        self.plans: list[StepPlan] = []
        self.on_run: Callable[[StepPlan], frozenset[int]] = lambda plan: frozenset()
        """Called before a plan is computed: may raise, or name rows that fail."""

    @property
    def page_bytes(self) -> int:
        return int(self._bytes.shape[1])

    def read_page(self, page: int, out: memoryview) -> None:
        np.copyto(np.frombuffer(out, dtype=np.uint8), self._bytes[page])

    def write_page(self, page: int, data: memoryview) -> None:
        np.copyto(self._bytes[page], np.frombuffer(data, dtype=np.uint8))

    def view_page(self, page: int) -> memoryview:
        return memoryview(self._bytes[page])

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        failed = self.on_run(plan)
        for source, destination in plan.page_copies:
            self._entries[destination] = self._entries[source]
        for row in plan.rows:
            self._compute(row)
        results = tuple(
            self._draw(row) if row.sample is not None and i not in failed else NOTHING
            for i, row in enumerate(plan.rows)
        )
        if failed:
            return StepResult(results, 0.001, failed_rows=failed)
        return StepResult(results, 0.001)

    def _compute(self, row: Row) -> None:
        for position, token in enumerate(row.token_ids, row.start):
            before = self._at(row, position - 1)[1] if position else 0
            self._at(row, position)[:] = token, _chain(int(before), token)
        end = row.start + len(row.token_ids)
        for node, (token, parent) in enumerate(zip(row.tree.tokens, row.tree.parents, strict=True)):
            # The root lies in front of the first node.
            before = self._at(row, end + parent)[1]
            self._at(row, end + node)[:] = token, _chain(int(before), token)

    def _draw(self, row: Row) -> RowResult:
        end = row.start + len(row.token_ids)
        drawn = [self._draw_behind(row, range(end))]
        for node in range(len(row.tree)):
            path = [end + i for i in row.tree.path_to(node)]
            drawn.append(self._draw_behind(row, [*range(end), *path]))
        verdict = verify_coupled(row.tree, drawn)
        for depth, node in enumerate(verdict.path):
            self._at(row, end + depth)[:] = self._at(row, end + node)
        tokens = [row.tree.tokens[node] for node in verdict.path] + [verdict.token]
        return RowResult(tuple(map(SampledToken, tokens)), verdict.path)

    def _draw_behind(self, row: Row, places: Iterable[int]) -> int:
        assert row.sample is not None
        context = [tuple(self._at(row, i)) for i in places]
        return _next_token(context, row.sample.sampling.seed, row.sample.stream)

    def _at(self, row: Row, position: int) -> np.ndarray:
        page = row.pages[position // self._block_size]
        return self._entries[page, position % self._block_size]


def prompt_of(name: str, length: int) -> tuple[int, ...]:
    """A prompt that only this name has; a shorter one is the start of a longer one."""
    return tuple(random.Random(name).choices(range(VOCAB), k=length))


def expected_tokens(
    spec: GenerationSpec, index: int, *, context: int, resumed: Sequence[int] = ()
) -> list[int]:
    """What an output must be, resumed tokens included, computed without any pages."""
    tokens = [*spec.prompt_token_ids, *resumed]
    output = list(resumed)
    while not is_over(spec, output, context):
        entries, chain = [], 0
        for token in tokens:
            chain = _chain(chain, token)
            entries.append((token, chain))
        output.append(_next_token(entries, spec.sampling.seed, index))
        tokens.append(output[-1])
    return output


def is_over(spec: GenerationSpec, output: Sequence[int], context: int) -> bool:
    """Whether an output has reached one of its ends."""
    if output and output[-1] in spec.stop_token_ids:
        return True
    if output and output[-1] == EOS and not spec.ignore_eos:
        return True
    return len(output) >= spec.max_tokens or len(spec.prompt_token_ids) + len(output) >= context


def fake_engine(
    *,
    num_pages: int = 32,
    block_size: int = 4,
    chunk_tokens: int = 8,
    max_num_seqs: int = 8,
    context: int | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    pace: StepPace | None = None,
) -> tuple[Engine, FakeRunner]:
    """An engine over a fake runner."""
    runner = FakeRunner(num_pages, block_size)
    scheduler = Scheduler(
        BlockPool(num_pages),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        step_tokens=chunk_tokens,
        max_context_tokens=context or num_pages * block_size,
        eos_token_ids=frozenset([EOS]),
        pace=pace,
    )
    return Engine(runner, scheduler, kv_root=KV_ROOT, vocab_size=VOCAB, monotonic=clock), runner


def _chain(before: int, token: int) -> int:
    return _hash(before, token) >> 1


def _next_token(entries: Sequence[tuple[int, ...]], seed: int, stream: int) -> int:
    return _hash(seed, stream, *(int(x) for entry in entries for x in entry)) % VOCAB


def _hash(*numbers: int) -> int:
    return xxhash.xxh3_64_intdigest(np.array(numbers, dtype=np.uint64).tobytes())
