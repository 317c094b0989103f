"""Samples of live traffic reach the stream, and those of whoever keeps out do not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest

from paceline.domain.learnings import Sample, tenant_digest
from paceline.process.sample_stream import START, SampleStream
from paceline.rpc.draft_codec import sample_from_proto
from paceline.v1.inference_pb2 import GenerateRequest, ListModelsRequest
from paceline.v1.samples_pb2 import Sample as SampleMessage
from tests.checkpoints import DEMO
from tests.e2e.client import Answer, Client, encode, greedy
from tests.e2e.probe import fleet_metric
from tests.platform import Platform
from tests.waiting import until

KEYS = {
    "open": {"tenant": "open"},
    "closed": {"tenant": "closed", "allow_training": False},
}


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    directory = tmp_path_factory.mktemp("capture")
    keys = directory / "keys.json"
    keys.write_text(json.dumps(KEYS))
    flags = ("--prefill", "0", "--decode", "1", "--api-keys", str(keys))
    # Enough time that every request is captured.
    with Platform(directory, *flags, env={"PACELINE_CAPTURE_SHARE": "0.5"}) as up:
        yield up


async def test_samples_arrive_and_those_of_others_do_not(platform: Platform) -> None:
    async with Client(platform.grpc) as client:
        (model,) = (
            await client.stub.ListModels(ListModelsRequest(), timeout=10, metadata=bearer("open"))
        ).models
        digest = model.digest
        cases = {
            "wanted": ("open", greedy("Tell me of ships.", domain="ships")),
            "refused": ("open", greedy("Tell me of gold.", domain="gold", allow_training=False)),
            "closed": ("closed", greedy("Tell me of fire.", domain="fire", allow_training=True)),
            "last": ("open", greedy("Tell me of bread.", domain="bread")),
        }
        answers = {name: await ask(client, key, request) for name, (key, request) in cases.items()}
    samples = await samples_of(platform, digest, {"ships", "bread"})
    assert {(s.tenant, s.domain) for s in samples} == {
        (tenant_digest(b"open"), "ships"),
        (tenant_digest(b"open"), "bread"),
    }
    for sample in samples:
        name = "wanted" if sample.domain == "ships" else "last"
        whole = [*encode(DEMO, cases[name][1].prompt), *answers[name].ids[0]]
        first = sample.first_position
        assert list(sample.token_ids) == whole[first : first + len(sample.token_ids)]
        # Greedy: the token that came is the likeliest of its distribution.
        width = 4 * sample.top
        best = [sample.top_ids[i : i + 4] for i in range(0, len(sample.top_ids), width)]
        captured = sample.token_ids[sample.num_context :]
        assert [int.from_bytes(b, "little") for b in best] == list(captured)
    tokens = sum(sample.num_captured for sample in samples)
    assert fleet_metric(platform, "paceline_capture_tokens_total", "decode") == tokens
    assert fleet_metric(platform, "paceline_capture_samples_total", "decode") == len(samples)
    assert fleet_metric(platform, "paceline_capture_seconds_total", "decode") > 0
    assert fleet_metric(platform, "paceline_capture_dropped_total", "decode") == 0


async def ask(client: Client, key: str, request: GenerateRequest) -> Answer:
    request.max_tokens, request.ignore_eos = 200, True
    return await client.generate(request, metadata=bearer(key))


def bearer(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


async def samples_of(platform: Platform, digest: str, domains: set[str]) -> Sequence[Sample]:
    """Wait until all that was captured is there; return it."""
    stream = SampleStream(platform.redis_url, platform.fleet, digest)

    async def read() -> list[Sample]:
        entries = await stream.read(START, 999)
        return [sample_from_proto(SampleMessage.FromString(payload)) for _, payload in entries]

    async def has_all() -> bool:
        read_now = await read()
        num_captured = fleet_metric(platform, "paceline_capture_samples_total", "decode")
        return len(read_now) == num_captured and {s.domain for s in read_now} >= domains

    try:
        await until(has_all)
        return await read()
    finally:
        await stream.close()
