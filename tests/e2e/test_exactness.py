"""Greedy ids and log-probabilities of the whole path equal transformers' own.

Gateway, prefill workers, KV nodes and decode workers are processes of their own; blocks move
over shared memory and over the network. What may differ from run to run (who computes, in
which batch, behind which prefix hit) must not show in a single token.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from paceline.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    GenerateRequest,
    Message,
    MessageList,
    SamplingParams,
)
from tests.checkpoints import ARCHITECTURES, DEMO, random_checkpoint
from tests.e2e.client import (
    TIE,
    Answer,
    Client,
    assert_greedy,
    conversation,
    decode,
    encode,
    encode_chat,
    greedy,
    reference_ids,
    reference_logits,
    request_for,
)
from tests.e2e.conftest import WHOLE_WAY
from tests.e2e.probe import fleet_metric, until_at_rest
from tests.platform import Platform

BLOCK = 16
MAX_TOKENS = 20
EOS = 1

MATHS = (
    "Nora picks 14 baskets of cherries. Each basket weighs 3 kilograms and a kilogram sells for "
    "$5. She keeps 2 baskets for her family. How much money does she get for the others?",
    "A cinema has 18 rows of 22 seats. On Friday 310 seats are taken. How many are free?",
    "Ada reads 12 pages on each of 5 days and 20 on the next. How many pages has she read?",
    "A plumber charges $45 for the visit and $30 per hour. A job takes 3 hours and the parts cost "
    "$68. What does the customer pay in total, and what is left of $300?",
    "Four friends share 3 pizzas of 8 slices. Each eats 5 slices. How many slices are left over?",
    "A bus leaves at 7 in the morning and drives 60 kilometres per hour for 4 hours. It stops for "
    "30 minutes and drives another 90 kilometres. How far does it drive?",
)
CODE = (
    'def count_words(text):\n    """Return the number of words in a text."""\n',
    'def merge_sorted(left, right):\n    """Merge two sorted lists into one sorted list."""\n',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, x):\n",
    'def read_config(path, default=None):\n    """Read a configuration file and return it as a '
    'dictionary, or the default if there is no such file."""\n    try:\n',
    "import os\n\ndef file_sizes(path):\n    sizes = {}\n    for name in os.listdir(path):\n",
    'def is_leap_year(year):\n    """Tell whether a year has 366 days."""\n    return',
)
DOCS = (
    "The module collections offers containers beyond list, dict and tuple. A deque supports fast "
    "appends and pops from both ends, and",
    "Changed in version 3.11: The argument timeout may be None, in which case the call waits until",
    "sorted(iterable, *, key=None, reverse=False)\n\n   Return a new sorted list from the items in",
    "Raised when a lookup fails because the key is not in the mapping. The attribute args holds",
    "The with statement is used to wrap the execution of a block with methods of a context manager."
    " This allows common try and finally patterns to be",
    "A generator expression yields its values one by one. Its memory use does not depend on how "
    "many values there are, so that",
)
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 255, 256, 257)
LONG_LENGTHS = (384, 600)
ROUNDS = ((8, 1), (14, 8), (28, 32))
"""(how many prompts, how many of them at a time)"""


@dataclass(frozen=True)
class Case:
    """A request and the tokens its prompt must become."""

    request: GenerateRequest
    prompt_ids: tuple[int, ...]


def chat_case(*contents: str) -> Case:
    messages = [Message(**message) for message in conversation(*contents)]
    request = greedy("", messages=MessageList(messages=messages), max_tokens=MAX_TOKENS)
    return Case(request, tuple(encode_chat(DEMO, *contents)))


def text_case(text: str) -> Case:
    return Case(greedy(text, max_tokens=MAX_TOKENS), tuple(encode(DEMO, text)))


def ids_case(ids: Sequence[int]) -> Case:
    return Case(greedy(ids, max_tokens=MAX_TOKENS), tuple(ids))


