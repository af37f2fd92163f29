"""Attention over paged KV: the same math in two regimes. (Read paged_kv.py first; next comes model.py.)

Attention is written three times here, with one signature: naive (the definition), torch (any
device) and Triton (GPUs, or Triton's interpreter on a CPU). All three read K and V through block
tables, for a ragged batch in which every request brings some query tokens and a longer past.

The idea is online softmax, in seven lines above `_sweep`: queries meet their keys a tile at a time, so
the T x T scores never exist.

The two regimes. Prefill runs the tokens of a prompt, many at once; decode runs the one token that was sampled
last. A query row is one query head of one token, and the G query heads that share a KV head share its keys:

    prefill    R rows, tokens x G     4 R D operations per key    2 D numbers, 4 D bytes    R operations per byte
    decode     G rows, 1 token x G    4 G D operations per key    2 D numbers, 4 D bytes    G operations per byte

An H100 does 295 operations in the time of a byte (`python bench.py estimate --hardware h100`): prefill, with
the hundreds of rows of a chunk, is bound by arithmetic, decode by bandwidth. (A tile holds 128 rows at a time;
its neighbours find the same keys in the L2 cache.) Decode has another trouble: a few rows cannot fill a machine.
So its keys are cut into splits that run side by side, and merge by the recurrence of online softmax: its three
running values are all that a split leaves behind.

Nobody keeps q, by the way: a later token asks with its own query, and needs only keys and values.

Layout: k_KNSD holds K heads of N blocks of S slots, so one block of one head is one contiguous piece of
memory. Token t of a request lives in slot block_table[t // S] * S + t % S. "The dog" of paged_kv.py, about
to run its token 2 (" sat", 479), is Chunk([479], start=2, blocks=[3, 4]): a decode. It writes K and V to
slot 4 * 2 + 0 = 8 and reads slots 6, 7 and 8.
"""

from __future__ import annotations

import itertools
import os
import sys
from array import array
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before anybody imports Triton.
if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
triton = tl = LOG2E = INTERPRETED = None   # until `load_triton`
KERNELS = []


def jit(function):
    """Mark a function for triton.jit, which takes a while to import and waits until a kernel is wanted."""
    KERNELS.append(function)
    return function


@cache
def load_triton():
    """Import Triton and make kernels of the functions marked @jit. None if there is no Triton for this platform
    (macOS): everything but attention="triton" works."""
    global triton, tl, LOG2E, INTERPRETED
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None
    LOG2E = tl.constexpr(1.4426950408889634)   # exp(x) = exp2(x * LOG2E), and exp2 is one instruction
    INTERPRETED = not isinstance(tl.zeros, triton.JITFunction)
    for function in KERNELS:   # index tensors are views at any offset: that must not compile a kernel anew
        globals()[function.__name__] = triton.jit(
            function, do_not_specialize_on_alignment=[
                "tables_ptr", "query_starts_ptr", "kv_lens_ptr", "slots_ptr", "slopes_ptr"])
    return triton


# ---------------------------------------------------------------------------------------------
# What one step looks like to the model and the kernels

@dataclass(slots=True)
class Chunk:
    """Consecutive tokens of one request: a prompt, a piece of one, or the one token of a decode."""
    tokens: list[int]
    start: int          # position of tokens[0] in its request
    blocks: list[int]   # the request's block table, covering at least start + len(tokens) tokens
    logits: int = 1     # how many of its last tokens want logits
    row: int = 0        # where the device holds that block table, among all of them


