"""Drawn tokens and ends of outputs, through the whole path.

A token's noise depends on seed, output and position only: who computes it, in what company
and after what prefix hit must not show. The distribution is compared with transformers' own.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    SamplingParams,
    SpeculationParams,
)
from tests.checkpoints import DEMO
from tests.e2e.client import (
    Answer,
    Client,
    assert_greedy,
    decode,
    encode,
    encode_chat,
    greedy,
    reference_ids,
    reference_logits,
    request_for,
)
from tests.e2e.conftest import WHOLE_WAY
from tests.platform import Platform

EOS = 1
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PROMPT = encode(
    DEMO,
    "The function split_lines of the module texts takes a text and gives back its lines, each "
    "without the characters that end it. An empty text has no lines. The optional argument",
)
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.2}


async def ask(platform: Platform, *requests: Any) -> list[Answer]:
    """Return the answers to requests sent at once."""
    async with Client(platform.grpc) as client:
        return await asyncio.gather(*(client.generate(request) for request in requests))


def drawn(prompt: Sequence[int], seed: int, **fields: Any) -> Any:
    sampling = SamplingParams(seed=seed, **DRAWN)
    return request_for(prompt, sampling=sampling, ignore_eos=True, **{"max_tokens": 24, **fields})


# -- seeds ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def outputs_of_seeds() -> dict[int, list[int]]:
    """What a seed gave on the platform that came first."""
    return {}


async def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(
    demo_platform: Platform, outputs_of_seeds: dict[int, list[int]]
) -> None:
    (alone,) = await ask(demo_platform, drawn(PROMPT, seed=7))
    others = [drawn([50 + i, *PROMPT[i % 9 :]], seed=i, max_tokens=4 + i) for i in range(32)]
    crowd = await ask(demo_platform, *others[:16], drawn(PROMPT, seed=7), *others[16:])
    assert crowd[16].ids == alone.ids
    for seed, answer in [(7, alone), *((100 + i, a) for i, a in enumerate(crowd))]:
        first = outputs_of_seeds.setdefault(seed, answer.ids[0])
        assert answer.ids[0] == first, "another kind of KV store, other tokens"


async def test_a_seed_gives_the_same_tokens_on_every_decode_worker(
    demo_platform: Platform,
) -> None:
    outputs, workers = set(), set()
    for _ in range(10):
        for answer in await ask(demo_platform, *(drawn(PROMPT, seed=8) for _ in range(4))):
            outputs.add(tuple(answer.ids[0]))
            workers.add(answer.usage[0].decode_worker)
        if len(workers) == 2:
            break
    assert len(workers) == 2
    assert len(outputs) == 1


async def test_outputs_of_one_seed_differ_from_each_other_and_repeat(
    demo_platform: Platform,
) -> None:
    requests = [drawn(PROMPT, seed=9, n=4), drawn(PROMPT, seed=9, n=4), drawn(PROMPT, seed=9)]
    first, again, single = await ask(demo_platform, *requests)
    assert len({tuple(ids) for ids in first.ids.values()}) == 4
    assert again.ids == first.ids
    assert single.ids[0] == first.ids[0]


async def test_requests_without_a_seed_differ(demo_platform: Platform) -> None:
    request = request_for(PROMPT, max_tokens=24, ignore_eos=True)
    answers = await ask(demo_platform, *[request] * 4)
    assert len({tuple(answer.ids[0]) for answer in answers}) == 4


async def test_a_repetition_penalty_is_that_of_transformers(demo_platform: Platform) -> None:
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.3)
    (answer,) = await ask(demo_platform, request_for(PROMPT, sampling=sampling, max_tokens=24))
    ids = reference_ids(DEMO, PROMPT, 24, repetition_penalty=1.3)
    assert answer.ids[0] == ids


# -- the distribution -------------------------------------------------------------------------

TOP_K, TEMPERATURE, N, NUM_REQUESTS = 8, 1.25, 16, 132


@pytest.mark.parametrize("demo_platform", ["shm"], indirect=True)
async def test_drawn_tokens_have_the_distribution_of_the_reference(
    demo_platform: Platform,
) -> None:
    logits = reference_logits(DEMO, PROMPT, [0])[0]
    best = logits.topk(TOP_K)
    expected = (best.values / TEMPERATURE).softmax(dim=-1) * (N * NUM_REQUESTS)
    assert expected.min() > 10, "too few of a token to expect"
    requests = []
    for seed in range(NUM_REQUESTS):
        sampling = SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, seed=seed)
        requests.append(request_for(PROMPT, sampling=sampling, max_tokens=1, n=N))
    answers = await ask(demo_platform, *requests)
    counts = Counter(ids[0] for answer in answers for ids in answer.ids.values())
    assert sum(counts.values()) == N * NUM_REQUESTS
    assert counts.keys() <= set(best.indices.tolist())
    observed = torch.tensor([counts[token] for token in best.indices.tolist()])
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert chi_square_p(float(statistic), TOP_K - 1) > 1e-4


def chi_square_p(statistic: float, freedom: int) -> float:
    """Return the probability of a statistic at least as large."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


