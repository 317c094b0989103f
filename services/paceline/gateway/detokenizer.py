"""Tokens to text, piece by piece: whole characters only, and never past a stop string.

Joined pieces equal the tokenizer's own decoding of all tokens at once. Vocabularies of bytes
(GPT-2's alphabet) are decoded byte by byte. For all others a window is decoded twice, with and
without the newest tokens, and the difference is the piece. respond.py calls this.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, Protocol

from tokenizers import Tokenizer

from paceline.gateway.stop_strings import StopSearch, StopStrings

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_MAX_PENDING = 4
"""Tokens after which an incomplete character is taken to be broken for good: UTF-8's longest."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Vocabulary:
    """What detokenising needs to know of a tokenizer, worked out once per process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder = _decoder_types(tokenizer)
        self.tokenizer = tokenizer
        self.is_byte_level = decoder == ["ByteLevel"]
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: id_ for id_, token in added.items() if token.special}
        self._bytes: dict[int, bytes] = {}
        self.byte_ids: frozenset[int] = frozenset()
        """Tokens that stand for one byte each; a run of them is decoded as a whole."""
        if "ByteFallback" in decoder:
            vocabulary = tokenizer.get_vocab(with_added_tokens=True)
            self.byte_ids = frozenset(
                id_ for token, id_ in vocabulary.items() if _BYTE_TOKEN.fullmatch(token)
            )

    def special_id(self, text: str) -> int | None:
        """Return the special token that is written like this: it never appears in the text."""
        return self._special.get(text)

    def is_silent(self, token_id: int) -> bool:
        """Whether decoding leaves the token out: special tokens, and ids without a token."""
        token = self.tokenizer.id_to_token(token_id)
        return token is None or token in self._special

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token of a byte-level vocabulary."""
        data = self._bytes.get(token_id)
        if data is None:
            token = self.tokenizer.id_to_token(token_id)
            is_silent = token is None or token in self._special
            data = self._bytes[token_id] = b"" if is_silent else _bytes_of(str(token))
        return data

    def new_text(self) -> _Text:
        """Return the state of a new output."""
        return _ByteText(self) if self.is_byte_level else _WindowText(self)


class Detokenizer:
    """Text of one output."""

    def __init__(self, vocabulary: Vocabulary, stop: StopStrings) -> None:
        self._text = vocabulary.new_text()
        self._search = StopSearch(stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._search.is_stopped

    def push(self, token_ids: list[int]) -> tuple[str, int]:
        """Add tokens; return text that became final and how many of the tokens were used.

        Fewer are used when a stop string was met: those after it do not belong to the output.
        """
        text = ""
        for used, token_id in enumerate(token_ids, start=1):
            text += self._search.push(self._text.push(token_id))
            if not self.is_stopped and self._search.is_active:
                # Text that waits for its end is final if the output ends with this token.
                waiting = self._text.waiting()
                if waiting and self._search.would_stop(waiting):
                    text += self._search.push(waiting)
            if self.is_stopped:
                return text, used
        return text, len(token_ids)

    def finish(self) -> str:
        """Return what was held back; the output is over."""
        if self.is_stopped:
            return ""
        text = self._search.push(self._text.waiting())
        return text if self.is_stopped else text + self._search.finish()


class _Text(Protocol):
    """Text of the tokens so far."""

    def push(self, token_id: int) -> str:
        """Add a token; return text that no later token can change."""
        ...

    def waiting(self) -> str:
        """Return the text behind what was returned, as it is if no token follows."""
        ...


class _ByteText:
    """Of a byte-level vocabulary: the bytes of all tokens, decoded as UTF-8."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._vocabulary.bytes_of(token_id))

    def waiting(self) -> str:
        incomplete, _ = self._decoder.getstate()
        return incomplete.decode(errors="replace")


class _WindowText:
    """Of any vocabulary, by its own decoder.

    ids   [ ...... | context | newest ]
                   ^         ^
               _context_at  _newest_at
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._context_at = 0
        self._newest_at = 0

    def push(self, token_id: int) -> str:
        if self._vocabulary.is_silent(token_id):
            return ""
        self._ids.append(token_id)
        if token_id in self._vocabulary.byte_ids:
            return ""
        new = self.waiting()
        is_pending = len(self._ids) - self._newest_at < _MAX_PENDING
        # Without new text the context stays: a decoder may treat its first token differently.
        if not new or (new.endswith(_REPLACEMENT) and is_pending):
            return ""
        self._context_at, self._newest_at = self._newest_at, len(self._ids)
        return new

    def waiting(self) -> str:
        if self._newest_at == len(self._ids):
            return ""
        before = self._decode(self._ids[self._context_at : self._newest_at])
        return self._decode(self._ids[self._context_at :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._vocabulary.tokenizer.decode(ids, skip_special_tokens=True))


def _decoder_types(tokenizer: Tokenizer) -> list[str]:
    """Return the types of the tokenizer's decoders, in order."""
    if tokenizer.decoder is None:
        return []
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


def _bytes_of(token: str) -> bytes:
    """Return what a token of GPT-2's alphabet stands for; other tokens stand for themselves."""
    known = [_BYTES.get(char) for char in token]
    data = bytes(byte for byte in known if byte is not None)
    return data if len(data) == len(token) else token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 as it is, other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
