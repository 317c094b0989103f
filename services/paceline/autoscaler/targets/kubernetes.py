"""Deployments of a Kubernetes cluster, by their `scale` subresource.

Needs no more than `get` and `patch` on `deployments/scale` of the two Deployments; `list` on
horizontalpodautoscalers to notice that another scaler owns one, and `patch` on pods to have the
cheapest pods end first, where those are granted. A pod's name is its worker's member id.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.autoscaler.targets.base import TargetError
from paceline.autoscaler.targets.kubernetes_api import KubernetesApi
from paceline.domain.member import Role

logger = logging.getLogger(__name__)

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Among pods alike, a ReplicaSet ends those of lowest cost first; pods without it cost 0."""

_MAX_TRIES = 3
"""Per change: a Deployment's version moves with its status while pods come and go."""

_NOT_GRANTED = ("target-forbidden", "target-not-found")


@dataclass(frozen=True, slots=True)
class Scale:
    """What matters of a Scale."""

    replicas: int
    version: str


class KubernetesTarget:
    """Sets `spec.replicas` of one Deployment per pool."""

    def __init__(self, api: KubernetesApi, deployments: Mapping[Role, str]) -> None:
        self._api = api
        self._deployments = dict(deployments)
        self._scales: dict[Role, Scale] = {}
        self._marked: dict[Role, set[str]] = {role: set() for role in deployments}
        self._refusals: set[str] = set()

    async def read(self) -> Mapping[Role, int]:
        """Return `spec.replicas` of each Deployment.

        Raises:
            TargetError: with reason target-owned where a HorizontalPodAutoscaler owns one.
        """
        await self._check_owners()
        for role, deployment in self._deployments.items():
            self._scales[role] = await self._read_scale(deployment)
        return {role: scale.replicas for role, scale in self._scales.items()}

    async def apply(self, role: Role, replicas: int, victims: Sequence[str]) -> None:
        """Patch the Deployment's scale, and before that mark the pods that are to end first."""
        deployment = self._deployments[role]
        before = self._scales.get(role) or await self._read_scale(deployment)
        await self._mark(role, victims if replicas < before.replicas else ())
        scale = before
        for _ in range(_MAX_TRIES):
            try:
                reply = await self._api.patch_scale(deployment, replicas, scale.version)
                self._scales[role] = _scale(reply)
                return
            except TargetError as error:
                if error.reason != "target-conflict":
                    raise
                scale = await self._read_scale(deployment)
                self._scales[role] = scale
                if scale.replicas not in (before.replicas, replicas):
                    text = f"{deployment} was set to {scale.replicas} by somebody else"
                    raise TargetError(text, reason="target-changed") from error
        raise TargetError(f"{deployment} changes too often", reason="target-conflict")

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def _read_scale(self, deployment: str) -> Scale:
        return _scale(await self._api.read_scale(deployment))

    async def _check_owners(self) -> None:
        try:
            scalers = await self._api.list_autoscalers()
        except TargetError as error:
            if error.reason not in _NOT_GRANTED:
                raise
            return self._note_refusal("other scalers cannot be looked for", error)
        for scaler in scalers:
            owned = _scaled_by(scaler)
            if owned in self._deployments.values():
                name = scaler.get("metadata", {}).get("name", "?")
                text = f"HorizontalPodAutoscaler {name} owns {owned}"
                raise TargetError(text, reason="target-owned", is_retryable=False)

    async def _mark(self, role: Role, victims: Sequence[str]) -> None:
        """Give victims the lowest deletion costs, in order, and others none."""
        costs: dict[str, str | None] = dict.fromkeys(self._marked[role] - set(victims))
        costs |= {pod: str(i - len(victims)) for i, pod in enumerate(victims)}
        for pod, cost in costs.items():
            try:
                await self._api.annotate_pod(pod, DELETION_COST, cost)
            except TargetError as error:
                if error.reason == "target-not-found":
                    continue
                # The size matters more than which pod ends: whichever it is drains.
                self._note_refusal("pods cannot be marked", error)
                break
        self._marked[role] = set(victims)

    def _note_refusal(self, text: str, error: TargetError) -> None:
        if text in self._refusals:
            return
        self._refusals.add(text)
        fields = {"what": text, "reason": error.reason, "error": error.message}
        logger.warning("not-granted", extra={"fields": fields})


def _scale(data: Mapping[str, Any]) -> Scale:
    try:
        # The API leaves a count of 0 out.
        replicas = data["spec"].get("replicas", 0)
        version = data["metadata"]["resourceVersion"]
    except (KeyError, TypeError, AttributeError) as error:
        raise TargetError("not a Scale", reason="target-garbage") from error
    if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 0:
        raise TargetError(f"a Scale with {replicas!r} replicas", reason="target-garbage")
    return Scale(replicas, str(version))


def _scaled_by(scaler: Mapping[str, Any]) -> str | None:
    """Return the name of the Deployment that a HorizontalPodAutoscaler scales."""
    try:
        target = scaler["spec"]["scaleTargetRef"]
        return str(target["name"]) if target["kind"] == "Deployment" else None
    except (KeyError, TypeError):
        return None
