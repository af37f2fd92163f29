"""How we know that guesses change nothing but the time. (Read it beside speculate.py.)"""

import itertools
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batch
import kernels
import nanoserve
import speculate
from batch import Chunk
from nanoserve import LLM, SamplingParams
from reference import CONFIGS, GPT2, LLAMA, NEW, QWEN3_MOE, keeps_the_order_of_sums, repeat, tensors_of, write_checkpoint
from roofline import kv_bytes
from speculate import HOPE, MARGIN, DraftModel, NgramDrafter, Speculator, Times, about, at
from test_nanoserve import (BUSY, DEVICE, HERE, arrivals, assert_tokens_do_not_depend_on_company, check_steps, engine_options,
                            steps_that_may_fail)


class Key(SimpleNamespace):
    """Something in a request's place."""
    __hash__ = object.__hash__


class Prophet:
    """A drafter that knows how each text goes on, and guesses so with this probability; elsewhere it is wrong."""

    def __init__(self, texts: dict[tuple, list[int]], chance: float, seed: int = 0, vocabulary: int = 61):
        """texts: prompt -> the tokens that follow it, or a list of possible ones."""
        self.texts, self.chance, self.dice, self.V, self.seconds = texts, chance, random.Random(seed), vocabulary, Times()

    def offers(self, requests, rooms):
        return [self.dice.randint(0, max(0, room)) for room in rooms]

    def guess(self, requests, counts):
        return [self.of(request)[:count] for request, count in zip(requests, counts)]

    def of(self, request):
        prompt = request.output.prompt_tokens
        text = self.texts.get((tuple(request.tokens[:prompt]), request.key), self.texts.get(tuple(request.tokens[:prompt]), []))
        come = text[len(request.tokens) - prompt:]
        return [token if self.dice.random() < self.chance else (token + 1) % self.V for token in come]

    def keep(self):
        pass


class Tired(Speculator):
    """It rests when it likes to."""
    rest = property(lambda self: self.dice.randint(0, 1), lambda self, steps: None)
    dice = random.Random(0)


def take_all(llm):
    """Every draft that is offered is tried, whether it pays or not."""
    llm.speculator.worthwhile = lambda requests, offers, rows: list(offers)


def expect_all_right(llm):
    """A draft model that is the model itself is always right, unless its keys and values are not in order."""
    learn = llm.speculator.learn

    def checked(accepted):
        assert {r: len(drafts) for r, drafts in llm.speculator.drafts.items()} == {r: n for r, n in accepted.items() if n}
        learn(accepted)
    llm.speculator.learn = checked


def speculate_with(kind, most, seed, forced):
    """Options for LLM, and what to do to it before it begins."""
    def prepare(llm, prompts, expected):
        llm.speculator.most = most
        if isinstance(kind, float):
            texts = {tuple(p): tokens for p, tokens in zip(prompts, expected)}
            llm.speculator.drafter = Prophet(texts, kind, seed)
        if forced:
            take_all(llm)
        else:
            llm.speculator.__class__, llm.speculator.dice = Tired, random.Random(seed)
        if kind == "itself":
            expect_all_right(llm)
    return prepare


drafters = st.sampled_from([0.0, 0.5, 0.8, 1.0, "ngram", "itself", "gpt2", "llama"])


# ---------------------------------------------------------------------------------------------
# What always holds, once more

@settings(max_examples=250)
@given(config=st.sampled_from(list(CONFIGS)), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans(), kind=drafters, most=st.integers(1, 9), seed=st.integers(0, 99), forced=st.booleans())
def test_tokens_do_not_depend_on_drafts_nor_on_who_drafted_them(lone, config, options, spare, arrivals, hopeful, kind,
                                                                 most, seed, forced):
    """Whatever else goes on: arrivals, tiny pools, preemption, prefix hits, samples, aborts, chunks, 8 bits."""
    assert_drafts_change_nothing(lone, config, "torch", options, spare, arrivals, hopeful, kind, most, seed, forced)


def assert_drafts_change_nothing(lone, config, backend, options, spare, arrivals, hopeful, kind, most, seed, forced):
    folder = lone[{"itself": config}.get(kind, kind)][0] if kind in ("itself", "gpt2", "llama") else "ngram"
    assert_tokens_do_not_depend_on_company(lone, config, backend, options | dict(speculative_model=folder), spare, arrivals,
                                           hopeful, speculate_with(kind, most, seed, forced))


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
@settings(max_examples=1 if DEVICE == "cpu" else 30)
@example(config="llama", **BUSY, kind=0.8, most=4, seed=1, graphs=True)
@given(config=st.sampled_from(list(CONFIGS)), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans(), kind=drafters, most=st.integers(1, 9), seed=st.integers(0, 99), graphs=st.booleans())
def test_nor_do_they_with_triton_and_graphs(lone, monkeypatch, config, options, spare, arrivals, hopeful, kind, most,
                                            seed, graphs):
    """Without a GPU, a stand-in for the graph repeats the step on the batch that stays."""
    if DEVICE == "cpu":
        monkeypatch.setattr(batch, "record", repeat)
    options = options | dict(max_batched_tokens=options["max_batched_tokens"] + 20, cuda_graphs=graphs)
    assert_drafts_change_nothing(lone, config, "triton", options, spare, arrivals[:4], hopeful, kind, most, seed, True)


