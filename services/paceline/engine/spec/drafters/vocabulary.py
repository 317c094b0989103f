"""Tells whether two checkpoints mean the same tokens by the same ids.

A draft of another vocabulary would cost time and never be right; model.py refuses it.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from paceline.engine.models.config import ModelConfig, UnsupportedModelError

_FILE = "tokenizer.json"


def check_same_vocabulary(
    draft: Path, draft_config: ModelConfig, target: Path, target_config: ModelConfig
) -> None:
    """Compare the sizes of two vocabularies, and the id of every token.

    Raises:
        UnsupportedModelError: they differ, or one has no tokenizer; names the first difference.
    """
    ours, theirs = draft_config.vocab_size, target_config.vocab_size
    if ours != theirs:
        raise UnsupportedModelError(f"vocab_size: {ours}, the target has {theirs}")
    # Reading a vocabulary keeps all other threads of Python waiting, 10 ms for 4,096 tokens.
    if _is_same_file(draft / _FILE, target / _FILE):
        return
    our_ids, their_ids = _token_ids(draft), _token_ids(target)
    differing = [t for t in our_ids.keys() | their_ids.keys() if our_ids.get(t) != their_ids.get(t)]
    if differing:
        token = min(differing, key=lambda t: (their_ids.get(t, our_ids.get(t, 0)), t))
        raise UnsupportedModelError(
            f"{_FILE}: token {token!r} has id {our_ids.get(token)}, "
            f"for the target {their_ids.get(token)}; {len(differing)} tokens differ"
        )


def _is_same_file(ours: Path, theirs: Path) -> bool:
    try:
        return ours.read_bytes() == theirs.read_bytes()
    except OSError:
        return False


def _token_ids(directory: Path) -> dict[str, int]:
    path = directory / _FILE
    if not path.is_file():
        raise UnsupportedModelError(f"{_FILE} is missing in {directory}")
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    # The library raises bare exceptions of its own making.
    except Exception as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
