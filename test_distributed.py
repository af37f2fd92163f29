"""How we know that a request may change its process at any moment, and lose it. (Read it beside distributed.py.)

Two kinds of workers stand behind the front. In the first half they are objects in this process, and hypothesis decides
who acts next, whose word is heard, when a transfer ends, and who dies: the very code of worker and front, in orders that
real processes seldom take. In the second half they are processes.
"""

import importlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import distributed
import model
from distributed import Disaggregated, Link, Worker
from nanoserve import LLM, SamplingParams
from paged_kv import KVPool
from reference import NEW

HERE = Path(__file__).parent
SAME = "text", "token_ids", "finish_reason", "error", "prompt_tokens"


# ---------------------------------------------------------------------------------------------
# A world in this process

class Exit(BaseException):
    """The end of the process in which it is raised."""


class Actor(distributed.Process):
    """A worker that acts when the world says so. It is its own connection."""
    world = worker = None
    dead, awake = False, True

    def start(self, threads):
        self.heard, self.said = deque(), deque()
        self.connection = SimpleNamespace(poll=lambda: bool(self.said) or self.dead, recv=self.say, close=lambda: None)
        self.process, self.outbox = SimpleNamespace(kill=self.die, wait=lambda: self.code), SimpleQueue()

    def tell(self, *message):
        if self.worker:
            self.heard.append(message)
        elif not hasattr(self, "llm"):
            model, options = message
            self.llm = self.world.engine(model, options)
            self.said.append(("answer", self.llm.pool.num_blocks, self.llm.pool.block_size, self.llm.scheduler.max_seqs))
        else:
            links = {peer: Wire(self, peer, sends) for peer, _, _, sends in message}
            self.worker = Worker(self.llm, lambda *what: self.said.append(what), links)
            self.world.actors[self.rank] = self
            self.said.append(("answer",))

    def say(self):
        if not self.said:
            raise EOFError
        return self.said.popleft()

    def die(self, code=-9):
        if not self.dead:
            self.dead, self.code = True, code
            for wire in self.worker.links.values():
                wire.group = None

    def act(self):
        """Hear a message, else take a turn."""
        try:
            if self.heard:
                name, *what = self.heard.popleft()
                getattr(self.worker, name)(*what)
                self.awake = True
            else:
                self.awake = self.worker.turn()
        except Exit as exit:
            self.die(exit.code)


class Wire(Link):
    """An end of a link, whose thread runs when the world says so: the very code, on a group that is a queue."""

    def __init__(self, here, peer, sends):
        self.pool, self.inbox, self.peer = here.llm.pool, SimpleNamespace(put=here.heard.append), peer
        self.orders, self.blocks, self.broken = SimpleQueue(), {}, False
        self.sends, self.ended, self.way = sends, False, here.world.ways[min(here.rank, peer), max(here.rank, peer)]
        self.group = Group(self)
        self.fault = None   # (operations until it comes, what it is)

    def ready(self):
        return not self.ended and (not self.orders.empty() if self.sends else bool(self.way.pieces or self.way.broken))

    def act(self):
        """All of a transfer."""
        def task():
            self._send() if self.sends else self._receive()
            raise Paused
        try:
            self._work(task)
            self.ended = True
        except Paused:
            pass

    def may_fail(self):
        if self.fault:
            self.fault[0] -= 1
            if self.fault[0] < 0:
                raise self.fault[1]("of one end")   # a new one, as a traceback would hold the group


class Paused(BaseException):
    pass


class Group:
    """The group of two, as one of them has it. When nobody has it any more, the other one notices."""

    def __init__(self, wire):
        self.way, self.may_fail = wire.way, wire.may_fail

    def send(self, tensors, *_):
        self.may_fail()
        if self.way.broken:
            raise RuntimeError("the peer is dead")
        self.way.pieces.append(tensors[0].clone())
        return self

    def recv(self, tensors, *_):
        self.may_fail()
        if not self.way.pieces:
            if not self.way.broken:
                pytest.fail("it waits for ever")
            raise RuntimeError("the peer is dead")
        tensors[0].copy_(self.way.pieces.popleft())
        return self

    def wait(self):
        pass

    def __del__(self):
        self.way.broken = True


