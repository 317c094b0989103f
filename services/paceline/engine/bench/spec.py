"""`paceline bench spec`: what speculation brings on given prompts, against the same engine without.

Both ways run in turn over the same prompts, several rounds; each run is a tenant of its own, so
that no drafter and no cache knows the prompts from the run before. Rates count the steps
in which no prompt was computed: tokens that they brought over the time that they took, drafting
and verification included. With capture the drafter also runs for requests that forbid it, in
turn with the others, so that the ratio of the two rates is what capturing costs.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from paceline.domain.cost import StepShape
from paceline.domain.request import GenerationSpec, SamplingParams, TokenChunk
from paceline.engine.bench.options import SpecOptions
from paceline.engine.bench.rig import Rig, warm_collector
from paceline.engine.build import build_engine
from paceline.engine.events import EngineEvent, FailedEvent, LearningsEvent, OutputEvent
from paceline.engine.options import EngineOptions

_OFF = "OFF"
_CAPTURE_SHARE = 0.008
"""As workers have it by default."""
_CURVE_NODES = (1, 2, 4, 8, 16, 32)
_CURVE_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class _Prompt:
    token_ids: tuple[int, ...]
    domain: str


@dataclass(slots=True)
class _Tally:
    """What steps brought; one for all prompts, one for each domain."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    decode_tokens: int = 0
    """Of steps that count for the rate."""
    decode_s: float = 0.0

    def add(self, chunk: TokenChunk) -> None:
        self.tokens += len(chunk.token_ids)
        self.steps += chunk.target_steps
        self.drafted += chunk.drafted_tokens
        self.accepted += chunk.accepted_tokens

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(slots=True)
class _Run:
    """One pass over all prompts."""

    outputs: list[list[int]]
    total: _Tally = field(default_factory=_Tally)
    domains: dict[str, _Tally] = field(default_factory=lambda: defaultdict(_Tally))
    wall_s: float = 0.0
    samples: int = 0
    captured_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Way:
    """How the prompts are run."""

    mode: str
    captures: bool = False


@dataclass(frozen=True, slots=True)
class _Round:
    off: _Run
    on: _Run
    uncaptured: _Run | None = None
    """As `on`, but without capture."""


def bench_spec(options: SpecOptions) -> dict[str, object]:
    """Measure and return the report."""
    prompts = _read_prompts(options)
    rig = _build(options, prompts)
    mode = "AUTO" if options.drafter == "auto" else options.drafter
    mode = _OFF if options.drafter == "off" else mode
    ways = [_Way(_OFF), _Way(mode, options.capture)]
    if options.capture:
        ways.append(_Way(mode))
    warm_up = prompts[: options.concurrency]
    _run(rig, options, warm_up, _Way(mode), "warm-up", num_tokens=8)
    rounds: list[_Round] = []
    for i in range(options.rounds):
        # Whoever goes first meets the colder machine: take turns.
        order = list(enumerate(ways))[:: 1 if i % 2 == 0 else -1]
        runs = {k: _run(rig, options, prompts, way, f"round-{i} {k}") for k, way in order}
        rounds.append(_Round(*[runs[k] for k in range(len(ways))]))
        if not options.is_quiet:
            off, on = rounds[-1].off, rounds[-1].on
            print(
                f"round {i + 1}: off {off.total.rate:.1f} tok/s, {options.drafter} "
                f"{on.total.rate:.1f} tok/s, {on.total.tokens / on.total.steps:.2f} tokens a step",
                flush=True,
            )
    report = _report(options, rig, rounds)
    if not options.is_quiet:
        _print_domains(report)
    return report


def _read_prompts(options: SpecOptions) -> list[_Prompt]:
    lines = json.loads(Path(options.prompts).read_text(encoding="utf-8"))
    return [_Prompt(tuple(line["token_ids"]), line["domain"]) for line in lines]


