"""Attention over paged KV: the same math in two regimes.

Attention is written three times here, with one signature: naive (the definition), torch (any
device) and Triton (GPUs, or Triton's interpreter on a CPU). All three read K and V through block
tables, for a ragged batch in which every request brings some query tokens and a longer past.

The idea is online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). One query
q meets its keys a tile at a time and keeps three running values, so the T x T scores never exist:

    m' = max(m, max_j s_j)              s_j = scale * q.k_j     the largest score so far
    a  = exp(m - m')                                            what the old sums are worth now
    l  = a * l + sum_j exp(s_j - m')                            the softmax's denominator
    o  = a * o + sum_j exp(s_j - m') v_j                        its numerator
    ...
    answer = o / l

The two regimes. Prefill brings many query rows of a request, and each KV tile fetched is used by
all of them: arithmetic is the limit. Decode brings one row, so every byte of K and V is used once:
memory bandwidth is the limit, and one row cannot fill a machine, so its keys are cut into splits
that run side by side. Two partial answers merge by the same recurrence: that is why (o, m, l) is
all that a split needs to leave behind.

Layout: k_KNSD holds K heads of N blocks of S token slots, so one block of one head is one
contiguous piece of memory. Token t of a request lives in block block_table[t // S], slot t % S.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before its first import.
if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
try:
    import triton
    import triton.language as tl
    jit, INTERPRETED = triton.jit, not isinstance(tl.zeros, triton.JITFunction)
except ImportError:  # no Triton for this platform (macOS): everything but attention="triton" works
    triton, jit, INTERPRETED = None, lambda function: function, False


# ---------------------------------------------------------------------------------------------
# What one step looks like to the model and the kernels

class Chunk(NamedTuple):
    """Consecutive tokens of one request: a prompt, a piece of one, or the one token of a decode."""
    tokens: list[int]
    start: int          # position of tokens[0] in its request
    blocks: list[int]   # the request's block table, covering at least start + len(tokens) tokens
    logits: int = 1     # so many of the last tokens want logits


@dataclass
class Batch:
    """The chunks of one step, flattened to T tokens of B requests. Build it with `make_batch`.

    Requests with a single query token come first: these `num_decodes` go to the decode kernel, the
    rest to the prefill kernel, so a mixed step takes one launch of each.
    """
    tokens_T: Tensor           # int64, token ids
    positions_T: Tensor        # int64, each token's position in its request
    slots_T: Tensor            # int64, where its K and V go: block * S + offset
    block_tables_BM: Tensor    # int32, each request's blocks, padded with 0
    query_starts: Tensor       # int32 [B + 1], request b owns rows query_starts[b]:query_starts[b + 1]
    kv_lens: Tensor            # int32 [B], tokens that request b can look back on, its chunk included
    logit_rows: Tensor         # int64, the rows whose logits are wanted, request by request
    rows: list[slice]          # query_starts, for Python
    lens: list[int]            # kv_lens, for Python
    num_decodes: int
    plans: dict = field(default_factory=dict)  # what a launcher worked out once for all layers


def make_batch(chunks: list[Chunk], block_size: int, device: torch.device | str = "cpu") -> Batch:
    """Flatten chunks into the index tensors of one step; decodes must come before longer chunks."""
    S = block_size
    tokens, positions, slots, logit_rows, rows, lens = [], [], [], [], [], []
    for tokens_, start, blocks, logits in chunks:
        stop = start + len(tokens_)
        rows.append(slice(len(tokens), len(tokens) + len(tokens_)))
        logit_rows += range(rows[-1].stop - logits, rows[-1].stop)
        tokens += tokens_
        positions += range(start, stop)
        slots += [blocks[t // S] * S + t % S for t in range(start, stop)]
        lens.append(stop)
    num_decodes = next((i for i, c in enumerate(chunks) if len(c.tokens) > 1), len(chunks))
    assert all(len(c.tokens) > 1 for c in chunks[num_decodes:]), "decodes come first"
    width = max(len(c.blocks) for c in chunks)
    tables = [c.blocks + [0] * (width - len(c.blocks)) for c in chunks]

    def put(values, dtype):
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return Batch(put(tokens, torch.int64), put(positions, torch.int64), put(slots, torch.int64),
                 put(tables, torch.int32), put([0] + [r.stop for r in rows], torch.int32),
                 put(lens, torch.int32), put(logit_rows, torch.int64), rows, lens, num_decodes)


# ---------------------------------------------------------------------------------------------
# The definition

def attention_naive(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                    window: int | None = None) -> Tensor:
    """softmax(scale * q k^T + mask) v in float64, one request and one head at a time; [T, H, D].

    A query at position p sees keys at positions (p - window, p]; query head h uses KV head
    h // G. This is what the other two must equal.
    """
    out_THD = torch.empty_like(q_THD)
    G = q_THD.shape[1] // k_KNSD.shape[0]
    for rows, kv_len, table in zip(batch.rows, batch.lens, batch.block_tables_BM.long()):
        distance = batch.positions_T[rows, None] - torch.arange(kv_len, device=q_THD.device)
        seen = (distance >= 0) & (distance < (window or kv_len))
        for h in range(q_THD.shape[1]):
            k_TD = k_KNSD[h // G, table].flatten(0, 1)[:kv_len].double()
            v_TD = v_KNSD[h // G, table].flatten(0, 1)[:kv_len].double()
            scores = q_THD[rows, h].double() @ k_TD.T * scale
            out_THD[rows, h] = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_TD).to(out_THD)
    return out_THD


def write_kv_torch(k_TKD: Tensor, v_TKD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, slots_T: Tensor):
    """Put the step's K and V into their slots of the pool."""
    k_KNSD.flatten(1, 2)[:, slots_T] = k_TKD.transpose(0, 1)
    v_KNSD.flatten(1, 2)[:, slots_T] = v_TKD.transpose(0, 1)


