"""Metadata that travels with every call between our processes."""

from __future__ import annotations

from paceline.process.logs import request_id_var
from paceline.rpc.interceptors import REQUEST_ID_KEY


def request_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries the current request's id to the next process."""
    request_id = request_id_var.get()
    return ((REQUEST_ID_KEY, request_id),) if request_id else ()