@settings(max_examples=40)
@given(fail_at=st.sets(st.integers(0, 40), min_size=1, max_size=8), where=st.sampled_from(["before", "after", "draft"]),
       budget=st.integers(3, 80), prefix_cache=st.booleans(), hot=st.booleans(), kind=st.sampled_from(["itself", "gpt2"]))
def test_failed_steps_and_failed_drafts_change_nobodys_tokens(lone, fail_at, where, budget, prefix_cache, hot, kind):
    folder, prompts, _ = lone["llama"]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=float(hot), seed=3, n=2)
    llm = LLM(folder, block_size=4, num_blocks=60, max_batched_tokens=budget, max_seqs=6, prefix_cache=prefix_cache,
              speculative_model=folder if kind == "itself" else lone["gpt2"][0])
    take_all(llm)
    if kind == "itself":
        expect_all_right(llm)
    check_steps(llm)
    run, draft, step = llm._logits, llm.speculator.drafter.runner, 0

    def breaks(inner, here):
        def call(chunks):
            if step in fail_at and here and where == "before":
                raise KeyboardInterrupt
            logits = inner(chunks)
            if step in fail_at and here != (where == "draft"):
                raise RuntimeError("out of memory")
            return logits
        return call
    llm._logits, llm.speculator.drafter.runner = breaks(run, True), breaks(draft, False)
    for step in steps_that_may_fail(llm, [prompts[i] for i in (7, 6, 4, 3)], params, LLM(folder)):
        pass


STARTS = ["The cat sat", "Once upon a time, there was a boy named Tom.", "The dog and the cat. The dog and the", "One day"]
requests = st.lists(st.fixed_dictionaries(dict(
    prompt=st.sampled_from(STARTS), max_tokens=st.integers(1, 40), temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 0, 5, 40]), top_p=st.sampled_from([1.0, 1.0, 0.9]), seed=st.integers(0, 50),
    stop=st.sampled_from([(), (), (".",), ("the cat", "Tom was"), (" happy",)]), n=st.sampled_from([1, 1, 1, 3]),
    logprobs=st.sampled_from([None, None, 0, 3]), processed=st.sampled_from([False, False, False, True]))),
    min_size=1, max_size=4)


@pytest.fixture(scope="module")
def demo():
    """The lone run of demo/llama, and engines for it that speculate."""
    llm = LLM(HERE / "demo/llama", dtype="float32")
    options = dict(dtype="float32", weights=llm.model.weights, block_size=4, num_speculative_tokens=6)
    return llm, {name: LLM(HERE / "demo/llama", speculative_model=drafter, **options)
                 for name, drafter in (("ngram", "ngram"), ("gpt2", HERE / "demo/gpt2"), ("prophet", "ngram"))}


@settings(max_examples=40)
@given(asked=requests, drafter=st.sampled_from(["ngram", "gpt2", "prophet"]), chance=st.sampled_from([0.5, 1.0]),
       eos=st.sampled_from([None, "common", "common", "late"]))
