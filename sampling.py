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
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from device import jit, load_triton, single_thread

BLOCK = 128           # tokens in a block, whatever V is: models whose vocabularies are padded differently hold one race
SPARE = 16            # blocks beyond those that have the first k tokens, for logits that are equal
GROUP = 16            # logits per group, see `guess_floors`
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
    """Where the noise of a token begins in the sequence of splitmix64, as int64."""
    start = mix((mix(key) + position * GOLDEN) % 2 ** 64)
    return start - 2 ** 64 if start >= 2 ** 63 else start


def exponentials(start_R: Tensor, draw: int, n: int) -> Tensor:
    """n exponential numbers for each row's draw, float64 [R, n]. Products of int64 wrap around.

    They have 52 random bits: the less likely a token, the nearer to 0 must be the number with which it wins.
    """
    z = start_R[:, None] + (torch.arange(n, device=start_R.device) + (draw << 32)) * (GOLDEN - 2 ** 64)
    z = (z ^ z >> 30 & 2 ** 34 - 1) * (MIX_1 - 2 ** 64)   # masks: bits that come in from the left are 0
    z = (z ^ z >> 27 & 2 ** 37 - 1) * (MIX_2 - 2 ** 64)
    z = (z ^ z >> 31 & 2 ** 33 - 1) >> 12 & 2 ** 52 - 1
    return z.double().add_(0.5).mul_(-2.0 ** -52).log1p_().neg_()   # -log(1 - u), 0 < u < 1


# ---------------------------------------------------------------------------------------------
# Choosing a token

def sample(logits_BV: Tensor, params: list[SamplingParams], keys: list[int], positions: list[int]) -> list[int]:
    """One token per row: the most likely at temperature 0, else drawn with the noise of its key and position.
    -1 where the row's largest logit is not finite."""
    if logits_BV.is_cuda and load_triton():
        return sample_triton(logits_BV, params, keys, positions)
    with single_thread(logits_BV.numel() < SINGLE_THREAD):
        return sample_torch(logits_BV.cpu() if logits_BV.is_mps else logits_BV, params, keys, positions)   # no float64


