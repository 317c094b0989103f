"""DraftService: checks what comes in, asks the desk, the attendants or the conductor, answers.

Calls are those of proto/paceline/v1/drafts.proto. Workers attend and fetch; operators list,
offer, roll back, pin and remove (`paceline draft`). Holds nothing between calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from paceline.domain.draft_files import is_draft_file
from paceline.domain.draft_records import DraftRecord
from paceline.domain.drafts import MODEL_DRAFTER, is_label, label_of
from paceline.domain.errors import (
    InvalidRequestError,
    PacelineError,
    PreconditionError,
    UnavailableError,
)
from paceline.process.metrics import Metrics
from paceline.rpc.draft_codec import (
    entry_to_proto,
    outcome_from_proto,
    slack_from_proto,
    state_from_proto,
)
from paceline.rpc.record_codec import record_to_proto
from paceline.trainer.attendants import Attendant, Attendants
from paceline.trainer.desk import Desk, DraftStore
from paceline.trainer.offers import Inbox, Offer
from paceline.trainer.streams import next_message, pieces, read_on
from paceline.v1 import drafts_pb2, drafts_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE_NAME = "paceline.v1.DraftService"

FIRST_S = 5.0
"""Seconds in which a worker says who it is."""
SILENCE_S = 10.0
"""A worker that says nothing for ten of its beats is taken for gone."""
PLAN_PERIOD_S = 3.0
"""How often the plan is said again, so that workers know that somebody is there."""
PIECE_TIMEOUT_S = 30.0
"""Longest wait for the next piece of an offer."""

MAX_ID_CHARS = 256

# The generated base class is untyped; naming its type once keeps the rest checked.
_Base: Any = drafts_pb2_grpc.DraftServiceServicer


class OfferTaker(Protocol):
    """Decides about an offered checkpoint; its directory is gone afterwards."""

    def __call__(self, directory: Path, drafter: str, is_forced: bool) -> Awaitable[DraftRecord]:
        """Return the record that it got."""
        ...


class DraftServicer(_Base):  # type: ignore[misc]
    """The calls of the draft registry."""

    def __init__(
        self,
        model_digest: str,
        desk: Desk,
        attendants: Attendants,
        inbox: Inbox,
        offer: OfferTaker,
        metrics: Metrics,
    ) -> None:
        """Serve workers whose target has this digest; hand offers to `offer`."""
        self._model_digest = model_digest
        self._desk = desk
        self._attendants = attendants
        self._inbox = inbox
        self._offer = offer
        self._metrics = metrics

    # -- workers --------------------------------------------------------------------------

    async def Attend(
        self, requests: AsyncIterator[drafts_pb2.AttendRequest], context: object
    ) -> AsyncIterator[drafts_pb2.AttendResponse]:
        """Hear a worker and tell it the plan, until it leaves or the trainer ends."""
        first = await next_message(requests, FIRST_S)
        if first is None:
            return
        self._check_worker(first)
        with self._attendants.attending(first.worker_id, first.machine) as attendant:
            self._note(attendant, first)
            hearing = asyncio.create_task(self._hear(requests, attendant), name="hearing")
            try:
                while not self._attendants.is_closed:
                    # Made when it is sent: a worker that reads slowly misses what was between.
                    number, plan = self._attendants.number, self._attendants.plan or ()
                    yield drafts_pb2.AttendResponse(entries=map(entry_to_proto, plan))
                    if await self._has_left(hearing, number):
                        return
            finally:
                hearing.cancel()
                await asyncio.gather(hearing, return_exceptions=True)

    def _check_worker(self, first: drafts_pb2.AttendRequest) -> None:
        _check_text("worker_id", first.worker_id)
        _check_text("machine", first.machine)
        if first.model_digest != self._model_digest:
            raise PreconditionError("drafts here are for another model", reason="other-model")
        if self._attendants.plan is None:
            raise UnavailableError("the trainer has just started", reason="trainer-starting")

    async def _hear(
        self, requests: AsyncIterator[drafts_pb2.AttendRequest], attendant: Attendant
    ) -> None:
        while (message := await next_message(requests, SILENCE_S)) is not None:
            self._note(attendant, message)

    def _note(self, attendant: Attendant, message: drafts_pb2.AttendRequest) -> None:
        self._attendants.note(
            attendant,
            slack=slack_from_proto(message.slack) if message.HasField("slack") else None,
            outcomes=tuple(map(outcome_from_proto, message.outcomes)),
            state=state_from_proto(message.state) if message.HasField("state") else None,
        )

    async def _has_left(self, hearing: asyncio.Task[None], number: int) -> bool:
        """Wait for another plan or for the time to say it again; tell whether the worker left."""
        news = asyncio.create_task(self._attendants.until_news(number), name="plan-news")
        try:
            await asyncio.wait(
                {hearing, news}, timeout=PLAN_PERIOD_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            news.cancel()
        if hearing.done():
            hearing.result()
        return hearing.done()

    async def FetchDraft(
        self, request: drafts_pb2.FetchDraftRequest, context: object
    ) -> AsyncIterator[drafts_pb2.FetchDraftResponse]:
        """Stream the files of a version."""
        paths = await self._desk.read(lambda store: store.files(store.get(request.version).version))
        for path in paths:
            if is_draft_file(path.name):
                async for data in pieces(path):
                    self._metrics.trainer_sent_bytes.inc(len(data))
                    yield drafts_pb2.FetchDraftResponse(file=path.name, data=data)

    # -- operators ------------------------------------------------------------------------

    async def ListDrafts(
        self, request: drafts_pb2.ListDraftsRequest, context: object
    ) -> drafts_pb2.ListDraftsResponse:
        """List the versions, newest first."""
        records = await self._desk.read(lambda store: store.records(request.drafter))
        return drafts_pb2.ListDraftsResponse(drafts=map(record_to_proto, records))

    async def GetDraft(
        self, request: drafts_pb2.GetDraftRequest, context: object
    ) -> drafts_pb2.GetDraftResponse:
        """Return one version."""
        _check_text("version", request.version)
        record = await self._desk.read(lambda store: store.get(request.version))
        return drafts_pb2.GetDraftResponse(draft=record_to_proto(record))

    async def OfferDraft(
        self, requests: AsyncIterator[drafts_pb2.OfferDraftRequest], context: object
    ) -> drafts_pb2.OfferDraftResponse:
        """Take a checkpoint in, and let the conductor decide."""
        first = await next_message(requests, PIECE_TIMEOUT_S)
        if first is None:
            raise InvalidRequestError("file", "nothing was offered", reason="not-a-draft")
        try:
            record = await self._take_in(first, requests)
        except PacelineError:
            await read_on(requests)
            raise
        return drafts_pb2.OfferDraftResponse(draft=record_to_proto(record))

    async def _take_in(
        self,
        first: drafts_pb2.OfferDraftRequest,
        requests: AsyncIterator[drafts_pb2.OfferDraftRequest],
    ) -> DraftRecord:
        drafter = _drafter(first.drafter)
        with self._inbox.turn():
            # On the loop: a caller who leaves meanwhile would leave a directory that nobody knows.
            offer = self._inbox.open()
            try:
                await self._receive(offer, first, requests)
                return await self._offer(offer.directory, drafter, first.is_forced)
            finally:
                await asyncio.to_thread(offer.remove)

    async def _receive(
        self,
        offer: Offer,
        first: drafts_pb2.OfferDraftRequest,
        requests: AsyncIterator[drafts_pb2.OfferDraftRequest],
    ) -> None:
        message: drafts_pb2.OfferDraftRequest | None = first
        while message is not None:
            if message.file or message.data:
                await _to_its_end(offer.write, message.file, message.data)
            message = await next_message(requests, PIECE_TIMEOUT_S)
        await _to_its_end(offer.finish)

    async def RollbackDraft(
        self, request: drafts_pb2.RollbackDraftRequest, context: object
    ) -> drafts_pb2.RollbackDraftResponse:
        """Go back to an earlier version."""
        drafter = _drafter(request.drafter)

        def roll_back(store: DraftStore) -> DraftRecord:
            version = store.get(request.version).version if request.version else ""
            return store.rollback(drafter, version)

        record = await self._desk.change(roll_back)
        return drafts_pb2.RollbackDraftResponse(draft=record_to_proto(record))

    async def PinDraft(
        self, request: drafts_pb2.PinDraftRequest, context: object
    ) -> drafts_pb2.PinDraftResponse:
        """Keep a version, or keep none any more."""
        drafter = _drafter(request.drafter)

        def pin(store: DraftStore) -> DraftRecord:
            if not request.version:
                return store.unpin(drafter)
            return store.pin(drafter, store.get(request.version).version)

        record = await self._desk.change(pin)
        return drafts_pb2.PinDraftResponse(draft=record_to_proto(record))

    async def RemoveDrafter(
        self, request: drafts_pb2.RemoveDrafterRequest, context: object
    ) -> drafts_pb2.RemoveDrafterResponse:
        """Take a drafter out of the bank."""
        drafter = _drafter(request.drafter)
        record = await self._desk.change(lambda store: store.remove(drafter))
        logger.info("drafter-removed", extra={"fields": {"drafter": drafter}})
        return drafts_pb2.RemoveDrafterResponse(draft=record_to_proto(record))


def _drafter(name: str) -> str:
    drafter = name or MODEL_DRAFTER
    if drafter != MODEL_DRAFTER and not (
        drafter.startswith(f"{MODEL_DRAFTER}:") and is_label(label_of(drafter))
    ):
        text = f"must be {MODEL_DRAFTER} or {MODEL_DRAFTER}:NAME"
        raise InvalidRequestError("drafter", text)
    return drafter


def _check_text(field: str, text: str) -> None:
    if not text or len(text) > MAX_ID_CHARS or not text.isprintable():
        raise InvalidRequestError(field, f"must be 1 to {MAX_ID_CHARS} printable characters")


async def _to_its_end(call: Callable[..., None], *args: object) -> None:
    """Run a call on a thread; one that has begun has ended when this ends, cancelled or not.

    What it writes may be removed then.
    """
    running = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        # Nobody is left to hear of it.
        running.exception()
        raise