# -- how outputs end --------------------------------------------------------------------------


def shortest_with(directory: Path, ids: Sequence[int], stop: str) -> list[int]:
    """Return the leading ids up to the one that completes a stop string."""
    count = next(k for k in range(1, len(ids) + 1) if stop in decode(directory, ids[:k]))
    return list(ids[:count])


def assert_stopped_at(directory: Path, answer: Answer, whole: Sequence[int], stop: str) -> None:
    """Check an output against the one that the same request has without stop strings."""
    text = decode(directory, whole)
    assert answer.finish_reason == {0: FINISH_REASON_STOP}
    assert answer.text[0] == text[: text.index(stop)]
    assert answer.ids[0] == shortest_with(directory, whole, stop)
    assert answer.usage[0].completion_tokens == len(answer.ids[0])
    assert_prefixes(directory, answer, whole)


def assert_prefixes(directory: Path, answer: Answer, whole: Sequence[int]) -> None:
    """Check what a client has at any time: a beginning of the text, never a broken character."""
    text, sent = decode(directory, whole), ""
    for piece in answer.pieces[0]:
        sent += piece
        assert text.startswith(sent), f"{sent[-20:]!r}"


async def test_no_text_goes_past_a_stop_string(demo_platform: Platform) -> None:
    (whole,) = await ask(demo_platform, greedy(PROMPT, max_tokens=40, ignore_eos=True))
    ids, text = whole.ids[0], whole.text[0]
    assert_greedy(DEMO, PROMPT, ids)
    # Inside a token, across two and more tokens, and at the very end.
    stops = [text[9:10], text[17:20], text[25:40], text[-3:]]
    requests = [greedy(PROMPT, max_tokens=40, ignore_eos=True, stop=[s]) for s in stops]
    for stop, answer in zip(stops, await ask(demo_platform, *requests), strict=True):
        assert_stopped_at(DEMO, answer, ids, stop)


async def test_the_first_of_several_stop_strings_counts(demo_platform: Platform) -> None:
    (whole,) = await ask(demo_platform, greedy(PROMPT, max_tokens=40, ignore_eos=True))
    ids, text = whole.ids[0], whole.text[0]
    stops = ["never seen", text[30:36], text[12:15]]
    request = greedy(PROMPT, max_tokens=40, ignore_eos=True, stop=stops)
    (answer,) = await ask(demo_platform, request)
    assert_stopped_at(DEMO, answer, ids, min(stops[1:], key=text.index))


async def test_text_held_back_for_a_stop_string_comes_at_the_end(demo_platform: Platform) -> None:
    (whole,) = await ask(demo_platform, greedy(PROMPT, max_tokens=30, ignore_eos=True))
    stop = whole.text[0][-6:] + "never seen"
    request = greedy(PROMPT, max_tokens=30, ignore_eos=True, stop=[stop])
    (answer,) = await ask(demo_platform, request)
    assert answer.finish_reason == {0: FINISH_REASON_LENGTH}
    assert answer.ids == whole.ids
    assert answer.text == whole.text


