"""What is written down can be read back, stays small, and is never in the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.journal import Journal, JournalFile, entry_to_json
from paceline.autoscaler.record import (
    decision_from_json,
    decision_to_json,
    observation_from_json,
    observation_to_json,
)
from paceline.autoscaler.sources.replay import ReplaySource, read_observations
from paceline.autoscaler.steering import Effect
from paceline.autoscaler.values import Latency, Observation, Pool
from paceline.domain.member import Role
from tests.unit.autoscaler.made import CURVED, REPLICA, decided, observed, pool

P, D = Role.PREFILL, Role.DECODE
EFFECT = Effect(D, 3, "failed", "target-forbidden: no")


def journal(path: Path, max_bytes: int = 1 << 20, kept: int = 8) -> Journal:
    return Journal(kept, JournalFile(path, max_bytes))


@given(
    st.builds(
        lambda size, ready, draining, busy, parked, problems, has_replica: replace(
            observed(parked=parked, problems=tuple(problems)),
            pools={
                P: replace(
                    pool(size, ready, draining),
                    busy_ratio=busy,
                    replica=replace(REPLICA, step_cost=CURVED) if has_replica else None,
                ),
                D: pool(1),
            },
        ),
        st.integers(0, 9),
        st.integers(0, 9),
        st.integers(0, 3),
        st.none() | st.floats(0, 1),
        st.integers(0, 9),
        st.lists(st.text(max_size=20), max_size=3),
        st.booleans(),
    )
)
def test_observations_survive_json(observation: Observation) -> None:
    text = json.dumps(observation_to_json(observation))
    assert observation_from_json(json.loads(text)) == observation


def test_what_is_not_known_survives_json() -> None:
    empty = Observation(1.0, {P: Pool(0), D: Pool(0)}, None, Latency())
    assert observation_from_json(json.loads(json.dumps(observation_to_json(empty)))) == empty


def test_decisions_survive_json() -> None:
    decision = replace(decided(0, 4), victims={D: ("a", "b")})
    assert decision_from_json(json.loads(json.dumps(decision_to_json(decision)))) == decision


def test_memory_keeps_the_last_entries_with_their_effects() -> None:
    kept = Journal(3)
    for i in range(5):
        kept.note_decision(observed(at_s=float(i)), decided(at_s=float(i)))
    kept.note_effects((EFFECT,))
    assert [entry.number for entry in kept.last(99)] == [3, 4, 5]
    assert [entry.number for entry in kept.last(2)] == [4, 5]
    assert kept.last(1)[0].effects == (EFFECT,)
    assert kept.last(0) == []


def test_entries_show_every_number() -> None:
    seen = observed(pool(2, ready=1), pool(3, ready=4, draining=1), parked=5, problems=("a: b",))
    kept = Journal(3)
    kept.note_decision(seen, decided(2, 4))
    kept.note_effects((EFFECT,))
    shown = json.loads(json.dumps(entry_to_json(kept.last(1)[0])))
    assert shown["pools"] == {
        "prefill": {"desired": 2, "requested": 2, "ready": 1, "starting": 1, "draining": 0},
        "decode": {"desired": 4, "requested": 3, "ready": 4, "starting": 0, "draining": 1},
    }
    assert (shown["kind"], shown["parked"], shown["problems"]) == ("grow", 5, ["a: b"])
    assert shown["inputs"] == {"requests": 2.0}
    assert shown["effects"][0]["outcome"] == "failed"


def test_a_file_replays_what_was_seen(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    other = replace(REPLICA, max_rows=16)
    seen = [
        observed(at_s=1.0),
        observed(at_s=2.0),
        observed(pool(1), replace(pool(1), replica=other), at_s=3.0),
        observed(pool(1), replace(pool(1), replica=None), at_s=4.0),
        observed(at_s=5.0),
    ]
    written = journal(path)
    for observation in seen:
        written.note_decision(observation, decided(at_s=observation.at_s))
        written.note_effects((EFFECT,))
    written.close()
    assert list(read_observations(path)) == seen
    lines = path.read_text().splitlines()
    assert len(lines) == 10
    # What workers can do is written when it changes.
    assert ["step_cost" in line for line in lines[::2]] == [True, False, True, False, True]


def test_a_restart_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for at_s in (1.0, 2.0):
        written = journal(path)
        written.note_decision(observed(at_s=at_s), decided())
        written.close()
    assert [observation.at_s for observation in read_observations(path)] == [1.0, 2.0]


def test_files_stay_below_their_bound_and_each_can_be_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written = journal(path, max_bytes=20_000)
    for i in range(200):
        written.note_decision(observed(at_s=float(i)), decided())
    written.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["journal.jsonl", "journal.jsonl.1"]
    # A line that does not fit any more is still written.
    assert sum(file.stat().st_size for file in files) < 20_000 + 2_000
    times = [o.at_s for file in reversed(files) for o in read_observations(file)]
    assert times == [float(i) for i in range(200 - len(times), 200)]


def test_a_disk_that_refuses_costs_lines_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "taken"
    path.mkdir()
    written = journal(path)
    for i in range(3):
        written.note_decision(observed(at_s=float(i)), decided())
        written.note_effects((EFFECT,))
    assert len(written.last(9)) == 3
    assert [record.getMessage() for record in caplog.records] == ["journal-unwritable"]
    path.rmdir()
    written.note_decision(observed(at_s=9.0), decided())
    written.close()
    assert [observation.at_s for observation in read_observations(path)] == [9.0]


@pytest.mark.parametrize(
    "text",
    ["no json\n", "[]\n", '{"observation": {}}\n', '{"observation": {"at_s": 1, "pools": 3}}\n'],
)
def test_what_is_no_journal_is_named_by_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"effects": []}\n' + text)
    if text == "[]\n":
        assert list(read_observations(path)) == []
        return
    with pytest.raises(ValueError, match=r"journal.jsonl:2: no line of a journal"):
        list(read_observations(path))


def test_time_that_goes_back_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written = journal(path)
    for at_s in (2.0, 1.0):
        written.note_decision(observed(at_s=at_s), decided())
    written.close()
    with pytest.raises(ValueError, match=r":2: time goes back"):
        list(read_observations(path))


async def test_a_replay_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written = journal(path)
    written.note_decision(observed(at_s=1.0), decided())
    written.close()
    source = ReplaySource(path)
    assert await source.read(77.0) == observed(at_s=1.0)
    assert source.is_over
    after = await source.read(78.0)
    assert after.at_s == 78.0
    assert after.problems == ("replay-ended: the file has no more observations",)
    path.write_text("")
    with pytest.raises(ValueError, match="no observation"):
        ReplaySource(path)
