"""How we know that the engine keeps its promises. (Read it beside batch.py, model.py and nanoserve.py.)

    python -m pytest            all tests; no GPU needed: the kernels run in Triton's interpreter
    python -m pytest -k kernel  one part
    python -m pytest -k soak --soak-minutes 30 -s   the engine under pressure, for as long as you like

Each test reads like the sentence that it proves, and compares with something computed another way. Each room has its
own file of tests; reference.py is what they compare with.
"""

import itertools
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batch
import cli
import kernels
import nanoserve
import paged_kv
from nanoserve import LLM, SamplingParams
from reference import CONFIGS, GPT2, NEW, plain, plain_greedy, repeat, tensors_of, write_checkpoint
from roofline import kv_bytes, layer_weights, step_cost
from sampling import noise_key, sample
from speculate import DraftModel
from test_tokenizer import WILD, tokenizers   # noqa: F401, a fixture

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check_steps(llm):
    """Check, at every step, the token budget, that no slot is written twice, and that what each request reads is what it
    would have written: instead of K and V, each slot holds the tokens that they depend on. The same at every pass of a
    draft model, in its own memory. Returns the steps' tokens."""
    pool, steps, own_last = llm.pool, [], llm.pool.own_last
    memories, S = [], pool.block_size

    def checked(inner, filled):
        """filled: of how many tokens of a request K and V are there."""
        memory, texts = {}, {}
        memories.append(memory)

        def run(chunks):
            tokens = sum(len(chunk.tokens) for chunk in chunks)
            assert tokens <= llm.scheduler.max_batched_tokens
            if inner.__name__ == "_logits":
                steps.append(tokens)
            written = set()
            for chunk in chunks:
                (request,) = [r for r in llm.scheduler.running if r.table.blocks is chunk.blocks]
                before = texts[request] if chunk.start > len(request.tokens) else request.tokens   # the second draft, say
                text = texts[request] = before[:chunk.start] + chunk.tokens
                assert text[:len(request.tokens)] == request.tokens[:len(text)] and chunk.row == request.table.row
                for t in range(chunk.start, len(text)):
                    slot = chunk.blocks[t // S], t % S
                    assert slot not in written
                    assert pool.references[slot[0]] == 1 or t < len(request.tokens), "a guess is nobody else's"
                    written.add(slot)
                    memory[slot] = text[:t + 1]
            for request in llm.scheduler.running:
                chunk = next((c for c in chunks if c.blocks is request.table.blocks), None)
                text = texts[request] if chunk else request.tokens[:filled(request)]
                for t in range(len(text)):
                    assert memory[request.table.blocks[t // S], t % S] == text[:t + 1]
            return inner(chunks)
        return run

    def copy(table):
        before, done = table.blocks[-1], own_last(table)
        for memory in memories:
            for offset in range(S):
                if (before, offset) in memory:
                    memory[table.blocks[-1], offset] = memory[before, offset]
        return done

    llm._logits, pool.own_last = checked(llm._logits, lambda request: request.computed), copy
    if isinstance(getattr(llm.speculator, "drafter", None), DraftModel):
        runner = llm.speculator.drafter.runner
        runner.__name__ = "passes"
        llm.speculator.drafter.runner = checked(runner, lambda request: request.table.drafted)
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


def assert_tokens_do_not_depend_on_company(lone, config, backend, options, spare, arrivals, hopeful, drafts=None):
    """hopeful: the scheduler believes that every answer will be short, so that the pool runs out and it must preempt.
    drafts: what is done to an engine that speculates before it begins."""
    weights, kv = options["quantization"] == "int8", options["kv_cache_dtype"] == "int8"
    folder, prompts, expected = lone[config + " int8 weights" * weights + " int8 kv" * kv]
    S = options["block_size"]
    llm = LLM(folder, attention=backend, dtype="float32", num_blocks=-(-(60 + NEW) // S) + spare, **options)
    if drafts:
        drafts(llm, prompts, expected)
    check_steps(llm)
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
        assert all(r.computed == n + 1 or r.computed > n and drafts or r.output.finish_reason or r in llm.scheduler.waiting
                   for r, n in decoding)
        order = [r.output.id for r in [*llm.scheduler.running, *llm.scheduler.waiting]]
        assert order == sorted(order), "first come, first served"
        assert len(llm.scheduler.running) <= llm.scheduler.max_seqs
        check_pool(llm)
        step += 1
        assert step < 3000, "somebody waits for ever"
    assert llm.pool.num_referenced == 0 and not llm.scheduler.running and not llm.scheduler.waiting
    samples = [sample for out, *_ in outputs for sample in out.samples]
    stats = llm.stats()
    for what in ("computed_tokens", "drafted_tokens", "accepted_tokens"):
        assert stats[what] == sum(getattr(sample, what) for sample in samples)
    assert all(s.accepted_tokens <= s.drafted_tokens <= (s.computed_tokens if drafts else 0) for s in samples)
    if not hopeful and len(samples) == len(outputs):   # everyone uses all of max_tokens, which is what was expected
        assert stats["preemptions"] == 0
        for out, i, n, _ in outputs:
            if out.finish_reason == "length" and not drafts:   # the last token is never run
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
                                            max_seqs=st.integers(1, 9), prefix_cache=st.booleans(),
                                            quantization=st.sampled_from([None, "int8"]),
                                            kv_cache_dtype=st.sampled_from(["auto", "int8"])))
# Chunks, preemption, a shared prefix, a fork, an abort and newcomers: for tests that have time for a single example.
BUSY = dict(options=dict(block_size=4, max_batched_tokens=30, max_seqs=4, prefix_cache=True, quantization=None, kv_cache_dtype="auto"),
            spare=1, arrivals=[(3, 0, 12, None, 1), (4, 0, 8, None, 2), (7, 2, 12, 5, 1), (1, 3, 5, None, 3)], hopeful=True)


@settings(max_examples=250)
@given(config=st.sampled_from(list(CONFIGS)), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans())
def test_tokens_depend_on_the_prompt_alone(lone, config, options, spare, arrivals, hopeful):
    """Not on neighbours, arrival, chunk size, block size, preemption, aborts of others or a prefix hit."""
    assert_tokens_do_not_depend_on_company(lone, config, "torch", options, spare, arrivals, hopeful)


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@settings(max_examples=1 if DEVICE == "cpu" else 20)
@example(config="gpt2", **BUSY)
@given(config=st.sampled_from(list(CONFIGS)), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans())
def test_tokens_do_not_depend_on_the_attention_backend(lone, config, options, spare, arrivals, hopeful):
    options = options | dict(max_batched_tokens=options["max_batched_tokens"] + 20)
    assert_tokens_do_not_depend_on_company(lone, config, "triton", options, spare, arrivals[:4], hopeful)


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@settings(max_examples=1 if DEVICE == "cpu" else 20)
@example(config="mistral", **BUSY | dict(options=BUSY["options"] | dict(kv_cache_dtype="int8")))
@given(config=st.sampled_from(list(CONFIGS)), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans())
def test_tokens_are_the_same_with_cuda_graphs(lone, monkeypatch, config, options, spare, arrivals, hopeful):
    """Without a GPU, a stand-in for the graph repeats the step on the batch that stays: padding and refreshing are the same."""
    if DEVICE == "cpu":
        monkeypatch.setattr(batch, "record", repeat)
    assert_tokens_do_not_depend_on_company(lone, config, "triton", options | dict(cuda_graphs=True), spare, arrivals,
                                         hopeful)


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
def test_what_an_idle_request_computes_is_defined(poisoned, lone, monkeypatch):
    """A step of 5 requests is replayed as one of 8. Memory that nobody wrote is NaN here, and none of it may come out."""
    folder, prompts, expected = lone["mistral"]
    if DEVICE == "cpu":
        monkeypatch.setattr(batch, "record", repeat)
    llm = LLM(folder, attention="triton", dtype="float32", cuda_graphs=True)
    outs = llm.generate(prompts[:5], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [out.token_ids for out in outs] == [tokens[:3] for tokens in expected[:5]]
    assert set(llm.runner.graphs.recorded) == {(8, 1)}
    for _, _, logits_BV in llm.runner.graphs.recorded.values():
        assert len(logits_BV) == 8 and logits_BV.isfinite().all()


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@pytest.mark.parametrize("processors", [1, 4, 5])
def test_a_graph_fits_every_step_of_its_size(lone, monkeypatch, processors):
    """Also where the KV heads do not divide twice the processors."""
    monkeypatch.setattr(kernels, "multiprocessors_of", lambda device: processors)
    if DEVICE == "cpu":
        monkeypatch.setattr(batch, "record", repeat)
    config = GPT2 | dict(n_embd=36, n_head=3)   # 3 KV heads: 2, 8 and 10 programs are no multiple
    tensors = tensors_of(config)
    folder = write_checkpoint(lone["gpt2"][0].parent / f"three heads {processors}", config, tensors)
    llm, prompts = LLM(folder, attention="triton", dtype="float32", cuda_graphs=True), lone["gpt2"][1]
    crowd = [prompts[i] for i in (0, 7, 2)]
    outs = llm.generate(crowd, [SamplingParams(max_tokens=n, ignore_eos=True) for n in (5, 3, 7)])
    for out, prompt in zip(outs, crowd):
        assert out.token_ids == plain_greedy(config, tensors, prompt, len(out.token_ids))
    assert set(llm.runner.graphs.recorded) == {(1, 1), (2, 1), (4, 1)}


def test_logits_are_given_while_as_many_run_as_may(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, max_seqs=3, block_size=8)
    outs = [llm.requests[llm.add(prompts[i], SamplingParams(max_tokens=NEW, ignore_eos=True))].output for i in (1, 3, 4)]
    llm.step()
    assert len(llm.scheduler.running) == 3
    alone = LLM(folder).logits(prompts[7])
    torch.testing.assert_close(llm.logits(prompts[7]), alone, rtol=1e-4, atol=1e-4)
    while llm.requests:
        llm.step()
    assert [out.token_ids for out in outs] == [expected[i] for i in (1, 3, 4)]


@pytest.mark.parametrize("spare, fits", [(0, True), (-1, False)])
def test_a_request_that_fits_exactly_is_admitted(lone, spare, fits):
    """The first needs 9 blocks to its end (23 + 12 tokens, the last of which is not run), the second 2."""
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, block_size=4, num_blocks=9 + 2 + spare, prefix_cache=False)
    llm.add(prompts[3], SamplingParams(max_tokens=NEW, ignore_eos=True))
    llm.add(prompts[1], SamplingParams(max_tokens=6, ignore_eos=True))
    llm.step()
    assert len(llm.scheduler.running) == 1 + fits
    while llm.requests:
        llm.step()
    assert llm.stats()["preemptions"] == 0


def test_requests_that_come_to_their_own_end_teach_how_much_is_used_and_others_do_not(lone):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder)
    llm.scheduler.usage = 0.5
    ids = [llm.add(prompts[0], SamplingParams(max_tokens=10, ignore_eos=True)) for _ in range(3)]
    failing = llm.add(prompts[0], SamplingParams(max_tokens=10, logits_processor=lambda ids, x: x if len(ids) < 2 else 1 / 0))
    llm.step()
    for rid in ids[1:]:
        llm.abort(rid)
    assert llm.scheduler.usage == 0.5
    while failing in llm.requests:
        llm.step()
    assert llm.scheduler.usage == 0.5
    while llm.requests:
        llm.step()
    assert llm.scheduler.usage == pytest.approx(0.5 + 0.1 * (1.0 - 0.5)), "10 of 10 tokens"


def test_times_count_from_the_arrival_of_a_request(lone, monkeypatch):
    """A clock that moves when the test says so: it waits 5 s in the queue, then has tokens at 7, 8 and 9 s."""
    folder, prompts, _ = lone["llama"]
    llm, now = LLM(folder, max_seqs=1), 100.0
    monkeypatch.setattr(nanoserve.time, "perf_counter", lambda: now)
    first = llm.requests[llm.add(prompts[0], SamplingParams(max_tokens=1))].output
    second = llm.requests[llm.add(prompts[1], SamplingParams(max_tokens=3, ignore_eos=True))].output
    for now in (105.0, 107.0, 108.0, 109.0):
        llm.step()
    assert (first.ttft, first.tps) == (5.0, 0.0), "one token has no time between tokens"
    assert (second.ttft, second.tps) == (7.0, 1.0) and second.finish_reason == "length"


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
    steps = check_steps(llm)
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
    steps = check_steps(llm)
    outs = llm.generate([prompts[i] for i in (7, 6, 7)], SamplingParams(max_tokens=NEW))
    assert [out.token_ids for out in outs] == [expected[i] for i in (7, 6, 7)]
    assert [out.reused_tokens for out in outs] == [0, 48, 56]
    assert sum(steps) == 59 + 3 + 3 + 3 * (NEW - 1) and (steps[0] == 59 + 3 + 3) == (budget == 200)
    stats = llm.stats()
    assert (stats["computed_tokens"], stats["reused_tokens"], stats["steps"]) == (sum(steps), 104, len(steps))


def test_int8_keys_and_values_take_less_memory_and_change_little(lone, monkeypatch):
    """Per token and head D + 4 bytes instead of 4 D, for K and for V: with D = 8 that is 12 instead of 32."""
    folder, prompts, _ = lone["llama"]
    monkeypatch.setattr("model.memory_for_pool", lambda device: (10 ** 6, 10 ** 5))
    pools = {}
    for kv in ("auto", "int8"):
        llm = LLM(folder, dtype="float32", kv_cache_dtype=kv, block_size=8)
        c, pools[kv] = llm.config, llm.pool
        assert sum(memory.nbytes for memory in llm.pool.memory) == llm.pool.num_blocks * 8 * kv_bytes(c, 4, kv)
        with pytest.raises(ValueError, match=f"^200000 blocks of 8 tokens .* at most {10 ** 6 // (8 * kv_bytes(c, 4, kv))} blocks fit"):
            LLM(folder, dtype="float32", kv_cache_dtype=kv, block_size=8, num_blocks=200000)
    assert kv_bytes(c, 4) == 2 * c.L * c.K * 32 and kv_bytes(c, 4, "int8") == 2 * c.L * c.K * 12
    assert pools["int8"].num_blocks == 10 ** 5 // (8 * 2 * c.L * c.K * 12) > 2.6 * pools["auto"].num_blocks
    step, weights = [(1, 30), (1, 20)], 4 * (layer_weights(c) + c.V * c.E)
    assert [step_cost(c, step, 4, kv_cache_dtype=kv).bytes - weights for kv in pools] == [54 * kv_bytes(c, 4, kv) for kv in pools]

    monkeypatch.undo()
    demo = {kv: LLM(HERE / "demo/llama", dtype="float32", kv_cache_dtype=kv) for kv in pools}
    (story,) = demo["auto"].generate(["One day"], SamplingParams(max_tokens=200, temperature=1.0, seed=5))
    p, q = (llm.logits("One day" + story.text).double().log_softmax(-1) for llm in demo.values())
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 1e-5, "KL divergence of the next token in a story of its own, in nats"


def test_a_type_of_keys_and_values_that_does_not_exist_is_refused_before_a_weight_is_read(lone, monkeypatch, capsys):
    monkeypatch.setattr(nanoserve, "load_weights", None)
    for kv in ("fp4", "INT8", "", None, 8, torch.int8):
        with pytest.raises(ValueError, match=f"^kv_cache_dtype {re.escape(repr(kv))} is not supported: use auto or int8$"):
            LLM(lone["llama"][0], kv_cache_dtype=kv)
    assert cli.main(["--model", str(lone["llama"][0]), "--prompt", "x", "--kv-cache-dtype", "fp4"]) == 2
    assert "kv_cache_dtype 'fp4'" in capsys.readouterr().err


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
        llm, files, lines = LLM(folder, max_seqs=4, device="cpu"), {nanoserve.__file__, paged_kv.__file__, batch.__file__}, 0
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
    steps = check_steps(llm)
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
    check_steps(llm)
    params = [SamplingParams(max_tokens=NEW, logits_processor=f) for f in faults] + [SamplingParams(max_tokens=NEW)] * 2
    outs = llm.generate([prompts[4]] * 6 + [prompts[4], prompts[2]], params)
    for out, words in zip(outs, faults.values()):
        assert out.finish_reason == "error" and out.error.startswith("logits_processor: ") and words in out.error
    assert [out.token_ids for out in outs] == [expected[4][:3], [], [], [], [], [], expected[4], expected[2]]
    assert llm.pool.num_referenced == 0

    ids = [llm.add(prompts[i], SamplingParams(max_tokens=NEW)) for i in (3, 5)]   # a fault in a tokenizer, say
    outs = [llm.requests[i].output for i in ids]
    llm.requests[ids[0]].detokenize = lambda token, last: 1 / 0
    while llm.requests:
        llm.step()
        check_pool(llm)
    assert (outs[0].finish_reason, outs[0].error) == ("error", "ZeroDivisionError: division by zero") and outs[1].token_ids == expected[5]


def steps_that_may_fail(llm, prompts, params, calm):
    """Step until all is done, and give the number of each step before it runs. A step that fails leaves the pool in order,
    and in the end everyone has the tokens that a calm engine gives."""
    outs = [llm.requests[llm.add(prompt, params)].output for prompt in prompts]
    for step in itertools.count():
        if not llm.requests:
            break
        yield step
        try:
            llm.step()
        except (KeyboardInterrupt, RuntimeError):
            assert llm.pool.num_referenced == 0 and not llm.scheduler.running
        check_pool(llm)
    expected = calm.generate(prompts, params)
    assert [s.token_ids for out in outs for s in out.samples] == [s.token_ids for out in expected for s in out.samples]


@settings(max_examples=40)
@given(fail_at=st.sets(st.integers(0, 25), min_size=1, max_size=6), budget=st.integers(3, 80), prefix_cache=st.booleans(),
       inside=st.booleans(), hot=st.booleans())
def test_interrupted_and_failed_steps_change_nobodys_tokens(lone, fail_at, budget, prefix_cache, inside, hot):
    """An interrupt before the model ran, or an error after it has, as when memory is short: the step is undone."""
    folder, prompts, _ = lone["llama"]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=float(hot), seed=3, n=2)
    llm = LLM(folder, block_size=4, num_blocks=60, max_batched_tokens=budget, max_seqs=6, prefix_cache=prefix_cache)
    check_steps(llm)
    run, step = llm._logits, 0

    def breaks(chunks):
        if step in fail_at and not inside:
            raise KeyboardInterrupt
        logits = run(chunks)
        if step in fail_at:
            raise RuntimeError("out of memory")
        return logits
    llm._logits = breaks
    for step in steps_that_may_fail(llm, [prompts[i] for i in (7, 6, 4, 3)], params, LLM(folder)):
        pass


def test_interrupted_generate_leaves_nothing_behind(lone):
    folder, prompts, expected = lone["llama"]
    llm, run = LLM(folder), None
    run, llm._logits = llm._logits, lambda chunks: (_ for _ in ()).throw(KeyboardInterrupt) if llm.steps == 4 else run(chunks)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts[:4], SamplingParams(max_tokens=NEW, n=2))
    assert not llm.requests and llm.pool.num_referenced == 0 and not llm.scheduler.waiting
    llm._logits = run
    assert llm.generate([prompts[4]], SamplingParams(max_tokens=NEW))[0].token_ids == expected[4]

    rid, steps = llm.add(prompts[0], SamplingParams(max_tokens=2)), llm.steps   # what ended beside it is not lost
    llm._logits = lambda chunks: (_ for _ in ()).throw(KeyboardInterrupt) if llm.steps == steps + 4 else run(chunks)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts[1:2], SamplingParams(max_tokens=NEW))
    llm._logits = run
    assert [(out.id, out.token_ids) for out in llm.step()] == [(rid, expected[0][:2])]


