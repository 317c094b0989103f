"""Rules, alerts and their runbooks hold together, and name metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from paceline.process.metrics import Metrics
from paceline.process.metrics.book import all_declared
from paceline.process.metrics.declaration import SERVICES
from tests.promtool import promtool

ROOT = Path(__file__).parents[3]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").rglob("*.json"))
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
RULES = ("recording_rules.yml", "alerts.yml")

_QUERY = re.compile(r"`[^`]*\b(?:paceline_|paceline:|up\{|up ==|prometheus_)[^`]*`")
_METRIC = re.compile(r"\bpaceline_[a-z0-9_]+")
_RECORDED = re.compile(r"\bpaceline:[a-z0-9_]+:[a-z0-9_]+")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(file: str, kind: str) -> dict[str, dict[str, Any]]:
    return {
        rule[kind]: rule
        for group in load(PROMETHEUS / file)["groups"]
        for rule in group["rules"]
        if kind in rule
    }


ALERTS = rules("alerts.yml", "alert")
RECORDED = rules("recording_rules.yml", "record")


def metrics_in(text: str) -> set[str]:
    """Return the declared names of the metrics in a text of queries."""
    declared = {each.name for each in all_declared()}
    return {
        name if name in declared else re.sub(r"_(bucket|sum|count)$", "", name)
        for name in _METRIC.findall(text)
    }


@pytest.mark.parametrize("file", RULES)
def test_rules_are_valid(file: str) -> None:
    promtool("check", "rules", PROMETHEUS / file)


def test_the_example_of_a_configuration_is_valid() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    jobs = {job["job_name"]: job for job in load(PROMETHEUS / "prometheus.yml")["scrape_configs"]}
    (discovery,) = jobs["paceline"]["http_sd_configs"]
    assert discovery["url"].endswith("/metrics/targets")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_clear(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_is_seen_to_fire_and_to_clear() -> None:
    seen: dict[str, set[bool]] = {}
    for path in TESTS:
        for case in load(path)["tests"]:
            for check in case["alert_rule_test"]:
                seen.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    assert seen == {name: {True, False} for name in ALERTS}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_its_runbook(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"]
    assert "{{" in rule["annotations"]["description"] or "absent(" in rule["expr"]
    page, anchor = rule["annotations"]["runbook_url"].split("#")
    text = (ROOT / page).read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert anchor == alert.lower()
    assert "\n- Do:" in sections[alert], "what to do"
    assert _QUERY.search(sections[alert]), "what to look at"


def test_there_is_no_runbook_without_an_alert() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert {*re.findall(r"^### (Paceline\w+)$", text, re.MULTILINE)} == {*ALERTS}
    links = re.findall(r"\]\(#(\w+)\)", text)
    assert {*links} <= {alert.lower() for alert in ALERTS}


def test_every_query_names_metrics_that_exist() -> None:
    declared = {each.name for each in all_declared()}
    sources = [PROMETHEUS / file for file in RULES] + [ROOT / "docs" / "operations.md"]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert metrics_in(text) - declared == set(), path.name
        assert {*_RECORDED.findall(text)} <= {*RECORDED}, path.name


@pytest.mark.skipif(not DASHBOARDS, reason="there are no dashboards in deploy/grafana")
def test_every_recorded_rule_is_used() -> None:
    places = [PROMETHEUS / "alerts.yml", ROOT / "docs" / "operations.md", *DASHBOARDS]
    used = {name for path in places for name in _RECORDED.findall(path.read_text("utf-8"))}
    used |= {name for rule in RECORDED.values() for name in _RECORDED.findall(rule["expr"])}
    assert {*RECORDED} - used == set()


@pytest.mark.skipif(not DASHBOARDS, reason="there are no dashboards in deploy/grafana")
def test_every_metric_is_looked_at() -> None:
    sources = [*(PROMETHEUS / file for file in RULES), ROOT / "docs" / "operations.md"]
    queries = [path.read_text(encoding="utf-8") for path in sources]
    queries += [json.dumps(load(path)) for path in DASHBOARDS]
    used = metrics_in("\n".join(queries))
    assert sorted({each.name for each in all_declared()} - used) == []


def test_an_idle_fleet_raises_no_alert(tmp_path: Path) -> None:
    """Fresh processes that nobody asks anything, with a trainer that makes no drafts yet."""
    healthy = ("paceline_redis_up", "paceline_kv_node_index_up", "paceline_kv_link_up")
    attended = ("paceline_trainer_link_up", "paceline_ready_workers", "paceline_slo_target_seconds")
    series = []
    for service in SERVICES:
        role = {"worker": "decode"}.get(service, service)
        target = {"job": "paceline", "fleet": "f", "member": f"{role}-1", "role": role}
        page = generate_latest(Metrics(service).registry).decode()
        samples = [s for f in text_string_to_metric_families(page) for s in f.samples]
        for sample in samples:
            value = 1 if sample.name in healthy + attended else sample.value
            series.append(_series(sample.name, {**sample.labels, **target}, value))
        series.append(_series("up", target, 1))
    checks = [
        {"eval_time": "7h", "alertname": alert, "exp_alerts": list[str]()} for alert in ALERTS
    ]
    case = {"interval": "1m", "input_series": series, "alert_rule_test": checks}
    files = [str(PROMETHEUS / file) for file in RULES]
    content = {"rule_files": files, "evaluation_interval": "1m", "tests": [case]}
    path = tmp_path / "idle.yml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    promtool("test", "rules", path)


def _series(name: str, labels: dict[str, str], value: float) -> dict[str, str]:
    inside = ",".join(f"{key}={json.dumps(text)}" for key, text in labels.items())
    return {"series": f"{name}{{{inside}}}", "values": f"{value:g}x430"}