def test_text_equals_the_lone_run_with_every_parameter(demo, asked, drafter, chance, eos):
    """Temperature, top-k, top-p, stop strings, eos and max_tokens in the middle of a draft, samples, log-probabilities."""
    lone, engines = demo
    llm, seen = engines[drafter], []
    own_eos, prompts = lone.config.eos, [a["prompt"] for a in asked]

    def processor(token_ids, logits_V):
        seen.append(len(token_ids))
        return logits_V.index_fill(0, torch.tensor(len(token_ids) % 7 + 97), 20.0)
    params = [SamplingParams(**{k: v for k, v in a.items() if k not in ("prompt", "processed")},
                             logits_processor=processor if a["processed"] else None) for a in asked]
    try:
        if eos:   # a token that comes often, or one that the first text has
            free = lone.generate(prompts[:1], SamplingParams(max_tokens=30))[0].token_ids
            lone.config.eos = llm.config.eos = [max(free, key=free.count) if eos == "common" else free[-1]]
        expected = lone.generate(prompts, params)
        if drafter == "prophet":
            texts = {}
            llm.speculator.drafter = Prophet(texts, chance, seed=len(asked), vocabulary=1024)
            for a in asked:
                ids, longer = llm.tokenizer.encode(a["prompt"]), a | dict(max_tokens=60, stop=(), logprobs=None)
                (out,) = lone.generate([a["prompt"]], SamplingParams(ignore_eos=True, **{
                    k: v for k, v in longer.items() if k not in ("prompt", "processed")}))
                texts |= {(tuple(ids), nanoserve.noise_key(a["seed"], i)): s.token_ids for i, s in enumerate(out.samples)}
        take_all(llm)
        seen.clear()
        found = llm.generate(prompts, params)
    finally:
        lone.config.eos = llm.config.eos = own_eos
    for a, out, want in zip(asked, found, expected):
        for sample, other in zip(out.samples, want.samples, strict=True):
            assert (sample.token_ids, sample.text, sample.finish_reason, sample.error) == (
                other.token_ids, other.text, other.finish_reason, other.error)
            assert not (a["processed"] and sample.drafted_tokens)
            assert len(sample.token_ids) > sample.accepted_tokens or not sample.accepted_tokens
            assert (sample.logprobs is None) == (other.logprobs is None)
            for x, y in zip(sample.logprobs or [], other.logprobs or [], strict=True):
                assert list(x)[0] == list(y)[0] and x.keys() == y.keys()
                assert all(abs(x[i] - y[i]) < 1e-3 for i in x)
    assert llm.pool.num_referenced == 0 and not llm.requests
    lengths = [list(range(len(s.token_ids))) for a, o in zip(asked, found) if a["processed"] for s in o.samples]
    assert sorted(seen) == sorted(itertools.chain(*lengths)), "a logits_processor sees one token after the other"


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["dense", "experts"])
def test_an_int8_model_writes_the_same_in_any_company_and_with_drafts(tmp_path, config):
    """A sum that differs in its last bit becomes another whole number now and then, and 1 of 127 is a lot: without
    `Batch.exact` one text in four is another one."""
    config = config | dict(hidden_size=256, intermediate_size=700, num_hidden_layers=5, num_attention_heads=8,
                           num_key_value_heads=4, num_experts=4, vocab_size=2000, max_position_embeddings=256)
    options = dict(quantization="int8", prefix_cache=False, max_batched_tokens=1024)
    llm = LLM(write_checkpoint(tmp_path, config, tensors_of(config)), "cpu", "float32", "torch", **options)
    assert llm.model.weights["out"][0].weight.dtype == torch.int8
    dice, params = random.Random(1), SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0)
    prompts = [dice.choices(range(2000), k=n) for n in range(3, 51, 3)]
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    drafting = LLM(tmp_path, "cpu", "float32", "torch", weights=llm.model.weights, speculative_model="ngram", **options)
    drafting.speculator.drafter = Prophet({tuple(prompt): out.token_ids for prompt, out in zip(prompts, alone)}, 0.8)
    take_all(drafting)
    for others in llm.generate(prompts, params), drafting.generate(prompts, params):
        differ = [one.token_ids != other.token_ids or any(before != pytest.approx(after, abs=1e-5)
                                                          for before, after in zip(one.logprobs, other.logprobs))
                  for one, other in zip(alone, others)]
        assert sum(differ) <= len(prompts) * (not keeps_the_order_of_sums())
    assert sum(out.accepted_tokens for out in others) > 20 < sum(out.drafted_tokens - out.accepted_tokens for out in others)


# ---------------------------------------------------------------------------------------------
# How many steps it takes

@pytest.mark.parametrize("drafter", ["itself", "prophet", "wrong"])
@pytest.mark.parametrize("most", [1, 2, 4, 7])
def test_right_drafts_save_their_steps_and_wrong_ones_save_none(lone, drafter, most):
    """A step gives a token and one for each draft that is right; the last step has room for fewer."""
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, speculative_model=folder if drafter == "itself" else "ngram", num_speculative_tokens=most)
    take_all(llm)
    if drafter != "itself":
        llm.speculator.drafter = Prophet({tuple(prompts[4]): expected[4]}, float(drafter == "prophet"))
        llm.speculator.drafter.offers = lambda requests, rooms: rooms
    steps = check_steps(llm)
    (out,) = llm.generate([prompts[4]], SamplingParams(max_tokens=NEW, ignore_eos=True))
    decodes = NEW - 1 if drafter == "wrong" else math.ceil((NEW - 1) / (1 + most))
    assert out.token_ids == expected[4] and llm.stats()["steps"] == 1 + decodes == len(steps)
    assert out.accepted_tokens == llm.stats()["accepted_tokens"] == NEW - 1 - decodes
    rows, left = [], NEW - 1
    while left:   # no more drafts than there is room for, as the last token is never run
        rows.append(min(1 + most, left))
        left -= 1 if drafter == "wrong" else rows[-1]
    assert steps == [len(prompts[4])] + rows
    assert out.drafted_tokens == sum(rows) - len(rows) and out.computed_tokens == sum(steps)


def test_what_was_accepted_is_found_by_the_next_turn(lone):
    folder, prompts, expected = lone["llama"]
    for kind in (1.0, 0.5, 0.0):
        llm = LLM(folder, block_size=4, speculative_model="ngram", num_speculative_tokens=5)
        speculate_with(kind, 5, 1, True)(llm, prompts, expected)
        llm.speculator.drafter.offers = lambda requests, rooms: rooms
        check_steps(llm)
        (first,) = llm.generate([prompts[3]], SamplingParams(max_tokens=NEW, ignore_eos=True))
        turn = prompts[3] + first.token_ids + [5, 6, 7]
        (second,) = llm.generate([turn], SamplingParams(max_tokens=3))
        assert second.reused_tokens == (23 + NEW - 1) // 4 * 4, "full blocks of all but the last token, which was not run"
        assert second.token_ids == LLM(folder).generate([turn], SamplingParams(max_tokens=3))[0].token_ids


