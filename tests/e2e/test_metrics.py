"""What all processes of a platform export is declared, clean, and moves with what they do."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from paceline.process.metrics.book import all_declared
from tests.e2e.client import Client, greedy
from tests.e2e.probe import fleet_metric, get, members
from tests.platform import Platform
from tests.promtool import promtool
from tests.waiting import until_sync

SERVICES = {"prefill": "worker", "decode": "worker"}


async def test_metrics_of_a_platform(demo_platform: Platform) -> None:
    def total(name: str, *roles: str, **labels: str) -> float:
        return fleet_metric(demo_platform, f"paceline_{name}", *roles, **labels)

    received = total("requests_received_total", "gateway")
    good_before = total("slo_requests_total", "gateway")
    prompt = "There was once a fisherman who lived with his wife in a hut by the sea. " * 4
    async with Client(demo_platform.grpc) as client:
        for number in range(3):
            await client.generate(greedy(f"{number}: {prompt}", max_tokens=24))
    assert total("requests_received_total", "gateway") == received + 3
    assert total("slo_requests_total", "gateway") == good_before + 3
    assert total("ready_workers", "gateway", pool="decode") == 2
    assert total("queue_seconds_count", "decode") >= 3
    assert total("kv_transfer_seconds_count", "decode", direction="load") > 0
    assert total("kv_transfer_seconds_count", "prefill", direction="save") > 0
    assert total("engine_cached_bytes", "prefill", "decode") > 0
    until_sync(lambda: total("kv_node_used_bytes", "kvstore") > 0)
    for role in ("gateway", "prefill", "decode", "kvstore"):
        until_sync(lambda role=role: total("redis_seconds_count", role) > 0)  # type: ignore[misc]
        assert total("event_loop_delay_seconds_count", role) > 0

    for member in members(demo_platform, "gateway", "prefill", "decode", "kvstore", "trainer"):
        service = SERVICES.get(member["role"], member["role"])
        page = get(f"http://{member['metrics_address']}/metrics")
        promtool("check", "metrics", text=page)
        families = {family.name for family in text_string_to_metric_families(page)}
        declared = {
            each.name.removesuffix("_total")
            for each in all_declared()
            if service in each.area.exported_by
        }
        assert {name for name in families if not name.startswith("process_")} == declared
        assert 'metric="' in page
        overflow = total("metrics_label_overflow_total", member["role"])
        assert overflow == 0
