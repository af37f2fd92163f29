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
from speculate import HOPE, MARGIN, Chances, Drafter, DraftModel, NgramDrafter, Speculator, Times, about, at
from test_nanoserve import (BUSY, DEVICE, HERE, arrivals, assert_tokens_do_not_depend_on_company, check_steps, engine_options,
                            steps_that_may_fail)


class Key(SimpleNamespace):
    """Something in a request's place, which may go on for long."""
    tokens, max_length = [], 10 ** 6
    __hash__ = object.__hash__


class Prophet(Drafter):
    """A drafter that knows how each text goes on, and guesses so with this probability; elsewhere it is wrong."""

    def __init__(self, texts: dict[tuple, list[int]], chance: float, seed: int = 0, vocabulary: int = 61):
        """texts: prompt -> the tokens that follow it, or a list of possible ones."""
        super().__init__()
        self.texts, self.chance, self.dice, self.V = texts, chance, random.Random(seed), vocabulary

    def offers(self, requests, rooms):
        return [self.dice.randint(0, max(0, room)) for room in rooms]

    def guess(self, requests, counts):
        return [self.of(request)[:count] for request, count in zip(requests, counts)]

    def of(self, request):
        prompt = request.output.prompt_tokens
        text = self.texts.get((tuple(request.tokens[:prompt]), request.key), self.texts.get(tuple(request.tokens[:prompt]), []))
        come = text[len(request.tokens) - prompt:]
        return [token if self.dice.random() < self.chance else (token + 1) % self.V for token in come]


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
    assert passes[:4] == [[38], [1], [1], [2, 7, 7]], "32 tokens in 4 full blocks are run for one of the three"


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
    for step in range(steps):
        rule.left, rule.decodes, rule.offered, rule.guessing = steps - step, B, crowd, 0.0
        counts = rule.worthwhile(crowd, [rule.most] * B, B)
        rule.drafts, rule.deepest = {r: [0] * n for r, n in zip(crowd, counts) if n}, max(counts)
        for _ in range(max(counts)):
            taken = noisy(pass_seconds)
            rule.guessing += taken
            rule.drafter.seconds.add(B, taken)
        accepted = {r: next((i for i in range(n) if dice.random() >= chance), n) for r, n in zip(crowd, counts)}
        rows = B + sum(counts)
        rule.guessing += 1e-9 * any(counts)
        rule.account(rows, noisy(step_seconds(rows)), sum(accepted.values()))
        seconds += step_seconds(rows) + max(counts) * pass_seconds
        tokens += B + sum(accepted.values())
        rule.learn(accepted)
    plain = B / step_seconds(B)
    fixed = [B * sum(chance ** i for i in range(n + 1)) / (step_seconds(B * (1 + n)) + n * pass_seconds) for n in range(rule.most + 1)]
    return tokens / seconds / plain, max(fixed) / plain


def new_rule(most: int, step_seconds=None, pass_seconds=0.0, chances=None) -> Speculator:
    """One that has measured a machine, unless it is left out. chances: what may be hoped of requests, with nothing shown."""
    rule = Speculator(Drafter(), most)
    for rows in 4 * (1, 2, 1 + most, 32) if step_seconds else ():
        rule.seconds.add(rows, step_seconds(rows))
        rule.drafter.seconds.add(min(rows, 4), pass_seconds)
    if chances is not None:
        rule.chances.of = lambda requests: [(chances[request], 0.0) for request in requests]
    return rule


machines = dict(slope=st.floats(0, 0.3), knee=st.integers(1, 32), pass_seconds=st.floats(0, 0.5), most=st.integers(1, 8),
                B=st.sampled_from([1, 2, 4, 16]), seed=st.integers(0, 999))


@settings(max_examples=40)
@given(chance=st.floats(0, 1), measured=st.booleans(), **machines)
def test_the_rule_is_never_slower_than_no_drafts_and_gains_most_of_what_there_is(chance, measured, slope, knee, pass_seconds,
                                                                                most, B, seed):
    """On machines whose steps take as long for few tokens as for one, up to a knee, or longer from the second on."""
    machine = lambda rows: 1 + slope * max(0, rows - knee)
    rule = new_rule(most, machine if measured else None, pass_seconds)
    found, best = simulate(rule, chance, machine, pass_seconds, B, 400, seed)
    assert found >= 0.95 and found >= 0.6 * best


