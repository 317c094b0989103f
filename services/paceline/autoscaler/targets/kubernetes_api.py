"""The few calls to a Kubernetes API server that scaling needs, with their errors declared.

The official client brings credentials (service account, or a kubeconfig with whatever log-in it
names), TLS and paths; answers are read here, since of large objects only a few fields matter.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from paceline.autoscaler.targets.base import TargetError

_MERGE_PATCH = "application/merge-patch+json"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

_STATUS: dict[int, tuple[str, bool]] = {
    400: ("target-refused", False),
    401: ("target-unauthenticated", False),
    403: ("target-forbidden", False),
    404: ("target-not-found", False),
    409: ("target-conflict", True),
    410: ("target-gone", True),
    422: ("target-refused", False),
    429: ("target-throttled", True),
}
"""HTTP status -> reason, and whether it may pass by itself."""


class KubernetesApi:
    """Reads and patches scales and pods of one namespace."""

    def __init__(self, namespace: str, kubeconfig: Path | None, timeout_s: float) -> None:
        self.namespace = namespace or _own_namespace()
        self._kubeconfig = kubeconfig
        self._timeout_s = timeout_s
        self._client: client.ApiClient | None = None
        self._connecting = asyncio.Lock()

    async def read_scale(self, deployment: str) -> dict[str, Any]:
        """Return the Scale of a Deployment.

        Raises:
            TargetError: every method does, for all that a server or a network can do.
        """
        return await self._call(
            lambda api: client.AppsV1Api(
                api
            ).read_namespaced_deployment_scale_without_preload_content(deployment, self.namespace)
        )

    async def patch_scale(
        self, deployment: str, replicas: int, resource_version: str
    ) -> dict[str, Any]:
        """Set the replicas, unless the Deployment changed since `resource_version`."""
        body = {"metadata": {"resourceVersion": resource_version}, "spec": {"replicas": replicas}}
        return await self._call(
            lambda api: client.AppsV1Api(
                api
            ).patch_namespaced_deployment_scale_without_preload_content(
                deployment, self.namespace, body, _content_type=_MERGE_PATCH
            )
        )

    async def list_autoscalers(self) -> list[dict[str, Any]]:
        """Return the HorizontalPodAutoscalers of the namespace."""
        reply = await self._call(
            lambda api: client.AutoscalingV2Api(
                api
            ).list_namespaced_horizontal_pod_autoscaler_without_preload_content(self.namespace)
        )
        items = reply.get("items")
        if not isinstance(items, list):
            raise TargetError("a list without items", reason="target-garbage")
        return [item for item in items if isinstance(item, dict)]

    async def annotate_pod(self, pod: str, name: str, value: str | None) -> None:
        """Set an annotation of a pod; None takes it away."""
        body = {"metadata": {"annotations": {name: value}}}
        await self._call(
            lambda api: client.CoreV1Api(api).patch_namespaced_pod_without_preload_content(
                pod, self.namespace, body, _content_type=_MERGE_PATCH
            )
        )

    async def close(self) -> None:
        """Close the connections; the next call opens new ones, with fresh credentials."""
        api, self._client = self._client, None
        if api is not None:
            await api.close()

    async def _connected(self) -> client.ApiClient:
        async with self._connecting:
            if self._client is None:
                self._client = await _connect(self._kubeconfig)
            return self._client

    async def _call(self, send: Callable[[client.ApiClient], Awaitable[Any]]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await send(await self._connected())
                body = await reply.read()
        except TimeoutError as error:
            text = f"no answer within {self._timeout_s:g} s"
            raise TargetError(text, reason="target-timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            text = str(error) or type(error).__name__
            raise TargetError(text, reason="target-unreachable") from error
        except client.ApiException as error:
            raise TargetError(str(error), reason="target-error") from error
        if 200 <= reply.status < 300:
            return _object(body)
        if reply.status == 401:
            # Log-ins of a kubeconfig expire; the next call logs in again.
            await self.close()
        raise _refusal(reply.status, reply.headers.get("Retry-After"), body)


async def _connect(kubeconfig: Path | None) -> client.ApiClient:
    """Open a client by kubeconfig where one is named, else as the pod's service account."""
    configuration = client.Configuration()
    is_in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ
    try:
        if kubeconfig is None and "KUBECONFIG" not in os.environ and is_in_cluster:
            config.load_incluster_config(client_configuration=configuration)
        else:
            path = None if kubeconfig is None else str(kubeconfig)
            await config.load_kube_config(path, client_configuration=configuration)
    except Exception as error:
        # A file in any state, and log-ins that run other programs: there is no list of errors.
        text = f"no credentials for Kubernetes: {error}"
        raise TargetError(text, reason="target-unauthenticated", is_retryable=False) from error
    # Whether and when a call is repeated is decided by the caller.
    configuration.retries = None
    return client.ApiClient(configuration)


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise TargetError(f"answers {body[:60]!r}", reason="target-garbage") from error
    if not isinstance(data, dict):
        raise TargetError(f"answers {body[:60]!r}", reason="target-garbage")
    return data


def _refusal(status: int, retry_after: str | None, body: bytes) -> TargetError:
    unknown = ("target-error", True) if status >= 500 else ("target-garbage", True)
    reason, is_retryable = _STATUS.get(status, unknown)
    try:
        text = str(json.loads(body)["message"])
    except (KeyError, TypeError, ValueError, RecursionError):
        text = body[:60].decode(errors="replace")
    return TargetError(
        f"answers {status}: {text}",
        reason=reason,
        is_retryable=is_retryable,
        retry_after_s=_seconds(retry_after),
    )


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After header; dates, which API servers do not send, are 0."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip() or "default"
    except OSError:
        return "default"
