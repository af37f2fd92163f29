"""Attention over paged KV: the same math in two regimes. (Read batch.py first; next comes model.py.)

Attention is written three times here, with one signature: naive (the definition), torch (any
device) and Triton (GPUs, or Triton's interpreter on a CPU). All three read K and V through block
tables, for a ragged batch in which every request brings some query tokens and a longer past.

The idea is online softmax, in seven lines above `_sweep`: queries meet their keys a tile at a time, so
the T x T scores never exist.

The two regimes. Prefill runs the tokens of a prompt, many at once; decode runs the one token that was sampled
last. A query row is one query head of one token, and the G query heads that share a KV head share its keys. In 16 bits:

    prefill    R rows, tokens x G     4 R D operations per key    2 D numbers, 4 D bytes    R operations per byte
    decode     G rows, 1 token x G    4 G D operations per key    2 D numbers, 4 D bytes    G operations per byte
    verify     (n + 1) x G rows       (n + 1) x 4 G D             the same 4 D bytes        (n + 1) G

An H100 does 295 operations in the time of a byte (`python bench.py estimate --hardware h100`): prefill, with
the hundreds of rows of a chunk, is bound by arithmetic, decode by bandwidth. (A tile holds 128 rows at a time;
the tiles beside it find the same keys in the L2 cache.) Decode has another trouble: a few rows cannot fill a
machine. So its keys are cut into splits that run side by side, and merge by the recurrence of online softmax:
its three running values are all that a split leaves behind. A verification runs a token and n guesses of what
follows it. It reads the bytes of a decode, and units that would idle do its n + 1 times as many operations. So
every chunk of a few tokens is served like a decode, as a short chunk.

Layout: k_KNSD holds K heads of N blocks of S slots, so one block of one head is one contiguous piece of
memory. Token t of a request lives in slot block_table[t // S] * S + t % S. "The dog" of paged_kv.py, about
to run its token 2 (" sat", 479), is Chunk([479], start=2, blocks=[3, 4]): a decode. It writes K and V to
slot 4 * 2 + 0 = 8 and reads slots 6, 7 and 8.

A pool of int8 holds a row of D numbers as bytes and one float32 scale, largest / 127 (`quantize_kv`). Its scales go
along as k_scale_KNS and v_scale_KNS; without them k and v are as the model computed them. Nothing is widened in
memory: q . (scale * k) = scale * (q . k), so the scale of a key multiplies its score, and that of a value its weight.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from batch import SHORT, Batch, Chunk, make_batch   # noqa: F401, forks import the last two from here
from device import jit, load_triton
from paged_kv import quantize_kv

LOG2E = 1.4426950408889634   # exp(x) = exp2(x * LOG2E), and exp2 is one instruction
triton = tl = INTERPRETED = None   # until `load_triton`


# ---------------------------------------------------------------------------------------------
# The definition

def attention_naive(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                    window: int | None = None, k_scale_KNS: Tensor | None = None,
                    v_scale_KNS: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T + mask) v in float64, one request and one head at a time; [T, H, D].

    A query at position p sees keys at positions (p - window, p]; query head h uses KV head h // G. scale > 0.
    This is what the other two must equal.
    """
    out_THD = torch.empty_like(q_THD)
    G = q_THD.shape[1] // k_KNSD.shape[0]
    for b, kv_len in enumerate(batch.lens):
        rows = slice(batch.starts[b], batch.starts[b + 1])
        table = batch.block_tables_UM[batch.chunks[b].row, :-(-kv_len // k_KNSD.shape[2])]
        distance = batch.positions_T[rows, None] - torch.arange(kv_len, device=q_THD.device)
        seen = (distance >= 0) & (distance < (window or kv_len))
        k_KTD, v_KTD = (pool_KNSD[:, table].flatten(1, 2)[:, :kv_len].double() for pool_KNSD in (k_KNSD, v_KNSD))
        if k_scale_KNS is not None:
            k_KTD *= k_scale_KNS[:, table].flatten(1, 2)[:, :kv_len, None]
            v_KTD *= v_scale_KNS[:, table].flatten(1, 2)[:, :kv_len, None]
        for h in range(q_THD.shape[1]):
            scores = q_THD[rows, h].double() @ k_KTD[h // G].T * scale
            if bias:
                scores += bias(torch.tensor(h, device=q_THD.device), distance)
            out_THD[rows, h] = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_KTD[h // G]).to(out_THD)
    return out_THD


# The seam for experiments: what is added to the scores. A function from query heads and from distances in tokens, two
# tensors that broadcast, to the bias; in the Triton kernels it is `_bias`. ALiBi (Press et al. 2022) with 8 heads is
#     bias = lambda head, distance: -2.0 ** -(head + 1) * distance
bias = None


def write_kv_torch(k_TKD: Tensor, v_TKD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, slots_T: Tensor,
                   k_scale_KNS: Tensor | None = None, v_scale_KNS: Tensor | None = None):
    """Put the step's K and V, or latents alone, into their slots. No slot is -1: only graphs' idle requests have it."""
    both = (k_TKD, k_KNSD, k_scale_KNS), (v_TKD, v_KNSD, v_scale_KNS)
    for x_TKD, pool_KNSD, scale_KNS in both[:1] if v_TKD is None else both:
        if scale_KNS is not None:
            x_TKD, scale_TK = quantize_kv(x_TKD)
            scale_KNS.flatten(1)[:, slots_T] = scale_TK.T
        pool_KNSD.flatten(1, 2)[:, slots_T] = x_TKD.transpose(0, 1)


# ---------------------------------------------------------------------------------------------
# PyTorch, any device

def attention_torch(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                    window: int | None = None, k_scale_KNS: Tensor | None = None,
                    v_scale_KNS: Tensor | None = None) -> Tensor:
    """Attention by PyTorch's own kernels, which cannot walk a block table, in few calls per layer.

    What a decode costs is reading K and V once, so a long one is read in place: its blocks, if they are neighbours in
    the pool, are one view [K, keys, D]. Other keys are gathered first. Short decodes share a call: two products around
    a softmax, which for a row per head take less time than the fused kernel. A verification is n rows in place of one.

    An INT8 model rounds what comes out, and a sum that differs in its last bit may become another whole number. With
    `batch.exact` a short chunk gets the same bits beside others as alone: its length decides how it is computed, and
    the two products add up in the same order if the number of keys, with those that are hidden, is a multiple of WHOLE.

    The fused kernel cannot read bytes either: what a call reads of a pool of int8 is widened first. So on a CPU INT8
    saves memory and mostly no time (`python bench.py quantization`: a step is 0.7 to 1.1 times as fast as in float32).
    """
    (_, H, D), K = q_THD.shape, len(k_KNSD)

    def attend(call: Call) -> Tensor:
        k_BKTD = call.read(k_KNSD)
        v_BKTD = k_BKTD if v_KNSD is k_KNSD else call.read(v_KNSD)
        if k_scale_KNS is not None:
            k_BKTD = k_BKTD.to(q_THD.dtype).mul_(call.read(k_scale_KNS[..., None]))
            v_BKTD = v_BKTD.to(q_THD.dtype).mul_(call.read(v_scale_KNS[..., None]))
        q_TKGD, n = q_THD[call.rows].view(-1, K, H // K, D), call.tokens
        if n == 0:          # one long chunk, and every KV head is seen G times
            k_KGTD, v_KGTD = (x.transpose(0, 1).expand(-1, H // K, -1, -1) for x in (k_BKTD, v_BKTD))
            o_KGTD = scaled_dot_product_attention(q_TKGD.permute(1, 2, 0, 3), k_KGTD, v_KGTD, call.mask, scale=scale,
                                                  is_causal=call.mask is None)
            return o_KGTD.permute(2, 0, 1, 3).flatten(1, 2)
        q_BKRD = q_TKGD if n == 1 else q_TKGD.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)   # R = n x G
        if call.shared:
            q_bRD, k_bTD, v_bTD = (x.flatten(0, 1) for x in (q_BKRD, k_BKTD, v_BKTD))   # b = B x K
            weights_bRT = torch.baddbmm(call.mask, q_bRD, k_bTD.mT, alpha=scale).softmax(-1)
            o_BKRD = (weights_bRT @ v_bTD).view(q_BKRD.shape)
        else:
            o_BKRD = scaled_dot_product_attention(q_BKRD, k_BKTD, v_BKTD, call.mask, scale=scale)
        return (o_BKRD if n == 1 else o_BKRD.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)).flatten(1, 2)

    calls = batch.once(("torch", window), lambda: plan_torch(batch, H, k_KNSD, window, q_THD.dtype))
    if len(calls) == 1:
        return attend(calls[0])
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    for call in calls:
        out_THD[call.rows] = attend(call)
    return out_THD


class Call(NamedTuple):
    """Some requests of a step that share a call: short chunks of as many tokens each, or one longer chunk."""
    rows: slice | Tensor     # their rows of q
    tokens: int              # of each short chunk; 0: it is a longer one
    keys: slice | Tensor     # where their keys are: neighbouring slots, or rows [B, K, keys] of the pool as [K N S, D]
    mask: Tensor | None      # added to the scores; None: a decode sees all keys, a prompt's token those up to its own
    shared: bool = False     # two products in place of the fused kernel; then the mask is [B K, rows, keys]

    def read(self, pool_KNSD: Tensor) -> Tensor:
        """Their K or V, [B, K, keys, D], or the scales of these as [K, N, S, 1]."""
        D = pool_KNSD.shape[-1]
        if isinstance(self.keys, slice):
            return pool_KNSD.view(1, len(pool_KNSD), -1, D)[:, :, self.keys]
        return torch.index_select(pool_KNSD.view(-1, D), 0, self.keys.view(-1)).view(*self.keys.shape, D)


WHOLE = 16           # a shared call has a multiple of so many keys
IN_PLACE = 400_000   # bytes of K and V. To gather fewer takes less than the 15 us of a call of their own


def plan_torch(batch: Batch, H: int, k_KNSD: Tensor, window: int | None, dtype: torch.dtype) -> list[Call]:
    """The calls that attend to the whole step, for queries of this dtype.

    A long chunk has a call of its own. So has a short one with many keys that are neighbours, if they are float32: what
    the fused kernel takes longer for in 16 bits pays for gathering them. The others share a call with those of as many
    tokens and about as many keys: one call for up to 127 keys, one for 128 to 255, and so on. (16 verifications of 5
    tokens, 9 heads on 3 of size 64: with 64 to 127 keys 474 us in one call, 916 in 16; with 100 to 500 2,471, 1,930.)
    """
    (K, _, S, D), groups = k_KNSD.shape, defaultdict(list)   # by tokens, and by bits of keys or -b: a call of its own
    many = IN_PLACE // (2 * K * D * k_KNSD.element_size())
    for b, chunk in enumerate(batch.chunks):
        n, count = len(chunk.tokens), batch.lens[b] - first_key(batch, b, window)
        long = k_KNSD.dtype == torch.float32 and count > many and (batch.exact or in_place(batch, b, window, S))
        groups[n, -b if n > SHORT or long else max(7, count.bit_length())].append(b)
    return [plan_call(batch, H, k_KNSD, some, len(some) > 1 or batch.exact and size > 0, window, dtype)
            for (_, size), some in groups.items()]


def first_key(batch: Batch, b: int, window: int | None) -> int:
    """The position of the first key that the first row of request b sees."""
    return max(0, batch.chunks[b].start + 1 - window) if window else 0


def in_place(batch: Batch, b: int, window: int | None, S: int) -> slice | None:
    """The keys that request b sees as a slice of the pool's slots, if its blocks are neighbours."""
    first, stop = first_key(batch, b, window), batch.lens[b]
    blocks = batch.chunks[b].blocks[first // S:-(-stop // S)]
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        slot = blocks[0] * S + first % S
        return slice(slot, slot + stop - first)


def plan_call(batch: Batch, H: int, k_KNSD: Tensor, requests: list[int], shared: bool, window: int | None,
              dtype: torch.dtype) -> Call:
    """One call for these short chunks of as many tokens each, or for this one longer chunk.

    Two decodes of 3 and 5 keys: the first has its last key three times, so that both have 5, and a mask hides two:
        keys      [[0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]
        distance  [[2, 1, 0, -1, -2], [4, 3, 2, 1, 0]]     seen where it is 0 or more, and less than the window
    """
    (K, N, S, _), device, b = k_KNSD.shape, k_KNSD.device, requests[0]
    short = (n := len(batch.chunks[b].tokens)) <= SHORT
    if requests == list(range(b, b + len(requests))):
        rows = slice(batch.starts[b], batch.starts[b + len(requests)])
    else:
        rows = torch.tensor([batch.starts[b] + t for b in requests for t in range(n)], device=device)
    slots = None if shared else in_place(batch, b, window, S)
    if slots and not bias and (n == 1 or not short and batch.chunks[b].start == 0 and not window):
        return Call(rows, n * short, slots, None)

    firsts = [first_key(batch, b, window) for b in requests]
    most = max(batch.lens[b] - first for b, first in zip(requests, firsts))
    most = -(-most // WHOLE) * WHOLE if shared else most
    keys_BT = torch.tensor(firsts, device=device)[:, None] + torch.arange(most, device=device)
    distance = batch.positions_T[rows].view(len(requests), 1, 1, -1, 1) - keys_BT[:, None, None, None]
    heads = torch.arange(H, device=device).view(1, K, -1, 1, 1)
    seen = (distance >= 0) & (distance < (window or N * S))
    # 5 tokens, K = 2, G = 3: [B, 2, 3, 5, keys] (or 1s) -> [B, 2, 15, keys], token by token and in each head by head.
    mask = torch.where(seen, bias(heads, distance) if bias else 0.0, -torch.inf).to(dtype)
    mask = mask.transpose(2, 3).expand(-1, -1, -1, H // K if n > 1 else -1, -1).flatten(2, 3) if short else mask[0]
    if slots:
        return Call(rows, n * short, slots, mask)
    keys_BT = keys_BT.minimum(batch.kv_lens[requests, None] - 1)
    tables_BM = batch.block_tables_UM[batch.table_rows[requests], :-(-max(batch.lens[b] for b in requests) // S)]
    slots_BT = tables_BM.gather(1, keys_BT // S) * S + keys_BT % S
    keys_BKT = slots_BT[:, None] + torch.arange(0, K * N * S, N * S, device=device)[:, None]
    return Call(rows, n * short, keys_BKT, mask.expand(-1, K, n * H // K, -1).flatten(0, 1) if shared else mask, shared)


# ---------------------------------------------------------------------------------------------
# Triton

# A kernel is written for one program; a launch runs a grid of them side by side, on the GPU's multiprocessors, and
# tl.program_id says which one this is. A program computes with tiles: tl.arange makes indices, tl.load and tl.store
# move tiles between memory (a pointer plus a tile of offsets; what `mask` rules out is not touched) and registers,
# tl.dot multiplies them on the matrix units. tl.constexpr arguments are compiled in.

PIPELINE = 5   # stages: looking up a block takes three, and two more keep the next tile of K and V on its way


@jit
def _start(ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """o, m and l of rows that have seen no key."""
    return tl.zeros([ROWS, D_PAD], tl.float32), tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


# Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), for one query q:
#
#     m, l, o = -inf, 0, 0                  # largest score, sum of weights, weighted sum of values, so far
#     for k, v in tiles of keys and values:
#         s = scale * k @ q
#         new = max(m, max(s))
#         a, p, m = exp(m - new), exp(s - new), new        # a: what the old sums are worth under the new maximum
#         l, o = a * l + sum(p), a * o + p @ v
#     answer = o / l
#
# The rescale by a makes the order of tiles, and where they are cut, a matter of rounding alone. In the kernel exp is
# exp2, which is one instruction, and its factor log2(e) is folded into the scale.

@jit
def _bias(s_RT, scale, head, distance):
    """The scores with what is added to them: here nothing (see `bias`). Their factor `scale`, which has log2(e) in it,
    comes later, so ALiBi with 8 heads is `s_RT - tl.exp2(-1.0 - head) * distance * 1.4426950408889634 / scale`."""
    return s_RT


@jit
def _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, head_R, position_R, start, stop,
           kv_len, scale, S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr,
           WINDOW: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax of R query rows over the keys [start, stop) of one KV head of one request.

    Takes and returns the running o_RD, m_R, l_R, float32; m and the scores are logarithms to base 2, as
    `scale` holds LOG2E. MASKED is False where every row sees every key of every tile. The whole of paging
    is one look-up per tile: a tile that lies within a block is one contiguous piece of the pool. (Where S
    is no multiple of TILE, every key looks up its own block: right, and slower.) `start` is a multiple of
    TILE. A pool of int8 comes with pointers to its scales, else they are None: its bytes are widened in registers.
    """
    d, t = tl.arange(0, D_PAD), tl.arange(0, TILE)
    for tile in range(start, stop, TILE):
        key = tile + t
        if S % TILE == 0:
            begin = tl.load(table_ptr + tile // S) * S + tile % S
            slot = t
        else:
            begin = 0
            slot = tl.load(table_ptr + key // S, mask=key < kv_len, other=0) * S + key % S
        at_TD = (slot * D)[:, None] + d[None, :]
        owned_TD = tl.full([TILE, D_PAD], True, tl.int1)
        if D < D_PAD:
            owned_TD = owned_TD & (d < D)[None, :]
        if MASKED:   # slots past the end belong to nobody and may hold NaN
            owned_TD = owned_TD & (key < kv_len)[:, None]

        k_TD = tl.load(k_ptr + begin * D + at_TD, mask=owned_TD, other=0).to(q_RD.dtype)
        s_RT = tl.dot(q_RD, tl.trans(k_TD), input_precision="ieee")
        if k_scale_ptr is not None:
            s_RT *= tl.load(k_scale_ptr + begin + slot, mask=key < kv_len, other=0.0)[None, :]
        s_RT = _bias(s_RT, scale, head_R[:, None], position_R[:, None] - key[None, :])
        if MASKED:
            seen_RT = key[None, :] <= position_R[:, None]
            if WINDOW > 0:
                seen_RT = seen_RT & (key[None, :] > position_R[:, None] - WINDOW)
            s_RT = tl.where(seen_RT, s_RT, float("-inf"))

        m_new = tl.maximum(m_R, tl.max(s_RT, 1) * scale)
        m_sub = m_new
        if MASKED:   # a row that has seen no key yet: -inf - -inf would be NaN
            m_sub = tl.where(m_new == float("-inf"), 0.0, m_new)
        p_RT = tl.exp2(s_RT * scale - m_sub[:, None])
        rescale = tl.exp2(m_R - m_sub)
        v_TD = tl.load(v_ptr + begin * D + at_TD, mask=owned_TD, other=0).to(q_RD.dtype)
        l_R = l_R * rescale + tl.sum(p_RT, 1)
        if v_scale_ptr is not None:
            p_RT *= tl.load(v_scale_ptr + begin + slot, mask=key < kv_len, other=0.0)[None, :]
        o_RD = tl.dot(p_RT.to(v_TD.dtype), v_TD, o_RD * rescale[:, None], input_precision="ieee")
        m_R = m_new
    return o_RD, m_R, l_R


@jit
def _prefill_kernel(q_ptr, out_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, query_starts_ptr,
                    kv_lens_ptr, work_ptr, q_stride, head_stride, scale,
                    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """A tile of query rows against every key that they may see, and no other tile of keys.

    Computes: rows of the chunk, ROWS // G tokens times the G query heads that share this KV head.
    Cost: 4 * ROWS * keys * D operations for 2 * keys * D elements of K and V, ROWS operations per byte in
    two-byte types. Bound: arithmetic. An H100 can do 295 operations per byte of its memory; the L2 cache, in
    which the tiles of one request find the same K and V, makes up for what 128 rows lack.
    Tile: as many rows as the registers hold, for o_RD is [ROWS, D] float32; TILE keys feed one pass of the
    matrix units. Wins on long chunks; loses on chunks of a few tokens, whose rows it fills with nothing.

    Three ranges of keys, because a mask takes time and most tiles need none. Tokens 12 and 13, WINDOW = 8, TILE = 4:

        key          4  5  6  7 | 8  9 10 11 | 12 13
        token 12        x  x  x | x  x  x  x |  x
        token 13           x  x | x  x  x  x |  x  x
                    start = 4    whole = 8    diagonal = 12, stop = 14

    The last token sees all of the tiles from `whole` on, up to the diagonal; the first token sees all of those before
    `diagonal`, back to its window. Keys before `start` and from `stop` on are not loaded at all.
    """
    b = tl.load(work_ptr + 3 * tl.program_id(0))
    table_ptr = tables_ptr + tl.load(work_ptr + 3 * tl.program_id(0) + 1)
    first = tl.load(work_ptr + 3 * tl.program_id(0) + 2)       # the tile's first token, within the chunk
    kv_head = tl.program_id(1).to(tl.int64)
    row_start = tl.load(query_starts_ptr + b).to(tl.int32)
    q_len = tl.load(query_starts_ptr + b + 1).to(tl.int32) - row_start
    kv_len = tl.load(kv_lens_ptr + b).to(tl.int32)
    past = kv_len - q_len                                      # tokens before the chunk

    row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    token = first + row // G
    live_RD = ((row < ROWS // G * G) & (token < q_len))[:, None] & (d < D)[None, :]
    index_R = (row_start + token).to(tl.int64)
    head_R = kv_head * G + row % G
    column_R = head_R * D
    q_RD = tl.load(q_ptr + (index_R * q_stride + column_R)[:, None] + d[None, :], mask=live_RD, other=0.0)

    position_R = past + token
    first_position = past + first
    stop = past + tl.minimum(first + ROWS // G, q_len)         # one past the last token's position
    start = 0
    whole = 0
    if WINDOW > 0:
        start = tl.maximum(0, first_position - WINDOW + 1) // TILE * TILE
        whole = tl.cdiv(tl.maximum(0, stop - WINDOW), TILE) * TILE
    diagonal = tl.maximum(whole, (first_position + 1) // TILE * TILE)

    k_ptr, v_ptr = k_ptr + kv_head * head_stride, v_ptr + kv_head * head_stride
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * (head_stride // D)
        v_scale_ptr += kv_head * (head_stride // D)
    o_RD, m_R, l_R = _start(ROWS, D_PAD)
    if WINDOW > 0:
        o_RD, m_R, l_R = _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, head_R,
                                position_R, start, tl.minimum(whole, stop), kv_len, scale,
                                S, D, D_PAD, TILE, WINDOW, True)
    o_RD, m_R, l_R = _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, head_R,
                            position_R, whole, diagonal, kv_len, scale, S, D, D_PAD, TILE, WINDOW, False)
    o_RD, m_R, l_R = _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, head_R,
                            position_R, diagonal, stop, kv_len, scale, S, D, D_PAD, TILE, WINDOW, True)
    tl.store(out_ptr + (index_R * H * D + column_R)[:, None] + d[None, :],
             (o_RD / tl.where(l_R > 0, l_R, 1.0)[:, None]).to(out_ptr.dtype.element_ty), mask=live_RD)


@jit
def _decode_kernel(q_ptr, out_ptr, o_ptr, m_ptr, l_ptr, arrived_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
                   tables_ptr, query_starts_ptr, kv_lens_ptr, work_ptr, q_stride, head_stride, longest, scale,
                   S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                   ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """One split of one request's keys for the n G query rows of one KV head; the last split to finish merges all.

    Cost: for a decode, 4 * G * keys * D operations for 2 * keys * D elements of K and V, each used once: G
    operations per byte in two-byte types. Bound: bandwidth; the matrix units idle, and half-empty tiles (G rows of
    16) are free. A verification of n drafts reads the same bytes: (n + 1) G operations per byte.
    Splits: one row cannot fill a machine, so the step's keys are shared out evenly over its multiprocessors.
    Two partial answers merge by the recurrence of online softmax, with splits in the place of keys, so the
    result is the same up to rounding. Made for any batch and length; loses where splits are so short that
    leaving o, m and l in memory costs as much as the keys.
    """
    work, kv_head = tl.program_id(0), (tl.program_id(1) % (H // G)).to(tl.int64)
    b = tl.load(work_ptr + 6 * work)
    if b >= 0:   # the list is as long as it can get, not as long as it is
        table_ptr = tables_ptr + tl.load(work_ptr + 6 * work + 1)
        start, stop = tl.load(work_ptr + 6 * work + 2), tl.load(work_ptr + 6 * work + 3)
        first, splits = tl.load(work_ptr + 6 * work + 4), tl.load(work_ptr + 6 * work + 5)
        row_start, kv_len = tl.load(query_starts_ptr + b), tl.load(kv_lens_ptr + b).to(tl.int32)
        q_len = (tl.load(query_starts_ptr + b + 1) - row_start).to(tl.int32)
        first_row = tl.program_id(1) // (H // G) * ROWS
        row, d = first_row + tl.arange(0, ROWS), tl.arange(0, D_PAD)
        token, head = row // G, row % G
        live_R, live_RD, at_R = token < q_len, (token < q_len)[:, None] & (d < D)[None, :], token * H + head
        at_RD = at_R[:, None] * D + d[None, :]
        q_ptr += row_start * q_stride + kv_head * G * D
        q_RD = tl.load(q_ptr + (token * q_stride + head * D)[:, None] + d[None, :], mask=live_RD, other=0.0)
        stop = tl.where(first_row < q_len * G, stop, start)   # where only a longer chunk has rows, nothing is read
        k_ptr, v_ptr = k_ptr + kv_head * head_stride, v_ptr + kv_head * head_stride
        if k_scale_ptr is not None:
            k_scale_ptr += kv_head * (head_stride // D)
            v_scale_ptr += kv_head * (head_stride // D)
        o_RD, m_R, l_R = _start(ROWS, D_PAD)
        o_RD, m_R, l_R = _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
                                kv_head * G + head, kv_len - q_len + token, start, stop, kv_len, scale,
                                S, D, D_PAD, TILE, WINDOW, True)
        finished = True
        if splits > 1:
            size, from_head = longest * H, kv_head * G   # rows of a partial answer, and the first of this head
            o_ptr, m_ptr, l_ptr = o_ptr + from_head * D, m_ptr + from_head, l_ptr + from_head
            tl.store(o_ptr + work * size * D + at_RD, o_RD, mask=live_RD)
            tl.store(m_ptr + work * size + at_R, m_R, mask=live_R)
            tl.store(l_ptr + work * size + at_R, l_R, mask=live_R)
            tl.debug_barrier()   # all threads have stored before one of them says so
            counter = arrived_ptr + b * tl.num_programs(1) + tl.program_id(1)
            finished = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
            if finished:
                tl.store(counter, 0)   # ready for the next layer
                o_RD, m_R, l_R = _start(ROWS, D_PAD)
                for part in tl.range(first, first + splits, loop_unroll_factor=4):   # several loads in flight
                    o_part = tl.load(o_ptr + part * size * D + at_RD, mask=live_RD, other=0.0, cache_modifier=".cg")
                    m_part = tl.load(m_ptr + part * size + at_R, mask=live_R, other=0.0, cache_modifier=".cg")
                    l_part = tl.load(l_ptr + part * size + at_R, mask=live_R, other=1.0, cache_modifier=".cg")
                    m_new = tl.maximum(tl.maximum(m_R, m_part), -1e38)   # no -inf: a row may see none of a split's keys
                    old, new = tl.exp2(m_R - m_new), tl.exp2(m_part - m_new)
                    o_RD = o_RD * old[:, None] + o_part * new[:, None]
                    l_R = l_R * old + l_part * new
                    m_R = m_new
        if finished:
            out_RD = (o_RD / tl.where(l_R > 0, l_R, 1.0)[:, None]).to(out_ptr.dtype.element_ty)   # idle: 0
            tl.store(out_ptr + (row_start * H + kv_head * G) * D + at_RD, out_RD, mask=live_RD)


@jit
def _quantize(x_KD, live_KD, scale_ptr_K1, live_K1):
    """The bytes that `quantize_kv` makes of a token's K or V; it stores the scales."""
    x_KD = tl.where(live_KD, x_KD.to(tl.float32), 0.0)
    most_K1 = tl.max(tl.where(x_KD == x_KD, tl.abs(x_KD), float("inf")), 1, keep_dims=True)   # tl.max skips NaN
    scale_K1 = tl.where(most_K1 < float("inf"), tl.div_rn(most_K1, 127.0), float("nan"))
    tl.store(scale_ptr_K1, scale_K1, mask=live_K1)
    whole_K1 = (most_K1 > 0) & (most_K1 < float("inf"))
    x_KD = tl.div_rn(tl.where(whole_K1, x_KD, 0.0), tl.where(whole_K1, most_K1, 1.0)) * 127.0
    return (x_KD + 12582912.0 - 12582912.0).to(tl.int8)   # 1.5 * 2^23: float32 has no digits behind the point there


@jit
def _write_kv_kernel(k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, k_stride, v_stride,
                     head_stride, K: tl.constexpr, K_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """One token's K and V, all heads, into its slot; slot -1, of an idle request, is nowhere."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t)
    if slot >= 0:
        h, d = tl.arange(0, K_PAD).to(tl.int64)[:, None], tl.arange(0, D_PAD)[None, :]
        live = (h < K) & (d < D)
        to = h * head_stride + slot * D + d
        k_KD = tl.load(k_ptr + t * k_stride + h * D + d, mask=live)
        if k_scale_ptr is not None:
            k_KD = _quantize(k_KD, live, k_scale_ptr + h * (head_stride // D) + slot, h < K)
        tl.store(k_pool_ptr + to, k_KD, mask=live)
        if v_ptr is not None:
            v_KD = tl.load(v_ptr + t * v_stride + h * D + d, mask=live)
            if v_scale_ptr is not None:
                v_KD = _quantize(v_KD, live, v_scale_ptr + h * (head_stride // D) + slot, h < K)
            tl.store(v_pool_ptr + to, v_KD, mask=live)


def attention_triton(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                     window: int | None = None, k_scale_KNS: Tensor | None = None,
                     v_scale_KNS: Tensor | None = None) -> Tensor:
    """Attention by the kernels above: one launch for the short chunks, one for the others.

    q_THD may be a view with a row stride of its own; heads and D must be contiguous.
    """
    load_triton()
    (_, H, D), (K, N, S, _), device = q_THD.shape, k_KNSD.shape, q_THD.device
    G, short = H // K, batch.once("short", lambda: [len(c.tokens) for c in batch.chunks if len(c.tokens) <= SHORT])
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=device)
    # tl.dot wants powers of two, and at least 16 of everything.
    shape = dict(S=S, H=H, G=G, D=D, D_PAD=max(16, triton.next_power_of_2(D)), WINDOW=window or 0)

    if short:
        longest, some = max(short), 4 * multiprocessors_of(device) // K   # splits that leave partial answers, at most
        options = decode_options(D, longest * G, q_THD.dtype)
        programs = K * triton.cdiv(longest * G, options["ROWS"])
        work = batch.table(("splits", window), lambda batch: share_out(batch, K, window, options["TILE"], device))
        o, m, l, arrived = batch.once("partial answers", lambda: (
            torch.empty(some, longest, H, D, device=device), *torch.empty(2, some, longest, H, device=device),
            torch.zeros(len(batch.chunks) * programs, dtype=torch.int32, device=device)))
        _decode_kernel[(len(work), programs)](
            q_THD, out_THD, o, m, l, arrived, k_KNSD, v_KNSD, k_scale_KNS, v_scale_KNS, batch.block_tables_UM,
            batch.query_starts, batch.kv_lens, work, q_THD.stride(0), N * S * D, longest, scale * LOG2E,
            **shape, **options)
    if len(short) < len(batch.chunks):
        options = prefill_options(D, G, q_THD.dtype, capability_of(device))
        work = batch.table("prompts", lambda batch: cut_prompts(batch, options["ROWS"] // G))
        _prefill_kernel[(len(work), K)](
            q_THD, out_THD, k_KNSD, v_KNSD, k_scale_KNS, v_scale_KNS, batch.block_tables_UM, batch.query_starts,
            batch.kv_lens, work, q_THD.stride(0), N * S * D, scale * LOG2E, **shape, **options)
    return out_THD


def prefill_options(D: int, G: int, dtype: torch.dtype, capability: int) -> dict:
    """Tile and launch shape of prefill: about as large as registers hold (see `bench.py kernels`)."""
    least = triton.next_power_of_2(G)
    if INTERPRETED:                          # small, so that short tests see many tiles
        return dict(ROWS=max(32, least), TILE=32)
    if dtype == torch.float32:               # no matrix units: all products pass through registers
        return dict(ROWS=max(32, least), TILE=16, num_warps=8, num_stages=2)
    if D > 128:                              # o_RD alone takes ROWS * D registers
        return dict(ROWS=max(64, least), TILE=32, num_warps=8, num_stages=3)
    direct = capability // 10 in (9, 10)     # matrix units that read shared memory; others want K and V in registers
    return dict(ROWS=max(128, least), TILE=64 if direct or D <= 64 else 32, num_warps=8, num_stages=PIPELINE)


def decode_options(D: int, rows: int, dtype: torch.dtype) -> dict:
    """Tile and launch shape for short chunks of so many query rows: at most 16 KiB of K a tile, and registers few
    enough to fit several programs. More rows than fit are served by several programs, which read the same keys."""
    ROWS, D = (max(16, triton.next_power_of_2(x)) for x in (rows, D))
    if INTERPRETED:
        return dict(ROWS=min(32, ROWS), TILE=32)
    ROWS = min(16 if dtype == torch.float32 else 8192 // D, ROWS)   # float32 has no matrix units
    return dict(ROWS=ROWS, TILE=min(64, 16384 // (D * dtype.itemsize)), num_stages=PIPELINE,
                num_warps=8 if ROWS * D > 4096 else 4)


@cache
def capability_of(device: torch.device) -> int:
    """80 for sm_80 and so on; 90 where there is no GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@cache
def multiprocessors_of(device: torch.device) -> int:
    """How many programs make a GPU busy; where there is none, a few, so that tests see splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def share_out(batch: Batch, K: int, window: int | None, TILE: int, device: torch.device) -> list[tuple[int, ...]]:
    """The step's short chunks, cut into splits. A row per split: request, where its block table begins, start and stop
    of its keys, its request's first split and number of splits.

    All tiles of keys of all chunks are shared out over two programs per multiprocessor, of which one computes while
    the other waits for memory: a long request gets many splits, a large batch of short ones gets one each. With 4
    multiprocessors, K = 2 and requests of 10 and 3 tiles that is 13 * 2 tiles for 8 programs, 4 tiles a split: the
    requests get 3 splits (of 3, 3 and 4 tiles) and 1, for both KV heads 8 programs. No batch size changes the rule, as
    it says little about the work: eight requests of 100 keys and eight of 100,000 are both eight.

    A graph needs as many rows in every step of so many requests, so rows of nobody (-1) fill the list up to the most
    that there can be, here 8 / 2 + 2 = 6. If every split were full, there would be tiles / per_split of them, which is
    2 * processors / K at most. Each request has one that is not full, so the rest is one for each. Requests of several
    splits come first: only they leave partial answers, 4 * processors / K at most.
    """
    requests = [b for b, chunk in enumerate(batch.chunks) if len(chunk.tokens) <= SHORT]
    begins = [first_key(batch, b, window) // TILE * TILE for b in requests]
    tiles = [-(-(batch.lens[b] - begin) // TILE) for b, begin in zip(requests, begins)]
    programs, work = 2 * multiprocessors_of(device), []
    per_split = max(1, -(-sum(tiles) * K // programs))
    for b, begin, count in sorted(zip(requests, begins, tiles), key=lambda request: request[2] <= per_split):
        splits = max(1, -(-count // per_split))   # an idle request has no tile: its split writes zeros
        cuts = [begin + TILE * (count * i // splits) for i in range(splits)] + [batch.lens[b]]
        table = batch.chunks[b].row * batch.block_tables_UM.shape[1]
        work += [(b, table, *cuts[i:i + 2], len(work), splits) for i in range(splits)]
    return work + [(-1, 0, 0, 0, 0, 0)] * (programs // K + len(requests) - len(work))


def cut_prompts(batch: Batch, tokens_per_tile: int) -> list[tuple[int, ...]]:
    """The tiles of query rows of the step's longer chunks: request, where its block table begins, first token. Those
    that see most keys come first: the others fill the gaps that they leave."""
    work = []
    for b, chunk in enumerate(batch.chunks):
        table, n = chunk.row * batch.block_tables_UM.shape[1], len(chunk.tokens)
        work += [(chunk.start + first, b, table, first) for first in range(0, n * (n > SHORT), tokens_per_tile)]
    return [tile for _, *tile in sorted(work, reverse=True)]


def write_kv_triton(k_TKD: Tensor, v_TKD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, slots_T: Tensor,
                    k_scale_KNS: Tensor | None = None, v_scale_KNS: Tensor | None = None):
    """Put the step's K and V into their slots of the pool."""
    load_triton()
    (T, K, D), (_, N, S, _) = k_TKD.shape, k_KNSD.shape
    _write_kv_kernel[(T,)](k_TKD, v_TKD, k_KNSD, v_KNSD, k_scale_KNS, v_scale_KNS, slots_T, k_TKD.stride(0),
                           0 if v_TKD is None else v_TKD.stride(0), N * S * D, K, triton.next_power_of_2(K), D,
                           triton.next_power_of_2(D))


# ---------------------------------------------------------------------------------------------
# Choosing one

ATTENTION = {"naive": attention_naive, "torch": attention_torch, "triton": attention_triton}
WRITE_KV = {"naive": write_kv_torch, "torch": write_kv_torch, "triton": write_kv_triton}


def check(backend: str, device: torch.device, dtype: torch.dtype, H: int, K: int, D: int):
    """Refuse by name, before anything runs, what a backend cannot do. Raises ValueError."""
    if backend not in ATTENTION:
        raise ValueError(f"unknown attention {backend!r}: choose auto, {', '.join(ATTENTION)}")
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} KV heads evenly")
    if not 1 <= D <= 256:
        raise ValueError(f"head size {D} is not supported: it must be 256 at most")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{dtype} is not supported: use float32, float16 or bfloat16")
    if backend != "triton":
        return
    if load_triton() is None:
        raise ValueError("attention='triton' needs the triton package, which is not installed: use attention='torch'")
    if capability_of(device) < 80:
        raise ValueError("attention='triton' needs a GPU of compute capability 8.0 or more: use attention='torch'")
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 128 << 10
    tile = triton.next_power_of_2(H // K) * max(16, triton.next_power_of_2(D)) * dtype.itemsize
    if tile > (65536 if large else 16384) and not INTERPRETED:
        raise ValueError(f"{H // K} query heads of size {D} per KV head do not fit into a tile of {dtype}: "
                         "use attention='torch'")
    if INTERPRETED and dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: use float32, float16 or attention='torch'")
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("attention='triton' on a CPU needs TRITON_INTERPRET=1, set before anything imports triton")
