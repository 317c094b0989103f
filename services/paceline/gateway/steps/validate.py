"""Checks everything a client may send before anybody works on it. Pure.

What passes here is in the ranges that domain/request.py states; limits that need the model
(vocabulary, context) come with its card.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from paceline.domain.errors import InvalidRequestError
from paceline.domain.member import ModelCard
from paceline.v1 import inference_pb2

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 1024
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_ROLE_CHARS = 64
MAX_ID_CHARS = 128
MAX_DOMAIN_CHARS = 64
SPECULATION_MODES = ("AUTO", "OFF")
"""Beside the names of drafters; unset means the first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that the operator sets."""

    max_outputs: int


def check_request(request: inference_pb2.GenerateRequest, limits: Limits) -> None:
    """Check all that does not depend on the model.

    Raises:
        InvalidRequestError: names the first field that is wrong, and the permitted range.
    """
    _check_input(request)
    _check_sampling(request.sampling)
    _check_ending(request)
    n = request.n if request.HasField("n") else 1
    _in_range("n", n, 1, limits.max_outputs)
    _in_range("logprobs", request.logprobs, 0, MAX_LOGPROBS)
    _in_range("priority", request.priority, -100, 100)
    check_request_id(request.request_id)
    _check_domain(request.domain)
    constraint = request.WhichOneof("constraint")
    if constraint is not None:
        raise InvalidRequestError(
            constraint, "constrained output is not offered", reason="constraint-unsupported"
        )


def check_against_model(request: inference_pb2.GenerateRequest, model: ModelCard) -> None:
    """Check token ids and lengths against a model.

    Raises:
        InvalidRequestError: names the field.
    """
    if request.WhichOneof("input") == "token_ids":
        check_length("token_ids.ids", len(request.token_ids.ids), model)
    for field, ids in (
        ("token_ids.ids", request.token_ids.ids),
        ("stop_token_ids", request.stop_token_ids),
    ):
        worst = max(ids, default=0)
        if worst >= model.vocab_size:
            raise InvalidRequestError(
                field, f"token id {worst} is not in the vocabulary [0, {model.vocab_size})"
            )
    if request.HasField("max_tokens"):
        _in_range("max_tokens", request.max_tokens, 1, model.max_context_tokens)


def check_speculation(mode: str, drafters: Iterable[str]) -> None:
    """Check a speculation mode against the drafters that the fleet has; empty is fine.

    Raises:
        InvalidRequestError: nobody has that drafter; names those that are there.
    """
    known = (*SPECULATION_MODES, *drafters)
    if mode and mode not in known:
        raise InvalidRequestError(
            "speculation.mode", f"no such drafter; known are {', '.join(known)}"
        )


def check_length(field: str, num_tokens: int, model: ModelCard) -> None:
    """Check that a prompt leaves room for a token.

    Raises:
        InvalidRequestError: it is empty or too long; gives both numbers.
    """
    if num_tokens == 0:
        raise InvalidRequestError(field, "is empty")
    limit = model.max_context_tokens - 1
    if num_tokens > limit:
        raise InvalidRequestError(
            field,
            f"{num_tokens} tokens, at most {limit} fit the context of {model.max_context_tokens}",
            reason="context-too-long",
        )


def check_request_id(request_id: str) -> None:
    """Check a client's id for a request; empty is fine.

    Raises:
        InvalidRequestError: too long, or characters that do not belong in logs and metadata.
    """
    is_plain = request_id.isascii() and request_id.isprintable()
    if len(request_id) > MAX_ID_CHARS or not is_plain:
        raise InvalidRequestError(
            "request_id",
            f"{len(request_id)} characters, at most {MAX_ID_CHARS} of printable ASCII may be used",
        )


def check_messages(messages: inference_pb2.MessageList) -> None:
    """Check the form of a conversation.

    Raises:
        InvalidRequestError: it is empty, too long, or a message has no role of a sane length.
    """
    _has_size("messages.messages", len(messages.messages), 1, MAX_MESSAGES, "messages")
    for i, message in enumerate(messages.messages):
        _has_size(f"messages.messages[{i}].role", len(message.role), 1, MAX_ROLE_CHARS)


def _check_input(request: inference_pb2.GenerateRequest) -> None:
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequestError("input", "one of prompt, messages or token_ids is needed")
    if kind == "prompt" and not request.prompt:
        raise InvalidRequestError("prompt", "is empty")
    if kind == "messages":
        check_messages(request.messages)
    if kind == "token_ids" and not request.token_ids.ids:
        raise InvalidRequestError("token_ids.ids", "is empty")


def _check_sampling(sampling: inference_pb2.SamplingParams) -> None:
    has = sampling.HasField
    if has("temperature"):
        _in_range("sampling.temperature", sampling.temperature, 0.0, 100.0)
    _in_range("sampling.top_k", sampling.top_k, 0, None)
    if has("top_p"):
        _in_range("sampling.top_p", sampling.top_p, 0.0, 1.0, is_above=True)
    _in_range("sampling.min_p", sampling.min_p, 0.0, 1.0)
    if has("repetition_penalty"):
        value = sampling.repetition_penalty
        _in_range("sampling.repetition_penalty", value, 0.0, 100.0, is_above=True)
    _in_range("sampling.presence_penalty", sampling.presence_penalty, -100.0, 100.0)
    _in_range("sampling.frequency_penalty", sampling.frequency_penalty, -100.0, 100.0)


def _check_domain(domain: str) -> None:
    if len(domain) > MAX_DOMAIN_CHARS or not domain.isprintable():
        raise InvalidRequestError(
            "domain",
            f"{len(domain)} characters, at most {MAX_DOMAIN_CHARS} printable ones may be given",
        )


def _check_ending(request: inference_pb2.GenerateRequest) -> None:
    if request.HasField("max_tokens"):
        _in_range("max_tokens", request.max_tokens, 1, None)
    _has_size("stop", len(request.stop), 0, MAX_STOP_STRINGS, "strings")
    for i, stop in enumerate(request.stop):
        _has_size(f"stop[{i}]", len(stop), 1, MAX_STOP_CHARS)
    _has_size("stop_token_ids", len(request.stop_token_ids), 0, MAX_STOP_TOKENS, "ids")


def _in_range(
    field: str, value: float, low: float, high: float | None, *, is_above: bool = False
) -> None:
    """Refuse a value outside [low, high], or (low, high] with `is_above`; NaN is outside."""
    is_low = value <= low if is_above else value < low
    if math.isnan(value) or is_low or (high is not None and value > high):
        opening = "(" if is_above else "["
        wanted = f"at least {_text(low)}"
        if high is not None:
            wanted = f"in {opening}{_text(low)}, {_text(high)}]"
        raise InvalidRequestError(field, f"{_text(value)} is not {wanted}")


def _has_size(field: str, size: int, least: int, most: int, unit: str = "characters") -> None:
    """Refuse too little or too much of something; says how much there is and may be."""
    if not least <= size <= most:
        limits = f"at most {most}" if size > most else f"at least {least}"
        raise InvalidRequestError(field, f"{size} {unit}, {limits} may be given")


def _text(value: float) -> str:
    """Return a number as people write it; whole ones with all their digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"
