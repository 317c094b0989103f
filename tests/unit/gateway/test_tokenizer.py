"""Text to tokens, compared with transformers' AutoTokenizer on the same directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from paceline.domain.errors import InvalidRequestError
from paceline.gateway.chat_template import ChatTemplate
from paceline.gateway.tokenizer import ModelTokenizer
from tests.unit.gateway import templates, tokenizers_made
from tests.unit.gateway.stack import DEMO, demo_tokenizer

USER = {"role": "user", "content": "  How are you?\n"}
ANSWER = {"role": "assistant", "content": "<think>hm</think>\n\nFine. "}
SYSTEM = {"role": "system", "content": "Be <b>brief</b> & \u00e9."}

CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, USER],
    "system-turns": [SYSTEM, USER, ANSWER, USER, ANSWER, USER],
    "ends-with-assistant": [USER, ANSWER],
    "empty-content": [{"role": "user", "content": ""}],
    "special-tokens": [{"role": "user", "content": "a<|eos|>b<|assistant|> <|bos|>c"}],
    "odd-text": [{"role": "user", "content": "\u05e9\u05dc \0 \U0001f600 {{ 7*7 }} {% if x %}"}],
    "stop": [USER, {"role": "stop", "content": "x"}, USER],
}


def checkpoint(directory: Path, template: str | None = None, **config: Any) -> Path:
    """Write the demo model's tokenizer with another template and configuration."""
    shutil.copy(DEMO / "tokenizer.json", directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    base = json.loads((DEMO / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**base, **config}))
    return directory


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def reference_ids(reference: Any, messages: list[dict[str, str]]) -> list[int]:
    encoded = reference.apply_chat_template(messages, add_generation_prompt=True)
    return list(encoded["input_ids"])


def our_ids(tokenizer: ModelTokenizer, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.encode(tokenizer.render(messages), add_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_plain_text_is_tokenised_as_transformers_does(reference: Any, text: str) -> None:
    assert demo_tokenizer().encode(text) == reference(text)["input_ids"]


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_demo_models_conversations(reference: Any, case: str) -> None:
    messages = CONVERSATIONS[case]
    assert our_ids(demo_tokenizer(), messages) == reference_ids(reference, messages)


@pytest.mark.parametrize("family", templates.ALL)
def test_templates_of_known_families(tmp_path: Path, family: str) -> None:
    directory = checkpoint(tmp_path, templates.ALL[family])
    ours, reference = ModelTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    num_rendered = 0
    for messages in CONVERSATIONS.values():
        try:
            wanted = reference_ids(reference, messages)
        except Exception:
            with pytest.raises(InvalidRequestError) as error:
                ours.render(messages)
            assert error.value.field == "messages"
        else:
            assert our_ids(ours, messages) == wanted
            num_rendered += 1
    assert num_rendered >= 4


def test_what_a_template_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(checkpoint(tmp_path, templates.MISTRAL))
    with pytest.raises(InvalidRequestError, match="roles must alternate") as error:
        tokenizer.render([USER, USER])
    assert (error.value.field, error.value.reason) == ("messages", "invalid-argument")


@pytest.mark.parametrize("case", templates.BREAKING)
def test_whatever_happens_in_a_template_names_the_messages(case: str) -> None:
    template = ChatTemplate(templates.BREAKING[case], {"bos_token": "<s>"})
    with pytest.raises(InvalidRequestError) as error:
        template.render([USER])
    assert error.value.field == "messages"
    assert "paceline" not in error.value.message and "/" not in error.value.message


def test_content_is_never_run_as_a_template() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    content = "{{ ''.__class__ }}{% raise %}"
    assert template.render([{"role": "user", "content": content}]) == content


def test_a_broken_template_is_said_so_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat template"):
        ModelTokenizer(checkpoint(tmp_path, "{% if %}"))


def test_a_model_without_a_template_takes_prompts_only(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(checkpoint(tmp_path))
    assert tokenizer.encode("hello") == demo_tokenizer().encode("hello")
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.render([USER])


@pytest.mark.parametrize("as_list", [False, True])
def test_the_template_may_stand_in_the_configuration(tmp_path: Path, as_list: bool) -> None:
    source: Any = templates.LLAMA
    if as_list:
        named = [("tool_use", "{{ 'tools' }}"), ("default", source)]
        source = [{"name": name, "template": text} for name, text in named]
    directory = checkpoint(tmp_path, chat_template=source)
    ours, reference = ModelTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert our_ids(ours, [SYSTEM, USER]) == reference_ids(reference, [SYSTEM, USER])


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
        {"add_bos_token": True, "bos_token": None},
        {"bos_token": {"__type": "AddedToken", "content": "<|user|>", "special": True}},
    ],
    ids=str,
)
def test_the_configuration_is_read_as_transformers_reads_it(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    directory = checkpoint(tmp_path, templates.LLAMA, **config)
    ours, reference = ModelTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.encode("hello there") == reference("hello there")["input_ids"]
    if config.get("bos_token", "") is not None:
        assert our_ids(ours, [USER]) == reference_ids(reference, [USER])


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven eight nine ten"
    assert ModelTokenizer(tmp_path).encode(text) == demo_tokenizer().encode(text)


def test_a_sentencepiece_like_tokenizer_reads_back(tmp_path: Path) -> None:
    tokenizers_made.sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = ModelTokenizer(tmp_path)
    for text in ("the b", "a\n\u00e9 \U0001f600", "  b  "):
        ids = tokenizer.encode(text)
        assert tokenizer.tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str | None) -> None:
    directory = checkpoint(tmp_path)
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises((OSError, ValueError)):
        ModelTokenizer(directory)


def test_special_tokens_are_known_by_what_they_look_like() -> None:
    vocabulary = demo_tokenizer().vocabulary
    assert vocabulary.special_id("<|eos|>") == 1
    assert vocabulary.special_id("<|eos|> ") is None
    assert vocabulary.special_id("the") is None
    assert vocabulary.is_silent(1) and vocabulary.is_silent(10**6)
    assert not vocabulary.is_silent(100)
