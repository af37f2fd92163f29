"""Is a token drawn as the definition says, from nothing but its logits, key and position?

    pytest test_sampling.py

Every draw here is fixed by its key and position, so the outcome of a test never changes. A statistical test states how
seldom right code would fail it with other keys.
"""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels   # it chooses Triton's interpreter where there is no GPU
import sampling
from sampling import (BLOCK, SamplingParams, choose, describe, exponentials, find_candidates, guess_floors,
                      log_probabilities, noise_key, sample, noise_start)

HAS_TRITON = kernels.load_triton() is not None
SIGMAS = 5   # right code is farther off once in 1.7 million keys
settings.register_profile("sampling", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("sampling")


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def probabilities(logits_V, params: SamplingParams) -> np.ndarray:
    """The definition: sort, cut after the k-th, add up to p. float64."""
    logits = np.asarray(logits_V, dtype=np.float64)
    order = np.lexsort((np.arange(len(logits)), -logits))
    weights = np.exp((logits[order] - logits.max()) / params.temperature)
    weights[params.top_k or len(weights):] = 0
    weights /= weights.sum()
    weights[np.cumsum(weights) - weights >= params.top_p] = 0
    result = np.zeros(len(weights))
    result[order] = weights / weights.sum()
    return result


def draws(logits_V: torch.Tensor, params: SamplingParams, n: int, key: int = 1, start: int = 0) -> np.ndarray:
    """n tokens at positions from start on."""
    return np.array(sample(logits_V.expand(n, -1), [params] * n, [key] * n, list(range(start, start + n))))


def assert_frequencies(counts: np.ndarray, expected: np.ndarray):
    """Chi-squared, by the cube root that makes it normal (Wilson and Hilferty 1931); rare outcomes are one."""
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert counts.sum() == pytest.approx(expected.sum()) and not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    free = len(counts) - 1
    if free:
        chi = ((counts - expected) ** 2 / expected).sum()
        assert ((chi / free) ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free)) < SIGMAS, (counts, expected)


def starts(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint64)


# ---------------------------------------------------------------------------------------------
# The distribution

@pytest.mark.parametrize("V, scale, options", [
    (2, 1, dict(temperature=1.0)), (7, 2, dict(temperature=0.7)), (256, 1, dict(temperature=1.0)),
    (257, 1, dict(temperature=1.5)), (700, 0.55, dict(temperature=0.8)), (700, 4, dict(temperature=0.8)),
    (300, 2, dict(temperature=1.0, top_k=3)), (300, 0.5, dict(temperature=0.8, top_k=40)),
    (700, 1, dict(temperature=1.0, top_k=600)), (300, 1, dict(temperature=1.0, top_p=0.9)),
    (300, 1, dict(temperature=2.0, top_p=0.3)), (300, 0.5, dict(temperature=1.0, top_p=0.999)),
    (300, 0.5, dict(temperature=1.0, top_k=50, top_p=0.8)), (700, 1, dict(temperature=1.3, top_k=600, top_p=0.9)),
    (300, 1, dict(temperature=1e6)), (300, 1, dict(temperature=1e6, top_k=9, top_p=0.5))])
def test_frequencies_are_those_of_the_definition(V, scale, options):
    n, logits, params = 10_000, random_logits(V, seed=V, scale=scale), SamplingParams(**options)
    expected, tokens = probabilities(logits, params), draws(logits, params, n)
    assert_frequencies(np.bincount(tokens, minlength=V), n * expected)
    # Positions in the first column of a row, keys in the second: each alone makes the same frequencies.
    keys = sample(logits.expand(n, -1), [params] * n, [noise_key(seed) for seed in range(n)], [3] * n)
    assert_frequencies(np.bincount(keys, minlength=V), n * expected)


@pytest.mark.parametrize("k, p", [(20, 1.0), (20, 0.5), (600, 1.0), (600, 0.7), (4000, 0.9), (0, 0.5)])
def test_frequencies_in_a_vocabulary_of_many_blocks(k, p):
    V, n, params = 5000, 3000, SamplingParams(temperature=0.8, top_k=k, top_p=p)
    logits = random_logits(V, scale=0.55)
    expected = probabilities(logits, params)
    tokens = np.concatenate([draws(logits, params, 500, start=start) for start in range(0, n, 500)])
    assert expected[tokens].all()
    order = np.argsort(-expected, kind="stable")   # 20 classes of equal probability, and so of rank
    classes = np.empty(V, dtype=int)
    classes[order] = np.minimum(np.cumsum(expected[order]) * 20, 19).astype(int)
    assert_frequencies(np.bincount(classes[tokens], minlength=20), n * np.bincount(classes, expected, minlength=20))


