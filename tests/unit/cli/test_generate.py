"""`paceline generate` against a real gRPC server: text, errors, cancellation."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from paceline.cli.answer import AnswerPrinter
from paceline.cli.client import describe_error, is_serving
from paceline.cli.errors import CommandError
from paceline.cli.generate import GenerateOptions, build_request
from paceline.domain.errors import (
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PacelineError,
    UnavailableError,
)
from paceline.process.metrics import Metrics
from paceline.rpc.server import create_server
from paceline.v1 import inference_pb2, inference_pb2_grpc
from tests.otlp_receiver import OtlpReceiver
from tests.waiting import until

STOP = inference_pb2.FINISH_REASON_STOP
ADD_SERVICER: Callable[..., None] = inference_pb2_grpc.add_InferenceServiceServicer_to_server


class Service:
    """Answers with prepared responses; then waits for ever, raises, or ends."""

    def __init__(self, *texts: str, error: PacelineError | None = None, is_endless: bool = False):
        self._texts = texts
        self._error = error
        self._is_endless = is_endless
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.metadata: dict[str, Any] = {}
        self.was_cancelled = asyncio.Event()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata() or ())
        try:
            for text in self._texts:
                yield inference_pb2.GenerateResponse(text=text)
            if self._is_endless:
                await asyncio.sleep(600)
            if self._error is not None:
                raise self._error
            usage = inference_pb2.Usage(prompt_tokens=3, completion_tokens=2)
            yield inference_pb2.GenerateResponse(finish_reason=STOP, usage=usage)
        except (asyncio.CancelledError, GeneratorExit):
            self.was_cancelled.set()
            raise

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def CountTokens(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def serving(service: Service, *, is_door: bool = False) -> AsyncIterator[str]:
    server = create_server(
        Metrics("test"),
        ["paceline.v1.InferenceService"],
        [lambda target: ADD_SERVICER(service, target)],
        host="127.0.0.1",
        port=0,
        is_door=is_door,
    )
    await server.start()
    server.set_ready(True)
    try:
        yield server.address
    finally:
        await server.drain(0.0)


async def start(*args: str, **env: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "paceline.cli", "generate", *args),
        env={**os.environ, **env},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(*args: str, stdin: bytes = b"", **env: str) -> tuple[int | None, str, str]:
    process = await start(*args, **env)
    async with asyncio.timeout(30):
        out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


async def test_text_arrives_whole_with_a_newline_at_its_end() -> None:
    service = Service("Grüße ", "an 東京 ", "🌍")
    async with serving(service) as address:
        result = await run("hi", "--endpoint", address, PYTHONIOENCODING="ascii")
    assert result == (0, "Grüße an 東京 🌍\n", "")
    assert service.requests == [build_request(GenerateOptions(prompt="hi"))]


async def test_stdin_is_the_prompt_and_the_key_comes_from_the_environment() -> None:
    service = Service("ok")
    async with serving(service) as address:
        code, out, err = await run(
            *("-", "--chat", "--usage", "--endpoint", address),
            stdin="zwölf\n".encode(),
            PACELINE_API_KEY="sesame",
        )
    assert (code, out) == (0, "ok\n")
    assert json.loads(err)["completion_tokens"] == 2
    (message,) = service.requests[0].messages.messages
    assert (message.role, message.content) == ("user", "zwölf\n")
    assert service.metadata["authorization"] == "Bearer sesame"


async def test_an_error_is_one_line_with_code_reason_field_and_message() -> None:
    error = InvalidRequestError("sampling.top_p", "2 is not in (0, 1]")
    async with serving(Service("some", error=error)) as address:
        code, out, err = await run("hi", "--endpoint", address)
    assert (code, out) == (1, "some\n")
    assert err == (
        "paceline generate: INVALID_ARGUMENT (invalid-argument): "
        "sampling.top_p: 2 is not in (0, 1]\n"
    )


async def test_nobody_at_the_endpoint_is_one_line_with_a_hint() -> None:
    code, out, err = await run("hi", "--endpoint", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err.startswith("paceline generate: UNAVAILABLE (peer-unavailable): ")
    assert err.endswith("(is `paceline up` running at 127.0.0.1:1?)\n")
    assert err.count("\n") == 1


async def test_the_timeout_ends_a_call() -> None:
    async with serving(Service("a", is_endless=True)) as address:
        code, _, err = await run("hi", "--endpoint", address, "--timeout", "0.5")
    assert code == 1
    assert "DEADLINE_EXCEEDED (deadline-exceeded)" in err


async def test_interrupt_cancels_the_request_and_exits_130() -> None:
    service = Service("tick", is_endless=True)
    async with serving(service) as address, asyncio.timeout(30):
        process = await start("hi", "--endpoint", address)
        assert process.stdout is not None
        assert await process.stdout.readexactly(4) == b"tick"
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        await service.was_cancelled.wait()
    assert (process.returncode, out, err) == (130, b"\n", b"")


async def test_health_is_asked_of_the_public_service() -> None:
    async with serving(Service()) as address:

        async def is_up() -> bool:
            return await is_serving(address)

        await until(is_up)
        assert not await is_serving(address, service="paceline.v1.Unknown")
    assert not await is_serving(address)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            InvalidRequestError("n", "too large"),
            "INVALID_ARGUMENT (invalid-argument): n: too large",
        ),
        (InvalidRequestError("", "no input"), "INVALID_ARGUMENT (invalid-argument): no input"),
        (NotFoundError("no such model"), "NOT_FOUND (model-not-found): no such model"),
        (ExhaustedError("full"), "RESOURCE_EXHAUSTED (queue-full): full"),
        (UnavailableError("a\n  b"), "UNAVAILABLE (no-ready-worker): a b"),
        (InternalError("internal error"), "INTERNAL (internal): internal error"),
    ],
)
def test_errors_read_as_one_line(error: PacelineError, line: str) -> None:
    assert describe_error(error) == line


def test_only_what_was_set_is_sent() -> None:
    request = build_request(GenerateOptions(prompt="hi", seed=0, temperature=0.0))
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_p")
    assert not request.HasField("max_tokens")
    assert not request.HasField("n")
    assert not request.HasField("speculation")


def test_a_speculation_mode_is_sent_as_it_was_written() -> None:
    request = build_request(GenerateOptions(prompt="hi", speculation="trie"))
    assert request.speculation.mode == "trie"


@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(prompt="\udcff"),
        GenerateOptions(prompt="hi", max_tokens=-1),
        GenerateOptions(prompt="hi", seed=-1),
    ],
    ids=["prompt that is no text", "max_tokens", "seed"],
)
def test_what_the_message_cannot_carry_is_a_usage_error(options: GenerateOptions) -> None:
    with pytest.raises(CommandError) as caught:
        build_request(options)
    assert caught.value.exit_code == 2


def response(index: int, text: str, is_last: bool = False) -> inference_pb2.GenerateResponse:
    message = inference_pb2.GenerateResponse(index=index, text=text)
    if is_last:
        message.finish_reason = STOP
        message.usage.completion_tokens = 1
    return message


def test_outputs_print_one_after_another_under_their_index() -> None:
    out, notes = io.StringIO(), io.StringIO()
    printer = AnswerPrinter(out, notes, num_outputs=3)
    printer.push(response(1, "one "))
    printer.push(response(0, "zero "))
    assert out.getvalue() == "[0] zero "
    printer.push(response(2, "two", is_last=True))
    printer.push(response(0, "0\n", is_last=True))
    assert out.getvalue() == "[0] zero 0\n[1] one "
    printer.push(response(1, "1", is_last=True))
    printer.close()
    assert out.getvalue() == "[0] zero 0\n[1] one 1\n[2] two\n"
    assert notes.getvalue() == ""


def test_a_broken_answer_still_prints_what_arrived() -> None:
    out = io.StringIO()
    printer = AnswerPrinter(out, io.StringIO(), num_outputs=2)
    printer.push(response(0, "zero"))
    printer.push(response(1, "one"))
    printer.close()
    assert out.getvalue() == "[0] zero\n[1] one\n"


@pytest.mark.parametrize(("steps", "shown"), [(3, 2.667), (8, 1.0), (0, None)])
def test_usage_tells_the_tokens_per_target_step(steps: int, shown: float | None) -> None:
    notes = io.StringIO()
    printer = AnswerPrinter(io.StringIO(), notes, has_usage=True)
    last = response(0, "x", is_last=True)
    last.usage.completion_tokens, last.usage.target_steps = 8, steps
    printer.push(last)
    printer.close()
    assert json.loads(notes.getvalue()).get("tokens_per_target_step") == shown


def test_json_is_one_object_per_message_with_the_names_of_the_contract() -> None:
    out = io.StringIO()
    printer = AnswerPrinter(out, io.StringIO(), as_json=True)
    printer.push(response(0, "ä"))
    printer.push(response(0, "", is_last=True))
    printer.close()
    first, last = (json.loads(line) for line in out.getvalue().splitlines())
    assert (first["index"], first["text"], "usage" in first) == (0, "ä", False)
    assert last["finish_reason"] == "FINISH_REASON_STOP"
    assert last["usage"]["completion_tokens"] == 1
    assert last["usage"]["cached_prompt_tokens"] == 0


@pytest.mark.parametrize("error", [None, UnavailableError("nobody")])
async def test_the_trace_id_is_printed_when_asked_for(error: PacelineError | None) -> None:
    service = Service("ok", error=error)
    async with serving(service, is_door=True) as address:
        code, out, err = await run("hi", "--trace", "--endpoint", address)
        _, _, quiet = await run("hi", "--endpoint", address)
    assert (code == 0, out) == (error is None, "ok\n")
    assert re.search(r"^trace [0-9a-f]{32}$", err, re.MULTILINE)
    assert "trace" not in quiet
    # Where nothing is recorded the gateway decides, not the client.
    assert "traceparent" not in service.metadata


async def test_a_trace_begins_at_the_client_if_it_has_a_collector() -> None:
    service = Service("ok")
    with OtlpReceiver() as receiver:
        async with serving(service, is_door=True) as address:
            env = {"PACELINE_OTLP_ENDPOINT": receiver.endpoint}
            code, _, err = await run("hi", "--trace", "--endpoint", address, **env)
            bad, _, complaint = await run(
                "hi", "--trace", "--endpoint", address, PACELINE_OTLP_ENDPOINT="nowhere"
            )
        (root,) = receiver.spans
    assert code == 0
    assert err.strip() == f"trace {root.trace_id}"
    assert service.metadata["traceparent"] == f"00-{root.trace_id}-{root.span_id}-01"
    assert bad == 2
    assert "PACELINE_OTLP_ENDPOINT" in complaint
