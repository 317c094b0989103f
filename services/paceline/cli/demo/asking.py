"""Sends the demo's requests and remembers what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from paceline.cli.client import InferenceClient, describe_error
from paceline.domain.errors import PacelineError
from paceline.v1 import inference_pb2

TIMEOUT_S = 60.0


@dataclass(slots=True)
class Answer:
    """One request and its outcome."""

    prompt: str
    text: str = ""
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    ttft_s: float | None = None
    """Seconds from the call to the first piece, as the client sees it."""
    is_complete: bool = False
    error: str = ""

    @property
    def is_split(self) -> bool:
        """Whether one worker computed the prompt and another one generated."""
        usage = self.usage
        return bool(usage.prefill_worker) and usage.prefill_worker != usage.decode_worker


def conversation(*contents: str) -> list[inference_pb2.Message]:
    """Return messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [
        inference_pb2.Message(role=roles[i % 2], content=content)
        for i, content in enumerate(contents)
    ]


async def ask(
    client: InferenceClient,
    messages: Sequence[inference_pb2.Message],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    mode: str = "AUTO",
    on_text: Callable[[Answer], None] = lambda answer: None,
) -> Answer:
    """Stream one answer; failures are part of the outcome."""
    answer = Answer(prompt=messages[-1].content)
    request = inference_pb2.GenerateRequest(
        messages=inference_pb2.MessageList(messages=messages),
        sampling=inference_pb2.SamplingParams(temperature=temperature, seed=seed),
        max_tokens=max_tokens,
        speculation=inference_pb2.SpeculationParams(mode=mode),
    )
    started_s = time.monotonic()
    try:
        async for response in client.generate(request, TIMEOUT_S):
            if answer.ttft_s is None:
                answer.ttft_s = time.monotonic() - started_s
            answer.text += response.text
            if response.HasField("usage"):
                answer.usage = response.usage
                answer.is_complete = True
            on_text(answer)
    except PacelineError as error:
        answer.error = describe_error(error)
    if not answer.is_complete and not answer.error:
        answer.error = "the stream stopped before its last message"
    if answer.error:
        on_text(answer)
    return answer
