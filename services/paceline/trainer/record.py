"""Records of drafts as JSON values, both ways, as the registry keeps them on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from paceline.domain.draft_records import DraftDecision, DraftRecord, DraftScore, DraftStage

_TEXTS = ("version", "digest", "drafter", "parent")
_COUNTS = ("number", "num_bytes", "num_samples", "num_tokens")


def record_to_json(record: DraftRecord) -> dict[str, Any]:
    """Return a record as JSON values."""
    decisions = [asdict(d) | {"stage": d.stage.value} for d in record.decisions]
    return asdict(record) | {"stage": record.stage.value, "decisions": decisions}


def record_from_json(values: Mapping[str, Any]) -> DraftRecord:
    """Read a record.

    Raises:
        ValueError, TypeError, KeyError: these are not the values of one.
    """
    for name in _TEXTS:
        if not isinstance(values[name], str):
            raise TypeError(f"{name} is not a text")
    for name in _COUNTS:
        if not isinstance(values[name], int) or values[name] < 0:
            raise TypeError(f"{name} is not a count")
    if not isinstance(values.get("rank", 0), int):
        raise TypeError("rank is not a count")
    return DraftRecord(
        **{
            **values,
            "created_s": float(values["created_s"]),
            "stage": DraftStage(values["stage"]),
            "scores": tuple(DraftScore(**score) for score in values["scores"]),
            "decisions": tuple(
                DraftDecision(**{**decision, "stage": DraftStage(decision["stage"])})
                for decision in values["decisions"]
            ),
        }
    )
