"""How we know. Each test reads like the sentence that it proves, and compares with something computed another way.
(Read each part beside the file that it tests.)

    python -m pytest            all of it; no GPU needed: the kernels run in Triton's interpreter
    python -m pytest -k kernel  one part
    python -m pytest -k soak --soak-minutes 30 -s   the engine under pressure, for as long as you like

In the order of the files: kernels, pool, checkpoints, forward pass, tokenizers, engine, command line,
measurements, demo, and what the words say.
"""

import base64
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import types
import unicodedata
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # for the fixture below, on a GPU
import torch
import torch.overrides
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bench
import kernels
import model
import nanoserve
import paged_kv
import watch as watch_loop
from kernels import Chunk, make_batch
from nanoserve import LLM, SamplingParams
from paged_kv import BlockTable, KVPool

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["naive", "torch"] + (["triton"] if kernels.load_triton() else [])
torch.set_num_threads(1)   # the tensors are tiny, and the other core may be running another test
settings.register_profile("nanoserve", deadline=None, derandomize=True, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("nanoserve")


@pytest.fixture
def poisoned():
    """Every torch.empty is filled with NaN, so that an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------
# Kernels

def dense_attention(q, k, v, scale, window, slopes=None):
    """One request, K and V in order, no pool: q [T, H, D], k and v [kv_len, K, D], numpy float64."""
    out = np.zeros(q.shape)
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


def paged(requests, S, K, D, dtype, seed, logits=1):
    """Requests of (query tokens, past) as numpy q, k, v each, and as a batch over a pool with shuffled blocks
    in which every slot that no request owns is NaN."""
    rng = np.random.default_rng(seed)
    requests = sorted(requests, key=lambda r: r[0] > 1)
    need = [-(-(n + past) // S) for n, past in requests]
    shuffled = rng.permutation(sum(need) + 2).tolist()
    pool_k = torch.full((K, len(shuffled), S, D), math.nan, dtype=dtype)
    pool_v = pool_k.clone()
    chunks, dense = [], []
    for (n, past), blocks in zip(requests, need):
        table = [shuffled.pop() for _ in range(blocks)]
        k, v = (torch.from_numpy(rng.standard_normal((n + past, K, D))).to(dtype) for _ in "kv")
        for t in range(n + past):
            pool_k[:, table[t // S], t % S] = k[t]
            pool_v[:, table[t // S], t % S] = v[t]
        chunks.append(Chunk([0] * n, past, table, logits))
        dense.append((k.double().numpy(), v.double().numpy()))
    return chunks, dense, pool_k.to(DEVICE), pool_v.to(DEVICE)


ragged = st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 70)), st.integers(0, 90)), min_size=1, max_size=4)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(requests=ragged, heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (5, 1), (14, 2), (32, 1)]),
       D=st.sampled_from([4, 8, 16, 20, 64, 80, 96, 128, 256]), S=st.sampled_from([1, 3, 8, 16, 32, 64, 256]),
       window=st.one_of(st.none(), st.integers(1, 80)), dtype=st.sampled_from([torch.float32, torch.float16]),
       alibi=st.booleans(), seed=st.integers(0, 999))
def test_kernel_equals_dense_attention(poisoned, backend, requests, heads, D, S, window, dtype, alibi, seed):
    (H, K), scale = heads, 1.5 * D ** -0.5
    chunks, dense, pool_k, pool_v = paged(requests, S, K, D, dtype, seed)
    batch = make_batch(chunks, S, DEVICE)
    q = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((len(batch.tokens_T), H + 2, D))).to(dtype)
    slopes = 2.0 ** -torch.arange(1, H + 1) if alibi else None
    out = kernels.ATTENTION[backend](q.to(DEVICE)[:, :H], pool_k, pool_v, batch, scale, window,
                                     slopes.to(DEVICE) if alibi else None).double().cpu().numpy()
    start = 0
    for chunk, (k, v) in zip(chunks, dense):
        rows = slice(start, start := start + len(chunk.tokens))
        expected = dense_attention(q[rows, :H].double().numpy(), k, v, scale, window, slopes.double().numpy() if alibi else None)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        np.testing.assert_allclose(out[rows], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_holds_when_scores_differ_by_hundreds(poisoned, backend):
    """Without the running max, exp overflows; without the rescale, early keys keep a weight that they lost."""
    chunks, dense, pool_k, pool_v = paged([(1, 199), (40, 60)], 8, 1, 16, torch.float32, 0)
    batch = make_batch(chunks, 8, DEVICE)
    q = torch.from_numpy(np.random.default_rng(1).standard_normal((41, 2, 16))).float()
    out = kernels.ATTENTION[backend](q.to(DEVICE), pool_k, pool_v, batch, 100.0).double().cpu().numpy()
    for rows, (k, v) in zip((slice(0, 1), slice(1, 41)), dense):
        np.testing.assert_allclose(out[rows], dense_attention(q[rows].double().numpy(), k, v, 100.0, None), atol=1e-3)


@settings(max_examples=60)
@given(lens=st.lists(st.tuples(st.one_of(st.just(1), st.integers(2, 40)), st.integers(0, 200)), min_size=1, max_size=6),
       heads=st.sampled_from([(4, 4), (6, 2), (5, 1)]), S=st.sampled_from([1, 4, 16]), alibi=st.booleans(),
       window=st.one_of(st.none(), st.integers(1, 150)), in_place=st.sampled_from([0, 40_000, 10 ** 9]), seed=st.integers(0, 99))
def test_torch_reads_neighbouring_blocks_in_place_and_gathers_others(poisoned, lens, heads, S, alibi, window, in_place, seed):
    (H, K), D, rng = heads, 16, np.random.default_rng(seed)
    requests = sorted(lens, key=lambda r: r[0] > 1)
    need = [-(-(n + past) // S) for n, past in requests]
    k_KNSD, v_KNSD = torch.full((2, K, sum(need) + len(need), S, D), math.nan)
    chunks, dense, at = [], [], 0
    for (n, past), blocks in zip(requests, need):
        table = list(range(at, at + blocks))
        at += blocks + 1                          # a block of nobody between two requests
        if rng.random() < 0.3:
            rng.shuffle(table)
        k, v = torch.from_numpy(rng.standard_normal((2, n + past, K, D))).float()
        for t in range(n + past):
            k_KNSD[:, table[t // S], t % S], v_KNSD[:, table[t // S], t % S] = k[t], v[t]
        chunks.append(Chunk([0] * n, past, [int(block) for block in table]))
        dense.append((k.double().numpy(), v.double().numpy()))
    batch = make_batch(chunks, S)
    q = torch.from_numpy(rng.standard_normal((len(batch.tokens_T), H, D))).float()
    slopes = 2.0 ** -torch.arange(1, H + 1) if alibi else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "IN_PLACE", in_place)
        out = kernels.attention_torch(q, k_KNSD, v_KNSD, batch, 0.3, window, slopes)
    for rows, (k, v) in zip(map(slice, batch.starts, batch.starts[1:]), dense):
        expected = dense_attention(q[rows].double().numpy(), k, v, 0.3, window, slopes.double().numpy() if alibi else None)
        np.testing.assert_allclose(out[rows], expected, rtol=1e-5, atol=1e-5)


def test_torch_serves_many_short_decodes_in_few_calls_and_a_long_one_in_place():
    """How many calls attention makes and what it copies, by what PyTorch itself is asked to do."""
    def calls(lens):
        asked = []

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                asked.append(function.__name__)
                return function(*args, **(kwargs or {}))

        need, at, chunks = [-(-length // 16) for length in lens], 0, []
        for length, blocks in zip(lens, need):
            chunks.append(Chunk([0], length - 1, list(range(at, at + blocks))))
            at += blocks
        pool, q = torch.zeros(3, at, 16, 64), torch.zeros(len(lens), 9, 64)
        with Watch():
            kernels.attention_torch(q, pool, pool, make_batch(chunks, 16), 0.1)
        return asked.count("scaled_dot_product_attention"), asked.count("index_select")
    mixed = [8 + 7 * i for i in range(32)]                       # 8 to 225 tokens
    assert calls(mixed) == (2, 4)                          # up to 127 in one call, the others in another
    assert calls([4096]) == (1, 0)                         # read where it is
    assert calls([4096, 8000, 30, 31]) == (3, 2)


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


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
def test_kernels_compile_for_gpus_that_are_not_here():
    """The interpreter accepts more than the compiler does; and what the compiler makes must not spill."""
    code = """
import bench, json, torch
odd = dict(dtype=torch.float32, S=16, H=14, K=2, window=50, slopes_H=torch.ones(14))   # whatever else there is, at once
bench.compile_launches(lambda: bench.launch_all(80, **odd), 90)
print(json.dumps([c for sm in (80, 90) for c in bench.compile_launches(lambda: bench.launch_all(128), sm)]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = {(c["kernel"], c["gpu"]): c for c in json.loads(done.stdout)}
    assert set(compiled) == {(kernel, gpu) for kernel in ("prefill", "decode", "write_kv") for gpu in ("sm_80", "sm_90")}
    assert all(c["spills"] == 0 and c["programs"] >= 1 for c in compiled.values())
    assert compiled["prefill", "sm_90"]["units"] == "wgmma" and compiled["decode", "sm_80"]["units"] == "mma"


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@pytest.mark.parametrize("change, words", [
    (dict(backend="flash"), "flash"), (dict(H=31), "31 query heads"), (dict(D=257), "257"), (dict(D=0), "head size 0"), (dict(S=0), "block size 0"),
    (dict(dtype=torch.float64), "float64"), (dict(H=99, K=1, D=256), "99 query heads of size 256"), (dict(H=64, K=1, D=256), "64 query heads"),
    (dict(device="cuda", capability=75), "compute capability 8.0"), (dict(device="cpu", dtype=torch.bfloat16), "interpreter")])
def test_what_a_kernel_cannot_do_is_refused_by_name(monkeypatch, change, words):
    asked = dict(backend="triton", device="cuda", dtype=torch.float16, H=32, K=8, D=128, S=16, capability=86) | change
    capability, small = asked.pop("capability"), types.SimpleNamespace(shared_memory_per_block_optin=99 << 10)
    monkeypatch.setattr(kernels, "capability_of", lambda device: capability)
    monkeypatch.setattr(kernels, "INTERPRETED", asked["device"] == "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    with pytest.raises(ValueError, match=words):
        kernels.check(**asked | dict(device=torch.device(asked["device"])))
    if capability > 80 and asked["device"] == "cuda":
        kernels.check("triton", torch.device("cuda"), torch.float16, 32, 8, 128, 16)


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_kernel_reaches_the_end_of_a_pool_larger_than_an_int32(backend):
    """Element offsets beyond 2^31 in one head, and in the second head. On a CPU only pages that are touched take memory."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("takes 17 GB of GPU memory")
    S, D, N = 64, 64, 2 ** 31 // (64 * 64) + 3
    pool_k, pool_v = (torch.empty(2, N, S, D, dtype=torch.float16, device=DEVICE) for _ in "kv")
    chunks = [Chunk([0], 99, [N - 1, N - 3]), Chunk([0] * 20, 60, [N - 2, 0])]
    batch, rng = make_batch(chunks, S, DEVICE), np.random.default_rng(0)
    dense = []
    for chunk in chunks:
        n = chunk.start + len(chunk.tokens)
        k, v = (torch.from_numpy(rng.standard_normal((n, 2, D))).half().to(DEVICE) for _ in "kv")
        for t in range(n):
            pool_k[:, chunk.blocks[t // S], t % S] = k[t] if t < n - 1 else 0
            pool_v[:, chunk.blocks[t // S], t % S] = v[t] if t < n - 1 else 0
        last = torch.tensor([chunk.blocks[(n - 1) // S] * S + (n - 1) % S], device=DEVICE)
        kernels.WRITE_KV[backend](k[-1:], v[-1:], pool_k, pool_v, last)
        dense.append((k.double().cpu().numpy(), v.double().cpu().numpy()))
    q = torch.from_numpy(rng.standard_normal((21, 4, D))).half()
    out = kernels.ATTENTION[backend](q.to(DEVICE), pool_k, pool_v, batch, D ** -0.5).double().cpu().numpy()
    for rows, (k, v) in zip((slice(0, 1), slice(1, 21)), dense):
        np.testing.assert_allclose(out[rows], dense_attention(q[rows].double().numpy(), k, v, D ** -0.5, None), atol=4e-3)


# ---------------------------------------------------------------------------------------------
# The pool

class PoolMachine(RuleBasedStateMachine):
    """The pool against a plain account of who owns what. Instead of K and V, each slot holds the tokens that they depend on."""

    @initialize(N=st.integers(2, 12), S=st.integers(1, 4), prefix_cache=st.booleans())
    def start(self, N, S, prefix_cache):
        self.pool = KVPool(1, 1, 8, N, S, prefix_cache=prefix_cache)
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
                        assert torch.equal(self.pool.k_LKNSD[:, :, old, offset], self.pool.k_LKNSD[:, :, new, offset])
                        assert torch.equal(self.pool.v_LKNSD[:, :, old, offset], self.pool.v_LKNSD[:, :, new, offset])
            tokens.append(token)
        for t in range(computed, min(computed + n, len(tokens))):
            block = table.blocks[t // self.pool.block_size]
            assert self.pool.references[block] == 1 and block not in self.pool.digests, "a shared block is never written"
            self._write(block, t % self.pool.block_size, tokens[:t + 1])
            request[2] = t + 1
        self.pool.commit(table, tokens, request[2])

    def _write(self, block, offset, tokens):
        self.memory[block, offset] = tokens
        self.pool.k_LKNSD[:, :, block, offset] = random.random()
        self.pool.v_LKNSD[:, :, block, offset] = random.random()

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


# ---------------------------------------------------------------------------------------------
# Checkpoints: written here at random, in the names of the real ones

GPT2 = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=61, n_positions=160, n_embd=32, n_layer=2,
            n_head=4, eos_token_id=50256, bos_token_id=50256)
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=61, hidden_size=32, intermediate_size=48,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160,
             rms_norm_eps=1e-5, eos_token_id=None)


def gpt2_tensors(c):
    E, I = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    shapes = {"wte.weight": (c["vocab_size"], E), "wpe.weight": (c["n_positions"], E), "ln_f.weight": (E,), "ln_f.bias": (E,)}
    for l in range(c["n_layer"]):
        for name, shape in {"ln_1": (E,), "ln_2": (E,), "attn.c_attn": (E, 3 * E), "attn.c_proj": (E, E),
                            "mlp.c_fc": (E, I), "mlp.c_proj": (I, E)}.items():
            shapes[f"h.{l}.{name}.weight"], shapes[f"h.{l}.{name}.bias"] = shape, shape[-1:]
    if c.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = c["vocab_size"], E
    return random_tensors(shapes)


def llama_tensors(c):
    E, I, H, K = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"]
    D = c.get("head_dim") or E // H
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], E), "model.norm.weight": (E,)}
    for l in range(c["num_hidden_layers"]):
        at = f"model.layers.{l}."
        shapes |= {at + "input_layernorm.weight": (E,), at + "post_attention_layernorm.weight": (E,)}
        for name, shape in {"self_attn.q_proj": (H * D, E), "self_attn.k_proj": (K * D, E), "self_attn.v_proj": (K * D, E),
                            "self_attn.o_proj": (E, H * D), "mlp.gate_proj": (I, E), "mlp.up_proj": (I, E),
                            "mlp.down_proj": (E, I)}.items():
            shapes[f"{at}{name}.weight"] = shape
            if (c["model_type"] == "qwen2" and name[10:] in ("q_proj", "k_proj", "v_proj")
                    or c.get("attention_bias") and "attn" in name or c.get("mlp_bias") and "mlp" in name):
                shapes[f"{at}{name}.bias"] = shape[:1]
        if c["model_type"] == "qwen3":
            shapes |= {at + "self_attn.q_norm.weight": (D,), at + "self_attn.k_norm.weight": (D,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = c["vocab_size"], E
    return random_tensors(shapes)


def random_tensors(shapes):
    g = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=g) * (0.3 if len(shape) > 1 else 0.1)
            + (1 if "norm.weight" in name or "ln_" in name and "weight" in name else 0) for name, shape in shapes.items()}


def write_checkpoint(folder, config, tensors, shards=1, **more):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in more.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    (folder / "model.safetensors").unlink(missing_ok=True)
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file)
        where |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


# An independent forward: the whole sequence at once, no cache, no paging, nothing fused, float64.

def plain_attention(q, k, v, scale, window):
    """q [H, T, D], k and v [K, T, D]."""
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    ones = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
    seen = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
    return torch.where(seen, q @ k.mT * scale, -torch.inf).softmax(-1) @ v


def plain_gpt2(c, w, ids):
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in w.items()}
    E, H = c["n_embd"], c["n_head"]
    act = {"gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
           "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
           "relu": lambda x: x.clamp(min=0)}[c.get("activation_function", "gelu_new")]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + c.get("layer_norm_epsilon", 1e-5)).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def conv(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    for l in range(c["n_layer"]):
        q, k, v = (part.view(-1, H, E // H).transpose(0, 1) for part in conv(norm(x, f"h.{l}.ln_1"), f"h.{l}.attn.c_attn").split(E, -1))
        scale = (E // H) ** -0.5 / (l + 1 if c.get("scale_attn_by_inverse_layer_idx") else 1)
        x = x + conv(plain_attention(q, k, v, scale, None).transpose(0, 1).reshape(-1, E), f"h.{l}.attn.c_proj")
        x = x + conv(act(conv(norm(x, f"h.{l}.ln_2"), f"h.{l}.mlp.c_fc")), f"h.{l}.mlp.c_proj")
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


def plain_llama(c, w, ids):
    w = {name.removeprefix("model."): tensor.double() for name, tensor in w.items()}
    H, K, T = c["num_attention_heads"], c["num_key_value_heads"], len(ids)
    D = c.get("head_dim") or c["hidden_size"] // H
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    angles = torch.zeros(T, D // 2, dtype=torch.float64)
    for i in range(D // 2):
        f = theta ** (-2 * i / D)
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "linear":
            f /= rope["factor"]
        if kind == "llama3":
            wavelength, old = 2 * math.pi / f, rope["original_max_position_embeddings"]
            if wavelength > old / rope["low_freq_factor"]:
                f /= rope["factor"]
            elif wavelength > old / rope["high_freq_factor"]:
                smooth = (old / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
                f = (1 - smooth) * f / rope["factor"] + smooth * f
        angles[:, i] = torch.arange(T) * f

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[name + ".weight"]

    def project(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def turn(x):   # each pair of a head's dimensions as a complex number
        x = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([x.real, x.imag], -1)

    x = w["embed_tokens.weight"][ids]
    for l in range(c["num_hidden_layers"]):
        at, h = f"layers.{l}.", norm(x, f"layers.{l}.input_layernorm")
        q, k, v = (project(h, f"{at}self_attn.{name}_proj").view(T, -1, D).transpose(0, 1) for name in "qkv")
        if c["model_type"] == "qwen3":
            q, k = norm(q, at + "self_attn.q_norm"), norm(k, at + "self_attn.k_norm")
        window = c.get("sliding_window")
        if c["model_type"] != "mistral" and not (c.get("use_sliding_window") and l >= c.get("max_window_layers", 28)):
            window = None
        o = plain_attention(turn(q), turn(k), v, D ** -0.5, window)
        x = x + project(o.transpose(0, 1).reshape(T, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        gate = project(h, at + "mlp.gate_proj")
        x = x + project(gate * torch.sigmoid(gate) * project(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    return norm(x, "norm") @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def plain(config, tensors, ids):
    return (plain_gpt2 if config["model_type"] == "gpt2" else plain_llama)(config, tensors, ids)


def plain_greedy(config, tensors, ids, n):
    """n greedy tokens, the whole prefix recomputed for each."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(plain(config, tensors, ids)[-1].argmax()))
    return ids[-n:]


LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES = {
    "gpt2": GPT2,
    "gpt2 relu, n_inner, scaled by layer": GPT2 | dict(activation_function="relu", n_inner=40, layer_norm_epsilon=1e-3,
                                                       scale_attn_by_inverse_layer_idx=True),
    "gpt2 gelu, untied": GPT2 | dict(activation_function="gelu", tie_word_embeddings=False),
    "llama 2": LLAMA | dict(num_key_value_heads=4),
    "llama one KV head, own head size, biases, tied": LLAMA | dict(
        num_attention_heads=5, num_key_value_heads=1, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama 3.1": LLAMA | dict(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE | {"rope_type": "llama3"}, torch_dtype="bfloat16"),
    "llama 3.1, new spelling": LLAMA | dict(rope_parameters=LLAMA3_ROPE | dict(rope_type="llama3", rope_theta=2e4), dtype="float32"),
    "llama linear rope, old spelling": LLAMA | dict(rope_scaling={"type": "linear", "factor": 4.0}),
    "mistral": LLAMA | dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=9, num_key_value_heads=1),
    "qwen2": LLAMA | dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], sliding_window=5),
    "qwen2 with windows": LLAMA | dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], sliding_window=5,
                                       use_sliding_window=True, max_window_layers=1),
    "qwen3": LLAMA | dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=16, num_attention_heads=6),
}