def test_unlikely_tokens_are_as_frequent_as_they_should_be():
    """255 tokens of probability 6e-6 each, in 100,000 draws: one of them 153 times, give or take 12."""
    logits = torch.full([256], math.log(6e-6))
    logits[77] = 0.0
    n, params = 100_000, SamplingParams(temperature=1.0)
    tokens = np.concatenate([draws(logits, params, 20_000, start=start) for start in range(0, n, 20_000)])
    expected = n * 255 * 6e-6 / (1 + 255 * 6e-6)
    assert abs((tokens != 77).sum() - expected) < SIGMAS * math.sqrt(expected)
    assert len(set(tokens)) > 100   # and not always the same ones


@pytest.mark.parametrize("V, rare", [(128, 9), (600, 0), (600, 599)])
def test_a_token_wins_exactly_when_its_time_is_the_shortest(V, rare):
    """Down to probabilities of 1e-9: the weight that a token needs to win is known to 5 digits."""
    params, common = SamplingParams(temperature=1.0), 5 if rare // BLOCK else V - 1
    for position in range(40):
        times = exponentials(starts(noise_start(1, position)), 0, BLOCK + 5)[0].tolist()
        # Two tokens, in two blocks or in one. What is rarer than this pair of numbers is made rarer by the other block.
        a, b = ((BLOCK + rare // BLOCK, BLOCK + common // BLOCK) if V > BLOCK else (rare, common))
        needed = times[a] / times[b]
        for factor, winner in ((1 + 1e-5, rare), (1 - 1e-5, common)):
            logits = torch.full([1, V], -torch.inf)
            logits[0, rare], logits[0, common] = math.log(needed * factor), 0.0
            logits = logits if needed < 1 else logits - logits.max()
            assert abs(logits[0].exp().sum()) and sample(logits, [params], [1], [position]) == [winner]


def test_exponential_numbers_have_52_random_bits():
    """All of them, or tokens of probability 1e-9 would be too frequent or never come."""
    start = starts(*(noise_start(1, position) for position in range(2000)))
    uniform = -np.expm1(-exponentials(start, 0, 100)).flatten()
    assert 0 < uniform.min() and uniform.max() < 1 and exponentials(start, 0, 100).max() < 40
    for bits in (0, 8, 16, 24, 32, 40):   # the digits of the number behind these bits
        digits = (uniform * 2.0 ** bits % 1 * 16).astype(int)
        assert_frequencies(np.bincount(digits, minlength=16), np.full(16, len(uniform) / 16))


def test_the_smallest_random_number_is_above_0_and_the_largest_is_finite():
    """A uniform number that rounds to 0 or 1 would choose a token of no weight, or none."""
    for bits in (0, 2 ** 64 - 1):
        z = bits   # what is mixed into them: each step of splitmix64 undone, the last first
        z ^= z >> 31 ^ z >> 62
        z = z * pow(sampling.MIX_2, -1, 2 ** 64) % 2 ** 64
        z ^= z >> 27 ^ z >> 54
        z = z * pow(sampling.MIX_1, -1, 2 ** 64) % 2 ** 64
        z ^= z >> 30 ^ z >> 60
        assert sampling.mix(z) == bits
        (number,) = exponentials(starts(z), 0, 1)[0].tolist()
        assert number == pytest.approx(2 ** -53 if bits == 0 else 53 * math.log(2))


# ---------------------------------------------------------------------------------------------
# The noise

def test_numbers_are_independent_along_every_input():
    """Consecutive keys, positions, draws and token ids. 131,072 numbers: a correlation of 0.014 would be seen."""
    start = starts(*(noise_start(key, position) for key in range(16) for position in range(16)))
    numbers = torch.tensor(np.stack([exponentials(start, draw, 64) for draw in range(8)])).view(8, 16, 16, 64)
    assert len(numbers.unique()) == numbers.numel()
    for axis in range(4):   # draws, keys, positions, token ids
        # No value of an input has numbers of its own: each slice has the mean 1 and the variance 1 (of which the
        # standard deviation is the square root of 8 / n).
        slices = numbers.transpose(0, axis).flatten(1)
        n = slices.shape[1]
        assert ((slices.mean(1) - 1).abs() < SIGMAS / math.sqrt(n)).all()
        assert ((slices.var(1) - 1).abs() < SIGMAS * math.sqrt(8 / n)).all()
        for lag in (1, 2, 3):
            pairs = (slices[lag:] - 1) * (slices[:-lag] - 1)
            assert abs(pairs.mean()) < SIGMAS / math.sqrt(pairs.numel()), (axis, lag)
            high = (slices[lag:] < 0.01) & (slices[:-lag] < 0.01)   # and so are those that win
            share = -math.expm1(-0.01)
            assert abs(high.double().mean() - share ** 2) < SIGMAS * share / math.sqrt(high.numel()), (axis, lag)


def test_tokens_at_consecutive_positions_and_of_consecutive_seeds_are_independent():
    n, params = 16_384, SamplingParams(temperature=1.0)
    logits = torch.zeros(n, 4)
    by_position = np.array(sample(logits, [params] * n, [noise_key(1)] * n, list(range(n))))
    by_seed = np.array(sample(logits, [params] * n, [noise_key(1, i) for i in range(n)], [7] * n))
    crosswise = np.array(sample(logits, [params] * n, [noise_key(i) for i in range(n)], list(range(n, 0, -1))))
    for tokens in (by_position, by_seed, crosswise):
        pairs = np.bincount(4 * tokens[1:] + tokens[:-1], minlength=16)
        assert_frequencies(pairs[:15], np.full(16, (n - 1) / 16)[:15] * pairs[:15].sum() * 16 / 15 / (n - 1))


def test_a_second_draw_has_new_noise():
    """top_p rejects the last of three equal tokens; the two others then have half each."""
    n, params = 20_000, SamplingParams(temperature=1.0, top_p=0.5)
    assert_frequencies(np.bincount(draws(torch.zeros(3), params, n), minlength=3), np.array([n / 2, n / 2, 0]))


def test_sample_i_of_a_seed_has_the_noise_of_seed_plus_i():
    seeds = [0, 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1, 2 ** 64, 2 ** 64 + 1, 2 ** 65, 2 ** 128, 10 ** 60]
    assert all(noise_key(seed, i) == noise_key(seed + i) for seed in seeds for i in range(5))
    keys = {noise_key(seed) for seed in {seed + i for seed in seeds for i in range(5)}}
    assert len(keys) == len({seed + i for seed in seeds for i in range(5)})
    assert all(0 <= key < 2 ** 64 for key in keys)
    assert noise_key(np.int64(5), 2) == noise_key(7)
    assert len({noise_key(None, i) for i in range(100)}) == 100


def test_the_noise_is_splitmix64():
    """Its first numbers from the state 1234567: a seed must mean the same in the next release."""
    states = [(1234567 + (i + 1) * sampling.GOLDEN) % 2 ** 64 for i in range(3)]
    assert [sampling.mix(z) for z in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    numbers = exponentials(starts(1234567), 0, 4)[0, 1:]
    uniform = [((sampling.mix(z) >> 12) + 0.5) / 2 ** 52 for z in states]
    assert numbers.tolist() == pytest.approx([-math.log1p(-u) for u in uniform], rel=1e-12)


# ---------------------------------------------------------------------------------------------
# What is kept

@settings(max_examples=150)
@given(data=st.data(), V=st.one_of(st.integers(1, 12), st.integers(250, 600)),
       temperature=st.sampled_from([0.5, 1.0, 3.0, 1e6]))
def test_exactly_the_kept_tokens_are_drawn(data, V, temperature):
    """Few logits, so many ties, in blocks far apart; p between the sums that decide."""
    few = data.draw(st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 1e-7, 0.5]), min_size=V, max_size=V)
                    if V < 20 else st.just([-torch.inf] * V))
    logits = torch.tensor(few)
    for token in data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=8, unique=True)):
        logits[token] = data.draw(st.sampled_from([-0.0, 0.0, 0.5]))
    k, p = data.draw(st.integers(0, 10)), data.draw(st.sampled_from([1.0, 0.1234, 0.4321, 0.71, 0.9876]))
    params = SamplingParams(temperature=temperature, top_k=k, top_p=p)
    expected = probabilities(logits, params)
    tokens = draws(logits, params, 300)
    assert expected[tokens].all()
    assert set(np.flatnonzero(expected > 0.05)) <= set(tokens)