@settings(max_examples=100)
@given(steps=st.integers(1, 60), easy=st.sampled_from([0, 0, 1, 3]), **machines)
def test_a_short_text_whose_drafts_are_never_right_pays_no_more_than_the_purse(steps, easy, slope, knee, pass_seconds, most, B,
                                                                            seed):
    """Neither the first one of an engine nor the first after easy ones. A knee between the measured sizes is a surprise, and
    costs half a step more."""
    machine = lambda rows: 1 + slope * max(0, rows - knee)
    rule = new_rule(most, machine, pass_seconds)
    for text in range(easy):
        simulate(rule, 0.95, machine, pass_seconds, B, 30, seed + text, noise=0.0)
    found, _ = simulate(rule, 0.0, machine, pass_seconds, B, steps, seed, noise=0.0)
    surprise = 0.5 * (1 + most < knee < 32)
    assert (1 / found - 1) * steps <= speculate.PURSE + speculate.SPARE * steps + surprise + 1e-6


def test_what_goes_into_the_purse_and_what_is_paid_from_it():
    """A step of 1 second without drafts, and of 1.5 with two drafts for each of two requests, of 0.05 each pass."""
    rule, crowd = new_rule(2), [Key(), Key()]
    rule.offered, rule.decodes = crowd[:1], 2   # who has no offer has a share in the step as well
    purse, rule.left = rule.purse, 10 ** 6
    assert purse.held == 0.25 and purse.savings == 0.0, "it begins full"
    purse.held = 0.0
    for step in range(1, 21):
        rule.account(2, 1.0, 0)
        assert purse.held == pytest.approx(min(step * 0.02, 0.25))
        assert purse.savings == pytest.approx(max(0.0, step * 0.02 - 0.25)), "seconds"
    rule.account(200, 30.0, 0)
    assert purse.savings == pytest.approx(0.15 + 0.02 * 30), "of the time of prompts, too"
    rule.drafts, rule.deepest = {request: [0, 0] for request in crowd}, 2
    for _ in range(3):
        rule.drafter.seconds.add(2, 0.05)
    for guessing, seconds, paid in ((0.1, 9.0, 1.1), (9.0, 1.5, 0.7), (0.1, 1.5, 0.6), (0.05, 1.5, 0.55)):
        purse.held, rule.guessing = 0.0, guessing   # of what takes too long, twice the usual time at most
        rule.account(6, seconds, 0)
        assert purse.held == pytest.approx(0.02 - paid, abs=0.02)
    purse.held, rule.guessing = 0.0, 0.1
    rule.account(6, 1.5, 1)
    assert purse.held == pytest.approx(0.02 - 0.6 + 0.5, abs=0.02), "a token that came for nothing is half a second"
    before = purse.savings
    rule.account(6, 1.5, 4)
    assert purse.held == 0.25, "and no more than a quarter of a step is kept for drafts"
    assert purse.savings - before == pytest.approx(-0.08 + 0.02 - 0.6 + 4 * 0.5 - 0.25, abs=0.05)


def test_what_a_right_draft_saves_is_a_share_of_the_step_of_all_who_decode():
    """A fourth of it, if one of four had a draft; but the others may still be at work when its request has ended."""
    for left, part in ((10 ** 6, 1.0), (100, 0.765), (10, 0.255), (1, 0.0)):
        rule = new_rule(1)
        for _ in range(3):
            rule.account(4, 1.0, 0)
            rule.account(5, 1.0, 0)
        rule.decodes, rule.offered, rule.guessing, rule.left = 4, [Key()], 1e-9, left
        rule.drafts, rule.purse.held = {rule.offered[0]: [0]}, -1.0
        rule.account(5, 1.0, 1)
        assert rule.purse.held == pytest.approx(-1.0 + 0.02 + 0.25 * part, abs=0.01)
        assert rule.share(1) == 1.0


