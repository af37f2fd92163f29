"""Which token: a pure function of logits, key and position. (A first reading may skip this file.)

The exponential race. Give token i the waiting time E_i / w_i, where w_i = exp(logit_i / temperature) and the E_i are
independent exponential numbers. The shortest time is that of token i with probability w_i / (w_1 + ... + w_V), so the
winner of the race is a sample. (In logarithms this is the Gumbel-max trick: the largest logit_i / temperature + G_i;
Gumbel 1954; Maddison, Tarlow and Minka 2014.)

Why a hash and not a generator. A generator has a state, which must follow a request through preemption, other
processes and rejected drafts. Here number i of a token is splitmix64 (Steele, Lea and Flood 2014) of the request's
key, the token's position and i: whoever needs it computes it, in any order, on any device.

Why drafts agree. Two models that look at the same (key, position) hold the same race: what is likely for both mostly
wins both times (Daliri, Musco and Suresh 2025).

Why it costs little. The race has two levels: blocks of BLOCK tokens race with the sums of their weights, then the
tokens of the block that won. P(block) P(token | block) = P(token), with V / BLOCK + BLOCK random numbers, not V.

Top-k and top-p without a sort (rejection sampling, after FlashInfer, Ye et al. 2025). Order tokens by logit, ties by
id. Top-k keeps the first k; top-p keeps of these, renormalised, each token whose predecessors add up to less than p
(Holtzman et al. 2019). Both keep a beginning of the order. So draw from all tokens and look at what comes before the
token that was drawn: how many tokens, how much weight. Is it kept? Then it is a sample. Is it not? Then neither is
anything behind it: draw again, with new noise, among its predecessors. Each draw is from a superset of what is kept,
so what is accepted at last has the right distribution. Among equal logits that takes 1 + ln(1 / p) draws on average:

    logits   2.0  1.0  0.5  0.1  ...   top_p = 0.7: keeps 2.0 and 1.0
    draw 0             0.5             its predecessors have 0.75 of the weight: not kept
    draw 1   among 2.0 and 1.0

A top-k leaves few tokens, so there draws need not be from all: a guess at the k-th largest logit finds candidates.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from device import jit, load_triton, single_thread

BLOCK = 128           # tokens in a block, whatever V is: models whose vocabularies are padded differently hold one race
SINGLE_THREAD = 1 << 17   # logits: with fewer, a second thread mostly waits
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB   # the constants of splitmix64
COLDEST = 1e-30       # lower temperatures are this one: float32 holds it, and all but the best logits have weight 0
triton = tl = None    # until `load_triton`


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises ValueError for values that make no sense."""
    max_tokens: int = 32           # at most so many new tokens
    temperature: float = 0.0       # logits are divided by it; 0 takes the most likely token
    top_k: int = 0                 # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0             # sample from the fewest most likely tokens that add up to p (Holtzman et al. 2019)
    seed: int | None = None        # the same seed gives the same text, whatever else runs (in float32, up to ties that
                                   # rounding decides); None: by chance
    stop: str | tuple[str, ...] = ()   # end the text before any of these strings
    ignore_eos: bool = False       # go on to max_tokens
    n: int = 1                     # so many continuations of the prompt; with a seed, each has the next one
    logprobs: int | None = None    # log-probabilities, by the model alone, of each token and of the k most likely ones
    logits_processor: Callable[[list[int], Tensor], Tensor] | None = None   # (new tokens so far, logits_V) -> logits_V

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {self.stop!r}: it must be a string or several, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))
        temperature, top_p = (x if isinstance(x, Real) and not isinstance(x, bool) else math.nan
                              for x in (self.temperature, self.top_p))
        for name, fits, kind in (
                ("max_tokens", is_int(self.max_tokens) and self.max_tokens > 0, "a whole number, 1 or more"),
                ("temperature", 0 <= temperature <= 1e6, "a number from 0 (greedy) to a million"),
                ("top_k", is_int(self.top_k) and 0 <= self.top_k < 2 ** 31, "a whole number, 0 (off) to 2147483647"),
                ("top_p", 0 < top_p <= 1, "a number above 0 and at most 1"),
                ("seed", self.seed is None or is_int(self.seed) and self.seed >= 0, "None or a whole number from 0 on"),
                ("n", is_int(self.n) and self.n > 0, "a whole number, 1 or more"),
                ("logprobs", self.logprobs is None or is_int(self.logprobs) and self.logprobs >= 0, "None, 0 or more"),
                ("logits_processor", self.logits_processor is None or callable(self.logits_processor), "a function")):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {kind}")


