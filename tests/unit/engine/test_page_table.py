"""A page table is a list of pages with an array that never changes behind a step's back."""

from __future__ import annotations

import pytest

from paceline.engine.page_table import PageTable


@pytest.mark.parametrize("num_first", [0, 1, 15, 16, 17, 40])
def test_the_array_is_the_list(num_first: int) -> None:
    expected = list(range(100, 100 + num_first))
    table = PageTable(expected)
    for page in range(70):
        assert list(table) == expected == table.ids.tolist()
        assert len(table) == len(expected)
        table.append(page)
        expected.append(page)
    assert (table[-1], table[:3]) == (69, expected[:3])


def test_a_view_keeps_what_it_showed_while_pages_are_added() -> None:
    table = PageTable([7, 8])
    views = []
    for page in range(50):
        views.append((table.ids, table.ids.tolist()))
        table.append(page)
    assert all(view.tolist() == shown for view, shown in views)


def test_adding_a_page_does_not_copy_the_others() -> None:
    table = PageTable(range(20))
    before = table.ids
    table.append(1)
    assert table.ids.base is before.base