@settings(max_examples=20)
@given(B=st.integers(2, 16), steps=st.integers(20, 100), chance=st.floats(0.4, 0.6))
def test_the_slowest_of_a_crowd_is_about_so_far_behind(B, steps, chance):
    """How much of what right drafts save is left, if the last to end counts: by throwing dice."""
    dice = random.Random(0)

    def ends():
        left, n = steps, 0
        while left > 0:
            left, n = left - 1 - (dice.random() < chance), n + 1
        return n
    rounds = [[ends() for _ in range(B)] for _ in range(200)]
    average, slowest = (sum(map(f, rounds)) / 200 for f in (lambda r: sum(r) / B, max))
    rule = new_rule(1)
    rule.left = steps
    saved, promised = (steps - slowest) / (steps - average), rule.share(B)
    assert saved == pytest.approx((1 + promised) / 2, abs=0.13) or promised == 0.0 and saved < 0.65


def test_a_step_gets_no_more_than_twice_as_many_tokens_as_a_known_one():
    """What it would cost is not known. Up to 8 tokens are always tried."""
    for largest, drafts in ((4, 4), (8, 12), (12, 20), (40, 28)):
        rule, crowd = new_rule(7), [Key() for _ in range(4)]
        rule.left = 10 ** 6
        for rows in (2, largest) * 3:
            rule.account(rows, 1.0, 0)
        assert sum(rule.worthwhile(crowd, [7] * 4, 4)) == drafts


def test_a_verification_is_a_short_chunk_however_many_drafts_are_allowed(lone):
    folder, prompts, expected = lone["llama"]
    llm, longest = LLM(folder, speculative_model="ngram", num_speculative_tokens=40), []
    llm.speculator.drafter = Prophet({tuple(prompts[4]): expected[4] * 9}, 1.0)
    llm.speculator.drafter.offers = lambda requests, rooms: rooms
    take_all(llm)
    llm.watchers.append(lambda plan, *rest: longest.extend(len(chunk.tokens) for _, chunk in plan if chunk.logits > 1))
    (out,) = llm.generate([prompts[4]], SamplingParams(max_tokens=40, ignore_eos=True))
    assert out.token_ids[:NEW] == expected[4] and max(longest) == batch.SHORT


@pytest.mark.parametrize("B", [1, 2])
def test_a_full_purse_lends_what_the_steps_to_come_pay_back(B):
    """A draft costs a quarter of a second, and may cost twice as much. A purse that is not full lends nothing."""
    for left, drafts in [(10, 0), (12, 0), (14, 1), (36, 1), (40, 2), (10 ** 6, 3)] if B == 1 else [(10, 0), (10 ** 6, 6)]:
        rule, crowd = new_rule(3), [Key() for _ in range(B)]
        for n in (0, 1, 2, 3, 8) * 3:
            rule.account(B + n, 1.0 + 0.25 * n, 0)
        rule.left = left
        assert sum(rule.worthwhile(crowd, [3] * B, B)) == drafts
        rule.purse.held = 0.9 * speculate.PURSE
        assert rule.worthwhile(crowd, [3] * B, B) == [0] * B


def test_how_many_steps_are_to_come():
    """A pool that is small for what is asked learns how much of it is used; a text that outlives this may go on."""
    scheduler = nanoserve.Scheduler(None, 9, 9)
    for usage, written, left in ((1.0, 1, 99), (1.0, 99, 1), (0.2, 1, 19), (0.2, 19, 19), (0.2, 45, 45), (0.2, 60, 40)):
        scheduler.usage = usage
        request = Key(tokens=[0] * (10 + written), max_length=110, output=SimpleNamespace(prompt_tokens=10, token_ids=[0] * written))
        assert speculate.steps_left(request, scheduler) == left


def reading_rule(*unread: int) -> tuple:
    """Requests with so many tokens that the drafter has not read. It reads 100 in a second; a step takes one as well."""
    rule, crowd = new_rule(3, lambda rows: 1.0), [Key(unread=n) for n in unread]
    rule.drafter.unread = lambda requests: [request.unread for request in requests]
    for rows in 4 * (1, 8, 96, 960):
        rule.drafter.seconds.add(rows, rows / 100)
    return rule, crowd