@pytest.mark.parametrize("V, stride", [(8, 1), (2000, 250), (256, 30), (300, 40)])
def test_ties_go_to_the_lower_id(V, stride):
    """8 equal logits: the first k of them are kept, and the first 8 p: a token before which there is p is not."""
    ids = np.arange(8) * stride
    logits = torch.full([V], -9.0)
    logits[ids] = 3.0
    for k in range(1, 9):
        assert set(draws(logits, SamplingParams(temperature=0.01, top_k=k), 200)) == set(ids[:k])
        assert set(draws(logits, SamplingParams(temperature=0.01, top_p=k / 8), 200)) == set(ids[:k])
        both = SamplingParams(temperature=0.01, top_k=k, top_p=0.5)
        assert set(draws(logits, both, 200)) == set(ids[:math.ceil(k / 2)])
    assert set(draws(logits, SamplingParams(temperature=0.01, top_p=1e-9), 50)) == {0}


def test_logits_that_differ_in_their_last_bit_are_in_order():
    """Even at a temperature at which their weights are the same, and beside a logit that swallows the difference."""
    logits = torch.tensor([1.0, 1.0, 1.0, 1.0, 50.0])
    logits[2] = torch.nextafter(logits[2], torch.tensor(2.0))
    for k, kept in ((1, {4}), (2, {4, 2}), (3, {4, 2, 0}), (4, {4, 2, 0, 1})):
        assert set(draws(logits, SamplingParams(temperature=1e6, top_k=k), 200)) == kept