def test_what_a_watcher_adds_while_prompts_are_generated_outlives_them(lone):
    folder, prompts, expected = lone["llama"]
    llm, added = LLM(folder), []
    llm.watchers.append(lambda *seen: added or added.append(llm.add(prompts[3], SamplingParams(max_tokens=NEW))))
    assert llm.generate([prompts[4]], SamplingParams(max_tokens=2))[0].token_ids == expected[4][:2]
    out = llm.requests[added[0]].output
    while llm.requests:
        llm.step()
    assert out.token_ids == expected[3] and llm.pool.num_referenced == 0


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
        self.steps, self.live, self.said, self.counts = check_steps(self.llm), {}, [], Counter()
        self.run, self.llm._logits = self.llm._logits, self.break_sometimes

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
        logits_V = self.lone.logits(prompt + tokens[:-1])[-1].cpu().clone()
        if f := params["logits_processor"]:
            logits_V = f(tokens[:-1], logits_V)
        logits = logits_V + torch.randn(500, len(logits_V), generator=torch.Generator().manual_seed(0)) * 3e-5
        at = len(prompt) + len(tokens) - 1
        assert tokens[-1] in sample(logits, [SamplingParams(**params)] * 500, [noise_key(params["seed"])] * 500, [at] * 500)


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
        monkeypatch.setattr(batch, "record", repeat)
    options = dict(attention="triton", block_size=4, cuda_graphs=True)
    outs = LLM(folder, max_batched_tokens=2, **options).generate([prompts[i] for i in (1, 3, 0)], SamplingParams(max_tokens=4))
    assert [out.token_ids for out in outs] == [expected[i][:4] for i in (1, 3, 0)]
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
    llm.requests[rid].max_length = 52   # the first one ends early
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


