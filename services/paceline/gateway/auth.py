"""Who may call: API keys from a file, looked up by digest.

The file maps keys to tenants:

    {"the-key": {"tenant": "acme", "models": ["demo"], "expires": "2027-01-31T00:00:00+00:00"}}

A key may be written as "sha256:<hex digest>". `models` (optional) limits what the tenant may
name, `expires` (optional) is when the key ends. Without a file everybody is the tenant "".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from paceline.domain.errors import PermissionDeniedError, UnauthenticatedError

_KNOWN_FIELDS = {"tenant", "models", "expires"}
_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who calls, and what they may name."""

    name: str = ""
    models: frozenset[str] | None = None
    """None: every model."""
    expires: datetime | None = None

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
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not data:
            raise ValueError(f"{path}: not a JSON object of keys")
        entries = enumerate(data.items(), start=1)
        return cls({_digest(key): _tenant(f"{path}: entry {n}", v) for n, (key, v) in entries})

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
        if tenant is None or is_expired:
            raise UnauthenticatedError("a valid API key is needed: authorization: Bearer KEY")
        return tenant


def _digest(key: str) -> str:
    prefix, _, digest = key.partition(":")
    return digest.lower() if prefix == "sha256" else sha256(key.encode()).hexdigest()


def _tenant(where: str, value: Any) -> Tenant:
    if not isinstance(value, dict) or not isinstance(value.get("tenant"), str):
        raise ValueError(f"{where}: needs a tenant name")
    if unknown := value.keys() - _KNOWN_FIELDS:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}")
    models, expires = value.get("models"), value.get("expires")
    if models is not None and not all(isinstance(m, str) for m in models):
        raise ValueError(f"{where}: models is not a list of names")
    moment = None if expires is None else datetime.fromisoformat(expires)
    if moment is not None and moment.tzinfo is None:
        raise ValueError(f"{where}: expires needs a time zone")
    return Tenant(value["tenant"], None if models is None else frozenset(models), moment)
