"""Text to tokens: the checkpoint's tokenizer and chat template.

Ids are those of transformers' AutoTokenizer for the same directory. Back to text goes
detokenizer.py, with the vocabulary that is read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from paceline.domain.errors import InvalidRequestError
from paceline.gateway.chat_template import ChatTemplate
from paceline.gateway.detokenizer import Vocabulary

_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
"""Names under which a tokenizer's configuration gives them, and chat templates use them."""


class ModelTokenizer:
    """Tokenizer and chat template of one checkpoint. Thread-safe after construction."""

    def __init__(self, directory: Path) -> None:
        """Load.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not what its name says.
        """
        config = _read_config(directory / "tokenizer_config.json")
        special_tokens = {
            name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name)
        }
        self.tokenizer = _read_tokenizer(directory / "tokenizer.json")
        self.vocabulary = Vocabulary(self.tokenizer)
        """What detokenising needs."""
        tokens = self.tokenizer.get_vocab(with_added_tokens=True)
        self.longest_token_bytes = max((len(token.encode()) for token in tokens), default=1)
        source = _read_template(directory / "chat_template.jinja", config)
        self._template = ChatTemplate(source, special_tokens) if source else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenise text; `add_special_tokens` adds what tokenizer.json puts around a prompt."""
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a conversation, with its special tokens; tokenise it without more.

        Raises:
            InvalidRequestError: there is no template, or it refuses the conversation.
        """
        if self._template is None:
            raise InvalidRequestError("messages", "this model has no chat template; send a prompt")
        return self._template.render(messages)


def _read_tokenizer(path: Path) -> Tokenizer:
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(f"{path}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_config(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return config


def _read_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """Return the template of its own file, else that of the configuration."""
    if path.exists():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        return next((t["template"] for t in source if t.get("name") == "default"), None)
    return source


def _content(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token)
