"""Looks at a running platform from outside: status, metrics, books, processes."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from paceline.v1 import kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.platform import Platform
from tests.waiting import until_sync


def get(url: str) -> str:
    """Return the body of a page."""
    with urllib.request.urlopen(url, timeout=5) as response:
        text: str = response.read().decode()
        return text


def status(platform: Platform) -> dict[str, Any]:
    """Return the gateway's status."""
    content: dict[str, Any] = json.loads(get(f"http://{platform.http}/status"))
    return content


def members(platform: Platform, *roles: str) -> list[dict[str, Any]]:
    """Return members of the given roles."""
    return [m for m in status(platform)["members"] if m["role"] in roles]


def metric(address: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    total = 0.0
    for family in text_string_to_metric_families(get(f"http://{address}/metrics")):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                total += sample.value
    return total


def fleet_metric(platform: Platform, name: str, *roles: str, **labels: str) -> float:
    """Return a metric summed over all members of the given roles."""
    addresses = [m["metrics_address"] for m in members(platform, *roles)]
    return sum(metric(address, name, **labels) for address in addresses)


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def num_fds(pid: int) -> int:
    """Return the number of open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def worker_books(address: str) -> worker_pb2.CheckIntegrityResponse:
    """Ask a worker to check its books."""
    with grpc.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        answer: worker_pb2.CheckIntegrityResponse = stub.CheckIntegrity(
            worker_pb2.CheckIntegrityRequest(), timeout=10
        )
        return answer


def node_stats(address: str) -> kvstore_pb2.GetStatsResponse:
    """Ask a KV node for its counters."""
    with grpc.insecure_channel(address) as channel:
        stub = kvstore_pb2_grpc.KvNodeServiceStub(channel)
        answer: kvstore_pb2.GetStatsResponse = stub.GetStats(
            kvstore_pb2.GetStatsRequest(), timeout=10
        )
        return answer


def unrest(platform: Platform) -> list[str]:
    """Return what is still held anywhere for a request; empty when the platform is at rest."""
    found = []
    now = status(platform)
    if now["requests"]["running"]:
        found.append(f"gateway: {now['requests']['running']} running")
    for member in now["members"]:
        if member["role"] in ("prefill", "decode"):
            try:
                books = worker_books(member["address"])
            except grpc.RpcError as error:
                # The lease of a killed worker outlives it.
                found.append(f"{member['id']}: {error.code()}")
                continue
            found += [f"{member['id']}: {problem}" for problem in books.violations]
            held = (books.num_requests, books.num_held_blocks, books.num_streams)
            if any(held):
                found.append(f"{member['id']}: requests, blocks, streams {held}")
        elif member["role"] == "kvstore":
            stats = node_stats(member["address"])
            if stats.num_pinned_blocks:
                found.append(f"{member['id']}: {stats.num_pinned_blocks} pinned")
    return found


def until_at_rest(platform: Platform, timeout_s: float = 15.0) -> None:
    """Wait until nothing is held for any request."""
    last: list[str] = []

    def is_at_rest() -> bool:
        last[:] = unrest(platform)
        return not last

    try:
        until_sync(is_at_rest, timeout_s)
    except AssertionError as error:
        raise AssertionError(f"not at rest: {last}") from error
