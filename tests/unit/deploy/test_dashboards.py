"""Dashboards are what their sources write, importable anywhere, and ask for what is exported."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from deploy.grafana.dashboards.board import TAG
from deploy.grafana.dashboards.catalog import rendered
from paceline.process.metrics import Metrics
from scripts.check_dashboards import DASHBOARDS, Question, panels, questions, selectors

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus"
BOARDS = {path.name: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}
OF_PROMETHEUS = {"up", "ALERTS"}
"""Series that the server itself makes."""
each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)


def exported() -> set[str]:
    """Return the names of all series that processes export."""
    ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    families = Metrics("all").registry.collect()
    return {family.name + end for family in families for end in ends[family.type]}


def recorded() -> set[str]:
    """Return the names of the series that recording rules make."""
    text = (RULES / "recording_rules.yml").read_text()
    return {*re.findall(r"^ +- record: (\S+)$", text, re.MULTILINE)}


def metric_of(selector: str) -> str:
    return re.split(r"[{\[]", selector)[0]


def base_name(series: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", series)


def exprs(board: dict[str, Any]) -> list[Question]:
    return [each for each in questions(board, 900.0, "1m") if each.kind != "choice"]


def raw_exprs(board: dict[str, Any]) -> list[str]:
    targets = [target for panel in panels(board) for target in panel["targets"]]
    return [each["expr"] for each in [*targets, *board["annotations"]["list"]]]


def test_the_committed_files_are_what_the_sources_write() -> None:
    assert {path.name: path.read_text() for path in DASHBOARDS.glob("*.json")} == rendered()


def test_dashboards_do_not_get_in_each_others_way() -> None:
    assert len(BOARDS) == 5
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)


@each_board
def test_a_dashboard_can_be_imported_anywhere_and_found_again(board: dict[str, Any]) -> None:
    assert BOARDS[f"{board['uid']}.json"] is board
    assert board["id"] is None and board["tags"][0] == TAG and board["description"]
    assert len(board["uid"]) <= 40, "Grafana refuses longer ones"
    (link,) = board["links"]
    assert (link["type"], link["tags"]) == ("dashboards", [TAG])
    assert link["includeVars"] and link["keepTime"]


@each_board
def test_everything_asks_the_chosen_data_source(board: dict[str, Any]) -> None:
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    asking = [*panels(board), *board["annotations"]["list"]]
    asking += [each for each in variables.values() if each["type"] == "query"]
    asking += [target for panel in panels(board) for target in panel["targets"]]
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    assert [each for each in asking if each["datasource"] != wanted] == []


@each_board
def test_fleet_model_role_and_member_can_be_chosen(board: dict[str, Any]) -> None:
    variables = {each["name"]: each for each in board["templating"]["list"]}
    for name in ("fleet", "model", "role", "member"):
        chosen = variables[name]
        assert chosen["multi"] and chosen["includeAll"] and chosen["allValue"] == ".+"
        assert chosen["current"]["value"] == ["$__all"] and chosen["refresh"] == 2
    assert all(each["label"] for each in variables.values())
    assert all(each["description"] for each in variables.values())


@each_board
def test_every_panel_says_what_it_shows_and_in_which_unit(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert re.fullmatch(r"[A-Z`a-z].{15,}\.", panel["description"]), panel["title"]
        assert panel["targets"], panel["title"]
        ref_ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ref_ids)) == len(ref_ids)
        if panel["type"] != "table":
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


@each_board
def test_panels_have_numbers_and_places_of_their_own(board: dict[str, Any]) -> None:
    every = board["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    for panel in every:
        place = panel["gridPos"]
        assert place["w"] > 0 and place["h"] > 0 and place["x"] >= 0
        assert place["x"] + place["w"] <= 24, panel["title"]
    clashes = [
        (one["title"], other["title"])
        for one, other in itertools.combinations(every, 2)
        if overlap(one["gridPos"], other["gridPos"])
    ]
    assert clashes == []


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
    above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    return not (beside or above)


@each_board
def test_the_top_row_is_numbers_at_a_glance(board: dict[str, Any]) -> None:
    head, *rest = board["panels"]
    top = list(itertools.takewhile(lambda panel: panel["type"] != "row", rest))
    assert head["type"] == "row" and len(top) >= 6
    assert {panel["type"] for panel in top} <= {"stat", "table"}
    judged = [panel for panel in top if panel.get("options", {}).get("colorMode") == "background"]
    assert len(judged) >= 3, "colours say whether it is well"


def test_bounds_to_measure_against_are_edges_of_buckets() -> None:
    (overview,) = [board for board in BOARDS.values() if board["uid"] == "paceline-overview"]
    for name in ("ttft", "itl"):
        (family,) = [
            family
            for family in Metrics("all").registry.collect()
            if family.name == f"paceline_{name}_seconds"
        ]
        edges = {sample.labels["le"] for sample in family.samples if "le" in sample.labels}
        (bound,) = [
            each for each in overview["templating"]["list"] if each["name"] == f"{name}_target"
        ]
        assert {option["value"] for option in bound["options"]} <= edges
        assert bound["current"]["value"] in edges
        assert bound["query"] == ",".join(option["value"] for option in bound["options"])


@each_board
def test_every_line_of_the_grid_is_full(board: dict[str, Any]) -> None:
    widths: Counter[int] = Counter()
    for panel in board["panels"]:
        if not panel.get("repeat"):
            widths[panel["gridPos"]["y"]] += panel["gridPos"]["w"]
    repeated = {panel["gridPos"]["y"] for panel in board["panels"] if panel.get("repeat")}
    assert {line: width for line, width in widths.items() if line not in repeated} == {
        line: 24 for line in widths if line not in repeated
    }


@each_board
def test_every_expression_is_promql(board: dict[str, Any]) -> None:
    for question in exprs(board):
        assert promql_parser.parse(question.expr), question


@each_board
def test_every_series_is_of_the_chosen_fleets_and_models(board: dict[str, Any]) -> None:
    for expr in raw_exprs(board):
        for matchers in re.findall(r"\b(?:paceline[:\w]+|process_\w+|up)\{(.*?)\}", expr):
            assert matchers.startswith('fleet=~"$fleet", model=~"$model|"'), expr
        assert not re.search(r"\b(paceline[_:]|process_)[:\w]+(?![:\w{])", expr), expr


@each_board
def test_rates_follow_the_zoom_and_averages_are_of_now(board: dict[str, Any]) -> None:
    for expr in raw_exprs(board):
        windows = re.findall(r"\b(\w+)\((?:[^()\[]|\([^()]*\))*\[([^\]]+)\]", expr)
        for function, window in windows:
            if function in ("rate", "irate"):
                assert window == "$__rate_interval", expr
            if function == "increase":
                assert window in ("$__range", "$__rate_interval"), expr
    for question in exprs(board):
        loose = [name for name in instant_names(question.expr) if base_name(name) != name]
        assert loose == [], f"{question.place}: parts of a histogram only as rates"


def instant_names(expr: str) -> list[str]:
    """Return the metrics that are read as they are, not over a window."""
    read: Counter[str] = Counter()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            read[node.name or ""] += 1
        # The selector within is visited, too.
        if isinstance(node, promql_parser.MatrixSelector):
            read[node.vector_selector.name or ""] -= 1

    promql_parser.walk(promql_parser.parse(expr), visit)
    return list(+read)


@each_board
def test_every_series_asked_for_is_exported(board: dict[str, Any]) -> None:
    known = exported() | OF_PROMETHEUS | recorded()
    read = {metric_of(each) for question in exprs(board) for each in selectors(question.expr)}
    assert sorted(read - known) == []
