"""Settings of the gateway process: flags, environment (PACELINE_*), file."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from paceline.process.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Ports, limits and routing of one gateway."""

    grpc_port: int = Field(default=50051, ge=0, le=65535)
    """Public gRPC port; 0 takes any free one."""
    http_port: int = Field(default=8080, ge=0, le=65535)
    """HTTP port: metrics, health, status; 0 takes any free one."""
    model: Path
    """Directory with the tokenizer and chat template; weights are not read."""
    served_model_name: str = ""
    """Name that clients use; empty means the directory's name."""
    api_keys: Path | None = None
    """JSON file of keys (docs/api.md); without it no key is asked for, on loopback only."""
    allow_anonymous: bool = False
    """Serves without keys also on addresses other than loopback."""
    routing_policy: str = "cost"
    """Name of the routing policy."""
    default_max_tokens: int = Field(default=256, ge=1)
    """max_tokens of requests that do not set it."""
    max_outputs: int = Field(default=16, ge=1)
    """Largest n of a request; each output holds KV of its own."""
    max_in_flight: int = Field(default=256, ge=1)
    """Requests admitted at a time; more are refused with a retry delay."""
    default_deadline_s: float = Field(default=300.0, gt=0)
    """Deadline of requests that come without one."""
    wait_for_worker_s: float = Field(default=10.0, ge=0)
    """How long a request waits for a worker to appear: about a restart's time."""
    park_s: float = Field(default=120.0, ge=0)
    """The same while an autoscaler is there, which may start workers: about the time that the
    slowest takes to be ready; never beyond the request's deadline."""
    max_parked: int = Field(default=256, ge=0)
    """Requests that wait for workers at a time; more are refused with a retry delay. They hold
    places of max_in_flight, too."""
    max_attempts: int = Field(default=4, ge=1)
    """Workers tried for one request per role."""
    slow_client_timeout_s: float = Field(default=30.0, gt=0)
    """How long one write may wait for the client."""
    max_message_bytes: int = Field(default=4 << 20, ge=1024)
    """Largest request message."""
    shm_bytes_per_s: float = Field(default=4e9, gt=0)
    """Assumed speed of moving KV on one machine, for routing."""
    grpc_bytes_per_s: float = Field(default=4e8, gt=0)
    """Assumed speed of moving KV between machines, for routing."""
    hop_s: float = Field(default=0.01, ge=0)
    """Cost of handing a request from a prefill to a decode worker, for routing; measured on
    loopback: time to first token is 13 ms longer than on one worker, one step included."""
    ttft_target_s: float = Field(default=1.0, gt=0)
    """Longest time to first token of a request that counts as good; an edge of the buckets."""
    itl_target_s: float = Field(default=0.1, gt=0)
    """Longest mean gap between tokens of a request that counts as good; an edge of the buckets."""
    drain_grace_s: float = Field(default=25.0, ge=0)
    """Seconds that running requests get to finish on SIGTERM."""

    @property
    def model_name(self) -> str:
        """Name that clients use."""
        return self.served_model_name or self.model.resolve().name