def test_a_draft_model_finds_its_prefixes_and_catches_up(lone):
    """What it runs: a prompt once, of a second request with the same beginning only the rest, of samples each block once."""
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, block_size=8, speculative_model=folder, num_speculative_tokens=3)
    take_all(llm)
    expect_all_right(llm)
    check_steps(llm)
    passes, runner = [], llm.speculator.drafter.runner
    llm.speculator.drafter.runner = lambda chunks: passes.append([len(chunk.tokens) for chunk in chunks]) or runner(chunks)
    llm.generate([prompts[7]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert passes == [[60], [1], [1]], "59 of the prompt and a token of the answer; three drafts"
    passes.clear()
    (out,) = llm.generate([prompts[6]], SamplingParams(max_tokens=9, ignore_eos=True))
    assert out.token_ids == expected[6][:9]
    assert passes == [[4], [1], [1], [2], [1], [1]], "48 of 51 are there; then a draft and the token after it are new"
    passes.clear()
    llm.speculator.worthwhile = lambda requests, offers, rows: [0] * len(offers)
    llm.add(prompts[4], SamplingParams(max_tokens=NEW, ignore_eos=True, n=3))
    for _ in range(4):
        llm.step()
    assert not passes, "without drafts it runs nothing"
    take_all(llm)
    while llm.requests:
        llm.step()
    assert passes[0] == [53] and sorted(passes[3]) == [1 + 2 + 4, 9, 9] or passes
    assert sum(map(sum, passes)) < 3 * (50 + NEW), "48 tokens in 6 full blocks are run for one of the three"


def test_a_draft_model_reads_long_prompts_in_chunks_of_the_budget(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, max_batched_tokens=16, speculative_model=folder)
    take_all(llm)
    expect_all_right(llm)
    check_steps(llm)   # which holds the draft's passes to the budget, too
    outs = llm.generate([prompts[7], prompts[2]], SamplingParams(max_tokens=NEW, ignore_eos=True))
    assert [out.token_ids for out in outs] == [expected[7], expected[2]]
    assert llm.stats()["accepted_tokens"] == llm.stats()["drafted_tokens"] > 0


def test_a_draft_model_with_a_shorter_context_stops_where_it_ends(lone, tmp_path):
    folder, prompts, expected = lone["llama"]
    short = GPT2 | dict(n_positions=64)
    write_checkpoint(tmp_path, short, tensors_of(short))
    llm = LLM(folder, speculative_model=tmp_path, num_speculative_tokens=4)
    take_all(llm)
    starts = []
    guess = llm.speculator.drafter.guess
    llm.speculator.drafter.guess = lambda requests, counts: starts.append(
        [len(r.tokens) + n for r, n in zip(requests, counts) if n]) or guess(requests, counts)
    outs = llm.generate([prompts[7], prompts[1]], SamplingParams(max_tokens=NEW, ignore_eos=True))
    assert [out.token_ids for out in outs] == [expected[7], expected[1]]
    assert max(max(ends, default=0) for ends in starts) == 64 and len(prompts[7]) + NEW > 64


def test_a_prompt_with_a_logits_processor_has_no_drafts_and_its_neighbours_have(lone):
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, speculative_model=folder)
    take_all(llm)
    outs = llm.generate([prompts[4], prompts[3]], [
        SamplingParams(max_tokens=NEW, ignore_eos=True, logits_processor=f) for f in (lambda ids, x: x, None)])
    assert [out.token_ids for out in outs] == [expected[4], expected[3]]
    assert outs[0].drafted_tokens == 0 < outs[1].accepted_tokens


def test_watchers_see_the_tokens_that_count(lone):
    folder, prompts, expected = lone["llama"]
    llm, seen = LLM(folder, speculative_model="ngram"), {}
    speculate_with(0.5, 4, 2, True)(llm, prompts, expected)

    def watch(plan, takers, tokens, logits_BV):
        assert len(takers) == len(tokens) == len(logits_BV)
        for request, token, logits_V in zip(takers, tokens, logits_BV):
            assert logits_V.argmax() == token
            seen.setdefault(request.output.id, []).append(token)
    llm.watchers.append(watch)
    outs = llm.generate([prompts[i] for i in (3, 4, 7)], SamplingParams(max_tokens=NEW, ignore_eos=True))
    assert [seen[out.id] for out in outs] == [out.token_ids for out in outs] == [expected[i] for i in (3, 4, 7)]


# ---------------------------------------------------------------------------------------------
# Drafts from the text

@settings(max_examples=300)
@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), room=st.integers(0, 9), cuts=st.lists(st.integers(1, 9)))
def test_ngrams_propose_what_followed_the_last_occurrence_of_the_longest(tokens, room, cuts):
    request, drafter, found = Key(tokens=[]), NgramDrafter(), None
    rest = list(tokens)
    for cut in [*cuts, len(tokens)]:   # the text grows in pieces
        if rest:
            request.tokens = request.tokens + rest[:cut]
            rest = rest[cut:]
            assert drafter.offers([request], [room]) == [len(drafter.found[0])]
            (found,) = drafter.guess([request], [room])
    text, expected = list(tokens), []
    for n in (4, 3, 2):
        places = [i for i in range(n, len(text)) if text[i - n:i] == text[-n:]]
        if places:
            for i in range(room):   # what is guessed counts as text
                expected.append((text + expected)[places[-1] + i])
            break
    assert found == expected


