"""Block keys: the same in every process, and different for whatever a block depends on."""

from __future__ import annotations

import subprocess
import sys

from blake3 import blake3

from paceline.domain.blocks import (
    KEY_BYTES,
    block_key,
    chain_keys,
    chain_root,
    salt_key,
    tail_key,
)

KEY, ROOT = salt_key(b""), chain_root("digest", "f32", 16)
TOKENS = list(range(100, 150))

_ELSEWHERE = """
from paceline.domain.blocks import chain_keys, chain_root, salt_key
root = chain_root("digest", "f32", 16)
print(*(k.hex() for k in chain_keys(salt_key(b""), root, list(range(100, 150)), 16)))
"""


def test_another_process_gets_the_same_keys() -> None:
    command = [sys.executable, "-c", _ELSEWHERE]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    keys = list(chain_keys(KEY, ROOT, TOKENS, 16))
    assert result.stdout.split() == [key.hex() for key in keys]
    assert len(keys) == 3 and {len(key) for key in keys} == {KEY_BYTES}


def test_a_key_is_the_keyed_hash_of_parent_and_little_endian_tokens() -> None:
    data = ROOT + b"".join(token.to_bytes(4, "little") for token in TOKENS[:16])
    assert block_key(KEY, ROOT, TOKENS[:16]) == blake3(data, key=KEY).digest(16)


def test_every_ingredient_changes_the_key() -> None:
    keys = [
        block_key(KEY, ROOT, TOKENS[:16]),
        block_key(salt_key(b"tenant"), ROOT, TOKENS[:16]),
        block_key(KEY, chain_root("digest", "bf16", 16), TOKENS[:16]),
        block_key(KEY, chain_root("digest", "f32", 32), TOKENS[:16]),
        block_key(KEY, chain_root("other", "f32", 16), TOKENS[:16]),
        block_key(KEY, chain_root("digest", "f32", 16, "adapter"), TOKENS[:16]),
        block_key(KEY, ROOT, TOKENS[1:17]),
        block_key(KEY, ROOT, TOKENS[:15]),
        block_key(KEY, block_key(KEY, ROOT, TOKENS[:16]), TOKENS[:16]),
        tail_key(KEY, ROOT, TOKENS[:16], "request"),
        tail_key(KEY, ROOT, TOKENS[:16], "request2"),
        tail_key(KEY, ROOT, TOKENS[:15], "request"),
    ]
    assert len(set(keys)) == len(keys)


def test_a_chain_is_cut_to_full_blocks_and_depends_on_all_before() -> None:
    keys = list(chain_keys(KEY, ROOT, TOKENS, 16))
    assert list(chain_keys(KEY, ROOT, TOKENS[:47], 16)) == keys[:2]
    assert list(chain_keys(KEY, ROOT, TOKENS[:15], 16)) == []
    other = list(chain_keys(KEY, ROOT, [TOKENS[0] + 1, *TOKENS[1:]], 16))
    assert not set(other) & set(keys)
