"""What the demo found: figures, and the promises it checks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

from paceline.cli.demo.asking import Answer
from paceline.cli.demo.kv_tally import Moved
from paceline.cli.demo.learning import Learning


def find_prefix_hit(first: Answer, later: Sequence[Answer]) -> Answer | None:
    """Return an answer whose worker took most of its prompt from the store.

    That worker neither computed the first answer's prompt nor got it for decoding, so that
    nothing of it can have been in a cache of its own.
    """
    insiders = (first.usage.prefill_worker, first.usage.decode_worker)
    for answer in later:
        has_hit = 2 * answer.usage.cached_prompt_tokens > answer.usage.prompt_tokens
        if has_hit and answer.usage.prefill_worker not in insiders:
            return answer
    return None


@dataclass(frozen=True, slots=True)
class Replacement:
    """A worker that was killed between two turns of a conversation."""

    worker: str
    first_turn: Answer
    second_turn: Answer
    replaced_in_s: float | None
    """Seconds until its successor was ready; None if that did not happen in time."""

    @property
    def has_reused_store(self) -> bool:
        """Whether the second turn used blocks that only the store can have kept.

        The worker that computed it had at most the first prompt in its own cache, and that
        only if it computed that prompt.
        """
        first, second = self.first_turn.usage, self.second_turn.usage
        own_tokens = first.prompt_tokens if second.prefill_worker == first.prefill_worker else 0
        return second.cached_prompt_tokens > own_tokens


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the demo measured."""

    answers: Sequence[Answer]
    """All requests, in the order they were sent."""
    tok_s: float
    """Tokens per second while all the concurrent prompts ran."""
    prefix_first: Answer
    """The request that had the shared prefix computed."""
    prefix_hit: Answer | None
    """One that found it in the store."""
    replacement: Replacement
    moved: Moved
    elapsed_s: float
    learning: Learning | None = None
    """Of the last round; None where no draft could be made for the model."""

    @property
    def num_completed(self) -> int:
        """Requests that were answered to their end."""
        return sum(answer.is_complete for answer in self.answers)

    def failures(self) -> list[str]:
        """Return what did not hold, in words; empty if all did."""
        answers = [*self.answers, *(self.learning.answers if self.learning else ())]
        errors = [f"{a.prompt[:40]!r}: {a.error}" for a in answers if not a.is_complete]
        replacement = self.replacement
        checks = {
            f"not every request completed ({'; '.join(errors)})": not errors,
            "no KV moved prefill -> store -> decode": self.moved.num_blocks > 0,
            "no request was prefilled on one worker and decoded on another": any(
                answer.is_split for answer in self.answers
            ),
            "no shared prefix was found in the store by another worker": (
                self.prefix_hit is not None
            ),
            f"the killed worker {replacement.worker} was not replaced in time": (
                replacement.replaced_in_s is not None
            ),
            "the turn after the kill found nothing in the store": replacement.has_reused_store,
        }
        return [text for text, holds in checks.items() if not holds]

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        ttfts = [answer.ttft_s for answer in self.answers if answer.ttft_s is not None]
        return {
            "requests": len(self.answers),
            "completed": self.num_completed,
            "kv_blocks_moved": self.moved.num_blocks,
            "kv_bytes_moved": self.moved.num_bytes,
            "prefix_hit_tokens": sum(a.usage.cached_prompt_tokens for a in self.answers),
            "ttft_p50_s": round(median(ttfts), 4) if ttfts else None,
            "tok_s": round(self.tok_s, 1),
            "accepted_tokens": sum(a.usage.accepted_tokens for a in self.answers),
            "tokens_per_pass": self._tokens_per_pass(),
            "split_requests": sum(answer.is_split for answer in self.answers),
            "replaced_in_s": _rounded(self.replacement.replaced_in_s),
            "learning": None if self.learning is None else self.learning.to_json(),
            "elapsed_s": round(self.elapsed_s, 1),
            "failures": self.failures(),
        }

    def table(self) -> Table:
        """Return the figures for people."""
        data = self.to_json()
        table = Table(title="What happened", title_justify="left", box=None, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("requests", f"{data['completed']} of {data['requests']} completed")
        table.add_row("time to first token", f"{data['ttft_p50_s']} s (median)")
        table.add_row("throughput", f"{data['tok_s']} tokens/s, all concurrent prompts together")
        table.add_row(
            "speculation",
            f"{data['accepted_tokens']} drafted tokens accepted, "
            f"{data['tokens_per_pass']} tokens per pass of the model",
        )
        table.add_row(
            "KV prefill -> store -> decode",
            f"{self.moved.num_blocks} blocks, {self.moved.num_bytes / 2**20:.1f} MiB; "
            f"{data['split_requests']} requests split over two workers",
        )
        table.add_row("shared prefix", self._prefix_text())
        table.add_row("killed worker", self._replacement_text())
        if self.learning is not None:
            table.add_row("learning", _learning_text(self.learning))
        return table

    def _tokens_per_pass(self) -> float | None:
        steps = sum(a.usage.target_steps for a in self.answers)
        tokens = sum(a.usage.completion_tokens for a in self.answers)
        return round(tokens / steps, 2) if steps else None

    def _prefix_text(self) -> str:
        hit = self.prefix_hit
        if hit is None:
            return "not found by another worker"
        usage = hit.usage
        return (
            f"computed by {self.prefix_first.usage.prefill_worker}; {usage.prefill_worker} took "
            f"{usage.cached_prompt_tokens} of {usage.prompt_tokens} tokens from the store"
        )

    def _replacement_text(self) -> str:
        replacement, usage = self.replacement, self.replacement.second_turn.usage
        back = (
            "not replaced in time"
            if replacement.replaced_in_s is None
            else f"replaced in {replacement.replaced_in_s:.1f} s"
        )
        return (
            f"{replacement.worker} {back}; the next turn ran on {usage.decode_worker} with "
            f"{usage.cached_prompt_tokens} of {usage.prompt_tokens} tokens from the store"
        )


def _learning_text(learning: Learning) -> str:
    return (
        f"{learning.first:.2f} of the drafted tokens were accepted at first, {learning.last:.2f} "
        f"after {len(learning.answers)} requests and {len(learning.versions) - 1} new versions"
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
