"""The pages of one sequence, in order, also as an array that steps can hand on uncopied.

    ids  [p0 p1 p2 ...... pn | room to grow]
         a view does not change while pages are added: they go into memory behind it

request.py's sequences own them, scheduler.py and kv_exchange.py add pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import overload

import numpy as np
import numpy.typing as npt

PageIds = npt.NDArray[np.int32]

_LEAST_ROOM = 16
"""Pages there is room for at first: 256 tokens with the default block size."""


class PageTable:
    """A list of pages."""

    __slots__ = ("_buffer", "_pages", "ids")

    def __init__(self, pages: Iterable[int] = ()) -> None:
        self._pages = list(pages)
        self._buffer = np.empty(max(_LEAST_ROOM, 2 * len(self._pages)), dtype=np.int32)
        self._buffer[: len(self._pages)] = self._pages
        self.ids: PageIds = self._buffer[: len(self._pages)]

    def append(self, page: int) -> None:
        """Add a page behind the others."""
        end = len(self._pages)
        if end == len(self._buffer):
            # Twice the room each time: on average a page is copied once.
            grown = np.empty(2 * end, dtype=np.int32)
            grown[:end] = self._buffer
            self._buffer = grown
        self._buffer[end] = page
        self._pages.append(page)
        self.ids = self._buffer[: end + 1]

    def pop(self) -> int:
        """Take the last page off. No view of it may be in use: the next one takes its place."""
        page = self._pages.pop()
        self.ids = self._buffer[: len(self._pages)]
        return page

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[int]:
        return iter(self._pages)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._pages[index]
