"""Main of a worker's engine process: frames in, engine steps, frames out.

`python -m paceline.worker.engine_process FD OPTIONS_JSON SERVICE LOG_LEVEL`, started by
worker/bridge.py with one end of a socket pair. It ends when the worker closes the other end,
never by a signal to the process group: the worker drains first. The only module of this
package that reaches torch.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from typing import NoReturn

from paceline.domain.blocks import LAYOUT_VERSION
from paceline.domain.errors import PacelineError
from paceline.engine.build import EngineCard, build_engine
from paceline.engine.engine import Engine
from paceline.engine.events import (
    DraftsEvent,
    EngineEvent,
    EngineLoad,
    FailedEvent,
    LearningsEvent,
    LoadedEvent,
    LookupEvent,
    OutputEvent,
    SavedEvent,
)
from paceline.engine.options import EngineOptions
from paceline.engine.ports import Slot, StoredBlock
from paceline.engine.spec.report import REPORT_PERIOD_S, SpeculationReport
from paceline.kvstore.arena import ArenaView
from paceline.process.lifecycle import die_with_parent
from paceline.process.logs import setup_logging
from paceline.rpc import codec, draft_codec
from paceline.rpc.frames import ConnectionClosedError, FrameSocket
from paceline.v1 import engine_pb2, kvstore_pb2
from paceline.worker.speculation import report_to_proto

logger = logging.getLogger("paceline.worker.engine_process")

_STALLED_POLL_S = 0.002
"""Pause between steps that could not do anything, for example for want of pages."""


def main(argv: list[str]) -> int:
    """Run the engine until the worker goes away; return the exit code."""
    fd, options, service, log_level = argv
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    setup_logging(service, log_level)
    sock = FrameSocket(socket.socket(fileno=int(fd)))
    try:
        return _serve(sock, EngineOptions.from_json(options))
    except ConnectionClosedError:
        return 0
    except Exception:
        logger.exception("engine-crashed")
        return 1


def _serve(sock: FrameSocket, options: EngineOptions) -> int:
    try:
        engine, card = build_engine(options)
    except (PacelineError, ValueError, OSError) as error:
        reason = error.reason if isinstance(error, PacelineError) else "engine-start-failed"
        failed = engine_pb2.RequestFailed(reason=reason, message=str(error))
        sock.send(engine_pb2.EngineEvent(failed=failed))
        return 1
    # A full collection of what importing torch leaves takes 40 ms; none of it is garbage.
    gc.collect()
    gc.freeze()
    sock.send(engine_pb2.EngineEvent(ready=_ready(card)))
    EngineLoop(engine, sock).run()


class EngineLoop:
    """Alternates between commands and steps."""

    def __init__(self, engine: Engine, sock: FrameSocket) -> None:
        self._engine = engine
        self._sock = sock
        self._reported: EngineLoad | None = None
        self._speculation: SpeculationReport | None = None
        """The last one sent."""
        self._speculation_steps = 0
        """Steps it tells of."""

    def run(self) -> NoReturn:
        """Loop until the socket closes (ConnectionClosedError)."""
        progressed = True
        while True:
            self._sock.wait(self._pause_s(progressed))
            for command in self._sock.recv_ready(engine_pb2.EngineCommand):
                self._apply(command)
            steps = self._engine.load().num_steps
            started_s = time.monotonic()
            events = self._engine.step()
            progressed = bool(events) or self._engine.load().num_steps != steps
            self._send(events, started_s)

    def _pause_s(self, progressed: bool) -> float | None:
        if self._engine.has_work:
            return 0.0 if progressed else _STALLED_POLL_S
        deadline = self._engine.next_deadline_s()
        pause_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        load = self._engine.load()
        if load.speculation is None or load.num_steps == self._speculation_steps:
            return pause_s
        # The next report is of the last steps.
        return REPORT_PERIOD_S if pause_s is None else min(pause_s, REPORT_PERIOD_S)

    def _apply(self, command: engine_pb2.EngineCommand) -> None:
        engine = self._engine
        match command.WhichOneof("command"):
            case "submit":
                self._submit(command.submit)
            case "cancel":
                cancel = command.cancel
                index = cancel.index if cancel.HasField("index") else None
                engine.cancel(cancel.request_id, index)
            case "kv_load":
                blocks = tuple(_block_from_proto(b) for b in command.kv_load.blocks)
                engine.answer_lookup(command.kv_load.lookup_id, blocks)
            case "kv_grant":
                engine.grant_slots([_slot_from_proto(s) for s in command.kv_grant.slots])
            case "arena":
                engine.attach_arena(_map_arena(command.arena))
            case "drafts":
                engine.change_drafts(draft_codec.change_from_proto(command.drafts))
            case "check_integrity":
                load = engine.load()
                report = engine_pb2.IntegrityReport(
                    violations=engine.check_integrity(),
                    num_requests=engine.num_requests,
                    num_held_blocks=load.total_blocks - load.free_blocks,
                )
                self._sock.send(engine_pb2.EngineEvent(integrity=report))
            case "ping":
                self._sock.send(engine_pb2.EngineEvent(pong=engine_pb2.Pong()))

    def _submit(self, message: engine_pb2.SubmitRequest) -> None:
        try:
            self._engine.submit(
                codec.spec_from_proto(message.spec),
                is_prefill_only=message.is_prefill_only,
                resumed=codec.resumed_from_proto(message.resumed),
                finished_indices=frozenset(message.finished_indices),
                fleet_id=message.fleet_request_id,
                is_traced=message.is_traced,
            )
        except PacelineError as error:
            failed = FailedEvent(message.spec.request_id, error.reason, error.message)
            self._send([failed], time.monotonic())

    def _send(self, events: list[EngineEvent], started_s: float) -> None:
        """Send KV news in order, then the step's outputs in one frame with the load if changed."""
        step = engine_pb2.StepOutput(started_s=started_s, ended_s=time.monotonic())
        for event in events:
            match event:
                case OutputEvent():
                    step.outputs.append(_output(event))
                case LookupEvent():
                    lookup = engine_pb2.KvLookup(
                        lookup_id=event.lookup_id,
                        request_id=event.request_id,
                        keys=event.keys,
                        tail_key=event.tail_key,
                    )
                    self._sock.send(engine_pb2.EngineEvent(kv_lookup=lookup))
                case LoadedEvent():
                    loaded = engine_pb2.KvLoaded(
                        lookup_id=event.lookup_id,
                        corrupt_keys=event.corrupt_keys,
                        num_blocks=event.num_blocks,
                        num_bytes=event.num_bytes,
                        started_s=event.started_s,
                        ended_s=event.ended_s,
                    )
                    self._sock.send(engine_pb2.EngineEvent(kv_loaded=loaded))
                case SavedEvent():
                    saved = engine_pb2.KvSaved(
                        request_id=event.request_id,
                        blocks=[_block_to_proto(b) for b in event.blocks],
                        started_s=event.started_s,
                    )
                    self._sock.send(engine_pb2.EngineEvent(kv_saved=saved))
                case FailedEvent():
                    _log_failure(event)
                    failed = engine_pb2.RequestFailed(
                        request_id=event.request_id, reason=event.reason, message=event.message
                    )
                    self._sock.send(engine_pb2.EngineEvent(failed=failed))
                case LearningsEvent():
                    self._sock.send(engine_pb2.EngineEvent(learnings=_learnings(event)))
                case DraftsEvent():
                    drafts = draft_codec.state_to_proto(event.state)
                    self._sock.send(engine_pb2.EngineEvent(drafts=drafts))
        load = self._engine.load()
        # The step's duration alone is no news.
        comparable = replace(load, last_step_s=0.0, speculation=None)
        has_report = load.speculation is not self._speculation
        if step.outputs or has_report or comparable != self._reported:
            self._reported = comparable
            step.load.CopyFrom(_load(load))
            if has_report and load.speculation is not None:
                step.load.speculation.CopyFrom(report_to_proto(load.speculation))
                self._speculation_steps = load.num_steps
            self._speculation = load.speculation
            self._sock.send(engine_pb2.EngineEvent(step=step))