def tensors_of(config):
    return (gpt2_tensors if config["model_type"] == "gpt2" else llama_tensors)(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_a_plain_forward_at_every_position(tmp_path, name):
    config = FAMILIES[name]
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors)
    ids = torch.randint(61, (110,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = plain(config, tensors, ids)
    for options in (dict(attention="torch"), dict(attention="torch", block_size=5, max_batched_tokens=37),
                    *[dict(attention="triton", block_size=8, max_batched_tokens=50)] * (kernels.load_triton() is not None)):
        logits = LLM(tmp_path, dtype="float32", **options).logits(ids).double().cpu()
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max(), options


@settings(max_examples=60)
@given(rows=st.one_of(st.just(1), st.integers(1, 70)), inputs=st.integers(1, 40), outputs=st.integers(1, 120),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_every_way_to_multiply_gives_the_same_product(poisoned, rows, inputs, outputs, dtype, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = (torch.from_numpy(rng.standard_normal(shape)).to(dtype)
                       for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    expected, tolerance = x.double().numpy() @ weight.double().numpy().T, 1e-5 if dtype == torch.float32 else 2e-2
    x = x.T.contiguous().T if seed % 2 else x   # some ways leave their results transposed
    for way in model.ways_to_multiply(rows, weight):
        np.testing.assert_allclose(way(x, weight).double(), expected, rtol=tolerance, atol=tolerance * inputs ** 0.5)
    for bias_ in (None, bias):   # the trials of a race are right as well
        for _ in range(3):
            out = model.linear(x, model.Part(weight, bias_)).double().numpy()
            np.testing.assert_allclose(out, expected + (0 if bias_ is None else bias.double().numpy()),
                                       rtol=tolerance, atol=2 * tolerance * inputs ** 0.5)


def test_steps_without_logits_do_not_choose_how_the_head_multiplies(lone, monkeypatch):
    monkeypatch.setattr(model, "RACES", {})
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, max_batched_tokens=2, device="cpu", dtype="float32")
    i = llm.add(max(prompts, key=len), SamplingParams(max_tokens=1))
    llm.step()
    head = llm.model.weights["head"][0].weight
    assert model.RACES and not any(kind[0] == head.shape for kind in model.RACES)
    llm.abort(i)


def test_the_fastest_way_stays():
    ran = []
    def way(name, seconds):
        def run(x):
            ran.append(name)
            time.sleep(seconds * (8 if ran.count(name) == 3 else 1))   # once, and last, something disturbs it
            return x + 1
        return run
    race = model.Race([way("slow", 0.02), way("fast", 0.005), way("slower", 0.03)])
    assert [race(i) for i in range(12)] == list(range(1, 13))
    assert [ran.count(name) for name in ("slow", "slower")] == [3, 3] and ran[9:] == ["fast"] * 3


@pytest.mark.parametrize("faster, slower", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtype_auto_is_the_faster_one_that_holds_the_stored_weights(tmp_path, monkeypatch, faster, slower):
    write_checkpoint(tmp_path, CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    assert LLM(tmp_path, device="cpu").dtype == "float32"      # stored so: nothing else would do
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))

    def pretend(x, weight):
        race = model.Race([None])
        race.seconds = {None: 2.0 if str(weight.dtype) == f"torch.{slower}" else 1.0}
        race.best = lambda x, weight: x @ weight.T
        return race
    monkeypatch.setattr(model, "race_for", pretend)
    monkeypatch.setattr(nanoserve, "race_for", pretend)
    llm = LLM(tmp_path, device="cpu")
    assert llm.dtype == faster and llm.dtype_reason == f"2.0 times as fast as {slower} here"
    assert llm.pool.k_LKNSD.dtype == getattr(torch, faster)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_prefix_shards_buffers_and_stored_dtype_make_no_difference(tmp_path, name, stored):
    config = FAMILIES[name] | dict(torch_dtype=str(stored))
    tensors = {n: t.to(stored) for n, t in tensors_of(config).items()}
    if name == "gpt2":   # as transformers saves it, with the mask buffers of old versions
        write_checkpoint(tmp_path / "other", config, {f"transformer.{n}": t for n, t in tensors.items()}
                         | {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool),
                            "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}, shards=3)
    else:
        write_checkpoint(tmp_path / "other", config, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, shards=3)
    write_checkpoint(tmp_path / "one", config, tensors)
    a, b = (LLM(tmp_path / which, dtype="float32").logits(list(range(50))).cpu() for which in ("one", "other"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)   # a race of products may be under way
    expected = plain(config, tensors, list(range(50)))
    assert (a - expected).abs().max() < 1e-4 * expected.abs().max()


def test_eos_comes_from_generation_config_first_and_may_be_a_list(tmp_path):
    for config_eos, generation, expected in [(3, None, [3]), ([3, 5], None, [3, 5]), (3, {"eos_token_id": [7, 8]}, [7, 8]),
                                             (3, {}, [3]), (None, None, []), (50256, None, [50256])]:
        more = {} if generation is None else {"generation_config": generation}
        write_checkpoint(tmp_path, LLAMA | dict(eos_token_id=config_eos), {}, **more)
        assert model.read_config(tmp_path).eos == expected


def test_eos_ends_a_text_unless_ignored(tmp_path):
    tensors = llama_tensors(LLAMA)
    first = plain_greedy(LLAMA, tensors, [1, 2, 3], 12)
    eos = first[5]
    write_checkpoint(tmp_path, LLAMA | dict(eos_token_id=[60, eos]), tensors)
    llm = LLM(tmp_path)
    out, on = llm.generate([[1, 2, 3]] * 2, [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, ignore_eos=True)])
    assert out.token_ids == first[:first.index(eos) + 1] and out.finish_reason == "stop"
    assert on.token_ids == first and on.finish_reason == "length"


def test_tied_head_is_found_under_either_name_and_left_alone_if_it_differs(tmp_path):
    config = LLAMA | dict(tie_word_embeddings=True)
    tensors, ids = llama_tensors(config), list(range(40))
    other = {n: t for n, t in tensors.items() if "embed" not in n} | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    differs = tensors | {"lm_head.weight": llama_tensors(LLAMA)["lm_head.weight"]}
    for stored, expected in [(other, plain(config, tensors, ids)), (differs, plain(LLAMA, differs, ids))]:
        write_checkpoint(tmp_path, config, stored)
        assert (LLM(tmp_path).logits(ids).cpu() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_weights_that_are_not_finite_end_their_request_with_a_reason(tmp_path):
    tensors = llama_tensors(LLAMA)
    tensors["model.embed_tokens.weight"][7] = math.nan   # only who uses token 7 is harmed
    llm = LLM(write_checkpoint(tmp_path, LLAMA, tensors))
    hot = SamplingParams(max_tokens=3, temperature=1.0, seed=0)
    outs = llm.generate([[1, 2], [1, 7, 2], [1, 7], [3]], [SamplingParams(max_tokens=3), hot, SamplingParams(max_tokens=3), hot])
    assert [out.finish_reason for out in outs] == ["length", "error", "error", "length"] and "not finite" in outs[1].error
    assert llm.pool.num_referenced == 0


def test_loading_needs_little_more_memory_than_one_copy_of_the_weights(tmp_path):
    config = LLAMA | dict(vocab_size=4000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6,
                          num_attention_heads=8, num_key_value_heads=8)
    write_checkpoint(tmp_path, config, llama_tensors(config))
    weights = (tmp_path / "model.safetensors").stat().st_size
    code = f"""
import resource, sys; from pathlib import Path; import torch, model, safetensors
c = model.read_config(Path({str(tmp_path)!r}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.load_weights(Path({str(tmp_path)!r}), c, torch.device('cpu'), torch.float32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"""
    grown = int(subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout)
    assert weights > 250e6 and grown < 1.25 * weights


# Everything that can be wrong with a checkpoint, and what the error must name.

def broken(name, *words):
    def register(change):
        BROKEN[name] = change, words
    return register


BROKEN = {}
broken("no config", "config.json")(lambda f, c, t: (f / "config.json").unlink())
broken("config torn", "config.json", "JSON")(lambda f, c, t: (f / "config.json").write_text('{"model_type": "lla'))
broken("config not UTF-8", "config.json")(lambda f, c, t: (f / "config.json").write_bytes(b'{"a": "\xff"}'))
broken("config without a key", "hidden_size")(lambda f, c, t: rewrite(f, c, hidden_size=None))
broken("config with text for a number", "vocab_size", "many")(lambda f, c, t: rewrite(f, c, vocab_size="many"))
broken("architecture", "BertModel")(lambda f, c, t: rewrite(f, c, model_type="bert", architectures=["BertModel"]))
broken("architecture of a known type", "LlamaForSequenceClassification")(
    lambda f, c, t: rewrite(f, c, architectures=["LlamaForSequenceClassification"]))
broken("rope type", "yarn")(lambda f, c, t: rewrite(f, c, rope_scaling={"rope_type": "yarn", "factor": 2.0}))
broken("rope type as a list", "rope type")(lambda f, c, t: rewrite(f, c, rope_scaling={"rope_type": ["linear"], "factor": 2.0}))
broken("rope without its factor", "factor")(lambda f, c, t: rewrite(f, c, rope_scaling={"type": "linear"}))
broken("activation", "swish7")(lambda f, c, t: rewrite(f, c, hidden_act="swish7"))
broken("quantised", "quantization_config")(lambda f, c, t: rewrite(f, c, quantization_config={"bits": 4}))
broken("eps as text", "rms_norm_eps", "1e-5")(lambda f, c, t: rewrite(f, c, rms_norm_eps="1e-5"))
broken("eps below 0", "rms_norm_eps")(lambda f, c, t: rewrite(f, c, rms_norm_eps=-1))
broken("architectures as a number", "architectures")(lambda f, c, t: rewrite(f, c, architectures=5))
broken("architectures as lists", "[1]")(lambda f, c, t: rewrite(f, c, architectures=[[1]]))
broken("model type as a list", "model_type")(lambda f, c, t: rewrite(f, c, model_type=["llama"]))
broken("rope as text", "rope_scaling")(lambda f, c, t: rewrite(f, c, rope_scaling="llama3"))
broken("eos as text", "eos_token_id", "x")(lambda f, c, t: rewrite(f, c, eos_token_id="x"))
broken("another eos as text", "generation_config.json", "eos_token_id")(
    lambda f, c, t: write_checkpoint(f, c, t, generation_config={"eos_token_id": "x"}))
broken("tied as text", "tie_word_embeddings")(lambda f, c, t: rewrite(f, c, tie_word_embeddings="x"))
broken("a size beyond reason", "num_attention_heads")(lambda f, c, t: rewrite(f, c, num_attention_heads=10 ** 30))
broken("a vocabulary larger than memory", "embed_tokens.weight", "2000000000")(lambda f, c, t: rewrite(f, c, vocab_size=2 * 10 ** 9))
broken("weight map as a list", "weight_map")(
    lambda f, c, t: (write_checkpoint(f, c, t, shards=2) / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'))
broken("weight map to nothing", "places tensor a")(
    lambda f, c, t: (write_checkpoint(f, c, t, shards=2) / "model.safetensors.index.json").write_text('{"weight_map": {"a": null}}'))
broken("JSON without end", "config.json")(lambda f, c, t: (f / "config.json").write_text("[" * 100000))
broken("heads", "4", "3")(lambda f, c, t: rewrite(f, c, num_key_value_heads=3))
broken("layer type", "chunked_attention")(
    lambda f, c, t: rewrite(f, c, model_type="qwen3", architectures=None, layer_types=["chunked_attention"] * 2))
broken("no weights", "model.safetensors")(lambda f, c, t: (f / "model.safetensors").unlink())
broken("only pickled weights", "model.safetensors")(
    lambda f, c, t: (f / "model.safetensors").rename(f / "pytorch_model.bin"))
broken("missing tensor", "layers.1.mlp.up_proj.weight")(lambda f, c, t: reweigh(f, t, "model.layers.1.mlp.up_proj.weight", None))
broken("misnamed tensor", "layers.1.mlp.up_proj.weight", "layers.1.mlp.upp_proj.weight")(
    lambda f, c, t: reweigh(f, t | {"model.layers.1.mlp.upp_proj.weight": torch.ones(48, 32)}, "model.layers.1.mlp.up_proj.weight", None))
broken("misshapen tensor", "model.layers.0.self_attn.k_proj.weight", "[16, 31]", "[16, 32]")(
    lambda f, c, t: reweigh(f, t, "model.layers.0.self_attn.k_proj.weight", torch.ones(16, 31)))
broken("tensor of integers", "model.norm.weight", "I8")(
    lambda f, c, t: reweigh(f, t, "model.norm.weight", torch.ones(32, dtype=torch.int8)))
broken("a tensor too many", "model.layers.0.self_attn.q_proj.bias")(
    lambda f, c, t: reweigh(f, t, "model.layers.0.self_attn.q_proj.bias", torch.ones(32)))
broken("untied without a head", "lm_head.weight")(lambda f, c, t: reweigh(f, t, "lm_head.weight", None))
broken("torn in the data", "model.safetensors", "torn at tensor")(lambda f, c, t: cut(f / "model.safetensors", 0.6))
broken("torn in the header", "model.safetensors", "header")(lambda f, c, t: cut(f / "model.safetensors", 0.001))
broken("empty weights", "model.safetensors", "torn")(lambda f, c, t: cut(f / "model.safetensors", 0))
broken("missing shard", "model-00002-of-00002.safetensors")(
    lambda f, c, t: (write_checkpoint(f, c, t, shards=2) / "model-00002-of-00002.safetensors").unlink())
broken("shard without its tensor", "model-00001-of-00002.safetensors", "lm_head.weight")(
    lambda f, c, t: save_file({"a": torch.ones(1)}, write_checkpoint(f, c, t, shards=2) / "model-00001-of-00002.safetensors"))
broken("tokenizer torn", "tokenizer.json")(lambda f, c, t: (f / "tokenizer.json").write_text("{"))
broken("tokenizer.model without some bytes", "tokenizer.model", "byte")(
    lambda f, c, t: (f / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 1\n"))
broken("tokenizer.model torn", "tokenizer.model", "line 2")(lambda f, c, t: (f / "tokenizer.model").write_bytes(b"YQ== 0\nYg=="))
broken("tokenizer with a torn pattern", "tokenizer", "damaged")(lambda f, c, t: (f / "tokenizer.json").write_text(json.dumps(
    tokenizer_json(split_by("(?i:a"), None, None))))
broken("tokenizer without its parts", "tokenizer")(lambda f, c, t: (f / "tokenizer.json").write_text("{}"))


def rewrite(folder, config, **changes):
    (folder / "config.json").write_text(json.dumps(config | changes))


def reweigh(folder, tensors, name, tensor):
    save_file({n: t for n, t in (tensors | {name: tensor}).items() if t is not None}, folder / "model.safetensors")


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_refused_in_one_sentence_that_names_the_fault(tmp_path, capfd, name):
    change, words = BROKEN[name]
    tensors = llama_tensors(LLAMA)
    change(write_checkpoint(tmp_path, LLAMA, tensors), LLAMA, tensors)
    assert nanoserve.main(["--model", str(tmp_path), "--prompt", "x"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in words), err


def test_unsupported_config_is_refused_before_any_weight_is_read(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, LLAMA | dict(rope_scaling={"rope_type": "yarn"}), llama_tensors(LLAMA))
    monkeypatch.setattr(model.Checkpoint, "__init__", lambda *a: pytest.fail("opened the weights"))
    with pytest.raises(ValueError, match="yarn"):
        LLM(tmp_path)
    rewrite(tmp_path, LLAMA, head_dim=300)
    with pytest.raises(ValueError, match="head size 300"):
        LLM(tmp_path)
    rewrite(tmp_path, LLAMA)
    with pytest.raises(ValueError, match="magic"):
        LLM(tmp_path, attention="magic")
    with pytest.raises(ValueError, match="cuda_graphs"):
        LLM(tmp_path, attention="torch", cuda_graphs=True)
    if kernels.INTERPRETED:
        with pytest.raises(ValueError, match="bfloat16"):
            LLM(tmp_path, attention="triton", dtype="bfloat16")


# ---------------------------------------------------------------------------------------------
# Tokenizers: against byte-pair encoding as its paper describes it, one merge at a time

def byte_alphabet():
    """GPT-2's bytes_to_unicode, by its rule: printable bytes stand for themselves, the others follow from 256 on."""
    alphabet, n = {}, 256
    for b in range(256):
        if unicodedata.category(chr(b)) not in ("Cc", "Cf", "Zs"):
            alphabet[b] = chr(b)
        else:
            alphabet[b], n = chr(n), n + 1
    return alphabet


def plain_bpe(word, merges):
    """Merge the earliest pair of the list wherever it occurs, from the left, until none is left."""
    parts, rank = [byte_alphabet()[b] for b in word.encode()], {tuple(m): i for i, m in enumerate(merges)}
    while pairs := [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in rank]:
        _, i = min(pairs)
        parts[i:i + 2] = ["".join(parts[i:i + 2])]
    return parts


def train_bpe(text, n):
    """The most frequent pair, n times. Learned across words, so that a wrong split into words is seen in the ids."""
    parts, merges = [byte_alphabet()[b] for b in text.encode()], []
    for _ in range(n):
        counts = Counter(zip(parts, parts[1:]))
        pair = max(counts, key=lambda p: (counts[p], p))
        merges.append(list(pair))
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == pair:
                parts[i:i + 2] = ["".join(pair)]
            i += 1
    return merges


SAMPLE = ("The cat sat on the mat. It's 12345 o'clock and we'll see 678 cats' tails\n\n  They've  sat there,\tthere!\r\n"
          "Привет, мир! Приветы кота. ភាសាខ្មែរ ភាសា 😀😀 👩‍👩‍👧 naïve café " * 2)
FRAGMENTS = ["the", " cat", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "1", "23", "456", ".", "!?", "привет", "ភាសា", "😀", "👩\u200d👩",
             "e\u0301", "\xa0", "\x85", "\u3000", "Ⅷ", "<|bos|>"]
PIECE = st.one_of(st.sampled_from(FRAGMENTS), st.integers(0, len(SAMPLE)).flatmap(lambda i: st.integers(0, 9).map(lambda n: SAMPLE[i:i + n])))
WILD = st.lists(st.one_of(PIECE, PIECE, PIECE, st.characters(codec="utf-8")), max_size=16).map("".join)


def find_words(pattern):
    import regex
    return lambda text: regex.findall(pattern, text)


def words_of_qwen(text):
    """Qwen's split, by its own description: like Llama 3's, with digits one by one."""
    return find_words(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")(text)


def words_of_smollm(text):
    """SmolLM2's split: every digit alone, then GPT-2's split of what is between them."""
    words = []
    for part in find_words(r"\p{N}|\P{N}+")(text):
        words += find_words(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")(part)
    return words


words_of_gpt2 = find_words(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
words_of_llama3 = find_words(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_by(pattern):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level(False)]}


BOS_TEMPLATE = {"type": "Sequence", "processors": [byte_level(False), {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [], "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [1000], "tokens": ["<|bos|>"]}}}]}
#             words, pre-tokenizer, normalizer, post-processor, ids before the text
TOKENIZERS = {
    "gpt2": (words_of_gpt2, byte_level(True), None, byte_level(False), []),
    "llama 3": (words_of_llama3, split_by(model.LLAMA3_SPLIT), None, BOS_TEMPLATE, [1000]),
    "qwen": (words_of_qwen, split_by(model.LLAMA3_SPLIT.replace("{1,3}", "")), {"type": "NFC"}, byte_level(False), []),
    "smollm": (words_of_smollm, {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, byte_level(True)]}, None, None, []),
}
ADDED = [{"id": 1000, "content": "<|bos|>", "special": True}, {"id": 1001, "content": "<tool>", "special": False},
         {"id": 1002, "content": "<tool>s", "special": False}]


def tokenizer_json(pre, normalizer, post, shuffle=0):
    """A tokenizer.json with merges learned from SAMPLE; ids in an order of their own if shuffle is given."""
    merges = train_bpe(SAMPLE, 100)
    tokens = list(dict.fromkeys([*byte_alphabet().values(), *("".join(m) for m in merges)]))
    random.Random(shuffle).shuffle(tokens)
    return {"version": "1.0", "added_tokens": ADDED, "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": post,
            "decoder": byte_level(True), "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                                                   "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}
    for name, (_, pre, normalizer, post, _) in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        raw = tokenizer_json(pre, normalizer, post, shuffle=5)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        made[name] = model.load_tokenizer(folder), raw, folder
    return made


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150)
@given(text=WILD)
def test_ids_equal_plain_byte_pair_encoding(tokenizers, name, text):
    (words, _, normalizer, _, before), (tokenizer, raw, _) = TOKENIZERS[name], tokenizers[name]
    normal = unicodedata.normalize("NFC", text) if normalizer else text
    expected = before + [raw["model"]["vocab"][part] for word in words(normal) for part in plain_bpe(word, raw["model"]["merges"])]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected[len(before):]) == normal


def test_other_files_of_the_same_tokenizer_give_the_same_ids(tokenizers, tmp_path):
    """vocab.json + merges.txt for GPT-2, tokenizer.model for Llama 3."""
    tokenizer, raw, _ = tokenizers["gpt2"]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"] | {"<|endoftext|>": 999}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in raw["model"]["merges"]))
    classic = model.load_tokenizer(tmp_path)
    assert classic.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert classic.encode("a<|endoftext|>", special=True) == classic.encode("a") + [999] and classic.decode([999]) == "<|endoftext|>"

    tokenizer, raw, _ = tokenizers["llama 3"]
    of = {character: b for b, character in byte_alphabet().items()}
    words = [bytes([b]) for b in range(256)] + [bytes(of[c] for c in "".join(m)) for m in raw["model"]["merges"]]
    words = list(dict.fromkeys(words))
    (tmp_path / "original").mkdir()
    (tmp_path / "original/tokenizer.model").write_text("".join(f"{base64.b64encode(w).decode()} {i}\n" for i, w in enumerate(words)))
    original = model.load_tokenizer(tmp_path / "original")
    back = {i: t for t, i in raw["model"]["vocab"].items()}
    expected = [words.index(bytes(of[c] for c in back[i])) for i in tokenizer.encode(SAMPLE)[1:]]
    assert original.encode(SAMPLE) == [len(words)] + expected
    assert original.encode("<|eot_id|>", special=True) == [len(words), len(words) + 9]


def test_special_tokens_in_a_prompt_are_plain_text_unless_asked_for(tokenizers):
    tokenizer = tokenizers["gpt2"][0]
    assert 1000 not in tokenizer.encode("a<|bos|>b") and tokenizer.decode(tokenizer.encode("a<|bos|>b")) == "a<|bos|>b"
    assert tokenizer.encode("a<|bos|>b", special=True) == tokenizer.encode("a") + [1000] + tokenizer.encode("b")
    assert tokenizer.encode("x<tool>s<tool>") == tokenizer.encode("x") + [1002, 1001], "not special: always found, the longest first"
    assert tokenizer.decode([1000, 1001]) == "<|bos|><tool>" and tokenizer.decode([1000, 1001], skip_special=True) == "<tool>"


def test_tokens_added_beside_the_vocabulary_are_found(tokenizers, tmp_path):
    _, raw, _ = tokenizers["gpt2"]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in raw["model"]["merges"]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 1001, "<|im_end|>": 1002}))
    old = model.load_tokenizer(tmp_path)
    assert old.encode("a<tool>")[-1] == 1001 and old.encode("<|im_end|>") != [1002] == old.encode("<|im_end|>", special=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "bos_token": {"content": "<s>"}, "added_tokens_decoder": {"1003": {"content": "<s>", "special": True}}}))
    new = model.load_tokenizer(tmp_path)
    assert new.encode("a") == [1003] + old.encode("a") and new.decode([1003]) == "<s>" and 1001 not in new.encode("<tool>")


def test_added_tokens_are_found_in_normalized_text_and_words_after_prefix_spaces(tmp_path):
    raw = tokenizer_json({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, byte_level(True) | {"add_prefix_space": True}]}, {"type": "NFC"}, None)
    raw["added_tokens"] = [{"id": 1001, "content": "\xe9", "special": False, "normalized": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = model.load_tokenizer(tmp_path)
    expected = [raw["model"]["vocab"][p] for word in (" a", " 1", " 2", " b") for p in plain_bpe(word, raw["model"]["merges"])]
    assert tokenizer.encode("a12b") == expected
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\xe9") == [1001]


@pytest.mark.parametrize("character", [" ", "\n", "\t", "a", "1", "!", "😀"])
def test_a_million_of_the_same_character_are_encoded(tokenizers, character):
    for name in TOKENIZERS:
        tokenizer = tokenizers[name][0]
        ids = tokenizer.encode(character * 10 ** 6 + "x")
        assert tokenizer.decode([i for i in ids if i != 1000]) == character * 10 ** 6 + "x"


def test_a_byte_without_a_token_is_left_out(tmp_path):
    raw = tokenizer_json(byte_level(True), None, None)
    raw["model"]["merges"], raw["model"]["vocab"] = [], {"a": 3, "b": 4}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert model.load_tokenizer(tmp_path).encode("a b") == [3, 4]


@settings(max_examples=100)
@given(text=WILD)
def test_streamed_characters_are_never_cut(tokenizers, text):
    tokenizer = tokenizers["qwen"][0]
    ids = tokenizer.encode(text)
    decode = tokenizer.decoder([])
    pieces = [decode(i, n == len(ids) - 1) for n, i in enumerate(ids)]
    assert "".join(pieces) == tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_sentencepiece_goes_through_the_tokenizers_package_or_says_so(tmp_path):
    raw = {"version": "1.0", "added_tokens": [], "normalizer": {"type": "Prepend", "prepend": "▁"}, "pre_tokenizer": None,
           "post_processor": None, "decoder": None, "model": {
               "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
               "fuse_unk": True, "byte_fallback": True, "vocab": {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}, "merges": [["▁", "a"]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    try:
        import tokenizers
    except ImportError:
        with pytest.raises(ValueError, match="pip install tokenizers"):
            model.load_tokenizer(tmp_path)
    else:
        foreign = model.load_tokenizer(tmp_path)
        assert foreign.encode("aa") == tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("aa").ids == [3, 2]
        assert foreign.decode([3, 2]) == tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode([3, 2])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00")
    with pytest.raises(ValueError, match="tokenizer.json"):
        model.load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------
# The engine

CONFIGS = {"llama": LLAMA, "mistral": FAMILIES["mistral"], "gpt2": GPT2}
NEW = 12


@pytest.fixture(scope="module")
def lone(tmp_path_factory):
    """For each config: its folder, prompts (some with a common beginning) and each one's greedy tokens by the plain forward."""
    made = {}
    for name, config in CONFIGS.items():
        tensors, rng = tensors_of(config), random.Random(3)
        folder = write_checkpoint(tmp_path_factory.mktemp(name), config, tensors)
        common = [rng.randrange(61) for _ in range(50)]
        prompts = [common[:n] + [rng.randrange(61) for _ in range(m)]
                   for n, m in [(0, 1), (0, 2), (0, 40), (20, 3), (20, 30), (33, 1), (50, 1), (50, 9), (50, 0)]]
        made[name] = folder, prompts, [plain_greedy(config, tensors, p, NEW) for p in prompts]
    return made


def watch(llm):
    """Check, at every step, the token budget, that no slot is written twice, and that what each request reads is what it
    would have written: instead of K and V, each slot holds the tokens that they depend on. Returns the steps' tokens."""
    inner, pool, steps, memory, own_last = llm._run, llm.pool, [], {}, llm.pool.own_last

    def run(chunks):
        steps.append(sum(len(chunk.tokens) for chunk in chunks))
        assert steps[-1] <= llm.scheduler.max_batched_tokens
        written, S = set(), pool.block_size
        for chunk in chunks:
            (request,) = [r for r in llm.scheduler.running if r.table.blocks is chunk.blocks]
            for t in range(chunk.start, chunk.start + len(chunk.tokens)):
                slot = chunk.blocks[t // S], t % S
                assert slot not in written and request.tokens[t] == chunk.tokens[t - chunk.start]
                written.add(slot)
                memory[slot] = request.tokens[:t + 1]
        for request in llm.scheduler.running:
            chunk = next((c for c in chunks if c.blocks is request.table.blocks), None)
            for t in range(chunk.start + len(chunk.tokens) if chunk else request.computed):
                assert memory[request.table.blocks[t // S], t % S] == request.tokens[:t + 1]
        return inner(chunks)

    def copy(table):
        before, done = table.blocks[-1], own_last(table)
        for offset in range(pool.block_size):
            if (before, offset) in memory:
                memory[table.blocks[-1], offset] = memory[before, offset]
        return done

    llm._run, pool.own_last = run, copy
    return steps


def check_pool(llm):
    pool = llm.pool
    held = Counter(b for r in llm.requests.values() for b in r.table.blocks)
    assert [held[b] for b in range(pool.num_blocks)] == pool.references
    assert sorted([*pool.free, *pool.cached, *held]) == list(range(pool.num_blocks))
    stats = llm.stats()
    assert stats["blocks_free"] + stats["blocks_cached"] + stats["blocks_referenced"] == stats["blocks"] == pool.num_blocks
    assert all(not r.table.blocks for r in llm.scheduler.waiting)
    assert len(pool.free_rows) + len(llm.scheduler.running) == len(pool.block_tables_UM)


def assert_tokens_do_not_depend_on_company(lone, config, backend, options, spare, arrivals, hopeful):
    """hopeful: the scheduler believes that every answer will be short, so that the pool runs out and it must preempt."""
    folder, prompts, expected = lone[config]
    S = options["block_size"]
    llm = LLM(folder, attention=backend, dtype="float32", num_blocks=-(-(60 + NEW) // S) + spare, **options)
    watch(llm)
    outputs, queue, step = [], sorted(arrivals, key=lambda a: a[1]), 0
    while queue or llm.requests:
        while queue and queue[0][1] <= step:
            i, _, n, patience, samples = queue.pop(0)
            rid = llm.add(prompts[i], SamplingParams(max_tokens=n, ignore_eos=True, n=min(samples, llm.scheduler.max_seqs)))
            outputs.append((llm.requests[rid].output, i, n, patience and step + patience))
        for out, _, _, abort_at in outputs:
            if abort_at == step:
                llm.abort(out.id)
        if hopeful:
            llm.scheduler.usage = 0.0
        decoding = [(r, r.computed) for r in llm.scheduler.running if r.pending == 1]
        llm.step()
        assert all(r.computed == n + 1 or r.output.finish_reason or r in llm.scheduler.waiting for r, n in decoding)
        order = [r.output.id for r in [*llm.scheduler.running, *llm.scheduler.waiting]]
        assert order == sorted(order), "first come, first served"
        assert len(llm.scheduler.running) <= llm.scheduler.max_seqs
        check_pool(llm)
        step += 1
        assert step < 3000, "somebody waits for ever"
    assert llm.pool.num_referenced == 0 and not llm.scheduler.running and not llm.scheduler.waiting
    samples = [sample for out, *_ in outputs for sample in out.samples]
    stats = llm.stats()
    assert stats["computed_tokens"] == sum(sample.computed_tokens for sample in samples)
    if not hopeful and len(samples) == len(outputs):   # everyone uses all of max_tokens, which is what was expected
        assert stats["preemptions"] == 0
        for out, i, n, _ in outputs:
            if out.finish_reason == "length":   # the last token is never run
                assert out.computed_tokens + out.reused_tokens == len(prompts[i]) + n - 1
    for out, i, n, _ in outputs:
        for sample in out.samples:
            if sample.finish_reason == "abort":
                assert sample.token_ids == expected[i][:len(sample.token_ids)]
            else:
                assert (sample.token_ids, sample.finish_reason) == (expected[i][:n], "length")


arrivals = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12), st.integers(1, NEW),
                              st.one_of(st.none(), st.none(), st.integers(1, 9)), st.sampled_from([1, 1, 1, 2, 3])),
                    min_size=1, max_size=9)
engine_options = st.fixed_dictionaries(dict(block_size=st.integers(1, 17), max_batched_tokens=st.integers(1, 80),
                                            max_seqs=st.integers(1, 9), prefix_cache=st.booleans()))


@settings(max_examples=300)
@given(config=st.sampled_from(list(CONFIGS)), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans())
def test_tokens_depend_on_the_prompt_alone(lone, config, options, spare, arrivals, hopeful):
    """Not on neighbours, arrival, chunk size, block size, preemption, aborts of others or a prefix hit."""
    assert_tokens_do_not_depend_on_company(lone, config, "torch", options, spare, arrivals, hopeful)


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@settings(max_examples=6 if DEVICE == "cpu" else 20)
@given(config=st.sampled_from(list(CONFIGS)), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans())
def test_tokens_do_not_depend_on_the_attention_backend(lone, config, options, spare, arrivals, hopeful):
    options["max_batched_tokens"] += 20
    assert_tokens_do_not_depend_on_company(lone, config, "triton", options, spare, arrivals[:4], hopeful)


def repeat(step):
    """In the place of `record` where there is no GPU: what it gives runs the step again."""
    result = step()
    return lambda: result.copy_(step()), result


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@settings(max_examples=8 if DEVICE == "cpu" else 20)
@given(config=st.sampled_from(list(CONFIGS)), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans())
def test_tokens_are_the_same_with_cuda_graphs(lone, monkeypatch, config, options, spare, arrivals, hopeful):
    """Without a GPU, a stand-in for the graph repeats the step on the batch that stays: padding and refreshing are the same."""
    if DEVICE == "cpu":
        monkeypatch.setattr(nanoserve, "record", repeat)
    assert_tokens_do_not_depend_on_company(lone, config, "triton", options | dict(cuda_graphs=True), spare, arrivals,
                                         hopeful)


def test_youngest_is_preempted_and_loses_nothing(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, block_size=4, num_blocks=17, max_batched_tokens=99, prefix_cache=False)
    ids = [llm.add(prompts[i], SamplingParams(max_tokens=NEW)) for i in (3, 4)]   # 23 and 50 tokens: 6 and 13 blocks
    ids[0:0] = [llm.add(prompts[1], SamplingParams(max_tokens=NEW))]
    requests, order = [llm.requests[i] for i in ids], []
    while llm.requests:
        before, llm.scheduler.usage = [r.computed for r in requests], 0.0   # it thinks that all will end soon
        llm.step()
        check_pool(llm)
        order += [r.output.id for r, n in zip(requests, before) if r.computed < n and not r.output.finish_reason]
    assert order, "the pool was meant to be too small"
    assert ids.index(order[0]) != 1, "the oldest is never the first to go"
    for r, i in zip(requests, (1, 3, 4)):
        assert r.output.token_ids == expected[i]


def test_running_requests_get_a_token_in_every_step_of_a_long_prompt(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, max_batched_tokens=8)
    first = llm.add(prompts[0], SamplingParams(max_tokens=NEW))
    llm.step()
    long = llm.add(prompts[7], SamplingParams(max_tokens=2))
    produced = []
    while long in llm.requests and not llm.requests[long].output.token_ids:
        produced.append([out.id for out in llm.step()])
    assert len(produced) == 9 and all(first in ids for ids in produced), "59 tokens in chunks of 7, the budget less one"


def test_second_request_with_the_same_beginning_computes_only_the_rest(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, block_size=8)
    steps = watch(llm)
    (a,), n = llm.generate([prompts[7]], SamplingParams(max_tokens=1)), sum(steps)
    (b,) = llm.generate([prompts[6]], SamplingParams(max_tokens=NEW))
    assert n == 59 and a.reused_tokens == 0
    assert b.reused_tokens == 48 and steps[1] == 51 - 48, "6 full blocks of the common 50 tokens, after the first has finished"
    assert b.token_ids == expected[6]
    off = LLM(folder, block_size=8, prefix_cache=False)
    assert [out.reused_tokens for _ in "ab" for out in off.generate([prompts[7]])] == [0, 0]


@pytest.mark.parametrize("budget", [200, 40])
def test_same_beginning_in_the_same_step_is_computed_once(lone, budget):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, block_size=8, max_batched_tokens=budget)
    steps = watch(llm)
    outs = llm.generate([prompts[i] for i in (7, 6, 7)], SamplingParams(max_tokens=NEW))
    assert [out.token_ids for out in outs] == [expected[i] for i in (7, 6, 7)]
    assert [out.reused_tokens for out in outs] == [0, 48, 56]
    assert sum(steps) == 59 + 3 + 3 + 3 * (NEW - 1) and (steps[0] == 59 + 3 + 3) == (budget == 200)
    stats = llm.stats()
    assert (stats["computed_tokens"], stats["reused_tokens"], stats["steps"]) == (sum(steps), 104, len(steps))


@pytest.mark.parametrize("new", [10, 12])
def test_prefix_made_by_decoding_is_reused_by_the_next_turn(lone, new):
    folder, prompts, expected = lone["gpt2"]
    llm = LLM(folder, block_size=4)
    (first,) = llm.generate([prompts[3]], SamplingParams(max_tokens=new, ignore_eos=True))
    turn = prompts[3] + first.token_ids + [5, 6, 7]
    (second,) = llm.generate([turn], SamplingParams(max_tokens=3))
    assert second.reused_tokens == 32, "all but the last token were run: 23 + 9 or 23 + 11, and full blocks are found"
    assert second.token_ids == LLM(folder, prefix_cache=False).generate([turn], SamplingParams(max_tokens=3))[0].token_ids


def test_each_full_block_is_hashed_once_and_a_refused_newcomer_is_not_asked_again(lone, monkeypatch):
    folder, prompts, _ = lone["llama"]
    llm, hashed, asked = LLM(folder, block_size=4, num_blocks=20, max_batched_tokens=30), [], []
    blake2b, match = paged_kv.hashlib.blake2b, llm.pool.match
    monkeypatch.setattr(paged_kv.hashlib, "blake2b", lambda *a, **k: hashed.append(a) or blake2b(*a, **k))
    monkeypatch.setattr(llm.pool, "match", lambda *a: asked.append(a) or match(*a))
    ids = [llm.add(prompts[i], SamplingParams(max_tokens=NEW, ignore_eos=True)) for i in (2, 4, 7)]
    lens = [len(prompts[i]) + NEW - 1 for i in (2, 4, 7)]
    preempted = False
    while llm.requests:
        llm.step()
        if not preempted and any(llm.requests[i].output.token_ids for i in ids[1:2] if i in llm.requests):
            llm.scheduler.undo([])   # everyone goes back and finds what was computed
            preempted = True
    assert preempted and sum(n // 4 for n in lens) <= len(hashed) <= sum((n + 1) // 4 for n in lens)
    assert len(asked) <= 3 + 2 + 3, "once each, once more each time that blocks came back"


def test_deciding_costs_the_same_for_long_texts_and_queues(lone):
    """Counted in lines of Python that a decode step of four requests executes."""
    folder, prompts, _ = lone["llama"]

    def lines_of_a_step(length, queue):
        llm, files, lines = LLM(folder, max_seqs=4, device="cpu"), {nanoserve.__file__, paged_kv.__file__, kernels.__file__}, 0
        for _ in range(4 + queue):
            llm.add([7] * length, SamplingParams(max_tokens=20, ignore_eos=True))
        while any(r.pending > 1 for r in llm.scheduler.running) or llm.steps < 3:
            llm.step()

        def count(frame, event, argument):
            nonlocal lines
            lines += event == "line"
            return count if frame.f_code.co_filename in files else None
        tracer = sys.gettrace()
        sys.settrace(count)
        llm.step()
        sys.settrace(tracer)
        assert len(llm.scheduler.running) == 4 and len(llm.scheduler.waiting) == queue
        return lines
    assert lines_of_a_step(5, 1) == lines_of_a_step(5, 400) == lines_of_a_step(116, 1)


def test_samples_share_the_prompt_and_equal_lone_runs_with_their_seeds(lone):
    folder, prompts, expected = lone["llama"]
    hot = dict(temperature=1.5, max_tokens=NEW, ignore_eos=True)
    llm = LLM(folder, block_size=8)
    steps = watch(llm)
    rid = llm.add(prompts[4], SamplingParams(n=4, seed=7, **hot))
    out = llm.requests[rid].output
    llm.step()
    check_pool(llm)
    tables = [r.table.blocks for r in llm.scheduler.running]
    assert steps == [50] and len(tables) == 4 and all(t == tables[0] for t in tables), "6 full blocks and 2 tokens of a seventh"
    llm.step()
    check_pool(llm)
    tables = [r.table.blocks for r in llm.scheduler.running]
    assert all(t[:6] == tables[0][:6] for t in tables) and len({t[6] for t in tables}) == 4, "copied on first write"
    while llm.requests:
        llm.step()
    alone = [LLM(folder).generate([prompts[4]], SamplingParams(seed=7 + i, **hot))[0].token_ids for i in range(4)]
    assert [sample.token_ids for sample in out.samples] == alone and len(set(map(tuple, alone))) > 1
    assert sum(steps) == 50 + 4 * (NEW - 1) and out.samples[0] is out
    (greedy,) = llm.generate([prompts[4]], SamplingParams(n=3, max_tokens=NEW))
    assert [sample.token_ids for sample in greedy.samples] == [expected[4]] * 3
    with pytest.raises(ValueError, match="n is 65 and 64"):
        llm.add(prompts[4], SamplingParams(n=65))
    with pytest.raises(ValueError, match="n is 2: a stream is one text"):
        next(llm.stream(prompts[4], SamplingParams(n=2)))
    assert not llm.requests and llm.pool.num_referenced == 0


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_abort_ends_all_samples_before_and_after_they_part(lone, steps):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, max_batched_tokens=20)
    rid, other = llm.add(prompts[4], SamplingParams(n=3)), llm.add(prompts[3], SamplingParams(max_tokens=NEW))
    outs = llm.requests[rid].output.samples, llm.requests[other].output
    for _ in range(steps):
        llm.step()
    llm.abort(rid)
    check_pool(llm)
    assert [out.finish_reason for out in outs[0]] == ["abort"] * 3 and list(llm.requests) == [other]
    while llm.requests:
        llm.step()
    assert outs[1].token_ids == expected[3]


def test_logprobs_are_those_of_the_plain_forward(lone):
    folder, prompts, expected = lone["gpt2"]
    config, tensors = GPT2, tensors_of(GPT2)
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=5),
              SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=0, temperature=2.0, seed=1, top_k=9),
              SamplingParams(max_tokens=NEW, ignore_eos=True),
              SamplingParams(max_tokens=2, logprobs=99, logits_processor=lambda ids, x: x.index_fill(0, torch.tensor([3], device=x.device), 99.0))]
    for out, p in zip(LLM(folder).generate([prompts[3]] * 4, params), params):
        if p.logprobs is None:
            assert out.logprobs is None
            continue
        tokens = prompts[3] + out.token_ids
        exact = plain(config, tensors, tokens).log_softmax(-1)[len(prompts[3]) - 1:]
        assert len(out.logprobs) == len(out.token_ids)
        for found, row, token in zip(out.logprobs, exact, out.token_ids):
            best = row.topk(min(p.logprobs, 61)).indices.tolist()
            assert list(found) == [token] + [i for i in best if i != token]
            assert all(abs(value - row[i].item()) < 1e-4 for i, value in found.items())


def test_logits_processor_decides_and_sees_the_tokens_so_far(lone):
    folder, prompts, expected = lone["llama"]
    seen = []

    def ban(token_ids, logits_V):
        seen.append(list(token_ids))
        token_ids.append(0)   # its own copy
        logits_V[expected[4][0]] = -math.inf
        return logits_V

    def count(token_ids, logits_V):
        return torch.nn.functional.one_hot(torch.tensor(len(token_ids)), 61) * 5.0 + 0.0
    outs = LLM(folder).generate([prompts[4]] * 3, [SamplingParams(max_tokens=NEW, ignore_eos=True, logits_processor=f)
                                                   for f in (ban, None, count)])
    assert outs[1].token_ids == expected[4] and outs[2].token_ids == list(range(NEW))
    assert expected[4][0] not in outs[0].token_ids and len(outs[0].token_ids) == NEW
    assert seen == [outs[0].token_ids[:n] for n in range(NEW)]


def test_numbers_of_numpy_are_numbers(lone):
    folder, prompts, expected = lone["llama"]
    params = SamplingParams(max_tokens=np.int64(3), seed=np.int64(1), top_p=np.float32(0.5), n=np.int32(2))
    (out,) = LLM(folder).generate([np.array(prompts[4]).tolist()[:-1] + [np.int64(prompts[4][-1])]], params)
    assert [s.token_ids for s in out.samples] == [expected[4][:3]] * 2


def test_a_faulty_request_ends_with_its_message_and_no_other(lone, monkeypatch):
    folder, prompts, expected = lone["llama"]

    def fails(token_ids, logits_V):
        if len(token_ids) == 3:
            raise KeyError("my own mistake")
        return logits_V
    class Mute(Exception):
        def __str__(self):
            raise TypeError

    def mute(token_ids, logits_V):
        raise Mute
    faults = {fails: "my own mistake", mute: "Mute", (lambda ids, x: None): "not logits of shape", (lambda ids, x: x[:5]): "not logits of shape",
              (lambda ids, x: x - math.inf): "no token to choose", (lambda ids, x: x * math.nan): "no token to choose"}
    llm = LLM(folder, block_size=4, max_batched_tokens=40)
    watch(llm)
    params = [SamplingParams(max_tokens=NEW, logits_processor=f) for f in faults] + [SamplingParams(max_tokens=NEW)] * 2
    outs = llm.generate([prompts[4]] * 6 + [prompts[4], prompts[2]], params)
    for out, words in zip(outs, faults.values()):
        assert out.finish_reason == "error" and out.error.startswith("logits_processor: ") and words in out.error
    assert [out.token_ids for out in outs] == [expected[4][:3], [], [], [], [], [], expected[4], expected[2]]
    assert llm.pool.num_referenced == 0

    ids = [llm.add(prompts[i], SamplingParams(max_tokens=NEW)) for i in (3, 5)]   # a fault in a tokenizer, say
    outs = [llm.requests[i].output for i in ids]
    llm.requests[ids[0]].decode = lambda token, last: 1 / 0
    while llm.requests:
        llm.step()
        check_pool(llm)
    assert (outs[0].finish_reason, outs[0].error) == ("error", "ZeroDivisionError: division by zero") and outs[1].token_ids == expected[5]


@settings(max_examples=60)
@given(fail_at=st.sets(st.integers(0, 25), min_size=1, max_size=6), budget=st.integers(3, 80), prefix_cache=st.booleans(),
       inside=st.booleans(), hot=st.booleans())
def test_interrupted_and_failed_steps_change_nobodys_tokens(lone, fail_at, budget, prefix_cache, inside, hot):
    """An interrupt before the model ran, or an error after it has, as when memory is short: the step is undone."""
    folder, prompts, _ = lone["llama"]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=float(hot), seed=3, n=2)
    llm = LLM(folder, block_size=4, num_blocks=60, max_batched_tokens=budget, max_seqs=6, prefix_cache=prefix_cache)
    watch(llm)
    run, step = llm._run, 0

    def breaks(chunks):
        if step in fail_at and not inside:
            raise KeyboardInterrupt
        logits = run(chunks)
        if step in fail_at:
            raise RuntimeError("out of memory")
        return logits
    llm._run = breaks
    outs = [llm.requests[llm.add(prompts[i], params)].output for i in (7, 6, 4, 3)]
    while llm.requests:
        try:
            llm.step()
        except (KeyboardInterrupt, RuntimeError):
            assert llm.pool.num_referenced == 0 and not llm.scheduler.running
        check_pool(llm)
        step += 1
    calm = LLM(folder).generate([prompts[i] for i in (7, 6, 4, 3)], params)
    assert [s.token_ids for out in outs for s in out.samples] == [s.token_ids for out in calm for s in out.samples]


def test_interrupted_generate_leaves_nothing_behind(lone):
    folder, prompts, expected = lone["llama"]
    llm, run = LLM(folder), None
    run, llm._run = llm._run, lambda chunks: (_ for _ in ()).throw(KeyboardInterrupt) if llm.steps == 4 else run(chunks)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts[:4], SamplingParams(max_tokens=NEW, n=2))
    assert not llm.requests and llm.pool.num_referenced == 0 and not llm.scheduler.waiting
    llm._run = run
    assert llm.generate([prompts[4]], SamplingParams(max_tokens=NEW))[0].token_ids == expected[4]

    rid, steps = llm.add(prompts[0], SamplingParams(max_tokens=2)), llm.steps   # what ended beside it is not lost
    llm._run = lambda chunks: (_ for _ in ()).throw(KeyboardInterrupt) if llm.steps == steps + 4 else run(chunks)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts[1:2], SamplingParams(max_tokens=NEW))
    llm._run = run
    assert [(out.id, out.token_ids) for out in llm.step()] == [(rid, expected[0][:2])]


def test_short_requests_do_not_overtake_a_long_one(lone):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, block_size=4, num_blocks=24, max_batched_tokens=30)
    short = lambda: llm.add(prompts[0], SamplingParams(max_tokens=NEW, ignore_eos=True))
    for _ in range(5):
        short()
    llm.step()
    long, steps = llm.add(prompts[7], SamplingParams(max_tokens=NEW)), 0
    out = llm.requests[long].output
    while not out.token_ids:   # the stream of short ones goes on
        short()
        llm.step()
        steps += 1
        assert steps < 2 * NEW, "it waits for those who came before it, and for nobody else"


def test_admission_learns_how_much_of_max_tokens_is_used(lone):
    """Answers of 4 tokens that were allowed 60: at first one at a time, then as many as really fit."""
    folder, prompts, _ = lone["llama"]
    llm, crowd = LLM(folder, block_size=4, num_blocks=20), []
    llm.config.eos = [13]

    def ends(token_ids, logits_V):
        return torch.nn.functional.one_hot(torch.tensor(13 if len(token_ids) == 3 else 1), 61) * 9.0
    for _ in range(60):
        llm.add(prompts[0], SamplingParams(max_tokens=60, logits_processor=ends))
    while llm.requests:
        llm.step()
        crowd.append(len(llm.scheduler.running))
    assert crowd[0] == 1 and max(crowd) > 5 and llm.stats()["preemptions"] == 0

    believed = llm.scheduler.usage   # now answers become long all of a sudden
    llm.generate([prompts[0]] * 20, SamplingParams(max_tokens=60, ignore_eos=True))
    assert 0 < llm.stats()["preemptions"] < 20 and llm.scheduler.usage > 4 * believed


# --- what one can see of it

def test_timeline_shows_what_happened_in_every_step(lone):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, block_size=4, num_blocks=40, max_batched_tokens=8)
    timeline = watch_loop.Timeline(llm)
    llm.generate([prompts[3], prompts[3], prompts[0]], SamplingParams(max_tokens=3, ignore_eos=True))
    drawn = [re.sub("·+", "·", re.sub("━+", "━", line)).split() for line in timeline.text(100).split("\n")]
    assert drawn[0][1:] == ["1", "2", "3", "4", "5", "6"]
    text = " ".join(map(str, prompts[3]))[:16].split()   # 23 tokens: chunks of 8, 8 and 7; the rest of the budget goes on
    assert drawn[1] == ["0", *text, "8", "8", "7", "━", "■"]
    assert drawn[2] == ["1", *text, "·", "·", "20+1", "2", "━", "■"], "5 full blocks of the first's are found"
    assert drawn[3] == ["2", "55", "·", "·", "·", "1", "━", "■"]
    assert drawn[4:7] == [["blocks", "in", "use", "6", "6", "7", "8", "9", "8"], ["cached", "0", "0", "0", "0", "0", "1"],
                          ["free", "34", "34", "33", "32", "31", "31"]]


def test_timeline_fits_the_terminal_and_loses_no_step(lone):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, block_size=4, num_blocks=22, max_batched_tokens=12)
    timeline = watch_loop.Timeline(llm)
    for i, n in [(4, 1), (4, 3), (0, 1), (7, 1), (2, 1)]:
        llm.add(prompts[i], SamplingParams(max_tokens=NEW, ignore_eos=True, n=n))
    while llm.requests:
        llm.scheduler.usage = 0.0
        if llm.steps == 9:
            llm.abort(llm.scheduler.running[0].output.id)
        llm.step()
    stats = llm.stats()
    cells = [cell for row in timeline.rows.values() for cell in row.values()]
    assert stats["preemptions"] and stats["preemptions"] == sum(cell.kind == "preempted" for cell in cells)
    assert stats["computed_tokens"] == sum(cell.tokens for cell in cells) and stats["steps"] == len(timeline.pool)
    forked = sum(r.output.reused_tokens for r in timeline.rows if r.output.samples[0] is not r.output)
    assert stats["reused_tokens"] - forked == sum(cell.found for cell in cells)
    for width in (40, 80, 1000):
        chart = timeline.text(width)
        lines = chart.split("\n")
        assert max(map(len, lines)) <= width and (chart.count("blocks in use") == 1) == (width == 1000)
        spans = [span.split("-") for line in lines if line.startswith("step") for span in line.split()[1:]]
        assert [n for span in spans for n in range(int(span[0]), int(span[-1]) + 1)] == list(range(1, len(timeline.pool) + 1))
    picture = ElementTree.fromstring(timeline.svg())
    titles = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    for kind in ("waiting", "preempted", "prefill", "decode"):
        assert sum(f": {kind}" in title for title in titles) >= sum(cell.kind == kind for cell in cells) > 0
    assert sum("in use" in title for title in titles) == 3 * len(timeline.pool)


def test_timeline_holds_any_prompt():
    llm = LLM(HERE / "demo/llama", dtype="float32")
    timeline = watch_loop.Timeline(llm)
    llm.generate(["日本語の猫はここに座った", "a\x1b[31m\x00 <b>&", "cafe\u0301 \u0301e"], SamplingParams(max_tokens=2, ignore_eos=True, n=2))
    head, *rows = timeline.text(99).split("\n")[:7]
    assert len({watch_loop.columns(row) for row in [*rows, head]}) == 1 and "\x1b" not in "".join(rows)
    ElementTree.fromstring(timeline.svg())


def test_timeline_from_the_command_line(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat sat\nOne day, Tom\n")
    demo = ["--prompts-file", str(prompts), "--max-tokens", "9"]
    assert nanoserve.main([*demo, "--timeline"]) == 0
    text, chart = capsys.readouterr().out.split("\n\n", 1)
    assert "━" not in text and re.search(r"^0 The cat sat +3 +━+ +■$", chart, re.M) and "preempted" in chart
    assert nanoserve.main([*demo, "--timeline", str(tmp_path / "chart.svg"), "--json", "--n", "2", "--logprobs", "1"]) == 0
    texts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [t["prompt"] for t in texts] == ["The cat sat"] * 2 + ["One day, Tom"] * 2
    assert all({"computed_tokens", "reused_tokens"} < t.keys() and len(t["logprobs"]) == 9 for t in texts)
    assert [t["computed_tokens"] + t["reused_tokens"] for t in texts] == [3 + 8] * 2 + [texts[2]["prompt_tokens"] + 8] * 2
    ElementTree.parse(tmp_path / "chart.svg")
    assert exit_code(nanoserve.main, [*demo, "--timeline", "chart.png"]) == 2
    assert exit_code(nanoserve.main, [*demo, "--timeline", str(tmp_path / "no/chart.svg")]) == 2
    assert "no/chart.svg cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["torch"] + (["triton"] if kernels.load_triton() and kernels.INTERPRETED else []))
def test_explanation_gives_the_tokens_slots_cost_and_choice_of_each_step(monkeypatch, backend):
    monkeypatch.setattr(bench, "measured_ceiling", lambda device, dtype: bench.Ceiling(5e11, 2e10))
    llm = LLM(HERE / "demo/llama", dtype="float32", attention=backend, block_size=4, device="cpu")
    explanation, lines = watch_loop.Explanation(llm), []
    (out,) = llm.generate(["The cat sat"], SamplingParams(max_tokens=8))
    explanation.show(lines.append)
    text = re.sub(r"\n {6,}", " ", "\n".join(lines))
    ids = llm.tokenizer.encode("The cat sat")
    assert re.findall(r"^step (\S+): (.*)$", text, re.M) == [
        ("1", "1 prefill"), ("2", "1 decode"), ("3", "1 decode"), ("4-6", "decodes like the one before"), ("7", "1 decode"), ("8", "1 decode")]
    told = [1, 2, 3, 7, 8]   # the first token at position 4 and 8 takes a block
    tokens = re.findall(r"^  tokens +request 0, position (\S+): (.*)$", text, re.M)
    assert tokens[0] == ("0-2", f"[{ids[0]} 'The', {ids[1]} ' cat', {ids[2]} ' sat']")
    assert [int(where) for where, _ in tokens[1:]] == [step + 1 for step in told[1:]]
    assert [int(what[1:].split()[0]) for _, what in tokens[1:]] == [out.token_ids[step - 2] for step in told[1:]]
    slots = [list(map(int, slot)) for slot in re.findall(r"slot (\d+) \(block (\d+) x 4 \+ (\d)\)", text)]
    assert [slot for slot, *_ in slots] == [0, 2] + [step + 1 for step in told[1:]], "a pool all to itself: blocks 0, 1, 2"
    assert all(slot == block * 4 + offset for slot, block, offset in slots)
    logits = llm.logits(ids + out.token_ids[:-1])[len(ids) - 1:]
    for step, line in zip(told, re.findall(r"^  next +(.*)$", text, re.M)):
        probabilities = logits[step - 1].softmax(-1)
        for i, p in re.findall(r"\[(\d+) [^]]*\] ([\d.]+)%", line):
            assert abs(probabilities[int(i)].item() * 100 - float(p)) < 0.1
        assert int(re.search(r"-> \[(\d+) ", line)[1]) == out.token_ids[step - 1]
    for step, line in zip(told, re.findall(r"^  cost +(.*)$", text, re.M)):
        cost = bench.step_cost(llm.config, [(3, 0) if step == 1 else (1, step + 1)], 4)
        assert line.startswith(f"{cost.flops / 1e6:.1f} MFLOP / {cost.bytes / 1e6:.2f} MB = ") and "below the machine's 25: memory-bound" in line
        assert f"{cost.bytes / 2e10 * 1e3:.2f} ms" in line
    words = {"torch": ["prefill, 2 KV heads, 3 x 3 query rows each", "1 decode, 2 KV heads, 3 query rows each", "in place"],
             "triton": ["1 tiles of 32 rows (10 tokens x 3 query heads) x 2 KV heads", "1 splits of keys for 1 requests"]}
    assert all(word in text for word in words[backend]) and max(map(len, "\n".join(lines).split("\n"))) <= 110


def test_explanation_from_the_command_line(capsys):
    assert nanoserve.main(["--prompt", "The cat sat", "--max-tokens", "2", "--explain"]) == 0
    text, explanation = capsys.readouterr().out.split("\n", 1)
    assert text == " by the" and explanation.startswith("step 1: 1 prefill\n  tokens     request 0, position 0-2: [")


# --- under pressure, for as long as one likes

class Fault(Exception):
    pass


class Soak:
    """Random requests for demo/llama on a pool that is too small; every one that ends is compared with its lone run."""
    STARTS = ["The cat sat", "One day, Tom and Mia went to the park. They had a red ball.", "Once there was a dog named Max. "
              "Max liked to run. He met a cheerful girl named Mia, and they played all day.", "Ünïcödé 😀"]
    STOPS = [(), (), (".",), ("the cat", "Tom said"), ("\n\n", "xyz")]

    def __init__(self, seed):
        self.dice, demo = random.Random(seed), HERE / "demo/llama"
        self.llm = LLM(demo, dtype="float32", block_size=4, num_blocks=90, max_batched_tokens=24, max_seqs=6)
        self.lone = LLM(demo, dtype="float32", prefix_cache=False, max_seqs=1)
        self.steps, self.live, self.said, self.counts = watch(self.llm), {}, [], Counter()
        self.run, self.llm._run = self.llm._run, self.break_sometimes

    def break_sometimes(self, chunks):
        if self.dice.random() < 0.002:
            self.counts["failed steps"] += 1
            raise self.dice.choice([KeyboardInterrupt, RuntimeError])
        return self.run(chunks)

    def arrive(self):
        dice, processor = self.dice, None
        if self.said and dice.random() < 0.3:   # the next turn of a chat
            prompt = dice.choice(self.said) + [dice.randrange(256) for _ in range(dice.randint(1, 5))]
        else:
            prompt = self.llm.tokenizer.encode(dice.choice(self.STARTS)) + [dice.randrange(256) for _ in range(dice.randint(0, 30))]
        if dice.random() < 0.1:
            last = dice.randint(0, 20)

            def processor(token_ids, logits_V):
                if len(token_ids) == last:
                    raise Fault(f"fault after {last}")
                logits_V[last] = math.inf if len(token_ids) > 30 else -math.inf
                return logits_V
        params = dict(max_tokens=dice.randint(1, 60), temperature=dice.choice([0.0, 0.0, 0.8, 1.5]), top_k=dice.choice([0, 0, 20]),
                      top_p=dice.choice([1.0, 1.0, 0.9]), seed=dice.randrange(1000), stop=dice.choice(self.STOPS),
                      ignore_eos=dice.random() < 0.3, n=dice.choice([1, 1, 1, 1, 2, 3]), logprobs=dice.choice([None, None, 0, 3]),
                      logits_processor=processor)
        rid = self.llm.add(prompt, SamplingParams(**params))
        self.live[rid] = self.llm.requests[rid].output, prompt, params
        self.counts["requests"] += 1

    def bad(self):
        prompt = self.dice.choice([[], [5000], [-1], None, "", "\ud800", [1] * 360, [1] * 4000])
        with pytest.raises(ValueError):
            self.llm.add(prompt)
        self.counts["refused"] += 1

    def turn(self, arrivals=True):
        dice = self.dice
        if arrivals and len(self.llm.scheduler.waiting) < 8 and dice.random() < 0.15:
            for _ in range(dice.randint(1, 3)):
                self.arrive()
        if dice.random() < 0.01:
            self.bad()
        if self.live and dice.random() < 0.005:
            self.llm.abort(dice.choice(list(self.live)))
        decoding = [(r, len(r.tokens)) for r in self.llm.scheduler.running if r.pending == 1]
        failed = self.counts["failed steps"]
        try:
            self.llm.step()
        except (KeyboardInterrupt, RuntimeError):
            assert self.counts["failed steps"] == failed + 1
        else:
            assert all(len(r.tokens) == n + 1 or r.output.error or r in self.llm.scheduler.waiting for r, n in decoding)
        order = [r.output.id for r in [*self.llm.scheduler.running, *self.llm.scheduler.waiting]]
        assert order == sorted(order)
        check_pool(self.llm)
        self.steps.clear()
        for rid in [rid for rid, (out, *_) in self.live.items() if all(s.finish_reason for s in out.samples)]:
            self.compare(*self.live.pop(rid))

    def compare(self, out, prompt, params):
        for i, sample in enumerate(out.samples):
            own = params | dict(n=1, seed=params["seed"] + i)
            (expected,) = self.lone.generate([prompt], SamplingParams(**own))
            self.counts[sample.finish_reason] += 1
            self.counts["tokens"] += len(sample.token_ids)
            same = [a == b for a, b in zip(sample.token_ids, expected.token_ids)]
            if not all(same):
                self.assert_tie(prompt, sample.token_ids[:same.index(False) + 1], own)
                self.counts["ties"] += 1
            elif sample.finish_reason == "abort":
                assert expected.text.startswith(sample.text)
            else:
                assert (sample.token_ids, sample.text, sample.finish_reason, sample.error) == (
                    expected.token_ids, expected.text, expected.finish_reason, expected.error)
                for a, b in zip(sample.logprobs or [], expected.logprobs or []):
                    assert max(abs(x - y) for x, y in zip(a.values(), b.values())) < 1e-3
                self.said = ([prompt + sample.token_ids] + self.said)[:8] if len(prompt) + len(sample.token_ids) < 150 else self.said

    def assert_tie(self, prompt, tokens, params):
        """The lone run would also give this last token, had its logits been a rounding error different."""
        dice = random.Random(params["seed"])
        uniform = [dice.random() for _ in tokens][-1]
        logits_V = self.lone.logits(prompt + tokens[:-1])[-1].cpu().clone()
        if f := params["logits_processor"]:
            logits_V = f(tokens[:-1], logits_V)
        logits = logits_V + torch.randn(500, len(logits_V), generator=torch.Generator().manual_seed(0)) * 3e-5
        assert tokens[-1] in nanoserve.sample(logits, [SamplingParams(**params)] * 500, [uniform] * 500)


def memory_in_use():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if Path("/proc/self/statm").exists() else 0


def test_soak(pytestconfig):
    """python -m pytest -k soak --soak-minutes 30 -s"""
    seconds, soak, early = 60 * pytestconfig.getoption("--soak-minutes"), Soak(seed=time.time_ns() % 10 ** 6), 0
    while soak.counts["requests"] < 30:   # on a GPU, kernels are compiled and graphs recorded
        soak.turn()
    begin = time.time()
    while time.time() - begin < seconds:
        soak.turn()
        if not early and time.time() - begin > seconds / 2:   # by now all tables, caches and races are there
            early = memory_in_use()
    while soak.llm.requests:
        soak.turn(arrivals=False)
    llm, grown = soak.llm, memory_in_use() - early
    assert not soak.live and not llm.scheduler.running and not llm.scheduler.waiting
    assert llm.pool.num_referenced == 0 and len(llm.pool.free_rows) == len(llm.pool.block_tables_UM)
    print(f"\nsoak: {time.time() - begin:.0f} s, {dict(soak.counts)}, {llm.stats()}, "
          f"memory {(early + grown) / 2**20:.0f} MiB, {grown / 2**20:+.1f} since half-time")
    assert grown < 32 << 20
    assert soak.counts["ties"] <= 2 + soak.counts["tokens"] / 10000


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
def test_prompts_cut_into_single_tokens_do_not_disturb_a_replayed_graph(lone, monkeypatch):
    folder, prompts, expected = lone["llama"]
    if DEVICE == "cpu":
        monkeypatch.setattr(nanoserve, "record", repeat)
    options = dict(attention="triton", block_size=4, cuda_graphs=True)
    outs = LLM(folder, max_batched_tokens=2, **options).generate([prompts[i] for i in (1, 3, 0)], SamplingParams(max_tokens=NEW))
    assert [out.token_ids for out in outs] == [expected[i] for i in (1, 3, 0)]
    one_by_one = LLM(folder, max_batched_tokens=1, **options).logits(prompts[1])
    torch.testing.assert_close(one_by_one, LLM(folder).logits(prompts[1]), rtol=1e-4, atol=1e-4)


def test_abort_in_the_middle_of_a_chunk_gives_the_blocks_back(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, max_batched_tokens=16)
    ids = [llm.add(p, SamplingParams(max_tokens=NEW)) for p in (prompts[2], prompts[7])]
    llm.step()
    out = llm.requests[ids[1]].output
    llm.abort(ids[1])
    llm.abort(ids[1])   # twice is once
    assert out.finish_reason == "abort" and out.token_ids == []
    other = llm.requests[ids[0]].output
    while llm.requests:
        llm.step()
    assert other.token_ids == expected[2] and llm.pool.num_referenced == 0


def test_streams_lose_no_text_to_each_other_nor_to_a_generate():
    llm = LLM(HERE / "demo/llama", dtype="float32")
    prompts = ["The cat sat", "One day, Tom", "A girl"]
    params = SamplingParams(max_tokens=30)
    alone = [out.text for out in llm.generate(prompts, params)]
    pieces = ["", "", ""]
    streams = [llm.stream(prompt, params) for prompt in prompts]
    for turn in range(99):
        for i, stream in enumerate(streams):
            if turn % (i + 1) == 0:   # at different paces
                pieces[i] += next(stream, "")
        if turn == 7:
            assert llm.generate([prompts[1]], params)[0].text == alone[1]
    assert pieces == alone and not llm.requests and not llm.grown
    rid = llm.add(prompt=prompts[0], params=params)
    llm.abort(request_id=rid)
    stream = llm.stream(prompts[0])
    next(stream)
    assert llm.pool.num_referenced
    stream.close()
    assert llm.pool.num_referenced == 0 and not llm.requests and not llm.grown


def test_a_stream_that_fails_says_so(lone):
    llm = LLM(HERE / "demo/llama", dtype="float32")

    def fails(token_ids, logits_V):
        return logits_V if len(token_ids) < 3 else 1 / 0
    stream = llm.stream("The cat sat", SamplingParams(logits_processor=fails))
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(ValueError, match="logits_processor: ZeroDivisionError"):
        next(stream)
    with pytest.raises(ValueError, match="no tokenizer"):
        next(LLM(lone["llama"][0]).stream([1, 2, 3]))


def test_a_logits_processor_may_abort_but_not_step(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder)
    ids = []

    def aborts(token_ids, logits_V):
        if len(token_ids) == 2:
            llm.abort(ids[0])
            llm.abort(ids[1])
        return logits_V

    def steps(token_ids, logits_V):
        return llm.step()
    ids = [llm.add(prompts[i], SamplingParams(max_tokens=NEW, logits_processor=f, n=n))
           for i, f, n in ((4, aborts, 2), (3, None, 3), (5, steps, 1), (2, None, 1))]
    outs = [llm.requests[i].output for i in ids]
    while llm.requests:
        llm.step()
        check_pool(llm)
    assert [(len(s.token_ids), s.finish_reason) for out in outs[:2] for s in out.samples] == [(3, "abort")] * 5
    assert outs[2].error.startswith("logits_processor: RuntimeError: a step is under way") and outs[3].token_ids == expected[2]


def test_abort_by_the_first_samples_id_ends_those_that_go_on(lone):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder)
    rid = llm.add(prompts[4], SamplingParams(max_tokens=NEW, n=3, temperature=1.0, seed=0))
    first, *others = llm.requests[rid].output.samples
    llm.requests[rid].limit = 52   # the first one ends early
    while first.finish_reason is None:
        llm.step()
    llm.abort(rid)
    assert first.finish_reason == "length" and [out.finish_reason for out in others] == ["abort"] * 2 and not llm.requests


def test_ctrl_c_at_any_line_leaves_the_engine_whole(lone):
    folder, prompts, expected = lone["llama"]
    llm, wanted, interrupts = LLM(folder, block_size=4, num_blocks=40, max_batched_tokens=30), (4, 3, 0), 0
    files = {nanoserve.__file__, paged_kv.__file__}
    handler, tracer = signal.signal(signal.SIGINT, signal.default_int_handler), sys.gettrace()

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in files or frame.f_code.co_name in ("uninterrupted", "_leave", "abort"):
            return None
        left -= event == "line"
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return trace
    try:
        for line in range(1, 4000, 61):
            left = line
            try:
                sys.settrace(trace)
                outs = llm.generate([prompts[i] for i in wanted], SamplingParams(max_tokens=4, n=2))
                sys.settrace(tracer)
                assert [s.token_ids for out in outs for s in out.samples] == [expected[i][:4] for i in wanted for _ in "ab"]
            except KeyboardInterrupt:
                interrupts += 1
            finally:
                sys.settrace(tracer)
            check_pool(llm)
            assert not llm.requests and llm.pool.num_referenced == 0 and not llm.scheduler.waiting, line
            outs = llm.generate([prompts[i] for i in wanted], SamplingParams(max_tokens=2))
            assert [out.token_ids for out in outs] == [expected[i][:2] for i in wanted]
        for line in range(1, 90):
            left = line
            try:
                sys.settrace(trace)
                llm.add(prompts[0], SamplingParams(n=2))
            except KeyboardInterrupt:
                interrupts += 1
            finally:
                sys.settrace(tracer)
            assert list(llm.requests) == [out.id for r in llm.scheduler.waiting for out in r.output.samples], line
            for request in list(llm.scheduler.waiting):
                llm.abort(request.output.id)
        for line in range(1, 120, 3):
            left = line
            try:
                sys.settrace(trace)
                llm.logits(prompts[0])
            except KeyboardInterrupt:
                interrupts += 1
            finally:
                sys.settrace(tracer)
            check_pool(llm)
            assert llm.pool.num_referenced == 0, line
    finally:
        signal.signal(signal.SIGINT, handler)
    assert interrupts > 100


def test_admission_counts_the_samples_to_come(lone):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, block_size=4, num_blocks=30, prefix_cache=False)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, n=4)
    outs = [llm.requests[llm.add(prompts[3], params)].output for _ in range(3)]   # 5 blocks in common, 4 x 4 of their own
    running = []
    while llm.requests:
        llm.step()
        running.append(len(llm.scheduler.running))
    assert max(running) == 4 and llm.stats()["preemptions"] == 0
    assert [s.blocks for out in outs for s in out.samples] == [9] * 12


def test_what_finishes_beside_a_generate_is_handed_out_by_the_next_step(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder)
    rid = llm.add(prompts[0], SamplingParams(max_tokens=3))
    (out,) = llm.generate([prompts[1]], SamplingParams(max_tokens=NEW))
    assert out.token_ids == expected[1]
    assert [(out.id, out.token_ids) for out in llm.step()] == [(rid, expected[0][:3])] and llm.step() == []


def test_bad_prompt_ends_alone(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, block_size=8, num_blocks=10)
    bad = [[], None, 5, [61], [-1], [1.5], [True], "text without a tokenizer", [1] * 80, [1] * 200]
    outs = llm.generate([*bad, prompts[1]], SamplingParams(max_tokens=NEW))
    assert outs[-1].token_ids == expected[1]
    for out, words in zip(outs, ["empty", "None", "5", "61", "-1", "1.5", "True", "no tokenizer", "KV pool", "KV pool"]):
        assert out.finish_reason == "error" and words in out.error and out.token_ids == []
    for prompt in bad:
        with pytest.raises(ValueError):
            llm.add(prompt)
    with pytest.raises(ValueError, match="context holds 160"):
        llm.logits([1] * 161)
    assert LLM(folder).generate([[1] * 160])[0].error.startswith("the prompt has 160 tokens and the model's context holds 160")
    assert llm.pool.num_referenced == 0


def test_text_ends_with_the_context_or_the_pool(lone):
    folder, prompts, _ = lone["llama"]
    (out,) = LLM(folder).generate([[1] * 150], SamplingParams(max_tokens=99))
    assert (len(out.token_ids), out.finish_reason) == (10, "length")
    (out,) = LLM(folder, block_size=8, num_blocks=3).generate([[1] * 20], SamplingParams(max_tokens=99))
    assert (len(out.token_ids), out.finish_reason) == (4, "length")


@pytest.mark.parametrize("wrong", [dict(max_tokens=0), dict(max_tokens=-3), dict(max_tokens=1.5), dict(temperature=-0.1),
                                   dict(temperature=math.nan), dict(temperature=math.inf), dict(top_p=0), dict(top_p=1.01), dict(top_p=math.nan),
                                   dict(temperature="x"), dict(temperature=True), dict(top_p=None), dict(top_p=True), dict(stop=5),
                                   dict(top_k=-1), dict(top_k=10 ** 400), dict(temperature=10 ** 400), dict(seed="x"), dict(seed=-1), dict(stop=("",)), dict(stop=(1,)), dict(n=0), dict(n=True),
                                   dict(logprobs=-1), dict(logprobs=1.0), dict(logits_processor="x")])
def test_sampling_parameters_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_each_prompt_may_have_its_own_parameters(lone):
    folder, prompts, expected = lone["gpt2"]
    llm = LLM(folder)
    outs = llm.generate(prompts[:3], [SamplingParams(max_tokens=n) for n in (1, 5, 9)])
    assert [out.token_ids for out in outs] == [expected[0][:1], expected[1][:5], expected[2][:9]]
    assert all(out.ttft > 0 for out in outs) and outs[0].tps == 0 < outs[1].tps
    with pytest.raises(ValueError, match="3 prompts and 1"):
        llm.generate(prompts[:3], [SamplingParams()])


# --- sampling

@settings(max_examples=100)
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.3, 1.0, 2.5]), top_k=st.integers(0, 12),
       top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]))
