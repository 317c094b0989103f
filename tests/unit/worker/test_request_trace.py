"""What the engine tells of a request becomes spans, in order and bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from paceline.process.spans import Span, create_tracer
from paceline.v1 import engine_pb2, worker_pb2
from paceline.worker.request_trace import MAX_EVENTS, RequestTrace
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan

BLOCK_BYTES = 4096


class Recorded:
    """One request's trace, and what arrives of it once it is closed."""

    def __init__(self, receiver: OtlpReceiver, *, is_resumed: bool = False) -> None:
        self._receiver = receiver
        self._tracer = create_tracer(receiver.endpoint, 1.0, {"service.name": "test"})
        self._root: Span = self._tracer.begin("call", None)
        self.trace = RequestTrace(
            self._root, block_bytes=BLOCK_BYTES, is_resumed=is_resumed, now_s=1.0
        )

    def step(self, start_s: float, end_s: float, num_tokens: int = 0, **fields: object) -> None:
        chunks = [worker_pb2.TokenChunk(token_ids=[7] * num_tokens)] if num_tokens else []
        output = engine_pb2.RequestOutput(chunks=chunks, **fields)  # type: ignore[arg-type]
        self.trace.note_step(output, start_s, end_s)

    def spans(self) -> dict[str, ReceivedSpan]:
        self.trace.close()
        self._root.end()
        self._tracer.close(30.0)
        root = next(span for span in self._receiver.spans if span.name == "call")
        found = {span.name: span for span in self._receiver.spans if span is not root}
        assert {span.parent_id for span in found.values()} <= {root.span_id}
        return found


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def seconds(span: ReceivedSpan) -> float:
    return (span.end_ns - span.start_ns) / 1e9


def rounds(*drafts: tuple[str, int, int]) -> Sequence[engine_pb2.DraftRound]:
    return [
        engine_pb2.DraftRound(drafter=name, num_drafted=drafted, num_accepted=accepted)
        for name, drafted, accepted in drafts
    ]


def test_waiting_prefill_and_decode_follow_each_other(receiver: OtlpReceiver) -> None:
    request = Recorded(receiver)
    hits = {"local_hit_tokens": 16, "store_hit_tokens": 32}
    request.step(2.0, 2.5, computed_tokens=148, **hits)
    request.step(2.5, 2.75, computed_tokens=200)
    request.step(3.0, 3.25, 1, computed_tokens=201)
    request.step(4.0, 4.5, 3, computed_tokens=201, rounds=rounds(("trie", 4, 2)))
    request.step(5.0, 5.5, 1, computed_tokens=201, is_finished=True)
    spans = request.spans()
    assert seconds(spans["queue"]) == pytest.approx(1.0)
    prefill, decode = spans["engine.prefill"], spans["engine.decode"]
    assert prefill.start_ns == spans["queue"].end_ns
    assert seconds(prefill) == pytest.approx(1.25)
    assert prefill.attributes["paceline.local_hit_tokens"] == 16
    assert prefill.attributes["paceline.store_hit_tokens"] == 32
    chunks = [event.attributes for event in prefill.events_named("chunk")]
    assert [chunk["paceline.tokens"] for chunk in chunks] == [100, 52, 1]
    assert [chunk["paceline.step_s"] for chunk in chunks] == [0.5, 0.25, 0.25]
    assert decode.start_ns == prefill.end_ns
    assert seconds(decode) == pytest.approx(2.25)
    (first,) = decode.events_named("first-token")
    assert first.time_ns == decode.start_ns
    (draft,) = decode.events_named("draft")
    assert draft.attributes == {
        "paceline.drafter": "trie",
        "paceline.drafted_tokens": 4,
        "paceline.accepted_tokens": 2,
        "paceline.step_s": 0.5,
    }
    assert decode.attributes == {"paceline.steps": 3, "paceline.tokens": 5}


def test_long_requests_are_told_in_sums(receiver: OtlpReceiver) -> None:
    request = Recorded(receiver)
    for i in range(200):
        request.step(2.0 + i, 2.5 + i, computed_tokens=10 * (i + 1))
    for i in range(300):
        drafter = "trie" if i % 3 else "model"
        request.step(300.0 + i, 300.5 + i, 2, rounds=rounds((drafter, 4, 1)))
    spans = request.spans()
    prefill, decode = spans["engine.prefill"], spans["engine.decode"]
    assert len(prefill.events_named("chunk")) == MAX_EVENTS
    assert prefill.attributes["paceline.chunks"] == 200
    assert len(decode.events_named("draft")) == MAX_EVENTS
    sums = {e.attributes["paceline.drafter"]: e.attributes for e in decode.events_named("drafts")}
    for drafter, count in (("trie", 200), ("model", 100)):
        assert sums[drafter]["paceline.rounds"] == count
        assert sums[drafter]["paceline.drafted_tokens"] == 4 * count
        assert sums[drafter]["paceline.accepted_tokens"] == count
    assert decode.attributes == {"paceline.steps": 300, "paceline.tokens": 600}


def test_blocks_that_move_are_spans_of_their_own(receiver: OtlpReceiver) -> None:
    request = Recorded(receiver)
    request.trace.note_loaded(
        engine_pb2.KvLoaded(num_blocks=3, num_bytes=12, started_s=2.0, ended_s=2.25)
    )
    # Pins that went back unread are none.
    request.trace.note_loaded(engine_pb2.KvLoaded())
    request.trace.note_published(4, 3.0, 3.5)
    request.trace.note_published(2, 5.0, 6.0)
    spans = request.spans()
    assert seconds(spans["kv.load"]) == pytest.approx(0.25)
    assert spans["kv.load"].attributes["paceline.bytes"] == 12
    published = spans["kv.publish"]
    assert seconds(published) == pytest.approx(3.0)
    assert published.attributes["paceline.blocks"] == 6
    assert published.attributes["paceline.bytes"] == 6 * BLOCK_BYTES
    assert published.attributes["paceline.commits"] == 2


def test_a_request_that_never_ran_has_waited_only(receiver: OtlpReceiver) -> None:
    assert set(Recorded(receiver).spans()) == {"queue"}


def test_a_resumed_request_does_not_claim_what_it_computed(receiver: OtlpReceiver) -> None:
    request = Recorded(receiver, is_resumed=True)
    request.step(2.0, 2.5, computed_tokens=700)
    request.step(3.0, 3.5, 1, computed_tokens=700)
    chunks = request.spans()["engine.prefill"].events_named("chunk")
    assert [chunk.attributes for chunk in chunks] == [{"paceline.step_s": 0.5}] * 2
