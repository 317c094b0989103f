"""Settings of the trainer process: flags, environment (PACELINE_*), file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from paceline.domain.drafts import MAX_DRAFTERS
from paceline.process.settings import ServiceSettings


class TrainerSettings(ServiceSettings):
    """One trainer: the target whose drafts it keeps, and where."""

    model: Path
    """Directory of the target's checkpoint (Hugging Face layout)."""
    draft: str = ""
    """Directory of the draft that always stays, the floor; empty takes `draft` in the target's
    directory."""
    draft_registry: Path | None = None
    """Directory of versions and their records; one trainer at a time has it. By default one for
    the target under `PACELINE_STATE_DIR`, else `$XDG_STATE_HOME/paceline`, else
    `~/.local/state/paceline`; where another trainer has that one, the next beside it."""
    port: int = Field(default=0, ge=0, le=65535)
    """gRPC port; 0 takes any free one."""
    advertise_host: str = ""
    """Host under which workers reach this trainer; empty means `host`."""
    draft_keep: int = Field(default=16, ge=2)
    """Versions that the registry keeps; beyond, the oldest that nobody needs go."""
    draft_registry_mb: int = Field(default=8192, ge=1)
    """Size of the registry in MiB beyond which the oldest versions that nobody needs go."""
    offer_mb: int = Field(default=4096, ge=1)
    """Largest checkpoint in MiB that operators may offer."""
    training: bool = True
    """Whether a learner trains on live traffic; without it drafts come from operators only."""
    learn: Literal["model", "medusa"] = "model"
    """What the learner trains: the small model, whose versions are tried on live traffic, or Medusa
    heads, which are written to `heads` in the registry's directory and tried by nobody. Heads learn
    from workers with `capture_hidden`; `paceline up --learn` sets both."""
    loss: Literal["forward-kl", "reverse-kl", "cross-entropy", "total-variation", "lk"] = "lk"
    """What the learner minimises; docs/training.md compares them."""
    positions: Literal["all", "first-rejected", "accepted", "rejected-heavy"] = "all"
    """Which captured tokens it learns from."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of AdamW, after a short warm-up."""
    spare: Literal["leftover-cores", "idle-machine"] = "leftover-cores"
    """What counts as spare: cores that busy workers leave, or a machine whose workers are idle."""
    candidate_steps: int = Field(default=24, ge=1)
    """Optimiser steps between two candidates; more while candidates bring nothing. Between two
    times that heads are written, too."""
    canary_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of sequences that a version on trial drafts for. It has passed the gate and can cost
    nothing but time, and two halves decide in the fewest sequences."""
    control_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of sequences that the version before the active one keeps, to compare with; 0 watches
    nothing."""
    specialists: int = Field(default=0, ge=0, lt=MAX_DRAFTERS)
    """Domains that may get drafts of their own at a time, trained from the one that everybody uses;
    0 trains none. What engines draft with grows by each, and training shares its time with them."""
    specialist_rank: int = Field(default=8, ge=1, le=256)
    """Rank of what such a draft learns over the one that it is made from."""
    specialist_steps: int = Field(default=128, ge=1)
    """Optimiser steps that such a draft is trained for; fewer where its samples would be met more
    than 4 times."""
    drain_grace_s: float = Field(default=5.0, ge=0)
    """Seconds that running calls get on SIGTERM."""

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if self.learn != "model" and not self.training:
            raise ValueError(f"learn {self.learn}: nothing learns without training")
        return self

    @property
    def floor(self) -> Path:
        """Directory of the floor."""
        return Path(self.draft) if self.draft else self.model / "draft"