def test_a_text_that_repeats_itself_is_guessed_and_one_that_does_not_costs_no_step(demo):
    lone, engines = demo
    llm = engines["ngram"]
    take_all(llm)
    (out,) = llm.generate([STARTS[1]], SamplingParams(max_tokens=100))
    assert out.accepted_tokens > 10 and out.token_ids == lone.generate([STARTS[1]], SamplingParams(max_tokens=100))[0].token_ids
    before = llm.steps
    (out,) = llm.generate([list(range(200))], SamplingParams(max_tokens=3))
    assert out.drafted_tokens == 0 and llm.steps - before == 3, "of 200 different tokens none came twice"


# ---------------------------------------------------------------------------------------------
# When it pays

def simulate(rule, chance, step_seconds, pass_seconds, B, steps, seed=0, noise=0.1):
    """Speed of the rule on a machine of these times, in parts of the speed without drafts, and that of the best fixed
    number of drafts. Measured times are noisy, and one in a hundred is ten times too long."""
    dice, crowd, seconds, tokens = random.Random(seed), [Key() for _ in range(B)], 0.0, 0
    noisy = lambda x: x * (1 + abs(dice.gauss(0, noise))) * (10 if dice.random() < 0.1 * noise else 1)
    for _ in range(steps):
        counts = rule.worthwhile(crowd, [rule.most] * B, B)
        rule.decodes, rule.offered, rule.drafts = B, crowd, {r: [0] * n for r, n in zip(crowd, counts) if n}
        for _ in range(max(counts)):
            rule.drafter.seconds.add(B, noisy(pass_seconds))
        accepted = {r: next((i for i in range(n) if dice.random() >= chance), n) for r, n in zip(crowd, counts)}
        rows = B + sum(counts)
        rule.pay(rows, noisy(step_seconds(rows)), sum(accepted.values()))
        seconds += step_seconds(rows) + max(counts) * pass_seconds
        tokens += B + sum(accepted.values())
        rule.learn(accepted)
    plain = B / step_seconds(B)
    fixed = [B * sum(chance ** i for i in range(n + 1)) / (step_seconds(B * (1 + n)) + n * pass_seconds) for n in range(rule.most + 1)]
    return tokens / seconds / plain, max(fixed) / plain


def new_rule(most: int) -> Speculator:
    return Speculator(SimpleNamespace(seconds=Times(), keep=lambda: None), most)


machines = dict(slope=st.floats(0, 0.3), knee=st.integers(1, 64), pass_seconds=st.floats(0, 0.5), most=st.integers(1, 8),
                B=st.sampled_from([1, 2, 4, 16]), seed=st.integers(0, 999))


@settings(max_examples=40)
@given(chance=st.floats(0, 1), **machines)
def test_the_rule_is_never_slower_than_no_drafts_and_gains_most_of_what_there_is(chance, slope, knee, pass_seconds, most,
                                                                                B, seed):
    """On machines whose steps take as long for few tokens as for one, up to a knee, or longer from the second on."""
    found, best = simulate(new_rule(most), chance, lambda rows: 1 + slope * max(0, rows - knee), pass_seconds, B, 400, seed)
    assert found >= 0.95 and found >= 0.6 * best


@settings(max_examples=60)
@given(steps=st.integers(1, 60), easy=st.sampled_from([0, 0, 1, 3]), **machines)
def test_a_short_text_whose_drafts_are_never_right_pays_no_more_than_the_purse(steps, easy, slope, knee, pass_seconds, most, B,
                                                                            seed):
    """Neither the first one of an engine nor the first after easy ones, on a machine of which two times are enough. What is
    paid for before its time is known may be one step too many, twice: of the first two of a size."""
    rule, machine = new_rule(most), lambda rows: 1 + min(1.0, slope * max(0, rows - knee) / B)
    for text in range(easy):
        simulate(rule, 0.95, machine, pass_seconds, B, 30, seed + text, noise=0.0)
    found, _ = simulate(rule, 0.0, machine, pass_seconds, B, steps, seed, noise=0.0)
    dearest = 1 + most * pass_seconds
    assert (1 / found - 1) * steps <= speculate.SPARE * steps + dearest + 1e-9
    if steps >= 24 and B >= 4 and pass_seconds == 0 and slope <= 0.1:
        assert found >= 0.94
    if steps >= 40 and dearest <= 1.3:
        assert found >= 0.93 - 0.001 * (easy > 0)


