"""Random lives of pool and engine: books hold after every action, and nobody is forgotten."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from paceline.domain.request import FinishReason, GenerationSpec, SamplingParams
from paceline.engine.blocks import BlockPool
from paceline.engine.events import (
    EngineEvent,
    FailedEvent,
    LoadedEvent,
    LookupEvent,
    OutputEvent,
    SavedEvent,
)
from paceline.engine.kv_exchange import SAVE_TIMEOUT_S
from paceline.engine.lookups import LOOKUP_TIMEOUT_S
from paceline.engine.ports import StoredBlock
from paceline.engine.request import Sequence
from paceline.engine.step import StepPlan
from tests.unit.engine.fake_runner import VOCAB, expected_tokens, fake_engine
from tests.unit.engine.memory_arena import MemoryArena, run_until_idle
from tests.unit.engine.spec.guesser import Guesser

NUM_PAGES = 7


class PoolMachine(RuleBasedStateMachine):
    """BlockPool against a plain model: holders per page, and which content is found by a key."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_PAGES)
        self.holders: Counter[int] = Counter()
        self.content: dict[int, int] = {}
        """What each page was last filled with."""
        self.num_filled = 0
        self.registered: dict[bytes, int] = {}

    @rule(target=held)
    def allocate(self) -> int:
        page = self.pool.allocate()
        if page is None:
            assert len(+self.holders) == NUM_PAGES
            # A page that is held already, held once more.
            page = self.pool.share(next(iter(+self.holders)))
        else:
            assert self.holders[page] == 0
            self.num_filled += 1
            self.content[page] = self.num_filled
        self.holders[page] += 1
        return page

    @rule(target=held, page=held)
    def share(self, page: int) -> int:
        self.holders[page] += 1
        return self.pool.share(page)

    @rule(page=consumes(held))
    def free(self, page: int) -> None:
        self.holders[page] -= 1
        self.pool.free([page])

    @rule(page=held, key=st.integers(0, 5))
    def register(self, page: int, key: int) -> None:
        name = bytes([key])
        is_new = self.pool.find(name) is None and self.pool.key_of(page) is None
        self.pool.register(page, name)
        if is_new:
            self.registered[name] = self.content[page]

    @rule(target=held, key=st.integers(0, 5))
    def find_and_share(self, key: int) -> int:
        page = self.pool.find(bytes([key]))
        if page is None:
            return self.allocate()
        # Whatever happened since, the page holds what was registered.
        assert self.content[page] == self.registered[bytes([key])]
        self.holders[page] += 1
        return self.pool.share(page)

    @invariant()
    def books_hold(self) -> None:
        assert self.pool.check_integrity(self.holders.elements()) == []
        assert self.pool.num_available == NUM_PAGES - len(+self.holders)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@dataclass
class Expected:
    """A submitted request and what came back for it."""

    spec: GenerationSpec
    is_prefill_only: bool
    resumed: dict[int, tuple[int, ...]]
    finished: frozenset[int]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, FinishReason] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    num_ends: int = 0
    has_failed: bool = False


CONTEXT = 48


def family_prompt(family: int, length: int) -> tuple[int, ...]:
    """Prompts of one family are each other's prefixes."""
    return tuple((i * (family + 3)) % VOCAB for i in range(length))


def published_prompts() -> MemoryArena:
    """A store in which another engine left prompts of every family."""
    arena = MemoryArena(150, 4 * 16)
    engine, _ = fake_engine(num_pages=64)
    engine.attach_arena(arena)
    for family in range(3):
        for length in (6, 13, 24, 30):
            spec = GenerationSpec(f"{family}-{length}", family_prompt(family, length))
            engine.submit(spec, is_prefill_only=True, fleet_id="fleet")
    run_until_idle(engine, arena)
    return arena


PUBLISHED = published_prompts()


@cache
def _whole_output(spec: GenerationSpec, index: int) -> tuple[int, ...]:
    return tuple(expected_tokens(spec, index, context=CONTEXT))


def _to_come(sequence: Sequence) -> tuple[int, ...]:
    """What a sequence will draw; nothing is known behind tokens that came from elsewhere."""
    output = tuple(sequence.token_ids[sequence.num_prompt :])
    whole = _whole_output(sequence.request.spec, sequence.index)
    return whole[len(output) :] if whole[: len(output)] == output else ()


