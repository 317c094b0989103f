"""Blocks to and from the KV store: what is asked, written, read, given up and handed back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from paceline.domain.request import GenerationSpec
from paceline.engine import kv_exchange, lookups
from paceline.engine.engine import Engine
from paceline.engine.events import EngineEvent, LoadedEvent, LookupEvent, OutputEvent, SavedEvent
from paceline.engine.kv_exchange import SAVE_TIMEOUT_S
from paceline.engine.lookups import LOOKUP_TIMEOUT_S, MAX_LOOKUPS
from paceline.engine.ports import Slot
from tests.unit.engine.fake_runner import FakeRunner, expected_tokens, fake_engine, prompt_of
from tests.unit.engine.memory_arena import MemoryArena, run_until_idle, tokens_of

PAGE_BYTES = 4 * 16
"""Bytes of a fake page of four tokens."""


@dataclass
class Rig:
    """An engine, its clock and what came out of it; the test plays the worker."""

    engine: Engine
    runner: FakeRunner
    now_s: float = 0.0
    events: list[EngineEvent] = field(default_factory=list)

    @classmethod
    def make(cls, **options: int) -> Rig:
        rig: Rig
        engine, runner = fake_engine(clock=lambda: rig.now_s, **options)  # type: ignore[arg-type]
        rig = cls(engine, runner)
        return rig

    def step(self, count: int = 1) -> list[EngineEvent]:
        new: list[EngineEvent] = []
        for _ in range(count):
            new += self.engine.step()
            assert self.engine.check_integrity() == []
        self.events += new
        return new

    def lookups(self) -> list[LookupEvent]:
        return [e for e in self.events if isinstance(e, LookupEvent)]

    def loaded(self) -> list[LoadedEvent]:
        return [e for e in self.events if isinstance(e, LoadedEvent)]

    def saved_keys(self) -> list[bytes]:
        return [b.key for e in self.events if isinstance(e, SavedEvent) for b in e.blocks]

    def outputs(self, name: str) -> list[OutputEvent]:
        return [e for e in self.events if isinstance(e, OutputEvent) and e.request_id == name]


def spec_of(name: str = "r", length: int = 18, **fields: object) -> GenerationSpec:
    prompt = prompt_of(name, length)
    defaults: dict[str, object] = {"max_tokens": 6, "ignore_eos": True}
    return GenerationSpec(name, prompt, **{**defaults, **fields})  # type: ignore[arg-type]


def new_arena(num_slots: int = 200) -> MemoryArena:
    return MemoryArena(num_slots, PAGE_BYTES)


def publish(arena: MemoryArena, *specs: GenerationSpec) -> None:
    """Let another engine compute prompts and leave them in the arena."""
    engine, _ = fake_engine(num_pages=64)
    engine.attach_arena(arena)
    for spec in specs:
        engine.submit(spec, is_prefill_only=True)
    run_until_idle(engine, arena)
    assert engine.check_integrity() == []


# -- hits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 16, 17, 18, 19])
def test_a_published_prompt_is_not_computed_again(length: int, n: int) -> None:
    arena, spec = new_arena(), spec_of(length=length, n=n)
    publish(arena, spec)
    engine, runner = fake_engine()
    engine.attach_arena(arena)
    engine.submit(spec)
    events = run_until_idle(engine, arena)["r"]
    assert events[0].store_hit_tokens == length - 1
    for index in range(n):
        assert tokens_of(events, index) == expected_tokens(spec, index, context=128)
    assert sum(plan.num_tokens for plan in runner.plans) == n * 6
    assert not arena.pinned


def test_a_tail_belongs_to_one_request_in_the_fleet() -> None:
    arena, spec = new_arena(), spec_of()
    publish(arena, spec)
    for fleet_id, expected in [("r", 17), ("other", 16)]:
        engine, _ = fake_engine()
        engine.attach_arena(arena)
        engine.submit(replace(spec, request_id="r#2"), fleet_id=fleet_id)
        events = run_until_idle(engine, arena)["r#2"]
        assert events[0].store_hit_tokens == expected


def test_blocks_of_another_tenant_are_not_found() -> None:
    arena, spec = new_arena(), spec_of()
    publish(arena, spec)
    engine, _ = fake_engine()
    engine.attach_arena(arena)
    engine.submit(replace(spec, cache_salt=b"tenant"))
    assert run_until_idle(engine, arena)["r"][0].store_hit_tokens == 0


def test_a_decode_leaves_its_full_blocks_for_the_next_turn() -> None:
    arena, spec = new_arena(), spec_of(length=18, max_tokens=20)
    engine, _ = fake_engine()
    engine.attach_arena(arena)
    engine.submit(spec)
    output = tokens_of(run_until_idle(engine, arena)["r"])
    turn = GenerationSpec("t", (*spec.prompt_token_ids, *output, 1, 2), max_tokens=3)
    other, _ = fake_engine()
    other.attach_arena(arena)
    other.submit(turn)
    # The last token of an output is never computed: 37 of 38 tokens, in blocks of four.
    assert run_until_idle(other, arena)["t"][0].store_hit_tokens == 36


def test_a_prefill_publishes_also_what_it_had_at_hand_and_nothing_twice() -> None:
    arena, spec = new_arena(), spec_of(length=19)
    rig = Rig.make()
    rig.engine.submit(replace(spec, request_id="before"))
    run_until_idle(rig.engine)
    rig.engine.attach_arena(arena)
    for name, expected in [("p1", 5), ("p2", 1)]:
        rig.events.clear()
        rig.engine.submit(replace(spec, request_id=name), is_prefill_only=True)
        while rig.engine.num_requests:
            rig.engine.grant_slots([arena.free.pop()])
            for event in rig.step():
                if isinstance(event, LookupEvent):
                    rig.engine.answer_lookup(event.lookup_id, arena.find(event))
                elif isinstance(event, SavedEvent):
                    arena.commit(event)
        # Four full blocks and the tail at first; then the tail of the other request only.
        assert len(rig.saved_keys()) == expected


# -- asking -------------------------------------------------------------------------------


def test_a_burst_asks_few_at_a_time_and_everybody_gets_an_answer() -> None:
    arena = new_arena()
    specs = [spec_of(f"r{i:02}", length=9) for i in range(30)]
    publish(arena, *specs)
    rig = Rig.make(num_pages=200, max_num_seqs=32)
    rig.engine.attach_arena(arena)
    for spec in specs:
        rig.engine.submit(spec)
    for _ in range(30):
        for event in rig.step():
            if isinstance(event, LookupEvent):
                rig.engine.answer_lookup(event.lookup_id, arena.find(event))
                assert len(arena.pinned) <= MAX_LOOKUPS
            elif isinstance(event, LoadedEvent):
                arena.pinned.discard(event.lookup_id)
    assert [rig.outputs(s.request_id)[0].store_hit_tokens for s in specs] == [8] * 30
    assert not arena.pinned


def test_only_those_ask_who_could_start() -> None:
    rig = Rig.make(max_num_seqs=3)
    rig.engine.attach_arena(new_arena())
    for i in range(10):
        rig.engine.submit(spec_of(f"r{i}"))
    rig.step(3)
    assert [e.request_id for e in rig.lookups()] == ["r0", "r1", "r2"]


def test_waiting_for_the_store_is_no_work_and_ends_in_time() -> None:
    rig = Rig.make(max_num_seqs=16, num_pages=100)
    rig.engine.attach_arena(new_arena())
    for i in range(MAX_LOOKUPS + 4):
        rig.engine.submit(spec_of(f"r{i}"))
    rig.step()
    assert len(rig.lookups()) == MAX_LOOKUPS
    # Those who could not ask yet wait for the same time, not for their turn.
    assert not rig.engine.has_work
    assert rig.engine.next_deadline_s() == LOOKUP_TIMEOUT_S
    rig.now_s = LOOKUP_TIMEOUT_S
    assert rig.engine.has_work
    rig.step(60)
    for i in range(MAX_LOOKUPS + 4):
        output = tokens_of(rig.outputs(f"r{i}"))
        assert output == expected_tokens(spec_of(f"r{i}"), 0, context=400)


def test_a_lookup_that_is_overdue_is_no_deadline_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the host would spin while the sequences have to wait for something else."""
    monkeypatch.setattr(lookups, "MAX_LOOKUPS", 1)
    rig = Rig.make(max_num_seqs=2)
    rig.engine.attach_arena(new_arena())
    for i in range(2):
        rig.engine.submit(spec_of(f"low{i}"))
    rig.step()
    rig.now_s = LOOKUP_TIMEOUT_S - 1
    for i in range(2):
        rig.engine.submit(spec_of(f"high{i}", priority=1), is_prefill_only=True)
        rig.step()
        rig.engine.answer_lookup(rig.lookups()[-1].lookup_id, ())
        rig.step(4)
    # One of the low ones was asked for and gave way, the other never had its turn.
    assert [e.request_id for e in rig.lookups()][:3] == ["low0", "high0", "low0"]
    rig.now_s = LOOKUP_TIMEOUT_S
    rig.step()
    # The prefills have their places until their blocks are written or given up.
    assert not rig.engine.has_work
    assert rig.engine.next_deadline_s() == LOOKUP_TIMEOUT_S - 1 + SAVE_TIMEOUT_S