def test_what_goes_into_the_purse_and_what_is_paid_from_it():
    """A step of 1 second without drafts, and of 1.5 with two drafts for each of two requests, of 0.05 each pass."""
    rule, crowd = new_rule(2), [Key(), Key()]
    rule.offered, rule.decodes = crowd[:1], 2   # who has no offer has a share in the step as well
    assert rule.purse == 0.25, "it begins full"
    rule.purse = 0.0
    for step in range(1, 14):
        rule.pay(2, 1.0, 0)
        assert rule.purse == pytest.approx(min(step, 10) * 0.025)
    assert rule.worthwhile(crowd, [2, 2], 2) == [1, 0], "nobody knows what a second one would cost"
    rule.drafts = {request: [0, 0] for request in crowd}
    for _ in range(3):
        rule.drafter.seconds.add(2, 0.05)
    for paid, seconds in ((1.1, 9.0), (0.6, 1.5), (0.6, 1.5), (0.6, 1.5)):   # of an unknown time, twice a known one at most
        rule.purse = 0.0
        rule.pay(6, seconds, 0)
        assert rule.purse == pytest.approx(0.025 - paid, abs=0.02)
    rule.purse = 0.0
    rule.pay(6, 1.5, 1)
    assert rule.purse == pytest.approx(0.025 - 0.6 + 0.5, abs=0.02), "a token that came for nothing is half a second"
    rule.pay(6, 1.5, 4)
    assert rule.purse == pytest.approx(0.25, abs=0.01), "and no more than a quarter of a step is kept for later"


def test_what_a_right_draft_saves_is_a_share_of_the_step_of_all_who_decode():
    """A fourth of it, if one of four had a draft."""
    rule = new_rule(1)
    for _ in range(3):
        rule.pay(4, 1.0, 0)
        rule.pay(5, 1.0, 0)
    rule.decodes, rule.offered = 4, [Key()]
    rule.drafts, rule.purse = {rule.offered[0]: [0]}, -1.0
    rule.pay(5, 1.0, 1)
    assert rule.purse == pytest.approx(-1.0 + speculate.SPARE + 0.25, abs=0.02)


def test_a_step_twice_as_large_as_any_is_not_taken_to_cost_nothing():
    """As steps of one and two tokens cost the same, four would seem to. A new request pays for the doubt."""
    for purse, counts in ((0.05, 1), (0.16, 2), (0.25, 3)):
        rule, request = new_rule(3), Key()
        for rows in (1, 2) * 3:
            rule.pay(rows, 1.0, 0)
        rule.purse, rule.chances[request] = purse, 0.9
        assert sum(rule.worthwhile([request], [3], 1)) == counts, purse


def test_a_verification_is_a_short_chunk_however_many_drafts_are_allowed(lone):
    folder, prompts, expected = lone["llama"]
    llm, longest = LLM(folder, speculative_model="ngram", num_speculative_tokens=40), []
    llm.speculator.drafter = Prophet({tuple(prompts[4]): expected[4] * 9}, 1.0)
    llm.speculator.drafter.offers = lambda requests, rooms: rooms
    take_all(llm)
    llm.watchers.append(lambda plan, *rest: longest.extend(len(chunk.tokens) for _, chunk in plan if chunk.logits > 1))
    (out,) = llm.generate([prompts[4]], SamplingParams(max_tokens=40, ignore_eos=True))
    assert out.token_ids[:NEW] == expected[4] and max(longest) == batch.SHORT


def test_a_full_purse_pays_for_a_first_draft_or_for_those_of_a_lone_request():
    """However dear: here each draft costs more than it holds. A purse that is not full pays for none of them."""
    for B, counts in ((1, [3]), (2, [1, 0])):
        rule, crowd = new_rule(3), [Key() for _ in range(B)]
        for n in (0, 1, 2, 3, 8) * 3:
            rule.pay(B + n, 1.0 + 0.3 * n, 0)
        rule.chances.update(dict.fromkeys(crowd, 0.99))
        for purse, expected in ((speculate.PURSE, counts), (0.9 * speculate.PURSE, [0] * B)):
            rule.purse = purse
            assert rule.worthwhile(crowd, [3] * B, B) == expected


def test_a_dear_number_of_drafts_does_not_hide_a_cheap_one_behind_it():
    """Five rows may take less time than two: the products of a CPU do."""
    rule, request = new_rule(4), Key()
    for rows, seconds in ((1, 1.0), (2, 1.3), (3, 1.3), (4, 1.3), (5, 1.02), (6, 1.05)) * 3:
        rule.pay(rows, seconds, 0)
    rule.purse, rule.chances[request] = 0.1, 0.95
    assert rule.worthwhile([request], [4], 1) == [4]


