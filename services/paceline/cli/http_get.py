"""One HTTP GET to a process of the platform, without the proxies that the environment names."""

from __future__ import annotations

import urllib.request

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def http_get(url: str, timeout_s: float) -> bytes:
    """Return the body; blocks, so event loops call it in a thread.

    Raises:
        OSError: nobody answers in time, or not with success (urllib.error.HTTPError).
    """
    with _OPENER.open(url, timeout=timeout_s) as reply:
        body: bytes = reply.read()
        return body
