"""Shows streaming answers: a live table on a terminal, finished ones line by line elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from paceline.cli.demo.asking import Answer

_PROMPT_CHARS = 34
_TEXT_CHARS = 300


class Board:
    """The answers of one round of requests."""

    def __init__(self, console: Console, prompts: list[str]) -> None:
        self._console = console
        self._prompts = prompts
        self._answers: dict[int, Answer] = {}
        self._live = Live(
            console=console, get_renderable=self._table, refresh_per_second=8, transient=True
        )

    def show(self, index: int, answer: Answer) -> None:
        """Note what an answer has become."""
        self._answers[index] = answer
        if not self._console.is_terminal and (answer.is_complete or answer.error):
            self._console.print(self._line(index), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(width=_PROMPT_CHARS, no_wrap=True, overflow="ellipsis", style="dim")
        table.add_column(no_wrap=True, overflow="ellipsis")
        room = max(20, self._console.width - _PROMPT_CHARS - 2)
        for index, prompt in enumerate(self._prompts):
            text = self._text(index)
            table.add_row(Text(prompt), Text(text[-room:]))
        return table

    def _line(self, index: int) -> Text:
        prompt = _shorten(self._prompts[index], _PROMPT_CHARS)
        return Text(f"  {prompt}  ", style="dim").append(
            _shorten(self._text(index), _TEXT_CHARS), style="default not dim"
        )

    def _text(self, index: int) -> str:
        answer = self._answers.get(index)
        if answer is None:
            return ""
        return " ".join((answer.error or answer.text).split())

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
            for index in range(len(self._prompts)):
                self._console.print(self._line(index), no_wrap=True, overflow="ellipsis")


def _shorten(text: str, num_chars: int) -> str:
    return text if len(text) <= num_chars else text[: num_chars - 1] + "…"