def _map_arena(change: engine_pb2.ArenaChange) -> ArenaView | None:
    if not change.path:
        return None
    try:
        return ArenaView(change.path, change.num_bytes)
    except OSError as error:
        # The node died a moment ago; the worker's next session brings another arena.
        logger.warning("arena-not-mapped", extra={"fields": {"error": str(error)}})
        return None


def _log_failure(event: FailedEvent) -> None:
    # The bridge appends the number of the call to the request's id.
    request_id = event.request_id.rpartition("#")[0]
    fields = {"request_id": request_id, "reason": event.reason, "error": event.message}
    logger.warning("request-failed", extra={"fields": fields})


def _ready(card: EngineCard) -> engine_pb2.EngineReady:
    config = card.config
    return engine_pb2.EngineReady(
        layout=kvstore_pb2.KvLayout(
            kv_root=card.kv_root,
            layout_version=LAYOUT_VERSION,
            dtype=card.dtype,
            block_size=card.block_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_bytes=card.block_bytes,
        ),
        model_digest=card.model_digest,
        max_context_tokens=card.max_context_tokens,
        vocab_size=config.vocab_size,
        num_kv_blocks=card.num_kv_blocks,
        step_cost=codec.step_cost_to_proto(card.step_cost),
        drafters=card.drafters,
        draft_version=card.draft_version,
        pid=os.getpid(),
    )