def test_an_answer_that_comes_late_is_handed_back() -> None:
    arena, spec = new_arena(), spec_of()
    publish(arena, spec)
    rig = Rig.make()
    rig.engine.attach_arena(arena)
    rig.engine.submit(spec)
    (lookup,) = [e for e in rig.step() if isinstance(e, LookupEvent)]
    assert not rig.engine.has_work
    rig.now_s = LOOKUP_TIMEOUT_S
    rig.step()
    rig.engine.answer_lookup(lookup.lookup_id, arena.find(lookup))
    rig.engine.answer_lookup(lookup.lookup_id, arena.find(lookup))
    rig.engine.answer_lookup(999, arena.find(lookup))
    rig.step()
    handed_back = [(e.lookup_id, e.num_blocks) for e in rig.loaded()]
    assert handed_back == [(lookup.lookup_id, 0), (lookup.lookup_id, 0), (999, 0)]


def test_an_empty_answer_needs_no_release() -> None:
    rig = Rig.make()
    rig.engine.attach_arena(new_arena())
    rig.engine.submit(spec_of())
    (lookup,) = [e for e in rig.step() if isinstance(e, LookupEvent)]
    rig.engine.answer_lookup(lookup.lookup_id, ())
    rig.step(20)
    assert rig.loaded() == []
    assert rig.outputs("r")[-1].is_finished


