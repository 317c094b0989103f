"""Which files make a draft's checkpoint, for everybody who sends, takes or keeps one."""

from __future__ import annotations

CONFIG = "config.json"
WEIGHTS_SUFFIX = ".safetensors"

VERSION_DIGITS = 12
"""A version is this much of its digest's beginning."""

MAX_FILES = 64
"""Of one draft: shards and a tokenizer's files are far fewer."""

_MAX_NAME_CHARS = 128

_NAMES = frozenset(
    {
        CONFIG,
        "generation_config.json",
        "paceline_draft.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    }
)


def is_draft_file(name: str) -> bool:
    """Whether a file of this name may be part of a draft; a name with a path never is."""
    is_plain = (
        0 < len(name) <= _MAX_NAME_CHARS
        and name.isascii()
        and name.isprintable()
        and name[0] not in ".-"
        and not set(name) & set("/\\")
    )
    return is_plain and (name in _NAMES or name.endswith((WEIGHTS_SUFFIX, ".index.json")))


def version_of(digest: str) -> str:
    """Return the version that a digest names."""
    return digest[:VERSION_DIGITS]


def is_version(text: str) -> bool:
    """Whether it has the form of a version, so that it can name a directory."""
    return len(text) == VERSION_DIGITS and not set(text) - set("0123456789abcdef")
