"""What operators set, and what is refused."""

from __future__ import annotations

import pytest

from paceline.autoscaler.__main__ import steady_clock
from paceline.autoscaler.policies.rules import Bounds
from paceline.autoscaler.settings import AutoscalerSettings
from paceline.domain.member import Role


def load(*flags: str) -> AutoscalerSettings:
    return AutoscalerSettings.load(list(flags))


def test_rules_are_what_was_set() -> None:
    rules = load("--decode-max", "5", "--slo-ttft-s", "2", "--idle-s", "0", "--budget", "6").rules()
    assert rules.bounds[Role.DECODE] == Bounds(1, 5)
    assert (rules.ttft_s, rules.idle_s, rules.budget_replicas) == (2.0, None, 6)
    assert load("--idle-s", "300").rules().idle_s == 300
    assert load().rules().budget_replicas is None


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--decode-min", "9"), "decode_min 9 is over its max 8"),
        (("--budget", "1"), "budget 1 is less than the pools' fewest, 2"),
        (("--target", "local"), "control_address must be set"),
        (("--slo-goal", "95"), "slo_goal"),
        (("--target", "nomad"), "target"),
    ],
)
def test_what_does_not_fit_is_refused(
    flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(*flags)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_credentials_stay_out_of_the_log() -> None:
    settings = load("--prometheus-url", "https://me:secret@prometheus/x")
    assert settings.describe()["prometheus_url"] == "https://***@prometheus/x"
    assert load().describe()["prometheus_url"] == "http://127.0.0.1:9090"


def test_the_clock_never_goes_back() -> None:
    clock = steady_clock()
    times = [clock() for _ in range(100)]
    assert times == sorted(times)