@dataclass
class Batch:
    """The chunks of one step, flattened to T tokens of B requests. Build it with `make_batch`.

    Requests with a single query token come first, be it sampled or a piece of a prompt: in Triton these
    `num_decodes` go to the decode kernel and the others to the prefill kernel, so a mixed step takes one
    launch of each per layer. All tensors are int64 views of `memory`, which reaches the device in one transfer.
    """
    memory: Tensor
    tokens_T: Tensor           # token ids
    positions_T: Tensor        # each token's position in its request
    slots_T: Tensor            # where its K and V go: block * S + offset; -1: nowhere
    query_starts: Tensor       # [B + 1], request b owns rows query_starts[b]:query_starts[b + 1]
    kv_lens: Tensor            # [B], tokens that request b can look back on, its chunk included
    table_rows: Tensor         # [B], request b has block table block_tables_UM[table_rows[b]]
    logit_rows: Tensor         # the rows whose logits are wanted, request by request
    block_tables_UM: Tensor    # on the device, whoever runs in this step; what lies behind a table's end is not read
    chunks: list[Chunk]
    starts: list[int]          # query_starts, for Python
    lens: list[int]            # kv_lens, for Python
    num_decodes: int
    plans: dict = field(default_factory=dict)  # what a launcher worked out once for all layers


