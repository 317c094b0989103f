"""Trace ids are read and handed on as W3C says; spans that nobody records cost nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.process.spans import (
    NO_CONTEXT,
    NO_TRACER,
    Span,
    check_endpoint,
    create_tracer,
    current_span,
    draw_context,
    parse_traceparent,
    span,
    span_var,
)

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
GOOD = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.mark.parametrize(
    ("text", "is_sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", False),
        (f"00-{TRACE_ID}-{SPAN_ID}-03", True),
        # A version to come may have more behind what is known.
        (f"01-{TRACE_ID}-{SPAN_ID}-01", True),
        (f"cc-{TRACE_ID}-{SPAN_ID}-00-what-is-to-come", False),
    ],
)
def test_a_callers_place_in_its_trace_is_read(text: str, is_sampled: bool) -> None:
    context = parse_traceparent(text, "vendor=1")
    assert context is not None
    assert (context.trace_id, context.span_id) == (TRACE_ID, SPAN_ID)
    assert (context.is_sampled, context.state) == (is_sampled, "vendor=1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        GOOD.upper(),
        GOOD + "-more",
        GOOD + " ",
        " " + GOOD,
        GOOD[:-1],
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-0g",
        f"00-{TRACE_ID}-{SPAN_ID}-01\n",
    ],
)
def test_a_malformed_traceparent_is_ignored(text: str) -> None:
    assert parse_traceparent(text) is None


@given(st.text(max_size=80))
def test_no_text_breaks_the_parser(text: str) -> None:
    assert parse_traceparent(text) is None
    assert parse_traceparent(GOOD, text) is not None


@pytest.mark.parametrize("state", ["x" * 513, "a=\n", "a=ü"])
def test_a_state_that_cannot_be_handed_on_is_dropped_alone(state: str) -> None:
    context = parse_traceparent(GOOD, state)
    assert context is not None
    assert context.state == ""


def test_what_is_handed_on_is_what_was_read() -> None:
    context = parse_traceparent(GOOD)
    assert context is not None
    assert context.traceparent == GOOD
    drawn = draw_context()
    assert parse_traceparent(drawn.traceparent) == drawn
    assert draw_context().trace_id != drawn.trace_id


def test_without_an_endpoint_a_request_has_an_id_and_no_spans() -> None:
    tracer = create_tracer("", 1.0, {})
    assert tracer is NO_TRACER
    root = tracer.begin("call", None)
    assert not root.is_recording
    assert len(root.context.trace_id) == 32
    token = span_var.set(root)
    try:
        with span("step", {"paceline.blocks": 1}) as inner:
            inner.set({"a": 1})
            inner.event("happened")
            inner.fail("some-reason")
            # One object stands for all of a request's spans: steps and tokens make none.
            assert inner is root is current_span() is inner.child("another")
    finally:
        span_var.reset(token)
    assert current_span().context == NO_CONTEXT


def test_a_callers_context_is_passed_on_as_it_came() -> None:
    context = parse_traceparent(GOOD, "vendor=1")
    root = NO_TRACER.begin("call", context)
    assert isinstance(root, Span)
    assert root.context == context


@pytest.mark.parametrize("url", ["collector:4317", "grpc://collector:4317", "http://", "/tmp/x"])
def test_an_endpoint_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:port"):
        check_endpoint(url)


def _run(code: str, *paths: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, paths), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("module", ["gateway", "kvstore", "worker", "cli"])
@pytest.mark.parametrize("is_hidden", [True, False])
def test_opentelemetry_is_not_imported_while_traces_are_off(module: str, is_hidden: bool) -> None:
    # The Redis client looks for it on its own account, and does without; what makes and sends
    # spans is imported by nobody.
    code = f"""
import sys
if {is_hidden}:
    sys.modules["opentelemetry"] = None
import paceline.{module}.__main__
from paceline.process.spans import create_tracer
create_tracer("", 1.0, {{}}).begin("call", None).child("step")
ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "paceline.process.tracing")
print([name for name in sys.modules if name.startswith(ours)])
"""
    ran = _run(code)
    assert (ran.stdout.strip(), ran.returncode) == ("[]", 0), ran.stderr


def test_an_endpoint_without_the_packages_says_what_to_install(tmp_path: Path) -> None:
    # A package of this name without the parts that are needed hides the installed one.
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").touch()
    code = "from paceline.kvstore.__main__ import main; main([])"
    ran = _run(code, tmp_path, PACELINE_OTLP_ENDPOINT="http://127.0.0.1:4317")
    assert ran.returncode == 2
    assert "otlp_endpoint" in ran.stderr
    assert "pip install 'paceline[tracing]'" in ran.stderr
