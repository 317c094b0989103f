"""Domains are found in token statistics alone: code, documentation and sums."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from paceline.domain.learnings import Sample
from paceline.gateway.tokenizer import ModelTokenizer
from paceline.trainer.domains import Domains
from tests.checkpoints import DEMO

_NAMES = ("path", "value", "index", "items", "name", "node", "key", "buffer", "result", "line")
_VERBS = ("read", "find", "copy", "merge", "close", "parse", "count", "check", "split", "load")
_PEOPLE = ("Anna", "Ben", "Carla", "David", "Eva", "Felix", "Greta", "Hugo")
_THINGS = ("apples", "books", "pencils", "cakes", "marbles", "tickets", "shirts", "eggs")
_PLACES = ("shop", "market", "school", "farm", "library")


def code(chance: random.Random) -> str:
    verb, (a, b, c) = chance.choice(_VERBS), chance.sample(_NAMES, 3)
    body = chance.choice(
        (
            f"    if {a} is None:\n        return {b}\n    for {c} in {b}:\n        {a}.add({c})\n",
            f"    try:\n        {a} = self.{b}[{c}]\n    except Error:\n        raise {c}\n",
            f"    {a} = len({b})\n    while {a} > 0:\n        {c} = {b}.pop()\n        {a} -= 1\n",
            f"    with open({a}) as {b}:\n        {c} = {b}.read()\n    if {c}:\n        pass\n",
        )
    )
    return f"def {verb}_{a}({a}, {b}, {c}=None):\n{body}    return {a}\n"


def docs(chance: random.Random) -> str:
    verb, (a, b, c) = chance.choice(_VERBS), chance.sample(_NAMES, 3)
    first = chance.choice(
        (
            f"Return a new {a} object that can be used to {verb} the given {b}.",
            f"This method will {verb} the {a} of the module. The argument {b} must be a string.",
            f"The {a} class is a subclass of {b}, and is provided for the use of other modules.",
        )
    )
    second = chance.choice(
        (
            f"If the optional argument {c} is given, it specifies the default {a}.",
            f"Changed in version 3.{chance.randrange(3, 13)}: The {c} parameter was added.",
            f"Raises an exception if {b} is not available on the platform. See also {c}().",
            f"Note that the {c} attribute is read-only, and its type depends on the {a}.",
        )
    )
    return f"{first} {second}"


def maths(chance: random.Random) -> str:
    who, (a, b) = chance.choice(_PEOPLE), chance.sample(_THINGS, 2)
    x, y, z = (chance.randrange(2, 40) for _ in range(3))
    question = chance.choice(
        (
            f"{who} buys {x} {a} and {y} {b} at the {chance.choice(_PLACES)}. "
            f"Each costs ${z}. How much money does she spend?",
            f"There are {x} {a} in each box, and {who} has {y} boxes. He gives away {z} {b}. "
            "How many are left?",
            f"{who} sells {x} {a} every day for {y} days. How many {b} can he buy for ${z} each?",
        )
    )
    return f"{question} {who} has {x} * {y} = {x * y} {a}. So it is {x * y} - {z} = {x * y - z}."


KINDS = {"code": code, "docs": docs, "maths": maths}


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return ModelTokenizer(DEMO)


def texts(tokenizer: ModelTokenizer, kinds: list[str]) -> list[tuple[str, list[int]]]:
    chance = random.Random(4)
    rendered = [
        (k, tokenizer.render([{"role": "user", "content": KINDS[k](chance)}])) for k in kinds
    ]
    return [(k, tokenizer.encode(t, add_special_tokens=False)) for k, t in rendered]


def purity(found: list[tuple[str, int]]) -> float:
    clusters: dict[int, Counter[str]] = defaultdict(Counter)
    for kind, cluster in found:
        clusters[cluster][kind] += 1
    return sum(max(kinds.values()) for kinds in clusters.values()) / len(found)


@pytest.mark.parametrize("order", ["mixed", "one after the other", "two, then a third"])
def test_the_domains_of_the_demo_are_found(order: str, tokenizer: ModelTokenizer) -> None:
    if order == "mixed":
        kinds = [*KINDS] * 80
        random.Random(1).shuffle(kinds)
    elif order == "one after the other":
        kinds = ["code"] * 80 + ["docs"] * 80 + ["maths"] * 80
    else:
        kinds = ["code", "maths"] * 60 + ["docs", "code", "maths"] * 40
    domains = Domains()
    found = [(kind, domains.assign(tokens)) for kind, tokens in texts(tokenizer, kinds)]
    # Among the first ones nothing can be told yet.
    assert purity(found) > 0.85
    assert purity(found[64:]) > 0.9
    assert 3 <= domains.num_clusters <= 12


def test_the_same_texts_get_the_same_names_also_across_a_restart(
    tokenizer: ModelTokenizer,
) -> None:
    kinds = [*KINDS] * 40
    encoded = [tokens for _, tokens in texts(tokenizer, kinds)]
    one, two = Domains(), Domains()
    first = [one.assign(tokens) for tokens in encoded]
    half = [two.assign(tokens) for tokens in encoded[:60]]
    two = Domains.from_arrays(two.to_arrays())
    assert half + [two.assign(tokens) for tokens in encoded[60:]] == first


def test_the_number_of_clusters_is_bounded() -> None:
    domains = Domains(max_clusters=3)
    for kind in range(8):
        rng = np.random.default_rng(kind)
        for _ in range(60):
            domains.assign((rng.integers(0, 40, 80) + 100 * kind).tolist())
    assert domains.num_clusters == 3


def test_a_clients_label_comes_first(tokenizer: ModelTokenizer) -> None:
    sample = Sample(b"", "billing", "", 1.0, 0, (1, 2, 3), 1, 1, b"", b"", b"", b"")
    domains = Domains()
    assert domains.name(sample) == "billing"
    assert domains.name(replace(sample, domain="")) == "auto-0"


def test_a_damaged_state_is_refused() -> None:
    arrays = Domains().to_arrays()
    arrays["centres"] = np.zeros((1, 3))
    with pytest.raises(ValueError, match="centres"):
        Domains.from_arrays(arrays)