def test_each_prompt_may_have_its_own_parameters(lone):
    folder, prompts, expected = lone["gpt2"]
    llm = LLM(folder)
    outs = llm.generate(prompts[:3], [SamplingParams(max_tokens=n) for n in (1, 5, 9)])
    assert [out.token_ids for out in outs] == [expected[0][:1], expected[1][:5], expected[2][:9]]
    assert all(out.ttft > 0 for out in outs) and outs[0].tps == 0 < outs[1].tps
    with pytest.raises(ValueError, match="3 prompts and 1"):
        llm.generate(prompts[:3], [SamplingParams()])


def test_seed_gives_the_same_text_whatever_else_runs(lone):
    folder, prompts, _ = lone["llama"]
    hot = dict(temperature=1.5, max_tokens=NEW)
    alone = LLM(folder).generate([prompts[4]], SamplingParams(seed=11, **hot))[0].token_ids
    llm = LLM(folder, block_size=4, num_blocks=30, max_batched_tokens=17)
    crowd = llm.generate([prompts[i] for i in (2, 4, 5, 4, 7)],
                         [SamplingParams(seed=s, **hot) for s in (None, 11, 3, 12, None)])
    assert crowd[1].token_ids == alone != crowd[3].token_ids


# --- text

@settings(max_examples=300)
@given(text=st.text(st.sampled_from("ab"), max_size=14), cuts=st.lists(st.integers(1, 4), max_size=14),
       stops=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=5), max_size=3))
