"""The contract of eviction policies, and what S3-FIFO is chosen for."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.kvstore.policy import POLICIES, KVPolicy, create_policy
from tests.unit.kvstore.memory_space import key_of

Step = tuple[str, int]
ACTIONS = st.sampled_from(["admit", "touch", "remove", "evict"])
STEPS = st.lists(st.tuples(ACTIONS, st.integers(0, 12)))


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> KVPolicy:
    """Return an empty policy of each kind."""
    return create_policy(request.param)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(steps=STEPS, pinned=st.frozensets(st.integers(0, 12)))
def test_a_policy_knows_exactly_the_blocks_it_was_given(
    name: str, steps: list[Step], pinned: frozenset[int]
) -> None:
    policy = create_policy(name)
    known: set[bytes] = set()
    for action, number in steps:
        key = key_of(number)
        if action == "admit" and key not in known:
            policy.admit(key)
            known.add(key)
        elif action == "touch" and key in known:
            policy.touch(key)
        elif action == "remove":
            policy.remove(key)
            known.discard(key)
        elif action == "evict":
            free = known - {key_of(n) for n in pinned}
            victims = policy.victims(number, lambda k, free=free: k in free)  # type: ignore[misc]
            assert len(victims) == len(set(victims)) == min(number, len(free))
            assert set(victims) <= free
            known -= set(victims)
        assert len(policy) == len(known)


def test_blocks_in_use_are_never_chosen(policy: KVPolicy) -> None:
    for number in range(10):
        policy.admit(key_of(number))
    assert policy.victims(10, lambda key: False) == []
    assert policy.victims(10, lambda key: key == key_of(7)) == [key_of(7)]
    assert len(policy) == 9


def test_a_policy_repeats_itself() -> None:
    runs = [replay(create_policy("s3fifo"), trace(seed=3), capacity=50) for _ in range(2)]
    assert runs[0] == runs[1]


def test_s3fifo_keeps_shared_prefixes_through_prompts_seen_once() -> None:
    fifo = replay(create_policy("fifo"), trace(seed=1), capacity=100)
    s3fifo = replay(create_policy("s3fifo"), trace(seed=1), capacity=100)
    lru = replay_lru(trace(seed=1), capacity=100)
    assert s3fifo > 1.2 * fifo
    assert s3fifo > lru


def trace(seed: int) -> list[int]:
    """Return accesses: half to 80 shared blocks, half to blocks that never come back."""
    draw = random.Random(seed)
    fresh = iter(range(1000, 100_000))
    return [draw.randrange(80) if draw.random() < 0.5 else next(fresh) for _ in range(8000)]


def replay(policy: KVPolicy, accesses: list[int], capacity: int) -> int:
    """Return the number of hits of a cache that holds `capacity` blocks."""
    held: set[bytes] = set()
    hits = 0
    for number in accesses:
        key = key_of(number)
        if key in held:
            hits += 1
            policy.touch(key)
            continue
        if len(held) == capacity:
            held.difference_update(policy.victims(1, lambda _: True))
        policy.admit(key)
        held.add(key)
    return hits


def replay_lru(accesses: list[int], capacity: int) -> int:
    """Return the number of hits under least-recently-used."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in accesses:
        hits += number in held
        held[number] = None
        held.move_to_end(number)
        if len(held) > capacity:
            held.popitem(last=False)
    return hits
