"""Recorded loads of three forms, and what is said of lines that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.cli.errors import CommandError
from paceline.cli.simulation.load import LoadOptions, make_load
from paceline.cli.simulation.traces import Arrival, Trace, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 23:59:59.9999999,4808,10\r
2023-11-17 00:00:00.5000000,3180,8\r
2023-11-17 00:00:00.2500001,110,27"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_bytes(text.encode())
    return path


def test_azure_csv_is_read_to_the_seventh_digit_and_sorted(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, AZURE))
    assert trace.form == "azure"
    assert [a.prompt_tokens for a in trace.arrivals] == [4808, 110, 3180]
    assert [a.at_s for a in trace.arrivals] == pytest.approx([0.0, 0.2500002, 0.5000001], abs=2e-8)
    assert [a.output_tokens for a in trace.arrivals] == [10, 27, 8]


def test_mooncake_lines_are_in_milliseconds_with_prefix_blocks(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 3000, "input_length": 1200, "output_length": 5, "hash_ids": [0, 7, 9]}\n'
        "\n"
        '{"timestamp": 1500, "input_length": 600, "output_length": 2, "hash_ids": [0, 8]}\n'
    )
    trace = read_trace(written(tmp_path, text))
    assert trace.form == "mooncake"
    assert trace.arrivals == (Arrival(0.0, 600, 2, (0, 8)), Arrival(1.5, 1200, 5, (0, 7, 9)))
    assert trace.duration_s == 1.5


def test_our_lines_may_name_prefixes_of_any_block_size(tmp_path: Path) -> None:
    text = (
        '{"at_s": 0.25, "prompt_tokens": 10, "output_tokens": 3}\n'
        '{"at_s": 0.5, "prompt_tokens": 64, "output_tokens": 1, "prefix_ids": [4, 5],'
        ' "prefix_block_tokens": 32}'
    )
    trace = read_trace(written(tmp_path, text))
    assert trace.form == "paceline"
    assert trace.arrivals == (Arrival(0.0, 10, 3), Arrival(0.25, 64, 1, (4, 5), 32))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the trace is empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("time,tokens\n1,2\n", ":1: neither a CSV header"),
        ("TIMESTAMP,ContextTokens\n1,2\n", ":1: no column GeneratedTokens"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,0,1",
            ":2: ContextTokens '0'",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,1", ":2: TIMESTAMP 'noon'"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,5",
            ":2: GeneratedTokens is missing",
        ),
        ('{"timestamp": 1, "input_length": 5}', ":1: output_length is missing"),
        ('{"timestamp": 1, "input_length": 5.5, "output_length": 2}', ":1: input_length 5.5"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 2}', ":1: timestamp -1"),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": 2, "hash_ids": 3}',
            ":1: hash_ids 3",
        ),
        ('{"at_s": 1, "prompt_tokens": true, "output_tokens": 2}', ":1: prompt_tokens True"),
        ('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 2}\n{"at_s"', ":2: not JSON"),
        ('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 2}\n[1]', ":2: not a JSON object"),
    ],
)
def test_what_is_wrong_is_named_with_line_and_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        read_trace(written(tmp_path, text))
    assert said in raised.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="nowhere"):
        read_trace(tmp_path / "nowhere")


def trace_of(count: int) -> Trace:
    return Trace("t", "paceline", tuple(Arrival(float(i), 10, 1, (i % 7,)) for i in range(count)))


def test_a_load_of_one_is_the_trace() -> None:
    trace = trace_of(50)
    assert make_load(trace, LoadOptions()) == trace.arrivals
    assert len(make_load(trace, LoadOptions(limit_s=10.0))) == 10


def test_a_multiple_keeps_the_time_and_shares_no_prefix_between_copies() -> None:
    trace = trace_of(1000)
    load = make_load(trace, LoadOptions(factor=2.5, seed=3))
    assert 2400 < len(load) < 2600
    assert list(load) == sorted(load, key=lambda a: a.at_s)
    assert load[-1].at_s < trace.duration_s + 6
    assert {i for a in load for i in a.prefix_ids} == set(range(21))


def test_a_part_is_a_subset_of_the_trace() -> None:
    trace = trace_of(1000)
    load = make_load(trace, LoadOptions(factor=0.3, seed=3))
    assert 240 < len(load) < 360
    assert set(load) <= set(trace.arrivals)


def test_a_load_is_the_same_for_the_same_seed_only() -> None:
    trace = trace_of(100)
    again = [make_load(trace, LoadOptions(factor=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