@pytest.mark.parametrize("answered", [False, True])
def test_a_request_cancelled_while_it_waits_gives_its_pins_back(answered: bool) -> None:
    arena, spec = new_arena(), spec_of()
    publish(arena, spec)
    rig = Rig.make(max_num_seqs=1)
    rig.engine.submit(spec_of("first", max_tokens=50))
    rig.step()
    rig.engine.attach_arena(arena)
    rig.engine.submit(replace(spec, priority=1))
    (lookup,) = [e for e in rig.step() if isinstance(e, LookupEvent)]
    if answered:
        rig.engine.answer_lookup(lookup.lookup_id, arena.find(lookup))
    rig.engine.cancel("r")
    if not answered:
        rig.engine.answer_lookup(lookup.lookup_id, arena.find(lookup))
    rig.step()
    assert [e.lookup_id for e in rig.loaded()] == [lookup.lookup_id]


def test_a_higher_priority_asks_before_those_who_hold_pins() -> None:
    arena = new_arena()
    low = [spec_of(f"low{i}", length=12) for i in range(MAX_LOOKUPS)]
    high = spec_of("high", length=12, priority=1)
    publish(arena, *low, high)
    rig = Rig.make(max_num_seqs=16, num_pages=8)
    rig.engine.submit(spec_of("busy", length=20, max_tokens=8, priority=2))
    rig.step(3)
    rig.engine.attach_arena(arena)
    for spec in low:
        rig.engine.submit(spec)
    for event in rig.step():
        if isinstance(event, LookupEvent):
            rig.engine.answer_lookup(event.lookup_id, arena.find(event))
    rig.engine.submit(high)
    asked = [e for e in rig.step() if isinstance(e, LookupEvent)]
    assert [e.request_id for e in asked] == ["high"]
    # The last of the others gave its pins back and asks again later.
    assert len(rig.loaded()) == 1
    for _ in range(200):
        for event in rig.step():
            if isinstance(event, LookupEvent):
                asked.append(event)
                rig.engine.answer_lookup(event.lookup_id, arena.find(event))
    rig.engine.answer_lookup(asked[0].lookup_id, ())
    rig.step(100)
    for spec in [*low, high]:
        output = tokens_of(rig.outputs(spec.request_id))
        assert output == expected_tokens(spec, 0, context=32)