def test_tokens_are_drawn_as_often_as_their_probability_says(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).standard_normal(9) * 2
    weight = np.exp(logits.astype(np.float32).astype(float) / temperature)
    order = sorted(range(9), key=lambda i: -weight[i])[:top_k or 9]
    kept, total = [], 0.0
    for i in order:   # the fewest that add up to p, the last one included
        kept.append(i)
        total += weight[i] / weight[order].sum()
        if total >= top_p:
            break
    draws = 2000
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = nanoserve.sample(torch.tensor(logits).float().expand(draws, 9), [params] * draws,
                              [(i + 0.5) / draws for i in range(draws)])
    for i in range(9):
        expected = draws * weight[i] / weight[kept].sum() if i in kept else 0
        assert abs(tokens.count(i) - expected) <= 1.01


def test_greedy_rows_and_sampled_rows_do_not_mix():
    logits = torch.tensor([[0.0, 3.0, 1.0], [9.0, 0.0, 0.0], [0.0, 1.0, 5.0]])
    params = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams()]
    assert nanoserve.sample(logits, params, [0.999, 0.0, 0.999]) == [1, 0, 2]


def test_seed_gives_the_same_text_whatever_else_runs(lone):
    folder, prompts, _ = lone["llama"]
    hot = dict(temperature=1.5, max_tokens=NEW)
    alone = LLM(folder).generate([prompts[4]], SamplingParams(seed=11, **hot))[0].token_ids
    llm = LLM(folder, block_size=4, num_blocks=30, max_batched_tokens=17)
    crowd = llm.generate([prompts[i] for i in (2, 4, 5, 4, 7)],
                         [SamplingParams(seed=s, **hot) for s in (None, 11, 3, 12, None)])
    assert crowd[1].token_ids == alone != crowd[3].token_ids


