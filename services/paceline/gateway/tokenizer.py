"""Text to tokens: the checkpoint's tokenizer and chat template, sandboxed."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from paceline.domain.errors import InvalidRequestError


class ModelTokenizer:
    """Tokenizer and chat template of one checkpoint. Thread-safe after construction."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer: Any = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._variables = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and value is not None
        }
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.longest_token_bytes = max((len(t.encode()) for t in vocabulary), default=1)
        template = directory / "chat_template.jinja"
        source = template.read_text(encoding="utf-8") if template.exists() else None
        self._template = _compile(source or config.get("chat_template"))

    def encode(self, text: str) -> list[int]:
        """Tokenise plain text as the checkpoint's own tokenizer does."""
        return list(self.tokenizer.encode(text).ids)

    def encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """Render a conversation with the chat template and tokenise it.

        Raises:
            InvalidRequestError: there is no template, or it refuses the conversation.
        """
        if self._template is None:
            raise InvalidRequestError("messages", "this model has no chat template; send a prompt")
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **self._variables
            )
        except TemplateError as error:
            raise InvalidRequestError("messages", f"the chat template refuses: {error}") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _compile(source: Any) -> Any:
    if isinstance(source, list):
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    if not source:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
