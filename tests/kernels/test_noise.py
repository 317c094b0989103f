"""Philox against published vectors, noise against its distribution and its own subsets."""

from __future__ import annotations

import math
import random

import pytest
import torch

from paceline_kernels import (
    gumbel_noise,
    gumbel_noise_at,
    philox4x32,
    philox_uniform,
    philox_uniform_at,
)

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32(
        tuple(torch.tensor([c]) for c in counter),
        (torch.tensor([key[0]]), torch.tensor([key[1]])),
    )
    assert tuple(int(word) for word in words) == expected


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 3.3, in Python's integers."""
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_uniforms_are_what_the_documentation_says() -> None:
    rng = random.Random(0)
    for _ in range(50):
        seed, stream, position = rng.getrandbits(64), rng.getrandbits(20), rng.getrandbits(31)
        signed = seed - (1 << 64) if seed >= 1 << 63 else seed
        arguments = [torch.tensor([x]) for x in (signed, stream, position)]
        uniform = philox_uniform(*arguments, 301)[0]
        for token in rng.choices(range(301), k=20):
            key = [seed & 0xFFFFFFFF, seed >> 32]
            words = philox_by_hand([token // 4, position, stream, 0], key)
            assert float(uniform[token]) == (words[token % 4] + 0.5) / 2**32


def keys(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return seeds, torch.arange(rows) % 3, torch.arange(rows) * 17


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 4096, 4099])
def test_rows_do_not_depend_on_each_other(vocab: int) -> None:
    seeds, streams, positions = keys(9)
    together = philox_uniform(seeds, streams, positions, vocab)
    assert together.shape == (9, vocab)
    for r in range(9):
        one = slice(r, r + 1)
        alone = philox_uniform(seeds[one], streams[one], positions[one], vocab)
        assert torch.equal(together[one], alone)


def test_a_larger_vocabulary_does_not_change_the_first_tokens() -> None:
    assert torch.equal(philox_uniform(*keys(3), 100), philox_uniform(*keys(3), 5000)[:, :100])


def test_noise_of_some_tokens_is_that_of_all() -> None:
    tokens_RK = torch.randint(0, 4099, (9, 50))
    whole = gumbel_noise(*keys(9), 4099)
    assert torch.equal(gumbel_noise_at(*keys(9), tokens_RK), whole.gather(1, tokens_RK))
    uniform = philox_uniform(*keys(9), 4099)
    assert torch.equal(philox_uniform_at(*keys(9), tokens_RK), uniform.gather(1, tokens_RK))


def test_every_part_of_the_key_matters() -> None:
    base = [torch.tensor([x]) for x in (1, 2, 3)]
    noise = [gumbel_noise(*base, 64)]
    for i, values in enumerate([(0, 2, 1 << 32, -1), (0, 3, 65536), (0, 4, 1 << 30)]):
        for value in values:
            changed = [*base]
            changed[i] = torch.tensor([value])
            noise.append(gumbel_noise(*changed, 64))
    for i, a in enumerate(noise):
        for b in noise[:i]:
            assert not torch.isclose(a, b).any(dim=-1).all()
            assert (a == b).sum() == 0


def test_uniforms_are_uniform_and_streams_uncorrelated() -> None:
    uniform = philox_uniform(*keys(40), 10_000)
    assert float(uniform.min()) > 0.0 and float(uniform.max()) < 1.0
    counts = torch.histc(uniform.float().flatten(), bins=100, min=0, max=1)
    chi2 = float(((counts - 4000) ** 2 / 4000).sum())
    # 99 degrees of freedom: the 0.1 % tails are at 62 and 149.
    assert 62 < chi2 < 149
    correlation = torch.corrcoef(uniform) - torch.eye(40)
    assert float(correlation.abs().max()) < 5 / math.sqrt(10_000)


def test_gumbel_noise_has_its_moments_and_is_finite() -> None:
    noise = gumbel_noise(*keys(40), 10_000).double()
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_the_extreme_words_give_finite_noise() -> None:
    for word in (0, 1, 2**32 - 2, 2**32 - 1):
        uniform = (word + 0.5) / 2**32
        assert 0.0 < uniform < 1.0
        assert math.isfinite(-math.log(-math.log(uniform)))