# --- text

@settings(max_examples=150)
@given(text=WILD, stops=st.lists(st.text(st.sampled_from("the cas "), min_size=1, max_size=4), max_size=3))
def test_text_ends_before_a_stop_string_and_never_shows_part_of_one(tokenizers, text, stops):
    tokenizer = tokenizers["gpt2"][0]
    ids = tokenizer.encode(text) or [5]
    out = nanoserve.Output(0)
    request = nanoserve.Request([1], SamplingParams(stop=stops), 1 + len(ids), out, random.Random(0), tokenizer.decoder([]), 0.0)
    shown = [""]
    for n, i in enumerate(ids):
        request.append(i, [], 1.0)
        shown.append(out.text)
        so_far = tokenizer.decode(ids[:n + 1])
        places = [so_far.find(s) for s in stops if s in so_far]
        if places:
            assert (out.text, out.finish_reason) == (so_far[:min(places)], "stop")
            break
        certain = next(k for k in range(len(so_far) + 1) if k == len(so_far) or any(s.startswith(so_far[k:]) for s in stops))
        assert out.finish_reason or so_far[-1:] == "\ufffd" or out.text == so_far[:certain], "nothing is held back that no stop string can begin with"
    else:
        assert (out.text, out.finish_reason) == (tokenizer.decode(ids), "length")
    assert all(out.text.startswith(s) for s in shown), "what has been shown is never taken back"