@pytest.mark.parametrize("p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("k", [2, 60, 100, 600, 2000, 4000])
def test_what_top_p_is_a_part_of_is_the_weight_of_the_first_k(k, p):
    """The last token that is kept, and the first that is not, are found in the supersets that a guess leaves."""
    V, params = 4096, SamplingParams(temperature=1.0, top_k=k, top_p=p)
    logits = random_logits(V, seed=k, scale=0.55)
    kept = probabilities(logits, params) > 0
    order = np.lexsort((np.arange(V), -logits.numpy()))
    n = int(kept.sum())
    assert set(np.flatnonzero(kept)) == set(order[:n])
    batch = torch.stack([torch.zeros(V), logits])   # the row that is meant is not the first
    row, weights = rows_of(batch, [params] * 2)[1], np.exp(logits.double().numpy() - logits.max().item())[order]
    for count in {max(n - 2, 0), n - 1, n, n + 1, k // 2, k - 1, k, k + 3}:
        assert row.keeps(weights[:count].sum(), count) == (count < n), (count, n)


def rows_of(logits_BV: torch.Tensor, params: list[SamplingParams]) -> list[sampling.Row]:
    """The rows as `sample_torch` knows them when it begins to draw."""
    seen, make, drawing = [], sampling.Row.__init__, RuntimeError("it begins to draw")

    def remember(row, *arguments):
        make(row, *arguments)
        seen.append(row)

    def stop(*arguments):
        raise drawing

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=str(drawing)):
        patch.setattr(sampling.Row, "__init__", remember)
        patch.setattr(sampling, "race", stop)
        sampling.sample_torch(logits_BV, params, [1] * len(params), [1] * len(params))
    return seen


@pytest.mark.parametrize("scale", [0.55, 4.0])
def test_the_guess_leaves_little_more_than_the_first_k(scale):
    """Else a draw is rejected again and again, which takes time."""
    ks = [1, 20, 50, 256, 257, 1000, 5000, 12_000]
    logits = random_logits(len(ks), 16_384, scale=scale)
    floors = guess_floors(logits, ks)
    sizes = (logits >= floors[:, None]).sum(1).tolist()
    for k, size in zip(ks, sizes):   # by groups; then two standard deviations and two ranks too many, and three by chance
        assert k <= size <= (1.3 * k + 2 if k <= 256 else k + 5 * 4 * math.sqrt(k) + 2 * 16), sizes
    assert guess_floors(logits[:2], [0, 5])[0] == -torch.inf
    assert find_candidates(logits, np.array(ks))[0].tolist() == sizes
    rows = rows_of(logits, [SamplingParams(temperature=1.0, top_k=k, top_p=0.9) for k in ks])
    for row, k in zip(rows, ks):   # and with it, the weight of the first k
        assert row.total == pytest.approx((logits[row.b].topk(k).values.double() - row.best).exp().sum().item(), rel=1e-5)


@pytest.mark.parametrize("V", [5000, 20_000])
def test_candidates_are_the_first_k_and_what_is_as_likely_as_some_that_follow(V):
    """Whole rows of equal logits, too: k of them are not enough to say which."""
    logits = torch.stack([random_logits(V), random_logits(V).round(), torch.zeros(V), random_logits(V, scale=0.1)])
    ks = np.array([3, 70, 40, 2000])
    sizes, ids, found = find_candidates(logits, ks)
    ends = np.cumsum(sizes)
    for row, k, begin, end in zip(logits.numpy(), ks, ends - sizes, ends):
        assert (np.diff(ids[begin:end]) > 0).all() and (found[begin:end] == row[ids[begin:end]]).all()
        assert set(np.flatnonzero(row >= found[begin:end].min())) == set(ids[begin:end])
        assert set(np.lexsort((np.arange(V), -row))[:k]) <= set(ids[begin:end])


@pytest.mark.parametrize("k", [10, 1000])
def test_a_guess_that_is_wrong_leaves_the_row_whole(k):
    """For k = 1000 it looks at 64 logits of each 1,024. These are large, or small, and say nothing of the rest."""
    V, params = 16_384, SamplingParams(temperature=1.0, top_k=k)
    looked_at, few = (torch.arange(V) % 1024 < 64).float(), random_logits(V, scale=0.1)
    too_high = 20 * looked_at * (torch.arange(V) < 2000) + few   # the guess is among 128 logits, as if there were 2,000
    for logits, whole in ((too_high, k == 1000), (-3 * looked_at + few, False), (3 * looked_at.flip(0) + few, False)):
        assert (find_candidates(logits[None], np.array([k]))[0] == V) == whole
        kept = np.lexsort((np.arange(V), -logits.numpy()))[:k]
        tokens = draws(logits, params, 300)
        assert set(tokens) <= set(kept)
        likely = probabilities(logits, params)
        half = kept[np.cumsum(likely[kept]) <= 0.5]
        share = likely[half].sum()
        assert abs(np.isin(tokens, half).mean() - share) <= SIGMAS * math.sqrt(share * (1 - share) / 300) + 1e-9


# ---------------------------------------------------------------------------------------------
# Purity

params_strategy = st.builds(
    SamplingParams, temperature=st.sampled_from([0.0, 1e-300, 1e-6, 0.3, 0.8, 1.0, 2.0, 1e6]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 50, 300, 520, 10 ** 9]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.3, 0.9, 0.999]))