async def test_outputs_stop_each_at_its_own_place(demo_platform: Platform) -> None:
    (whole,) = await ask(demo_platform, drawn(PROMPT, seed=21, n=8, max_tokens=40))
    (answer,) = await ask(demo_platform, drawn(PROMPT, seed=21, n=8, max_tokens=40, stop=["e"]))
    lengths = set()
    for index, text in whole.text.items():
        assert answer.text[index] == text.split("e")[0]
        has_stopped = "e" in text
        expected = FINISH_REASON_STOP if has_stopped else FINISH_REASON_LENGTH
        assert answer.finish_reason[index] == expected
        ids = whole.ids[index]
        assert answer.ids[index] == (shortest_with(DEMO, ids, "e") if has_stopped else ids)
        lengths.add(len(answer.ids[index]))
    assert len(lengths) > 1, "all stopped in one step"


async def test_a_stop_token_ends_the_output(demo_platform: Platform) -> None:
    (whole,) = await ask(demo_platform, greedy(PROMPT, max_tokens=20, ignore_eos=True))
    token = whole.ids[0][7]
    request = greedy(PROMPT, max_tokens=20, ignore_eos=True, stop_token_ids=[token])
    (answer,) = await ask(demo_platform, request)
    assert answer.ids[0] == whole.ids[0][: whole.ids[0].index(token) + 1]
    assert answer.text[0] == decode(DEMO, answer.ids[0])
    assert answer.finish_reason == {0: FINISH_REASON_STOP}


async def test_the_end_of_sequence_ends_the_output_unless_ignored(
    demo_platform: Platform,
) -> None:
    prompt = encode_chat(DEMO, "Tom has 3 apples and buys 4 more. How many apples has he?")
    expected = reference_ids(DEMO, prompt, 60)
    assert expected.index(EOS) == len(expected) - 1 < 59
    requests = [greedy(prompt, max_tokens=60), greedy(prompt, max_tokens=60, ignore_eos=True)]
    ended, whole = await ask(demo_platform, *requests)
    assert ended.ids[0] == expected
    assert ended.finish_reason == {0: FINISH_REASON_STOP}
    assert ended.text[0] == decode(DEMO, expected[:-1])
    assert len(whole.ids[0]) == 60
    assert whole.finish_reason == {0: FINISH_REASON_LENGTH}
    assert_greedy(DEMO, prompt, whole.ids[0])
    assert whole.text[0] == decode(DEMO, whole.ids[0])


async def test_max_tokens_is_exact(demo_platform: Platform) -> None:
    requests = [greedy(PROMPT, max_tokens=k, ignore_eos=True) for k in (1, 2, 15, 16, 17, 33)]
    for request, answer in zip(requests, await ask(demo_platform, *requests), strict=True):
        assert len(answer.ids[0]) == request.max_tokens
        assert answer.finish_reason == {0: FINISH_REASON_LENGTH}
        assert_greedy(DEMO, PROMPT, answer.ids[0])


# -- characters of several tokens ---------------------------------------------------------------

WRITTEN = "日語中한い 😀é€д\N{ZERO WIDTH JOINER}"
CONTEXT = 256


def scribe_checkpoint(directory: Path) -> Path:
    """Write a model that writes WRITTEN over and over, and at temperature 1 sometimes errs.

    Each token of the text has a direction of its own, all others share one. A token is
    followed by its successor in the text with a logit of 10.6 above any other: 9 times in 10.
    """
    cycle = encode(DEMO, WRITTEN)
    assert len(set(cycle)) == len(cycle) > 2 * len(WRITTEN)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    directions = torch.eye(config.hidden_size)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:] = directions[0]
        model.lm_head.weight.zero_()
        height = 10.6 / config.hidden_size**0.5
        for place, token in enumerate(cycle, start=1):
            model.model.embed_tokens.weight[token] = directions[place]
            model.lm_head.weight[token] = height * directions[place - 1]
        model.lm_head.weight[cycle[0]] += height * directions[len(cycle)]
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def scribe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scribe_checkpoint(tmp_path_factory.mktemp("scribe") / "scribe")