def test_a_preempted_sequence_finds_its_own_output_in_the_store() -> None:
    arena, spec = new_arena(), spec_of(length=6, max_tokens=30)
    rig = Rig.make(num_pages=12, max_num_seqs=1)
    rig.engine.attach_arena(arena)
    rig.engine.grant_slots([arena.free.pop() for _ in range(100)])
    rig.engine.submit(spec)
    sent: list[int] = []

    def play(steps: int) -> None:
        for _ in range(steps):
            for event in rig.step():
                if isinstance(event, LookupEvent):
                    rig.engine.answer_lookup(event.lookup_id, arena.find(event))
                elif isinstance(event, SavedEvent):
                    arena.commit(event)

    play(20)
    # A request of higher priority that needs the whole pool takes every page of the other.
    rig.engine.submit(spec_of("high", length=40, max_tokens=8, priority=1))
    sent.append(rig.engine.load().num_evictions)
    play(60)
    assert rig.engine.load().num_preemptions == 1
    assert tokens_of(rig.outputs("r")) == expected_tokens(spec, 0, context=48)
    read = [e.num_blocks for e in rig.loaded()]
    assert max(read) >= 4, "output blocks were computed again instead of read"


# -- bad blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bytes", "generation", "tokens", "offset", "lost"])
def test_a_bad_block_is_computed_instead(damage: str) -> None:
    arena, spec = new_arena(), spec_of()
    publish(arena, spec)
    rig = Rig.make()
    rig.engine.attach_arena(arena)
    rig.engine.submit(spec)
    (lookup,) = [e for e in rig.step() if isinstance(e, LookupEvent)]
    key = lookup.keys[2]
    match damage:
        case "bytes":
            arena.corrupt(key)
        case "generation":
            arena.outdate(key)
        case "tokens":
            arena.blocks[key] = replace(arena.blocks[key], num_tokens=3)
        case "offset":
            arena.blocks[key] = replace(arena.blocks[key], slot=Slot(1 << 40, 1))
        case "lost":
            arena.blocks.pop(key)
    rig.engine.answer_lookup(lookup.lookup_id, arena.find(lookup))
    rig.step(20)
    assert rig.outputs("r")[0].store_hit_tokens == 8
    assert tokens_of(rig.outputs("r")) == expected_tokens(spec, 0, context=128)
    corrupt = [k for e in rig.loaded() for k in e.corrupt_keys]
    assert corrupt == ([] if damage == "lost" else [key])