class World:
    """Decides what happens next, by the dice that it is given."""

    def __init__(self, dice, deaths, **options):
        self.dice, self.deaths, self.options, self.weights = dice, deaths, options, None
        self.actors, self.steps = {}, 0
        self.ways = defaultdict(lambda: SimpleNamespace(pieces=deque(), broken=False))

    def engine(self, model, options):
        llm = LLM(model, weights=self.weights, **options)
        self.weights = llm.model.weights
        for memory in llm.pool.memory:   # what nobody wrote is seen
            memory.fill_(torch.nan if memory.dtype.is_floating_point else 111)
        return llm

    def wait(self, connections):
        """What multiprocessing's `wait` is for the front."""
        assert connections
        while not (ready := [c for c in connections if c.poll()]):
            self.step()
        return self.dice.sample(ready, self.dice.randint(1, len(ready)))

    def step(self):
        self.steps += 1
        assert self.steps < 20000, "somebody waits for ever"
        actors = list(self.actors.values())
        alive = [a for a in actors if not a.dead]
        wires = [wire for a in alive for wire in a.worker.links.values()]
        under_way = [m for a in alive for m in [*a.heard, *a.said] if m[0] in ("offer", "taken", "hand_over", "came", "sent")]
        if self.deaths and self.dice.random() < (0.1 if under_way or any(wire.ready() for wire in wires) else 0.004):
            self.deaths -= 1
            if self.dice.random() < 0.3:   # nobody dies, but one end of a link fails, now or at its next transfer
                error = self.dice.choice([RuntimeError, MemoryError, KeyError])
                self.dice.choice(wires).fault = [self.dice.randint(0, 3), error]
            else:
                self.dice.choice(alive).die()
            return
        choices = [a.act for a in alive if a.heard or a.awake] + [wire.act for wire in wires if wire.ready()]
        assert choices or any(a.connection.poll() for a in actors), "nobody can do anything, and somebody waits"
        if choices:
            self.dice.choice(choices)()

    def settle(self, front):
        """Until nobody has anything left to do."""
        while True:
            front._hear([w.connection for w in front.workers])
            busy = [a for a in self.actors.values() if not a.dead
                    and (a.heard or a.awake or any(wire.ready() for wire in a.worker.links.values()))]
            if not busy:
                return
            self.step()


def make_front(monkeypatch, world, folder, prefill, decode, **options):
    monkeypatch.setattr(distributed, "Process", Actor)
    monkeypatch.setattr(distributed, "TCPStore", lambda *a, **k: type("Store", (), dict(port=0)))
    monkeypatch.setattr(distributed, "wait", world.wait)
    monkeypatch.setattr(Actor, "world", world)
    return Disaggregated(folder, prefill, decode, device="cpu", dtype="float32", **options)


def check_nothing_is_left(front):
    for actor in front.workers:
        if not actor.dead:
            worker, pool = actor.worker, actor.llm.pool
            assert pool.num_referenced == 0 and not actor.llm.requests, (actor.rank, actor.role)
            assert not (worker.told or worker.leaving or worker.offers or worker.transfers or worker.doomed)
            assert not actor.llm.scheduler.aside
            assert not any(wire.blocks for wire in worker.links.values() if not wire.broken)
            assert len(pool.free_rows) == len(pool.block_tables_UM)
    assert not front.runs and not front.numbers and not front.requests and not front.suspects and not front.waiting


PARAMS = st.builds(dict, max_tokens=st.integers(1, NEW), temperature=st.sampled_from([0.0, 0.9]), seed=st.integers(0, 3),
                   n=st.sampled_from([1, 1, 1, 3]), logprobs=st.sampled_from([None, 1]))


@settings(max_examples=80, report_multiple_bugs=False)
@given(data=st.data(), seed=st.integers(0, 2 ** 32), processes=st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2), (2, 2)]),
       deaths=st.sampled_from([0, 0, 1, 2, 4]), spare=st.integers(0, 8), S=st.sampled_from([4, 8, 16]),
       options=st.fixed_dictionaries(dict(prefix_cache=st.booleans(), max_batched_tokens=st.sampled_from([7, 64]),
                                          kv_cache_dtype=st.sampled_from(["auto", "auto", "int8"]),
                                          max_seqs=st.sampled_from([3, 8]),
                                          speculative_model=st.sampled_from([None, None, "ngram"]))))
