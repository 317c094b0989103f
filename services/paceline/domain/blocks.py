"""Identity of KV blocks: chained, keyed 128-bit hashes over token ids.

A block's key names everything its bytes depend on: the tenant's salt (blake3 key), the root
(model digest, adapter, dtype, layout version) and every token up to its end. Keys are the
same in every process and on every machine. Gateway, engine and KV store all use this file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from blake3 import blake3

KEY_BYTES = 16
"""Length of a block key and of a chain root."""

LAYOUT_VERSION = 1
"""Version of the byte arrangement inside a block; part of every root."""

_SALT_CONTEXT = "paceline 2026-11 cache salt v1"
_ROOT_CONTEXT = "paceline 2026-11 kv root v1"
_TAIL_MARK = b"tail"


def salt_key(cache_salt: bytes) -> bytes:
    """Derive the 32-byte blake3 key of a tenant's salt; any length of salt, also empty."""
    return blake3(cache_salt, derive_key_context=_SALT_CONTEXT).digest()


def chain_root(model_digest: str, dtype: str, block_size: int, adapter: str = "") -> bytes:
    """Return the parent of every first block of one model, dtype, block size and adapter."""
    parts = "\0".join([model_digest, adapter, dtype, str(block_size), str(LAYOUT_VERSION)])
    return blake3(parts.encode(), derive_key_context=_ROOT_CONTEXT).digest(KEY_BYTES)


def block_key(key: bytes, parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash one full block: 32-byte `key` from `salt_key`, 16-byte parent key, int32 token ids."""
    data = parent + struct.pack(f"<{len(token_ids)}i", *token_ids)
    return blake3(data, key=key).digest(KEY_BYTES)


def tail_key(key: bytes, parent: bytes, token_ids: Sequence[int], request_id: str) -> bytes:
    """Hash the partial last block of one request's prompt; never equal to a full block's key."""
    data = (
        parent + struct.pack(f"<{len(token_ids)}i", *token_ids) + _TAIL_MARK + request_id.encode()
    )
    return blake3(data, key=key).digest(KEY_BYTES)


def chain_keys(
    key: bytes, root: bytes, token_ids: Sequence[int], block_size: int
) -> Iterator[bytes]:
    """Yield the keys of all full blocks of `token_ids`, first to last."""
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_key(key, parent, token_ids[start : start + block_size])
        yield parent