# ---------------------------------------------------------------------------------------------
# The command line, as a process, on the model that comes with the repository

def run(*arguments, stdin=b"", **more):
    done = subprocess.run([sys.executable, str(HERE / "nanoserve.py"), *arguments], input=stdin, capture_output=True,
                          timeout=300, env=os.environ | {"PYTHONIOENCODING": "ascii"}, **more)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def exit_code(main, arguments):
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def test_the_readme_command_writes_a_story(tmp_path):
    code, out, err = run("--prompt", "The cat sat", cwd=tmp_path)
    said = re.fullmatch(
        r"prefill: \d+ tokens, .*TTFT.*decode: \d+ tokens .*TPS.*KV: \d+ blocks of \d+ tokens\n(b?float\d\d): .*\n", err)
    assert code == 0 and said, err
    words = out.split()
    assert 40 <= len(words) <= 500 and len(set(words)) > 30 and out.rstrip()[-1] in '.!"?'
    llm = LLM(HERE / "demo/llama", dtype=said[1])   # on a busy machine another type may win
    assert out == llm.generate(["The cat sat"], SamplingParams(max_tokens=512))[0].text + "\n"


def test_several_prompts_run_as_one_batch_and_print_in_order(tmp_path):
    (tmp_path / "prompts").write_text("Once upon a time\n\nOne day, 😀\n", "utf-8")
    arguments = ["--dtype", "float32", "--max-tokens", "8", "--prompts-file", str(tmp_path / "prompts"), "--prompt", "The dog", "--prompt", "-"]
    code, out, err = run(*arguments, "--json", stdin="Lily\n".encode())
    objects = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [o["prompt"] for o in objects] == ["The dog", "Lily", "Once upon a time", "One day, 😀"]
    llm = LLM(HERE / "demo/llama", dtype="float32")
    for o in objects:
        (alone,) = llm.generate([o["prompt"]], SamplingParams(max_tokens=8))
        assert (o["text"], o["token_ids"], o["finish_reason"]) == (alone.text, alone.token_ids, alone.finish_reason)
        assert o["ttft"] > 0 and o["tps"] > 0 and o["prompt_tokens"] == len(llm.tokenizer.encode(o["prompt"]))
    code, text, err = run(*arguments, stdin="Lily\n".encode())
    assert text == "".join(o["text"] + "\n" for o in objects) and err.count("TTFT") == 4