def test_stop_strings_that_overlap_themselves_and_each_other(text, cuts, stops):
    """"aab" in "aaab", "ab" beside "aab": of two letters, so that nearly every stop string overlaps, in pieces of any size."""
    pieces, rest = [], text
    for cut in cuts:
        pieces, rest = pieces + [rest[:cut]], rest[cut:]
    pieces.append(rest)
    out = nanoserve.Output(0)
    request = nanoserve.Request([1], SamplingParams(stop=stops), 1 + len(pieces), out, 0, lambda i, last: pieces[i], 0.0)
    for i in range(len(pieces)):
        request.append(i, [], 1.0)
        so_far = "".join(pieces[:i + 1])
        if places := [so_far.find(stop) for stop in stops if stop in so_far]:
            assert (out.text, out.finish_reason) == (so_far[:min(places)], "stop")
            return
        if i + 1 < len(pieces):
            certain = next(k for k in range(len(so_far) + 1) if any(s.startswith(so_far[k:]) for s in stops) or k == len(so_far))
            assert out.text == so_far[:certain] and out.finish_reason is None
    assert (out.text, out.finish_reason) == (text, "length")


def test_text_that_is_held_back_is_shown_when_the_text_ends():
    out = nanoserve.Output(0)
    request = nanoserve.Request([1], SamplingParams(stop="abc"), 9, out, 0, lambda i, last: "xab", 0.0)
    request.append(5, [7], 1.0)
    assert out.text == "x"
    request.append(7, [7], 2.0)
    assert (out.text, out.finish_reason) == ("xab", "stop")