@cache
def cases() -> list[Case]:
    """Return 50 prompts without a common block, in a mixed order that is always the same."""
    corpus = encode(DEMO, "\n\n".join([*MATHS, *CODE, *DOCS]))
    made = [chat_case(text) for text in (*MATHS, *DOCS)]
    made += [chat_case("How many seats has the bus?", "It has 86 seats.", MATHS[1])]
    made += [chat_case(CODE[0], CODE[1], DOCS[2], DOCS[3], "Go on.")]
    made += [text_case(text) for text in (*CODE, *DOCS)]
    made += [text_case("".join(CODE)[50:]), text_case(" ".join(DOCS)[50:])]
    for number, length in enumerate((*LENGTHS, *LONG_LENGTHS)):
        text = [*corpus[number * 21 :], *corpus, *corpus]
        made.append(ids_case([2000 + number, *text][:length]))
    heads = [case.prompt_ids[:BLOCK] for case in made if len(case.prompt_ids) > BLOCK]
    assert len(set(heads)) == len(heads)
    assert len(made) == 50
    random.Random(1).shuffle(made)
    return made


@dataclass
class Runs:
    """The 50 prompts asked twice."""

    first: list[Answer]
    second: list[Answer]
    num_loaded_blocks: float
    """Blocks that decode workers read from the KV store in the first run."""
    num_pulled_blocks: float
    """Blocks that went from one KV node to another."""


async def ask_all(
    platform: Platform, requests: Iterable[GenerateRequest], concurrency: int
) -> list[Answer]:
    """Return the answers in the order of the requests."""
    places = asyncio.Semaphore(concurrency)

    async def ask(client: Client, request: GenerateRequest) -> Answer:
        async with places:
            return await client.generate(request)

    async with Client(platform.grpc) as client:
        return await asyncio.gather(*(ask(client, request) for request in requests))


async def ask_in_rounds(platform: Platform, rounds: Iterable[tuple[int, int]]) -> list[Answer]:
    requests = iter([case.request for case in cases()])
    answers: list[Answer] = []
    for count, concurrency in rounds:
        batch = [next(requests) for _ in range(count)]
        answers += await ask_all(platform, batch, concurrency)
    return answers


@pytest.fixture(scope="module")
def runs(demo_platform: Platform) -> Runs:
    def moved_blocks() -> tuple[float, float]:
        return (
            fleet_metric(demo_platform, "paceline_kv_loaded_blocks_total", "decode"),
            fleet_metric(demo_platform, "paceline_kv_node_pulled_blocks_total", "kvstore"),
        )

    before = moved_blocks()
    first = asyncio.run(ask_in_rounds(demo_platform, ROUNDS))
    until_at_rest(demo_platform)
    after = moved_blocks()
    # The other way round, so that prompts meet other company.
    second = asyncio.run(ask_in_rounds(demo_platform, ROUNDS[::-1]))
    return Runs(first, second, after[0] - before[0], after[1] - before[1])


def is_split(answer: Answer) -> bool:
    return bool(answer.usage[0].prefill_worker != answer.usage[0].decode_worker)


