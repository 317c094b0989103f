"""Chat templates: Jinja that comes with the checkpoint, rendered in a sandbox.

The environment is that of transformers' `apply_chat_template`, so that both give the same text
for the same messages. tokenizer.py calls this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from paceline.domain.errors import InvalidRequestError


class ChatTemplate:
    """One compiled template. Safe to render on several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile; `special_tokens` are variables of the template, such as `bos_token`.

        Raises:
            ValueError: the source is no template.
        """
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a conversation, up to where the model's answer begins.

        Raises:
            InvalidRequestError: the template refuses the conversation, or breaks on it.
        """
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise InvalidRequestError("messages", f"the chat template refuses: {error}") from error
        except Exception as error:
            # Templates index, call and add what is not there; Python's words would not help.
            what = type(error).__name__
            raise InvalidRequestError("messages", f"the chat template fails: {what}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _GenerationBlocks(Extension):
    """`{% generation %}` marks what the model said, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - read by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(...)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)` that refuses names of Python's own machinery."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No parameter has a name, since any may be an attribute's.
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"attribute {name!r} is not permitted")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump as JSON; Jinja's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
