"""Latent attention: a token leaves one small vector behind, of which every head makes its own key and value.
(Read kernels.py first, and `Model.attend_to_latents` in model.py beside it.)

A decode reads the keys and values of all tokens before it. With 128 heads of 128 numbers each that is 32,768 numbers
per token and layer. GQA lets query heads share them. Multi-head latent attention (MLA; DeepSeek-V2, 2024, section 2.1)
keeps one latent c of Z = 512 numbers in their place, and two matrices per head widen it. Beside it stands a rotary key
r of P = 64 numbers, which all heads share: RoPE has no place in the latent, as you will see. 576 numbers in all:

    in the pool       [c, r]           one KV head of D = Z + P numbers, and no V
    key of head h     [K_h c, r]       U + P = 128 + 64 numbers, the unrotated and the rotary ones; K_h is [U, Z]
    its value         V_h c            W = 128 numbers; V_h is [W, Z]

These letters are this room's own (in config.py Z is rank, P rotary, U plain, W value); so is J, keys.

Nobody has to make these keys and values. A query [q, s] of head h has the score

    q . (K_h c) + s . r  =  (K_h^T q) . c  +  s . r        and the answer        sum of p V_h c  =  V_h (sum of p c)

so K_h can go to the query, and V_h to the answer: they are absorbed. (A rotation by the key's position, between K_h and
q, could not be: it differs from key to key. So r carries all of the positions.) What attends then is G = H query rows
of D numbers to a single KV head, the pool as it is, and V is the first Z columns of K. Or the keys are widened for all
heads, and attended to as ever. Both give the same; for n tokens that see J keys, n J pairs or less, they cost, in
operations:

    absorbed     2 H Z (U + W) per token,   2 H (2 Z + P) per pair       DeepSeek: 131,072 x 2 H,  1,088 x 2 H
    widened      2 H Z (U + W) per key,     2 H (U + P + W) per pair               131,072 x 2 H,    320 x 2 H

A prompt that begins has as many keys as tokens, and each of its pairs is cheaper widened. A decode has one token, and
to widen all of its keys would cost 120 times as much as to attend to them. In between, for a piece of n tokens behind a
much longer past, the two meet where n (1,088 - 320) is 131,072: at 171 tokens. `widening_pays` compares them exactly.

The lesson in numbers: an absorbed decode reads 1,152 bytes of a key in bfloat16 and does 128 x 2,176 operations with
them, 242 per byte, where GQA with G = 4 does 4. An H100 does 295 operations while a byte arrives: MLA spends nearly all
of the arithmetic that a decode would leave idle, and a verification of a single draft is bound by arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from batch import SHORT, Batch, Chunk, make_batch
from config import Latent
from device import jit
from kernels import LOG2E
from linear import Part

triton = tl = None    # until `load_triton`
WIDENED = 256 << 20   # bytes of keys and values that are widened at a time; so many heads at once as fit


def attend_to_latents(q_THF: Tensor, part: Part, k_KNSD: Tensor, batch: Batch, scale: float, m: Latent, backend: str,
                      k_scale_KNS: Tensor | None = None) -> Tensor:
    """Attention of queries [T, H, U + P], rotated, to the latents in the pool, [1, N, S, Z + P]; [T, H, W].

    part: K_h and V_h of all heads, one head below the other: its weight is [H (U + W), Z], a float.
    """
    S, up_HFZ = k_KNSD.shape[2], part.weight.view(-1, m.plain + m.value, m.rank)
    out_THW = q_THF.new_empty(*q_THF.shape[:2], m.value)
    for way in batch.once("latent", lambda: plan(batch, S, m)):
        q = q_THF[way.rows]
        if way.slots_J is None:
            out_THW[way.rows] = attend_absorbed(q, up_HFZ, k_KNSD, way.batch, scale, m, backend, k_scale_KNS)
        else:
            latents_JD = k_KNSD.flatten(0, 2)[way.slots_J]
            if k_scale_KNS is not None:
                latents_JD = (latents_JD * k_scale_KNS.flatten()[way.slots_J, None]).to(q.dtype)
            out_THW[way.rows] = attend_widened(q, up_HFZ, latents_JD, way.batch, S, scale, m, backend)
    return out_THW


class Way(NamedTuple):
    """Chunks of a step that are served in the same way."""
    rows: slice | Tensor      # their rows of q
    batch: Batch              # they alone; if their keys are widened, with tables 0, 1, 2, ... into the widened keys
    slots_J: Tensor | None    # where in the pool the keys are that are widened; None: they are absorbed


def widening_pays(n: int, past: int, m: Latent) -> bool:
    """Whether n tokens behind so many others cost less with their keys widened. To absorb the new tokens costs what it
    costs to widen them, so only the past counts. Short chunks are absorbed: a graph of them does the same in every
    step."""
    pairs = n * past + n * (n + 1) // 2
    return n > SHORT and pairs * (2 * m.rank - m.plain - m.value) > past * m.rank * (m.plain + m.value)


def plan(batch: Batch, S: int, m: Latent) -> list[Way]:
    """How each chunk of the step is served."""
    pays = [widening_pays(len(chunk.tokens), chunk.start, m) for chunk in batch.chunks]
    if not any(pays):
        return [Way(slice(None), batch, None)]
    absorbed, widened = ([b for b, answer in enumerate(pays) if answer == wanted] for wanted in (False, True))
    device = batch.memory.device

    def rows_of(requests: list[int]) -> Tensor:
        return torch.cat([torch.arange(*batch.starts[b:b + 2]) for b in requests]).to(device)
    slots, chunks = [], []
    for b in widened:
        chunk, count, first = batch.chunks[b], -(-batch.lens[b] // S), len(slots) // S
        slots += [block * S + offset for block in chunk.blocks[:count] for offset in range(S)]
        chunks.append(Chunk(chunk.tokens, chunk.start, list(range(first, first + count))))
    ways = [Way(rows_of(widened), make_batch(chunks, S, device), torch.tensor(slots, device=device))]
    if absorbed:
        chunks = [batch.chunks[b] for b in absorbed]
        ways.append(Way(rows_of(absorbed), make_batch(chunks, S, device, batch.block_tables_UM), None))
    return ways


def attend_absorbed(q_THF: Tensor, up_HFZ: Tensor, k_KNSD: Tensor, batch: Batch, scale: float, m: Latent, backend: str,
                    k_scale_KNS: Tensor | None) -> Tensor:
    """K_h goes to the query and V_h to the answer; [T, H, W]."""
    q_HTZ = q_THF[..., :m.plain].transpose(0, 1) @ up_HFZ[:, :m.plain]
    q_THD = torch.cat([q_HTZ.transpose(0, 1), q_THF[..., m.plain:]], -1)
    if backend == "triton":
        c_J1Z, r_J1P = k_KNSD.view(-1, 1, q_THD.shape[2]).split([m.rank, m.rotary], -1)
        o_THZ = launch(q_THD, c_J1Z, r_J1P, c_J1Z, batch, k_KNSD.shape[2], scale, k_scale_KNS)
    else:   # V is the first columns of K; what the others add up to is left
        attention = kernels.ATTENTION[backend]
        o_THZ = attention(q_THD, k_KNSD, k_KNSD, batch, scale, None, k_scale_KNS, k_scale_KNS)[..., :m.rank]
    return (o_THZ.transpose(0, 1) @ up_HFZ[:, m.plain:].mT).transpose(0, 1)


def attend_widened(q_THF: Tensor, up_HFZ: Tensor, latents_JD: Tensor, batch: Batch, S: int, scale: float, m: Latent,
                   backend: str) -> Tensor:
    """Every head has keys and values of its own, made of the latents of the chunks' keys; [T, H, W]."""
    c_JZ, r_JP = latents_JD.split([m.rank, m.rotary], -1)
    at_once, answers = max(1, WIDENED // (len(c_JZ) * up_HFZ.shape[1] * c_JZ.element_size())), []
    for q_ThF, up_hFZ in zip(q_THF.split(at_once, 1), up_HFZ.split(at_once)):   # h: so many heads at once
        kv_JhF = F.linear(c_JZ, up_hFZ.flatten(0, 1)).unflatten(-1, up_hFZ.shape[:2])
        k_JhU, v_JhW = kv_JhF.split([m.plain, m.value], -1)
        if backend == "triton":
            answers.append(launch(q_ThF, k_JhU, r_JP[:, None], v_JhW, batch, S, scale))
            continue
        # The others want a pool of keys and values, both of one size: whichever is shorter gets zeros.
        k_JhF = torch.cat([k_JhU, r_JP[:, None].expand(-1, k_JhU.shape[1], -1)], -1)
        D = max(k_JhF.shape[-1], m.value)
        q_ThD, k_JhD, v_JhD = (F.pad(x, (0, D - x.shape[-1])) for x in (q_ThF, k_JhF, v_JhW))
        k_hNSD, v_hNSD = (x.transpose(0, 1).unflatten(1, (-1, S)).contiguous() for x in (k_JhD, v_JhD))
        answers.append(kernels.ATTENTION[backend](q_ThD, k_hNSD, v_hNSD, batch, scale)[..., :m.value])
    return torch.cat(answers, 1)


# ---------------------------------------------------------------------------------------------
# Triton

# One kernel serves both ways. A key comes in two pieces, A numbers of a KV head and P that all heads share, and each
# has matrix products of its own: 512 and 64 numbers, and not 576 padded to 1,024.

@jit
def _piece(ptr, at_T, there_T, SIZE: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr):
    """A piece of each key of a tile, [T, PAD]; zeros behind its end, and for keys that are not there."""
    i = tl.arange(0, PAD)
    if MASKED:
        return tl.load(ptr + at_T[:, None] + i[None, :], mask=there_T[:, None] & (i < SIZE)[None, :], other=0)
    if SIZE < PAD:
        return tl.load(ptr + at_T[:, None] + i[None, :], mask=(i < SIZE)[None, :], other=0)
    return tl.load(ptr + at_T[:, None] + i[None, :])


@jit
def _latent_sweep(o_RW, m_R, l_R, q_RA, q_RP, k_ptr, r_ptr, v_ptr, k_scale_ptr, table_ptr, head_R, position_R,
                  start, stop, kv_len, scale, k_stride, r_stride, S: tl.constexpr, A: tl.constexpr, A_PAD: tl.constexpr,
                  P: tl.constexpr, P_PAD: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr, SHARED: tl.constexpr,
                  TILE: tl.constexpr, MASKED: tl.constexpr):
    """`_sweep` of kernels.py, without windows, for keys in two pieces. SHARED: V is the first piece, and is there
    already. MASKED is False where every row sees every key of every tile."""
    t = tl.arange(0, TILE)
    for tile in range(start, stop, TILE):
        key = tile + t
        if S % TILE == 0:
            begin = tl.load(table_ptr + tile // S).to(tl.int64) * S + tile % S
            slot = t
        else:
            begin = 0
            slot = (tl.load(table_ptr + key // S, mask=key < kv_len, other=0) * S + key % S).to(tl.int64)
        there = key < kv_len if MASKED else key >= 0   # slots past the end belong to nobody and may hold NaN
        k_TA = _piece(k_ptr + begin * k_stride, slot * k_stride, there, A, A_PAD, MASKED).to(q_RA.dtype)
        r_TP = _piece(r_ptr + begin * r_stride, slot * r_stride, there, P, P_PAD, MASKED).to(q_RA.dtype)
        s_RT = tl.dot(q_RA, tl.trans(k_TA), input_precision="ieee")
        s_RT = tl.dot(q_RP, tl.trans(r_TP), s_RT, input_precision="ieee")
        if k_scale_ptr is not None:
            scale_T = tl.load(k_scale_ptr + begin + slot, mask=there, other=0.0)
            s_RT *= scale_T[None, :]
        s_RT = kernels._bias(s_RT, scale, head_R[:, None], position_R[:, None] - key[None, :])
        if MASKED:
            s_RT = tl.where(key[None, :] <= position_R[:, None], s_RT, float("-inf"))
        m_new = tl.maximum(m_R, tl.max(s_RT, 1) * scale)
        m_sub = tl.where(m_new == float("-inf"), 0.0, m_new)   # a row that has seen no key: -inf - -inf would be NaN
        p_RT = tl.exp2(s_RT * scale - m_sub[:, None])
        rescale = tl.exp2(m_R - m_sub)
        l_R = l_R * rescale + tl.sum(p_RT, 1)
        if k_scale_ptr is not None:
            p_RT *= scale_T[None, :]
        if SHARED:
            v_TW = k_TA
        else:
            v_TW = _piece(v_ptr + begin * k_stride, slot * k_stride, there, W, W_PAD, MASKED)
        o_RW = tl.dot(p_RT.to(v_TW.dtype), v_TW, o_RW * rescale[:, None], input_precision="ieee")
        m_R = m_new
    return o_RW, m_R, l_R


@jit
def _latent_kernel(q_ptr, out_ptr, o_ptr, m_ptr, l_ptr, k_ptr, r_ptr, v_ptr, k_scale_ptr, tables_ptr, query_starts_ptr,
                   kv_lens_ptr, work_ptr, k_stride, head_stride, r_stride, longest, scale,
                   S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, A: tl.constexpr, A_PAD: tl.constexpr,
                   P: tl.constexpr, P_PAD: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr, SHARED: tl.constexpr,
                   ROWS: tl.constexpr, TILE: tl.constexpr):
    """A tile of the query rows of one KV head, n tokens times G, over one split of their keys.

    Cost: 2 ROWS keys (A + P + W) operations. Absorbed, for keys * (A + P) numbers, each used by all rows of the tile
    for K and for V: with 64 of 128 rows per program a key is read twice, the second time from the L2 cache. Bound:
    both, on an H100 nearly at once. Widened, for keys * (A + W) numbers: arithmetic, as in any prefill.
    Tile: o_RW holds 64 x 512 numbers in registers, half of all that a multiprocessor has; so ROWS is 64 at most.
    Wins where all heads share a latent; loses on models of few heads, whose 16 rows fill a tile in part.
    """
    work, kv_head = tl.program_id(0), (tl.program_id(1) % (H // G)).to(tl.int64)
    b = tl.load(work_ptr + 6 * work)
    if b >= 0:   # the list is as long as it can get, not as long as it is
        table_ptr = tables_ptr + tl.load(work_ptr + 6 * work + 1)
        start, stop = tl.load(work_ptr + 6 * work + 2), tl.load(work_ptr + 6 * work + 3)
        splits = tl.load(work_ptr + 6 * work + 5)
        row_start, kv_len = tl.load(query_starts_ptr + b), tl.load(kv_lens_ptr + b).to(tl.int32)
        q_len = (tl.load(query_starts_ptr + b + 1) - row_start).to(tl.int32)
        past, first_row = kv_len - q_len, tl.program_id(1) // (H // G) * ROWS
        row = first_row + tl.arange(0, ROWS)
        token, head = row // G, row % G
        live_R, at_R = token < q_len, token * H + kv_head * G + head
        a, p, w = tl.arange(0, A_PAD), tl.arange(0, P_PAD), tl.arange(0, W_PAD)
        q_ptr += row_start * H * (A + P)
        q_R = (at_R * (A + P))[:, None]
        q_RA = tl.load(q_ptr + q_R + a[None, :], mask=live_R[:, None] & (a < A)[None, :], other=0.0)
        q_RP = tl.load(q_ptr + q_R + A + p[None, :], mask=live_R[:, None] & (p < P)[None, :], other=0.0)
        # The tile's first token sees all keys before `diagonal`, and its last one those before `stop`.
        last = tl.minimum((first_row + ROWS - 1) // G, q_len - 1)
        stop = tl.where(first_row < q_len * G, tl.minimum(stop, past + last + 1), start)
        diagonal = tl.minimum(stop, past + first_row // G + 1)
        diagonal = tl.maximum(start, start + (diagonal - start) // TILE * TILE)
        k_ptr, v_ptr = k_ptr + kv_head * head_stride, v_ptr + kv_head * head_stride
        o_RW, m_R, l_R = kernels._start(ROWS, W_PAD)
        if not SHARED:   # most tiles need no mask; absorbed, a second loop would cost registers and save little
            o_RW, m_R, l_R = _latent_sweep(o_RW, m_R, l_R, q_RA, q_RP, k_ptr, r_ptr, v_ptr, k_scale_ptr, table_ptr,
                                           kv_head * G + head, past + token, start, diagonal, kv_len, scale, k_stride,
                                           r_stride, S, A, A_PAD, P, P_PAD, W, W_PAD, SHARED, TILE, False)
            start = diagonal
        o_RW, m_R, l_R = _latent_sweep(o_RW, m_R, l_R, q_RA, q_RP, k_ptr, r_ptr, v_ptr, k_scale_ptr, table_ptr,
                                       kv_head * G + head, past + token, start, stop, kv_len, scale, k_stride,
                                       r_stride, S, A, A_PAD, P, P_PAD, W, W_PAD, SHARED, TILE, True)
        live_RW, at_RW = live_R[:, None] & (w < W)[None, :], (at_R * W)[:, None] + w[None, :]
        if splits > 1:
            tl.store(o_ptr + work * longest * H * W + at_RW, o_RW, mask=live_RW)
            tl.store(m_ptr + work * longest * H + at_R, m_R, mask=live_R)
            tl.store(l_ptr + work * longest * H + at_R, l_R, mask=live_R)
        else:
            out_RW = (o_RW / tl.where(l_R > 0, l_R, 1.0)[:, None]).to(out_ptr.dtype.element_ty)   # idle: 0
            tl.store(out_ptr + row_start * H * W + at_RW, out_RW, mask=live_RW)


@jit
def _merge_kernel(out_ptr, o_ptr, m_ptr, l_ptr, query_starts_ptr, work_ptr, longest,
                  H: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr, ROWS: tl.constexpr):
    """The splits' partial answers to a few rows of one request, merged by the recurrence of online softmax. A kernel of
    its own: two partial answers of 64 x 512 numbers do not fit into the registers of the program that has one."""
    work = tl.program_id(0)
    b, first = tl.load(work_ptr + 6 * work), tl.load(work_ptr + 6 * work + 4)
    splits = tl.load(work_ptr + 6 * work + 5)
    if (b >= 0) & (first == work) & (splits > 1):   # a request's first split stands for it
        row_start = tl.load(query_starts_ptr + b)
        rows = (tl.load(query_starts_ptr + b + 1) - row_start) * H
        row, w = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, W_PAD)
        live_R = row < rows
        live_RW, at_RW = live_R[:, None] & (w < W)[None, :], (row * W)[:, None] + w[None, :]
        o_RW, m_R, l_R = kernels._start(ROWS, W_PAD)
        for part in range(first, first + splits):
            at = part * longest * H
            o_part = tl.load(o_ptr + at * W + at_RW, mask=live_RW, other=0.0)
            m_part = tl.load(m_ptr + at + row, mask=live_R, other=0.0)
            l_part = tl.load(l_ptr + at + row, mask=live_R, other=1.0)
            m_new = tl.maximum(tl.maximum(m_R, m_part), -1e38)   # no -inf: a row may see none of a split's keys
            old, new = tl.exp2(m_R - m_new), tl.exp2(m_part - m_new)
            o_RW, l_R, m_R = o_RW * old[:, None] + o_part * new[:, None], l_R * old + l_part * new, m_new
        out_RW = (o_RW / tl.where(l_R > 0, l_R, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row_start * H * W + at_RW, out_RW, mask=live_RW)


def launch(q_THF: Tensor, k_JKA: Tensor, r_J1P: Tensor, v_JKW: Tensor, batch: Batch, S: int, scale: float,
           scale_KNS: Tensor | None = None) -> Tensor:
    """Attention of queries of A + P numbers to keys of A numbers per KV head and P that all share; [T, H, W].

    Token t of a request has its key in row block_table[t // S] * S + t % S of k, r and v. Where v is k, it is loaded
    once. k and v are views of the same rows. One launch serves the short chunks, whose keys are split as kernels.py
    splits them, and one the others.
    """
    kernels.load_triton()
    (T, H, _), (_, K, A), P, W, device = q_THF.shape, k_JKA.shape, r_J1P.shape[2], v_JKW.shape[2], q_THF.device
    q_THF, out_THW = q_THF.contiguous(), torch.empty(T, H, W, dtype=q_THF.dtype, device=device)
    A_PAD, P_PAD, W_PAD = (max(16, triton.next_power_of_2(x)) for x in (A, P, W))
    shape = dict(S=S, H=H, G=H // K, A=A, A_PAD=A_PAD, P=P, P_PAD=P_PAD, W=W, W_PAD=W_PAD, SHARED=v_JKW is k_JKA)

    for name, few in ("short", True), ("long", False):
        lengths = [len(chunk.tokens) for chunk in batch.chunks if (len(chunk.tokens) <= SHORT) == few]
        if not lengths:
            continue
        longest = max(lengths)
        options = launch_options(longest * H // K, A_PAD, scale_KNS is not None, q_THF.dtype,
                                 kernels.capability_of(device))
        programs = K * triton.cdiv(longest * H // K, options["ROWS"])
        if few:
            work = batch.table(("latent", programs), lambda batch: kernels.share_out(
                batch, programs, None, options["TILE"], device))
        else:
            work = batch.table("latent prompts", whole_chunks)
        some = 4 * kernels.multiprocessors_of(device) // programs if few else 0   # splits that leave partial answers
        o, m, l = batch.once(("partial answers", name), lambda: (
            torch.empty(some, longest, H, W, device=device), *torch.empty(2, some, longest, H, device=device)))
        _latent_kernel[(len(work), programs)](
            q_THF, out_THW, o, m, l, k_JKA, r_J1P, v_JKW, scale_KNS, batch.block_tables_UM, batch.query_starts,
            batch.kv_lens, work, k_JKA.stride(0), k_JKA.stride(1), r_J1P.stride(0), longest, scale * LOG2E,
            **shape, **options)
        if some:
            _merge_kernel[(len(work), triton.cdiv(longest * H, 4))](
                out_THW, o, m, l, batch.query_starts, work, longest, H, W, W_PAD, 4)
    return out_THW


def whole_chunks(batch: Batch) -> list[tuple[int, ...]]:
    """The step's longer chunks, as `share_out` gives the short ones: each with all of its keys in one split. Those that
    see most keys come first."""
    work = [(b, chunk.row * batch.block_tables_UM.shape[1], 0, batch.lens[b], 0, 1)
            for b, chunk in enumerate(batch.chunks) if len(chunk.tokens) > SHORT]
    return sorted(work, key=lambda row: -row[3])


def launch_options(rows: int, A: int, int8: bool, dtype: torch.dtype, capability: int) -> dict:
    """Tile and launch shape for so many query rows per KV head and keys of A numbers (see `bench.py kernels`)."""
    ROWS, direct = max(16, triton.next_power_of_2(rows)), capability // 10 in (9, 10)   # see kernels.prefill_options
    if kernels.INTERPRETED:       # small, so that short tests see many tiles
        return dict(ROWS=min(32, ROWS), TILE=16)
    if dtype == torch.float32:    # no matrix units
        return dict(ROWS=16, TILE=16, num_warps=8, num_stages=1)
    if A <= 256:
        return dict(ROWS=min(128, ROWS), TILE=64 if direct else 32, num_warps=8, num_stages=3)
    if int8 or not direct:        # bytes are widened in registers, which leaves room for half as many rows
        return dict(ROWS=min(32, ROWS), TILE=32, num_warps=8, num_stages=3)
    return dict(ROWS=min(64, ROWS), TILE=32 if capability // 10 == 9 else 16, num_warps=8, num_stages=2)
