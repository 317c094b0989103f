"""Who may call: API keys from a file, looked up by digest.

The file maps keys to tenants; each key stands there once:

    {"the-key": {"tenant": "acme", "models": ["demo"], "expires": "2027-01-31T00:00:00+00:00",
                 "allow_training": false}}

A key may be written as "sha256:<hex digest>". `models` (optional) limits what the tenant may
name, `expires` (optional) is when the key ends. `allow_training` false (optional) keeps the
tenant's text from training drafts, whatever its requests say: of several keys of a tenant one
suffices. Without a file everybody is the tenant "".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from paceline.domain.errors import PermissionDeniedError, UnauthenticatedError

_KNOWN_FIELDS = {"tenant", "models", "expires", "allow_training"}
_SCHEME = "bearer "
_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who calls, and what they may name."""

    name: str = ""
    models: frozenset[str] | None = None
    """None: every model."""
    expires: datetime | None = None
    allow_training: bool = True
    """Whether drafts may be trained with its text, unless a request forbids it."""

    def check_model(self, model: str) -> None:
        """Refuse a model outside the tenant's list, whether or not it exists.

        Raises:
            PermissionDeniedError: it is not on the list.
        """
        if self.models is not None and model not in self.models:
            raise PermissionDeniedError("this key may not use that model")


class Authenticator:
    """Finds the tenant of a call."""

    def __init__(self, tenants: dict[str, Tenant] | None) -> None:
        """Take tenants by hexadecimal SHA-256 of their key; None asks for no key."""
        self._tenants = tenants

    @classmethod
    def from_file(cls, path: Path | None) -> Authenticator:
        """Read a key file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not such a file; names the entry, never the key.
        """
        if path is None:
            return cls(None)
        entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
        if not isinstance(entries, _Pairs) or not entries:
            raise ValueError(f"{path}: not a JSON object of keys")
        tenants: dict[str, Tenant] = {}
        for number, (key, value) in enumerate(entries, start=1):
            where = f"{path}: entry {number}"
            digest = _digest(where, key)
            if digest in tenants:
                raise ValueError(f"{where}: has the key of an earlier entry")
            tenants[digest] = _tenant(where, value)
        private = {tenant.name for tenant in tenants.values() if not tenant.allow_training}
        return cls(
            {
                digest: replace(tenant, allow_training=tenant.name not in private)
                for digest, tenant in tenants.items()
            }
        )

    def tenant(self, metadata: Iterable[tuple[str, Any]]) -> Tenant:
        """Return the tenant of a call by its `authorization: Bearer KEY` metadata.

        Raises:
            UnauthenticatedError: no key, or one that is unknown or expired; always the same text.
        """
        if self._tenants is None:
            return Tenant()
        header = next((str(v) for k, v in metadata if k == "authorization"), "")
        key = header[len(_SCHEME) :].strip() if header.lower().startswith(_SCHEME) else ""
        # Looked up by digest, so that timing tells nothing about the key's characters.
        tenant = self._tenants.get(sha256(key.encode(errors="replace")).hexdigest())
        is_expired = tenant is not None and (
            tenant.expires is not None and tenant.expires <= datetime.now(UTC)
        )
        if tenant is None or is_expired or not key:
            raise UnauthenticatedError("a valid API key is needed: authorization: Bearer KEY")
        return tenant


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written, with all of a key's occurrences."""


def _digest(where: str, key: str) -> str:
    if not key.startswith(_DIGEST_PREFIX):
        if not key:
            raise ValueError(f"{where}: the key is empty")
        return sha256(key.encode(errors="replace")).hexdigest()
    digest = key.removeprefix(_DIGEST_PREFIX).lower()
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{where}: sha256: needs 64 hexadecimal digits")
    return digest


def _tenant(where: str, value: Any) -> Tenant:
    fields = dict(value) if isinstance(value, _Pairs) else {}
    name, models, expires = (fields.get(field) for field in ("tenant", "models", "expires"))
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"{where}: needs a tenant name")
    if unknown := fields.keys() - _KNOWN_FIELDS:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}")
    if models is not None and not (
        type(models) is list and all(isinstance(model, str) for model in models)
    ):
        raise ValueError(f"{where}: models is not a list of names")
    allow_training = fields.get("allow_training", True)
    if type(allow_training) is not bool:
        raise ValueError(f"{where}: allow_training is neither true nor false")
    allowed = None if models is None else frozenset(models)
    return Tenant(name, allowed, _moment(where, expires), allow_training)


def _moment(where: str, text: Any) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expires is no date and time") from error
    if moment.tzinfo is None:
        raise ValueError(f"{where}: expires needs a time zone")
    return moment
