"""Where KV is, how it moves, and where requests go because of it."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.dashboards.board import Row, board
from deploy.grafana.dashboards.panels import (
    GREEN,
    ORANGE,
    RED,
    Panel,
    curves,
    number,
    quantiles,
    rates,
    up_states,
)
from deploy.grafana.dashboards.queries import CHOSEN, FLEET, Query, ratio

_HITS = ratio(
    FLEET.rate("paceline_cached_prompt_tokens_total"), FLEET.rate("paceline_prompt_tokens_total")
)
_FULL = [(0.85, ORANGE), (0.95, RED)]
"""A cache is meant to be full; red says that its blocks live shortly."""


def kv_routing() -> Dashboard:
    """Return the dashboard."""
    return board(
        "paceline-kv-routing",
        "Paceline / KV and routing",
        "The shared KV store, transfers between workers and nodes, and routing decisions.",
        [
            Row("Is KV found, is it sound, is load even", _now()),
            Row("Cache", _cache()),
            Row("Transfer", _transfer()),
            Row("Index", _index()),
            Row("Routing", _routing()),
            Row("Over days, by recording rules", _recorded()),
        ],
    )


def _engine_use(by: str) -> str:
    free = CHOSEN.sum("paceline_engine_free_blocks", by=by)
    return f"1 - {ratio(free, CHOSEN.sum('paceline_engine_total_blocks', by=by))}"


def _node_use(by: str) -> str:
    used = CHOSEN.sum("paceline_kv_node_used_bytes", by=by)
    return ratio(used, CHOSEN.sum("paceline_kv_node_capacity_bytes", by=by))


def _skew(*matchers: str) -> str:
    """Return how much longer the busiest worker of a role computes than the mean."""
    steps = FLEET.series("paceline_engine_step_seconds_sum", *matchers)
    busy = f"rate({steps}[$__rate_interval])"
    return ratio(f"max by (role) ({busy})", f"avg by (role) ({busy})")


def _now() -> list[Panel]:
    wrong = [
        FLEET.increase("paceline_kv_corrupt_blocks_total"),
        FLEET.increase("paceline_kv_node_corrupt_blocks_total"),
    ]
    return [
        number(
            "Prefix hits",
            "Share of prompt tokens whose KV was found in a cache instead of computed. Depends on "
            "the traffic; a sudden fall does not: look at evictions and at the index.",
            "percentunit",
            Query(_HITS, "hits"),
        ),
        number(
            "Engine KV in use",
            "Share of the engines' blocks held by running sequences, the fullest worker. Red: "
            "sequences are about to be preempted.",
            "percentunit",
            Query(f"max({_engine_use('member')})", "fullest"),
            steps=_FULL,
        ),
        number(
            "Arena in use",
            "Share of a KV node's arena with readable blocks, the fullest node. A full arena "
            "evicts; a larger --arena-mb keeps prefixes for longer.",
            "percentunit",
            Query(f"max({_node_use('member')})", "fullest"),
        ),
        number(
            "Corrupt blocks",
            "Blocks whose bytes did not match their checksum within the time shown; they were "
            "computed again. Should be 0: suspect memory or the network.",
            "none",
            Query(" + ".join(wrong), "blocks"),
            steps=[(1, RED)],
            decimals=0,
        ),
        number(
            "Failed pulls",
            "Fetches from other nodes that did not bring everything, within the time shown; the "
            "rest was computed.",
            "none",
            Query(FLEET.increase("paceline_kv_node_failed_pulls_total"), "pulls"),
            steps=[(1, ORANGE), (100, RED)],
            decimals=0,
        ),
        number(
            "Index behind",
            "Changes that nodes did not publish yet. Red for minutes: Redis is away or slow, other "
            "workers do not find new blocks.",
            "none",
            Query(FLEET.sum("paceline_kv_node_index_pending"), "changes"),
            steps=[(1_000, ORANGE), (10_000, RED)],
        ),
        number(
            "Load skew",
            "Time that the busiest decode worker spent in steps over the mean of all; 1 is even. "
            "Affinity to cached prefixes makes it larger; above 2 one worker slows everybody's "
            "tail.",
            "none",
            Query(_skew('role="decode"'), "decode"),
            steps=[(1.5, ORANGE), (2.5, RED)],
            decimals=2,
        ),
        number(
            "Resumed streams",
            "Streams that went on with another worker within the time shown; each is a worker that "
            "broke or was drained.",
            "none",
            Query(FLEET.increase("paceline_migrations_total"), "streams"),
            steps=[(1, ORANGE)],
            decimals=0,
        ),
    ]


def _cache() -> list[Panel]:
    return [
        curves(
            "Prefix hits",
            "Share of prompt tokens found in a cache.",
            "percentunit",
            Query(_HITS, "hits"),
            colors={"hits": GREEN},
            max_value=1,
        ),
        curves(
            "Engine KV in use",
            "Share of each engine's blocks that running sequences hold; the rest is free or cached "
            "and reclaimable.",
            "percentunit",
            Query(_engine_use("member"), "{{member}}"),
            steps=_FULL,
            max_value=1,
        ),
        curves(
            "Arena in use",
            "Share of each node's arena that holds readable blocks.",
            "percentunit",
            Query(_node_use("member"), "{{member}}"),
            max_value=1,
        ),
        curves(
            "Size of the prefix cache",
            "Bytes that prompts can be found in: in the engines' own pools and in the nodes' "
            "arenas, with the bytes these could hold.",
            "bytes",
            Query(CHOSEN.sum("paceline_engine_cached_bytes"), "engines"),
            Query(CHOSEN.sum("paceline_kv_node_used_bytes"), "nodes"),
            Query(CHOSEN.sum("paceline_kv_node_capacity_bytes"), "nodes' capacity"),
            target="nodes' capacity",
        ),
        rates(
            "Evictions",
            "Cached blocks given up for others per second, in engines and in nodes. Many with few "
            "hits: the cache is too small for the traffic.",
            "suffix: blocks/s",
            {
                "engines": "paceline_engine_evictions_total",
                "nodes": "paceline_kv_node_evicted_blocks_total",
            },
            scope=CHOSEN,
        ),
        rates(
            "Lookups at nodes",
            "Blocks that workers asked their node for and got, or not; and those they wrote.",
            "suffix: blocks/s",
            {
                "handed out": "paceline_kv_node_acquired_blocks_total",
                "missed": "paceline_kv_node_missed_blocks_total",
                "committed": "paceline_kv_node_committed_blocks_total",
            },
            scope=CHOSEN,
            colors={"missed": ORANGE, "handed out": GREEN},
        ),
        curves(
            "Blocks of nodes",
            "Readable blocks, those pinned by readers and slots reserved by writers. Pins or "
            "reservations that only grow are leaks.",
            "none",
            Query(CHOSEN.sum("paceline_kv_node_blocks"), "readable"),
            Query(CHOSEN.sum("paceline_kv_node_pinned_blocks"), "pinned"),
            Query(CHOSEN.sum("paceline_kv_node_reserved_slots"), "reserved"),
        ),
        curves(
            "Engine blocks",
            "KV blocks of the engines, and those free or reclaimable.",
            "none",
            Query(CHOSEN.sum("paceline_engine_total_blocks"), "all"),
            Query(CHOSEN.sum("paceline_engine_free_blocks"), "free"),
            target="all",
        ),
        rates(
            "Preemptions",
            "Sequences that lost their blocks to others per second and have to be computed again. "
            "Above 0 for long: too many sequences at a time, or contexts that are too long.",
            "suffix: seq/s",
            {"": "paceline_engine_preemptions_total"},
            scope=CHOSEN,
            by="member",
        ),
    ]


def _transfer() -> list[Panel]:
    return [
        rates(
            "Bytes moved",
            "Written by workers to their node, read from it, and fetched by nodes from each other.",
            "Bps",
            {
                "saved": "paceline_kv_saved_bytes_total",
                "loaded": "paceline_kv_loaded_bytes_total",
                "pulled": "paceline_kv_node_pulled_bytes_total",
            },
            scope=CHOSEN,
        ),
        rates(
            "Blocks moved",
            "The same in blocks, and what nodes sent to others.",
            "suffix: blocks/s",
            {
                "saved": "paceline_kv_saved_blocks_total",
                "loaded": "paceline_kv_loaded_blocks_total",
                "pulled": "paceline_kv_node_pulled_blocks_total",
                "served": "paceline_kv_node_served_blocks_total",
            },
            scope=CHOSEN,
        ),
        rates(
            "Failures",
            "Blocks with wrong bytes, found by workers or nodes; fetches that brought less than "
            "asked for; blocks that the index promised in vain. Each costs computing them again.",
            "suffix: /s",
            {
                "corrupt at workers": "paceline_kv_corrupt_blocks_total",
                "corrupt at nodes": "paceline_kv_node_corrupt_blocks_total",
                "failed pulls": "paceline_kv_node_failed_pulls_total",
                "not where the index says": "paceline_kv_node_index_misses_total",
            },
            scope=CHOSEN,
            colors={"corrupt at workers": RED, "corrupt at nodes": RED},
        ),
        curves(
            "Time to load and save, p95",
            "load: from asking until the blocks of a request can be read, fetches from other nodes "
            "included; save: from writing until others can read. Part of TTFT of split requests.",
            "s",
            Query(
                CHOSEN.quantile(0.95, "paceline_kv_transfer_seconds", by="direction"),
                "{{direction}}",
            ),
        ),
        quantiles(
            "Time of a load",
            "From asking a node until all blocks of a request are pinned.",
            "paceline_kv_transfer_seconds",
            scope=CHOSEN,
            matchers=['direction="load"'],
        ),
        quantiles(
            "Time of a fetch between nodes",
            "One fetch of blocks from another node, failed ones included.",
            "paceline_kv_node_pull_seconds",
            scope=CHOSEN,
        ),
    ]


def _index() -> list[Panel]:
    return [
        curves(
            "Changes not published",
            "By node; returns to 0 within a second while Redis answers.",
            "none",
            Query(CHOSEN.sum("paceline_kv_node_index_pending", by="member"), "{{member}}"),
        ),
        up_states(
            "Index",
            "Whether each node can publish and look up.",
            {"": "paceline_kv_node_index_up"},
            width=8,
        ),
        curves(
            "Index drift",
            "Blocks promised by the index that were gone, and times that everything was published "
            "anew, per second. Both near 0 except after a restart of Redis.",
            "suffix: /s",
            Query(CHOSEN.rate("paceline_kv_node_index_misses_total"), "promised in vain"),
            Query(CHOSEN.rate("paceline_kv_node_index_rebuilds_total"), "published anew"),
        ),
    ]


def _routing() -> list[Panel]:
    work = [("running", "paceline_engine_running"), ("waiting", "paceline_engine_waiting")]
    split = FLEET.rate("paceline_routing_decisions_total", 'kind="split"')
    return [
        curves(
            "Decisions",
            "split: prefill and decode on two workers; decode-only: one worker does both, because "
            "little was left to compute; resumed: a broken stream went on.",
            "reqps",
            Query(FLEET.rate("paceline_routing_decisions_total", by="kind"), "{{kind}}"),
            colors={"resumed": ORANGE},
            is_stacked=True,
        ),
        curves(
            "Share that is split",
            "Of all decisions. Falls as prefixes are found or prefill workers are busy.",
            "percentunit",
            Query(ratio(split, FLEET.rate("paceline_routing_decisions_total")), "split"),
            max_value=1,
        ),
        curves(
            "Load skew",
            "Time in steps of the busiest worker over the mean of its role; 1 is even, no value "
            "while nobody works.",
            "none",
            Query(_skew(), "{{role}}"),
            steps=[(2.5, RED)],
        ),
        *(
            curves(
                f"Sequences {word}, by worker",
                f"Sequences {word} in each engine; a worker far from the others is skew.",
                "none",
                Query(CHOSEN.sum(metric, by="member"), "{{member}}"),
            )
            for word, metric in work
        ),
        rates(
            "Streams resumed",
            "Streams that went on with another worker, per second.",
            "reqps",
            {"resumed": "paceline_migrations_total"},
            scope=FLEET,
            colors={"resumed": ORANGE},
        ),
    ]


def _recorded() -> list[Panel]:
    return [
        curves(
            "Prefix hits",
            "Share of prompt tokens found in a cache, of five minutes; quick to show over weeks.",
            "percentunit",
            Query(FLEET.series("paceline:prompt_cached:ratio_rate5m"), "{{model}}"),
            max_value=1,
        ),
        curves(
            "Hits at nodes",
            "Share of the blocks that workers asked their node for and got, of five minutes.",
            "percentunit",
            Query(FLEET.series("paceline:kv_block_hits:ratio_rate5m"), "{{fleet}}"),
            max_value=1,
        ),
        curves(
            "Evictions",
            "Blocks given up for others per second, in engines by role and in nodes.",
            "suffix: blocks/s",
            Query(FLEET.series("paceline:engine_evicted_blocks:rate5m"), "{{role}}"),
            Query(FLEET.series("paceline:kv_evicted_blocks:rate5m"), "nodes"),
        ),
    ]
