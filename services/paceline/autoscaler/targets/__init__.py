"""What carries decisions out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from paceline.autoscaler.settings import AutoscalerSettings
from paceline.autoscaler.targets.base import ScaleTarget
from paceline.domain.member import Role


def create_target(
    settings: AutoscalerSettings, count: Callable[[], Mapping[Role, int]]
) -> ScaleTarget:
    """Return the target that the settings name; `count` tells the workers that are there.

    Modules are imported here, because the Kubernetes client is large.

    Raises:
        ValueError: what it needs is not installed.
    """
    if settings.target == "kubernetes":
        return _kubernetes(settings)
    if settings.target == "local":
        from paceline.autoscaler.targets.local import LocalTarget

        return LocalTarget(settings.control_address, settings.target_timeout_s)
    from paceline.autoscaler.targets.recording import RecordingTarget

    return RecordingTarget(count)


def _kubernetes(settings: AutoscalerSettings) -> ScaleTarget:
    try:
        from paceline.autoscaler.targets.kubernetes import KubernetesTarget
        from paceline.autoscaler.targets.kubernetes_api import KubernetesApi
    except ModuleNotFoundError as error:
        raise ValueError(
            f"target kubernetes: pip install 'paceline[autoscaler]' ({error})"
        ) from error
    api = KubernetesApi(settings.namespace, settings.kubeconfig, settings.target_timeout_s)
    names = {
        Role.PREFILL: settings.prefill_deployment,
        Role.DECODE: settings.decode_deployment,
    }
    return KubernetesTarget(api, names)
