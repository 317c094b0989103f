"""Scaling Deployments over HTTP, with what an API server may answer."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.responses import Response

from paceline.autoscaler.problems import TARGET_REASONS
from paceline.autoscaler.targets.base import TargetError
from paceline.autoscaler.targets.kubernetes import DELETION_COST, KubernetesTarget
from paceline.autoscaler.targets.kubernetes_api import KubernetesApi
from paceline.domain.member import Role
from tests.unit.autoscaler.kubernetes_server import (
    NAMESPACE,
    Cluster,
    kubeconfig,
    serving,
    status,
)

NAMES = {Role.PREFILL: "prefill", Role.DECODE: "decode"}


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
async def url(cluster: Cluster) -> AsyncIterator[str]:
    async with serving(cluster) as url:
        yield url


@pytest.fixture
async def target(url: str, tmp_path: Path) -> AsyncIterator[KubernetesTarget]:
    target = KubernetesTarget(
        KubernetesApi(NAMESPACE, kubeconfig(tmp_path, url), timeout_s=5.0), NAMES
    )
    yield target
    await target.close()


async def refused(target: KubernetesTarget, size: int = 5) -> TargetError:
    with pytest.raises(TargetError) as caught:
        await target.apply(Role.DECODE, size, ())
    assert caught.value.reason in TARGET_REASONS
    return caught.value


async def test_sizes_are_read_and_set_by_the_scale_subresource(
    target: KubernetesTarget, cluster: Cluster
) -> None:
    assert await target.read() == {Role.PREFILL: 1, Role.DECODE: 2}
    await target.apply(Role.DECODE, 5, ())
    assert cluster.replicas == {"prefill": 1, "decode": 5}
    assert await target.read() == {Role.PREFILL: 1, Role.DECODE: 5}
    touched = {request.rpartition("/")[2] for request in cluster.requests}
    assert touched == {"scale", "horizontalpodautoscalers"}


async def test_zero_is_a_size(target: KubernetesTarget, cluster: Cluster) -> None:
    await target.read()
    await target.apply(Role.DECODE, 0, ())
    assert cluster.replicas["decode"] == 0
    assert (await target.read())[Role.DECODE] == 0


async def test_victims_get_the_lowest_deletion_costs_in_order(
    target: KubernetesTarget, cluster: Cluster
) -> None:
    cluster.replicas["decode"] = 4
    cluster.pods = {f"decode-{i}": {"other": "kept"} for i in range(4)}
    await target.read()
    await target.apply(Role.DECODE, 2, ("decode-3", "decode-1"))
    costs = {name: notes.get(DELETION_COST) for name, notes in cluster.pods.items()}
    assert costs == {"decode-0": None, "decode-1": "-1", "decode-2": None, "decode-3": "-2"}
    assert cluster.pods["decode-3"]["other"] == "kept"
    assert cluster.replicas["decode"] == 2


async def test_marks_of_pods_that_are_spared_after_all_are_taken_away(
    target: KubernetesTarget, cluster: Cluster
) -> None:
    cluster.replicas["decode"] = 4
    cluster.pods = {"a": {}, "b": {}}
    await target.read()
    await target.apply(Role.DECODE, 2, ("a", "b", "long-gone"))
    await target.apply(Role.DECODE, 4, ())
    assert cluster.pods == {"a": {}, "b": {}}


async def test_without_leave_to_mark_pods_the_size_is_set_all_the_same(
    target: KubernetesTarget, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.forbidden = {"patch pods"}
    cluster.pods = {"a": {}}
    await target.read()
    await target.apply(Role.DECODE, 1, ("a",))
    await target.apply(Role.DECODE, 0, ("a",))
    assert cluster.replicas["decode"] == 0
    assert [record.getMessage() for record in caplog.records].count("not-granted") == 1


async def test_an_autoscaler_that_owns_a_deployment_is_respected(
    target: KubernetesTarget, cluster: Cluster
) -> None:
    cluster.scalers = {"web": "web", "keda-hpa-decode": "decode"}
    with pytest.raises(TargetError, match="keda-hpa-decode owns decode") as caught:
        await target.read()
    assert (caught.value.reason, caught.value.is_retryable) == ("target-owned", False)
    cluster.scalers = {"web": "web"}
    assert (await target.read())[Role.DECODE] == 2


@pytest.mark.parametrize("answer", [None, status(404, "the server could not find it")])
async def test_without_leave_to_look_for_autoscalers_sizes_are_read_all_the_same(
    target: KubernetesTarget, cluster: Cluster, answer: Response | None
) -> None:
    if answer is None:
        cluster.forbidden = {"list horizontalpodautoscalers"}
    else:
        cluster.failures["GET horizontalpodautoscalers"] = [answer]
    assert (await target.read())[Role.DECODE] == 2


async def test_a_version_that_moved_is_read_again(
    target: KubernetesTarget, cluster: Cluster
) -> None:
    await target.read()
    cluster.conflicts = 2
    await target.apply(Role.DECODE, 5, ())
    assert cluster.replicas["decode"] == 5


async def test_a_version_that_keeps_moving_is_a_conflict(
    target: KubernetesTarget, cluster: Cluster
) -> None:
    await target.read()
    cluster.conflicts = 99
    error = await refused(target)
    assert (error.reason, error.is_retryable) == ("target-conflict", True)
    assert sum(request.startswith("PATCH") for request in cluster.requests) == 3


async def test_a_size_that_somebody_else_set_meanwhile_is_not_overwritten(
    target: KubernetesTarget, cluster: Cluster
) -> None:
    await target.read()
    cluster.replicas["decode"] = 9
    cluster.touch("decode")
    error = await refused(target)
    assert error.reason == "target-changed"
    assert cluster.replicas["decode"] == 9


@pytest.mark.parametrize(
    ("answer", "reason", "is_retryable", "retry_after_s"),
    [
        (status(400, "bad"), "target-refused", False, 0),
        (status(403, "forbidden"), "target-forbidden", False, 0),
        (status(404, "not found"), "target-not-found", False, 0),
        (status(410, "gone"), "target-gone", True, 0),
        (status(422, "invalid"), "target-refused", False, 0),
        (status(429, "busy", **{"Retry-After": "17"}), "target-throttled", True, 17),
        (status(500, "oh", **{"Retry-After": "soon"}), "target-error", True, 0),
        (status(503, "no leader", **{"Retry-After": "3"}), "target-error", True, 3),
        (Response("<html>", 504), "target-error", True, 0),
        (Response("<html>", 200), "target-garbage", True, 0),
        (Response("[]", 200), "target-garbage", True, 0),
        (Response('{"spec": {"replicas": 3}}', 200), "target-garbage", True, 0),
        (Response("", 418), "target-garbage", True, 0),
    ],
)
async def test_each_refusal_has_a_reason_and_says_whether_it_may_pass(
    target: KubernetesTarget,
    cluster: Cluster,
    answer: Response,
    reason: str,
    is_retryable: bool,
    retry_after_s: float,
) -> None:
    await target.read()
    cluster.failures["PATCH scale"] = [answer]
    error = await refused(target)
    assert (error.reason, error.is_retryable) == (reason, is_retryable)
    assert error.retry_after_s == retry_after_s
    await target.apply(Role.DECODE, 5, ())
    assert cluster.replicas["decode"] == 5


@pytest.mark.parametrize("replicas", ['"3"', "-1", "true", "null", "2.5"])
async def test_a_scale_without_a_size_is_garbage(
    target: KubernetesTarget, cluster: Cluster, replicas: str
) -> None:
    body = f'{{"metadata": {{"resourceVersion": "1"}}, "spec": {{"replicas": {replicas}}}}}'
    cluster.failures["GET scale"] = [Response(body), Response(body)]
    with pytest.raises(TargetError) as caught:
        await target.read()
    assert caught.value.reason == "target-garbage"


async def test_a_log_in_that_expired_is_made_again(
    url: str, cluster: Cluster, tmp_path: Path
) -> None:
    path = kubeconfig(tmp_path, url, token="expired")
    target = KubernetesTarget(KubernetesApi(NAMESPACE, path, timeout_s=5.0), NAMES)
    with pytest.raises(TargetError) as caught:
        await target.read()
    assert (caught.value.reason, caught.value.is_retryable) == ("target-unauthenticated", False)
    kubeconfig(tmp_path, url)
    assert (await target.read())[Role.DECODE] == 2
    await target.close()


async def test_a_server_that_hangs_costs_one_deadline(
    url: str, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.hangs = True
    target = KubernetesTarget(KubernetesApi(NAMESPACE, kubeconfig(tmp_path, url), 0.3), NAMES)
    with pytest.raises(TargetError, match=r"no answer within 0.3 s") as caught:
        await target.read()
    assert (caught.value.reason, caught.value.is_retryable) == ("target-timeout", True)
    await target.close()


async def test_nobody_listens(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path, "http://127.0.0.1:9")
    target = KubernetesTarget(KubernetesApi(NAMESPACE, path, 5.0), NAMES)
    with pytest.raises(TargetError) as caught:
        await target.read()
    assert caught.value.reason == "target-unreachable"
    await target.close()


@pytest.mark.parametrize("text", ["", "nonsense", "{}", ": ["])
async def test_a_kubeconfig_of_no_use_is_no_log_in(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    target = KubernetesTarget(KubernetesApi(NAMESPACE, path, 5.0), NAMES)
    with pytest.raises(TargetError) as caught:
        await target.read()
    assert caught.value.reason == "target-unauthenticated"
    await target.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
async def test_a_server_is_believed_only_with_a_certificate_of_the_cluster(tmp_path: Path) -> None:
    key, certificate = await asyncio.to_thread(self_signed, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"metadata": {"resourceVersion": "1"}, "spec": {"replicas": 3}, "items": []}'
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for ca, is_believed in ((None, False), (certificate, True)):
        path = kubeconfig(tmp_path, url, ca=ca)
        target = KubernetesTarget(KubernetesApi(NAMESPACE, path, 5.0), NAMES)
        if is_believed:
            assert (await target.read())[Role.DECODE] == 3
        else:
            with pytest.raises(TargetError) as caught:
                await target.read()
            assert caught.value.reason == "target-unreachable"
        await target.close()
    server.close()


def self_signed(directory: Path) -> tuple[Path, Path]:
    """Make a key and a certificate of 127.0.0.1."""
    key, certificate = directory / "key.pem", directory / "ca.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return key, certificate