def make_batch(chunks: list[Chunk], block_size: int, device: torch.device | str = "cpu",
               block_tables_UM: Tensor | None = None) -> Batch:
    """Flatten chunks into the index tensors of one step; decodes must come before longer chunks.

    block_tables_UM: the tables as the device holds them (chunk.row says where); None: they are made from chunk.blocks.
    """
    if block_tables_UM is None:
        tables = [chunk.blocks for chunk in chunks]
        width = max(1, *map(len, tables))
        block_tables_UM = torch.tensor([table + [0] * (width - len(table)) for table in tables]).to(device)
        chunks = [replace(chunk, row=row) for row, chunk in enumerate(chunks)]
    S, n = block_size, sum(len(chunk.tokens) == 1 for chunk in chunks)
    decodes, prompts = chunks[:n], chunks[n:]
    assert all(len(chunk.tokens) > 1 for chunk in prompts), "decodes come first"
    tokens = [chunk.tokens[0] for chunk in decodes]
    positions = [chunk.start for chunk in decodes]
    slots = [chunk.blocks[t // S] * S + t % S if chunk.blocks else -1 for chunk, t in zip(decodes, positions)]
    logit_rows = [row for row, chunk in enumerate(decodes) if chunk.logits]
    lens = [chunk.start + 1 if chunk.blocks else 0 for chunk in decodes]
    starts = list(range(n + 1))
    for chunk in prompts:
        lens.append(chunk.start + len(chunk.tokens))
        tokens += chunk.tokens
        positions += range(chunk.start, lens[-1])
        slots += [chunk.blocks[t // S] * S + t % S for t in range(chunk.start, lens[-1])]
        logit_rows += range(len(tokens) - chunk.logits, len(tokens))
        starts.append(len(tokens))
    parts = tokens, positions, slots, starts, lens, [chunk.row for chunk in chunks], logit_rows
    memory = torch.frombuffer(array("q", sum(parts, [])), dtype=torch.int64).to(device)
    return Batch(memory, *memory.split(list(map(len, parts))), block_tables_UM, chunks, starts, lens, n)


PADDING = Chunk([0], 0, [])   # a request that owns nothing and writes nowhere, to fill up a CUDA graph


# ---------------------------------------------------------------------------------------------
# The definition

def attention_naive(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                    window: int | None = None, slopes_H: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v in float64, one request and one head at a time; [T, H, D].

    A query at position p sees keys at positions (p - window, p]; query head h uses KV head h // G, and
    with slopes (ALiBi, Press et al. 2022) loses slopes[h] per token of distance; no family in model.py
    has them. scale > 0. This is what the other two must equal.
    """
    out_THD = torch.empty_like(q_THD)
    G = q_THD.shape[1] // k_KNSD.shape[0]
    for b, kv_len in enumerate(batch.lens):
        rows = slice(batch.starts[b], batch.starts[b + 1])
        table = batch.block_tables_UM[batch.chunks[b].row, :-(-kv_len // k_KNSD.shape[2])]
        distance = batch.positions_T[rows, None] - torch.arange(kv_len, device=q_THD.device)
        seen = (distance >= 0) & (distance < (window or kv_len))
        for h in range(q_THD.shape[1]):
            k_TD = k_KNSD[h // G, table].flatten(0, 1)[:kv_len].double()
            v_TD = v_KNSD[h // G, table].flatten(0, 1)[:kv_len].double()
            scores = q_THD[rows, h].double() @ k_TD.T * scale
            if slopes_H is not None:
                scores -= slopes_H[h].double() * distance
            out_THD[rows, h] = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_TD).to(out_THD)
    return out_THD


def write_kv_torch(k_TKD: Tensor, v_TKD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, slots_T: Tensor):
    """Put the step's K and V into their slots of the pool."""
    k_KNSD.flatten(1, 2)[:, slots_T] = k_TKD.transpose(0, 1)
    v_KNSD.flatten(1, 2)[:, slots_T] = v_TKD.transpose(0, 1)


# ---------------------------------------------------------------------------------------------
# PyTorch, any device

def attention_torch(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                    window: int | None = None, slopes_H: Tensor | None = None) -> Tensor:
    """Attention by PyTorch's fused kernel, in few calls per layer.

    A decode is one row of queries per KV head, and what it costs is reading K and V once: where a request's blocks
    are neighbours they are one view [K, keys, D], read in place. A prefill is a call per chunk.
    """
    (_, H, D), K, outs = q_THD.shape, len(k_KNSD), []
    for keys in plan_torch(batch, k_KNSD, window, slopes_H):
        k_BKTD, v_BKTD = keys.take(k_KNSD, 0), keys.take(v_KNSD, 1)
        q_TKGD = q_THD[keys.rows].view(-1, K, H // K, D)
        if keys.decodes:    # B requests of one token: the G query heads that share a KV head are its rows
            o_TKGD = scaled_dot_product_attention(q_TKGD, k_BKTD, v_BKTD, keys.mask, scale=scale)
        else:               # B = 1, and every KV head is seen G times
            k_KGTD, v_KGTD = (x.transpose(0, 1).expand(-1, H // K, -1, -1) for x in (k_BKTD, v_BKTD))
            o_TKGD = scaled_dot_product_attention(q_TKGD.permute(1, 2, 0, 3), k_KGTD, v_KGTD, keys.mask, scale=scale,
                                                  is_causal=keys.mask is None).permute(2, 0, 1, 3)
        outs.append(o_TKGD.flatten(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class Keys(NamedTuple):
    """The keys that some requests of a step see, for one call."""
    rows: slice              # the requests' query rows
    decodes: bool            # one row each, else one request's chunk
    run: slice | None        # their slots in the pool, if these are neighbours
    slots_BKT: Tensor | None   # else: rows of the pool as [K * N * S, D]
    copies: Tensor | None    # [2, B * K * T, D], what K and V are then gathered into
    mask: Tensor | None      # added to the scores

    def take(self, pool_KNSD: Tensor, which: int) -> Tensor:
        """Their K or V, [B, K, T, D]."""
        K, N, S, D = pool_KNSD.shape
        if self.run:
            return pool_KNSD.view(1, K, -1, D)[:, :, self.run]
        torch.index_select(pool_KNSD.view(-1, D), 0, self.slots_BKT.view(-1), out=self.copies[which])
        return self.copies[which].view(*self.slots_BKT.shape, D)


IN_PLACE = 400_000   # bytes of K and V. To gather fewer takes less than the 15 us of a call of their own


def plan_torch(batch: Batch, k_KNSD: Tensor, window: int | None, slopes_H: Tensor | None) -> list[Keys]:
    """The calls that attend to the whole step, in the order of its rows; worked out once for all layers.

    A chunk has a call of its own, and so has a long decode whose blocks are neighbours. Other decodes share one
    with those beside them of about the same length: their keys are gathered, and padded to the longest.
    """
    if ("torch", window) in batch.plans:
        return batch.plans["torch", window]
    (K, N, S, D), device, n = k_KNSD.shape, k_KNSD.device, batch.num_decodes
    # The first key that each request sees, and how many.
    firsts = [max(0, chunk.start + 1 - window) if window else 0 for chunk in batch.chunks]
    counts = [stop - first for first, stop in zip(firsts, batch.lens)]

    def run(b: int) -> slice | None:
        """Its keys as a slice of the pool's slots, if its blocks are neighbours."""
        blocks, slot = batch.chunks[b].blocks[firsts[b] // S:-(-batch.lens[b] // S)], firsts[b] % S
        if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            return slice(blocks[0] * S + slot, blocks[0] * S + slot + counts[b])

    long, plan = IN_PLACE // (2 * K * D * k_KNSD.element_size()), []
    # Neighbours of equal kind share a call: a class of lengths (up to 127 keys, 255, 511, ...), or a kind of one's own.
    kinds = [-b if b >= n or count > long and run(b) else max(7, count.bit_length()) for b, count in enumerate(counts)]
    for _, (b, *others) in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        stop, decodes, slots_BKT, copies, mask = b + 1 + len(others), b < n, None, None, None
        rows, place = slice(batch.starts[b], batch.starts[stop]), None if others else run(b)
        whole = decodes or rows.stop - rows.start == batch.lens[b] and not window   # a decode sees all of its keys
        if not place or not whole or slopes_H is not None:
            key_BT = torch.arange(max(counts[b:stop]), device=device)[None]
            if window:
                key_BT = key_BT + torch.tensor(firsts[b:stop], device=device)[:, None]
            distance = batch.positions_T[rows].view(stop - b, 1, -1, 1) - key_BT[:, None, None]   # [B, 1, T, keys]
            seen = distance >= 0 if decodes or not window else (distance >= 0) & (distance < window)
            bias = 0.0 if slopes_H is None else slopes_H.view((1, K, -1, 1) if decodes else (K, -1, 1, 1)) * -distance
            mask = torch.where(seen, bias, -torch.inf).to(k_KNSD.dtype)
            if not place:   # a short request is padded with its own last key: no slot of nobody is read
                key_BT = key_BT.minimum(batch.kv_lens[b:stop, None] - 1)
                tables_BM = batch.block_tables_UM[batch.table_rows[b:stop], :-(-max(batch.lens[b:stop]) // S)]
                slots_BT = (tables_BM[:, :, None] * S + torch.arange(S, device=device)).flatten(1).gather(1, key_BT)
                slots_BKT = slots_BT[:, None] + torch.arange(0, K * N * S, N * S, device=device)[:, None]
                copies = k_KNSD.new_empty(2, slots_BKT.numel(), D)
        plan.append(Keys(rows, decodes, place, slots_BKT, copies, mask))
    batch.plans["torch", window] = plan
    return plan


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
def _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, table_ptr, position_R, slope_R, start, stop, kv_len, scale,
           S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
           ALIBI: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax of R query rows over the keys [start, stop) of one KV head of one request.

    Takes and returns the running o_RD, m_R, l_R, float32; m and the scores are logarithms to base 2, as
    `scale` holds LOG2E. MASKED is False where every row sees every key of every tile. The whole of paging
    is one look-up per tile: a tile that lies within a block is one contiguous piece of the pool. (Where S
    is no multiple of TILE, every key looks up its own block: right, and slower.) `start` is a multiple of
    TILE.
    """
    d, t = tl.arange(0, D_PAD), tl.arange(0, TILE)
    unit = 1.0 if ALIBI else scale   # folded into exp2, unless a bias wants scaled scores
    for tile in range(start, stop, TILE):
        key = tile + t
        if S % TILE == 0:
            begin = (tl.load(table_ptr + tile // S) * S + tile % S) * D
            at_TD = (t * D)[:, None] + d[None, :]
        else:
            begin = 0
            slot = tl.load(table_ptr + key // S, mask=key < kv_len, other=0) * S + key % S
            at_TD = (slot * D)[:, None] + d[None, :]
        owned_TD = tl.full([TILE, D_PAD], True, tl.int1)
        if D < D_PAD:
            owned_TD = owned_TD & (d < D)[None, :]
        if MASKED:   # slots past the end belong to nobody and may hold NaN
            owned_TD = owned_TD & (key < kv_len)[:, None]

        k_TD = tl.load(k_ptr + begin + at_TD, mask=owned_TD, other=0.0)
        s_RT = tl.dot(q_RD, tl.trans(k_TD), input_precision="ieee")
        if ALIBI:
            s_RT = s_RT * scale + slope_R[:, None] * (key[None, :] - position_R[:, None])
        if MASKED:
            seen_RT = key[None, :] <= position_R[:, None]
            if WINDOW > 0:
                seen_RT = seen_RT & (key[None, :] > position_R[:, None] - WINDOW)
            s_RT = tl.where(seen_RT, s_RT, float("-inf"))

        m_new = tl.maximum(m_R, tl.max(s_RT, 1) * unit)
        m_sub = m_new
        if MASKED:   # a row that has seen no key yet: -inf - -inf would be NaN
            m_sub = tl.where(m_new == float("-inf"), 0.0, m_new)
        p_RT = tl.exp2(s_RT * unit - m_sub[:, None])
        rescale = tl.exp2(m_R - m_sub)
        v_TD = tl.load(v_ptr + begin + at_TD, mask=owned_TD, other=0.0)
        l_R = l_R * rescale + tl.sum(p_RT, 1)
        o_RD = tl.dot(p_RT.to(v_TD.dtype), v_TD, o_RD * rescale[:, None], input_precision="ieee")
        m_R = m_new
    return o_RD, m_R, l_R


@jit
def _prefill_kernel(q_ptr, out_ptr, k_ptr, v_ptr, slopes_ptr, tables_ptr, query_starts_ptr, kv_lens_ptr, work_ptr,
                    q_stride, head_stride, scale,
                    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr):
    """A tile of query rows against every key that they may see, and no other tile of keys.

    Computes: rows of the chunk, ROWS // G tokens times the G query heads that share this KV head.
    Cost: 4 * ROWS * keys * D operations for 2 * keys * D elements of K and V, ROWS operations per byte in
    two-byte types. Bound: arithmetic. An H100 can do 295 operations per byte of its memory; the L2 cache, in
    which the tiles of one request find the same K and V, makes up for what 128 rows lack.
    Tile: as many rows as the registers hold, for o_RD is [ROWS, D] float32; TILE keys feed one pass of the
    matrix units. Wins on long chunks; loses on chunks of a few tokens, whose rows it fills with nothing.
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
    column_R = kv_head * G * D + row % G * D
    q_RD = tl.load(q_ptr + (index_R * q_stride + column_R)[:, None] + d[None, :], mask=live_RD, other=0.0)
    slope_R = tl.load(slopes_ptr + kv_head * G + row % G) * LOG2E if ALIBI else 0.0

    # Tiles behind the window and above the diagonal are never loaded. Between them: tiles that the window cuts,
    # tiles that every row sees whole, tiles that the diagonal cuts.
    position_R = past + token
    last = tl.minimum(first + ROWS // G, q_len)
    start = 0
    whole = 0
    if WINDOW > 0:
        start = tl.maximum(0, past + first - WINDOW + 1) // TILE * TILE
        whole = tl.cdiv(tl.maximum(0, past + last - WINDOW), TILE) * TILE
    diagonal = tl.maximum(whole, (past + first + 1) // TILE * TILE)
    stop = past + last

    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    o_RD, m_R, l_R = _start(ROWS, D_PAD)
    if WINDOW > 0:
        o_RD, m_R, l_R = _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, table_ptr, position_R, slope_R,
                                start, tl.minimum(whole, stop), kv_len, scale, S, D, D_PAD, TILE, WINDOW, ALIBI, True)
    o_RD, m_R, l_R = _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, table_ptr, position_R, slope_R,
                            whole, diagonal, kv_len, scale, S, D, D_PAD, TILE, WINDOW, ALIBI, False)
    o_RD, m_R, l_R = _sweep(o_RD, m_R, l_R, q_RD, k_ptr, v_ptr, table_ptr, position_R, slope_R,
                            diagonal, stop, kv_len, scale, S, D, D_PAD, TILE, WINDOW, ALIBI, True)
    tl.store(out_ptr + (index_R * H * D + column_R)[:, None] + d[None, :],
             (o_RD / tl.where(l_R > 0, l_R, 1.0)[:, None]).to(out_ptr.dtype.element_ty), mask=live_RD)


@jit
def _decode_kernel(q_ptr, out_ptr, o_ptr, m_ptr, l_ptr, arrived_ptr, k_ptr, v_ptr, slopes_ptr, tables_ptr, kv_lens_ptr,
                   work_ptr, q_stride, head_stride, scale,
                   S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                   ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr):
    """One split of one request's keys for the G query heads of one KV head; the last split to finish merges all.

    Cost: 4 * G * keys * D operations for 2 * keys * D elements of K and V, each used once: G operations per
    byte in two-byte types. Bound: bandwidth; the matrix units idle, and half-empty tiles (G rows of 16) are free.
    Splits: one row cannot fill a machine, so the step's keys are shared out evenly over its multiprocessors.
    Two partial answers merge by the recurrence of online softmax, with splits in the place of keys, so the
    result is the same up to rounding. Made for any batch and length; loses where splits are so short that
    leaving o, m and l in memory costs as much as the keys.
    """
    work = tl.program_id(0)
    b = tl.load(work_ptr + 6 * work)
    if b >= 0:   # the list is as long as it can get, not as long as it is
        table_ptr = tables_ptr + tl.load(work_ptr + 6 * work + 1)
        start, stop = tl.load(work_ptr + 6 * work + 2), tl.load(work_ptr + 6 * work + 3)
        first, splits = tl.load(work_ptr + 6 * work + 4), tl.load(work_ptr + 6 * work + 5)
        kv_head, kv_len = tl.program_id(1).to(tl.int64), tl.load(kv_lens_ptr + b).to(tl.int32)
        row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
        head = kv_head * G + row
        live_R, live_RD = row < G, (row < G)[:, None] & (d < D)[None, :]
        at_RD = head[:, None] * D + d[None, :]
        q_RD = tl.load(q_ptr + b.to(tl.int64) * q_stride + at_RD, mask=live_RD, other=0.0)
        slope_R = tl.load(slopes_ptr + head, mask=live_R, other=0.0) * LOG2E if ALIBI else 0.0
        position_R = tl.zeros([ROWS], tl.int32) + kv_len - 1
        o_RD, m_R, l_R = _start(ROWS, D_PAD)
        o_RD, m_R, l_R = _sweep(o_RD, m_R, l_R, q_RD, k_ptr + kv_head * head_stride, v_ptr + kv_head * head_stride,
                                table_ptr, position_R, slope_R, start, stop, kv_len, scale,
                                S, D, D_PAD, TILE, WINDOW, ALIBI, True)
        finished = True
        if splits > 1:
            tl.store(o_ptr + work * H * D + at_RD, o_RD, mask=live_RD)
            tl.store(m_ptr + work * H + head, m_R, mask=live_R)
            tl.store(l_ptr + work * H + head, l_R, mask=live_R)
            tl.debug_barrier()   # all threads have stored before one of them says so
            counter = arrived_ptr + b * (H // G) + kv_head
            finished = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
            if finished:
                tl.store(counter, 0)   # ready for the next layer
                o_RD, m_R, l_R = _start(ROWS, D_PAD)
                for part in tl.range(first, first + splits, loop_unroll_factor=4):   # several loads in flight
                    o_part = tl.load(o_ptr + part * H * D + at_RD, mask=live_RD, other=0.0, cache_modifier=".cg")
                    m_part = tl.load(m_ptr + part * H + head, mask=live_R, other=0.0, cache_modifier=".cg")
                    l_part = tl.load(l_ptr + part * H + head, mask=live_R, other=1.0, cache_modifier=".cg")
                    m_new = tl.maximum(m_R, m_part)
                    old, new = tl.exp2(m_R - m_new), tl.exp2(m_part - m_new)
                    o_RD = o_RD * old[:, None] + o_part * new[:, None]
                    l_R = l_R * old + l_part * new
                    m_R = m_new
        if finished:
            out_RD = (o_RD / l_R[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + b * H * D + at_RD, out_RD, mask=live_RD)


@jit
def _write_kv_kernel(k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, slots_ptr, k_stride, v_stride, head_stride,
                     K: tl.constexpr, K_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """One token's K and V, all heads, into its slot; none for the padding of a CUDA graph (slot -1)."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t)
    if slot >= 0:
        h, d = tl.arange(0, K_PAD).to(tl.int64)[:, None], tl.arange(0, D_PAD)[None, :]
        live = (h < K) & (d < D)
        to = h * head_stride + slot * D + d
        tl.store(k_pool_ptr + to, tl.load(k_ptr + t * k_stride + h * D + d, mask=live), mask=live)
        tl.store(v_pool_ptr + to, tl.load(v_ptr + t * v_stride + h * D + d, mask=live), mask=live)


def attention_triton(q_THD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, batch: Batch, scale: float,
                     window: int | None = None, slopes_H: Tensor | None = None) -> Tensor:
    """Attention by the kernels above: one launch for the decodes, one for the prompts.

    q_THD may be a view with a row stride of its own; heads and D must be contiguous.
    """
    load_triton()
    (_, H, D), (K, N, S, _) = q_THD.shape, k_KNSD.shape
    G, n = H // K, batch.num_decodes
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    # tl.dot wants powers of two, and at least 16 of everything.
    shape = dict(S=S, H=H, G=G, D=D, D_PAD=max(16, triton.next_power_of_2(D)), WINDOW=window or 0,
                 ALIBI=slopes_H is not None)
    slopes_H = batch.kv_lens if slopes_H is None else slopes_H   # never read

    if n:
        ROWS, options = max(16, triton.next_power_of_2(G)), decode_options(D, q_THD.dtype)
        work, o, m, l, arrived = plan_decode(batch, H, K, D, window, options["TILE"], q_THD.device)
        _decode_kernel[(len(work), K)](
            q_THD, out_THD, o, m, l, arrived, k_KNSD, v_KNSD, slopes_H, batch.block_tables_UM, batch.kv_lens, work,
            q_THD.stride(0), N * S * D, scale * LOG2E.value, **shape, ROWS=ROWS, **options)
    if n < len(batch.chunks):
        options = prefill_options(D, G, q_THD.dtype, capability_of(q_THD.device))
        work = plan_prefill(batch, options["ROWS"] // G, q_THD.device)
        _prefill_kernel[(len(work), K)](
            q_THD, out_THD, k_KNSD, v_KNSD, slopes_H, batch.block_tables_UM, batch.query_starts, batch.kv_lens, work,
            q_THD.stride(0), N * S * D, scale * LOG2E.value, **shape, **options)
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


def decode_options(D: int, dtype: torch.dtype) -> dict:
    """Tile and launch shape of decode: at most 16 KiB of K a tile, and registers few enough to fit several programs."""
    if INTERPRETED:
        return dict(TILE=32)
    row = max(16, triton.next_power_of_2(D)) * dtype.itemsize
    return dict(TILE=min(64, 16384 // row), num_warps=4, num_stages=PIPELINE)


@cache
def capability_of(device: torch.device) -> int:
    """80 for sm_80 and so on; 90 where there is no GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@cache
def multiprocessors_of(device: torch.device) -> int:
    """How many programs make a GPU busy; where there is none, a few, so that tests see splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def plan_decode(batch: Batch, H: int, K: int, D: int, window: int | None, TILE: int, device) -> tuple[Tensor, ...]:
    """The splits of the step's decodes, and the memory in which they leave o, m and l and count who has arrived."""
    if ("decode", window, TILE) not in batch.plans:
        work, n = share_out(batch, K, window, TILE, device), batch.num_decodes
        o, (m, l) = torch.empty(len(work), H, D, device=device), torch.empty(2, len(work), H, device=device)
        arrived = torch.zeros(n * K, dtype=torch.int32, device=device)
        batch.plans["decode", window, TILE] = torch.tensor(work, dtype=torch.int32).to(device), o, m, l, arrived
    return batch.plans["decode", window, TILE]


def share_out(batch: Batch, K: int, window: int | None, TILE: int, device) -> list[tuple[int, ...]]:
    """A row per split: request, where its block table begins, start and stop of its keys, its request's first split
    and number of splits.

    From the work and the number of multiprocessors alone: all tiles of keys of all decodes are shared out over
    two programs per multiprocessor, of which one computes while the other waits for memory. A long request gets many
    splits, a large batch of short ones gets one each. No batch size changes the rule, as it says little about the
    work: eight requests of 100 keys and eight of 100,000 are both eight. The list is padded to the length that it
    can have at most for so many requests (each may round up by one), so that a CUDA graph fits every step.
    """
    processors = multiprocessors_of(device)
    lens = batch.lens[:batch.num_decodes]
    begins = [max(0, length - window) // TILE * TILE if window else 0 for length in lens]
    tiles = [-(-(length - begin) // TILE) for begin, length in zip(begins, lens)]
    per_split = max(1, -(-sum(tiles) * K // (2 * processors)))
    work = []
    for b, (begin, count, length) in enumerate(zip(begins, tiles, lens)):
        splits = -(-count // per_split)
        cuts = [begin + TILE * (count * i // splits) for i in range(splits)] + [length]
        table = batch.chunks[b].row * batch.block_tables_UM.shape[1]
        work += [(b, table, *cuts[i:i + 2], len(work), splits) for i in range(splits)]
    most = 2 * processors // K + len(lens)
    return work + [(-1, 0, 0, 0, 0, 0)] * (most - len(work))


def refresh(static: Batch, batch: Batch, K: int):
    """Put a step of as many requests into the batch that a CUDA graph reads."""
    static.memory[:len(batch.memory)].copy_(batch.memory)
    for (_, window, TILE), (work, *_) in static.plans.items():
        work.copy_(torch.tensor(share_out(batch, K, window, TILE, work.device), dtype=torch.int32))


def plan_prefill(batch: Batch, tokens_per_tile: int, device) -> Tensor:
    """The tiles of query rows of the step's prompts, int32 [tiles, 3]: request, where its block table begins, first
    token. The longest come first."""
    if "prefill" not in batch.plans:
        work = []
        for b in range(batch.num_decodes, len(batch.chunks)):
            q_len = len(batch.chunks[b].tokens)
            table = batch.chunks[b].row * batch.block_tables_UM.shape[1]
            work += [(batch.lens[b] - q_len + first, b, table, first) for first in range(0, q_len, tokens_per_tile)]
        work = [tile for _, *tile in sorted(work, reverse=True)]
        batch.plans["prefill"] = torch.tensor(work, dtype=torch.int32).to(device)
    return batch.plans["prefill"]


def write_kv_triton(k_TKD: Tensor, v_TKD: Tensor, k_KNSD: Tensor, v_KNSD: Tensor, slots_T: Tensor):
    """Put the step's K and V into their slots of the pool."""
    load_triton()
    (T, K, D), (_, N, S, _) = k_TKD.shape, k_KNSD.shape
    _write_kv_kernel[(T,)](k_TKD, v_TKD, k_KNSD, v_KNSD, slots_T, k_TKD.stride(0), v_TKD.stride(0), N * S * D,
                           K, triton.next_power_of_2(K), D, triton.next_power_of_2(D))


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
    if not 1 <= D <= 256:
        raise ValueError(f"head size {D} is not supported: it must be 256 at most")
    if S < 1:
        raise ValueError(f"block size {S} is not supported: it must be at least 1")
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
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16, "
                         "or attention='torch'")
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("attention='triton' on a CPU needs Triton's interpreter: set TRITON_INTERPRET=1 "
                         "before anything imports triton")