def test_a_long_text_is_read_if_the_steps_to_come_or_savings_pay_for_it():
    """200 tokens take 2 seconds, or perhaps 4: SPARE of 190 steps. With savings they must gain what it takes."""
    for savings, left, read in ((0.0, 150, False), (0.0, 185, False), (0.0, 195, True), (1.5, 30, False), (1.5, 45, True),
                                (9.0, 20, True), (9.0, 4, True), (9.0, 2, False)):
        rule, crowd = reading_rule(200)
        rule.purse.savings, rule.left = savings, left
        assert any(rule.worthwhile(crowd, [3], 1)) == read, (savings, left)
    rule, crowd = reading_rule(200)
    rule.purse.savings, rule.decodes, rule.unread, rule.guessing, rule.drafts = 1.5, 1, 200, 2.02, {crowd[0]: [0]}
    rule.account(2, 1.0, 0)
    assert rule.purse.savings == pytest.approx(0.0, abs=0.02) and rule.purse.held == pytest.approx(0.25 - 0.5, abs=0.05)


def test_who_has_much_to_read_comes_last_and_keeps_nobody_from_drafts():
    rule, crowd = reading_rule(1000, 0)
    rule.left = 20
    assert rule.worthwhile(crowd, [3, 3], 2) == [0, 3]
    rule.purse.savings, rule.left = 99.0, 400
    assert min(rule.worthwhile(crowd, [3, 3], 2)) > 0


def test_a_text_that_is_begun_is_promised_until_it_is_read_and_none_is_begun_that_ends_before():
    rule, (request,) = reading_rule(200)
    rule.purse.savings, rule.left = 99.0, 100
    assert any(rule.worthwhile([request], [3], 1)) and request in rule.promised
    request.unread = 3
    rule.worthwhile([request], [3], 1)
    assert request not in rule.promised
    request.unread, request.max_length = 200, 2   # two steps to come, and reading takes a little more
    assert rule.worthwhile([request], [3], 1) == [0]


def test_a_step_with_drafts_is_never_taken_to_be_cheaper_than_one_without():
    """Else looking for them would seem to cost nothing."""
    rule, request = new_rule(1), Key()
    for _ in range(3):
        rule.seconds.add(1, 1.0)
        rule.seconds.add(2, 0.5)
        rule.looking.add(1, 0.1)
    rule.purse.held = 0.0
    assert rule.worthwhile([request], [1], 1) == [0]


@pytest.mark.parametrize("num_blocks", [1, 16, 100])
def test_what_drafts_cost_is_measured_before_there_are_any(lone, num_blocks):
    folder = lone["llama"][0]
    for who in (folder, "ngram"):
        llm = LLM(folder, block_size=4, num_blocks=num_blocks, speculative_model=who, num_speculative_tokens=7)
        room, drafter = 4 * num_blocks, llm.speculator.drafter
        assert [size for size, _ in llm.speculator.seconds.curve()] == sorted({min(n, room) for n in (1, 2, 8, 32)})
        assert [size for size, _ in drafter.seconds.curve()] == (
            sorted({1, 4, min(64, room)}) if who == folder else [])
        assert llm.pool.available == len(llm.pool.free) == num_blocks and not llm.pool.drafted_blocks
        assert not llm.steps and len(llm.pool.free_rows) == len(llm.pool.block_tables_UM)


def test_a_prompt_that_is_too_dear_to_read_is_not_read(lone):
    """And a short one is: there the passes' times are known by their tokens."""
    folder, prompts, expected = lone["llama"]
    for prompt, dear, read in ((7, 64, False), (1, 64, True), (7, 2, True)):
        llm = LLM(folder, speculative_model=folder)
        drafter, passes = llm.speculator.drafter, []
        llm.speculator.seconds, drafter.seconds, runner = Times(), Times(), drafter.runner
        llm.speculator.verify = lambda takers, tokens, *rest: Speculator.verify(llm.speculator, takers, tokens, rest[0], 1.0)
        for rows in 4 * (1, 2, 5):
            llm.speculator.seconds.add(rows, 1.0)
            drafter.seconds.add(rows, 0.001)
            drafter.seconds.add(dear, 99.0 * (dear > 2))
        drafter.runner = lambda chunks: passes.append(sum(len(chunk.tokens) for chunk in chunks)) or runner(chunks)
        with pytest.MonkeyPatch.context() as patch:
            measured, add = [], drafter.seconds.add
            patch.setattr(drafter.seconds, "add", lambda rows, seconds: measured.append(rows) or add(rows, 0.001))
            (out,) = llm.generate([prompts[prompt]], SamplingParams(max_tokens=NEW, ignore_eos=True))
        assert out.token_ids == expected[prompt] and bool(passes) == read and measured == passes