def test_tokens_do_not_depend_on_where_prefill_and_decode_run_and_who_dies(
        lone, data, seed, processes, deaths, spare, S, options):
    folder, prompts, _ = lone["llama int8 kv" if options["kv_cache_dtype"] == "int8" else "llama"]
    asked = data.draw(st.lists(st.tuples(st.sampled_from(range(len(prompts))), PARAMS, st.integers(0, 6),
                                         st.sampled_from([0, 0, 0, 1, 2, 3, 5, 9])),
                               min_size=2, max_size=8))
    options |= dict(block_size=S, num_blocks=-(-(60 + NEW) // S) + spare)
    alone = LLM(folder, device="cpu", dtype="float32", **options | dict(speculative_model=None))
    world = World(random.Random(seed), deaths)
    with pytest.MonkeyPatch.context() as monkeypatch:
        front = make_front(monkeypatch, world, folder, *processes, **options)
        outputs, steps, queue = [], itertools.count(), sorted(asked, key=lambda a: a[2])
        while queue or front.requests:
            step = next(steps)
            while queue and queue[0][2] <= step:
                i, params, _, patience = queue.pop(0)
                rid = front.add(prompts[i], SamplingParams(**params, ignore_eos=True))
                outputs.append((front.requests[rid].output, i, params, patience and step + patience))
            for out, _, _, abort_at in outputs:
                if abort_at and abort_at == step:
                    front.abort(out.id)
            known = [(sample, list(sample.token_ids)) for out, *_ in outputs for sample in out.samples]
            grown = front.step()
            assert len(set(map(id, grown))) == len(grown)
            assert all(sample.token_ids[:len(before)] == before for sample, before in known), "what was shown stays"
        living = [actor for actor in front.workers if not actor.dead]
        if living:
            world.settle(front)
        for out, i, params, abort_at in outputs:
            (expected,) = alone.generate([prompts[i]], SamplingParams(**params, ignore_eos=True))
            for sample, other in zip(out.samples, expected.samples, strict=True):
                n = len(sample.token_ids)
                if sample.finish_reason in ("abort", "error"):
                    assert abort_at or not living and "no worker process is left" in sample.error, sample
                    assert sample.token_ids == other.token_ids[:n]
                else:
                    assert (sample.token_ids, sample.finish_reason) == (other.token_ids, other.finish_reason)
                assert (sample.logprobs is None) == (params["logprobs"] is None)
                for mine, theirs in zip(sample.logprobs or (), other.logprobs or ()):
                    assert mine.keys() == theirs.keys() or len(mine) == 1
                    assert all(abs(mine[t] - theirs[t]) < 1e-3 for t in mine.keys() & theirs.keys())
                assert sample.logprobs is None or len(sample.logprobs) == n
        check_nothing_is_left(front)


@pytest.mark.parametrize("event", ["abort", "prefill dies", "decode dies", "decode is dead", "prefill's end fails", "decode's end fails"])
@pytest.mark.parametrize("moment", ["computed", "offered", "taken", "ordered", "on its way", "sent"])
def test_at_every_moment_of_a_move_anything_may_happen(lone, monkeypatch, moment, event):
    folder, prompts, expected = lone["llama"]
    world = World(random.Random(0), 0)
    front = make_front(monkeypatch, world, folder, 1, 1, block_size=8, num_blocks=40)
    out = front.requests[front.add(prompts[4], SamplingParams(max_tokens=9))].output
    front._assign()
    prefill, decode = front.workers
    sender, receiver = prefill.worker.links[1], decode.worker.links[0]
    while not any(name == "grown" for name, *_ in prefill.said):
        prefill.act()
    hear = lambda: front._hear([prefill.connection, decode.connection])
    if moment != "computed":
        hear()
        assert decode.heard[0][0] == "offer"
    if moment not in ("computed", "offered"):
        decode.act()
        decode.act()
        assert decode.said[-1][0] == "taken"
    if moment in ("ordered", "on its way", "sent"):
        hear()
        prefill.act()
        assert sender.ready()
    if moment in ("on its way", "sent"):
        sender.act()
        assert receiver.ready()
    if moment == "sent":
        receiver.act()
    if event == "abort":
        front.abort(out.id)
    elif "fails" in event:
        (sender if event.startswith("prefill") else receiver).fault = [1, MemoryError]
    else:
        (prefill if event == "prefill dies" else decode).die()
    if event == "decode is dead":   # the front knows it before it hears anything else
        front._hear([decode.connection])
    while front.requests:
        front.step()
    world.settle(front)
    assert event == "abort" or (out.token_ids, out.finish_reason) == (expected[4][:9], "length")
    assert front.next_number <= 2, "who is lost is not offered again"
    check_nothing_is_left(front)


def test_suspects_run_one_at_a_time_until_they_bring_a_token(lone, monkeypatch):
    folder, prompts, expected = lone["llama"]
    world = World(random.Random(0), 0)
    front = make_front(monkeypatch, world, folder, 1, 2, block_size=8, num_blocks=40)
    requests = [front.requests[front.add(prompts[i], SamplingParams(max_tokens=9))] for i in (4, 5, 7)]
    front._assign()
    prefill = front.workers[0]
    while prefill.heard:   # of three prompts, of which it computes none
        prefill.act()
    prefill.die(-11)
    seen = []
    while front.requests:
        front.step()
        front._assign()
        seen.append((len(front.suspects), sum(request in front.suspects for request in front.numbers)))
        for request in requests:
            assert bool(request.output.token_ids) == (request not in front.suspects) or prefill.alive
        if not front.suspects and all(run.begun for run in front.runs.values()) and not front.workers[1].dead:
            front.workers[1].die(-11)   # its requests have a token, and are no suspects once more
    assert {(3, 1), (2, 1), (1, 1), (0, 0)} >= set(seen) >= {(3, 1), (0, 0)} and front.workers[1].dead
    assert [request.output.token_ids for request in requests] == [expected[i][:9] for i in (4, 5, 7)]
    world.settle(front)
    check_nothing_is_left(front)


def harmless(token_ids, logits_V):
    return logits_V


def deadly(token_ids, logits_V):
    if len(token_ids) == deadly.at:
        raise deadly.end
    return logits_V


@pytest.mark.parametrize("processes, code, at, deaths, words", [
    ((1, 1), 7, 0, 1, r"^a worker process has ended \(exit status 7\) in its logits_processor"),
    ((1, 1), -11, 3, 1, r"^a worker process has ended \(signal 11\) in its logits_processor"),
    ((2, 1), -11, None, 2, r"^two worker processes have ended before its next token \(the second: signal 11\)"),
    ((2, 2), 1, None, 2, "^two worker processes")])
def test_who_ends_workers_is_an_error_and_nobody_else(lone, monkeypatch, processes, code, at, deaths, words):
    """In its logits_processor, at its first token or later, or (at is None) where the model runs its prompt."""
    folder, prompts, expected = lone["llama"]
    deadly.at, deadly.end = at, Exit()
    deadly.end.code = code

    def crashing(forward):
        def call(chunks):
            if at is None and any(chunk.tokens == prompts[3][chunk.start:] and chunk.logits for chunk in chunks):
                raise deadly.end
            return forward(chunks)
        return call
    for seed in range(6):
        world = World(random.Random(seed), 0)
        front = make_front(monkeypatch, world, folder, *processes, block_size=8, num_blocks=60)
        for actor in front.workers:
            actor.llm._logits = crashing(actor.llm._logits)
        processors = {3: deadly if at is not None else None}
        params = [SamplingParams(max_tokens=6, n=1 + i % 2, logits_processor=processors.get(i, harmless if i % 3 else None))
                  for i in range(7)]
        outputs = front.generate(prompts[:7], params)
        killer = outputs.pop(3)
        assert all(sample.token_ids == expected[i][:6] for i, out in zip((0, 1, 2, 4, 5, 6), outputs) for sample in out.samples)
        assert all(sample.finish_reason == "error" and re.search(words, sample.error) for sample in killer.samples), killer
        assert sum(actor.dead for actor in front.workers) == deaths
        world.settle(front)
        check_nothing_is_left(front)


def fails_third(token_ids, logits_V):
    if len(token_ids) == 2:
        raise RuntimeError("no third token")
    return logits_V


@pytest.mark.parametrize("how", ["abort", "error"])
def test_text_that_is_held_back_is_not_lost_when_the_request_is(monkeypatch, how):
    front = make_front(monkeypatch, World(random.Random(1), 0), HERE / "demo/llama", 1, 1, num_blocks=40)
    text = front.generate("The cat sat", SamplingParams(max_tokens=2))[0].text
    params = SamplingParams(stop=text + "...", logits_processor=fails_third if how == "error" else None)
    out = front.requests[front.add("The cat sat", params)].output
    while len(out.token_ids) < 2:
        front.step()
    assert out.text == "" and not out.finish_reason
    if how == "abort":
        front.abort(out.id)
    while not out.finish_reason:
        front.step()
    assert (out.text, out.finish_reason) == (text, how)


def test_after_close_everything_ends_in_one_sentence(lone, monkeypatch):
    folder, prompts, expected = lone["llama"]
    front = make_front(monkeypatch, World(random.Random(1), 0), folder, 1, 1, block_size=8, num_blocks=40)
    out = front.requests[front.add(prompts[4], SamplingParams(max_tokens=9, n=2))].output
    while len(out.token_ids) < 3:
        front.step()
    front.close()
    front.step()
    (late,) = front.generate([prompts[0]])
    sentence = "no worker process is left (prefill: closed, decode: closed): make a new Disaggregated"
    assert [sample.error for sample in (*out.samples, late)] == [sentence] * 3 and not front.requests
    assert out.token_ids == expected[4][:len(out.token_ids)]
    with pytest.raises(ValueError, match="has no logits"):
        front.logits(prompts[0])
    check_nothing_is_left(front)


def test_workers_of_one_device_share_its_memory(lone, monkeypatch):
    sizes = []
    for processes in ((1, 1), (3, 3)):
        monkeypatch.setattr(model, "memory_for_pool", lambda device: (1 << 20, 1 << 18))
        front = make_front(monkeypatch, World(random.Random(1), 0), lone["llama"][0], *processes, block_size=8)
        pools = [actor.llm.pool for actor in front.workers]
        sizes.append(sum(memory.nbytes for pool in pools for memory in pool.memory))
        assert (1 << 18) * 0.8 < sizes[-1] <= 1 << 18 and front.pool.num_blocks == pools[0].num_blocks


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_a_link_moves_all_that_is_in_the_blocks(kind):
    pools = [KVPool(2, 3, 4, 9, 5, torch.int8 if kind == "int8" else torch.float32) for _ in range(2)]
    for number, pool in enumerate(pools):
        for memory in pool.memory:
            memory.copy_(torch.arange(memory.numel()).view(memory.shape) % 61 + 61 * number)
    before = [memory.clone() for memory in pools[1].memory]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    inboxes = SimpleQueue(), SimpleQueue()
    with ThreadPoolExecutor() as threads:   # each waits for the other
        ends = [threads.submit(Link, pools[i], inboxes[i], 1 - i, "name", store.port, i == 0) for i in range(2)]
    sender, receiver = (end.result() for end in ends)
    moves = {7: ([1, 2, 8], [5, 0, 3]), 8: (None, [1]), 9: ([], []), 10: ([4], [8])}
    for number, (blocks, targets) in moves.items():
        receiver.blocks[number] = targets
        sender.orders.put((number, blocks))
    size = sum(memory[:, :, 0].nbytes for memory in pools[0].memory)
    assert [inboxes[1].get(timeout=20)[:4] for _ in moves] == [
        ("came", number, blocks is not None, size * len(blocks or ())) for number, (blocks, _) in moves.items()]
    assert [inboxes[0].get(timeout=20) for _ in moves] == [("sent", number) for number in moves] and not receiver.blocks
    for source, target, old in zip(pools[0].memory, pools[1].memory, before, strict=True):
        for blocks, targets in moves.values():
            for b, t in zip(blocks or (), targets):
                old[:, :, t] = source[:, :, b]
        assert torch.equal(target, old)


@pytest.mark.parametrize("sending", [True, False])
def test_when_one_end_of_a_link_fails_both_hear_of_it(sending):
    pools, inboxes = [KVPool(2, 3, 4, 9, 5) for _ in range(2)], (SimpleQueue(), SimpleQueue())
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor() as threads:
        ends = [threads.submit(Link, pools[i], inboxes[i], 1 - i, "name", store.port, i == 0) for i in range(2)]
    sender, receiver = (end.result() for end in ends)
    receiver.blocks[1] = [1, 2] if sending else [1, 99]   # a block that is not there takes the place of a full memory
    sender.orders.put((1, [3, 99] if sending else [3, 4]))
    assert inboxes[not sending].get(timeout=20) == ("broken", sending)
    heard = deque()
    while ("broken", not sending) not in heard:   # a sender hears it when it sends again
        sender.orders.put((2, None))
        heard.append(inboxes[sending].get(timeout=20))


def test_a_prompt_that_another_one_begins_with_is_sent_once(lone, monkeypatch):
    folder, prompts, expected = lone["llama"]
    world = World(random.Random(5), 0)
    front = make_front(monkeypatch, world, folder, 1, 1, block_size=8, num_blocks=60)
    prompt = prompts[7]   # 59 tokens: 7 blocks that are full, and one that is not
    outs = front.generate([prompt] * 2, SamplingParams(max_tokens=4, n=3))
    world.settle(front)
    stats, pool = front.stats(), front.workers[1].llm.pool
    block = sum(memory[:, :, 0].nbytes for memory in pool.memory)
    assert all(sample.token_ids == expected[7][:4] for out in outs for sample in out.samples)
    assert stats["sent_bytes"] == (7 + 6) * block and stats["moving"] == 0
    assert stats["computed_tokens"] == 59 + 3 + 6 * 3, "the second prompt found the first; none is computed where it decodes"
    check_nothing_is_left(front)


def test_finished_prompts_wait_in_their_blocks_while_nobody_has_room(lone, monkeypatch):
    folder, prompts, expected = lone["llama"]
    world = World(random.Random(1), 0)
    front = make_front(monkeypatch, world, folder, 1, 1, block_size=8, num_blocks=11, prefix_cache=False)
    ids = [front.add(prompts[i], SamplingParams(max_tokens=12)) for i in (2, 5, 6, 8)]
    outputs, most = [front.requests[i].output for i in ids], 0
    decode = front.workers[1].llm
    while front.requests:
        front.step()
        most = max(most, len(front.workers[0].llm.scheduler.aside))
        assert not decode.scheduler.running or decode.computed_tokens == decode.steps or decode.scheduler.preemptions
    assert [out.token_ids for out in outputs] == [expected[i][:12] for i in (2, 5, 6, 8)] and most > 1


# ---------------------------------------------------------------------------------------------
# Processes

MODULE = """
import os
def no_e(token_ids, logits_V):
    logits_V[101] = -1e9
    return logits_V
def quits(token_ids, logits_V):
    raise SystemExit(3)
def dies(token_ids, logits_V):
    os._exit(7)
"""
PROMPTS = ["The cat sat", "Once upon a time", "One day, Tom went to the park. " * 12, "The dog", "Once upon a time, Tom"]
MANY = [SamplingParams(max_tokens=60), SamplingParams(max_tokens=40, temperature=0.8, seed=3, n=2, logprobs=2),
        SamplingParams(max_tokens=300), SamplingParams(max_tokens=90, temperature=1.2, top_k=20, seed=9),
        SamplingParams(max_tokens=200, stop=("girl", "boy"))]


def is_there(pid):
    """Whether a process lives; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def assert_gone(pids):
    end = time.monotonic() + 30
    while any(map(is_there, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in pids if is_there(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert pids and not left


@pytest.fixture(scope="module")
def demo():
    llm = LLM(HERE / "demo/llama", device="cpu", dtype="float32")
    return llm, llm.generate(PROMPTS, MANY)


def assert_same(outs, expected):
    for out, other in zip(outs, expected, strict=True):
        for mine, theirs in zip(out.samples, other.samples, strict=True):
            assert {name: getattr(mine, name) for name in SAME} == {name: getattr(theirs, name) for name in SAME}
            assert mine.ttft > 0 and (mine.tps > 0 or len(mine.token_ids) == 1)
            assert [list(p) for p in mine.logprobs or ()] == [list(p) for p in theirs.logprobs or ()]


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    (folder / "processors.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("processors")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def front(processors):
    with Disaggregated(HERE / "demo/llama", device="cpu", dtype="float32", num_blocks=70) as front:
        yield front
    assert_gone([worker.process.pid for worker in front.workers])


def test_processes_write_what_one_process_writes(front, demo):
    llm, expected = demo
    assert_same(front.generate(PROMPTS, MANY), expected)
    stats = front.stats()
    assert stats["sent_bytes"] > 0 < stats["sent_seconds"] and stats["blocks"] == 140
    assert stats["blocks_referenced"] == stats["running"] == stats["waiting"] == stats["moving"] == 0
    assert "".join(front.stream(PROMPTS[3], MANY[3])) == expected[3].text
    unseeded = SamplingParams(temperature=1.5, max_tokens=30)
    assert front.generate("The", unseeded)[0].token_ids != front.generate("The", unseeded)[0].token_ids


def test_processes_end_who_is_aborted_and_nobody_else(front, demo):
    ids = [front.add(*one) for one in zip(PROMPTS, MANY)]
    outputs = [front.requests[i].output for i in ids]
    while len(outputs[2].token_ids) < 5:
        front.step()
    front.abort(ids[2])
    front.abort(ids[1])
    late = front.add("The dog")
    front.abort(late)
    while front.requests:
        front.step()
    assert [out.finish_reason for out in outputs[2].samples + outputs[1].samples] == ["abort"] * 3
    assert outputs[2].token_ids == demo[1][2].token_ids[:len(outputs[2].token_ids)]
    for i in (0, 3, 4):
        assert_same([outputs[i]], [demo[1][i]])
    deadline = time.monotonic() + 20
    while front.stats()["blocks_referenced"] and time.monotonic() < deadline:
        pass
    assert front.stats()["blocks_referenced"] == 0


def test_a_request_that_cannot_run_harms_nobody(front, demo, processors):
    ghost = type(sys)("ghost")
    exec("def never(ids, logits): return logits", ghost.__dict__)
    sys.modules["ghost"] = ghost
    try:
        params = [SamplingParams(logits_processor=processors.no_e, max_tokens=20), SamplingParams(logits_processor=lambda i, x: x),
                  SamplingParams(logits_processor=ghost.never, n=2), MANY[0], MANY[0], MANY[0], SamplingParams(logits_processor=processors.quits)]
        outs = front.generate(["The cat sat", "The", "The", "", PROMPTS[0], [5000], "The"], params)
    finally:
        del sys.modules["ghost"]
    (processed,) = demo[0].generate(["The cat sat"], params[0])
    assert_same([outs[0], outs[4]], [processed, demo[1][0]])
    assert "logits_processor cannot travel" in outs[1].error and "prompt is empty" in outs[3].error
    assert all("logits_processor: a worker process cannot load it (ModuleNotFoundError" in s.error for s in outs[2].samples)
    assert "outside the vocabulary" in outs[5].error and outs[6].error == "logits_processor: SystemExit: 3"


def test_a_worker_that_stands_still_is_waited_for_until_ctrl_c(front, demo):
    pid = front.workers[0].process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        ids = [front.add([7] * 800) for _ in range(600)]   # more than a pipe holds
        handing_out = threading.Thread(target=front._assign)
        handing_out.start()
        handing_out.join(20)
        stuck = handing_out.is_alive()
        if not stuck:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                front.step()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not stuck
    for i in ids:
        front.abort(i)
    assert_same(front.generate(PROMPTS, MANY), demo[1])


def test_a_worker_says_why_it_ends(capfd):
    ended, spoilt = workers = [distributed.Process(i, "prefill") for i in range(2)]
    for worker in workers:
        worker.start(1)
    ended.connection.close()
    spoilt.outbox.put(b"nonsense")
    assert [worker.process.wait(60) for worker in workers] == [0, 1]
    assert capfd.readouterr().err.startswith("a message to a worker process cannot be read (UnpicklingError")
    ended.outbox.put(None)
    spoilt.close()


def test_a_worker_that_ends_while_it_starts_is_one_sentence(monkeypatch, capsys):
    start, pids = distributed.Process.start, []

    def start_it(worker, threads):
        start(worker, threads)
        pids.append(worker.process.pid)
        if worker.role == "decode":
            worker.process.kill()
    monkeypatch.setattr(distributed.Process, "start", start_it)
    assert cli.main(["--device", "cpu", "--prompt", "The cat sat", "--disaggregate", "1:1"]) == 1
    assert capsys.readouterr().err == "nanoserve.py: a decode worker has ended (signal 9) while it started: start again\n"
    assert_gone(pids)


@pytest.mark.parametrize("arguments, words", [
    (dict(prefill=0), "prefill is 0"), (dict(decode=1.5), "decode is 1.5"),
    (dict(model="/nowhere"), "/nowhere"), (dict(weights={}), "leave weights out"), (dict(tensor_parallel_size=2), "leave tensor_parallel"), (dict(dtype="int3"), "int3")])
def test_options_that_make_no_sense_are_refused_in_one_sentence(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        Disaggregated(**dict(model=HERE / "demo/llama", device="cpu") | arguments)
    assert "\n" not in str(error.value)


def test_whoever_is_killed_the_tokens_are_the_same_until_nobody_is_left(demo, processors):
    llm, expected = demo
    front = Disaggregated(HERE / "demo/llama", 2, 2, device="cpu", dtype="float32", num_blocks=70)
    pids = [worker.process.pid for worker in front.workers]
    for n, (victim, stopped) in enumerate([(2, False), (0, True)]):
        outputs = [front.requests[front.add(*one)].output for one in zip(PROMPTS, MANY)]
        if stopped:   # it stands still, perhaps in a transfer, before it dies
            os.kill(pids[victim], signal.SIGSTOP)
        for _ in range(5 * n):
            if front.requests and not stopped:
                front.step()
        known = [list(out.token_ids) for out in outputs]
        os.kill(pids[victim], signal.SIGKILL)
        while front.requests:
            front.step()
        assert all(out.token_ids[:len(before)] == before for out, before in zip(outputs, known))
        assert_same(outputs, expected)
    outputs = [front.requests[front.add(*one)].output for one in zip(PROMPTS, MANY)]
    (killer,) = front.generate("The hen", SamplingParams(logits_processor=processors.dies))
    assert killer.error == "a worker process has ended (exit status 7) in its logits_processor: mend it"
    while front.requests:
        front.step()
    assert_same(outputs, expected)
    assert [worker.alive for worker in front.workers] == [False, False, False, True]
    first = front.requests[front.add(PROMPTS[2], MANY[2])].output
    while len(first.token_ids) < 3:
        front.step()
    os.kill(pids[3], signal.SIGKILL)
    (second,) = front.generate("The", MANY[0])
    assert first.finish_reason == second.finish_reason == "error" and first.error == second.error
    assert first.error.startswith("no worker process is left (prefill: signal 9, prefill: exit status 7, ") and front.stats() == dict(moving=0)
    del front
    assert_gone(pids)


def child_of(code):
    """A Python process that runs the code with a front, and the processes of its workers."""
    text = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from distributed import Disaggregated, SamplingParams
front = Disaggregated({str(HERE / "demo/llama")!r}, device="cpu", dtype="float32")
print(*[worker.process.pid for worker in front.workers], flush=True)
""" + textwrap.dedent(code)
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return process, list(map(int, process.stdout.readline().split()))


def test_no_process_outlives_its_front():
    forever = "while True: front.generate(['The cat'] * 8, SamplingParams(max_tokens=900, ignore_eos=True))"
    killed, interrupted = children = child_of(forever), child_of(forever)
    try:
        time.sleep(0.3)
        killed[0].send_signal(signal.SIGKILL)
        interrupted[0].send_signal(signal.SIGINT)
        for process, pids in children:
            process.wait(60)
            assert len(pids) == 2
            assert_gone(pids)
    finally:
        for process, _ in children:
            process.kill()