# ---------------------------------------------------------------------------------------------
# PyTorch, any device

def attention_torch(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                    window: int | None = None) -> Tensor:
    """Attention from PyTorch's own parts: decodes as one padded product, prefills one by one.

    Wins: runs anywhere and needs no compiler. Loses: gathers K and V into a contiguous copy first,
    which triples the bytes moved, and pads every decode to the longest.
    """
    out_THD = torch.empty_like(q_THD)
    n, K, S = batch.num_decodes, *k_KNSD.shape[::2][:2]
    if n:
        out_THD[:n] = _decode_torch(q_THD[:n], k_KNSD, v_KNSD, batch, scale, window)
    for rows, kv_len, table in zip(batch.rows[n:], batch.lens[n:], batch.block_tables_BM[n:]):
        q_KGTD = q_THD[rows].unflatten(1, (K, -1)).permute(1, 2, 0, 3)
        first = kv_len - q_KGTD.shape[2]                       # position of the chunk's first query
        begin = max(0, first - window + 1) // S * S if window else 0   # the first key it can see
        blocks = table[begin // S:(kv_len - 1) // S + 1]
        k_K1TD, v_K1TD = (pool[:, blocks].flatten(1, 2)[:, None, :kv_len - begin]
                          for pool in (k_KNSD, v_KNSD))
        seen = None                                            # None: SDPA's own causal mask will do
        if first > 0 or window:
            distance = batch.positions_T[rows, None] - torch.arange(begin, kv_len, device=q_THD.device)
            seen = (distance >= 0) & (distance < (window or kv_len))
        o_KGTD = scaled_dot_product_attention(
            q_KGTD, k_K1TD.expand(-1, q_KGTD.shape[1], -1, -1), v_K1TD.expand(-1, q_KGTD.shape[1], -1, -1),
            attn_mask=seen, is_causal=seen is None, scale=scale)
        out_THD[rows] = o_KGTD.permute(2, 0, 1, 3).flatten(1, 2)
    return out_THD


def _decode_torch(q_BHD, k_KNSD, v_KNSD, batch, scale, window):
    """One query row per request against all of its keys, every request padded to the longest."""
    tables_BM = batch.block_tables_BM[:q_BHD.shape[0]]
    k_KBTD = k_KNSD[:, tables_BM].flatten(2, 3)
    v_KBTD = v_KNSD[:, tables_BM].flatten(2, 3)
    q_KBGD = q_BHD.unflatten(1, (k_KNSD.shape[0], -1)).transpose(0, 1)
    distance_BT = batch.positions_T[:len(q_BHD), None] - torch.arange(k_KBTD.shape[2], device=q_BHD.device)
    seen_BT = (distance_BT >= 0) & (distance_BT < (window or k_KBTD.shape[2]))
    scores_KBGT = (q_KBGD @ k_KBTD.mT).float() * scale
    weights = scores_KBGT.masked_fill(~seen_BT[None, :, None], -torch.inf).softmax(-1)
    v_KBTD = v_KBTD.masked_fill(~seen_BT[None, :, :, None], 0)  # 0 * NaN is NaN: slots nobody owns may hold anything
    return (weights.to(q_BHD.dtype) @ v_KBTD).transpose(0, 1).flatten(1, 2)


# ---------------------------------------------------------------------------------------------
# Triton

LOG2_E = 1.4426950408889634   # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
TILE = 32 if INTERPRETED else 64   # KV tokens per tile; small in the interpreter, so that tests see many
PREFILL_ROWS = 32 if INTERPRETED else 64   # query rows (tokens x heads of one KV head) per program


@jit
def _sweep(q_RD, k_ptr, v_ptr, table_ptr, position_R, start, stop, scale,
           S: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Online softmax of R query rows over the keys [start, stop) of one KV head of one request.

    The whole of paging is `slot`: which slot of the pool holds the key at this position.
    Returns the unnormalised o_RD, and m_R, l_R (in powers of two), all float32.
    """
    d = tl.arange(0, q_RD.shape[1])
    m_R = tl.full([q_RD.shape[0]], float("-inf"), tl.float32)
    l_R = tl.zeros([q_RD.shape[0]], tl.float32)
    o_RD = tl.zeros(q_RD.shape, tl.float32)
    for tile in range(start, stop, TILE):
        key = tile + tl.arange(0, TILE)
        slot = tl.load(table_ptr + key // S, mask=key < stop, other=0).to(tl.int64) * S + key % S
        live_DT = (d < D)[:, None] & (key < stop)[None, :]
        k_DT = tl.load(k_ptr + slot[None, :] * D + d[:, None], mask=live_DT, other=0.0)
        s_RT = tl.dot(q_RD, k_DT, input_precision="ieee") * scale
        seen_RT = (key[None, :] <= position_R[:, None]) & (key < stop)[None, :]
        if WINDOW > 0:
            seen_RT = seen_RT & (key[None, :] > position_R[:, None] - WINDOW)
        s_RT = tl.where(seen_RT, s_RT, float("-inf"))

        m_new = tl.maximum(m_R, tl.max(s_RT, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)   # a row that has seen no key yet: -inf - -inf is NaN
        p_RT = tl.exp2(s_RT - m_safe[:, None])
        rescale = tl.exp2(m_R - m_safe)
        v_TD = tl.load(v_ptr + slot[:, None] * D + d[None, :], mask=tl.trans(live_DT), other=0.0)
        l_R = l_R * rescale + tl.sum(p_RT, 1)
        o_RD = o_RD * rescale[:, None] + tl.dot(p_RT.to(v_TD.dtype), v_TD, input_precision="ieee")
        m_R = m_new
    return o_RD, m_R, l_R


@jit
def _prefill_kernel(q_ptr, out_ptr, k_ptr, v_ptr, tables_ptr, query_starts_ptr, kv_lens_ptr, tiles_ptr,
                    q_stride, table_stride, head_stride, scale,
                    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """A tile of query rows against every key they may see, and no other tile of keys.

    Rows: ROWS // G tokens times the G query heads that share this KV head, so K and V are read once
    for all of them. Operations: 4 * rows * keys * D; bytes: 2 * keys * D per tile of rows, so the
    intensity is about ROWS operations per byte (2-byte types) and arithmetic is the bound.
    """
    b = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)      # the tile's first token, within the chunk
    kv_head = tl.program_id(1).to(tl.int64)
    row_start = tl.load(query_starts_ptr + b)
    q_len = tl.load(query_starts_ptr + b + 1) - row_start
    past = tl.load(kv_lens_ptr + b) - q_len                    # tokens before the chunk

    row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    token = first + row // G
    live_RD = ((row < ROWS // G * G) & (token < q_len))[:, None] & (d < D)[None, :]
    index_R = (row_start + token).to(tl.int64)
    column_R = kv_head * G * D + row % G * D
    q_RD = tl.load(q_ptr + (index_R * q_stride + column_R)[:, None] + d[None, :], mask=live_RD, other=0.0)

    stop = past + tl.minimum(first + ROWS // G, q_len)         # tiles above the diagonal are not visited
    start = 0
    if WINDOW > 0:                                             # nor are tiles behind the window
        start = tl.maximum(0, past + first - WINDOW + 1)
    o_RD, m_R, l_R = _sweep(q_RD, k_ptr + kv_head * head_stride, v_ptr + kv_head * head_stride,
                            tables_ptr + b * table_stride, past + token, start, stop, scale,
                            S, D, TILE, WINDOW)
    tl.store(out_ptr + (index_R * H * D + column_R)[:, None] + d[None, :],
             (o_RD / tl.where(l_R > 0, l_R, 1.0)[:, None]).to(out_ptr.dtype.element_ty), mask=live_RD)


@jit
def _decode_kernel(q_ptr, o_ptr, m_ptr, l_ptr, k_ptr, v_ptr, tables_ptr, kv_lens_ptr,
                   q_stride, table_stride, head_stride, split_len, num_splits, scale,
                   S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                   ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """One split of one request's keys for the G query heads of one KV head.

    Operations: 4 * G * keys * D; bytes: 2 * keys * D elements, each used once: G operations per
    byte, so bandwidth is the bound and the matrix units may idle. Splits keep all of the machine busy.
    """
    b, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    kv_len = tl.load(kv_lens_ptr + b)
    begin = tl.maximum(0, kv_len - WINDOW) if WINDOW > 0 else 0
    start = begin + split * split_len
    if start < kv_len:
        row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
        head = kv_head * G + row
        live_RD = (row < G)[:, None] & (d < D)[None, :]
        q_RD = tl.load(q_ptr + b.to(tl.int64) * q_stride + head[:, None] * D + d[None, :], mask=live_RD, other=0.0)
        o_RD, m_R, l_R = _sweep(q_RD, k_ptr + kv_head * head_stride, v_ptr + kv_head * head_stride,
                                tables_ptr + b * table_stride, tl.zeros([ROWS], tl.int32) + kv_len - 1,
                                start, tl.minimum(kv_len, start + split_len), scale, S, D, TILE, WINDOW)
        part = (b * H + head) * num_splits + split
        tl.store(o_ptr + part[:, None] * D + d[None, :], o_RD, mask=live_RD)
        tl.store(m_ptr + part, m_R, mask=row < G)
        tl.store(l_ptr + part, l_R, mask=row < G)


@jit
def _merge_kernel(o_ptr, m_ptr, l_ptr, out_ptr, kv_lens_ptr, split_len, num_splits,
                  H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WINDOW: tl.constexpr):
    """Online softmax once more, over the splits of one request and head instead of over keys."""
    b, h, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D_PAD)
    kv_len = tl.load(kv_lens_ptr + b)
    keys = tl.minimum(kv_len, WINDOW) if WINDOW > 0 else kv_len
    first = (b * H + h).to(tl.int64) * num_splits
    m = tl.load(m_ptr + first)
    l = tl.load(l_ptr + first)
    o_D = tl.load(o_ptr + first * D + d, mask=d < D)
    for part in range(first + 1, first + tl.cdiv(keys, split_len)):
        m_part = tl.load(m_ptr + part)
        m_new = tl.maximum(m, m_part)
        old, new = tl.exp2(m - m_new), tl.exp2(m_part - m_new)
        l = l * old + tl.load(l_ptr + part) * new
        o_D = o_D * old + tl.load(o_ptr + part * D + d, mask=d < D) * new
        m = m_new
    tl.store(out_ptr + (b * H + h).to(tl.int64) * D + d, (o_D / l).to(out_ptr.dtype.element_ty), mask=d < D)


@jit
def _write_kv_kernel(k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, slots_ptr, k_stride, v_stride, head_stride,
                     D: tl.constexpr, D_PAD: tl.constexpr):
    """One token's K and V of one head into its slot."""
    t, kv_head, d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, D_PAD)
    to = kv_head * head_stride + tl.load(slots_ptr + t) * D + d
    tl.store(k_pool_ptr + to, tl.load(k_ptr + t * k_stride + kv_head * D + d, mask=d < D), mask=d < D)
    tl.store(v_pool_ptr + to, tl.load(v_ptr + t * v_stride + kv_head * D + d, mask=d < D), mask=d < D)


def attention_triton(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                     window: int | None = None) -> Tensor:
    """Attention by the kernels above: one launch for the decodes (and its merge), one for the rest.

    q_THD may be a view with a row stride of its own; heads and D must be contiguous.
    """
    (T, H, D), (K, N, S, _) = q_THD.shape, k_KNSD.shape
    G, n = H // K, batch.num_decodes
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    # tl.dot wants powers of two, and at least 16 of everything.
    shape = dict(S=S, H=H, G=G, D=D, D_PAD=max(16, triton.next_power_of_2(D)), TILE=TILE, WINDOW=window or 0)
    strides = q_THD.stride(0), batch.block_tables_BM.stride(0), N * S * D

    if n:
        split_len, num_splits = _plan_splits(batch, K, window, q_THD.device)
        o = torch.empty(n, H, num_splits, D, dtype=torch.float32, device=q_THD.device)
        m, l = torch.empty(2, n, H, num_splits, dtype=torch.float32, device=q_THD.device)
        _decode_kernel[(n, K, num_splits)](
            q_THD, o, m, l, k_KNSD, v_KNSD, batch.block_tables_BM, batch.kv_lens, *strides,
            split_len, num_splits, scale * LOG2_E, **shape, ROWS=max(16, triton.next_power_of_2(G)))
        _merge_kernel[(n, H)](o, m, l, out_THD, batch.kv_lens, split_len, num_splits,
                              H, D, shape["D_PAD"], shape["WINDOW"])
    if n < len(batch.rows):
        ROWS = max(PREFILL_ROWS, triton.next_power_of_2(G))
        tiles = _plan_tiles(batch, ROWS // G, q_THD.device)
        _prefill_kernel[(len(tiles), K)](
            q_THD, out_THD, k_KNSD, v_KNSD, batch.block_tables_BM, batch.query_starts, batch.kv_lens, tiles,
            *strides, scale * LOG2_E, **shape, ROWS=ROWS)
    return out_THD


def _plan_splits(batch: Batch, K: int, window: int | None, device) -> tuple[int, int]:
    """Keys per split, and splits of the longest request: from the work and the number of multiprocessors.

    All keys of all decodes are shared out evenly over two programs per multiprocessor, so a long
    request is cut into many splits, and a large batch of short ones is not cut at all.
    """
    if ("splits", window) not in batch.plans:
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        keys = [min(length, window or length) for length in batch.lens[:batch.num_decodes]]
        split_len = TILE * max(1, -(-sum(keys) * K // (2 * processors * TILE)))
        batch.plans["splits", window] = split_len, -(-max(keys) // split_len)
    return batch.plans["splits", window]


def _plan_tiles(batch: Batch, tokens: int, device) -> Tensor:
    """int32 [tiles, 2]: the request and first token of every tile of query rows in the step."""
    if "tiles" not in batch.plans:
        batch.plans["tiles"] = torch.tensor(
            [(b, first) for b in range(batch.num_decodes, len(batch.rows))
             for first in range(0, batch.rows[b].stop - batch.rows[b].start, tokens)],
            dtype=torch.int32).to(device, non_blocking=True)
    return batch.plans["tiles"]


def write_kv_triton(k_TKD: Tensor, v_TKD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, slots_T: Tensor):
    """Put the step's K and V into their slots of the pool."""
    (T, K, D), (_, N, S, _) = k_TKD.shape, k_KNSD.shape
    _write_kv_kernel[(T, K)](k_TKD, v_TKD, k_KNSD, v_KNSD, slots_T, k_TKD.stride(0), v_TKD.stride(0),
                             N * S * D, D, triton.next_power_of_2(D))


# ---------------------------------------------------------------------------------------------
# Choosing one

ATTENTION = {"naive": attention_naive, "torch": attention_torch, "triton": attention_triton}
WRITE_KV = {"naive": write_kv_torch, "torch": write_kv_torch, "triton": write_kv_triton}


def check(backend: str, device: torch.device, dtype: torch.dtype, H: int, K: int, D: int, S: int):
    """Refuse by name, before anything runs, what a backend cannot do. Raises ValueError."""
    if backend not in ATTENTION:
        raise ValueError(f"unknown attention {backend!r}: choose auto, {', '.join(ATTENTION)}")
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} KV heads evenly")
    if not 8 <= D <= 256:
        raise ValueError(f"head size {D} is not supported: it must be 8 to 256")
    if S < 1:
        raise ValueError(f"block size {S} is not supported: it must be at least 1")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{dtype} is not supported: use float32, float16 or bfloat16")
    if backend != "triton":
        return
    if triton is None:
        raise ValueError("attention='triton' needs the triton package, which is not installed: use attention='torch'")
    if INTERPRETED and dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16, "
                         "or attention='torch'")
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("attention='triton' on a CPU needs Triton's interpreter: set TRITON_INTERPRET=1 "
                         "before anything imports triton")