def test_a_dear_number_of_drafts_does_not_hide_a_cheap_one_behind_it():
    """Five rows may take less time than two: the products of a CPU do."""
    request = Key()
    rule = new_rule(4, chances={request: 0.95})
    for rows, seconds in ((1, 1.0), (2, 1.3), (3, 1.3), (4, 1.3), (5, 1.02), (6, 1.05)) * 3:
        rule.account(rows, seconds, 0)
    rule.purse.held = 0.12
    assert rule.worthwhile([request], [4], 1) == [4]


def test_what_has_been_shown_is_not_paid_for():
    """Two requests alike in what is hoped of them; the drafts of one have been right. A draft costs a third of what it
    brings if it is right, or perhaps two thirds."""
    rule, crowd = new_rule(1), [Key(), Key()]
    for rows, seconds in ((2, 1.0), (3, 1.14), (4, 1.28)) * 3:
        rule.account(rows, seconds, 0)
    rule.chances.of, rule.left = lambda requests: [(0.91, shown), (0.9, 0.0)], 10 ** 6
    for shown, held, counts in ((0.5, -9.0, [1, 0]), (0.25, -9.0, [0, 0]), (0.25, 0.06, [1, 0]), (0.5, 0.08, [1, 1]), (0.0, 0.2, [0, 0])):
        rule.purse.held = held
        assert rule.worthwhile(crowd, [1, 1], 2) == counts, (shown, held)


@settings(max_examples=150)
@given(data=st.data(), B=st.integers(1, 3), prompt=st.integers(0, 20))
def test_the_rule_takes_the_fastest_of_all_choices(data, B, prompt):
    """With a step of known cost and drafts that cost nothing themselves, against every choice there is."""
    offers = data.draw(st.lists(st.integers(0, 3), min_size=B, max_size=B))
    chances = data.draw(st.lists(st.one_of(st.just(0.0), st.floats(0.35, 1)), min_size=B, max_size=B))
    slope, rows = data.draw(st.floats(0.01, 1.0)), B + prompt
    crowd = [Key() for _ in range(B)]
    rule = new_rule(3, chances=dict(zip(crowd, chances)))
    rule.purse.held, rule.left = math.inf, 100
    cost = lambda n: 1 + slope * n
    for n in (1, 2, 64):
        for _ in range(3):
            rule.seconds.add(n, cost(n))
    rule.seconds.curve()
    for n in (1, 2, 64):   # nothing has faded
        rule.seconds.typical[n] = cost(n), rule.seconds.steps

    def speed(counts):
        """A token that comes for nothing is worth less in a crowd."""
        tokens = sum(1 + rule.share(B) * sum(chance ** i for i in range(1, n + 1)) for chance, n in zip(chances, counts))
        return tokens / (cost(B) + cost(rows + sum(counts)) - cost(rows))
    counts = rule.worthwhile(crowd, offers, rows)
    assert all(n <= offer for n, offer in zip(counts, offers))
    best = max(map(speed, itertools.product(*(range(offer + 1) for offer in offers))))
    assert speed(counts) == pytest.approx(best if best >= MARGIN * speed([0] * B) else speed([0] * B), rel=1e-9)


def test_a_pass_of_the_draft_model_counts():
    """A draft that is right 8 times in 10 and verified for nothing: a second one is worth a pass that costs half of a step, and
    none is worth one that costs a whole step."""
    for pass_seconds, wanted in ((0.0, 3), (0.05, 3), (0.5, 2), (0.6, 1), (0.7, 0), (1.0, 0)):
        request = Key()
        rule = new_rule(3, chances={request: 0.8})
        rule.left = 10 ** 6
        for _ in range(3):
            rule.seconds.add(1, 1.0)
            rule.seconds.add(4, 1.0)
            rule.drafter.seconds.add(1, pass_seconds)
        assert rule.worthwhile([request], [3], 1) == [wanted], pass_seconds


