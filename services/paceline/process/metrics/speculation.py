"""Metrics of speculation in a worker; accepted / drafted and emitted / rounds are the ratios."""

from __future__ import annotations

from paceline.process.metrics.declaration import Area, counter, gauge
from paceline.process.metrics.labelled import Label

MAX_VERSIONS = 4
"""Versions of one drafter that have series; drafts change for as long as the worker lives."""

MAX_POSITIONS = 8
"""Positions of a draft that have series; what is accepted behind them is rare."""

MAX_DRAFTERS = 16
"""Twice the models that a bank may have, and the drafters that are no models."""

MAX_VERSION_SERIES = MAX_DRAFTERS * MAX_VERSIONS

DRAFTER = Label("drafter", "who drafted; `model:NAME` for one of a bank", max_values=MAX_DRAFTERS)
VERSION = Label(
    "version",
    f"of its weights, empty without any; the latest {MAX_VERSIONS} of a drafter",
    max_values=MAX_VERSION_SERIES,
)
_REASON = Label(
    "reason",
    "it pays, it would not, tried to learn whether it does, named by the request",
    ("on", "off", "explore", "forced"),
)
_POSITION = Label(
    "position", "in the draft, from 1", tuple(str(1 + each) for each in range(MAX_POSITIONS))
)


class SpeculationArea(Area):
    """What drafts bring; at most half a second old."""

    title = "Workers: speculation"
    exported_by = frozenset({"worker"})

    speculation_rounds = counter(
        "Drafts verified.", "drafts", DRAFTER, VERSION, limit=MAX_VERSION_SERIES
    )
    speculation_drafted_tokens = counter(
        "Tokens proposed.", "tokens", DRAFTER, VERSION, limit=MAX_VERSION_SERIES
    )
    speculation_accepted_tokens = counter(
        "Proposed tokens accepted.", "tokens", DRAFTER, VERSION, limit=MAX_VERSION_SERIES
    )
    speculation_emitted_tokens = counter(
        "Tokens emitted by passes that verified a draft.",
        "tokens",
        DRAFTER,
        VERSION,
        limit=MAX_VERSION_SERIES,
    )
    speculation_draft_seconds = counter(
        "Time spent on drafting.", "seconds", DRAFTER, VERSION, limit=MAX_VERSION_SERIES
    )
    speculation_decisions = counter("Decisions of the controller.", "decisions", DRAFTER, _REASON)
    speculation_position_tried = counter(
        "Drafts with a token at this position behind an accepted one.", "drafts", DRAFTER, _POSITION
    )
    speculation_position_accepted = counter(
        "Drafts whose token at this position was accepted.", "drafts", DRAFTER, _POSITION
    )
    speculation_predicted_tokens_per_second = gauge(
        "What the controller's last choice promised.", "tokens per second"
    )
    speculation_off_tokens_per_second = gauge(
        "What the same step promised without a draft.", "tokens per second"
    )
    speculation_state_bytes = gauge(
        "Memory of what a drafter keeps for all sequences.", "bytes", DRAFTER
    )
    speculation_state_nodes = gauge(
        "Entries in what a drafter keeps for all sequences.", "entries", DRAFTER
    )
