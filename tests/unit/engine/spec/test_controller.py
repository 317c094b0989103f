"""The controller in simulated worlds: what it brings, what it costs, what it keeps."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from random import Random

import pytest

from paceline.domain.cost import StepCost, StepShape
from paceline.engine.spec.controller import OFF, Controller, Decision, Outcome, RowView
from paceline.engine.spec.profile import DraftTimes
from paceline.engine.spec.report import DECISION_REASONS
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree, Proposal
from tests.unit.engine.spec.simulated import (
    ARMS,
    AUTO,
    COMPUTE_BOUND,
    CONTEXT,
    FAR,
    MEMORY_BOUND,
    SKILLS,
    SMALL_CPU,
    TILES,
    Skill,
    World,
    best_fixed_rate,
    rows_of,
)

MIX = ["json", "code", "prose", "random"]


def controller(
    cost: StepCost,
    seed: int = 0,
    *,
    arms: tuple[str, ...] = ARMS,
    nodes: int = 16,
    depth: int = 8,
) -> Controller:
    return Controller(arms, cost, max_nodes=nodes, max_depth=depth, rng=Random(seed))


def run(world: World, decider: Controller, domains: list[str], steps: int, first: int = 0) -> None:
    """Run steps; sequences are 300 steps long."""
    for step in range(first, first + steps):
        world.step(decider, rows_of(domains, step // 300 * 1000))


def settled(cost: StepCost, domains: list[str], steps: int, seed: int = 0) -> float:
    """Tokens per second after as many steps to settle."""
    world, decider = World(cost, seed), controller(cost, seed)
    run(world, decider, domains, steps)
    world.reset()
    run(world, decider, domains, steps, first=steps)
    return world.rate


@pytest.mark.parametrize("cost", [MEMORY_BOUND, SMALL_CPU, TILES])
@pytest.mark.parametrize("domain", ["json", "prose", "code"])
def test_one_domain_is_nearly_as_fast_as_with_its_best_arm(cost: StepCost, domain: str) -> None:
    best = best_fixed_rate(cost, [domain], steps=400)
    rate = settled(cost, [domain], steps=1500)
    # The reference is the luckiest of dozens of runs, and pays for no tries.
    assert rate >= 0.75 * best
    assert rate >= 1.5 * World(cost).off_rate(1)


@pytest.mark.parametrize("cost", [MEMORY_BOUND, SMALL_CPU, TILES])
def test_a_mix_of_domains_is_as_fast_as_with_any_one_arm(cost: StepCost) -> None:
    domains = MIX * 2
    assert settled(cost, domains, steps=400) >= 0.97 * best_fixed_rate(cost, domains, steps=60)


@pytest.mark.parametrize("cost", [MEMORY_BOUND, SMALL_CPU, COMPUTE_BOUND, TILES])
@pytest.mark.parametrize(("rows", "steps"), [(1, 2000), (32, 800)])
def test_text_that_nobody_foresees_costs_nearly_nothing(
    cost: StepCost, rows: int, steps: int
) -> None:
    world, decider = World(cost), controller(cost)
    run(world, decider, ["random"] * rows, steps)
    assert world.rate >= 0.98 * world.off_rate(rows)


@pytest.mark.parametrize("domains", [MIX, ["json"], ["prose"], ["code"]])
@pytest.mark.parametrize("rows", [4, 32])
def test_where_computing_is_dear_drafts_cost_nearly_nothing(domains: list[str], rows: int) -> None:
    world, decider = World(COMPUTE_BOUND), controller(COMPUTE_BOUND)
    run(world, decider, domains * (rows // len(domains)), 800)
    assert world.rate >= 0.98 * world.off_rate(rows)


@pytest.mark.parametrize("seed", range(4))
def test_a_change_of_text_is_noticed_both_ways(seed: int) -> None:
    skills = {arm: dict(of_text) for arm, of_text in SKILLS.items()}
    world, decider = World(SMALL_CPU, seed, skills), controller(SMALL_CPU, seed)
    run(world, decider, ["json"], 1000)
    for of_text in skills.values():
        of_text["json"] = Skill(0.0, 0.7)
    run(world, decider, ["json"], 400, first=1000)
    world.reset()
    run(world, decider, ["json"], 1000, first=1400)
    assert world.rate >= 0.97 * world.off_rate(1)
    skills["model"]["json"] = SKILLS["model"]["json"]
    run(world, decider, ["json"], 1500, first=2400)
    world.reset()
    run(world, decider, ["json"], 600, first=3900)
    assert world.rate >= 1.3 * world.off_rate(1)


def test_a_change_of_load_is_judged_at_once() -> None:
    world, decider = World(SMALL_CPU), controller(SMALL_CPU)
    run(world, decider, ["prose"], 1000)
    dense = decider.plan(rows_of(["prose"] * 32, 5000), world.shape(32))
    alone = decider.plan(rows_of(["prose"], 6000), world.shape(1))
    assert {d.reason for d in dense} <= {"off", "explore"}
    assert sum(d.reason == "explore" for d in dense) <= 1
    assert alone[0].reason in ("on", "explore") and alone[0].rate > 1.3 * alone[0].off_rate


def test_a_sequence_unlike_its_domain_drafts_less() -> None:
    world, decider = World(MEMORY_BOUND), controller(MEMORY_BOUND)
    world.texts[3] = "random"
    rows = rows_of(["json"] * 4)
    for _ in range(150):
        world.step(decider, rows)
    nodes: Counter[int] = Counter()
    for _ in range(200):
        for outcome in world.step(decider, rows):
            nodes[outcome.sequence_id] += len(outcome.tree)
    assert nodes[3] < 0.5 * min(nodes[i] for i in range(3))


def test_requests_have_the_last_word() -> None:
    world, decider = World(MEMORY_BOUND), controller(MEMORY_BOUND)
    rows = [
        RowView(0, "json", "model", FAR),
        RowView(1, "json", "trie", depth=3),
        RowView(2, "json", "nobody", FAR),
        RowView(3, "json", "trie", depth=0),
        RowView(4, "json", AUTO, depth=0),
    ]
    for _ in range(300):
        outcomes = world.step(decider, rows)
        assert [o.decision.reason for o in outcomes] == ["forced"] * 2 + ["off"] * 3
    decisions = [outcome.decision for outcome in outcomes]
    assert [d.budget.depth for d in decisions if d.budget] == [8, 3]
    assert [d.arm for d in decisions] == ["model", "trie", OFF, OFF, OFF]
    assert len(outcomes[0].tree) > 2
    assert decider.decisions["model", "forced"] == 300


def test_budgets_keep_to_limits_and_reasons_are_known() -> None:
    world, decider = World(MEMORY_BOUND), controller(MEMORY_BOUND, nodes=9, depth=5)
    rows = [RowView(0, "json", AUTO, FAR), RowView(1, "json", AUTO, depth=2)]
    seen: Counter[str] = Counter()
    for _ in range(300):
        for outcome in world.step(decider, rows):
            decision, row = outcome.decision, rows[outcome.sequence_id]
            seen[decision.reason] += 1
            if decision.budget is None:
                assert not len(outcome.tree)
                continue
            assert 1 <= decision.budget.nodes <= 9
            assert 1 <= decision.budget.depth <= min(5, row.depth)
            assert 0.0 <= decision.budget.threshold <= 0.5
    assert seen["on"] > 450 and seen["explore"] > 0
    assert sum(decider.decisions.values()) == 600
    assert {reason for _, reason in decider.decisions} <= set(DECISION_REASONS)
    assert decider.last.rate > 2.0 * decider.last.off_rate


def test_drawn_trees_are_computed_as_built() -> None:
    """Which draws count must not depend on what they brought: neither values nor costs cut."""
    world, decider = World(COMPUTE_BOUND), controller(COMPUTE_BOUND)
    proposal = Proposal((1, 2), (0.5, 0.5), num_drawn=1)
    drawn = DraftTree((1, 2), (-1, 0), (0.5, 0.5), (0.2, 0.0), ("model",) * 2, {-1: proposal})
    guessed = DraftTree((1, 2), (-1, 0), (0.5, 0.5), (0.2, 0.0), ("model",) * 2)
    rows = [RowView(0, "json", "model", FAR), RowView(1, "json", "model", FAR)]
    shape = world.shape(2)
    decisions = decider.plan(rows, shape)
    assert decider.prune([drawn, guessed], rows, decisions, shape, 0.0) == [drawn, EMPTY_TREE]


def test_without_drafters_nothing_is_drafted() -> None:
    decider = controller(MEMORY_BOUND, arms=())
    rows = rows_of(["json"] * 2)
    decisions = decider.plan(rows, StepShape(rows=2, attended=2 * CONTEXT))
    assert [(d.reason, d.budget) for d in decisions] == [("off", None)] * 2
    trees = [EMPTY_TREE] * 2
    assert decider.prune(trees, rows, decisions, StepShape(rows=2), 0.0) == trees


def test_a_retired_arm_is_chosen_no_more() -> None:
    world, decider = World(MEMORY_BOUND), controller(MEMORY_BOUND)
    run(world, decider, ["json"], 200)
    decider.retire(["trie", "trie+model"])
    rows = [*rows_of(["json"]), RowView(1, "json", "trie", FAR)]
    arms = {o.decision.arm for _ in range(300) for o in world.step(decider, rows)}
    assert arms <= {"model", "recycling", OFF} and "model" in arms


GOOD, BAD = Skill(0.85, 0.8), Skill(0.3, 0.6)
BANK = {
    "model:json": {"json": GOOD, "prose": BAD, "code": BAD},
    "model:prose": {"json": BAD, "prose": GOOD, "code": BAD},
    "model:code": {"json": BAD, "prose": BAD, "code": GOOD},
}


def arms_used(world: World, decider: Controller, steps: int) -> dict[str, Counter[str]]:
    """How often each domain's sequences were drafted for, by arm."""
    used: dict[str, Counter[str]] = {domain: Counter() for domain in ("json", "prose", "code")}
    for step in range(steps):
        rows = rows_of(list(used), step // 100 * 1000)
        for row, outcome in zip(rows, world.step(decider, rows), strict=True):
            if outcome.decision.reason == "on":
                used[row.domain][outcome.decision.arm] += 1
    return used


@pytest.mark.parametrize("cost", [MEMORY_BOUND, SMALL_CPU])
def test_each_domain_gets_the_draft_of_a_bank_that_knows_it(cost: StepCost) -> None:
    world, decider = World(cost, skills=BANK), controller(cost, arms=tuple(BANK))
    arms_used(world, decider, 1500)
    for domain, counts in arms_used(world, decider, 600).items():
        assert counts[f"model:{domain}"] > 0.85 * counts.total() > 200, domain


def test_arms_come_and_go_and_the_others_stay_known() -> None:
    skills = {**BANK, "trie": SKILLS["trie"]}
    world, decider = (
        World(SMALL_CPU, skills=skills),
        controller(SMALL_CPU, arms=("model:json", "trie")),
    )
    arms_used(world, decider, 600)
    json_before = arms_used(world, decider, 200)["json"]
    decider.add(["model:prose"])
    # New ones are tried first of all.
    tried = Counter(
        outcome.decision.arm
        for _ in range(30)
        for outcome in world.step(decider, rows_of(["prose"], 90_000))
        if outcome.decision.reason == "explore"
    )
    assert tried["model:prose"] >= 4
    arms_used(world, decider, 1000)
    used = arms_used(world, decider, 300)
    assert used["prose"]["model:prose"] > 0.8 * used["prose"].total() > 0
    assert used["json"]["model:json"] > 0.8 * json_before["model:json"]
    decider.retire(["model:json"])
    decider.add(["model:code"])
    arms_used(world, decider, 1000)
    used = arms_used(world, decider, 300)
    assert "model:json" not in used["json"]
    assert used["code"]["model:code"] > 0.8 * used["code"].total() > 0
    assert not any(arm == "model:json" for arm, _ in decider.decisions)


def test_however_many_arms_there_were_memory_is_bounded() -> None:
    world, decider = World(SMALL_CPU, skills=SKILLS), controller(SMALL_CPU, arms=("trie",))
    rows = rows_of(["json", "code"])
    sizes = []
    for i in range(200):
        name = f"model:{i}"
        world.skills = {**SKILLS, name: SKILLS["model"]}
        decider.add([name])
        for _ in range(6):
            world.step(decider, rows)
        decider.retire([name])
        decider.add([])
        sizes.append(
            len(decider.decisions)
            + sum(len(known.profiles) + len(known.calibrations) for known in decider._known())
            + sum(len(s.profiles) for s in decider._sequences.values())
        )
    assert max(sizes[100:]) <= max(sizes[:20]) + 4


def test_renewed_weights_get_a_new_chance_at_once() -> None:
    skills = {"trie": SKILLS["trie"], "model": {"prose": Skill(0.02, 0.7)}}
    world, decider = World(SMALL_CPU, skills=skills), controller(SMALL_CPU, arms=("trie", "model"))
    run(world, decider, ["prose"], 1500)
    skills["model"]["prose"] = SKILLS["model"]["prose"]
    decider.renew(["model"])
    run(world, decider, ["prose"], 300, first=1500)
    world.reset()
    run(world, decider, ["prose"], 600, first=1800)
    assert world.rate >= 1.3 * world.off_rate(1)


def test_equal_seeds_decide_alike() -> None:
    def history() -> list[tuple[str, str, int]]:
        world, decider = World(SMALL_CPU, seed=5), controller(SMALL_CPU, seed=5)
        return [
            (o.decision.arm, o.decision.reason, len(o.tree))
            for _ in range(120)
            for o in world.step(decider, rows_of(MIX))
        ]

    assert history() == history()


def test_memory_is_bounded_over_100_000_sequences_and_many_domains() -> None:
    decider, world = controller(SMALL_CPU), World(SMALL_CPU)

    def go_on(first: int, steps: int) -> None:
        for step in range(first, first + steps):
            rows = rows_of([f"domain {step}"] * 32, step * 32)
            world.texts = {row.sequence_id: "json" for row in rows}
            world.step(decider, rows, prefill=step % 700)
            for row in rows:
                decider.forget(row.sequence_id)

    go_on(0, 600)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    go_on(600, 50)
    grown_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    go_on(650, 2500)
    assert decider.num_sequences == 0
    assert grown_bytes < 2_000_000
    assert len(decider.decisions) <= (len(ARMS) + 1) * len(DECISION_REASONS)


def test_outcomes_of_other_arms_do_not_disturb() -> None:
    """A sequence that was off has nothing to teach."""
    world, decider = World(SMALL_CPU), controller(SMALL_CPU)
    rows = rows_of(["json"])
    decisions = decider.plan(rows, world.shape(1))
    decider.observe([Outcome(0, d, EMPTY_TREE, ()) for d in decisions], {})
    decider.forget(0)
    decider.forget(17)
    assert decider.num_sequences == 0


def test_catching_up_with_a_prompt_is_not_what_a_level_costs() -> None:
    times = DraftTimes()
    # The first call of every answer reads a prompt.
    for call in range(200):
        times.note(1, 4, 0.050 if call % 16 == 0 else 0.002)
    assert times.level_s(1) == pytest.approx(0.0005, rel=0.2)
    assert times.of(1) > 0.003


@pytest.mark.parametrize(("level", "chosen"), [(0.60, "trie+model"), (0.68, "model")])
def test_a_part_has_to_seem_clearly_better_than_its_union(level: float, chosen: str) -> None:
    decider = controller(MEMORY_BOUND, arms=("model", "trie+model"), nodes=1)
    step, row = StepShape(rows=1), RowView(0, "", "AUTO", 8)
    decider.plan([row], step)
    for arm, value in (("trie+model", 0.59), ("model", level)):
        tree = DraftTree((1,), (-1,), (value,), (value,), (arm,))
        for _ in range(400):
            decider.prune([tree], [row], [Decision(arm, "on")], step, 0.0)
    decisions = [decider.plan([row], step)[0] for _ in range(12)]
    assert [d.arm for d in decisions if d.reason == "on"][-1] == chosen