def test_chances_follow_what_was_accepted_and_hope_grows_where_nothing_is_tried():
    chances, a, b = Chances(), Key(), Key()
    assert chances.of([a, b]) == [(1.0, 0.0)] * 2, "all may be hoped, and nothing has been shown"
    chances.learn([a], {a: [1, 2, 3]}, {a: 2}, 1)    # right, right, wrong; the third was not right
    usual, right, tried = 0.9 ** 3 + (1 - 0.9 ** 3) * 2 / 3, 0.9 ** 2 + 0.9, 1 + 0.9 + 0.9 ** 2
    (hoped, shown), (hoped_b, shown_b) = chances.of([a, b])
    assert hoped == pytest.approx((right + 3 * usual) / (tried + 3)) and hoped_b == pytest.approx(usual)
    here = right / (tried + 3)
    assert shown == pytest.approx((right + 3 * here) / (tried + 3)) and shown_b == pytest.approx(here)
    assert chances.of([b]) == [(pytest.approx(usual), 0.0)], "alone it has shown nothing"
    chances.learn([a], {}, {}, 2)
    usual += 0.1 * 2 * HOPE
    assert chances.of([a])[0][0] == pytest.approx((right + 3 * usual) / (tried + 3) + 2 * HOPE)
    chances.learn([], {}, {}, 1)
    assert chances.of([a])[0][0] == pytest.approx((right + 3 * usual) / (tried + 3) + 2 * HOPE), "who had no offer learns nothing"
    chances.learn([a], {a: [1]}, {}, 1)
    assert chances.of([a])[0][0] == pytest.approx((0.9 * right + 3 * 0.9 * usual) / (0.9 * tried + 4)), "hope is used up"
    for _ in range(100):
        chances.learn([a], {a: [1]}, {a: 1}, 1)
    assert chances.of([a])[0] == (pytest.approx(1.0, abs=1e-3), pytest.approx(1 / 1.3 * (10 + 3 * 10 / 13) / 10, abs=1e-2))


@settings(max_examples=30)
@given(B=st.integers(1, 20), looking=st.sampled_from([0.0, 0.003, 0.01, 0.06, 0.5, 1.0]), offered=st.booleans())
def test_looking_for_drafts_that_are_not_there_takes_a_percent_of_the_time(B, looking, offered):
    """looking: how long it takes, in steps. Time stands still but for that."""
    now, looks = [0.0], []

    def offers(requests, rooms):
        now[0] += looking
        looks.append(len(requests))
        return [4 * offered] * len(requests)
    rule = new_rule(4)
    rule.drafter.offers = offers
    for _ in range(3):
        rule.seconds.add(B, 1.0)
        rule.drafter.seconds.add(B, 1e9)   # so that no draft ever pays
    params = SimpleNamespace(logits_processor=None)
    output = SimpleNamespace(token_ids=[2])
    requests = [Key(params=params, max_length=99, tokens=[1, 2], siblings=[None], output=output) for _ in range(B)]
    rule.chances.usual = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate.time, "perf_counter", lambda: now[0])
        patch.setattr(speculate, "THINKING", 0.01)
        for _ in range(1000):
            plan = [(request, Chunk([2], 1, [0])) for request in requests]
            rule.draft(plan, SimpleNamespace(max_batched_tokens=99, expected_length=lambda request: 99))
            assert not rule.drafts and all(chunk.tokens == [2] for _, chunk in plan)
            rule.learn({})
    assert set(looks) == {B} and looking * (len(looks) - 1) <= 0.01 * 1000
    assert len(looks) >= min(1000, 0.01 * 1000 / max(looking, 1e-9) * 0.5), "and no less often than it may"
    hope = HOPE * 1000 if offered else 0.0
    assert all(rule.chances.hopes.get(request, 0.0) == pytest.approx(hope, rel=0.4) for request in requests), "resting gives hope, too"


class Reader(Drafter):
    """It has 60 tokens of each request to read, and its passes take a second."""

    def offers(self, requests, rooms):
        return rooms

    def unread(self, requests):
        return [60] * len(requests)

    def guess(self, requests, counts):
        self.spent = 2.0
        return [[7] * count for count in counts]