def test_a_store_that_answers_nonsense_changes_no_token() -> None:
    arena, spec, other = new_arena(), spec_of(), spec_of("q")
    publish(arena, spec, other)
    rig = Rig.make()
    rig.engine.attach_arena(arena)
    rig.engine.submit(spec)
    (lookup,) = [e for e in rig.step() if isinstance(e, LookupEvent)]
    mine, strange = arena.find(lookup), [b for b in arena.blocks.values()]
    swapped = tuple(replace(a, slot=b.slot) for a, b in zip(mine, strange[::-1], strict=False))
    rig.engine.answer_lookup(lookup.lookup_id, (*swapped, *strange))
    rig.step(20)
    assert tokens_of(rig.outputs("r")) == expected_tokens(spec, 0, context=128)


# -- writing ------------------------------------------------------------------------------


def test_a_slot_outside_of_the_arena_is_skipped() -> None:
    arena = new_arena()
    rig = Rig.make()
    rig.engine.attach_arena(arena)
    rig.engine.submit(spec_of(length=17), is_prefill_only=True)
    rig.step()
    rig.engine.answer_lookup(rig.lookups()[0].lookup_id, ())
    rig.engine.grant_slots([Slot(-64, 1), Slot(1 << 40, 1), *(arena.free.pop() for _ in range(4))])
    rig.step(10)
    assert len(rig.saved_keys()) == 4
    assert rig.engine.num_requests == 0


def test_without_slots_a_prefill_ends_when_its_blocks_are_given_up() -> None:
    rig = Rig.make()
    rig.engine.attach_arena(new_arena())
    rig.engine.submit(spec_of(), is_prefill_only=True)
    rig.step()
    rig.engine.answer_lookup(rig.lookups()[0].lookup_id, ())
    rig.step(5)
    assert rig.engine.num_requests == 1
    assert not rig.engine.has_work
    assert rig.engine.next_deadline_s() == SAVE_TIMEOUT_S
    rig.now_s = SAVE_TIMEOUT_S
    rig.step()
    assert rig.engine.num_requests == 0
    assert rig.engine.load().free_blocks == 32


def test_slots_of_a_store_that_is_gone_are_never_written() -> None:
    first, second = new_arena(), new_arena()
    rig = Rig.make()
    rig.engine.grant_slots([Slot(0, 1)])
    rig.engine.attach_arena(first)
    rig.engine.grant_slots([first.free.pop() for _ in range(50)])
    rig.engine.attach_arena(None)
    assert first.is_closed
    rig.engine.grant_slots([first.free.pop() for _ in range(50)])
    rig.engine.attach_arena(second)
    rig.engine.submit(spec_of(length=17), is_prefill_only=True)
    rig.step()
    rig.engine.answer_lookup(rig.lookups()[0].lookup_id, ())
    rig.step(5)
    assert rig.saved_keys() == []
    rig.engine.grant_slots([second.free.pop() for _ in range(4)])
    rig.step()
    assert len(rig.saved_keys()) == 4


def test_losing_the_store_ends_every_wait() -> None:
    arena = new_arena()
    rig = Rig.make(max_num_seqs=32)
    rig.engine.attach_arena(arena)
    rig.engine.submit(spec_of("p"), is_prefill_only=True)
    rig.step()
    rig.engine.answer_lookup(rig.lookups()[0].lookup_id, ())
    rig.step(4)
    specs = [spec_of(f"r{i}", length=5) for i in range(20)]
    for spec in specs:
        rig.engine.submit(spec)
    rig.step()
    assert not rig.engine.has_work
    rig.engine.attach_arena(None)
    rig.step(40)
    assert rig.outputs("p")[-1].is_finished
    for spec in specs:
        output = tokens_of(rig.outputs(spec.request_id))
        assert output == expected_tokens(spec, 0, context=128)