@pytest.mark.parametrize("how", ["abort", "error"])
def test_text_that_is_held_back_is_not_lost_when_the_request_is(how):
    llm, prompt = LLM(HERE / "demo/llama", dtype="float32"), "The cat sat"

    def third(token_ids, logits_V):
        if len(token_ids) == 2 and how == "error":
            raise RuntimeError("no third token")
        return logits_V
    params = SamplingParams(max_tokens=2)
    text = llm.generate(prompt, params)[0].text
    out = llm.requests[llm.add(prompt, SamplingParams(stop=text + "...", logits_processor=third))].output
    while len(out.token_ids) < 2:
        llm.step()
    assert out.text == ""
    llm.abort(out.id) if how == "abort" else llm.step()
    assert (out.text, out.finish_reason) == (text, how)


@settings(max_examples=150)
@given(text=WILD, stops=st.lists(st.text(st.sampled_from("the cas "), min_size=1, max_size=4), max_size=3))
def test_text_ends_before_a_stop_string_and_never_shows_part_of_one(tokenizers, text, stops):
    tokenizer = tokenizers["gpt2"][0]
    ids = tokenizer.encode(text) or [5]
    out = nanoserve.Output(0)
    request = nanoserve.Request([1], SamplingParams(stop=stops), 1 + len(ids), out, 0, tokenizer.decoder([]), 0.0)
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