class EngineMachine(RuleBasedStateMachine):
    """An engine over fake pages, a store that comes, goes and lies, and steps that fail."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.may_fail = False
        self.requests_by_id: dict[str, Expected] = {}
        self.arena: MemoryArena | None = None
        self.lookups: list[LookupEvent] = []
        self.pins: dict[int, MemoryArena] = {}

    @initialize(
        num_pages=st.sampled_from([12, 16, 40]),
        chunk_tokens=st.sampled_from([1, 4, 16]),
        max_num_seqs=st.sampled_from([1, 3, 8]),
        answers_at_once=st.booleans(),
        has_store=st.booleans(),
        has_drafts=st.booleans(),
    )
    def build(
        self,
        num_pages: int,
        chunk_tokens: int,
        max_num_seqs: int,
        answers_at_once: bool,
        has_store: bool,
        has_drafts: bool,
    ) -> None:
        self.answers_at_once = answers_at_once
        self.engine, self.runner = fake_engine(
            num_pages=num_pages,
            chunk_tokens=chunk_tokens,
            max_num_seqs=max_num_seqs,
            context=CONTEXT,
            clock=lambda: self.now_s,
        )
        if has_drafts:
            self.engine._speculator = Guesser(_to_come, VOCAB)
        if has_store:
            self.attach(150, True)

    # -- requests -------------------------------------------------------------------------

    @rule(
        target=requests,
        family=st.integers(0, 2),
        length=st.integers(1, 30),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        ignore_eos=st.booleans(),
        stop=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
        is_prefill_only=st.booleans(),
        data=st.data(),
    )
    def submit(
        self,
        family: int,
        length: int,
        n: int,
        max_tokens: int,
        priority: int,
        ignore_eos: bool,
        stop: frozenset[int],
        is_prefill_only: bool,
        data: st.DataObject,
    ) -> str:
        spec = GenerationSpec(
            f"r{len(self.requests_by_id)}",
            family_prompt(family, length),
            sampling=SamplingParams(seed=family),
            max_tokens=max_tokens,
            stop_token_ids=stop,
            ignore_eos=ignore_eos,
            n=n,
            priority=priority,
        )
        resumed, finished = {}, frozenset[int]()
        if not is_prefill_only and data.draw(st.booleans()):
            finished = data.draw(st.frozensets(st.integers(0, n - 1)))
            for index in range(n):
                whole = expected_tokens(spec, index, context=CONTEXT)
                resumed[index] = tuple(whole[: data.draw(st.integers(0, len(whole)))])
        self.engine.submit(
            spec,
            is_prefill_only=is_prefill_only,
            resumed=resumed,
            finished_indices=finished,
            fleet_id="fleet",
        )
        expected = Expected(spec, is_prefill_only, resumed, finished)
        self.requests_by_id[spec.request_id] = expected
        return spec.request_id

    @rule(name=requests, index=st.sampled_from([None, None, 0, 1, 2]))
    def cancel(self, name: str, index: int | None) -> None:
        self.engine.cancel(name, index)
        request = self.requests_by_id[name]
        request.cancelled |= set(range(request.spec.n)) if index is None else {index}

    # -- steps ----------------------------------------------------------------------------

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.step())

    @rule(row=st.sampled_from([None, 0, 1, 5]))
    def step_that_fails(self, row: int | None) -> None:
        def on_run(plan: StepPlan) -> frozenset[int]:
            if row is None:
                raise RuntimeError("told to")
            return frozenset([row] if row < len(plan.rows) else [])

        self.runner.on_run, self.may_fail = on_run, True
        self.take(self.engine.step())
        self.runner.on_run, self.may_fail = lambda plan: frozenset(), False

    @rule(seconds=st.sampled_from([0.1, SAVE_TIMEOUT_S, LOOKUP_TIMEOUT_S]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    # -- the store ------------------------------------------------------------------------

    @rule(num_slots=st.sampled_from([4, 150]), is_filled=st.booleans())
    def attach_another(self, num_slots: int, is_filled: bool) -> None:
        self.attach(num_slots, is_filled)

    def attach(self, num_slots: int, is_filled: bool) -> None:
        self.arena = MemoryArena(num_slots, self.runner.page_bytes)
        self.pins.clear()
        if is_filled and num_slots > 100:
            self.arena.blocks.update(PUBLISHED.blocks)
            self.arena.copy_bytes(PUBLISHED)
        self.engine.attach_arena(self.arena)

    @precondition(lambda self: self.arena is not None)
    @rule()
    def lose_the_store(self) -> None:
        self.arena = None
        self.pins.clear()
        self.engine.attach_arena(None)

    @precondition(lambda self: self.arena is not None and self.arena.free)
    @rule(count=st.integers(1, 30))
    def grant(self, count: int) -> None:
        assert self.arena is not None
        self.engine.grant_slots([self.arena.free.pop() for _ in self.arena.free[:count]])

    @precondition(lambda self: self.lookups)
    @rule(data=st.data(), how=st.sampled_from(["all", "all", "all", "none", "half", "old"]))
    def answer(self, data: st.DataObject, how: str) -> None:
        at = data.draw(st.integers(0, len(self.lookups) - 1))
        lookup = self.lookups.pop(at)
        blocks: tuple[StoredBlock, ...] = ()
        if self.arena is not None and how != "none":
            blocks = self.arena.find(lookup)
            if how == "half":
                blocks = blocks[len(blocks) // 2 :]
            elif how == "old" and blocks:
                self.arena.outdate(blocks[-1].key)
                blocks = (*blocks[:-1], self.arena.blocks[blocks[-1].key])
            if blocks:
                self.pins[lookup.lookup_id] = self.arena
        self.engine.answer_lookup(lookup.lookup_id, blocks)

    @precondition(lambda self: self.arena is not None and self.arena.blocks)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        assert self.arena is not None
        self.arena.corrupt(data.draw(st.sampled_from(list(self.arena.blocks))))

    # -- judgement ------------------------------------------------------------------------

    def take(self, events: list[EngineEvent]) -> None:
        for event in events:
            match event:
                case OutputEvent():
                    self.take_output(event)
                case FailedEvent():
                    assert self.may_fail, "a request failed that nobody told to"
                    request = self.requests_by_id[event.request_id]
                    request.has_failed = True
                    request.num_ends += 1
                case LookupEvent() if self.answers_at_once and self.arena is not None:
                    blocks = self.arena.find(event)
                    if blocks:
                        self.pins[event.lookup_id] = self.arena
                    self.engine.answer_lookup(event.lookup_id, blocks)
                case LookupEvent():
                    self.lookups.append(event)
                case LoadedEvent():
                    self.pins.pop(event.lookup_id, None)
                case SavedEvent():
                    if self.arena is not None:
                        self.arena.commit(event)

    def take_output(self, event: OutputEvent) -> None:
        request = self.requests_by_id[event.request_id]
        assert request.num_ends == 0, "news of a request that is over"
        request.num_ends += event.is_finished
        assert 0 <= event.computed_tokens <= len(request.spec.prompt_token_ids)
        for chunk in event.chunks:
            assert chunk.index not in request.ends, "news of an output that is over"
            assert chunk.index not in request.finished
            request.tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                request.ends[chunk.index] = chunk.finish_reason

    @invariant()
    def books_hold(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.check_integrity() == []
            for request in self.requests_by_id.values():
                self.check_tokens(request)

    def check_tokens(self, request: Expected) -> None:
        for index, tokens in request.tokens.items():
            resumed = request.resumed.get(index, ())
            whole = expected_tokens(request.spec, index, context=CONTEXT)
            assert [*resumed, *tokens] == whole[: len(resumed) + len(tokens)]
            if index in request.ends:
                assert [*resumed, *tokens] == whole

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            self.take(self.engine.step())
            if self.engine.num_requests == 0 and not self.engine.has_work:
                break
            # Nobody answers any more: without work, only time ends what waits for the store.
            if self.engine.has_work:
                self.now_s += 0.002
            else:
                deadline_s = self.engine.next_deadline_s()
                assert deadline_s is not None, "nothing to do and nothing to wait for"
                assert deadline_s > self.now_s, "nothing to do at a time that is over"
                self.now_s = deadline_s
        self.now_s += SAVE_TIMEOUT_S
        self.take(self.engine.step())
        self.books_hold()
        assert self.engine.num_requests == 0
        load = self.engine.load()
        assert load.free_blocks == load.total_blocks, "pages were lost"
        assert not self.pins, "pins were lost"
        for request in self.requests_by_id.values():
            assert request.num_ends == 1
            whole = set(range(request.spec.n)) - request.finished - request.cancelled
            if not request.is_prefill_only and not request.has_failed:
                assert whole <= set(request.ends)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Nothing:
    """Draws of a request that begins anew."""

    def draw(self, strategy: object) -> bool:
        return False


def test_a_draft_that_fails_behind_a_page_to_be_copied_leaves_the_books_right() -> None:
    machine = EngineMachine()
    machine.build(
        num_pages=12,
        chunk_tokens=1,
        max_num_seqs=3,
        answers_at_once=False,
        has_store=False,
        has_drafts=True,
    )
    for length in range(1, 8):
        machine.submit(
            family=0,
            length=length,
            n=2,
            max_tokens=4,
            priority=0,
            ignore_eos=False,
            stop=frozenset(),
            is_prefill_only=False,
            data=Nothing(),
        )
        for _ in range(2 * length):
            machine.step_that_fails(row=1)
            machine.books_hold()
    machine.teardown()
