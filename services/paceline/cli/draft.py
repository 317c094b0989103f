"""`paceline draft`: the small models that guess for a target.

Making one happens in a process of its own (paceline/trainer/create.py); what needs the
tokenizer is done here, what needs torch is done there. Versions that a trainer looks after are
the business of cli/draft_versions.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.draft_versions import list_drafts, offer, pin, remove, rollback, show, unpin
from paceline.cli.errors import CommandError, leave
from paceline.cli.fleet_plan import with_threads
from paceline.domain.errors import InvalidRequestError
from paceline.gateway.tokenizer import ModelTokenizer
from paceline.process.lifecycle import EXIT_WITH_PARENT_VAR
from paceline.trainer.options import CreateOptions, Tokens

draft = typer.Typer(
    name="draft",
    help="Draft models: small ones whose guesses a target verifies.",
    no_args_is_help=True,
)

_TURN = "paceline"
"""Stands for a user's turn when a chat template is taken apart."""


draft.command("list")(list_drafts)
draft.command()(show)
draft.command()(rollback)
draft.command()(pin)
draft.command()(unpin)
draft.command()(offer)
draft.command()(remove)


@draft.command()
def create(
    target: Annotated[Path, typer.Option(help="Checkpoint directory of the target.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    minutes: Annotated[float, typer.Option(help="Time after loading.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with `prompt` or `messages` to answer; by default the target writes "
            "the user's turns too.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Compute threads; all cores by default.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of texts, order and first weights.")] = 0,
    hidden: Annotated[
        int | None,
        typer.Option(min=4, help="Width; by default what fits the target.", show_default=False),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 1,
    context: Annotated[int, typer.Option(min=64, help="Longest text, in tokens.")] = 512,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Texts that the target writes at a time.")
    ] = 32,
    dtype: Annotated[
        str, typer.Option(help="Target's weights while it writes: f32, bf16 or int8.")
    ] = "bf16",
    overwrite: Annotated[bool, typer.Option(help="Replace the draft that is there.")] = False,
) -> None:
    """Make a small draft model for a target, from text that the target writes itself.

    The result is a Llama checkpoint with the target's tokenizer; the last line printed is JSON.
    """
    try:
        tokenizer = _tokenizer(target)
        opening, bridge = _frame(tokenizer, target)
        options = CreateOptions(
            target=str(target),
            out=str(out),
            minutes=minutes,
            seed=seed,
            threads=threads or len(os.sched_getaffinity(0)),
            dtype=dtype,
            concurrency=concurrency,
            context_tokens=context,
            hidden_size=hidden,
            num_layers=layers,
            overwrite=overwrite,
            prompts=() if prompts is None else _read_prompts(prompts, tokenizer),
            opening=opening,
            bridge=bridge,
            command=shlex.join(["paceline", *sys.argv[1:]]),
        )
        exit_code = _run(options)
    except CommandError as error:
        leave("draft create", error)
    raise typer.Exit(exit_code)


def _run(options: CreateOptions) -> int:
    """Run the job to its end and return its exit code; Ctrl-C ends it in order.

    Raises:
        CommandError: this installation has no engine.
    """
    if importlib.util.find_spec("torch") is None:
        raise CommandError("the trainer is not installed: pip install 'paceline[trainer]'")
    # Numeric libraries size their thread pools when they load, before any option is read.
    environ = {**with_threads(os.environ, options.threads), EXIT_WITH_PARENT_VAR: "1"}
    command = [sys.executable, "-m", "paceline.trainer.create"]
    child = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, text=True)
    try:
        child.communicate(options.to_json())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child.terminate()
        child.wait()
    return child.returncode


def _tokenizer(target: Path) -> ModelTokenizer:
    if not (target / "config.json").is_file():
        raise CommandError(f"--target: {target} holds no config.json, so it is no checkpoint")
    try:
        return ModelTokenizer(target)
    except (OSError, ValueError) as error:
        raise CommandError(f"--target: {error}") from error


def _frame(tokenizer: ModelTokenizer, target: Path) -> tuple[Tokens, Tokens]:
    """Return the tokens before a user's turn and those between it and the answer.

    Without a chat template: what a document begins with, and nothing.
    """
    try:
        text = tokenizer.render([{"role": "user", "content": _TURN}])
        head, tail = text.split(_TURN)
    except (InvalidRequestError, ValueError):
        return _document_start(tokenizer, target), ()
    opening, bridge = (
        tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (head, tail)
    )
    return (opening, bridge) if opening and bridge else (_document_start(tokenizer, target), ())


def _document_start(tokenizer: ModelTokenizer, target: Path) -> Tokens:
    """Return what the tokenizer puts in front of a text, else BOS, else EOS: a new document."""
    special = tokenizer.encode("")
    if special:
        return tuple(special[:1])
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    ids = [config.get("bos_token_id"), config.get("eos_token_id")]
    return tuple(i for i in ids if isinstance(i, int))[:1]


def _read_prompts(path: Path, tokenizer: ModelTokenizer) -> tuple[Tokens, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CommandError(f"--prompts: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_prompt(json.loads(line), tokenizer))
            except (ValueError, InvalidRequestError) as error:
                raise CommandError(f"--prompts: line {number}: {error}") from error
    if not prompts:
        raise CommandError(f"--prompts: {path} has no prompts")
    return tuple(prompts)


def _prompt(record: Any, tokenizer: ModelTokenizer) -> Tokens:
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        tokens = tokenizer.encode(record["prompt"])
    elif isinstance(record, dict) and isinstance(record.get("messages"), list):
        text = tokenizer.render(record["messages"])
        tokens = tokenizer.encode(text, add_special_tokens=False)
    else:
        raise ValueError("neither `prompt` nor `messages`")
    if not tokens:
        raise ValueError("no tokens")
    return tuple(tokens)