def test_one_step_writes_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_exchange, "SAVE_BYTES_PER_STEP", 3 * PAGE_BYTES)
    arena = new_arena()
    rig = Rig.make(chunk_tokens=64)
    rig.engine.attach_arena(arena)
    rig.engine.submit(spec_of(length=41), is_prefill_only=True)
    rig.step()
    rig.engine.answer_lookup(rig.lookups()[0].lookup_id, ())
    rig.engine.grant_slots([arena.free.pop() for _ in range(20)])
    sizes = []
    while rig.engine.num_requests:
        # What is left is work, although nothing is left to compute.
        assert rig.engine.has_work
        sizes += [len(e.blocks) for e in rig.step() if isinstance(e, SavedEvent)]
    assert sizes == [3, 3, 3, 1]


def test_outputs_of_one_prompt_save_its_blocks_once() -> None:
    arena = new_arena()
    rig = Rig.make()
    rig.engine.attach_arena(arena)
    rig.engine.grant_slots([arena.free.pop() for _ in range(50)])
    rig.engine.submit(spec_of(length=17, n=4, max_tokens=2))
    rig.step()
    rig.engine.answer_lookup(rig.lookups()[0].lookup_id, ())
    rig.step(10)
    assert len(rig.saved_keys()) == 4


def test_saves_give_way_before_anybody_is_preempted() -> None:
    rig = Rig.make(num_pages=32)
    specs = [spec_of(name, length=38, max_tokens=14) for name in ("a", "b")]
    for spec in specs:
        rig.engine.submit(replace(spec, max_tokens=1))
        run_until_idle(rig.engine)
    rig.engine.attach_arena(new_arena())
    for spec in [spec_of("gone", length=41, max_tokens=1), *specs]:
        rig.engine.submit(spec)
        rig.step()
        rig.engine.answer_lookup(rig.lookups()[-1].lookup_id, ())
        rig.step(6)
    # Ten pages of the request that is over wait for slots that do not come.
    rig.step(30)
    assert rig.engine.load().num_preemptions == 0
    for spec in specs:
        output = tokens_of(rig.outputs(spec.request_id))
        assert output == expected_tokens(spec, 0, context=128)


def test_pages_held_for_the_store_do_not_split_a_chunk() -> None:
    rig = Rig.make(num_pages=16, chunk_tokens=64)
    rig.engine.attach_arena(new_arena())
    for spec in (spec_of("gone", length=30, max_tokens=1), spec_of("big", length=60)):
        rig.engine.submit(spec)
        rig.step()
        rig.engine.answer_lookup(rig.lookups()[-1].lookup_id, ())
        rig.step()
    assert [plan.num_tokens for plan in rig.runner.plans] == [30, 60]
    rig.step(5)
    assert tokens_of(rig.outputs("big")) == expected_tokens(spec, 0, context=64)


# -- forks --------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_blocks_loaded_into_pages_of_a_cancelled_fork_stay_whole(victim: int) -> None:
    """A copy that is pending when its source or destination goes must hit nobody's page."""
    arena, newcomer = new_arena(), spec_of("new", length=20)
    publish(arena, newcomer)
    rig = Rig.make(chunk_tokens=64)
    rig.engine.attach_arena(arena)
    spec = spec_of(length=7, n=3, max_tokens=5)
    rig.engine.submit(spec)
    rig.engine.submit(newcomer)
    mine, its = (e for e in rig.step() if isinstance(e, LookupEvent))
    rig.engine.answer_lookup(mine.lookup_id, ())
    rig.step()
    assert [len(plan.page_copies) for plan in rig.runner.plans] == [0]
    # The pages that the cancellation sets free are the next to be taken, and loaded into.
    rig.engine.answer_lookup(its.lookup_id, arena.find(its))
    rig.engine.cancel("r", victim)
    rig.step(40)
    for index in {0, 1, 2} - {victim}:
        output = tokens_of(rig.outputs("r"), index)
        assert output == expected_tokens(spec, index, context=128)
    assert tokens_of(rig.outputs("new")) == expected_tokens(newcomer, 0, context=128)
