"""Settings of the autoscaler process: flags, environment (PACELINE_*), file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from paceline.autoscaler.policies.rules import Bounds, ScalingRules
from paceline.domain.member import Role
from paceline.process.settings import ServiceSettings


class AutoscalerSettings(ServiceSettings):
    """What is watched, what is wanted, and who starts workers."""

    member_id: str = "autoscaler"
    """Name in the fleet, the same for all autoscalers of one: only one of them acts, the others
    wait for its lease to end."""
    advertise_host: str = ""
    """Host under which others reach the metrics port; empty means `host`."""

    prometheus_url: str = "http://127.0.0.1:9090"
    """Base URL of the Prometheus that scrapes the fleet; may hold a path and credentials."""
    prometheus_selector: str = ""
    """PromQL label matchers put into every query, such as `namespace="llm"`; needed where one
    Prometheus watches more than one fleet."""
    prometheus_token_file: Path | None = None
    """File with a bearer token for Prometheus; read for every query."""
    prometheus_ca_file: Path | None = None
    """PEM file of authorities for https; by default those of the system."""
    query_timeout_s: float = Field(default=2.0, gt=0)
    """Deadline of each query."""
    window_s: float = Field(default=60.0, ge=2)
    """Over which rates are taken. Four times the scrape interval (15 s by default) or more: a
    rate needs two samples, and may lack one."""
    stale_s: float = Field(default=60.0, gt=0)
    """Age from which samples are not used: some missed scrapes."""

    policy: str = "default"
    """Name of the scaling policy."""
    slo_ttft_s: float = Field(default=1.0, gt=0)
    """Target for the time to the first token; exact in the metrics where it is a bucket's edge."""
    slo_itl_s: float = Field(default=0.1, gt=0)
    """Target for the gap between pieces of an output; exact where it is a bucket's edge."""
    slo_goal: float = Field(default=0.99, gt=0, lt=1)
    """Share of requests that are to be within their targets."""
    prefill_min: int = Field(default=1, ge=0)
    """Fewest prefill workers while there is traffic."""
    prefill_max: int = Field(default=8, ge=0)
    """Most prefill workers; without any, decode workers compute prompts themselves."""
    decode_min: int = Field(default=1, ge=0)
    """Fewest decode workers while there is traffic."""
    decode_max: int = Field(default=8, ge=1)
    """Most decode workers."""
    budget: int = Field(default=0, ge=0)
    """Most workers of both pools together; 0 sets no limit beyond theirs."""
    period_s: float = Field(default=5.0, ge=0.2)
    """Between two decisions. Parked requests do not wait for it."""
    start_up_s: float = Field(default=60.0, ge=0)
    """From asking for a worker to one that takes requests; decisions look that far ahead."""
    idle_s: float = Field(default=0.0, ge=0)
    """Time without requests after which both pools go to zero; 0 keeps their fewest."""

    target: Literal["local", "kubernetes", "dry-run"] = "dry-run"
    """Who starts and ends workers: the supervisor of `paceline up`, Deployments, or nobody: a dry
    run logs and journals what it would do."""
    target_timeout_s: float = Field(default=5.0, gt=0)
    """Deadline of each call to the target."""
    control_address: str = ""
    """host:port of the supervisor (target local)."""
    namespace: str = ""
    """Namespace of the Deployments (target kubernetes); empty takes the pod's own."""
    prefill_deployment: str = "paceline-prefill"
    """Deployment of the prefill workers."""
    decode_deployment: str = "paceline-decode"
    """Deployment of the decode workers."""
    kubeconfig: Path | None = None
    """File of credentials; by default $KUBECONFIG, the service account, or ~/.kube/config."""
    foreign_changes: Literal["hold", "stop", "ignore"] = "hold"
    """What to do when somebody else sets a pool's size: leave all pools alone for a while, until
    the next start, or go on."""
    foreign_hold_s: float = Field(default=600.0, ge=0)
    """How long a size that somebody else set is left alone: what an operator needs to look."""

    decisions_kept: int = Field(default=512, ge=1)
    """Decisions kept in memory, for /decisions."""
    journal: Path | None = None
    """File of JSON lines with every observation and decision; `paceline autoscaler explain
    --replay` reads it."""
    journal_mb: int = Field(default=64, ge=1)
    """Size in MiB of the journal and its predecessor together."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, least, most in (
            ("prefill", self.prefill_min, self.prefill_max),
            ("decode", self.decode_min, self.decode_max),
        ):
            if least > most:
                raise ValueError(f"{name}_min {least} is over its max {most}")
        least = self.prefill_min + self.decode_min
        if 0 < self.budget < least:
            raise ValueError(f"budget {self.budget} is less than the pools' fewest, {least}")
        if self.target == "local" and not self.control_address:
            raise ValueError("target local: control_address must be set")
        return self

    @property
    def bounds(self) -> dict[Role, Bounds]:
        """Sizes that pools may have."""
        return {
            Role.PREFILL: Bounds(self.prefill_min, self.prefill_max),
            Role.DECODE: Bounds(self.decode_min, self.decode_max),
        }

    def rules(self) -> ScalingRules:
        """Return what policies are to keep to."""
        return ScalingRules(
            ttft_s=self.slo_ttft_s,
            itl_s=self.slo_itl_s,
            goal_ratio=self.slo_goal,
            bounds=self.bounds,
            budget_replicas=self.budget or None,
            period_s=self.period_s,
            start_up_s=self.start_up_s,
            idle_s=self.idle_s or None,
        )

    def describe(self) -> dict[str, Any]:
        """Return the settings for the log, without credentials in URLs."""
        values = super().describe()
        scheme, _, rest = self.prometheus_url.partition("//")
        if "@" in rest:
            values["prometheus_url"] = f"{scheme}//***@{rest.rpartition('@')[2]}"
        return values