@pytest.fixture(scope="module")
def scribe_platform(scribe: Path) -> Iterator[Platform]:
    flags = ("--model", str(scribe), "--prefill", "1", "--decode", "1")
    with Platform(scribe.parent, *flags, env=WHOLE_WAY) as up:
        yield up


async def test_characters_of_several_tokens_arrive_whole(
    scribe_platform: Platform, scribe: Path
) -> None:
    prompt = encode(scribe, WRITTEN)
    for mode in ("OFF", "AUTO"):
        request = greedy(
            prompt,
            max_tokens=5 * len(prompt),
            ignore_eos=True,
            speculation=SpeculationParams(mode=mode),
        )
        (answer,) = await ask(scribe_platform, request)
        assert_greedy(scribe, prompt, answer.ids[0])
        assert answer.text[0] == decode(scribe, answer.ids[0]) == WRITTEN * 5
        # Drafts bring several tokens at a time.
        if mode == "OFF":
            assert sum(map(bool, answer.pieces[0])) > 2 * len(WRITTEN), "text comes late"


async def test_a_character_cut_by_the_end_is_as_the_tokenizer_shows_it(
    scribe_platform: Platform, scribe: Path
) -> None:
    prompt = encode(scribe, WRITTEN)
    requests = [greedy(prompt, max_tokens=k, ignore_eos=True) for k in range(1, len(prompt))]
    for answer in await ask(scribe_platform, *requests):
        text = decode(scribe, answer.ids[0])
        assert answer.text[0] == text
        assert text.rstrip(REPLACEMENT) == WRITTEN[: len(text.rstrip(REPLACEMENT))]


async def test_broken_characters_are_those_of_the_whole_text(
    scribe_platform: Platform, scribe: Path
) -> None:
    prompt = encode(scribe, "😀 " + WRITTEN)
    requests = []
    for seed in range(8):
        sampling = SamplingParams(temperature=0.8 + 0.1 * seed, seed=seed)
        fields = {"sampling": sampling, "max_tokens": 100, "ignore_eos": True, "n": 2}
        requests.append(request_for(prompt, **fields))
    texts = []
    for answer in await ask(scribe_platform, *requests):
        for index, ids in answer.ids.items():
            assert answer.text[index] == decode(scribe, ids)
            texts.append(answer.text[index])
    joined = "".join(texts)
    assert joined.count(REPLACEMENT) > 20
    assert sum(joined.count(character) for character in WRITTEN) > 20 * len(WRITTEN)


@pytest.mark.parametrize("stop", ["中", "い 😀é", "\N{ZERO WIDTH JOINER}日語"])
async def test_stop_strings_of_several_tokens_per_character(
    scribe_platform: Platform, scribe: Path, stop: str
) -> None:
    prompt = encode(scribe, WRITTEN)
    requests = [greedy(prompt, max_tokens=60, ignore_eos=True)]
    requests += [greedy(prompt, max_tokens=60, ignore_eos=True, stop=[stop])]
    whole, answer = await ask(scribe_platform, *requests)
    assert_stopped_at(scribe, answer, whole.ids[0], stop)


@pytest.mark.parametrize("num_prompt", [1, 100, CONTEXT - 1])
async def test_the_context_ends_the_output(
    scribe_platform: Platform, scribe: Path, num_prompt: int
) -> None:
    prompt = (encode(scribe, WRITTEN) * 9)[:num_prompt]
    requests = [greedy(prompt, ignore_eos=True), greedy(prompt, ignore_eos=True, n=2)]
    requests += [greedy(prompt, ignore_eos=True, max_tokens=CONTEXT)]
    for answer in await ask(scribe_platform, *requests):
        for index, ids in answer.ids.items():
            assert len(prompt) + len(ids) == CONTEXT
            assert answer.finish_reason[index] == FINISH_REASON_LENGTH
            assert_greedy(scribe, prompt, ids)