def test_in_a_batch_only_the_prompt_at_fault_ends():
    code, out, err = run("--prompt", "The dog", "--prompt", "", "--prompt", "The cat " * 900, "--prompt", b"\xff\xfe",
                         "--prompt", "The hen", "--max-tokens", "5")
    assert code == 2 and len(out.splitlines()) == 2 and "Traceback" not in err
    assert [line for line in err.splitlines() if "TTFT" not in line and "float" not in line] == [
        "nanoserve.py: prompt 2: the prompt is empty: give at least one character",
        next(line for line in err.splitlines() if "prompt 3: the prompt has" in line and "context holds 1024" in line),
        "nanoserve.py: prompt 4: the prompt is not valid UTF-8: re-encode it as UTF-8"]


@pytest.mark.parametrize("arguments, words", [
    ([], "there is no prompt"), (["--prompt", ""], "empty"), (["--prompt", "x", "--max-tokens", "0"], "max_tokens"),
    (["--prompt", "x", "--max-tokens", "-5"], "max_tokens"), (["--prompt", "x", "--max-tokens", "many"], "--max-tokens"),
    (["--prompt", "x", "--temperature", "-1"], "temperature"), (["--prompt", "x", "--temperature", "nan"], "temperature"),
    (["--prompt", "x", "--top-p", "0"], "top_p"), (["--prompt", "x", "--top-p", "1.5"], "top_p"), (["--prompt", "x", "--top-k", "-1"], "top_k"),
    (["--prompt", "x", "--stop", ""], "stop is"), (["--prompt", "x", "--device", "abacus"], "abacus"),
    (["--prompt", "x", "--device", "cuda:99"], "cuda:99"), (["--prompt", "x", "--dtype", "int8"], "int8"),
    (["--prompt", "x", "--attention", "magic"], "magic"), (["--prompt", "x", "--model", "/nowhere"], "/nowhere"),
    (["--prompt", "x", "--block-size", "0"], "block_size"), (["--prompt", "x", "--num-blocks", "-1"], "num_blocks"),
    (["--prompt", "x", "--num-blocks", "999999999999"], "blocks"), (["--prompt", "x", "--max-seqs", "0"], "max_seqs"),
    (["--prompt", "x", "--max-batched-tokens", "0"], "max_batched_tokens"), (["--prompt", "x " * 40, "--num-blocks", "1"], "KV pool"),
    (["--prompts-file", "/nowhere/prompts"], "/nowhere/prompts"), (["--prompt", "x", "--prompts-file", "/"], "/"), (["--pompt", "x"], "--pompt"),
])
def test_bad_input_ends_in_one_sentence_and_a_non_zero_exit(capfd, arguments, words):
    code = exit_code(nanoserve.main, arguments)
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_input_ends_a_process_without_a_traceback(tmp_path):
    for arguments, stdin in [(["--prompt", "x", "--device", "cuda"], b""), (["--prompt", "-"], b"a\xff"), (["--prompt", "-"], b"")]:
        code, out, err = run(*arguments, stdin=stdin)
        assert code == 2 and out == "" and err.count("\n") == 1, err


