"""`paceline bench spec`: tokens per step and tokens per second with speculation and without."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.bench import flags
from paceline.cli.bench.child import run_bench
from paceline.cli.errors import CommandError, leave
from paceline.cli.up import find_model
from paceline.domain.errors import PacelineError
from paceline.engine.bench.options import SpecOptions
from paceline.gateway.tokenizer import ModelTokenizer


def spec(
    prompts: Annotated[
        Path,
        typer.Option(help='JSON lines with "prompt", "messages" or "turns", and a "domain".'),
    ],
    model: flags.Model = None,
    draft: Annotated[
        Path | None,
        typer.Option(help="Draft model; the model's own draft/ by default.", show_default=False),
    ] = None,
    medusa: Annotated[
        Path | None, typer.Option(help="Medusa heads of the model.", show_default=False)
    ] = None,
    drafter: Annotated[
        str, typer.Option(help="A drafter, several joined by +, auto or off.")
    ] = "auto",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated for each prompt.")] = 128,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts taken from the file.", show_default=False)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate all tokens whatever comes.")
    ] = False,
    deepen: Annotated[
        int, typer.Option(min=0, help="Identity layers added: same outputs, slower steps.")
    ] = 0,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Most draft tokens a step.")] = 16,
    depth: Annotated[int, typer.Option(min=1, max=32, help="Longest draft path.")] = 8,
    builder: Annotated[
        str,
        typer.Option(help="Trees of a drafting model: auto, chain, static, dynamic, rsd-c, rsd-s."),
    ] = "auto",
    verifier: Annotated[str, typer.Option(help="coupled or rejection.")] = "coupled",
    rounds: Annotated[int, typer.Option(min=1, help="Times that both ways run.")] = 3,
    capture: Annotated[
        bool,
        typer.Option("--capture", help="Capture samples, and compare with not capturing."),
    ] = False,
    dtype: flags.Dtype = "f32",
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    as_json: flags.AsJson = False,
) -> None:
    """Compare a drafter with no speculation on the same prompts, in turns."""
    try:
        directory = find_model(model)
        lines = read_prompts(prompts, directory, limit)
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(lines, file)
            file.flush()
            options = SpecOptions(
                model=str(directory),
                prompts=file.name,
                draft=draft_of(directory, draft),
                medusa=None if medusa is None else str(medusa),
                drafter=drafter,
                concurrency=concurrency,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                ignore_eos=ignore_eos,
                deepen=deepen,
                nodes=nodes,
                depth=depth,
                builder=builder,
                verifier=verifier,
                rounds=rounds,
                capture=capture,
                dtype=dtype,
                threads=flags.num_threads(threads),
                seed=seed,
                is_quiet=as_json,
            )
            exit_code = run_bench("spec", options)
    except CommandError as error:
        leave("bench spec", error)
    raise typer.Exit(exit_code)


def draft_of(model: Path, draft: Path | None) -> str | None:
    """Return the draft model asked for, else the one that lies with the model."""
    if draft is not None:
        if not (draft / "config.json").is_file():
            raise CommandError(f"{draft}: no draft model (config.json is missing)")
        return str(draft)
    own = model / "draft"
    return str(own) if (own / "config.json").is_file() else None


def read_prompts(path: Path, model: Path, limit: int | None) -> list[dict[str, Any]]:
    """Read and tokenise prompts.

    Raises:
        CommandError: the file or a line of it cannot be used; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = ModelTokenizer(model)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path} or the model's tokenizer: {error}") from error
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if limit is not None and len(prompts) == limit:
            break
        try:
            data = json.loads(line)
            token_ids = _tokenise(tokenizer, data)
            domain = str(data.get("domain") or data.get("category") or "")
        except (ValueError, KeyError, TypeError, AttributeError, PacelineError) as error:
            raise CommandError(f"{path}:{number}: {error or 'not a prompt'}") from error
        if not token_ids:
            raise CommandError(f"{path}:{number}: the prompt is empty")
        prompts.append({"token_ids": token_ids, "domain": domain})
    if not prompts:
        raise CommandError(f"{path}: no prompts")
    return prompts


def _tokenise(tokenizer: ModelTokenizer, data: dict[str, Any]) -> list[int]:
    if "prompt" in data:
        return tokenizer.encode(data["prompt"])
    if "messages" in data:
        messages = data["messages"]
    elif "turns" in data:
        messages = [{"role": "user", "content": data["turns"][0]}]
    else:
        raise ValueError('a line needs "prompt" or "messages"')
    return tokenizer.encode(tokenizer.render(messages), add_special_tokens=False)
