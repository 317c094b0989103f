"""Checks the books of a node against each other; tests run it after every step."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.kvstore.store import BlockStore


def check_books(store: BlockStore) -> list[str]:
    """Return all broken invariants of a store: slots owned once, pins counted, policy complete."""
    return [*_check_slots(store), *_check_pins(store), *_check_policies(store)]


def _check_slots(store: BlockStore) -> list[str]:
    owners: Counter[int] = Counter(store.shelves.slots.free_offsets())
    owners.update(offset for _, offset in store.quarantine)
    owners.update(iter(store.shelves.dropped))
    for session in store.sessions.values():
        owners.update(iter(session.reserved))
    for layout in store.shelves.layouts.values():
        owners.update(block.slot.offset for block in layout.blocks.values())
    known = set(store.shelves.slots.all_offsets())
    problems = [f"slot {offset} owned {n} times" for offset, n in owners.items() if n > 1]
    problems += [f"slot {offset} lost" for offset in known - owners.keys()]
    problems += [f"slot {offset} in no slab" for offset in owners.keys() - known]
    return problems


def _check_pins(store: BlockStore) -> list[str]:
    pins: Counter[int] = Counter(
        id(pin.block)
        for session in store.sessions.values()
        for queue in session.pins.values()
        for pin in queue
    )
    layouts = store.shelves.layouts.values()
    blocks = [block for layout in layouts for block in layout.blocks.values()]
    blocks += store.shelves.dropped.values()
    problems = [
        f"block {block.key.hex()} counts {block.num_pins} pins, sessions hold {pins[id(block)]}"
        for block in blocks
        if block.num_pins != pins[id(block)]
    ]
    problems += [
        f"dropped block {block.key.hex()} is not pinned"
        for block in store.shelves.dropped.values()
        if not block.num_pins
    ]
    if pins.keys() - {id(block) for block in blocks}:
        problems.append("a session pins a block that is gone")
    return problems


def _check_policies(store: BlockStore) -> list[str]:
    problems = []
    for layout in store.shelves.layouts.values():
        tails = {key for key, block in layout.blocks.items() if block.is_request_scoped}
        if tails != layout.tails.keys():
            problems.append("tails differ from request-scoped blocks")
        if len(layout.policy) != len(layout.blocks) - len(tails):
            problems.append("the policy knows another number of blocks")
    return problems