def test_want_of_memory_is_said_in_one_sentence_and_a_fault_of_ours_is_not_hidden(monkeypatch, capsys):
    def serve(args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nMore advice")
    monkeypatch.setattr(nanoserve, "serve", serve)
    assert nanoserve.main(["--prompt", "x"]) == 2
    assert capsys.readouterr().err == ("nanoserve.py: out of memory (CUDA out of memory. Tried to allocate 2 GiB.): "
                                       "take a smaller model, dtype or number of tokens\n")
    monkeypatch.setattr(nanoserve, "serve", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nanoserve.main(["--prompt", "x"])


def test_a_file_that_may_not_be_read_is_named(monkeypatch, capfd):
    def denied(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "read_text", denied)
    assert nanoserve.main(["--prompt", "x"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "config.json cannot be opened (Permission denied)" in err and err.count("\n") == 1


def test_ctrl_c_ends_cleanly():
    process = subprocess.Popen([sys.executable, str(HERE / "nanoserve.py"), "--prompt", "The cat sat", "--ignore-eos", "--max-tokens", "900"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.decode().strip() == "nanoserve.py: interrupted"


def test_closed_pipe_is_said_in_one_sentence():
    process = subprocess.Popen([sys.executable, str(HERE / "nanoserve.py"), "--prompt", "The cat sat", "--ignore-eos", "--max-tokens", "900"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(20)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 1 and err.count("\n") == 1 and "closed" in err


def test_closed_and_full_standard_streams_are_no_traceback():
    command = f"{sys.executable} {HERE / 'nanoserve.py'} --prompt - --max-tokens 3"
    for streams, code, words in [(">&-", 1, "closed"), (">/dev/full", 1, "could not be written"), ("<&-", 2, "empty"), ("2>/dev/full", 0, "")]:
        if "full" in streams and not Path("/dev/full").exists():
            continue
        done = subprocess.run(["bash", "-c", f"{'echo The cat |' * (streams != '<&-')} {command} {streams}"], capture_output=True, text=True)
        assert done.returncode == code and words in done.stderr and done.stderr.count("\n") <= 1, done.stderr


def test_everything_but_triton_works_where_there_is_no_triton(lone):
    folder, prompts, expected = lone["llama"]
    code = f"""
import sys; sys.modules["triton"] = None   # as if it were not installed
from nanoserve import LLM, SamplingParams
print(LLM({str(folder)!r}, device="cpu").generate([{prompts[1]}], SamplingParams(max_tokens={NEW}))[0].token_ids)
try:
    LLM({str(folder)!r}, device="cpu", attention="triton")
except ValueError as error:
    print(error)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    tokens, error = done.stdout.splitlines()
    assert json.loads(tokens) == expected[1] and "needs the triton package" in error


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        nanoserve.main(["--help"])
    text = capsys.readouterr().out
    for option in ("prompt", "prompts-file", "model", "max-tokens", "temperature", "top-k", "top-p", "seed", "stop", "ignore-eos", "device",
                   "dtype", "attention", "block-size", "num-blocks", "max-batched-tokens", "max-seqs", "json"):
        assert f"--{option} " in text
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 100


# ---------------------------------------------------------------------------------------------
# The measurements

@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral"])
def test_operations_and_bytes_equal_what_torch_counts(tmp_path, monkeypatch, name):
    config = (FAMILIES | CONFIGS)[name]
    write_checkpoint(tmp_path, config, tensors_of(config))
    from torch.utils.flop_counter import FlopCounterMode   # imports Triton, which kernels.py must set up first
    llm = LLM(tmp_path, device="cpu", attention="naive", block_size=4)
    c, requests = llm.config, [(1, 20), (1, 0), (9, 5), (7, 0)]
    monkeypatch.setattr(model, "linear", lambda x, part: torch.nn.functional.linear(x, part.weight, part.bias))
    chunks, at = [], 0
    for n, past in requests:
        chunks.append(Chunk([1] * n, past, list(range(at, at + 8))))
        at += 8
    with FlopCounterMode(display=False) as counter:
        llm.model(make_batch(chunks, 4), llm.pool)
    # The definition multiplies every query with every key of its request, seen or not.
    seen = sum(min(past + i + 1, w or 10 ** 9) for w in c.windows for n, past in requests for i in range(n))
    every = c.L * sum(n * (n + past) for n, past in requests)
    cost = bench.step_cost(c, requests, 4)
    assert cost.flops + 4 * c.H * c.D * (every - seen) == counter.get_total_flops()

    matrices = [part.weight for kind, parts in llm.model.weights.items() for part in parts
                if part.weight.dim() == 2 and kind not in ("embedding", "position")]
    token = llm.pool.k_LKNSD[0, :, 0, 0].nbytes + llm.pool.v_LKNSD[0, :, 0, 0].nbytes
    kv = sum(min(past, w or 10 ** 9) + 2 * n for w in c.windows for n, past in requests) * token
    assert cost.bytes == sum(w.nbytes for w in matrices) + kv
    assert bench.kv_bytes(c, 4) == c.L * token


def test_estimate_reproduces_the_published_figures(capsys):
    """LLaMA-2 7B on an A100: about one operation per byte in decode, 143 tokens/s, prefill over 100 times faster."""
    assert bench.main(["estimate", "--model", "llama-2-7b", "--hardware", "a100"]) == 0
    value = {row[0]: row[-1] for row in bench.TABLES[-1]["rows"]}
    assert value["its intensity"] == "1.00 FLOP/B" and value["bound on TPS at batch 1"] == "143 tokens/s"
    assert int(value["prefill over decode, per token"].split()[0]) > 100 and value["K and V per token"] == "512 KiB"
    bench.main(["estimate", "--random", "llama-8b"])
    value = {row[0]: row[-1] for row in bench.TABLES[-1]["rows"]}
    assert (value["K and V per token"], value["the same without GQA"]) == ("128 KiB", "512 KiB")


def test_crossover_is_where_operations_and_bytes_take_as_long():
    c, machine = bench.config_of("llama-8b"), bench.HARDWARE["h100"]
    B = int(bench.crossover(c, machine, 16, 2).split()[-1])
    verdicts = [machine.verdict(bench.step_cost(c, [(1, 16)] * b, 2)) for b in (B - 2, B + 2)]
    assert verdicts == ["memory", "compute"] and "no batch" in bench.crossover(c, machine, 8000, 2)


@pytest.mark.parametrize("command", ["phases", "batch", "cache", "traffic --tokens 512", "serve"])
def test_each_measurement_prints_a_narrow_table_and_writes_it_as_json(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(bench, "TABLES", [])
    assert bench.main([*command.split(), "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["command"][1] == command.split()[0] and record["machine"] and record["versions"]["torch"] == torch.__version__
    assert record["date"][:2] == "20" and record["tables"]
    for table in record["tables"]:
        header = next(line for line in lines if line.split() == " ".join(table["header"]).split())
        assert len(header) <= 100 and all(len(row) == len(table["header"]) for row in table["rows"])
        assert all(cell > 0 for row in table["rows"] for cell in row if not isinstance(cell, str))
    assert max(map(len, lines[1:])) <= 100


def test_cpu_measures_every_row(monkeypatch, capsys):
    """With small shapes in the place of gpt2 and llama-135m, and without transformers."""
    small = dict(gpt2=bench.SHAPES["gpt2"] | dict(n_embd=32, n_layer=1, n_head=2, vocab_size=99),
                 **{"llama-135m": bench.llama(99, 32, 48, 1, 4, 2)})
    for name, value in (("SHAPES", small), ("TABLES", []), ("transformers", lambda: None),
                        ("measured_ceiling", lambda device, dtype: bench.Ceiling(4e11, 3e10))):
        monkeypatch.setattr(bench, name, value)
    assert bench.main(["cpu"]) == 0
    speed, context = bench.TABLES
    rows = {row[0]: row[1:] for row in speed["rows"]}
    for shape, dtype in (("gpt2", "float32"), ("gpt2", "bfloat16"), ("llama-135m", "float32"), ("llama-135m", "bfloat16")):
        assert rows[f"{shape} {dtype}: prefill 512"][1].endswith("GFLOP/s") and rows[f"{shape} {dtype}: prefill 512"][2] > 0
        for batch in (1, 16):
            rate, reached, percent, *theirs = rows[f"{shape} {dtype}: decode, batch {batch}"]
            assert rate > 0 and reached.endswith("GB/s") and percent >= 0 and theirs == ["-", "-"]
    assert [row[0] for row in context["rows"]] == ["float32", "bfloat16"] and len(rows) == 15
    assert "A decode step of demo/llama takes" in capsys.readouterr().out


@pytest.mark.skipif(kernels.load_triton() is None or torch.cuda.is_available(), reason="no Triton here, or a GPU")
def test_compiled_kernels_are_those_in_the_results():
    done = subprocess.run([sys.executable, "bench.py", "kernels"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    versions, *printed = done.stdout.splitlines()
    _, recorded_versions, *recorded = (HERE / "results/kernels-compiled.txt").read_text().splitlines()
    if versions.split("Triton")[1] == recorded_versions.split("Triton")[1]:
        assert printed == recorded


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
def test_the_measurements_of_a_gpu_run_to_their_end(monkeypatch, capsys):
    """Where there is none, with a stand-in for the clock and in the interpreter."""
    def seconds(calls):
        for call in calls:
            call()
        return 1e-3
    if DEVICE == "cpu":
        monkeypatch.setattr(bench, "gpu_seconds", seconds)
        monkeypatch.setattr(nanoserve, "record", repeat)
    for name, value in (("TABLES", []), ("CACHE", 0)):
        monkeypatch.setattr(bench, name, value)
    device = torch.device(DEVICE)
    bench.check_kernels(device, [(1, 70), (5, 3)], (torch.float16,))
    assert "equal the float64 definition" in capsys.readouterr().out
    bench.time_prefill(device, torch.float16, (64, 96), 1e12, H=4, K=2, D=16)
    bench.time_decode(device, torch.float16, [(1, 4000), (3, 2000)], 1e9, H=4, K=2, D=16)
    monkeypatch.setitem(bench.SHAPES, "tiny", bench.llama(99, 32, 48, 1, 4, 2))
    monkeypatch.setitem(bench.SHAPES, "huge", bench.llama(99, 1 << 20, 1 << 20, 99, 4, 2))
    bench.time_texts(("tiny", "huge"), 1e9)
    prefill, decode, texts = bench.TABLES
    assert [row[0] for row in prefill["rows"]] == ["prefill 64", "prefill 96"]
    assert all(isinstance(row[3], float) and row[3] > 0 for row in prefill["rows"])
    assert [row[0] for row in decode["rows"]] == ["decode 1 x 4000", "decode 3 x 2000"]
    if DEVICE == "cpu":   # a millisecond for 2 K D T numbers of 2 bytes, which a GB/s would read in 0.512
        assert decode["rows"][0][1:] == ["1000 us", "0.00 TB/s", "51%"]
        assert prefill["rows"][0][1:3] == ["0 TFLOP/s", "0%"] and prefill["rows"][0][3] == 1.0
    bound = 1e9 / bench.step_cost(bench.config_of("tiny"), [(1, 300)], torch.empty(0, dtype=model.DTYPES[texts["rows"][0][0].split()[1]]).itemsize).bytes
    assert texts["rows"][0][2] == f"{bound:.0f}" and int(texts["rows"][0][1]) > 0
    assert texts["rows"][1] == ["huge", "does not fit", "-", "-"]

    llm = LLM(bench.config_of("tiny"), attention="triton", dtype="float32", cuda_graphs=True)
    if DEVICE == "cpu":   # as a graph does, without Python's model
        monkeypatch.setattr(nanoserve, "record", lambda step: (lambda: time.sleep(5e-3), step()))
    decode_seconds = bench.decode_seconds
    monkeypatch.setattr(bench, "decode_seconds", lambda llm, B, context, steps: decode_seconds(llm, B, context, 30))
    step, inside, choosing = bench.loop_seconds(llm, 1)
    assert 0 < choosing < step and 0 < inside < step
    assert DEVICE == "cuda" or choosing < inside and inside > step / 2, "the model is timed inside a graph, too"

    monkeypatch.setattr(kernels, "attention_triton", lambda q, k, v, batch, *more: kernels.attention_naive(q, k, v, batch, *more) + 0.01)
    with pytest.raises(SystemExit, match="torch.float16, D=64, 32:8 heads, blocks of 64, window None: the largest error"):
        bench.check_kernels(device, [(3, 0)], (torch.float16,))


def test_static_batches_wait_for_their_longest_and_continuous_ones_do_not(lone):
    folder, prompts, expected = lone["llama"]
    requests = [(0.0, prompts[i % 2], n) for i, n in enumerate([3, 9, 2, 5, 4])]
    for group in (0, 2):
        llm, steps = LLM(folder, max_seqs=2, device="cpu"), []
        step = llm.step

        def watched():
            outs = step()
            steps.append([out.id for out in outs])
            return outs
        llm.step = watched
        seen = bench.play(llm, requests, group)
        assert len(seen["ttft"]) == 5 and len(seen["gap"]) == 3 + 9 + 2 + 5 + 4 - 5 and max(map(len, steps)) == 2
        assert len(steps) == (9 + 5 + 4 if group else 9 + 4)   # the fifth request takes the place of the second


@pytest.mark.parametrize("arguments, words", [
    (["--model", "/nowhere"], "/nowhere"), (["frobnicate"], "frobnicate"), (["--random", "gpt9"], "gpt9"),
    (["--json", "/nowhere/file"], "/nowhere/file"), (["traffic", "--tokens", "0"], "--tokens"), (["--dtype", "int3"], "int3"),
    (["--device", "abacus"], "abacus"), (["estimate", "--plot", "/nowhere/file"], "cannot be drawn|matplotlib"),
    (["traffic", "--tokens", "9000000"], "out of memory"), (["traffic", "--dtype", "int8"], "int8")])
def test_bench_refuses_bad_input_in_one_sentence(capsys, arguments, words):
    code = exit_code(bench.main, arguments)
    out, err = capsys.readouterr()
    assert code == 2 and re.search(words, err) and err.count("\n") == 1 and "Traceback" not in err, err


# ---------------------------------------------------------------------------------------------
# The model that comes with the repository

@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_demo_logits_equal_the_plain_forward(name):
    folder = HERE / "demo" / name
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    llm = LLM(folder, dtype="float32")
    ids = llm.tokenizer.encode('Once upon a time there was a girl named Lily. "Where is my ball?" asked Lily.')
    expected = plain(config, tensors, ids)
    assert (llm.logits(ids).cpu() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_demo_checkpoints_share_a_tokenizer_and_fit_their_size():
    a, b = (model.load_tokenizer(HERE / "demo" / name) for name in ("llama", "gpt2"))
    for text in (SAMPLE, "The cat sat. <|endoftext|>"):
        assert a.encode(text) == b.encode(text) and a.decode(a.encode(text)) == text
    for name in ("llama", "gpt2"):
        files = list((HERE / "demo" / name).iterdir())
        assert sum(f.stat().st_size for f in files) <= 8_000_000
        with safe_open(HERE / "demo" / name / "model.safetensors", framework="pt") as weights:
            assert list(weights.keys())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_demo_stories_end_by_themselves(name):
    llm = LLM(HERE / "demo" / name, dtype="float32")
    outs = llm.generate(["The cat sat", "Once upon a time", "One day, Tom"], SamplingParams(max_tokens=900))
    assert [out.finish_reason for out in outs] == ["stop"] * 3
    assert "".join(llm.stream("The cat sat", SamplingParams(max_tokens=900))) == outs[0].text


# ---------------------------------------------------------------------------------------------
# What the words say

def blocks_of_code(text):
    """The indented and the fenced blocks of a Markdown text, with the language of the fenced ones."""
    for language, fenced, indented in re.findall(r"^```(\w*)\n(.*?)^```$|((?:^ {4}[^\n]*\n|^\n(?= {4}))+)", text, re.M | re.S):
        yield language, fenced or "\n".join(line[4:] for line in indented.strip("\n").split("\n"))


def test_readme_shows_what_its_commands_print(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("COLUMNS", "120")
    found = list(blocks_of_code((HERE / "README.md").read_text()))
    shown = 0
    for (_, command), (_, expected) in zip(found, found[1:]):
        if command.startswith("python nanoserve.py") and "~" not in command:
            arguments = ["--device", "cpu", "--dtype", "float32", *shlex.split(command)[2:]]   # as it was recorded
            assert nanoserve.main(arguments) == 0
            printed = capsys.readouterr().out
            printed = printed[printed.index("\nstep ") + 1:] if "--timeline" in command else printed

            def plain(text):
                return re.sub(r"machine's [\d,]+: (\w+)-bound, [\d.]+ ms", "machine's", text).split()
            assert plain(printed) == plain(expected), command
            shown += 1
            if "--timeline" in command:
                assert nanoserve.main([*arguments, str(tmp_path / "chart.svg")]) == 0
                assert (tmp_path / "chart.svg").read_text("utf-8") == (HERE / "docs/timeline.svg").read_text("utf-8")
                capsys.readouterr()
    assert shown == 2
    for language, code in found:
        if language == "python":
            exec(code, {})
            assert capsys.readouterr().out.strip()
    mentioned = set(re.findall(r"`python bench.py ?(\w*)", (HERE / "README.md").read_text()))
    assert mentioned == {"", *bench.COMMANDS} - {"phases"}


def test_readme_names_files_and_functions_that_exist():
    text = (HERE / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"`(\w+\.py|demo/|docs/\S+)`", text):
        assert (HERE / path).exists(), path
    everything = "\n".join(path.read_text() for path in HERE.glob("*.py"))
    for name in re.findall(r"`(?:LLM|Scheduler|KVPool|Model)\.(\w+)`", text) + ["sample", "_sweep", "share_out", "Race", "rope_frequencies"]:
        assert re.search(rf"(def|class) {name}\b", everything), name
    for name in set(re.findall(r"(--[a-z][a-z-]+)", text)) - {"--min-p"}:   # which the reader adds
        assert f'"{name}"' in everything, name


def test_worked_example_in_the_docstrings_is_true():
    llm = LLM(HERE / "demo/llama", dtype="float32", block_size=2, device="cpu")
    requests, tables = [llm.requests[llm.add(prompt, SamplingParams(max_tokens=3))] for prompt in ("The cat sat", "The dog")], []
    llm.watchers.append(lambda *seen: tables.append([list(r.table.blocks) for r in requests]))
    while llm.requests:
        llm.step()
    words = [[f'{i} "{llm.tokenizer.decode([i])}"' for i in r.tokens[:-1]] for r in requests]
    assert tables == [[[0, 1], [3]], [[0, 1], [3, 4]], [[0, 1, 2], [3, 4]]]
    squeezed = " ".join(paged_kv.__doc__.split())
    assert f'request 0 {" ".join(words[0][:2])} | {" ".join(words[0][2:4])} | {words[0][4]} S = 2 its table 0 | 1 | 2 ' in squeezed
    assert f'request 1 {" ".join(words[1][:2])} | {" ".join(words[1][2:])} its table 3 | 4 token 2 -> block 4, slot 4 * 2 + 0 = 8' in squeezed
    picture = (HERE / "docs/step.svg").read_text()
    assert all(f">{i}</text>" in picture for r in requests for i in r.tokens[:-1]) and "slot 4 x 2 + 0 = 8" in picture
    assert requests[1].tokens[2] == 479 and "Chunk([479], start=2, blocks=[3, 4])" in kernels.__doc__

    c, (token,) = llm.config, requests[0].tokens[3:4]
    assert f"(E = {c.E}, H = {c.H}, K = {c.K}, D = {c.D}, I = {c.I}, V = {c.V})" in model.__doc__
    assert f'tokens_T {requests[0].tokens[:3]}    x_TE [3, {c.E}]    {c.L} layers' in model.__doc__
    assert f'logits [1, {c.V}]    {token} "{llm.tokenizer.decode([token])}"' in model.__doc__
    for n, past, says in ((3, 0, "does {f:.1f} MFLOP on {b:.2f} MB, {i:.1f} operations"), (1, 3, "{f:.1f} MFLOP on {b:.2f} MB, {i:.1f}."),
                          (512, 0, "512 tokens does {i:.0f} operations per byte")):
        flops, moved = bench.step_cost(c, [(n, past)], 4)
        assert says.format(f=flops / 1e6, b=moved / 1e6, i=flops / moved) in " ".join(bench.__doc__.split())

    command = re.search(r"`(python nanoserve.py --prompt.*?)`", " ".join(nanoserve.Scheduler.__doc__.split()))[1]
    prompts = [word for flag, word in zip(shlex.split(command), shlex.split(command)[1:]) if flag == "--prompt"]
    llm = LLM(HERE / "demo/llama", dtype="float32", max_batched_tokens=6, device="cpu")
    timeline = watch_loop.Timeline(llm)
    llm.generate(prompts, SamplingParams(max_tokens=4))
    for line in timeline.text(100).split("\n")[:5]:
        assert line in nanoserve.Scheduler.__doc__