batches = st.lists(st.tuples(params_strategy, st.integers(0, 2 ** 70), st.integers(0, 5000)), min_size=1, max_size=9)


def mixed_logits(B: int, V: int, seed: int) -> torch.Tensor:
    """Rows as a model or a logits_processor may give them: flat, peaked, equal, masked, and not finite."""
    logits = random_logits(B, V, seed=seed, scale=1.0)
    for b in range(B):
        match (b + seed) % 8:
            case 0: logits[b] *= 8
            case 1: logits[b] = 1.5
            case 2: logits[b, 1 + seed % 3:] = -torch.inf
            case 3: logits[b] = logits[b].round()
            case 4: logits[b, (b * 7 + seed) % V] = (torch.nan, torch.inf, 1e30)[seed % 3]
            case 5 if seed % 5 == 0: logits[b] = -torch.inf
    return logits


@settings(max_examples=120)
@given(rows=batches, V=st.sampled_from([1, 2, 255, 256, 257, 1024, 1500]), seed=st.integers(0, 99), data=st.data())
def test_a_row_has_the_same_token_alone_and_in_any_company(rows, V, seed, data):
    params, seeds, positions = map(list, zip(*rows))
    keys, logits = [noise_key(s) for s in seeds], mixed_logits(len(rows), V, seed)
    together = sample(logits, params, keys, positions)
    alone = [sample(logits[b:b + 1], [params[b]], [keys[b]], [positions[b]])[0] for b in range(len(rows))]
    assert together == alone
    order = data.draw(st.permutations(range(len(rows))))
    assert [together[b] for b in order] == sample(
        logits[order], *([values[b] for b in order] for values in (params, keys, positions)))
    for b, token in enumerate(together):
        if not logits[b].max().isfinite():
            assert token == -1
        elif params[b].temperature == 0 or params[b].top_k == 1 or params[b].top_p == 1e-9:
            assert token == int(np.argmax(logits[b].numpy()))
        else:
            assert 0 <= token < V and logits[b, token] > -torch.inf


@given(V=st.sampled_from([3, 200, 256, 300]), more=st.integers(1, 600), p=st.sampled_from([1.0, 0.8]),
       key=st.integers(0, 99))
def test_a_vocabulary_that_is_padded_has_the_same_noise(V, more, p, key):
    logits, params = random_logits(20, V, seed=key), [SamplingParams(temperature=1.0, top_p=p)] * 20
    padded = torch.nn.functional.pad(logits, (0, more), value=-torch.inf)
    assert (sample(logits, params, [key] * 20, list(range(20)))
            == sample(padded, params, [key] * 20, list(range(20))))