def _output(event: OutputEvent) -> engine_pb2.RequestOutput:
    return engine_pb2.RequestOutput(
        request_id=event.request_id,
        chunks=[codec.chunk_to_proto(chunk) for chunk in event.chunks],
        local_hit_tokens=event.local_hit_tokens,
        store_hit_tokens=event.store_hit_tokens,
        computed_tokens=event.computed_tokens,
        is_finished=event.is_finished,
        rounds=[
            engine_pb2.DraftRound(
                drafter=draft.drafter,
                num_drafted=draft.num_drafted,
                num_accepted=draft.num_accepted,
            )
            for draft in event.rounds
        ],
    )


def _learnings(event: LearningsEvent) -> engine_pb2.Learnings:
    return engine_pb2.Learnings(
        samples=[draft_codec.sample_to_proto(sample) for sample in event.samples],
        outcomes=[draft_codec.outcome_to_proto(outcome) for outcome in event.outcomes],
        capture_s=event.capture_s,
    )


def _load(load: EngineLoad) -> engine_pb2.EngineLoad:
    return engine_pb2.EngineLoad(
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        num_pending_prefill_tokens=load.pending_prefill_tokens,
        num_free_blocks=load.free_blocks,
        num_total_blocks=load.total_blocks,
        last_step_s=load.last_step_s,
        num_preemptions=load.num_preemptions,
        num_steps=load.num_steps,
        num_context_tokens=load.context_tokens,
        num_evictions=load.num_evictions,
        num_cached_blocks=load.cached_blocks,
    )


def _slot_from_proto(slot: kvstore_pb2.KvSlot) -> Slot:
    return Slot(offset=slot.offset, generation=slot.generation)


def _block_from_proto(block: kvstore_pb2.AcquiredBlock) -> StoredBlock:
    return StoredBlock(
        key=block.key,
        slot=_slot_from_proto(block.slot),
        checksum=block.checksum,
        num_tokens=block.num_tokens,
    )


def _block_to_proto(block: StoredBlock) -> kvstore_pb2.CommittedBlock:
    return kvstore_pb2.CommittedBlock(
        key=block.key,
        slot=kvstore_pb2.KvSlot(offset=block.slot.offset, generation=block.slot.generation),
        checksum=block.checksum,
        num_tokens=block.num_tokens,
        is_request_scoped=block.is_request_scoped,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
