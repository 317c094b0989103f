"""Prints a streamed answer: text as it arrives, or one JSON object per message.

With several outputs the first one that is not finished prints live under its index, the
others wait for their turn, so that texts do not mix.
"""

from __future__ import annotations

import json
from typing import Any, TextIO

from google.protobuf.json_format import MessageToDict

from paceline.v1 import inference_pb2


class AnswerPrinter:
    """Writes the responses of one request to `out`, notes about them to `notes`."""

    def __init__(
        self,
        out: TextIO,
        notes: TextIO,
        *,
        num_outputs: int = 1,
        as_json: bool = False,
        has_usage: bool = False,
    ) -> None:
        self._out = out
        self._notes = notes
        self._as_json = as_json
        self._has_usage = has_usage
        self._waiting = [""] * max(1, num_outputs)
        self._is_finished = [False] * len(self._waiting)
        self._current = 0
        self._has_heading = False
        self._is_at_line_start = True
        self._usages: list[tuple[int, inference_pb2.Usage]] = []

    def push(self, response: inference_pb2.GenerateResponse) -> None:
        """Print a response, or keep it until its output's turn."""
        if self._as_json:
            print(json.dumps(to_json(response), ensure_ascii=False), file=self._out, flush=True)
        else:
            text = _with_logprobs(response) if response.logprobs else response.text
            self._waiting[response.index] += text
            self._is_finished[response.index] |= response.finish_reason != 0
            self._print_waiting()
        if response.HasField("usage"):
            self._usages.append((response.index, response.usage))

    def close(self) -> None:
        """End the last line, print what waits and the usage."""
        if not self._as_json:
            for index in range(self._current, len(self._waiting)):
                self._current = index
                if self._waiting[index] or not self._is_at_line_start:
                    self._print_current()
                    self._end_line()
                self._has_heading = False
        if self._has_usage:
            for index, usage in self._usages:
                values = {"index": index, **to_json(usage)}
                if usage.target_steps:
                    ratio = usage.completion_tokens / usage.target_steps
                    values["tokens_per_target_step"] = round(ratio, 3)
                print(json.dumps(values, ensure_ascii=False), file=self._notes, flush=True)

    def _print_waiting(self) -> None:
        self._print_current()
        while self._is_finished[self._current] and self._current + 1 < len(self._waiting):
            self._end_line()
            self._current += 1
            self._has_heading = False
            self._print_current()

    def _print_current(self) -> None:
        if len(self._waiting) > 1 and not self._has_heading:
            self._has_heading = True
            self._write(f"[{self._current}] ")
        text, self._waiting[self._current] = self._waiting[self._current], ""
        self._write(text)

    def _end_line(self) -> None:
        if not self._is_at_line_start:
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            self._is_at_line_start = text.endswith("\n")
            self._out.write(text)
            self._out.flush()


def to_json(message: inference_pb2.GenerateResponse | inference_pb2.Usage) -> dict[str, Any]:
    """Return a message with the field names of the contract, unset numbers included."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _with_logprobs(response: inference_pb2.GenerateResponse) -> str:
    """Return one line per token: id, log-probability, the most likely ones; then the text."""
    lines = []
    for entry in response.logprobs:
        top = " ".join(f"{t.token_id}:{t.logprob:.4f}" for t in entry.top)
        lines.append(f"{entry.token_id}\t{entry.logprob:.4f}\t{top}\n")
    return "".join(lines) + (f"\t{response.text!r}\n" if response.text else "")