def test_what_is_known_of_a_step_with_drafts(monkeypatch):
    """Two requests, one beyond the length that is expected of it, and a third with its prompt; a look takes five seconds."""
    clock = iter([100.0, 105.0, 200.0, 203.0])
    monkeypatch.setattr(speculate.time, "perf_counter", lambda: next(clock))
    rule, params = Speculator(Reader(), 3), SimpleNamespace(logits_processor=None)
    requests = [Key(params=params, tokens=[1] * n, max_length=99, siblings=[None], output=SimpleNamespace(token_ids=[1] * 4)) for n in (9, 50, 30)]
    plan = [(r, Chunk([1] * n, len(r.tokens) - n, [0])) for r, n in zip(requests, (1, 1, 5))]
    scheduler = SimpleNamespace(max_batched_tokens=16, expected_length=lambda r: len(r.tokens) + 1, grow_for_drafts=lambda r, n: n)
    rule.worthwhile = lambda requests, offers, rows: [2, 1]
    rule.looking.add(2, 99.0)   # the first does not count
    rule.draft(plan, scheduler)
    assert (rule.decodes, rule.left, rule.offered, rule.deepest, rule.guessing) == (2, 4, requests[:2], 2, 5.0)
    assert rule.unread == 16, "of 120 no more than a pass has room for"
    assert rule.drafts == {requests[0]: [7, 7], requests[1]: [7]} and [len(chunk.tokens) for _, chunk in plan] == [2, 3, 5]
    assert rule.looking.curve() == [(2, 3.0)], "5 seconds less 2 for the passes"
    rule.worthwhile, rule.promised = lambda requests, offers, rows: [0, 0], {requests[1]}
    plan = [(r, Chunk([1], len(r.tokens) - 1, [0])) for r in requests[:2]]
    rule.draft(plan, scheduler)
    assert rule.drafts == {requests[1]: [7]}, "whose text has been begun is read to its end"


def test_a_pass_that_gives_no_drafts_is_paid_for():
    """A prompt is read in pieces, or the draft model's logits are not finite."""
    for unread, deepest, paid in ((200, 1, 2.01 + 0.01), (0, 3, 0.03)):
        rule, crowd = reading_rule(unread)
        rule.decodes, rule.unread, rule.deepest, rule.guessing = 1, unread, deepest, paid
        rule.account(1, 1.0, 0)
        assert rule.purse.held == pytest.approx(0.27 - paid, abs=0.03)


def test_a_purse_counts_in_steps_and_lends_no_more_than_it_may():
    for held, step, left, price, reading, pays in ((0.25, 1.0, 1, 0.13, 0.0, True), (0.25, 1.0, 1, 0.14, 0.0, False),
            (0.25, 2.0, 1, 0.2, 0.0, True), (0.2, 1.0, 1000, 0.11, 0.0, False), (-3.0, 1.0, 1000, -0.1, 0.0, True),
            (-3.0, 1.0, 1000, 0.01, 0.0, False), (0.25, 1.0, 1000, 2.1, 0.0, True), (0.25, 1.0, 1000, 2.2, 0.0, False),
            (0.25, 1.0, 1000, 2.1, 7.0, True), (0.25, 1.0, 1000, 2.1, 9.0, False)):
        purse = speculate.Purse()
        purse.held = held
        assert purse.pays(price, reading, step, left) == pays, (held, step, left, price, reading)
    purse = speculate.Purse()
    purse.pay(-1000.0, 0.0, 1.0)
    assert (purse.held, purse.savings) == (speculate.PURSE, speculate.SAVED), "nor does it save without end"
    purse.pay(0.5, 30.0, 1.0)
    assert purse.savings == pytest.approx(0.0) and purse.held == pytest.approx(0.25 + 0.02 - 0.5 - 10.0)


def test_a_speed_that_was_measured_long_ago_is_doubted():
    request = Key()
    rule = new_rule(1, lambda rows: 1.0, chances={request: 0.15})
    for since, counts in ((0, [1]), (6, [0])):   # 1.15 times as fast, and 1.1 / 0.99 ** 6 is more
        rule.since = since
        assert rule.worthwhile([request], [1], 1) == counts