def test_neither_threads_nor_strides_nor_generators_matter():
    logits, keys, positions = random_logits(16, 20_000, scale=0.55), list(range(16)), [5] * 16
    assert logits.numel() > sampling.SINGLE_THREAD
    params = [SamplingParams(temperature=0.8, top_k=k, top_p=p) for k in (0, 50, 600, 3000) for p in (1, 0.9, 0.5, 0.1)]
    tokens, threads = sample(logits, params, keys, positions), torch.get_num_threads()
    before = logits.clone()
    torch.manual_seed(5)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert sample(logits, params, keys, positions) == tokens
    finally:
        torch.set_num_threads(threads)
    assert sample(logits.T.contiguous().T, params, keys, positions) == tokens
    assert torch.equal(logits, before)


def test_every_input_of_the_noise_counts():
    n, params = 200, [SamplingParams(temperature=1.0)] * 200
    logits = torch.zeros(n, 5000)
    assert len(set(sample(logits, params, [1] * n, list(range(n))))) > 150
    assert len(set(sample(logits, params, [noise_key(i) for i in range(n)], [9] * n))) > 150
    assert len(set(sample(logits, params, [1] * n, [9] * n))) == 1


@pytest.mark.parametrize("choose_tokens", [sampling.sample_torch] + [sampling.sample_triton] * HAS_TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_largest(choose_tokens, dtype):
    logits = torch.zeros(4, 5000, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    logits[0, [3, 255, 2051, 4099]], logits[1, 4999], logits[2, [600, 256, 4696]] = 2.0, 2.0, 2.0
    assert choose_tokens(logits, [SamplingParams()] * 4, [1] * 4, [1] * 4) == [3, 4999, 256, 0]
    cold = [SamplingParams(temperature=1e-300)] * 12   # equal ones are drawn from, however cold it is
    assert set(choose_tokens(logits[[2] * 12], cold, [1] * 12, list(range(12)))) == {600, 256, 4696}


@pytest.mark.parametrize("choose_tokens", [sampling.sample_torch] + [sampling.sample_triton] * HAS_TRITON)
def test_of_a_top_p_that_rounds_to_nothing_the_best_token_is_left(choose_tokens):
    """A part so small of a sum below 1 is 0 in floating point, and no mass is below it."""
    logits = random_logits(6, 300).to("cuda" if torch.cuda.is_available() else "cpu")
    params = [SamplingParams(temperature=t, top_k=k, top_p=5e-324) for t in (0.5, 1e3) for k in (0, 5, 299)]
    assert choose_tokens(logits, params, [1] * 6, [1] * 6) == logits.argmax(-1).tolist()


def test_a_low_temperature_tells_logits_apart_that_are_close():
    """0.0001 at a temperature of 0.000001 is a hundred times more than the exponent that matters."""
    logits = torch.tensor([0.9999, 1.0, 0.0])
    assert set(draws(logits, SamplingParams(temperature=1e-6), 100)) == {1}
    assert set(draws(logits, SamplingParams(temperature=1e-3), 100)) == {0, 1}


# ---------------------------------------------------------------------------------------------
# Two models

@pytest.mark.parametrize("V", [30, 700, 5000])
@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_models_that_share_noise_agree_often(V, noise):
    """At least as often as the bound of Daliri, Musco and Suresh: (1 - TV) / (1 + TV), TV their total variation."""
    n, params = 4000 if V < 5000 else 1000, SamplingParams(temperature=0.8)
    first = random_logits(n, V, seed=1)
    second = first + random_logits(n, V, seed=2, scale=noise)
    distance = 0.5 * ((first / 0.8).softmax(-1) - (second / 0.8).softmax(-1)).abs().sum(-1)
    a, b = (np.array(sample(logits, [params] * n, [3] * n, list(range(n)))) for logits in (first, second))
    bound = ((1 - distance) / (1 + distance)).mean().item()
    assert (a == b).mean() > bound - 3 * math.sqrt(bound * (1 - bound) / n)


# ---------------------------------------------------------------------------------------------
# The kernel

@pytest.mark.skipif(not HAS_TRITON, reason="no Triton for this platform")
@settings(max_examples=15)
@given(rows=batches, V=st.sampled_from([1, 255, 257, 1024, 2100]), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.float16]))
def test_the_kernel_draws_the_same_tokens(rows, V, seed, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params, seeds, positions = map(list, zip(*rows))
    keys, logits = [noise_key(s) for s in seeds], mixed_logits(len(rows), V, seed).to(device, dtype)
    assert (sampling.sample_triton(logits, params, keys, positions)
            == sampling.sample_torch(logits, params, keys, positions))


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton for this platform")
@pytest.mark.parametrize("options", [
    dict(top_k=700, top_p=0.9), dict(top_k=40), dict(top_p=0.2), dict(top_k=40, top_p=0.7)])
def test_the_kernel_rejects_and_draws_again_as_often(options):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = random_logits(8, 1100, scale=0.55).to(device)
    rows = [SamplingParams(temperature=0.8, **options)] * 8, list(range(8)), [2 ** 40] * 8
    assert sampling.sample_triton(logits, *rows) == sampling.sample_torch(logits, *rows)


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton for this platform")
@pytest.mark.parametrize("options", [dict(top_k=40, top_p=0.7), dict(top_k=1000), dict(top_k=5000, top_p=0.9)])
def test_the_kernel_draws_from_the_same_candidates_of_a_large_vocabulary(options):
    """Where the first k are guessed at, and one guess is too high."""
    V, device = 16_384, "cuda" if torch.cuda.is_available() else "cpu"
    logits = random_logits(4, V, scale=0.55)
    logits[2] += 20 * (torch.arange(V) % 1024 < 64) * (torch.arange(V) < 2000)
    rows = [SamplingParams(temperature=0.8, **options)] * 4, list(range(4)), [2 ** 40] * 4
    assert sampling.sample_triton(logits.to(device), *rows) == sampling.sample_torch(logits, *rows)


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton for this platform")
def test_the_kernel_keeps_the_same_of_equal_logits():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.full([48, 300], -torch.inf, device=device)
    logits[:, 8::37] = 3.0   # 8 of them, in two blocks
    logits[24:, 100] = 50.0
    params = [SamplingParams(temperature=10.0 if b < 24 else 1e6, top_k=(b % 6 < 4) * (b % 8 + 1),
                             top_p=(1.0, b % 8 / 8 + 0.125, 0.5)[b % 3]) for b in range(48)]
    rows = params, [7] * 48, list(range(48))
    assert sampling.sample_triton(logits, *rows) == sampling.sample_torch(logits, *rows)


@pytest.mark.parametrize("choose_tokens", [sampling.sample_torch] + [sampling.sample_triton] * HAS_TRITON)
def test_a_row_whose_largest_logit_is_not_finite_has_no_token(choose_tokens):
    logits = random_logits(8, 300).to("cuda" if torch.cuda.is_available() else "cpu")
    logits[0, 299], logits[1, 0], logits[2], logits[3, 7] = torch.nan, torch.inf, -torch.inf, torch.nan
    logits[5, 1:], logits[6, :299] = -torch.inf, -torch.inf
    params = [SamplingParams(temperature=b % 2, top_k=b % 4) for b in range(8)]
    tokens = choose_tokens(logits, params, [1] * 8, [1] * 8)
    assert tokens[:4] == [-1] * 4 and tokens[5:7] == [0, 299] and min(tokens[4], tokens[7]) >= 0


@pytest.mark.skipif(not HAS_TRITON or sys.platform != "linux", reason="compiles for NVIDIA's GPUs")
@pytest.mark.compiles("""
import bench, kernels, sampling, torch
kernels.load_triton()
params = [sampling.SamplingParams(temperature=0.8, top_k=50, top_p=0.9)] * 2
for sm in (80, 90, 100):
    logits = torch.zeros(2, 50_257, dtype=torch.bfloat16)
    (c,) = bench.compile_launches(lambda: sampling.sample_triton(logits, params, [1, 2], [3, 4]), sm)
    assert c["spills"] == 0, c""")
def test_the_kernel_compiles_without_spills(compiled):
    """The program checks it."""


# ---------------------------------------------------------------------------------------------
# Around it

@pytest.mark.parametrize("name, value, must", [
    ("max_tokens", 0, "a whole number, 1 or more"), ("max_tokens", True, "a whole number, 1 or more"),
    ("temperature", -0.1, "a number from 0 (greedy) to a million"),
    ("temperature", math.nan, "a number from 0 (greedy) to a million"),
    ("temperature", 1e7, "a number from 0 (greedy) to a million"),
    ("temperature", "1", "a number from 0 (greedy) to a million"),
    ("top_k", -1, "a whole number, 0 (off) to 2147483647"), ("top_k", 2 ** 31, "a whole number, 0 (off) to 2147483647"),
    ("top_p", 0, "a number above 0 and at most 1"), ("top_p", 1.01, "a number above 0 and at most 1"),
    ("seed", -1, "None or a whole number from 0 on"), ("seed", 0.5, "None or a whole number from 0 on"),
    ("n", 0, "a whole number, 1 or more"), ("logprobs", -1, "None, 0 or more"), ("logits_processor", 3, "a function")])
def test_params_that_make_no_sense_are_refused(name, value, must):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    assert str(error.value) == f"{name} is {value!r}: it must be {must}"


@pytest.mark.parametrize("stop", [[""], ("a", ""), 3, [3]])
def test_stops_that_make_no_sense_are_refused(stop):
    with pytest.raises(ValueError, match="it must be a string or several, none of them empty"):
        SamplingParams(stop=stop)


def test_params_take_what_numpy_counts_with():
    params = SamplingParams(max_tokens=np.int64(3), seed=np.int64(1), top_p=np.float32(0.5), n=np.int32(2), stop="ab")
    assert params.stop == ("ab",) and SamplingParams(stop=None).stop == ()
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    logits = random_logits(2, 20_000)
    for k, others in ((50, (np.uint8(50), np.uint64(50), np.int16(50))), (200, (np.uint8(200),))):
        plain, *strange = (SamplingParams(temperature=2, top_k=number, top_p=0.9) for number in (k, *others))
        strange += [SamplingParams(temperature=Fraction(2), top_k=k, top_p=Fraction(9, 10))]
        expected = sample(logits, [plain] * 2, [1, 2], [3, 4])
        assert all(sample(logits, [params] * 2, [1, 2], [3, 4]) == expected for params in strange)


def request(tokens: list[int], new: int = 1, key: int = 1, **options) -> SimpleNamespace:
    class Request(SimpleNamespace):
        __hash__ = object.__hash__
    output = SimpleNamespace(token_ids=tokens[-new:])
    return Request(params=SamplingParams(**options), tokens=tokens, key=key, output=output)


def test_choose_takes_the_noise_of_the_position_to_come():
    logits, options = random_logits(3, 400), dict(temperature=1.0)
    requests = [request([1] * 5, key=7, **options), request([1] * 9, key=8), request([1] * 900, key=9, **options)]
    tokens, errors = choose(logits, [(r, ahead) for r, ahead in zip(requests, (0, 2, 1))])
    assert tokens == sample(logits, [r.params for r in requests], [7, 8, 9], [5, 11, 901]) and not errors
    assert choose(logits[:0], []) == ([], {})


def test_a_logits_processor_sees_its_own_copy_and_harms_nobody_else():
    seen = []

    def ban(token_ids, logits):
        seen.append(token_ids)
        token_ids.append(0)
        logits[2] = -torch.inf
        return logits

    def fail(token_ids, logits):
        raise KeyError("mine")

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def mute(token_ids, logits):
        raise Mute

    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]] * 7)
    logits[6] = torch.nan
    before = logits.clone()
    requests = [request([5, 6, 7], new=2, logits_processor=ban), request([5]), request([5], logits_processor=fail),
                request([5], logits_processor=lambda t, x: x[:2]), request([5], logits_processor=mute),
                request([5], logits_processor=lambda t, x: x * torch.nan), request([5])]
    tokens, errors = choose(logits, [(r, 0) for r in requests])
    assert tokens[:2] == [3, 2] and seen == [[6, 7, 0]] and requests[0].output.token_ids == [6, 7]
    assert torch.equal(logits[:6], before[:6])
    assert [errors.get(b) for b in range(7)] == [
        None, None, "logits_processor: KeyError: 'mine'",
        "logits_processor: ValueError: it gave tensor([0., 1.]) and not logits of shape [4]", "logits_processor: Mute",
        "logits_processor: ValueError: it left no token to choose: the largest logit must be a finite number",
        "the model's logits are not finite: its weights are damaged, "
        "or its dtype is too small, so try float32 or bfloat16"]
    assert describe(Mute()) == "Mute"

    trained = torch.zeros(4, requires_grad=True)   # logits with a history are numbers like others
    hot = [request([5], temperature=1.0, logits_processor=lambda t, x: x + trained), request([5], temperature=1.0)]
    plain = [request([5], temperature=1.0)] * 2
    assert choose(before[:2], [(r, 0) for r in hot]) == choose(before[:2], [(r, 0) for r in plain])


def test_log_probabilities_are_of_the_token_and_then_of_the_best():
    logits = torch.tensor([0.5, 3.0, 1.0, 2.0])
    expected = logits.log_softmax(-1).tolist()
    found = log_probabilities(logits, 0, 2)
    assert list(found) == [0, 1, 3] and all(found[t] == pytest.approx(expected[t]) for t in found)
    assert list(log_probabilities(logits, 1, 0)) == [1] and list(log_probabilities(logits, 1, 9)) == [1, 3, 2, 0]
