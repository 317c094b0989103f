"""`paceline generate`: one prompt, answers streamed to the terminal."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, TextIO

import typer

from paceline.cli.answer import AnswerPrinter
from paceline.cli.client import DEFAULT_ENDPOINT, describe_error, open_client
from paceline.cli.errors import CommandError, leave
from paceline.domain.errors import PacelineError, UnavailableError
from paceline.process.spans import check_endpoint, create_tracer, current_span
from paceline.v1 import inference_pb2

INTERRUPTED_EXIT_CODE = 130
_SAMPLING = "Sampling"
_OUTPUT = "Output"


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What the user asked of `paceline generate`; None leaves a choice to the server."""

    prompt: str
    model: str = ""
    is_chat: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    speculation: str = ""
    domain: str = ""
    allow_training: bool | None = None


def build_request(options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """Return the message; only what the user set is set in it.

    Raises:
        CommandError: a value that the message cannot carry.
    """
    try:
        request = inference_pb2.GenerateRequest(
            model=options.model,
            sampling=inference_pb2.SamplingParams(
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k or 0,
                min_p=options.min_p or 0.0,
                seed=options.seed,
            ),
            max_tokens=options.max_tokens,
            stop=options.stop,
            n=options.n,
            logprobs=options.logprobs or 0,
            ignore_eos=options.ignore_eos,
            domain=options.domain,
            allow_training=options.allow_training,
        )
        if options.speculation:
            request.speculation.mode = options.speculation
        if options.is_chat:
            message = inference_pb2.Message(role="user", content=options.prompt)
            request.messages.messages.append(message)
        else:
            request.prompt = options.prompt
    except ValueError as error:
        raise CommandError(f"not a valid request: {error}", 2) from error
    return request


def generate(
    prompt: Annotated[str, typer.Argument(help='The prompt; "-" reads it from stdin.')],
    endpoint: Annotated[str, typer.Option(help="host:port of the gateway.")] = DEFAULT_ENDPOINT,
    model: Annotated[str, typer.Option(help="Served model; the only one by default.")] = "",
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Send as a chat message, or as it stands.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="0 = greedy.", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    min_p: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes it reproducible.", rich_help_panel=_SAMPLING)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens per output.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Outputs for the prompt.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Report the k most likely tokens.", rich_help_panel=_OUTPUT)
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the model's end.")] = False,
    speculation: Annotated[
        str, typer.Option(help="AUTO, OFF or the name of a drafter.", rich_help_panel=_SAMPLING)
    ] = "",
    domain: Annotated[
        str, typer.Option(help="Label of this kind of traffic, by which drafts learn.")
    ] = "",
    no_training: Annotated[
        bool, typer.Option("--no-training", help="Keep this request from training drafts.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="PACELINE_API_KEY", show_envvar=True)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per message.", rich_help_panel=_OUTPUT)
    ] = False,
    usage: Annotated[
        bool, typer.Option(help="Print usage on stderr at the end.", rich_help_panel=_OUTPUT)
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Print the trace id on stderr at the end; with PACELINE_OTLP_ENDPOINT set, "
            "the trace begins here and is recorded.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for the call.")] = 300.0,
) -> None:
    """Stream an answer to a prompt."""
    try:
        request = build_request(
            GenerateOptions(
                prompt=_read_stdin() if prompt == "-" else prompt,
                model=model,
                is_chat=chat,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                seed=seed,
                max_tokens=max_tokens,
                stop=tuple(stop or ()),
                n=n,
                logprobs=logprobs,
                ignore_eos=ignore_eos,
                speculation=speculation,
                domain=domain,
                allow_training=False if no_training else None,
            )
        )
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        printer = AnswerPrinter(
            sys.stdout, sys.stderr, num_outputs=n or 1, as_json=as_json, has_usage=usage
        )
        with _root_span() if trace else nullcontext():
            notes = sys.stderr if trace else None
            asyncio.run(_stream(request, endpoint, api_key, timeout, printer, notes))
    except CommandError as error:
        leave("generate", error)
    except BrokenPipeError:
        # The reader has enough; Python would complain again while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


async def _stream(
    request: inference_pb2.GenerateRequest,
    endpoint: str,
    api_key: str | None,
    timeout_s: float,
    printer: AnswerPrinter,
    trace_notes: TextIO | None,
) -> None:
    has_answer, trace_id = False, ""
    # asyncio.run's own handler does not wake a loop that is just going to wait.
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    try:
        async with open_client(endpoint, api_key) as client:
            responses = client.generate(request, timeout_s)
            try:
                async with aclosing(responses) as open_responses:  # type: ignore[type-var]
                    async for response in open_responses:
                        has_answer = True
                        printer.push(response)
            finally:
                trace_id = client.trace_id or current_span().context.trace_id
    except PacelineError as error:
        hint = ""
        is_unreachable = isinstance(error, UnavailableError) and error.reason == "peer-unavailable"
        if is_unreachable and not has_answer:
            hint = f" (is `paceline up` running at {endpoint}?)"
        raise CommandError(describe_error(error) + hint) from error
    finally:
        printer.close()
        if trace_notes is not None and trace_id:
            print(f"trace {trace_id}", file=trace_notes)


@contextmanager
def _root_span() -> Iterator[None]:
    """Begin the trace of the call here, if there is somewhere to send it.

    Raises:
        CommandError: spans cannot be sent there.
    """
    endpoint = os.environ.get("PACELINE_OTLP_ENDPOINT", "")
    try:
        check_endpoint(endpoint)
    except ValueError as error:
        raise CommandError(f"PACELINE_OTLP_ENDPOINT: {error}", 2) from error
    if not endpoint:
        yield
        return
    tracer = create_tracer(endpoint, 1.0, {"service.name": "paceline-cli"})
    try:
        with tracer.begin("paceline generate", None, kind="client"):
            yield
    finally:
        tracer.close()


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise CommandError("stdin is not UTF-8 text", 2) from error
