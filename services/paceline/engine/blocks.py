"""Owns the pages of the paged KV pool: who holds which page, and which pages are a cache.

A page is in exactly one of three states:

    free         no holder, no key            in `_free`
    reclaimable  no holder, but a key         in `_reclaimable` (least recently used first)
    held         one or more holders          `_holders[page] > 0`, with or without a key

`_page_of_key` maps the key of a full block to the one page that serves prefix hits for it.
No tensors here; scheduler.py and kv_exchange.py call this file.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Allocates, shares and frees pages; finds pages by block key."""

    def __init__(self, num_pages: int) -> None:
        self._holders = [0] * num_pages
        self._key_of_page: list[bytes | None] = [None] * num_pages
        self._page_of_key: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._reclaimable: OrderedDict[int, None] = OrderedDict()
        self.num_evictions = 0

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return len(self._holders)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free) + len(self._reclaimable)

    @property
    def num_cached(self) -> int:
        """Pages that serve prefix hits, held or not."""
        return len(self._page_of_key)

    def unused(self, count: int) -> list[int]:
        """Return so many pages that nobody holds and nothing is found in, or none."""
        return self._free[len(self._free) - count :] if 0 < count <= len(self._free) else []

    def allocate(self) -> int | None:
        """Hand out a page with one holder and no key, evicting the coldest cached one."""
        if self._free:
            page = self._free.pop()
        elif self._reclaimable:
            page, _ = self._reclaimable.popitem(last=False)
            self._forget_key(page)
            self.num_evictions += 1
        else:
            return None
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """Add a holder to a held or reclaimable page and return the page."""
        if self._holders[page] == 0:
            del self._reclaimable[page]
        self._holders[page] += 1
        return page

    def free(self, pages: Iterable[int]) -> None:
        """Take one holder off each page; pages with a key stay findable until reclaimed."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} has no holder"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._key_of_page[page] is None:
                    self._free.append(page)
                else:
                    self._reclaimable[page] = None

    def num_holders(self, page: int) -> int:
        """Return how many hold the page."""
        return self._holders[page]

    def num_exclusive(self, pages: Iterable[int]) -> int:
        """Count the pages that would have no holder if one holder of each let go."""
        return sum(self._holders[page] == 1 for page in pages)

    def key_of(self, page: int) -> bytes | None:
        """Return the key of the block that the page caches, or None."""
        return self._key_of_page[page]

    def find(self, key: bytes) -> int | None:
        """Return the page that caches the block, or None. Does not add a holder."""
        return self._page_of_key.get(key)

    def register(self, page: int, key: bytes) -> None:
        """Let a held, full page serve prefix hits; a second page of the same key stays private."""
        assert self._holders[page] > 0, f"page {page} has no holder"
        if key not in self._page_of_key and self._key_of_page[page] is None:
            self._page_of_key[key] = page
            self._key_of_page[page] = key

    def check_integrity(self, held: Iterable[int]) -> list[str]:
        """Compare the books with the pages that callers say they hold; return what is wrong."""
        expected = Counter(held)
        problems = [
            f"page {page}: {count} holders on the books, {expected[page]} in use"
            for page, count in enumerate(self._holders)
            if count != expected[page]
        ]
        idle = Counter(self._free) + Counter(self._reclaimable.keys())
        for page, count in enumerate(self._holders):
            if idle[page] != (0 if count else 1):
                problems.append(f"page {page}: {count} holders, {idle[page]} times idle")
        for page, key in enumerate(self._key_of_page):
            if key is not None and self._page_of_key.get(key) != page:
                problems.append(f"page {page} has key {key.hex()} and is not found by it")
        if len(self._page_of_key) != sum(key is not None for key in self._key_of_page):
            problems.append("keys point to pages that do not have them")
        problems += [
            f"page {page} is free with a key"
            for page in self._free
            if self._key_of_page[page] is not None
        ]
        problems += [
            f"page {page} is reclaimable without a key"
            for page in self._reclaimable
            if self._key_of_page[page] is None
        ]
        return problems

    def _forget_key(self, page: int) -> None:
        key = self._key_of_page[page]
        if key is not None:
            self._key_of_page[page] = None
            del self._page_of_key[key]