def _build(options: SpecOptions, prompts: list[_Prompt]) -> Rig:
    longest = max(len(prompt.token_ids) for prompt in prompts) + options.max_tokens
    defaults = EngineOptions(options.model)
    num_blocks = (options.concurrency + 1) * (-(-longest // defaults.block_size) + 4)
    names: tuple[str, ...] = (*options.drafter.split("+"), options.drafter)
    if options.drafter in ("auto", "off"):
        names = defaults.drafters
    engine, card = build_engine(
        EngineOptions(
            model=options.model,
            dtype=options.dtype,
            num_kv_blocks=num_blocks,
            max_num_seqs=options.concurrency,
            threads=options.threads,
            deepen=options.deepen,
            drafters=names,
            draft=options.draft,
            medusa=options.medusa,
            draft_nodes=options.nodes,
            draft_depth=options.depth,
            draft_builder=options.builder,
            verifier=options.verifier,
            capture_share=_CAPTURE_SHARE if options.capture else 0.0,
        )
    )
    warm_collector()
    if options.drafter not in ("auto", "off", *card.drafters):
        raise ValueError(f"drafter {options.drafter!r} needs weights: --draft or --medusa")
    too_long = [i for i, p in enumerate(prompts) if len(p.token_ids) >= card.max_context_tokens]
    if too_long:
        raise ValueError(f"prompt {too_long[0] + 1}: longer than the model's context")
    return Rig(engine, card)


def _run(
    rig: Rig,
    options: SpecOptions,
    prompts: list[_Prompt],
    way: _Way,
    tenant: str,
    *,
    num_tokens: int | None = None,
) -> _Run:
    """Generate for all prompts, so many at a time."""
    engine = rig.engine
    run = _Run([[] for _ in prompts])
    waiting = iter(_requests(options, prompts, way, tenant, num_tokens or options.max_tokens))
    started_s = time.perf_counter()
    while True:
        while engine.num_requests < options.concurrency and (spec := next(waiting, None)):
            engine.submit(spec)
        if not engine.num_requests:
            break
        is_decoding = not engine.load().pending_prefill_tokens and not engine.load().num_waiting
        step_started_s = time.perf_counter()
        events = engine.step()
        step_s = time.perf_counter() - step_started_s
        _book(run, prompts, events, step_s if is_decoding else None)
    run.wall_s = time.perf_counter() - started_s
    return run


def _requests(
    options: SpecOptions, prompts: list[_Prompt], way: _Way, tenant: str, num_tokens: int
) -> Iterator[GenerationSpec]:
    for i, prompt in enumerate(prompts):
        yield GenerationSpec(
            request_id=str(i),
            prompt_token_ids=prompt.token_ids,
            sampling=SamplingParams(
                temperature=options.temperature, top_p=options.top_p, seed=options.seed + i
            ),
            max_tokens=num_tokens,
            cache_salt=tenant.encode(),
            ignore_eos=options.ignore_eos,
            speculation=way.mode,
            domain=prompt.domain,
            allow_training=way.captures,
            is_seed_drawn=options.verifier == "rejection",
        )


def _book(
    run: _Run, prompts: list[_Prompt], events: Sequence[EngineEvent], step_s: float | None
) -> None:
    """Count what a step brought; without a time it does not count for rates."""
    num_tokens: dict[str, int] = defaultdict(int)
    for event in events:
        if isinstance(event, FailedEvent):
            raise RuntimeError(f"request {event.request_id}: {event.message}")
        if isinstance(event, LearningsEvent):
            run.samples += len(event.samples)
            run.captured_tokens += sum(sample.num_captured for sample in event.samples)
        if not isinstance(event, OutputEvent):
            continue
        for chunk in event.chunks:
            index = int(event.request_id)
            run.outputs[index] += chunk.token_ids
            domain = prompts[index].domain
            run.total.add(chunk)
            run.domains[domain].add(chunk)
            num_tokens[domain] += len(chunk.token_ids)
    if step_s is None:
        return
    all_tokens = sum(num_tokens.values())
    run.total.decode_tokens += all_tokens
    run.total.decode_s += step_s
    for domain, count in num_tokens.items():
        # A step that several domains share is shared out by tokens: only alone do rates differ.
        run.domains[domain].decode_tokens += count
        run.domains[domain].decode_s += step_s * count / all_tokens


def _report(options: SpecOptions, rig: Rig, rounds: list[_Round]) -> dict[str, object]:
    on_runs = [each.on for each in rounds]
    total = on_runs[-1].total
    domains = sorted(on_runs[-1].domains)
    return {
        "drafter": options.drafter,
        "concurrency": options.concurrency,
        "temperature": options.temperature,
        "tokens": total.tokens,
        "target_steps": total.steps,
        **_figures([(each.off.total, each.on.total) for each in rounds]),
        "identical_to_off": all(each.off.outputs == each.on.outputs for each in rounds),
        **_capture_figures(rounds),
        "model": Path(options.model).resolve().name,
        "deepened_layers": options.deepen,
        "draft": Path(options.draft).resolve().name if options.draft else None,
        "dtype": options.dtype,
        "threads": options.threads,
        "verifier": options.verifier,
        "builder": options.builder,
        "prompts": len(on_runs[-1].outputs),
        "max_tokens": options.max_tokens,
        "rounds": options.rounds,
        "wall_s": round(median(on.wall_s for on in on_runs), 3),
        "wall_s_off": round(median(each.off.wall_s for each in rounds), 3),
        "step_cost_ratio": _cost_curve(rig, options.concurrency),
        "domains": {
            name: _figures([(each.off.domains[name], each.on.domains[name]) for each in rounds])
            for name in domains
        },
    }


def _figures(rounds: list[tuple[_Tally, _Tally]]) -> dict[str, object]:
    """Return medians over the rounds of (off, on)."""
    return {
        "emitted_per_step": round(median(on.tokens / max(on.steps, 1) for _, on in rounds), 3),
        "acceptance": round(median(on.accepted / max(on.drafted, 1) for _, on in rounds), 3),
        "drafted_per_step": round(median(on.drafted / max(on.steps, 1) for _, on in rounds), 2),
        "tok_s": round(median(on.rate for _, on in rounds), 2),
        "tok_s_off": round(median(off.rate for off, _ in rounds), 2),
        "speedup": round(median(on.rate / off.rate for off, on in rounds if off.rate), 3),
    }


def _capture_figures(rounds: list[_Round]) -> dict[str, object]:
    """Return what capturing brought and cost; nothing without it."""
    pairs = [(each.on, each.uncaptured) for each in rounds if each.uncaptured is not None]
    if not pairs:
        return {}
    ratios = [without.total.rate / on.total.rate for on, without in pairs if on.total.rate]
    return {
        "tok_s_uncaptured": round(median(without.total.rate for _, without in pairs), 2),
        "capture_cost_ratio": round(median(ratios), 4) if ratios else None,
        "capture_is_identical": all(on.outputs == without.outputs for on, without in pairs),
        "samples": sum(on.samples for on, _ in pairs),
        "captured_tokens": sum(on.captured_tokens for on, _ in pairs),
    }


def _cost_curve(rig: Rig, rows: int) -> dict[str, float]:
    """Return predicted step times with n nodes for each row, as multiples of that without."""
    cost, attended = rig.card.step_cost, rows * _CURVE_CONTEXT
    alone_s = cost.step_s(StepShape(rows=rows, attended=attended))
    return {
        str(n): round(
            cost.step_s(
                StepShape(
                    rows=rows,
                    tree_nodes=n * rows,
                    attended=attended,
                    tree_attended=n * attended,
                )
            )
            / alone_s,
            3,
        )
        for n in _CURVE_NODES
    }


def _print_domains(report: dict[str, object]) -> None:
    domains = report["domains"]
    assert isinstance(domains, dict)
    print(f"{'domain':<20}{'tokens/step':>12}{'acceptance':>12}{'tok/s':>10}{'off':>10}{'x':>7}")
    for name, part in {**domains, "all": report}.items():
        assert isinstance(part, dict)
        print(
            f"{name[:19]:<20}{part['emitted_per_step']:>12}{part['acceptance']:>12}"
            f"{part['tok_s']:>10}{part['tok_s_off']:>10}{part['speedup']:>7}"
        )
