"""`paceline up`: a whole platform on this machine, in the foreground."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

import paceline
from paceline.cli import scaling_flags as scaling
from paceline.cli.errors import CommandError, leave
from paceline.cli.launch import LaunchOptions, run_platform
from paceline.cli.platform_options import AutoscaleOptions, PlatformOptions, has_draft
from paceline.domain.drafts import MEDUSA_DRAFTER, MODEL_DRAFTER
from paceline.process.lifecycle import exit_with_parent
from paceline.process.logs import setup_logging

_FLEET = "Fleet"
_ENGINE = "Engine"
_SPECULATION = "Speculative decoding"
_STORE = "KV store"
_OPERATION = "Operation"


def up(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint directory (Hugging Face layout); models/demo by default.",
            envvar="PACELINE_MODEL",
            show_default=False,
        ),
    ] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 1,
    decode: Annotated[
        int, typer.Option(min=0, help="Decode workers; 0 only with --autoscale.")
    ] = 1,
    grpc_port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="gRPC port; 0 = any free one.", envvar="PACELINE_GRPC_PORT"
        ),
    ] = 50051,
    http_port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="HTTP port; 0 = any free one.", envvar="PACELINE_HTTP_PORT"
        ),
    ] = 8080,
    ready_file: Annotated[
        Path | None, typer.Option(help="JSON file written once everything is ready.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that clients use; the directory's name by default.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="JSON file of API keys; without it none is asked for.")
    ] = None,
    kv_nodes: Annotated[
        int, typer.Option(min=1, help="KV store nodes.", rich_help_panel=_STORE)
    ] = 1,
    kv_transport: Annotated[
        str | None,
        typer.Option(
            help="How nodes exchange blocks: shm, or grpc as between machines.",
            rich_help_panel=_STORE,
        ),
    ] = None,
    arena_mb: Annotated[
        int | None, typer.Option(min=1, help="MiB per node.", rich_help_panel=_STORE)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="f32, bf16 or int8.", rich_help_panel=_ENGINE)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compute threads per worker.",
            envvar="PACELINE_THREADS",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences running per worker.", rich_help_panel=_ENGINE),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per step.", rich_help_panel=_ENGINE)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per KV block.", rich_help_panel=_ENGINE)
    ] = None,
    num_kv_blocks: Annotated[
        int | None, typer.Option(min=1, help="KV blocks per worker.", rich_help_panel=_ENGINE)
    ] = None,
    kv_memory_mb: Annotated[
        int | None, typer.Option(min=1, help="KV memory per worker.", rich_help_panel=_ENGINE)
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Directory of a small model that drafts, or none; MODEL/draft by default.",
            envvar="PACELINE_DRAFT",
            show_default=False,
            rich_help_panel=_SPECULATION,
        ),
    ] = None,
    drafters: Annotated[
        str | None,
        typer.Option(
            help="Who may draft: a,b or none.",
            envvar="PACELINE_DRAFTERS",
            rich_help_panel=_SPECULATION,
        ),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="coupled (same tokens) or rejection (same distribution).",
            rich_help_panel=_SPECULATION,
        ),
    ] = None,
    trainer: Annotated[
        bool | None,
        typer.Option(
            "--trainer/--no-trainer",
            help="Keep versions of the draft and train it; by default if there is a draft.",
            show_default=False,
            rich_help_panel=_SPECULATION,
        ),
    ] = None,
    draft_registry: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the draft's versions; one per model by default.",
            envvar="PACELINE_DRAFT_REGISTRY",
            show_default=False,
            rich_help_panel=_SPECULATION,
        ),
    ] = None,
    learn: Annotated[
        str | None,
        typer.Option(
            help="What the trainer trains: model, or medusa (heads, written beside the versions).",
            envvar="PACELINE_LEARN",
            show_default=False,
            rich_help_panel=_SPECULATION,
        ),
    ] = None,
    deepen: Annotated[
        int | None,
        typer.Option(
            min=0, hidden=True, help="Identity layers added, for measuring: outputs stay."
        ),
    ] = None,
    min_step_s: Annotated[
        float | None,
        typer.Option(min=0, hidden=True, help="Shortest engine step, for measuring: outputs stay."),
    ] = None,
    autoscale: scaling.Autoscale = False,
    min_prefill: scaling.MinPrefill = None,
    max_prefill: scaling.MaxPrefill = None,
    min_decode: scaling.MinDecode = None,
    max_decode: scaling.MaxDecode = None,
    slo_ttft_s: scaling.SloTtft = None,
    slo_itl_s: scaling.SloItl = None,
    scaling_policy: scaling.Policy = None,
    scale_to_zero_s: scaling.ScaleToZero = None,
    max_workers: scaling.MaxWorkers = None,
    prometheus: scaling.Prometheus = False,
    prometheus_url: scaling.PrometheusUrl = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="Redis to use; a private one by default.",
            envvar="PACELINE_REDIS_URL",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    fleet: Annotated[
        str | None,
        typer.Option(
            help="Name that separates platforms on one Redis; unique by default.",
            envvar="PACELINE_FLEET",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(help="Write logs to files there, not stderr.", rich_help_panel=_OPERATION),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING.", rich_help_panel=_OPERATION)
    ] = None,
    drain_grace_s: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds for running requests at the end.",
            envvar="PACELINE_DRAIN_GRACE_S",
            rich_help_panel=_OPERATION,
        ),
    ] = None,
    start_timeout_s: Annotated[
        float, typer.Option(min=1, help="Longest start.", rich_help_panel=_OPERATION)
    ] = 300.0,
    host: Annotated[
        str, typer.Option(envvar="PACELINE_HOST", hidden=True, help="Address to bind.")
    ] = "127.0.0.1",
) -> None:
    """Start a platform on this machine and keep it running until Ctrl-C.

    Every process is one of its own: gateway, prefill and decode workers, KV store, trainer, Redis,
    and with --autoscale Prometheus and the autoscaler. Crashed ones come back. Settings without a
    flag here: PACELINE_* environment variables.
    """
    exit_with_parent()
    try:
        options = PlatformOptions(
            model=find_model(model),
            num_prefill=prefill,
            num_decode=decode,
            num_kv_nodes=kv_nodes,
            host=host,
            grpc_port=grpc_port,
            http_port=http_port,
            redis_url=redis_url,
            fleet=fleet,
            served_model_name=served_model_name,
            api_keys=api_keys,
            dtype=dtype,
            chunk_tokens=chunk_tokens,
            block_size=block_size,
            num_kv_blocks=num_kv_blocks,
            kv_memory_mb=kv_memory_mb,
            max_num_seqs=max_num_seqs,
            threads=threads,
            draft=find_draft(draft),
            drafters=drafters,
            verifier=verifier,
            deepen=deepen,
            min_step_s=min_step_s,
            has_trainer=trainer,
            draft_registry=draft_registry,
            learn=find_learned(learn),
            arena_mb=arena_mb,
            kv_transport=kv_transport,
            max_workers=max_workers,
            autoscale=scaling.autoscale_options(
                AutoscaleOptions(
                    min_prefill=min_prefill,
                    max_prefill=max_prefill,
                    min_decode=min_decode,
                    max_decode=max_decode,
                    slo_ttft_s=slo_ttft_s,
                    slo_itl_s=slo_itl_s,
                    policy=scaling_policy,
                    scale_to_zero_s=scale_to_zero_s,
                ),
                is_wanted=autoscale,
            ),
            has_prometheus=prometheus,
            prometheus_url=prometheus_url,
            log_level=log_level,
            drain_grace_s=drain_grace_s,
        )
        scaling.check_counts(options)
        if learn == MEDUSA_DRAFTER and not (trainer is not False and has_draft(options)):
            raise CommandError("--learn medusa: there is no trainer without a draft model")
        if trainer and not has_draft(options):
            raise CommandError("--trainer: there is no draft; make one with paceline draft create")
        for path in (ready_file, api_keys):
            _require_parent(path)
        setup_logging("up", log_level or "INFO")
        launch = LaunchOptions(ready_file, log_dir, start_timeout_s)
        exit_code = asyncio.run(run_platform(options, launch))
    except CommandError as error:
        leave("up", error)
    raise typer.Exit(exit_code)


def find_model(model: Path | None) -> Path:
    """Return the checkpoint directory: the named one, else the demo model of the source tree.

    Raises:
        CommandError: there is no checkpoint.
    """
    if model is not None:
        if not (model / "config.json").is_file():
            raise CommandError(f"--model: {model} holds no config.json, so it is no checkpoint")
        return model
    roots = (Path.cwd(), Path(paceline.__file__).resolve().parents[2])
    for root in roots:
        demo = root / "models" / "demo"
        if (demo / "config.json").is_file():
            return demo
    raise CommandError("no models/demo here; name a checkpoint directory with --model")


def find_learned(learn: str | None) -> str | None:
    """Return what was named.

    Raises:
        CommandError: nothing of that name can learn.
    """
    if learn in (None, MODEL_DRAFTER, MEDUSA_DRAFTER):
        return learn
    raise CommandError(f"--learn: {learn!r} is neither {MODEL_DRAFTER} nor {MEDUSA_DRAFTER}")


def find_draft(draft: str | None) -> str | None:
    """Return what was named.

    Raises:
        CommandError: it is no checkpoint.
    """
    if draft in (None, "", "none") or (Path(draft) / "config.json").is_file():
        return draft
    raise CommandError(f"--draft: {draft} holds no config.json, so it is no checkpoint")


def _require_parent(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise CommandError(f"{path}: there is no directory {path.parent}")