def num_blocks(num_tokens: int) -> int:
    """Return the blocks of KV that a prompt of so many tokens is handed over with.

    The last token is computed where the first one is drawn.
    """
    return -(-(num_tokens - 1) // BLOCK)


def num_cacheable(num_tokens: int) -> int:
    """Return the prompt tokens that a second run finds in full blocks."""
    return (num_tokens - 1) // BLOCK * BLOCK


# -- the demo model ---------------------------------------------------------------------------


def test_greedy_ids_equal_the_reference(runs: Runs) -> None:
    ties = 0
    for case, answer in zip(cases(), runs.first, strict=True):
        ties += assert_greedy(DEMO, case.prompt_ids, answer.ids[0])
        has_ended = answer.ids[0][-1] == EOS
        assert has_ended or len(answer.ids[0]) == MAX_TOKENS
        expected = FINISH_REASON_STOP if has_ended else FINISH_REASON_LENGTH
        assert answer.finish_reason == {0: expected}
    assert ties <= 3, f"{ties} near ties in {50 * MAX_TOKENS} tokens"


def test_greedy_ids_are_what_transformers_generates(runs: Runs) -> None:
    for case, answer in list(zip(cases(), runs.first, strict=True))[:4]:
        if assert_greedy(DEMO, case.prompt_ids, answer.ids[0]) == 0:
            ids = reference_ids(DEMO, case.prompt_ids, MAX_TOKENS)
            assert answer.ids[0] == ids


def test_text_and_counts_belong_to_the_ids(runs: Runs) -> None:
    for case, answer in zip(cases(), runs.first, strict=True):
        assert answer.text[0] == decode(DEMO, answer.ids[0])
        assert answer.usage[0].prompt_tokens == len(case.prompt_ids)
        assert answer.usage[0].completion_tokens == len(answer.ids[0])
        assert list(answer.usage[0].approximations) == []


def test_a_second_run_hits_the_cache_and_changes_no_token(runs: Runs) -> None:
    assert sum(answer.usage[0].cached_prompt_tokens for answer in runs.first) == 0
    for case, first, second in zip(cases(), runs.first, runs.second, strict=True):
        assert second.ids == first.ids
        assert second.text == first.text
        cached = second.usage[0].cached_prompt_tokens
        assert cached == num_cacheable(len(case.prompt_ids))


def test_many_prompts_are_computed_by_one_worker_and_continued_by_another(
    runs: Runs, demo_platform: Platform
) -> None:
    """The faster a worker computes, the more short prompts stay with the one that decodes."""
    split = [len(c.prompt_ids) for c, a in zip(cases(), runs.first, strict=True) if is_split(a)]
    assert len(split) >= 15, f"{len(split)} of 50"
    handed_over = sum(map(num_blocks, split))
    # One whose answer is late is computed again instead.
    assert runs.num_loaded_blocks >= 0.8 * handed_over
    workers = {answer.usage[0].decode_worker for answer in runs.first}
    assert workers == {"decode-0", "decode-1"}
    if len(demo_platform.processes()["kvstore"]) > 1:
        assert runs.num_pulled_blocks > 0


async def test_outputs_of_one_prompt_share_one_prefill(demo_platform: Platform) -> None:
    prompt = [11 + i * i % 4000 for i in range(200)]
    name = "paceline_kv_loaded_blocks_total"
    before = fleet_metric(demo_platform, name, "decode")
    (answer,) = await ask_all(demo_platform, [greedy(prompt, max_tokens=12, n=3)], 1)
    assert len(answer.ids) == 3
    for index in range(3):
        assert answer.ids[index] == answer.ids[0]
        assert answer.text[index] == decode(DEMO, answer.ids[0])
    assert_greedy(DEMO, prompt, answer.ids[0])
    assert len({usage.prefill_worker for usage in answer.usage.values()}) == 1
    loaded = fleet_metric(demo_platform, name, "decode") - before
    assert loaded == (num_blocks(len(prompt)) if is_split(answer) else 0)


async def test_logprobs_equal_the_reference(demo_platform: Platform) -> None:
    prompts = [encode(DEMO, text) for text in (*CODE[:3], *DOCS[:3])]
    drawn = SamplingParams(temperature=1.5, seed=3)
    fields = {"max_tokens": 16, "logprobs": 5, "ignore_eos": True}
    requests = [greedy(p, **fields) for p in prompts]
    requests += [request_for(p, sampling=drawn, **fields) for p in prompts]
    answers = await ask_all(demo_platform, requests, 12)
    for prompt, answer in zip([*prompts, *prompts], answers, strict=True):
        ids, entries = answer.ids[0], answer.logprobs[0]
        expected = reference_logits(DEMO, prompt, ids).log_softmax(dim=-1)
        assert [entry.token_id for entry in entries] == ids
        for entry, row in zip(entries, expected, strict=True):
            named = torch.tensor([entry.token_id, *(t.token_id for t in entry.top)])
            given = torch.tensor([entry.logprob, *(t.logprob for t in entry.top)])
            torch.testing.assert_close(given, row[named], rtol=0, atol=TIE)
            torch.testing.assert_close(given[1:], row.topk(5).values, rtol=0, atol=TIE)


async def test_a_conversation_continues_from_what_is_cached(demo_platform: Platform) -> None:
    contents, cached = [f"{MATHS[0]} Say how."], [-1]
    async with Client(demo_platform.grpc) as client:
        for question in ("And with 3 baskets more?", "Who told you?", ""):
            case = chat_case(*contents)
            answer = await client.generate(case.request)
            assert_greedy(DEMO, case.prompt_ids, answer.ids[0])
            assert answer.usage[0].prompt_tokens == len(case.prompt_ids)
            cached.append(answer.usage[0].cached_prompt_tokens)
            contents += [answer.text[0], question]
            await asyncio.to_thread(until_at_rest, demo_platform)
    assert cached == sorted(set(cached)), "cached tokens do not grow"


async def test_a_turn_finds_the_kv_of_the_former_answer(demo_platform: Platform) -> None:
    prompt, found = [900 + i * 17 % 3000 for i in range(45)], 0
    async with Client(demo_platform.grpc) as client:
        for turn in range(3):
            answer = await client.generate(greedy(prompt, max_tokens=40, ignore_eos=True))
            assert_greedy(DEMO, prompt, answer.ids[0])
            assert answer.usage[0].cached_prompt_tokens == found
            prompt = [*prompt, *answer.ids[0]]
            found = num_cacheable(len(prompt))
            prompt += [700 + turn * 50 + i for i in range(21)]
            await asyncio.to_thread(until_at_rest, demo_platform)


# -- every architecture -----------------------------------------------------------------------

ENGINES = {
    "llama": ("--chunk-tokens", "16"),
    "llama-biased-llama3-rope": ("--chunk-tokens", "512"),
    "mistral": ("--chunk-tokens", "16"),
    "qwen2": ("--chunk-tokens", "512"),
    "qwen3": ("--chunk-tokens", "512", "--num-kv-blocks", "10"),
}
TINY_POOL = "qwen3"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
async def test_every_architecture_equals_the_reference(tmp_path: Path, architecture: str) -> None:
    directory = random_checkpoint(architecture, tmp_path / architecture)
    is_tiny = architecture == TINY_POOL
    draw = random.Random(architecture)
    longest, max_tokens = (60, 60) if is_tiny else (200, 20)
    lengths = [1, 16, 17, 33, longest, *(draw.randint(45, longest) for _ in range(5))]
    prompts = [[draw.randrange(4, 4096) for _ in range(length)] for length in lengths]
    requests = [greedy(p, max_tokens=max_tokens, ignore_eos=True) for p in prompts]
    flags = ("--model", str(directory), "--prefill", "1", "--decode", "1", *ENGINES[architecture])
    with Platform(tmp_path, *flags, env=WHOLE_WAY) as platform:
        # One at a time, which routing splits, and many at a time, which it may not.
        answers = await ask_all(platform, requests[:5], 1)
        answers += await ask_all(platform, requests[5:], 5)
        assert fleet_metric(platform, "paceline_kv_loaded_blocks_total", "decode") > 0
        preemptions = fleet_metric(platform, "paceline_engine_preemptions_total", "decode")
        until_at_rest(platform)
    ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.ids[0]) == max_tokens
        ties += assert_greedy(directory, prompt, answer.ids[0])
    assert ties <= 1
    assert any(map(is_split, answers))
    assert (preemptions > 0) == is_tiny
