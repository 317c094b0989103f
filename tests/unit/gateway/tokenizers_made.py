"""Small tokenizers of the kinds that checkpoints come with, made here by the tokenizers library."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

_WORDS = ["\u2581the", "\u2581a", "\u2581", "b", "c", "ab", "\u2581\u2581", "\u00e9", "\u4f60", "."]


def sentencepiece_like(*, strips: bool = True) -> Tokenizer:
    """Return a tokenizer with byte fallback, as Llama 2, Mistral (`strips`) and Gemma have it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS]
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strips else parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Return a tokenizer whose decoder treats the first token differently, as T5 and XLM do."""
    scores = [("<unk>", 0.0), ("</s>", 0.0), *((word, -1.0 - i) for i, word in enumerate(_WORDS))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def byte_level() -> Tokenizer:
    """Return one token per byte, some that end inside a character, and some that are added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    emoji = "".join(letters_of("\U0001f600"))
    # The end of one character and the beginning of the next, as merges make them.
    crossing = [emoji[2:] + emoji[:2], emoji[3:] + emoji[:3], emoji[1:] + emoji[:1]]
    tokens = [*alphabet, "the", "\u0120a", *crossing]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eos|>"])
    tokenizer.add_tokens(
        [AddedToken("two words", special=False), AddedToken("\ud55c", special=False)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """Return a tokenizer without a decoder: tokens are joined by spaces."""
    tokens = ["[UNK]", "hello", "world", "x"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def letters_of(text: str) -> list[str]:
    (piece,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        text
    )
    return list(piece[0])
