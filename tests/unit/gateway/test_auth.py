"""API keys: who may call, and what a key file may say."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from paceline.domain.errors import PermissionDeniedError, UnauthenticatedError
from paceline.gateway.auth import Authenticator, Tenant

FUTURE = (datetime.now(UTC) + timedelta(days=1)).isoformat()
PAST = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
DIGEST = sha256(b"hashed").hexdigest()


def authenticator(tmp_path: Path, keys: Any) -> Authenticator:
    path = tmp_path / "keys.json"
    path.write_text(keys if isinstance(keys, str) else json.dumps(keys))
    return Authenticator.from_file(path)


def bearer(key: str) -> list[tuple[str, str]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {key}")]


def test_without_a_file_everybody_is_welcome() -> None:
    assert Authenticator.from_file(None).tenant([]) == Tenant()


def test_a_key_names_its_tenant(tmp_path: Path) -> None:
    keys = authenticator(
        tmp_path,
        {
            "plain": {"tenant": "a"},
            f"sha256:{DIGEST.upper()}": {"tenant": "b", "models": ["m"], "expires": FUTURE},
            "sp\u00e9cial": {"tenant": "c", "models": []},
        },
    )
    assert keys.tenant(bearer("plain")) == Tenant("a")
    tenant = keys.tenant(bearer("hashed"))
    assert (tenant.name, tenant.models) == ("b", frozenset(["m"]))
    assert keys.tenant(bearer("sp\u00e9cial")).models == frozenset()


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "plain")],
        [("authorization", "Basic plain")],
        [("x-api-key", "plain")],
        bearer("Plain"),
        bearer("plain plain"),
        bearer("expired"),
        bearer(f"sha256:{DIGEST}"),
        bearer(DIGEST),
        bearer("\udc80"),
    ],
    ids=repr,
)
def test_all_others_are_told_the_same(tmp_path: Path, metadata: list[tuple[str, str]]) -> None:
    keys = authenticator(
        tmp_path,
        {
            "plain": {"tenant": "a"},
            f"sha256:{DIGEST}": {"tenant": "b"},
            "expired": {"tenant": "a", "expires": PAST},
        },
    )
    with pytest.raises(UnauthenticatedError, match="a valid API key is needed"):
        keys.tenant(metadata)


def test_no_key_is_not_the_empty_key(tmp_path: Path) -> None:
    empty = sha256(b"").hexdigest()
    keys = authenticator(tmp_path, {f"sha256:{empty}": {"tenant": "a"}})
    for metadata in ([], bearer(""), [("authorization", "Bearer")]):
        with pytest.raises(UnauthenticatedError):
            keys.tenant(metadata)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '"x"',
        "{",
        '{"secret": "tenant"}',
        '{"secret": []}',
        '{"secret": {}}',
        '{"secret": {"tenant": 1}}',
        '{"secret": {"tenant": "a\\nb"}}',
        '{"secret": {"tenant": "\\ud800"}}',
        '{"secret": {"tenant": "a", "model": ["m"]}}',
        '{"secret": {"tenant": "a", "models": "demo"}}',
        '{"secret": {"tenant": "a", "models": {"demo": 1}}}',
        '{"secret": {"tenant": "a", "models": [1]}}',
        '{"secret": {"tenant": "a", "models": 7}}',
        '{"secret": {"tenant": "a", "expires": "soon"}}',
        '{"secret": {"tenant": "a", "expires": 5}}',
        '{"secret": {"tenant": "a", "expires": "2030-01-01T00:00:00"}}',
        '{"secret": {"tenant": "a", "allow_training": "no"}}',
        '{"secret": {"tenant": "a", "allow_training": 0}}',
        '{"": {"tenant": "a"}}',
        '{"sha256:": {"tenant": "a"}}',
        '{"sha256:secret": {"tenant": "a"}}',
        '{"secret": {"tenant": "a"}, "secret": {"tenant": "b"}}',
        f'{{"hashed": {{"tenant": "a"}}, "sha256:{DIGEST}": {{"tenant": "b"}}}}',
    ],
)
def test_a_key_file_that_is_none_is_refused_without_telling_keys(
    tmp_path: Path, content: str
) -> None:
    with pytest.raises(ValueError) as error:
        authenticator(tmp_path, content)
    assert "secret" not in str(error.value) and DIGEST not in str(error.value)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Authenticator.from_file(tmp_path / "none.json")


def test_a_model_outside_the_list_is_refused_whether_it_exists_or_not() -> None:
    Tenant("a").check_model("anything")
    Tenant("a", frozenset(["demo"])).check_model("demo")
    refusals = set()
    for name in ("other", "", "../../etc"):
        with pytest.raises(PermissionDeniedError) as error:
            Tenant("a", frozenset(["demo"])).check_model(name)
        refusals.add((error.value.message, error.value.reason))
    assert refusals == {("this key may not use that model", "permission-denied")}
