"""Checks sequences against queues, page tables and cache; finds what a lost page looks like.

Read-only and complete rather than fast; the scheduler's and the engine's `check_integrity`
call it, for tests and for the worker's diagnosis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from paceline.engine.blocks import BlockPool
from paceline.engine.request import Phase, Request, Sequence


def check_queues(
    waiting: list[Sequence], running: list[Sequence], pool: BlockPool, block_size: int
) -> list[str]:
    """Return what is wrong with the sequences of the two queues."""
    problems = [
        f"sequence {id}: {count} times in the queues"
        for id, count in Counter(s.id for s in [*waiting, *running]).items()
        if count > 1
    ]
    for name, queue in (("waiting", waiting), ("running", running)):
        if queue != sorted(queue, key=Sequence.order):
            problems.append(f"{name} sequences out of order")
    for s in waiting:
        if s.phase is not Phase.WAITING:
            problems.append(f"sequence {s.id}: waits and is {s.phase.value}")
        if s.held_pages or s.num_computed or s.num_registered:
            problems.append(f"sequence {s.id}: waits with pages or computed tokens")
    num_users = Counter(page for s in running for page in s.pages)
    for s in running:
        problems += [f"sequence {s.id}: {text}" for text in _check_running(s, pool, block_size)]
        for page in s.pages[s.num_computed // block_size :]:
            if num_users[page] > 1 or pool.key_of(page) is not None:
                problems.append(f"sequence {s.id}: writes to page {page}, which others read")
    return problems


def _check_running(s: Sequence, pool: BlockPool, block_size: int) -> list[str]:
    problems: list[str] = []
    if s.phase is not Phase.RUNNING:
        problems.append(f"runs and is {s.phase.value}")
    if not 0 <= s.num_computed <= min(len(s.pages) * block_size, len(s.token_ids)):
        problems.append(
            f"{s.num_computed} computed, {len(s.pages)} pages, {len(s.token_ids)} tokens"
        )
    if s.num_remaining < 0:
        problems.append(f"{s.num_computed} computed behind its target")
    if len(set(s.pages)) != len(s.pages):
        problems.append("holds a page twice")
    # Behind it there may be pages for a draft that failed.
    if s.pending_copy is not None and s.pending_copy[1] != s.pages[s.num_computed // block_size]:
        problems.append("is to be copied to a page that is not its next")
    num_full = s.num_computed // block_size
    if s.num_registered > num_full:
        problems.append(f"{s.num_registered} blocks registered, {num_full} full")
    keys = s.block_keys(num_full, block_size)
    for page, key in zip(s.pages, keys, strict=False):
        if pool.key_of(page) not in (key, None):
            problems.append(f"page {page} is cached under another key")
    return problems


def check_requests(
    requests: Mapping[str, Request],
    queued: list[Sequence],
    num_saves_of: Callable[[Request], int],
) -> list[str]:
    """Return where requests, queued sequences and pending saves do not agree."""
    problems: list[str] = []
    for sequence in queued:
        request = sequence.request
        if requests.get(request.spec.request_id) is not request:
            problems.append(f"sequence {sequence.id}: its request is over")
        if sequence not in request.sequences:
            problems.append(f"sequence {sequence.id}: its request does not know it")
    for request in requests.values():
        alive = [s for s in request.sequences if s.phase is not Phase.FINISHED]
        if not alive or not {s.id for s in alive} <= {s.id for s in queued}:
            problems.append(f"request {request.spec.request_id}: sequences in no queue")
        if request.num_unsaved != num_saves_of(request):
            problems.append(f"request {request.spec.request_id}: unsaved blocks miscounted")
    return problems
