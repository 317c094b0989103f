"""What drafts bring, what learning them costs, and which version is in use for what reason."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.dashboards.board import Row, board
from deploy.grafana.dashboards.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Panel,
    curves,
    number,
    rates,
    rows,
)
from deploy.grafana.dashboards.queries import CHOSEN, FLEET, Query, ratio
from deploy.grafana.dashboards.training import SPARE_GIVEN, samples, training

_DRAFTED = "paceline_speculation_drafted_tokens_total"
_ACCEPTED = "paceline_speculation_accepted_tokens_total"
_EMITTED = "paceline_speculation_emitted_tokens_total"
_ROUNDS = "paceline_speculation_rounds_total"
_HAS_VERSION = 'version!=""'
"""Drafters that are no models have none."""


def speculation() -> Dashboard:
    """Return the dashboard."""
    return board(
        "paceline-speculation",
        "Paceline / Speculation and training",
        "Acceptance of drafts, online training on spare capacity, versions and decisions.",
        [
            Row("Do drafts pay, does learning go on, what changed", _now()),
            Row("What drafts bring", _drafts()),
            Row("Versions", _versions()),
            Row("Samples", samples()),
            Row("Training", training()),
            Row("Over days, by recording rules", _recorded()),
        ],
    )


def _acceptance(*matchers: str, by: str = "") -> str:
    return ratio(CHOSEN.rate(_ACCEPTED, *matchers, by=by), CHOSEN.rate(_DRAFTED, *matchers, by=by))


def _per_round(*matchers: str, by: str = "") -> str:
    return ratio(CHOSEN.rate(_EMITTED, *matchers, by=by), CHOSEN.rate(_ROUNDS, *matchers, by=by))


def _now() -> list[Panel]:
    gain = ratio(
        CHOSEN.sum("paceline_speculation_predicted_tokens_per_second"),
        CHOSEN.sum("paceline_speculation_off_tokens_per_second"),
    )
    decided = FLEET.increase("paceline_draft_decisions_total", by="stage")
    return [
        number(
            "Accepted",
            "Share of drafted tokens that the target drew itself. What is enough depends on the "
            "cost of a step: see Expected gain.",
            "percentunit",
            Query(_acceptance(), "accepted"),
        ),
        number(
            "Tokens per pass",
            "Tokens emitted by a pass that verified a draft, 1 without any luck.",
            "none",
            Query(_per_round(), "tokens"),
            steps=[(1.2, GREEN)],
            base=ORANGE,
            decimals=2,
        ),
        number(
            "Expected gain",
            "Rate that the controllers' last choices promised over that without drafts. 1: they "
            "do not draft because it would not pay; below 1 is a mistake of the cost model.",
            "suffix: x",
            Query(gain, "gain"),
            steps=[(0.98, GREY), (1.02, GREEN)],
            base=RED,
            decimals=2,
        ),
        number(
            "Workers attending",
            "Workers that tell the trainer what drafts bring and hear what to draft with.",
            "none",
            Query(FLEET.sum("paceline_trainer_workers"), "workers"),
            steps=[(1, GREEN)],
            base=RED,
        ),
        number(
            "Spare share given",
            "Core seconds granted to training of those that workers left over. 0 for long under "
            "light load: is there anything to learn from, see Samples.",
            "percentunit",
            Query(SPARE_GIVEN, "granted"),
        ),
        number(
            "Decisions",
            "What became of versions within the time shown. Rolled back: a version was worse on "
            "live traffic than it was in the trial.",
            "none",
            Query(decided, "{{stage}}"),
            width=6,
            decimals=0,
            shows_name=True,
        ),
        number(
            "Longest swap stall",
            "Longest time since its start that a worker's step waited for other weights. Clients "
            "notice from one step's time on.",
            "s",
            Query(CHOSEN.max("paceline_draft_swap_stall_max_seconds"), "stall"),
            steps=[(0.05, ORANGE), (0.2, RED)],
        ),
    ]


def _drafts() -> list[Panel]:
    tried = "paceline_speculation_position_tried_total"
    accepted = "paceline_speculation_position_accepted_total"
    return [
        curves(
            "Acceptance by drafter",
            "Share of each drafter's tokens that were accepted.",
            "percentunit",
            Query(_acceptance(by="drafter"), "{{drafter}}"),
            max_value=1,
        ),
        curves(
            "Acceptance by version",
            "The same by version of the weights, as workers count it: two curves while one version "
            "follows the other or is on trial.",
            "percentunit",
            Query(_acceptance(_HAS_VERSION, by="drafter, version"), "{{drafter}} {{version}}"),
            max_value=1,
        ),
        curves(
            "Acceptance by position",
            "Share of drafts whose token at a position was accepted, of those that had one behind "
            "an accepted token. A steep fall: shorter drafts would do.",
            "percentunit",
            Query(
                ratio(CHOSEN.rate(accepted, by="position"), CHOSEN.rate(tried, by="position")),
                "{{position}}",
            ),
            max_value=1,
        ),
        curves(
            "Tokens per pass",
            "Emitted tokens per pass that verified a draft, by drafter.",
            "none",
            Query(_per_round(by="drafter"), "{{drafter}}"),
        ),
        curves(
            "Decisions of the controller",
            "on: it pays; off: it would not; explore: tried to find out; forced: the request named "
            "the drafter.",
            "suffix: /s",
            Query(CHOSEN.rate("paceline_speculation_decisions_total", by="reason"), "{{reason}}"),
            colors={"on": GREEN, "off": GREY, "explore": BLUE, "forced": ORANGE},
            is_stacked=True,
        ),
        curves(
            "Chosen drafters",
            "Steps per second that drafted, by who drafted: where traffic moves when a drafter "
            "gets better.",
            "suffix: /s",
            Query(
                CHOSEN.rate("paceline_speculation_decisions_total", 'reason!="off"', by="drafter"),
                "{{drafter}}",
            ),
            is_stacked=True,
        ),
        curves(
            "Predicted rate",
            "What the controllers expected of their last choice, and of the same steps without a "
            "draft.",
            "suffix: tok/s",
            Query(CHOSEN.sum("paceline_speculation_predicted_tokens_per_second"), "with drafts"),
            Query(CHOSEN.sum("paceline_speculation_off_tokens_per_second"), "without"),
            colors={"with drafts": GREEN, "without": GREY},
            width=12,
        ),
        curves(
            "Time spent on drafting",
            "Share of the time in steps that goes into drafts, by drafter.",
            "percentunit",
            Query(
                f"{CHOSEN.rate('paceline_speculation_draft_seconds_total', by='drafter')} / on () "
                f"group_left () ({CHOSEN.rate('paceline_engine_step_seconds_sum')} > 0)",
                "{{drafter}}",
            ),
            width=12,
        ),
        curves(
            "Memory of drafters",
            "What each drafter keeps for all sequences, over all workers.",
            "bytes",
            Query(CHOSEN.sum("paceline_speculation_state_bytes", by="drafter"), "{{drafter}}"),
            width=12,
        ),
        curves(
            "Entries of drafters",
            "Entries in what each drafter keeps, over all workers.",
            "none",
            Query(CHOSEN.sum("paceline_speculation_state_nodes", by="drafter"), "{{drafter}}"),
            width=12,
        ),
    ]


def _versions() -> list[Panel]:
    rounds = CHOSEN.rate(_ROUNDS, _HAS_VERSION, by="drafter, version")
    live = ratio(
        FLEET.rate("paceline_draft_accepted_tokens_total", by="drafter, version"),
        FLEET.rate("paceline_draft_tried_tokens_total", by="drafter, version"),
    )
    domains = ratio(
        FLEET.rate("paceline_draft_domain_accepted_tokens_total", by="domain"),
        FLEET.rate("paceline_draft_domain_tried_tokens_total", by="domain"),
    )
    return [
        rows(
            "Versions in use",
            "Which weights workers draft with now, how often, and with what success; "
            "`paceline draft show VERSION` tells where one comes from.",
            "none",
            Query(f"{rounds} > 0"),
            Query(_acceptance(_HAS_VERSION, by="drafter, version")),
            Query(_per_round(_HAS_VERSION, by="drafter, version")),
            columns={
                "drafter": "drafter",
                "version": "version",
                "Value #A": "drafts/s",
                "Value #B": "accepted",
                "Value #C": "tokens per pass",
            },
            units={"accepted": "percentunit"},
            sort_by="drafts/s",
        ),
        rows(
            "Decisions and their reasons",
            "What the gate, the canary and operators decided about versions since the trainer's "
            "start; `paceline draft list` has them one by one.",
            "none",
            Query(
                f"{FLEET.sum('paceline_draft_decisions_total', by='drafter, stage, reason')} > 0"
            ),
            columns={
                "drafter": "drafter",
                "stage": "went to",
                "reason": "because",
                "Value": "times",
            },
            sort_by="times",
        ),
        curves(
            "Live acceptance by version",
            "Share of positions at which a version's token was accepted, as the trainer hears it "
            "of ended sequences; what canaries are judged by.",
            "percentunit",
            Query(live, "{{drafter}} {{version}}"),
            max_value=1,
        ),
        curves(
            "Live acceptance by domain",
            "The same by label of the traffic: one that falls behind is what specialists are for.",
            "percentunit",
            Query(domains, "{{domain}}"),
            max_value=1,
        ),
        curves(
            "Changes of the plan",
            "Times since the trainer's start that workers were told to draft with something else, "
            "and changes that their engines made since theirs.",
            "none",
            Query(FLEET.max("paceline_trainer_plan_number"), "plan"),
            Query(CHOSEN.max("paceline_draft_swaps_total", by="member"), "{{member}}"),
            is_stepped=True,
        ),
        rates(
            "Bytes of drafts",
            "Sent by the trainer and fetched by workers.",
            "Bps",
            {
                "sent": "paceline_trainer_sent_bytes_total",
                "fetched": "paceline_draft_fetched_bytes_total",
            },
            scope=FLEET,
        ),
        curves(
            "Fetches",
            "Drafts that workers fetched since their start, and fetches that failed, by reason. A "
            "worker that cannot fetch goes on with what it has.",
            "none",
            Query(FLEET.sum("paceline_draft_fetches_total"), "fetched"),
            Query(FLEET.sum("paceline_draft_fetch_failures_total", by="reason"), "{{reason}}"),
            is_stepped=True,
        ),
        curves(
            "Longest swap stall",
            "Longest time since its start that a worker's step waited for other weights.",
            "s",
            Query(CHOSEN.max("paceline_draft_swap_stall_max_seconds", by="member"), "{{member}}"),
            steps=[(0.05, ORANGE)],
        ),
    ]


def _recorded() -> list[Panel]:
    accepted = "paceline:speculation_accepted:ratio_rate5m"
    per_round = "paceline:speculation_emitted_per_round:ratio_rate5m"
    return [
        curves(
            "Acceptance by drafter",
            "Share of drafted tokens that were accepted, of five minutes; for weeks.",
            "percentunit",
            Query(FLEET.series(accepted), "{{drafter}}"),
            max_value=1,
            width=12,
        ),
        curves(
            "Tokens per pass",
            "Emitted tokens per pass that verified a draft, of five minutes.",
            "none",
            Query(FLEET.series(per_round), "{{drafter}}"),
            width=12,
        ),
        curves(
            "Live acceptance by version",
            "As the trainer hears it of ended sequences, of a quarter of an hour: each version "
            "should begin where the one before ended, or above.",
            "percentunit",
            Query(FLEET.series("paceline:draft_accepted:ratio_rate15m"), "{{drafter}} {{version}}"),
            max_value=1,
            width=12,
        ),
        curves(
            "Live acceptance by domain",
            "The same by label of the traffic: what learning brings, and what it costs others.",
            "percentunit",
            Query(FLEET.series("paceline:draft_domain_accepted:ratio_rate15m"), "{{domain}}"),
            max_value=1,
            width=12,
        ),
    ]
