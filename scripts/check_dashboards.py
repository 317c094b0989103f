#!/usr/bin/env python3
"""Asks a Prometheus every question that dashboards and rules ask, and tells which have no answer.

    scripts/check_dashboards.py --prometheus http://127.0.0.1:9090 [--range 15m] [--skip REGEX]

Prints a line per query with the number of series that have values, as a panel would draw them
over the range, and exits with 1 if one has none. An alert's condition has no value while all is
well; of alerts it is every series named in the condition that has to be there.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser

DASHBOARDS = Path(__file__).parent.parent / "deploy" / "grafana" / "json"
_NUM_POINTS = 120
"""Of a curve, at most: about what a narrow panel draws."""
_LABEL_VALUES = re.compile(r"label_values\((?P<source>.*), (?P<label>\w+)\)")


@dataclass(frozen=True, slots=True)
class Question:
    """One query, and where it stands."""

    place: str
    expr: str
    kind: str
    """`curve` is asked for over the range, `now` for the present, `choice` is a variable's."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How many series with values a question brings."""

    question: Question
    num_series: int
    problem: str = ""

    def __str__(self) -> str:
        lines = [f"{self.num_series:>6}  {self.question.place}"]
        if not self.num_series:
            lines += [
                f"        {self.question.expr}",
                *([f"        {self.problem}"] * bool(self.problem)),
            ]
        return "\n".join(lines)


class Prometheus:
    """A server's HTTP API."""

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s

    def get(self, path: str, **params: object) -> Any:
        """Return the data of an answer.

        Raises:
            RuntimeError: the server refuses; says why.
            OSError: it cannot be reached.
        """
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(params)}"
        try:
            with urllib.request.urlopen(url, timeout=self._timeout_s) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")) from error

    def num_series(self, question: Question, range_s: float) -> int:
        """Return how many series with at least one number a question brings."""
        now_s = time.time()
        if question.kind == "choice":
            match = _LABEL_VALUES.fullmatch(question.expr)
            if match is None:
                raise RuntimeError("not of the form label_values(series, label)")
            source, label = match.group("source", "label")
            return len(self.get(f"label/{label}/values", **{"match[]": source}))
        if question.kind == "now":
            found = self.get("query", query=question.expr, time=now_s)
            values = ([series["value"]] for series in found["result"])
        else:
            step_s = max(1.0, range_s / _NUM_POINTS)
            times = {"start": now_s - range_s, "end": now_s, "step": step_s}
            found = self.get("query_range", query=question.expr, **times)
            values = (series["values"] for series in found["result"])
        return sum(any(math.isfinite(float(v)) for _, v in points) for points in values)


def panels(board: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the panels of a dashboard, those within collapsed rows too, headlines not."""
    for panel in board["panels"]:
        yield from panel.get("panels", [])
        if panel["type"] != "row":
            yield panel


def questions(board: Mapping[str, Any], range_s: float, rate_interval: str) -> Iterator[Question]:
    """Yield the queries of panels, marks and variables, with values in place of variables."""
    values = variable_values(board, range_s, rate_interval)
    title = board["title"]
    for panel in panels(board):
        for target in panel["targets"]:
            place = f"{title} / {panel['title']} / {target['refId']}"
            kind = "now" if target.get("instant") else "curve"
            yield Question(place, substituted(target["expr"], values), kind)
    for mark in board["annotations"]["list"]:
        place = f"{title} / mark: {mark['name']}"
        yield Question(place, substituted(mark["expr"], values), "curve")
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            expr = substituted(variable["query"]["query"], values)
            yield Question(f"{title} / variable: {variable['name']}", expr, "choice")


def variable_values(board: Mapping[str, Any], range_s: float, rate_interval: str) -> dict[str, str]:
    """Return what Grafana writes for variables where nothing was chosen."""
    values = {"__rate_interval": rate_interval, "__range": f"{math.ceil(range_s)}s"}
    for variable in board["templating"]["list"]:
        all_value, current = variable.get("allValue"), variable.get("current", {})
        values[variable["name"]] = str(all_value or current.get("value", ""))
    return values


def substituted(expr: str, values: Mapping[str, str]) -> str:
    """Return the expression with values in place of `$name` and `${name}`.

    Raises:
        KeyError: a variable that nobody declares.
    """
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match.group(1)], expr)


def selectors(expr: str) -> list[str]:
    """Return the series that an expression reads, as selectors."""
    found: list[str] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(f"{node.name or ''}{node.matchers}")

    promql_parser.walk(promql_parser.parse(expr), visit)
    return list(dict.fromkeys(found))


def rule_questions(groups: Iterable[Mapping[str, Any]]) -> Iterator[Question]:
    """Yield the queries of rules that a server evaluates: of alerts, the series they read."""
    for group in groups:
        for rule in group["rules"]:
            if rule["type"] == "recording":
                yield Question(f"rule: {rule['name']}", rule["query"], "curve")
                continue
            for selector in selectors(rule["query"]):
                yield Question(f"alert: {rule['name']} reads", selector, "curve")


def ask(prometheus: Prometheus, each: Question, range_s: float) -> Answer:
    """Return the answer to one question; a refused one has no series and says why."""
    try:
        return Answer(each, prometheus.num_series(each, range_s))
    except RuntimeError as error:
        return Answer(each, 0, str(error))


def check(
    prometheus: Prometheus,
    range_s: float,
    rate_interval: str,
    *,
    directory: Path = DASHBOARDS,
    skip: str = "",
) -> list[Answer]:
    """Ask all questions of dashboards and rules but those whose expression matches `skip`."""
    boards = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    every = [each for board in boards for each in questions(board, range_s, rate_interval)]
    every += rule_questions(prometheus.get("rules")["groups"])
    asked = [each for each in every if not (skip and re.search(skip, each.expr))]
    return [ask(prometheus, each, range_s) for each in asked]


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--dashboards", type=Path, default=DASHBOARDS, metavar="DIRECTORY")
    parser.add_argument("--range", default="15m", help="how far to look back (15m)")
    parser.add_argument("--rate-interval", default="1m", help="four scrapes or more (1m)")
    parser.add_argument("--skip", default="", help="leave out queries that match this expression")
    args = parser.parse_args()
    range_s = promql_parser.parse_duration(args.range).total_seconds()
    answers = check(
        Prometheus(args.prometheus),
        range_s,
        args.rate_interval,
        directory=args.dashboards,
        skip=args.skip,
    )
    print(*answers, sep="\n")
    num_empty = sum(not answer.num_series for answer in answers)
    print(f"{len(answers)} queries, {num_empty} without data")
    return 1 if num_empty else 0


if __name__ == "__main__":
    sys.exit(main())