def test_looking_counts_and_rare_drafts_do_not():
    request = Key()
    rule = new_rule(4, lambda rows: 1.0, chances={request: 0.2})
    rule.left = 1000
    assert rule.worthwhile([request], [4], 1) == [2], "the third would be right in 0.8%"
    for _ in range(3):
        rule.looking.add(1, 0.2)
    assert rule.worthwhile([request], [4], 1) == [0]


def test_of_several_drafts_that_were_shown_each_is_worth_less():
    """0.5 and 0.25 of a step, not twice 0.5."""
    request = Key()
    rule = new_rule(2, lambda rows: 1 + 0.4 * (rows - 1))
    rule.chances.of, rule.purse.held = lambda requests: [(0.99, 0.5)], 0.0
    assert rule.worthwhile([request], [2], 1) == [1]


def test_one_draft_for_each_of_two_requests_takes_one_pass():
    rule, crowd = new_rule(1), [Key(), Key()]
    for _ in range(3):
        rule.seconds.add(2, 1.0)
        rule.seconds.add(4, 1.0)
        rule.drafter.seconds.add(2, 0.5)
    rule.left = 10 ** 6
    assert rule.worthwhile(crowd, [1, 1], 2) == [1, 1], "4 tokens in 1.5 seconds; in 2 it would be no gain"


def test_what_was_measured_first_gives_way_to_what_is_measured_later():
    times = Times()
    for _ in range(4):
        times.add(5, 1.0)
    assert times.curve() == [(5, pytest.approx(1.0))]
    for _ in range(9):
        times.add(5, 2.0)
    assert times.curve() == [(5, pytest.approx(2.0))]
    for steps, seconds in ((1, 2.0), (60, 1.0)):   # three new ones beside nine old ones, or beside none that is recent
        times = Times()
        for _ in range(10):
            times.add(5, 2.0)
        for _ in range(steps):
            times.add(1, 9.0)
        for _ in range(3):
            times.add(5, 1.0)
        assert dict(times.curve())[5] == pytest.approx(seconds, rel=0.1)


def test_a_model_is_measured_within_its_context_and_its_vocabulary(tmp_path):
    config = GPT2 | dict(n_positions=8)
    write_checkpoint(tmp_path, config, tensors_of(config))
    llm = LLM(tmp_path, block_size=16, speculative_model=tmp_path)
    assert [size for size, _ in llm.speculator.seconds.curve()] == [1, 2, 5, 8]
    times, runs = Times(), []
    runner = SimpleNamespace(pool=llm.pool, model=llm.model)
    times.measure(noting_runner(runner, runs), 1, 5)
    assert all(len(set(chunk.tokens)) == len(chunk.tokens) for chunk in runs), "tokens that choose experts of their own"
    assert [len(measured) for measured in times.measured.values()] == [1, 1], "worth as much as one step"
    taken = llm.pool.free
    llm.pool.free = type(taken)(0)
    times.measure(noting_runner(runner, runs), 1, 5)   # no block is free: nothing is measured
    llm.pool.free = taken


def noting_runner(like, runs):
    """A runner that notes what it is given."""
    class Runner(SimpleNamespace):
        def __call__(self, chunks):
            runs.extend(chunks)
            return torch.zeros(1, 3)
    return Runner(pool=like.pool, model=like.model)


def test_samples_read_their_common_blocks_once(lone):
    """Of 51 tokens 6 blocks of 8 are shared: the second and the third have but their ends to read."""
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, block_size=8, speculative_model=folder)
    llm.speculator.worthwhile = lambda requests, offers, rows: [0] * len(offers)
    llm.add(prompts[6], SamplingParams(max_tokens=NEW, ignore_eos=True, n=3))
    while not llm.scheduler.running or len(llm.scheduler.running) < 3:
        llm.step()
    llm.step()   # they part: each has a last block of its own
    requests, drafter = llm.scheduler.running, llm.speculator.drafter
    first, *others = drafter.unread(requests)
    assert first == len(requests[0].tokens) - 1 and others == [first - 48] * 2
    take_all(llm)
    llm.step()
    llm.step()
    assert all(n < first - 48 + 3 for n in drafter.unread(requests)), "what one has read the others need not"
    for request in list(llm.requests):
        llm.abort(request)


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
