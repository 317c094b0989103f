"""Asks a running platform as any client does, and checks answers against transformers.

The reference is the checkpoint's own model in float32, fed with prompt and answer at once:
each token must be the best one at its position. Two tokens may be closer to each other than
the order of float additions makes certain; such near ties are exempt and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from paceline.v1 import inference_pb2_grpc
from paceline.v1.inference_pb2 import (
    GenerateRequest,
    SamplingParams,
    TokenIds,
    TokenLogprobs,
    Usage,
)

TIE = 1e-4
"""Logits closer than this may change places between two ways of adding."""


@dataclass
class Answer:
    """All that came back for one request, by output index."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    pieces: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    finish_reason: dict[int, int] = field(default_factory=dict)
    usage: dict[int, Usage] = field(default_factory=dict)

    @property
    def text(self) -> dict[int, str]:
        """Joined pieces."""
        return {index: "".join(pieces) for index, pieces in self.pieces.items()}

    def add(self, response: Any) -> None:
        """Book one streamed message; nothing may come for an output that has ended."""
        index = response.index
        assert index not in self.finish_reason, f"output {index} goes on after its end"
        self.ids.setdefault(index, []).extend(response.token_ids)
        self.pieces.setdefault(index, []).append(response.text)
        self.logprobs.setdefault(index, []).extend(response.logprobs)
        if response.finish_reason:
            self.finish_reason[index] = response.finish_reason
            self.usage[index] = response.usage


class Client:
    """One channel to a gateway."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def __aenter__(self) -> Self:
        self.channel = grpc.aio.insecure_channel(self._address)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.channel.close()

    async def generate(
        self,
        request: GenerateRequest,
        timeout: float = 60,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """Return the whole answer.

        Raises:
            grpc.aio.AioRpcError: the call failed.
        """
        answer = Answer()
        async for response in self.stub.Generate(request, timeout=timeout, metadata=metadata):
            answer.add(response)
        assert len(answer.usage) == (request.n or 1), "an output has no end"
        return answer


def greedy(prompt: str | Sequence[int], **fields: Any) -> GenerateRequest:
    """Return a greedy request for a text or for token ids."""
    return request_for(prompt, sampling=SamplingParams(temperature=0.0), **fields)


def request_for(prompt: str | Sequence[int], **fields: Any) -> GenerateRequest:
    """Return a request for a text or for token ids."""
    if isinstance(prompt, str):
        return GenerateRequest(prompt=prompt, **fields)
    return GenerateRequest(token_ids=TokenIds(ids=prompt), **fields)


@lru_cache(maxsize=8)
def reference(directory: Path) -> Any:
    """Return a checkpoint's own model in float32, on one thread."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def reference_logits(
    directory: Path, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> torch.Tensor:
    """Return the logits that each output token was chosen from, [tokens, vocabulary]."""
    ids = torch.tensor([[*prompt_ids, *output_ids[:-1]]])
    logits: torch.Tensor = reference(directory)(ids, logits_to_keep=len(output_ids)).logits[0]
    return logits


def reference_ids(
    directory: Path, prompt_ids: Sequence[int], num_tokens: int, **generation: Any
) -> list[int]:
    """Return the tokens transformers itself generates greedily, up to the end of sequence."""
    prompt = torch.tensor([[*prompt_ids]])
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **generation
    )
    output = reference(directory).generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=config
    )
    ids: list[int] = output[0, prompt.shape[1] :].tolist()
    return ids


@lru_cache(maxsize=8)
def tokenizer(directory: Path) -> Any:
    """Return a checkpoint's own tokenizer."""
    return AutoTokenizer.from_pretrained(directory)


def encode(directory: Path, text: str) -> list[int]:
    """Return the tokens of a plain prompt."""
    ids: list[int] = tokenizer(directory)(text)["input_ids"]
    return ids


def encode_chat(directory: Path, *contents: str) -> list[int]:
    """Return the tokens of a conversation that the user begins."""
    rendered = tokenizer(directory).apply_chat_template(
        conversation(*contents), add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(directory)(rendered, add_special_tokens=False)["input_ids"]
    return ids


def conversation(*contents: str) -> list[dict[str, str]]:
    """Return messages by user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def decode(directory: Path, ids: Sequence[int]) -> str:
    """Return the text of tokens, without special ones."""
    text: str = tokenizer(directory).decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def assert_greedy(directory: Path, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
    """Check each token against the reference; return how many near ties were exempt."""
    return _count_ties(directory, tuple(prompt_ids), tuple(output_ids))


@lru_cache(maxsize=4096)
def _count_ties(directory: Path, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...]) -> int:
    if not output_ids:
        return 0
    logits = reference_logits(directory, prompt_ids, output_ids)
    chosen = torch.tensor(output_ids)
    behind = logits.max(dim=-1).values - logits.gather(1, chosen[:, None])[:, 0]
    wrong = [(i, float(d)) for i, d in enumerate(behind) if d >= TIE]
    assert not wrong, f"(position, how far behind the best): {wrong[:5]}"
    return int((logits.argmax(dim=-1) != chosen).sum())