def test_what_has_been_shown_is_not_paid_for():
    """Two requests alike in what is hoped of them; the drafts of one were right ten times. A draft costs a third of what it
    brings if it is right."""
    rule, crowd = new_rule(1), [Key(), Key()]
    for rows, seconds in ((2, 1.0), (3, 1.17), (4, 1.34)) * 3:
        rule.pay(rows, seconds, 0)
    rule.offered, rule.drafts = crowd, {crowd[0]: [0]}
    for _ in range(10):
        rule.learn({crowd[0]: 1})
    assert rule.shown[crowd[0]] == pytest.approx(1 - 0.9 ** 10) and rule.shown[crowd[1]] == 0.0
    rule.chances.update(dict.fromkeys(crowd, 0.9))
    for purse, counts in ((-0.5, [0, 0]), (-0.1, [1, 0]), (0.05, [1, 1])):
        rule.purse = purse
        rule.chances[crowd[0]] = 0.91   # so that it comes first
        assert rule.worthwhile(crowd, [1, 1], 2) == counts, purse
    rule.shown.clear()
    rule.purse = 0.1
    assert rule.worthwhile(crowd, [1, 1], 2) == [0, 0]


@settings(max_examples=150)
@given(data=st.data(), B=st.integers(1, 3), prompt=st.integers(0, 20))
def test_the_rule_takes_the_fastest_of_all_choices(data, B, prompt):
    """With a step of known cost and drafts that cost nothing themselves, against every choice there is."""
    offers = data.draw(st.lists(st.integers(0, 3), min_size=B, max_size=B))
    chances = data.draw(st.lists(st.one_of(st.just(0.0), st.floats(0.35, 1)), min_size=B, max_size=B))
    slope, rows = data.draw(st.floats(0.01, 1.0)), B + prompt
    rule, crowd = new_rule(3), [Key() for _ in range(B)]
    rule.purse = math.inf
    rule.chances.update(zip(crowd, chances))
    cost = lambda n: 1 + slope * n
    for n in (1, 2, 64):
        for _ in range(3):
            rule.seconds.add(n, cost(n))
    for n in (1, 2, 64):   # nothing has faded
        rule.seconds.typical[n] = cost(n), rule.seconds.steps

    def speed(counts):
        tokens = sum(sum(chance ** i for i in range(n + 1)) for chance, n in zip(chances, counts))
        return tokens / (cost(B) + cost(rows + sum(counts)) - cost(rows))
    counts = rule.worthwhile(crowd, offers, rows)
    assert all(n <= offer for n, offer in zip(counts, offers))
    best = max(map(speed, itertools.product(*(range(offer + 1) for offer in offers))))
    assert speed(counts) == pytest.approx(best if best >= MARGIN * speed([0] * B) else speed([0] * B), rel=1e-9)


def test_a_pass_of_the_draft_model_counts():
    """A draft that is right 8 times in 10 and verified for nothing: a second one is worth a pass that costs half of a step, and
    none is worth one that costs a whole step."""
    for pass_seconds, wanted in ((0.0, 3), (0.05, 3), (0.5, 2), (0.6, 1), (0.7, 0), (1.0, 0)):
        rule, request = new_rule(3), Key()
        rule.chances[request] = 0.8
        for _ in range(3):
            rule.seconds.add(1, 1.0)
            rule.seconds.add(4, 1.0)
            rule.drafter.seconds.add(1, pass_seconds)
        assert rule.worthwhile([request], [3], 1) == [wanted], pass_seconds


def test_chances_follow_what_was_accepted_and_hope_grows_where_nothing_is_tried():
    rule, request = Speculator(SimpleNamespace(keep=lambda: None), 4), Key()
    rule.chances[request] = 0.5
    rule.offered, rule.drafts = [request], {request: [1, 2, 3]}
    rule.learn({request: 2})    # right, right, wrong; the third was not right
    after = ((0.5 * 0.9 + 0.1) * 0.9 + 0.1) * 0.9
    assert rule.chances[request] == pytest.approx(after)
    rule.learn({request: 3})
    assert rule.chances[request] == pytest.approx(1 - (1 - after) * 0.9 ** 3)
    before, rule.drafts = rule.chances[request], {}
    rule.learn({})
    assert rule.chances[request] == pytest.approx(before + HOPE)
    rule.offered = []
    rule.learn({})
    assert rule.chances[request] == pytest.approx(before + HOPE), "who had no offer learns nothing"


