"""How we know that attention and the pool are right. (Read it beside kernels.py and paged_kv.py.)"""

import itertools
import json
import math
import random
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.overrides
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kernels
from batch import EMPTY, IDLE, Chunk, Graphs, make_batch
from paged_kv import BlockTable, KVPool
from reference import keeps_the_order_of_sums, repeat

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["naive", "torch"] + (["triton"] if kernels.load_triton() else [])


# ---------------------------------------------------------------------------------------------
# Kernels

def dense_attention(q, k, v, scale, window, slopes=None):
    """One request, K and V in order, no pool: q [T, H, D], k and v [kv_len, K, D], numpy float64. V may have another D."""
    out = np.zeros((*q.shape[:2], v.shape[2]))
    past, group = len(k) - len(q), q.shape[1] // k.shape[1]
    for t in range(len(q)):
        first = 0 if window is None else max(0, past + t - window + 1)
        for h in range(q.shape[1]):
            score = k[first:past + t + 1, h // group] @ q[t, h] * scale
            if slopes is not None:
                score = score - slopes[h] * np.arange(past + t - first, -1, -1)
            weight = np.exp(score - score.max())
            out[t, h] = weight / weight.sum() @ v[first:past + t + 1, h // group]
    return out


def add_alibi(patch, H):
    """Put ALiBi's bias into its seams; float64 slopes [H] for the reference."""
    def _bias(s_RT, scale, head, distance):
        return s_RT - tl.exp2(-1.0 - head) * distance * 1.4426950408889634 / scale   # noqa: F821, as in kernels.py
    patch.setattr(kernels, "bias", lambda head, distance: -2.0 ** -(head + 1.0) * distance)
    if kernels.load_triton():
        _bias.__globals__.update(tl=kernels.tl)
        patch.setattr(kernels, "_bias", kernels.triton.jit(_bias))
    return 2.0 ** -np.arange(1.0, H + 1)


def in_127_steps(x):
    """[..., D] as bytes and float32 scales, a row at a time: the definition of an INT8 pool, for finite numbers."""
    scales = np.float32(abs(x).max(-1, initial=0) / 127)
    return np.rint(x / np.where(scales > 0, scales, 1)[..., None]).astype(np.int8), scales


def paged(requests, S, K, D, dtype, seed, int8=False):
    """Requests of (query tokens, past) as numpy q, k, v each, and as a batch over a pool with shuffled blocks
    in which every slot that no request owns is NaN. The pool is K, V and, with int8, the scales of K and of V; then k and
    v are what its bytes and scales stand for."""
    rng = np.random.default_rng(seed)
    requests = sorted(requests, key=lambda r: r[0])
    need = [-(-(n + past) // S) for n, past in requests]
    shuffled = rng.permutation(sum(need) + 2).tolist()
    pools = [torch.full((K, len(shuffled), S, D), -128 if int8 else math.nan, dtype=torch.int8 if int8 else dtype) for _ in "kv"]
    pools += [torch.full((K, len(shuffled), S), math.nan) for _ in "kv"] * int8
    chunks, dense = [], []
    for (n, past), blocks in zip(requests, need):
        table = [shuffled.pop() for _ in range(blocks)]
        k, v = rows = [torch.from_numpy(rng.standard_normal((n + past, K, D))).to(dtype) for _ in "kv"]
        if int8:   # rows large and small: the scale of another would be seen
            (k, k_scale), (v, v_scale) = (in_127_steps(rng.choice([0.1, 0.5, 1.0], (n + past, K, 1)) * x.double().numpy()) for x in rows)
            rows = list(map(torch.from_numpy, (k, v, k_scale, v_scale)))
            k, v = (torch.from_numpy(x * scale[..., None].astype(np.float64)) for x, scale in ((k, k_scale), (v, v_scale)))
        for t, (pool, row) in itertools.product(range(n + past), zip(pools, rows)):
            pool[:, table[t // S], t % S] = row[t]
        chunks.append(Chunk([0] * n, past, table))
        dense.append((k.double().numpy(), v.double().numpy()))
    return chunks, dense, *(pool.to(DEVICE) for pool in pools)


# Decodes, verifications and longer chunks
ragged = st.lists(st.tuples(st.one_of(st.just(1), st.integers(2, 16), st.integers(17, 40)), st.integers(0, 90)), min_size=1, max_size=3)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(requests=ragged, heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (5, 1), (14, 2), (32, 1)]),
       D=st.sampled_from([4, 8, 16, 20, 64, 80, 96, 128, 256]), S=st.sampled_from([1, 3, 8, 16, 32, 64, 256]),
       window=st.one_of(st.none(), st.integers(1, 80)), dtype=st.sampled_from([torch.float32, torch.float16]),
       alibi=st.booleans(), int8=st.booleans(), seed=st.integers(0, 999))
def test_kernel_equals_dense_attention(poisoned, backend, requests, heads, D, S, window, dtype, alibi, int8, seed):
    (H, K), scale = heads, 1.5 * D ** -0.5
    chunks, dense, pool_k, pool_v, *scales = paged(requests, S, K, D, dtype, seed, int8=int8)
    batch = make_batch(chunks, S, DEVICE)
    q = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((len(batch.tokens_T), H + 2, D))).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        slopes = add_alibi(patch, H) if alibi else None
        out = kernels.ATTENTION[backend](q.to(DEVICE)[:, :H], pool_k, pool_v, batch, scale, window, *scales).double().cpu().numpy()
    start = 0
    for chunk, (k, v) in zip(chunks, dense):
        rows = slice(start, start := start + len(chunk.tokens))
        expected = dense_attention(q[rows, :H].double().numpy(), k, v, scale, window, slopes)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        np.testing.assert_allclose(out[rows], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(DEVICE == "cuda" or not keeps_the_order_of_sums(), reason="sums depend on what is beside them here")
@settings(max_examples=60)
@given(requests=st.lists(st.tuples(st.sampled_from([1, 1, 1, 5]), st.integers(0, 150)), min_size=1, max_size=8),
       heads=st.sampled_from([(4, 4), (6, 2), (9, 3), (5, 1)]), D=st.sampled_from([16, 64]), S=st.sampled_from([4, 16]),
       window=st.one_of(st.none(), st.integers(1, 150)), long=st.sampled_from([30, 90]), int8=st.booleans(), seed=st.integers(0, 99))
def test_exact_attention_has_the_same_bits_in_any_company(poisoned, requests, heads, D, S, window, long, int8, seed):
    """Alone a request's blocks are neighbours, beside others they are not."""
    (H, K), requests = heads, sorted(requests, key=lambda request: request[0])
    chunks, _, *pools = paged(requests, S, K, D, torch.float32, seed, int8=int8)
    q_THD = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((sum(n for n, _ in requests), H, D))).float()

    def attend(q_THD, pools, chunks):
        batch = make_batch(chunks, S, DEVICE)
        batch.exact = True
        return kernels.attention_torch(q_THD, *pools[:2], batch, 0.3, window, *pools[2:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "IN_PLACE", long * 2 * K * D * 4)
        together = attend(q_THD, pools, chunks).split([n for n, _ in requests])
        for chunk, rows, expected in zip(chunks, q_THD.split([n for n, _ in requests]), together):
            own = [pool[:, chunk.blocks] for pool in pools]
            assert attend(rows, own, [Chunk(chunk.tokens, chunk.start, list(range(len(chunk.blocks))))]).equal(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_holds_when_scores_differ_by_hundreds(poisoned, backend):
    """Without the running max, exp overflows; without the rescale, early keys keep a weight that they lost."""
    chunks, dense, pool_k, pool_v = paged([(1, 199), (5, 140), (40, 60)], 8, 1, 16, torch.float32, 0)
    batch = make_batch(chunks, 8, DEVICE)
    q = torch.from_numpy(np.random.default_rng(1).standard_normal((46, 2, 16))).float()
    out = kernels.ATTENTION[backend](q.to(DEVICE), pool_k, pool_v, batch, 100.0).double().cpu().numpy()
    for rows, (k, v) in zip((slice(0, 1), slice(1, 6), slice(6, 46)), dense):
        np.testing.assert_allclose(out[rows], dense_attention(q[rows].double().numpy(), k, v, 100.0, None), atol=1e-3)


@settings(max_examples=60)
@given(lens=st.lists(st.tuples(st.sampled_from([1, 1, 2, 5, 5, 16, 17, 40]), st.integers(0, 200)), min_size=1, max_size=6),
       heads=st.sampled_from([(4, 4), (6, 2), (5, 1)]), S=st.sampled_from([1, 4, 16]), alibi=st.booleans(),
       window=st.one_of(st.none(), st.integers(1, 150)), in_place=st.sampled_from([0, 40_000, 10 ** 9]),
       int8=st.booleans(), seed=st.integers(0, 99))
def test_torch_reads_neighbouring_blocks_in_place_and_gathers_others(poisoned, lens, heads, S, alibi, window, in_place, int8, seed):
    (H, K), D, rng = heads, 16, np.random.default_rng(seed)
    requests = sorted(lens, key=lambda r: r[0])
    need = [-(-(n + past) // S) for n, past in requests]
    k_KNSD, v_KNSD = torch.full((2, K, sum(need) + len(need), S, D), math.nan)
    scales = torch.full((2, K, sum(need) + len(need), S), math.nan) if int8 else ()
    chunks, dense, at = [], [], 0
    for (n, past), blocks in zip(requests, need):
        table = list(range(at, at + blocks))
        at += blocks + 1                          # a block of nobody between two requests
        if rng.random() < 0.3:
            rng.shuffle(table)
        k, v = torch.from_numpy(rng.standard_normal((2, n + past, K, D))).float()
        if int8:
            (k, k_scale), (v, v_scale) = (map(torch.from_numpy, in_127_steps(x.numpy())) for x in (k, v))
        for t in range(n + past):
            slot = slice(None), table[t // S], t % S
            k_KNSD[slot], v_KNSD[slot] = k[t], v[t]
            if int8:
                scales[0][slot], scales[1][slot] = k_scale[t], v_scale[t]
        if int8:
            k, v = k * k_scale.double()[..., None], v * v_scale.double()[..., None]
        chunks.append(Chunk([0] * n, past, [int(block) for block in table]))
        dense.append((k.double().numpy(), v.double().numpy()))
    batch = make_batch(chunks, S)
    if int8:
        k_KNSD, v_KNSD = (x.nan_to_num(-128).to(torch.int8) for x in (k_KNSD, v_KNSD))
    q = torch.from_numpy(rng.standard_normal((len(batch.tokens_T), H, D))).float()
    with pytest.MonkeyPatch.context() as patch:
        slopes = add_alibi(patch, H) if alibi else None
        patch.setattr(kernels, "IN_PLACE", in_place)
        out = kernels.attention_torch(q, k_KNSD, v_KNSD, batch, 0.3, window, *scales)
    for rows, (k, v) in zip(map(slice, batch.starts, batch.starts[1:]), dense):
        expected = dense_attention(q[rows].double().numpy(), k, v, 0.3, window, slopes)
        np.testing.assert_allclose(out[rows], expected, rtol=1e-5, atol=1e-5)


def test_torch_serves_many_short_decodes_in_few_calls_and_a_long_one_in_place():
    """How many calls attention makes and what it copies, by what PyTorch itself is asked to do."""
    def calls(lens, dtype=torch.float32, tokens=1):
        asked = []

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                asked.append(function.__name__)
                return function(*args, **(kwargs or {}))

        need, at, chunks = [-(-length // 16) for length in lens], 0, []
        for length, blocks in zip(lens, need):
            chunks.append(Chunk([0] * tokens, length - tokens, list(range(at, at + blocks))))
            at += blocks
        pool, q = torch.zeros(3, at, 16, 64, dtype=dtype), torch.zeros(len(lens) * tokens, 9, 64, dtype=dtype)
        with Watch():
            kernels.attention_torch(q, pool, pool.clone(), make_batch(chunks, 16), 0.1)
        return tuple(map(asked.count, ("softmax", "scaled_dot_product_attention", "index_select")))
    mixed = [8 + 7 * i for i in range(32)]                       # 8 to 225 tokens
    for tokens in (1, 5, 8):
        assert calls(mixed, tokens=tokens) == (2, 0, 4)                # up to 127 in one call, the others in another
        assert calls([4096], tokens=tokens) == (0, 1, 0)               # read where it is
        assert calls([4096, 8000, 30, 31], tokens=tokens) == (1, 2, 2)
        assert calls([4096, 9000, 30, 31, 4097], torch.bfloat16, tokens) == (2, 1, 4)   # in 16 bits together where two are as long
    assert calls([40, 40, 50], tokens=17) == (0, 3, 0)   # each a call, but they are no short chunks


def attend(backend, requests, window, S=8, heads=(4, 2), D=16, seed=0, batch=None, int8=False):
    """The largest difference between a backend's attention and the dense one; and the batch."""
    chunks, dense, pool_k, pool_v, *scales = paged(requests, S, heads[1], D, torch.float32, seed, int8=int8)
    batch = batch or make_batch(chunks, S, DEVICE)
    q = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((len(batch.tokens_T), heads[0], D))).float()
    out = kernels.ATTENTION[backend](q.to(DEVICE), pool_k, pool_v, batch, 0.3, window, *scales).double().cpu().numpy()
    worst = 0.0
    for rows, (k, v) in zip(map(slice, batch.starts, batch.starts[1:]), dense):
        worst = np.maximum(worst, abs(out[rows] - dense_attention(q[rows].double().numpy(), k, v, 0.3, window)).max())   # NaN stays
    return worst, batch


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_with_a_window_at_every_offset_to_the_tiles(poisoned, backend):
    """A window begins at any place within a tile of 32 keys, and the first row's is not the last row's."""
    for past in range(60, 92, 4):
        requests = [(n, p + more) for p in range(past, past + 4) for n, more in ((1, 0), (9, 17), (20, 6))]
        worst, _ = attend(backend, requests, window=29, heads=(2, 1), int8=past % 8 == 0)
        assert worst < 1e-5, past
    for window in range(1, 70, 3):
        worst, _ = attend(backend, [(1, 70), (5, 50), (40, 31)], window, heads=(2, 1), int8=window % 2 == 0)
        assert worst < 1e-5, window


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_with_windows_of_their_own_share_a_step(poisoned, backend):
    """What the first layer worked out for its window does not serve the next layer's."""
    requests = [(1, 160), (1, 3), (1, 90), (40, 70), (5, 0)]
    for windows in ((None, 7, 150, 40), (7, None, 40, 150, 7)):   # the first layer sees all keys, or the fewest
        batch = None
        for window in windows:
            worst, batch = attend(backend, requests, window, batch=batch, int8=window == 40)
            assert worst < 1e-5, window


@settings(max_examples=200)
@given(requests=st.lists(st.tuples(st.sampled_from([0, 1, 1, 1, 2, 5, 16, 17, 99]), st.integers(0, 5000)), min_size=1, max_size=40),
       K=st.integers(1, 71), processors=st.integers(1, 150), window=st.one_of(st.none(), st.integers(1, 300)), TILE=st.sampled_from([16, 32, 64]))
def test_splits_cover_every_key_once_in_a_table_whose_length_the_number_of_requests_gives(requests, K, processors, window, TILE):
    """Requests of (query tokens, past); without a token, one of nobody."""
    requests = [(n, past * (n > 0)) for n, past in requests]
    batch = types.SimpleNamespace(lens=[past + n for n, past in requests], block_tables_UM=np.zeros((1, 9)),
                                  chunks=[types.SimpleNamespace(row=3 * b, tokens=[0] * n, start=past) for b, (n, past) in enumerate(requests)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "multiprocessors_of", lambda device: processors)
        table = kernels.share_out(batch, K, window, TILE, None)
    short = [b for b, (n, _) in enumerate(requests) if n <= 16]
    assert len(table) == 2 * processors // K + len(short)
    work = [row for row in table if row[0] >= 0]
    assert table[len(work):] == [(-1, 0, 0, 0, 0, 0)] * (len(table) - len(work)) and {row[0] for row in work} == set(short)
    firsts = {b: max(0, requests[b][1] + 1 - window) // TILE * TILE if window else 0 for b in short}   # of the chunk's first row
    for b in short:
        mine, length = [(i, row) for i, row in enumerate(work) if row[0] == b], batch.lens[b]
        assert mine and all(row[1] == 3 * b * 9 and row[4] == mine[0][0] and row[5] == len(mine) for _, row in mine)
        assert len(mine) == 1 or mine[-1][0] < 4 * processors // K, "there is room for its partial answers"
        cuts = [row[2] for _, row in mine] + [length]
        assert [row[3] for _, row in mine] == cuts[1:] and cuts == sorted(cuts) and all(cut % TILE == 0 for cut in cuts[:-1])
        assert cuts[0] == firsts[b]
        sizes = [-(-(stop - start) // TILE) for start, stop in zip(cuts, cuts[1:])]
        assert max(sizes) - min(sizes) <= 1, "one long split would keep all others waiting"
    every = sum(-(-(batch.lens[b] - firsts[b]) // TILE) for b in short)
    largest = max((-(-(row[3] - row[2]) // TILE) for row in work), default=0)
    assert largest <= max(1, -(-every * K // (2 * processors))), "everyone who can help does"


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
def test_an_idle_request_attends_to_nothing_and_its_output_is_zero(poisoned):
    """Also where it has several tokens, or none."""
    chunks, dense, pool_k, pool_v = paged([(1, 70), (4, 80), (1, 3)], 8, 2, 16, torch.float32, 0)
    mixed = make_batch([chunks[0], IDLE, chunks[1], EMPTY, Chunk([0] * 6, 0, []), chunks[2], IDLE, EMPTY], 8, DEVICE)
    q = torch.randn(14, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = kernels.attention_triton(q, pool_k, pool_v, mixed, 0.3)
    idle = [1, *range(3, 9), 13]
    assert not out[idle].any() and mixed.slots_T[idle].tolist() == [-1] * 8
    for rows, (k, v) in zip(([0], [2], [9, 10, 11, 12]), dense):
        np.testing.assert_allclose(out[rows].double().cpu(), dense_attention(q[rows].double().cpu().numpy(), k, v, 0.3, None), atol=1e-5)
    alone = kernels.attention_triton(q[:2], pool_k, pool_v, make_batch([IDLE, IDLE], 8, DEVICE), 0.3)
    assert not alone.any(), "and a batch of nobody but them"


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@settings(max_examples=5)
@given(longest=st.integers(1, 16), more=st.integers(0, 6), heads=st.sampled_from([(3, 1), (2, 2)]), int8=st.booleans(),
       window=st.one_of(st.none(), st.integers(1, 60)), seed=st.integers(0, 999))
def test_a_replayed_step_equals_the_step_made_directly(poisoned, longest, more, heads, int8, window, seed):
    """Decodes and verifications: two steps of as many tokens, with a longest chunk as long, are replayed by one graph.
    It writes K and V into the slots of their tokens alone, and what it computes for nobody is finite."""
    (H, K), D, S, T, rng = heads, 8, 4, longest + more, random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    q_P, k_P, v_P = (torch.randn(400, h, D, generator=generator).to(DEVICE) for h in (H, K, K))   # by position and token
    pool = KVPool(2, K, D, 999, S, torch.int8 if int8 else torch.float32, DEVICE)
    for memory in pool.memory:
        memory.copy_(torch.randint(-99, 99, memory.shape, generator=generator) if memory.dtype == torch.int8
                     else torch.rand(memory.shape, generator=generator))

    def forward(batch):
        at, outs = batch.positions_T + batch.tokens_T, []
        for l, sees in enumerate((None, window)):
            k_KNSD, v_KNSD, *scales = (memory[l] for memory in pool.memory)
            kernels.write_kv_triton(k_P[at], v_P[at], k_KNSD, v_KNSD, batch.slots_T, *scales)
            outs.append(kernels.attention_triton(q_P[at], k_KNSD, v_KNSD, batch, 0.5, sees, *scales))
        return torch.cat(outs, 1)[batch.logit_rows]

    tables = torch.tensor([rng.sample(range(1, 999), 80) for _ in range(30)]).to(DEVICE)   # block 0 is nobody's
    graphs = Graphs(forward, S, tables)
    for _ in range(2):
        sizes, used = [longest], rng.sample(range(1, 999), 990)
        while sum(sizes) < T:
            sizes.append(rng.randint(1, min(longest, T - sum(sizes))))
        chunks = []
        for row, n in enumerate(sorted(sizes)):
            past = rng.choice([0, 3, 30, 50])
            blocks = [used.pop() for _ in range(-(-(past + n) // S))]
            tables[row, :len(blocks)] = torch.tensor(blocks)
            chunks.append(Chunk([rng.randrange(99) for _ in range(n)], past, blocks, n, row))
        rng.shuffle(chunks)
        chunks.sort(key=lambda chunk: len(chunk.tokens))
        assert Graphs.fit(chunks)
        before = [memory.clone() for memory in pool.memory]
        expected = forward(make_batch(chunks, S, DEVICE, tables))
        after = [memory.clone() for memory in pool.memory]
        for memory, was in zip(pool.memory, before):
            memory.copy_(was)
        with pytest.MonkeyPatch.context() as patch:
            if DEVICE == "cpu":
                patch.setattr("batch.record", repeat)
            logits = graphs.replay(graphs.batch(chunks))
        torch.testing.assert_close(logits[:T], expected, rtol=1e-5, atol=1e-5)
        assert logits.isfinite().all() and all(torch.equal(*two) for two in zip(pool.memory, after))
    assert len(graphs.recorded) == 1


def test_a_graph_replays_short_chunks_that_want_all_their_logits():
    assert Graphs.fit([Chunk([0], 9, [0]), Chunk([0] * 16, 9, [0], 16)]) and not Graphs.fit([Chunk([0] * 17, 0, [0], 17)])
    assert not Graphs.fit([Chunk([0], 9, [0]), Chunk([0, 0], 0, [0])]) and not Graphs.fit([Chunk([0], 9, [0], 0)])
    graphs, keys = Graphs(None, 16, torch.zeros(9, 9, dtype=torch.int64)), []
    for sizes in ([1], [1] * 3, [1, 5], [2, 5], [1] * 9, [16], [3] * 6):
        batch = graphs.batch([Chunk([0] * n, 0, [0], n) for n in sizes])
        keys.append(len(batch.tokens_T))
        assert {len(x) for x in (batch.chunks, batch.positions_T, batch.slots_T, batch.kv_lens, batch.table_rows, batch.logit_rows)} == {keys[-1]}
        assert [len(chunk.tokens) for chunk in batch.chunks[:len(sizes)]] == sizes
    assert keys == [1, 4, 8, 8, 16, 16, 24]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(T=st.integers(1, 40), K=st.integers(1, 4), D=st.sampled_from([8, 24, 64]), S=st.sampled_from([1, 7, 16]),
       seed=st.integers(0, 99))
def test_kernel_writes_kv_into_its_slots_and_nowhere_else(backend, T, K, D, S, seed):
    generator = torch.Generator().manual_seed(seed)
    N = -(-T // S) + 2
    slots = torch.randperm(N * S, generator=generator)[:T]
    pools = [torch.full((K, N, S, D), math.nan, device=DEVICE) for _ in "kv"]
    new = [torch.randn(T, K + 1, D, generator=generator)[:, :K] for _ in "kv"]
    kernels.WRITE_KV[backend](*(n.to(DEVICE) for n in new), *pools, slots.to(DEVICE))
    for pool, values in zip(pools, new):
        expected = torch.full((K, N, S, D), math.nan)
        for t, slot in enumerate(slots.tolist()):
            expected[:, slot // S, slot % S] = values[t]
        torch.testing.assert_close(pool.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(T=st.integers(1, 40), K=st.integers(1, 5), D=st.sampled_from([8, 24, 64]), S=st.sampled_from([1, 7, 16]),
       dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 99))
def test_kernel_writes_bytes_and_scales_into_their_slots_and_nowhere_else(backend, T, K, D, S, dtype, seed):
    """Also where a row is all zeros, or has one element that is a thousand times the others."""
    generator = torch.Generator().manual_seed(seed)
    N = -(-T // S) + 2
    slots = torch.randperm(N * S, generator=generator)[:T]
    new = [torch.randn(T, K + 1, D, generator=generator)[:, :K].to(dtype) for _ in "kv"]
    new[0][0, 0], new[1][-1, -1], new[1][0, 0, D // 2] = 0, 0, 3000
    pools = [torch.full((K, N, S, D), -128, dtype=torch.int8, device=DEVICE) for _ in "kv"]
    scales = [torch.full((K, N, S), math.nan, device=DEVICE) for _ in "kv"]
    kernels.WRITE_KV[backend](*(x.to(DEVICE) for x in new), *pools, slots.to(DEVICE), *scales)
    for pool, scale, values in zip(pools, scales, new):
        steps, largest = in_127_steps(values.double().numpy())
        for t, slot in enumerate(slots.tolist()):
            at = slice(None), slot // S, slot % S
            np.testing.assert_allclose(scale.cpu()[at], largest[t], rtol=1e-6)
            off = pool.cpu()[at].numpy() != steps[t]   # float32 may round what is half-way to the other side
            halves = abs(abs(values[t].double().numpy() / np.where(largest[t] > 0, largest[t], 1)[:, None] % 1) - 0.5)
            assert (halves[off] < 1e-4).all()
            pool[at], scale[at] = -128, math.nan
        assert (pool == -128).all() and scale.isnan().all(), "nowhere else"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_shows_in_every_output_that_sees_its_row(poisoned, backend, fault):
    """Three tokens of two heads; the second token has it in the second head of its key, or of its value."""
    for spoilt in range(2):
        new = [torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        new[spoilt][1, 1, 5] = fault
        pool = KVPool(1, 2, 16, 2, 2, torch.int8, DEVICE)
        batch = make_batch([Chunk([0] * 3, 0, [1, 0])], 2, DEVICE)
        k_KNSD, v_KNSD, *scales = (memory[0] for memory in pool.memory)
        kernels.WRITE_KV[backend](*(x.to(DEVICE) for x in new), k_KNSD, v_KNSD, batch.slots_T, *scales)
        q = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        out = kernels.ATTENTION[backend](q, k_KNSD, v_KNSD, batch, 0.3, None, *scales)
        assert out[:, :2].isfinite().all() and out[1:, 2:].isnan().all()


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@pytest.mark.compiles("""
import bench, json, torch
odd = dict(dtype=torch.float32, S=16, H=14, K=2, window=50)   # whatever else there is, at once
bench.compile_launches(lambda: bench.launch_all(80, **odd), 90)
print(json.dumps([c for sm in (80, 90) for c in bench.compile_launches(lambda: bench.launch_all(128), sm)]))""")
def test_kernels_compile_for_gpus_that_are_not_here(compiled):
    """The interpreter accepts more than the compiler does; and what the compiler makes must not spill."""
    found = {(c["kernel"], c["gpu"]): c for c in json.loads(compiled)}
    assert set(found) == {(kernel + pool, gpu) for kernel in ("prefill", "decode", "decode of 5 tokens", "write_kv") for pool in ("", " int8")
                             for gpu in ("sm_80", "sm_90")}
    assert all(c["spills"] == 0 and c["programs"] >= 1 for c in found.values())
    for pool in ("", " int8"):
        assert found["prefill" + pool, "sm_90"]["units"] == "wgmma" and found["decode of 5 tokens" + pool, "sm_80"]["units"] == "mma"


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@pytest.mark.parametrize("change, words", [
    (dict(backend="flash"), "flash"), (dict(H=31), "31 query heads"), (dict(D=257), "257"), (dict(D=0), "head size 0"),
    (dict(dtype=torch.float64), "float64"), (dict(H=99, K=1, D=256), "99 query heads of size 256"), (dict(H=64, K=1, D=256), "64 query heads"),
    (dict(device="cuda", capability=75), "compute capability 8.0"), (dict(device="cpu", dtype=torch.bfloat16), "interpreter")])
def test_what_a_kernel_cannot_do_is_refused_by_name(monkeypatch, change, words):
    asked = dict(backend="triton", device="cuda", dtype=torch.float16, H=32, K=8, D=128, capability=86) | change
    capability, small = asked.pop("capability"), types.SimpleNamespace(shared_memory_per_block_optin=99 << 10)
    monkeypatch.setattr(kernels, "capability_of", lambda device: capability)
    monkeypatch.setattr(kernels, "INTERPRETED", asked["device"] == "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    with pytest.raises(ValueError, match=words):
        kernels.check(**asked | dict(device=torch.device(asked["device"])))
    if capability > 80 and asked["device"] == "cuda":
        kernels.check("triton", torch.device("cuda"), torch.float16, 32, 8, 128)


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("K, blocks", [(2, 2 ** 31 // (64 * 64) + 3), (5, 2 ** 29 // (64 * 64) + 5)])
def test_kernel_reaches_the_end_of_a_pool_larger_than_an_int32(monkeypatch, backend, K, blocks):
    """Element offsets beyond 2^31: in one head; and in the last of five heads, each of which is smaller. On a CPU only
    pages that are touched take memory."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("takes 17 GB of GPU memory")
    S, D, N = 64, 64, blocks
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    pool_k, pool_v = (torch.empty(K, N, S, D, dtype=torch.float16, device=DEVICE) for _ in "kv")
    chunks = [Chunk([0], 99, [N - 1, N - 3]), Chunk([0] * 20, 60, [N - 2, 0])]
    batch, rng = make_batch(chunks, S, DEVICE), np.random.default_rng(0)
    dense = []
    for chunk in chunks:
        n = chunk.start + len(chunk.tokens)
        k, v = (torch.from_numpy(rng.standard_normal((n, K, D))).half().to(DEVICE) for _ in "kv")
        for t in range(n):
            pool_k[:, chunk.blocks[t // S], t % S] = k[t] if t < n - 1 else 0
            pool_v[:, chunk.blocks[t // S], t % S] = v[t] if t < n - 1 else 0
        last = torch.tensor([chunk.blocks[(n - 1) // S] * S + (n - 1) % S], device=DEVICE)
        kernels.WRITE_KV[backend](k[-1:], v[-1:], pool_k, pool_v, last)
        dense.append((k.double().cpu().numpy(), v.double().cpu().numpy()))
    q = torch.from_numpy(rng.standard_normal((21, 2 * K, D))).half()
    out = kernels.ATTENTION[backend](q.to(DEVICE), pool_k, pool_v, batch, D ** -0.5).double().cpu().numpy()
    for rows, (k, v) in zip((slice(0, 1), slice(1, 21)), dense):
        np.testing.assert_allclose(out[rows], dense_attention(q[rows].double().numpy(), k, v, D ** -0.5, None), atol=4e-3)


# ---------------------------------------------------------------------------------------------
# The pool

class PoolMachine(RuleBasedStateMachine):
    """The pool against a plain account of who owns what. Instead of K and V, each slot holds the tokens that they depend on."""

    @initialize(N=st.integers(2, 12), S=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.int8]), prefix_cache=st.booleans())
    def start(self, N, S, dtype, prefix_cache):
        self.pool = KVPool(1, 1, 8, N, S, dtype, prefix_cache=prefix_cache)
        assert len(self.pool.memory) == (4 if dtype == torch.int8 else 2)
        self.memory = {}       # (block, offset) -> all tokens up to this one
        self.requests = []     # (tokens, table, tokens computed)
        self.released = []     # blocks in the order in which they were last let go

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), room=st.integers(0, 3))
    def admit(self, tokens, room):
        table, pool = BlockTable(), self.pool
        found = pool.match(table, tokens)
        assert found % pool.block_size == 0 and found < len(tokens) and len(table.blocks) * pool.block_size == found
        for t in range(found):   # what was found is what would have been computed
            assert self.memory[table.blocks[t // pool.block_size], t % pool.block_size] == tokens[:t + 1]
        before, kept = pool.available, list(table.blocks)
        need = -(-len(tokens) // pool.block_size) - len(kept)
        cached = set(pool.cached)
        grown = pool.grow(table, len(tokens))
        assert grown == (need <= before)
        if grown:
            evicted = [b for b in self.released if b in cached and b in table.blocks[len(kept):]]
            survivors = [b for b in self.released if b in pool.cached]
            assert all(self.released.index(e) < self.released.index(s) for e in evicted for s in survivors)
            self.requests.append([tokens, table, found])
        else:
            assert table.blocks == kept
            self._release(table)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), n=st.integers(1, 9), token=st.integers(0, 1))
    def compute(self, data, n, token):
        request = data.draw(st.sampled_from(self.requests))
        tokens, table, computed = request
        if computed == len(tokens):   # decode: one more token, if there is room
            before, free = list(table.blocks), self.pool.available
            if not (self.pool.grow(table, len(tokens) + 1) and self.pool.own_last(table)):
                assert free == 0 and table.blocks == before
                return
            for old, new in zip(before, table.blocks):   # copied on write: what was seen there is seen here
                for offset in range(self.pool.block_size):
                    if old != new and (old, offset) in self.memory:
                        self.memory[new, offset] = self.memory[old, offset]
                        for memory in self.pool.memory:
                            assert torch.equal(memory[:, :, old, offset], memory[:, :, new, offset])
            tokens.append(token)
        for t in range(computed, min(computed + n, len(tokens))):
            block = table.blocks[t // self.pool.block_size]
            assert self.pool.references[block] == 1 and block not in self.pool.digests, "a shared block is never written"
            self._write(block, t % self.pool.block_size, tokens[:t + 1])
            request[2] = t + 1
        self.pool.commit(table, tokens, request[2])

    def _write(self, block, offset, tokens):
        self.memory[block, offset] = tokens
        for memory in self.pool.memory:
            memory[:, :, block, offset] = 100 * random.random()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def fork(self, data):
        tokens, table, computed = data.draw(st.sampled_from(self.requests))
        if computed == len(tokens):
            self.pool.fork(table, other := BlockTable())
            assert other.blocks == table.blocks
            self.requests.append([list(tokens), other, computed])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), n=st.integers(0, 12))
    def fail(self, tokens, n):
        """A step promises blocks to the index, somebody finds them, and then the step fails."""
        pool, (first, second), known = self.pool, (BlockTable(), BlockTable()), set(self.pool.index)
        found = pool.match(first, tokens)
        if pool.grow(first, len(tokens)):
            evicted = known - set(pool.index)
            pool.commit(first, tokens, max(found, min(n, len(tokens))))
            also_found = pool.match(second, tokens)
            assert also_found == (0 if not pool.prefix_cache else max(found, min(
                n, len(tokens) - 1) // pool.block_size * pool.block_size))
            pool.forget(first, found)
            assert set(pool.index) == known - evicted
        for table in (second, first):
            self._release(table)

    @invariant()
    def the_device_sees_every_table(self):
        if hasattr(self, "pool"):
            self.pool.upload()
            rows = [table.row for _, table, _ in self.requests]
            assert len(set(rows)) == len(rows) and not set(rows) & set(self.pool.free_rows)
            for _, table, _ in self.requests:
                assert self.pool.block_tables_UM[table.row, :len(table.blocks)].tolist() == table.blocks

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data):
        request = data.draw(st.sampled_from(self.requests))
        self.requests = [r for r in self.requests if r is not request]
        self._release(request[1])

    def _release(self, table):
        for block in reversed(table.blocks):
            if self.pool.references[block] == 1:
                self.released = [b for b in self.released if b != block] + [block]
        self.pool.release(table)

    @invariant()
    def every_block_is_free_cached_or_referenced(self):
        if not hasattr(self, "pool"):
            return
        held = Counter(b for _, table, _ in self.requests for b in table.blocks)
        pool = self.pool
        assert [held[b] for b in range(pool.num_blocks)] == pool.references
        assert sorted([*pool.free, *pool.cached, *held]) == list(range(pool.num_blocks))
        assert pool.num_referenced == len(held)
        assert {d: b for b, d in pool.digests.items()} == pool.index and set(pool.cached) <= set(pool.digests)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)


def test_tables_that_grow_side_by_side_stay_in_one_piece():
    pool = KVPool(1, 1, 1, 64, 4)
    tables = [BlockTable() for _ in range(3)]
    for tokens in range(9, 61):
        for table in tables:
            assert pool.grow(table, tokens, 64 if tokens == 9 else 0)
    for table in tables:
        assert table.blocks == list(range(table.blocks[0], table.blocks[0] + 15))


def test_finished_requests_prefix_is_found_until_the_space_is_needed():
    pool = KVPool(1, 1, 8, 4, 4)
    first, tokens = BlockTable(), list(range(10))
    pool.grow(first, 10)
    pool.commit(first, tokens, 10)
    blocks = first.blocks
    pool.release(first)
    assert (len(pool.free), len(pool.cached)) == (2, 2)
    again = BlockTable()
    assert pool.match(again, tokens) == 8 and again.blocks == blocks[:2]
    pool.release(again)
    assert pool.match(BlockTable(), [99] + tokens[1:]) == 0
    greedy = BlockTable()
    assert pool.grow(greedy, 12) and not pool.grow(greedy, 17)
    assert pool.match(again := BlockTable(), tokens) == 4, "the end of a prefix is evicted before its beginning"