def is_int(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------
# Noise

def mix(z: int) -> int:
    """The output function of splitmix64: 64 bits that look random, each hanging on all 64 of z."""
    z = (z ^ z >> 30) * MIX_1 % 2 ** 64
    z = (z ^ z >> 27) * MIX_2 % 2 ** 64
    return z ^ z >> 31


def noise_key(seed: int | None, sample: int = 0) -> int:
    """The 64-bit key of a request's noise. Sample i of a seed has the key of seed + i; without a seed by chance."""
    if seed is None:
        return secrets.randbits(64)
    key, rest = 0, int(seed) + sample
    while True:   # 64 bits at a time
        key, rest = mix((key + GOLDEN + rest) % 2 ** 64), rest >> 64
        if not rest:
            return key


def noise_start(key: int, position: int) -> int:
    """Where the noise of a token begins in the sequence of splitmix64: 64 bits."""
    return mix((mix(key) + position * GOLDEN) % 2 ** 64)


def exponentials(start_R: np.ndarray, draw: int, n: int) -> np.ndarray:
    """n exponential numbers for each row's draw, float64 [R, n]. start_R: uint64, whose sums and products wrap around.

    They have 52 random bits: the less likely a token, the nearer to 0 must be the number with which it wins.
    """
    z = start_R[:, None] + np.arange(draw << 32, (draw << 32) + n, dtype=np.uint64) * GOLDEN
    z ^= z >> 30
    z *= MIX_1
    z ^= z >> 27
    z *= MIX_2
    z ^= z >> 31
    z >>= 12
    return -np.log1p((z + 0.5) * -2.0 ** -52)   # -log(1 - u), 0 < u < 1


# ---------------------------------------------------------------------------------------------
# Choosing a token

def sample(logits_BV: Tensor, params: list[SamplingParams], keys: list[int], positions: list[int]) -> list[int]:
    """One token per row: the most likely at temperature 0, else drawn with the noise of its key and position.
    -1 where the row's largest logit is not finite."""
    if logits_BV.is_cuda and load_triton():
        return sample_triton(logits_BV, params, keys, positions)
    with single_thread(logits_BV.numel() < SINGLE_THREAD):
        return sample_torch(logits_BV, params, keys, positions)


def sample_torch(logits_BV: Tensor, params: list[SamplingParams], keys: list[int], positions: list[int]) -> list[int]:
    """`sample` on a CPU. What has a number for each token of the vocabulary is PyTorch's, but for the search for
    candidates; what has fewer is NumPy's, whose calls cost less."""
    logits_BV, V = logits_BV.cpu().float(), logits_BV.shape[1]
    if all(p.temperature for p in params):
        bests, tokens = logits_BV.amax(-1).tolist(), [-1] * len(params)   # a tenth of the time of max, which says where
    else:
        best_B, likely_B = logits_BV.max(-1)
        bests, tokens = best_B.tolist(), likely_B.tolist()
    tokens = [token if math.isfinite(best) else -1 for token, best in zip(tokens, bests)]
    rows = [Row(b, V, p, keys[b], positions[b], best)
            for b, (p, best) in enumerate(zip(params, bests)) if p.temperature and math.isfinite(best)]
    for choose_tokens, some in ((draw_from_all, [row for row in rows if not row.k]),
                                (draw_from_candidates, [row for row in rows if row.k])):
        if some:
            (logits_RV,) = take([row.b for row in some], logits_BV)
            for row, token in zip(some, choose_tokens(logits_RV, some)):
                tokens[row.b] = token
    return tokens


def draw_from_all(logits_RV: Tensor, rows: list[Row]) -> list[int]:
    """A token for each row without a top_k. N is the blocks of L = BLOCK that the vocabulary fills, W their tokens. Of
    a draw's numbers the first L are for the tokens of the block that wins, whichever it is, the others for the blocks.
    """
    R, V = logits_RV.shape
    start_R, best_R, temperature_R = columns(rows)
    scaled_RW = torch.empty(R, V + -V % BLOCK)
    scaled_RW[:, V:] = -torch.inf
    torch.sub(logits_RV, torch.from_numpy(best_R)[:, None], out=scaled_RW[:, :V])
    weights_RW = scaled_RW.div_(torch.from_numpy(temperature_R)[:, None]).softmax(-1)   # twice as fast as exp
    weights_RNL = weights_RW.view(R, -1, BLOCK)
    sums_RN = weights_RNL.sum(-1)
    for row, total in zip(rows, total_of(sums_RN)):
        row.total = total

    tokens, left, mask_RV = [0] * R, list(range(R)), scaled_RW[:, :V]   # memory that was just used is fast
    for draw in itertools.count():
        times, each_R = exponentials(start_R[left], draw, BLOCK + sums_RN.shape[1]), np.arange(len(left))
        n_R = race(sums_RN.numpy(), times[:, BLOCK:])
        token_R = n_R * BLOCK + race(weights_RNL.numpy()[each_R, n_R], times[:, :BLOCK])
        masses = itertools.repeat(0)
        if any(rows[r].p < 1 for r in left):
            before_RV = predecessors([logits_RV[r] for r in left], token_R.tolist(), out=mask_RV[:len(left)])
            weights_RNL.flatten(1)[:, :V].mul_(before_RV)
            sums_RN = weights_RNL.sum(-1)
            masses = total_of(sums_RN)
        again = []
        for i, (r, token, mass) in enumerate(zip(left, token_R.tolist(), masses)):
            tokens[r] = token
            if not rows[r].keeps(mass):
                again.append(i)
        if not again:
            return tokens
        left = [left[i] for i in again]
        weights_RNL, sums_RN = take(again, weights_RNL, sums_RN)


def draw_from_candidates(logits_RV: Tensor, rows: list[Row]) -> list[int]:
    """A token for each row with a top_k. N is the blocks of the vocabulary, M the candidates of all rows."""
    x_RV, (R, V) = logits_RV.numpy(), logits_RV.shape
    start_R, best_R, temperature_R = columns(rows)
    size_R, id_M, x_M = find_candidates(logits_RV, np.array([row.k for row in rows]))
    row_M = np.repeat(np.arange(R), size_R)
    with np.errstate(over="ignore", under="ignore"):
        weight_M = np.exp((x_M - best_R[row_M]) / temperature_R[row_M]).astype(np.float64)
    for row, weight_C in zip(rows, np.split(weight_M, np.cumsum(size_R)[:-1])):
        if row.p < 1:
            row.total = np.partition(weight_C, -row.k)[-row.k:].sum()

    tokens, left, N = [0] * R, np.arange(R), -(-V // BLOCK)
    for draw in itertools.count():
        times, R, block_M = exponentials(start_R[left], draw, BLOCK + N), len(left), id_M // BLOCK
        n_R = race(np.bincount(row_M * N + block_M, weight_M, R * N).reshape(R, N), times[:, BLOCK:])
        weights_RL, won = np.zeros((R, BLOCK)), np.flatnonzero(block_M == n_R[row_M])
        weights_RL[row_M[won], id_M[won] % BLOCK] = weight_M[won]
        token_R = n_R * BLOCK + race(weights_RL, times[:, :BLOCK])
        pivot_M = x_RV[left, token_R][row_M]
        before_M = (x_M > pivot_M) | (x_M == pivot_M) & (id_M < token_R[row_M])
        counts, masses = sum_rows(before_M, size_R, int), sum_rows(weight_M * before_M, size_R)
        again_R = np.zeros(R, dtype=bool)
        for i, (r, token, count, mass) in enumerate(zip(left.tolist(), token_R.tolist(), counts, masses)):
            tokens[r], again_R[i] = token, not rows[r].keeps(mass, count)
        if not again_R.any():
            return tokens
        stay = np.flatnonzero(before_M & again_R[row_M])
        left, size_R = left[again_R], np.array(counts)[again_R]
        id_M, x_M, weight_M = id_M[stay], x_M[stay], weight_M[stay]
        row_M = np.repeat(np.arange(len(left)), size_R)


def find_candidates(logits_RV: Tensor, k_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's first k tokens, and some more: how many they are, and their ids and logits. These stand in one line,
    those of the first row, then those of the second, and so on."""
    x_RV, (R, V) = logits_RV.numpy(), logits_RV.shape
    floor_R, size_R = guess_floors(logits_RV, k_R.tolist()).numpy(), 0 * k_R
    while (size_R < k_R).any():
        at_M = np.flatnonzero(x_RV >= floor_R[:, None])
        size_R = np.diff(np.searchsorted(at_M, np.arange(R + 1) * V))
        floor_R[size_R < k_R] = -np.inf   # that guess was too high
    return size_R, at_M - np.repeat(np.arange(R) * V, size_R), x_RV.ravel()[at_M]


def sum_rows(x_M: np.ndarray, size_R: np.ndarray, dtype=np.float64) -> list:
    """The sum of each row, of which each has an element at least."""
    return np.add.reduceat(x_M, np.cumsum(size_R) - size_R, dtype=dtype).tolist()


def columns(rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each row's noise begins, uint64 [R]; its best logit and its temperature, float32 [R]."""
    return (np.array([row.start for row in rows], dtype=np.uint64),
            *np.array([[row.best for row in rows], [row.temperature for row in rows]], dtype=np.float32))


def total_of(sums_RN: Tensor) -> list[float]:
    return sums_RN.sum(-1, dtype=torch.float64).tolist()


def take(rows: list[int], *tensors: Tensor) -> list[Tensor]:
    """These rows of each tensor; the tensors themselves if it is all rows."""
    if len(rows) == len(tensors[0]):
        return list(tensors)
    index = torch.tensor(rows, device=tensors[0].device)
    return [tensor.index_select(0, index) for tensor in tensors]


class Row:
    """What one row asks for, as numbers: which tokens it keeps, and where its noise begins."""

    def __init__(self, b: int, V: int, params: SamplingParams, key: int, position: int, best: float = 0.0):
        k = int(params.top_k)
        self.b, self.p, self.k = b, float(params.top_p), k if k < V else 0   # 0: all
        self.temperature = max(float(params.temperature), COLDEST)
        self.start = noise_start(key, position)
        self.best, self.total = best, 0.0   # the best logit; what the first k tokens weigh, or all without a top_k

    def keeps(self, mass: float, count: int = 0) -> bool:
        """Whether a token is kept that has tokens of so much weight before it, and so many, which matters to a top_k.
        (The best one always is: before it there is no weight, and the total is never far below 1.)"""
        return not (self.k and count >= self.k) and (self.p == 1 or mass < self.p * self.total)


def race(weights: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Who wins each row: the shortest time / weight, found as the largest weight / time. So weight 0 never wins."""
    return (weights / times).argmax(1)


def predecessors(rows_V: list[Tensor], tokens: list[int], out: Tensor) -> Tensor:
    """1.0 for what comes before a row's token: larger logits, and equal ones on the left of it. (Comparisons into
    floats are vectorised, and so are products with them; masks and `where` take ten times as long.)"""
    for logits_V, token, before_V in zip(rows_V, tokens, out):
        torch.ge(logits_V[:token], logits_V[token], out=before_V[:token])
        torch.gt(logits_V[token:], logits_V[token], out=before_V[token:])
    return out


def guess_floors(logits_RV: Tensor, ks: list[int]) -> Tensor:
    """Logits [R] that k tokens of the row, and few more, are at or above; -inf where k is 0. It is a guess and need not
    be right: it saves draws.

    If the row is cut into groups, 4 k or more, the k-th largest of their maxima is such a logit: more than k tokens are
    above it only where groups have two. (The last few tokens are in no group.) If k is too large for that, look at a
    16th of the logits, 16 runs of neighbours, and take the one whose rank is two standard deviations and two beyond the
    rank that is expected: it is hardly ever above the k-th largest of all. In a small vocabulary take that one itself.
    """
    V = logits_RV.shape[1]
    floor_R = torch.full([len(ks)], -torch.inf, device=logits_RV.device)
    for k in set(ks) - {0}:
        rows = [r for r, k_of_row in enumerate(ks) if k_of_row == k]
        (some_RG,), rank = take(rows, logits_RV), k
        size = next((size for size in (128, 64, 32, 16) if 4 * k * size <= V), None)
        if V > 1 << 13 and size:
            some_RG = some_RG[:, :V - V % size].unflatten(1, (size, -1)).amax(1)
        elif V > 1 << 13:
            some_RG = some_RG[:, :V - V % 256].unflatten(1, (16, 16, -1))[:, :, 0].flatten(1)
            rank = math.ceil(k / 16 + 2 * math.sqrt(k / 16) + 2)
        floor_R[rows] = some_RG.topk(min(rank, some_RG.shape[1]), sorted=False).values.amin(-1).float()
    return floor_R


# ---------------------------------------------------------------------------------------------
# Around it: strangers' functions, log-probabilities

def choose(logits_BV: Tensor, takers: list[tuple]) -> tuple[list[int], dict[int, str]]:
    """A token for each row, and what went wrong instead: in a logits_processor, or in the model.

    takers: the request of each row, and how many drafts stand between its last token and the row's place.
    """
    errors, processed_BV, requests = {}, logits_BV, [request for request, _ in takers]
    rows = [b for b, request in enumerate(requests) if request.params.logits_processor]
    if rows:
        processed_BV = logits_BV.clone()
    for b in rows:
        request, logits_V = requests[b], logits_BV[b].clone()
        try:
            logits_V = request.params.logits_processor(list(request.output.token_ids), logits_V)
            if not torch.is_tensor(logits_V) or logits_V.shape != logits_BV[b].shape:
                raise ValueError(f"it gave {str(logits_V)[:50]} and not logits of shape {list(logits_BV[b].shape)}")
            processed_BV[b] = logits_V.detach()
            if not processed_BV[b].max().isfinite():
                raise ValueError("it left no token to choose: the largest logit must be a finite number")
        except (Exception, SystemExit) as error:   # anything may happen in a stranger's function
            processed_BV[b], errors[b] = 0.0, f"logits_processor: {describe(error)}"
    keys, positions = [request.key for request in requests], [len(request.tokens) + ahead for request, ahead in takers]
    tokens = sample(processed_BV, [request.params for request in requests], keys, positions) if requests else []
    for b, token in enumerate(tokens):
        if token < 0:
            errors[b] = ("the model's logits are not finite: its weights are damaged, "
                               "or its dtype is too small, so try float32 or bfloat16")
    return tokens, errors


def describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:   # a stranger's exception, which fails to describe itself
        return type(error).__name__


def log_probabilities(logits_V: Tensor, token: int, k: int) -> dict[int, float]:
    """Of the token, then of the k most likely ones, by the model alone: no temperature, no logits_processor."""
    logprobs_V = logits_V.log_softmax(-1)
    values, ids = logprobs_V.topk(min(k, len(logprobs_V)))
    return {token: logprobs_V[token].item()} | dict(zip(ids.tolist(), values.tolist()))


# ---------------------------------------------------------------------------------------------
# The same on a GPU: one program per row, and the host waits for nothing but the tokens

def sample_triton(logits_BV: Tensor, params: list[SamplingParams], keys: list[int], positions: list[int]) -> list[int]:
    """`sample` by one kernel. It draws from the same supersets with the same noise as `sample_torch`."""
    (B, V), device = logits_BV.shape, logits_BV.device
    logits_BV = logits_BV.contiguous()
    rows = [Row(b, V, *of_row) for b, of_row in enumerate(zip(params, keys, positions))]
    whole_B2 = torch.from_numpy(np.array([[row.start, row.k] for row in rows], dtype=np.uint64).view(np.int64))
    whole_B2 = whole_B2.to(device, non_blocking=True)
    real_B2 = torch.tensor([[row.temperature if p.temperature else 0.0, row.p] for row, p in zip(rows, params)],
                           dtype=torch.float64).to(device, non_blocking=True)
    floor_B = tokens_B = torch.empty(B, dtype=torch.int64, device=device)   # nobody reads a floor where k is 0
    if any(row.k for row in rows):
        floor_B = guess_floors(logits_BV, [row.k for row in rows])
    _sample_kernel[(B,)](logits_BV, floor_B, whole_B2, real_B2, tokens_B, V, V, BLOCK=BLOCK, BLOCKS=8, num_warps=8)
    return tokens_B.tolist()


@jit
def _exponentials(start, draw, numbers):
    """`exponentials`; unsigned, so that bits that come in from the left are 0."""
    z = start.to(tl.uint64) + (numbers.to(tl.uint64) + (draw.to(tl.uint64) << 32)) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = (z ^ (z >> 31)) >> 12
    return -tl.log(1.0 - (z.to(tl.float64) + 0.5) * 2.220446049250313e-16)


@jit
def _kth_largest(logits_ptr, V, k, SIZE: tl.constexpr):
    """By bisection on the bits, which as whole numbers are in order once those of negative logits are turned."""
    low, high = tl.full([], -2 ** 31, tl.int64), tl.full([], 2 ** 31, tl.int64)   # at least k are at or above low
    while high - low > 1:
        middle = (low + high) >> 1
        count_S = tl.zeros([SIZE], tl.int32)
        for begin in range(0, V, SIZE):
            ids = begin + tl.arange(0, SIZE)
            bits = tl.load(logits_ptr + ids, ids < V, -float("inf")).to(tl.float32).to(tl.int32, bitcast=True)
            count_S += ((ids < V) & ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >= middle)).to(tl.int32)
        enough = tl.sum(count_S) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    bits = low.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _before(logits_ptr, V, ids, best, temperature, pivot, pivot_id):
    """Logits, which of them come before token pivot_id, whose logit is the pivot, and what those weigh."""
    logits = tl.load(logits_ptr + ids, ids < V, -float("inf")).to(tl.float32)
    before = (ids < V) & ((logits > pivot) | ((logits == pivot) & (ids < pivot_id)))
    return logits, before, tl.where(before, tl.exp((logits - best) / temperature), 0.0)


@jit
def _sum_before(logits_ptr, V, best, temperature, pivot, pivot_id, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """How many tokens come before the pivot, and their weight."""
    count_N, mass_N = tl.zeros([BLOCKS], tl.int32), tl.zeros([BLOCKS], tl.float64)
    for begin in range(0, V, BLOCKS * BLOCK):
        ids = begin + tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        logits, before, weights = _before(logits_ptr, V, ids, best, temperature, pivot, pivot_id)
        count_N += tl.sum(before.to(tl.int32), 1)
        mass_N += tl.sum(weights, 1).to(tl.float64)
    return tl.sum(count_N), tl.sum(mass_N)


@jit
def _sample_kernel(logits_ptr, floors_ptr, whole_ptr, real_ptr, tokens_ptr, V, row_stride, BLOCK: tl.constexpr,
                   BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    start, k = tl.load(whole_ptr + 2 * row), tl.load(whole_ptr + 2 * row + 1)
    temperature, p = tl.load(real_ptr + 2 * row).to(tl.float32), tl.load(real_ptr + 2 * row + 1)
    # The best logit, the first token that has it, and whether anything is NaN, which is not equal to itself.
    best_S, at_S = tl.full([BLOCKS * BLOCK], -float("inf"), tl.float32), tl.zeros([BLOCKS * BLOCK], tl.int32)
    strange_S = tl.zeros([BLOCKS * BLOCK], tl.int32)
    for begin in range(0, V, BLOCKS * BLOCK):
        ids = begin + tl.arange(0, BLOCKS * BLOCK)
        logits = tl.load(logits_ptr + ids, ids < V, -float("inf")).to(tl.float32)
        strange_S |= (logits != logits).to(tl.int32)
        at_S = tl.where(logits > best_S, ids, at_S)
        best_S = tl.where(logits > best_S, logits, best_S)
    best = tl.max(best_S)
    token = tl.min(tl.where(best_S == best, at_S, V))
    finite = (tl.max(strange_S) == 0) & (tl.abs(best) < float("inf"))
    if finite & (temperature > 0):
        # Drawn from: what comes before the pivot. At first all, or the guess at the first k if it holds k.
        pivot, pivot_id = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.int32) + V
        size, total = _sum_before(logits_ptr, V, best, temperature, pivot, pivot_id, BLOCK, BLOCKS)
        if k > 0:
            floor = tl.load(floors_ptr + row)
            size, mass = _sum_before(logits_ptr, V, best, temperature, floor, V, BLOCK, BLOCKS)
            pivot = tl.where(size >= k, floor, pivot)
            if p < 1:
                kth = _kth_largest(logits_ptr, V, k, BLOCKS * BLOCK)
                above, mass = _sum_before(logits_ptr, V, best, temperature, kth, 0, BLOCK, BLOCKS)
                total = mass + (k - above) * tl.exp((kth - best) / temperature).to(tl.float64)
        draw, drawing = tl.zeros([], tl.int32), tl.full([], 1, tl.int32)
        while drawing > 0:
            time_N, block_N = tl.full([BLOCKS], float("inf"), tl.float64), tl.zeros([BLOCKS], tl.int32)
            for begin in range(0, tl.cdiv(V, BLOCK), BLOCKS):
                blocks = begin + tl.arange(0, BLOCKS)
                ids = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
                logits, before, weights = _before(logits_ptr, V, ids, best, temperature, pivot, pivot_id)
                sums = tl.sum(weights, 1).to(tl.float64)
                times = _exponentials(start, draw, BLOCK + blocks) / tl.where(sums > 0, sums, 1.0)
                times = tl.where(sums > 0, times, float("inf"))
                block_N = tl.where(times < time_N, blocks, block_N)
                time_N = tl.minimum(times, time_N)
            block = tl.min(tl.where(time_N == tl.min(time_N), block_N, V))
            ids = block * BLOCK + tl.arange(0, BLOCK)
            logits, before, weights = _before(logits_ptr, V, ids, best, temperature, pivot, pivot_id)
            times = _exponentials(start, draw, tl.arange(0, BLOCK)) / tl.where(weights > 0, weights, 1.0).to(tl.float64)
            times = tl.where(weights > 0, times, float("inf"))
            token = tl.min(tl.where(times == tl.min(times), ids, V))
            pivot, pivot_id = tl.max(tl.where(ids == token, logits, -float("inf"))), token
            count, mass = _sum_before(logits_ptr, V, best, temperature, pivot, pivot_id, BLOCK, BLOCKS)
            kept = (count == 0) | ((k == 0) | (count < k)) & ((p == 1) | (mass < p * total))
            drawing = tl.where(kept, 0, 1)
            draw += 1
    tl.store(tokens_ptr + row, tl.where(finite, token, -1))
