"""Models, token counts and keys: what a caller may see and name."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.v1.inference_pb2 import (
    CountTokensRequest,
    GenerateRequest,
    ListModelsRequest,
    Message,
    MessageList,
)
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import CARD, answering, breaking, hang
from tests.unit.gateway.stack import Refusal, Stack, refusal_of, request_for


async def test_models_are_listed_as_the_fleet_has_them(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        models = (await stack.stub.ListModels(ListModelsRequest())).models
        assert [(m.name, m.is_ready) for m in models] == [("demo", False)]
        await stack.add()
        (model,) = (await stack.stub.ListModels(ListModelsRequest())).models
        assert model.is_ready
        assert (model.max_context_tokens, model.vocab_size) == (2048, 4096)
        assert model.digest == CARD.digest


@pytest.mark.parametrize(
    "name", ["nobody", "../../etc", "/etc/passwd", "Demo", "demo ", "x" * 9999]
)
async def test_other_names_are_not_found(redis: RedisServer, name: str) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        refusal = await stack.refused(request_for(model=name))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "model-not-found")
        assert name not in refusal.message
        assert await stack.generate(request_for(model="demo"))


async def test_tokens_are_counted_as_they_will_be_used(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        for fields in (
            {"prompt": "How many pens has Ann?"},
            {"messages": MessageList(messages=[Message(role="user", content="Hello")])},
        ):
            counted = await stack.stub.CountTokens(CountTokensRequest(**fields), timeout=5)
            await stack.generate(GenerateRequest(**fields, max_tokens=1))
            spec = stack.workers[0].decode_calls[-1].spec
            assert counted.num_tokens == len(counted.token_ids)
            assert list(counted.token_ids) == list(spec.prompt_token_ids)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (CountTokensRequest(), "input"),
        (CountTokensRequest(prompt=""), "prompt"),
        (CountTokensRequest(messages=MessageList()), "messages.messages"),
        (CountTokensRequest(prompt="x" * 1_000_000), "prompt"),
    ],
)
async def test_bad_counts_are_refused(
    redis: RedisServer, request_: CountTokensRequest, field: str
) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stack.stub.CountTokens(request_, timeout=5)
        refusal = refusal_of(error.value)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_counts_are_bounded_like_requests(redis: RedisServer) -> None:
    async with Stack(redis.url, max_in_flight=3, wait_for_worker_s=0.5) as stack:
        # Without a worker they wait for one.
        calls = [
            stack.stub.CountTokens(CountTokensRequest(prompt="x"), timeout=5) for _ in range(10)
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        codes = sorted(r.code().name for r in results if isinstance(r, grpc.aio.AioRpcError))
        assert codes == ["RESOURCE_EXHAUSTED"] * 7 + ["UNAVAILABLE"] * 3


KEYS = {
    "all": {"tenant": "a"},
    "other-tenant": {"tenant": "b"},
    "demo-only": {"tenant": "c", "models": ["demo"]},
    "elsewhere": {"tenant": "d", "models": ["other"]},
    "expired": {"tenant": "a", "expires": "2020-01-01T00:00:00+00:00"},
}


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def outcome(call: Any) -> Refusal | None:
    """Read a call to its end; return its refusal."""
    try:
        if hasattr(call, "read"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    return None


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(KEYS))
    return path


async def test_every_method_asks_for_a_key(redis: RedisServer, key_file: Path) -> None:
    async with Stack(redis.url, api_keys=key_file) as stack:
        await stack.add()
        methods = [
            (stack.stub.Generate, request_for()),
            (stack.stub.ListModels, ListModelsRequest()),
            (stack.stub.CountTokens, CountTokensRequest(prompt="x")),
        ]
        refusals = set()
        for method, request in methods:
            for metadata in (
                (),
                bearer("wrong"),
                bearer("expired"),
                bearer(""),
                (("authorization", "all"),),
                (("authorization", "Basic all"),),
            ):
                refusals.add(await outcome(method(request, metadata=metadata, timeout=5)))
            for scheme in ("Bearer", "bearer", "BEARER"):
                metadata = (("authorization", f"{scheme} all"),)
                assert await outcome(method(request, metadata=metadata, timeout=5)) is None
        (refusal,) = refusals
        assert refusal is not None
        assert refusal.code == grpc.StatusCode.UNAUTHENTICATED


async def test_a_tenant_sees_its_own_models_only(redis: RedisServer, key_file: Path) -> None:
    async with Stack(redis.url, api_keys=key_file) as stack:
        await stack.add()
        refusals = {
            await outcome(stack.stub.Generate(request_for(model=name), metadata=bearer(key)))
            for key, name in [
                ("elsewhere", "demo"),
                ("elsewhere", ""),
                ("elsewhere", "nobody"),
                ("demo-only", "nobody"),
            ]
        }
        refusals.add(
            await outcome(
                stack.stub.CountTokens(CountTokensRequest(prompt="x"), metadata=bearer("elsewhere"))
            )
        )
        (refusal,) = refusals
        assert refusal is not None
        assert refusal.code == grpc.StatusCode.PERMISSION_DENIED
        # On the list, but not here.
        absent = stack.stub.Generate(request_for(model="other"), metadata=bearer("elsewhere"))
        found = await outcome(absent)
        assert found is not None and found.code == grpc.StatusCode.NOT_FOUND
        for key, names in [("all", ["demo"]), ("demo-only", ["demo"]), ("elsewhere", [])]:
            listed = await stack.stub.ListModels(ListModelsRequest(), metadata=bearer(key))
            assert [m.name for m in listed.models] == names


async def test_tenants_share_neither_ids_nor_blocks(redis: RedisServer, key_file: Path) -> None:
    async with Stack(redis.url, api_keys=key_file) as stack:
        worker = await stack.add()
        stack.stage.decode("same", breaking(1, hang), answering())
        call = stack.stub.Generate(request_for(request_id="same"), metadata=bearer("all"))
        await call.read()
        other = stack.stub.Generate(request_for(request_id="same"), metadata=bearer("other-tenant"))
        assert await outcome(other) is None
        salts = [c.spec.cache_salt for c in worker.decode_calls]
        assert salts == [b"a", b"b"]
        call.cancel()


async def test_the_metadata_names_a_request_that_names_none(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        call = stack.stub.Generate(request_for(), metadata=(("x-request-id", "from-proxy"),))
        assert await outcome(call) is None
        assert worker.decode_calls[-1].spec.request_id.startswith("from-proxy.")
        call = stack.stub.Generate(
            request_for(request_id="mine"), metadata=(("x-request-id", "from-proxy"),)
        )
        assert await outcome(call) is None
        assert worker.decode_calls[-1].spec.request_id.startswith("mine.")