@settings(max_examples=30)
@given(B=st.integers(1, 20), looking=st.sampled_from([0.0, 0.003, 0.01, 0.06, 0.5, 3.0]), offered=st.booleans())
def test_looking_for_drafts_that_are_not_there_takes_a_percent_of_the_time(B, looking, offered):
    """looking: how long it takes, in steps. Time stands still but for that."""
    now, looks = [0.0], []

    def offers(requests, rooms):
        now[0] += looking
        looks.append(len(requests))
        return [4 * offered] * len(requests)
    rule = Speculator(SimpleNamespace(offers=offers, keep=lambda: None, seconds=Times()), 4)
    for _ in range(3):
        rule.seconds.add(B, 1.0)
        rule.drafter.seconds.add(B, 1e9)   # so that no draft ever pays
    params = SimpleNamespace(logits_processor=None)
    requests = [Key(params=params, max_length=99, tokens=[1, 2], siblings=[None]) for _ in range(B)]
    rule.chances.update(dict.fromkeys(requests, 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate.time, "perf_counter", lambda: now[0])
        patch.setattr(speculate, "THINKING", 0.01)
        for _ in range(1000):
            plan = [(request, Chunk([2], 1, [0])) for request in requests]
            rule.draft(plan, SimpleNamespace(max_batched_tokens=99))
            assert not rule.drafts and all(chunk.tokens == [2] for _, chunk in plan)
            rule.learn({})
    assert set(looks) == {B} and looking * (len(looks) - 1) <= 0.01 * 1000
    assert len(looks) >= min(1000, 0.01 * 1000 / max(looking, 1e-9) * 0.5), "and no less often than it may"
    hope = HOPE * 1000 if offered else 0.0
    assert all(rule.chances[request] == pytest.approx(hope, rel=0.4) for request in requests), "resting gives hope, too"


def test_measured_times():
    times = Times()
    assert times.curve() == [] and at([], 5) == 0.0
    for seconds in (99.0, 2.0, 7.0, 3.0, 2.5, 2.0, 2.0):   # the first does not count, nor do outliers
        times.add(10, seconds)
    ((size, seconds),) = times.curve()
    assert size == 10 and seconds == pytest.approx(2.0, rel=0.01)
    assert at([(10, 2.0)], 10) == at([(10, 2.0)], 99) == 2.0 and at([(10, 2.0)], 8) == 1.6 and at([(10, 2.0)], 1) == 1.0
    line = [(2, 1.0), (6, 3.0), (10, 4.0)]
    assert [at(line, rows) for rows in (1, 2, 4, 6, 8, 10, 14)] == [0.5, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0]
    assert at([(2, 4.0), (6, 3.0)], 10) == 3.0, "more tokens never take less"
    before = dict(times.curve())[10]
    for _ in range(100):
        times.add(20, 1.0)
    assert dict(times.curve())[10] == pytest.approx(before * 0.999 ** 100)
    assert [about(n) for n in (1, 9, 15, 16, 17, 18, 19, 33, 100)] == [1, 9, 15, 16, 16, 18, 18, 32, 96]


# ---------------------------------------------------------------------------------------------
# What fits, and what is refused

def test_the_pool_counts_the_drafts_keys_and_values(lone, monkeypatch):
    monkeypatch.setattr("model.memory_for_pool", lambda device: (10 ** 6, 10 ** 5))
    for kv in ("auto", "int8"):
        llm = LLM(lone["llama"][0], dtype="float32", kv_cache_dtype=kv, block_size=8, speculative_model=lone["gpt2"][0])
        draft = llm.speculator.drafter.runner.model.config
        each = 8 * (kv_bytes(llm.config, 4, kv) + kv_bytes(draft, 4, kv))
        assert llm.pool.num_blocks == 10 ** 5 // each
        assert sum(m.nbytes for m in llm.pool.memory + llm.pool.draft.memory) == llm.pool.num_blocks * each
        with pytest.raises(ValueError, match=f"at most {10 ** 6 // each} blocks fit"):
            LLM(lone["llama"][0], dtype="float32", kv_cache_dtype=kv, block_size=8, speculative_model=lone["gpt2"][0],
                num_blocks=200000)


def test_a_draft_model_that_does_not_fit_is_refused_by_name(lone, tmp_path):
    folder = lone["llama"][0]
    larger = LLAMA | dict(vocab_size=77)
    write_checkpoint(tmp_path / "larger", larger, tensors_of(larger))
    with pytest.raises(ValueError, match="larger: its vocabulary has 77 tokens and the model's has 61: take a draft model"):
        LLM(folder, speculative_model=tmp_path / "larger")
    with pytest.raises(ValueError, match="^speculative_model 'nowhere' does not exist: use ngram, or the folder"):
        LLM(folder, speculative_model="nowhere")
    for number in (0, -1, 1.5, True, "4"):
        with pytest.raises(ValueError, match=f"^num_speculative_tokens is {number}: it must be a whole number from 1"):
            LLM(folder, speculative_model="ngram", num_speculative_tokens=number)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^speculative_model .*empty: .* has no config\.json"):
        LLM(folder, speculative_model=tmp_path / "empty")

    shutil.copytree(HERE / "demo/gpt2", tmp_path / "other words")
    words = json.loads((tmp_path / "other words/vocab.json").read_text())
    words = dict(zip(words, [*list(words.values())[:500], *reversed(list(words.values())[500:])]))
    (tmp_path / "other words/vocab.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="other words: its vocabulary has other words than the model's: take a draft"):
        LLM(HERE / "demo/llama", speculative_model=tmp_path / "other words")


def test_a_draft_model_runs_in_the_types_of_the_model(lone):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, dtype="float32", quantization="int8", kv_cache_dtype="int8", speculative_model=lone["gpt2"][0])
    model = llm.speculator.drafter.runner.model
    assert model.weights["down"][0].scale is not None and llm.pool.draft.memory[0].dtype == torch.int8
    assert isinstance(llm.speculator.drafter, DraftModel) and LLM(folder).speculator is None
