"""Instant queries over Prometheus's HTTP API, with everything that can go wrong declared.

Answers are bounded in size and time, redirects are not followed, and an answer is only taken if
it has the shape that the API promises.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

MAX_BODY_BYTES = 1 << 20
"""A thousand times what our queries return."""

_CHUNK_BYTES = 1 << 16


class QueryError(Exception):
    """A query brought no answer; `reason` is one of problems.SOURCE_REASONS."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


@dataclass(frozen=True, slots=True)
class Sample:
    """One series of an answer. The value may be NaN or infinite."""

    labels: Mapping[str, str]
    value: float
    at_s: float
    """When Prometheus computed it, by its own clock."""


class PrometheusApi:
    """Asks one Prometheus. Made and closed inside the event loop that uses it."""

    def __init__(
        self,
        url: str,
        timeout_s: float,
        *,
        token_file: Path | None = None,
        ca_file: Path | None = None,
    ) -> None:
        """Take the base URL, which may hold a path and credentials.

        Raises:
            ValueError: the URL or the CA file is of no use.
        """
        self._url = _query_url(url)
        self._timeout_s = timeout_s
        self._token_file = token_file
        context = _ssl_context(ca_file)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=32),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        )

    async def query(self, promql: str) -> list[Sample]:
        """Return the answer to an instant query, as of now.

        Raises:
            QueryError: there is none, for whatever reason.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._get(promql)
        except TimeoutError as error:
            raise QueryError(
                "prometheus-timeout", f"no answer within {self._timeout_s:g} s"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            text = str(error) or type(error).__name__
            raise QueryError("prometheus-unreachable", text) from error
        return parse_answer(body)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _get(self, promql: str) -> bytes:
        headers = {}
        if self._token_file is not None:
            # Read each time: tokens of service accounts change under way.
            headers["Authorization"] = f"Bearer {self._token_file.read_text().strip()}"
        async with self._session.get(
            self._url, params={"query": promql}, headers=headers, allow_redirects=False
        ) as reply:
            if 300 <= reply.status < 400:
                where = reply.headers.get("Location", "nowhere")
                raise QueryError("prometheus-redirect", f"answers {reply.status} to {where}")
            body = await _read(reply)
        if reply.status != 200:
            raise QueryError(
                "prometheus-refused" if reply.status in (400, 422) else "prometheus-http",
                f"answers {reply.status}: {_error_text(body)}",
            )
        return body


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in reply.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise QueryError("prometheus-too-large", f"answers more than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def parse_answer(body: bytes) -> list[Sample]:
    """Read the body of a successful answer.

    Raises:
        QueryError: it is not one, or one that lacks data.
    """
    try:
        answer = json.loads(body)
        if answer["status"] != "success":
            raise QueryError("prometheus-refused", str(answer.get("error", "no success")))
        if answer.get("warnings"):
            raise QueryError("prometheus-partial", "; ".join(map(str, answer["warnings"])))
        data = answer["data"]
        kind, result = data["resultType"], data["result"]
        if kind == "scalar":
            return [Sample({}, *_point(result))]
        if kind != "vector":
            raise ValueError(f"a {kind}")
        return [Sample(_labels(item["metric"]), *_point(item["value"])) for item in result]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        text = f"not an answer of the API: {body[:60]!r}"
        raise QueryError("prometheus-garbage", text) from error


def _point(pair: Any) -> tuple[float, float]:
    at_s, value = pair
    return float(value), float(at_s)


def _labels(metric: dict[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in metric.items()}


def _error_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return body[:60].decode(errors="replace") or "nothing"


def _query_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no http:// or https:// URL")
    return url.rstrip("/") + "/api/v1/query"


def _ssl_context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"{ca_file}: no certificates: {error}") from error