def sample_torch(logits_BV: Tensor, params: list[SamplingParams], keys: list[int], positions: list[int]) -> list[int]:
    """`sample` on any device. R is the rows that are still to be drawn, W the tokens they are drawn from, and N the
    blocks of L = BLOCK that these fill."""
    V, device = logits_BV.shape[1], logits_BV.device
    if all(p.temperature for p in params):
        bests, tokens = logits_BV.amax(-1).tolist(), [-1] * len(params)   # a tenth of the time of max, which says where
    else:
        best_B, likely_B = logits_BV.max(-1)
        bests, tokens = best_B.tolist(), likely_B.tolist()
    tokens = [token if math.isfinite(best) else -1 for token, best in zip(tokens, bests)]
    rows = [Row(b, V, p, keys[b], positions[b], best)
            for b, (p, best) in enumerate(zip(params, bests)) if p.temperature and math.isfinite(best)]
    if not rows:
        return tokens

    (logits_RW,) = take([row.b for row in rows], logits_BV)
    logits_RW, blocks_RN, floor_R = narrow(logits_RW, [row.k for row in rows])
    R, W = logits_RW.shape
    start_R = torch.tensor([row.start for row in rows], device=device)
    best_R1, temperature_R1 = torch.tensor([[[row.best] for row in rows], [[row.temperature] for row in rows]],
                                           dtype=torch.float32, device=device)
    scaled_RW = torch.empty(R, W + -W % BLOCK, device=device)   # whole blocks
    scaled_RW[:, W:] = -torch.inf
    torch.sub(logits_RW, best_R1, out=scaled_RW[:, :W])
    weights_RW = scaled_RW.div_(temperature_R1).softmax(-1)   # twice as fast as exp
    weights_RNL, weights_RW = weights_RW.view(R, -1, BLOCK), weights_RW[:, :W]
    cut, mask_RW = any(row.k or row.p < 1 for row in rows), scaled_RW[:, :W]   # memory that was just used is fast
    if floor_R is not None:   # the first k, and perhaps more
        units = weights_RW.amax(-1).tolist()   # what the best logit weighs
        inside_RW = torch.ge(logits_RW, floor_R[:, None], out=mask_RW)
        sizes = inside_RW.sum(-1).tolist()
        for r, (row, floor, size, row.unit) in enumerate(zip(rows, floor_R.tolist(), sizes, units)):
            if size >= row.k:
                row.floor, row.size = floor, size
            else:
                inside_RW[r] = 1.0
        weights_RW *= inside_RW
    sums_RN = weights_RNL.sum(-1)
    for row, total in zip(rows, total_of(sums_RN)):
        row.total = total

    for draw in itertools.count():
        place_R, token_R = race(weights_RNL, sums_RN, blocks_RN, exponentials(start_R, draw, BLOCK + -(-V // BLOCK)))
        counts = masses = itertools.repeat(0)
        if cut:
            before_RW = predecessors(logits_RW, place_R.tolist(), out=mask_RW)
            weights_RW *= before_RW
            sums_RN = weights_RNL.sum(-1)
            counts, masses = before_RW.sum(-1).tolist(), total_of(sums_RN)
        again = []
        for r, (row, token, count, mass) in enumerate(zip(rows, token_R.tolist(), counts, masses)):
            if row.keeps(count, mass, logits_BV):
                tokens[row.b] = token
            else:
                again.append(r)
        if not again:
            return tokens
        rows = [rows[r] for r in again]
        logits_RW, weights_RNL, sums_RN, blocks_RN, start_R = take(
            again, logits_RW, weights_RNL, sums_RN, blocks_RN, start_R)
        weights_RW, mask_RW = weights_RNL.flatten(1)[:, :W], mask_RW[:len(again)]


def narrow(logits_RW: Tensor, ks: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits that matter to these top-k, in which blocks they are, and `guess_floors` (None: there is no top-k)."""
    R, V = logits_RW.shape
    all_RN = torch.arange(-(-V // BLOCK), device=logits_RW.device).expand(R, -1)
    most = max(k or V for k in ks)
    if not few(most, V):
        return logits_RW, all_RN, guess_floors(logits_RW, ks, V) if any(ks) else None
    some_RW, some_RN, least_R = best_blocks(logits_RW, most + SPARE)
    floor_R = guess_floors(some_RW, ks, V)
    if (least_R < floor_R).all():
        return some_RW, some_RN, floor_R
    return logits_RW, all_RN, floor_R   # so many equal the k-th largest that some may be in other blocks


def few(k: int, V: int) -> bool:
    """Whether half of the blocks, or fewer, are sure to have the first k tokens."""
    return 0 < k and k + SPARE <= V // (2 * BLOCK)


def best_blocks(logits_RW: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's n blocks with the largest maxima, which have its n largest logits: their logits [R, n L], which they
    are [R, n], and the smallest of their maxima [R], than which no logit elsewhere is larger."""
    logits_RNL = in_blocks(logits_RW)
    R, N, L = logits_RNL.shape
    best = logits_RNL.amax(-1).topk(n, sorted=False)
    blocks_Rn = best.indices.sort().values
    index = torch.arange(0, R * N, N, device=logits_RNL.device)[:, None] + blocks_Rn
    return logits_RNL.flatten(0, 1).index_select(0, index.flatten()).view(R, n * L), blocks_Rn, best.values.amin(-1)


def in_blocks(logits_BV: Tensor) -> Tensor:
    """float32 logits [B, N, L], the last block filled up with -inf."""
    B, V = logits_BV.shape
    if V % BLOCK:
        padded_BV = torch.empty(B, V + -V % BLOCK, device=logits_BV.device)
        padded_BV[:, :V], padded_BV[:, V:] = logits_BV, -torch.inf
        logits_BV = padded_BV
    return logits_BV.float().reshape(B, -1, BLOCK)


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
        self.b, self.p, self.k = b, params.top_p, params.top_k if params.top_k < V else 0   # 0: all
        self.temperature = max(params.temperature, COLDEST)
        self.start = noise_start(key, position)
        self.size, self.total = V, 0.0          # tokens that are drawn from at first, and their weight
        self.floor = -math.inf                  # none of their logits is below it
        self.best, self.unit = best, 1.0        # the best logit, and its weight

    def bounds(self, count: int, mass: float) -> tuple[float, float]:
        """At least and at most what the first k weigh, if so many tokens of so much weight come before one of them. Of
        the others drawn from at first, the first weigh as much as their average or more, none less than the floor."""
        if not self.k:
            return self.total, self.total
        share = (self.k - count) / (self.size - count)
        smallest = self.unit * math.exp((self.floor - self.best) / self.temperature)
        return mass + (self.total - mass) * share, self.total - (self.size - self.k) * smallest

    def keeps(self, count: int, mass: float, logits_BV: Tensor) -> bool:
        """Whether a token is kept that has so many tokens, of so much weight, before it."""
        if self.k and count >= self.k:
            return False
        least, most = self.bounds(count, mass)
        if self.p == 1 or not count or mass < self.p * least:   # of a top_p however small the best token is left
            return True
        if mass < self.p * most:   # seldom: then it must be known
            logits_K = logits_BV[self.b].float().topk(self.k).values
            self.total = self.unit * ((logits_K - self.best) / self.temperature).double().exp().sum().item()
            self.size = self.k
            return mass < self.p * self.total
        return False


def race(weights_RNL: Tensor, sums_RN: Tensor, blocks_RN: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Who wins each row: its place among the row's tokens, and its id. times: those of a block's tokens, then those of
    blocks. The waiting time of weight 0 is infinite."""
    each_R = torch.arange(len(times), device=times.device)
    n_R = (times[:, BLOCK:].gather(1, blocks_RN) / sums_RN).argmin(-1)
    l_R = (times[:, :BLOCK] / weights_RNL[each_R, n_R]).argmin(-1)
    return n_R * BLOCK + l_R, blocks_RN[each_R, n_R] * BLOCK + l_R


def predecessors(logits_RW: Tensor, places: list[int], out: Tensor) -> Tensor:
    """1.0 for tokens that come before the one at this place of their row: larger logits, equal ones on the left of it.
    (Comparisons into floats are vectorised, products with them are, too; masks and `where` take ten times as long.)"""
    for logits_W, place, before_W in zip(logits_RW, places, out):
        torch.ge(logits_W[:place], logits_W[place], out=before_W[:place])
        torch.gt(logits_W[place:], logits_W[place], out=before_W[place:])
    return out


def guess_floors(logits_RW: Tensor, ks: list[int], V: int) -> Tensor:
    """Logits [R] that k tokens of the row, and few more, are at or above; -inf where k is 0. It is a guess and need not
    be right: it saves draws.

    Few: the k-th largest of the best blocks, which is the row's. More: the k-th largest of the maxima of V / GROUP
    groups (more are above it only where groups have two). Many: of every GROUP-th logit the one with such a rank that
    it is hardly ever above the k-th largest, two standard deviations and two beyond the rank that is expected.
    """
    floor_R = torch.full([len(ks)], -torch.inf, device=logits_RW.device)
    for k in set(ks) - {0}:
        rows = [r for r, k_of_row in enumerate(ks) if k_of_row == k]
        (some_RM,), rank = take(rows, logits_RW), k
        if few(k, V):
            if some_RM.shape[1] >= V:
                some_RM, _, _ = best_blocks(some_RM, k)
        elif V > 1 << 13 and k <= V // (4 * GROUP):
            some_RM = some_RM[:, :V - V % GROUP].unflatten(1, (GROUP, -1)).amax(1)
        elif V > 1 << 13:
            some_RM, rank = some_RM[:, ::GROUP].contiguous(), math.ceil(k / GROUP + 2 * math.sqrt(k / GROUP) + 2)
        floor_R[rows] = some_RM.topk(min(rank, some_RM.shape[1]), sorted=False).values.amin(-1).float()
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
            processed_BV[b] = logits_V
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
    whole_B2 = torch.tensor([[row.start, row.k] for row in rows]).to(device, non_blocking=True)
    real_B2 = torch.tensor([[row.temperature if p.temperature else 0.0, row.p] for row, p in zip(rows, params)],
                           dtype=torch.float64).to(device, non_blocking=True)
    floor_B = tokens_B = torch.empty(B, dtype=torch.int64, device=device)
    if any(row.k for row in rows):
        floor_B = guess_floors(logits_BV, [row.k for row in rows], V)
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
