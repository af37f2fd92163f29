"""How we know that a request may change its process at any moment, and lose it. (Read it beside distributed.py.)

Two kinds of workers stand behind the front. In the first half they are objects in this process, and hypothesis decides
who acts next, whose word is heard, when a transfer ends, and who dies: the very code of worker and front, in orders that
real processes seldom take. In the second half they are processes.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import distributed
from distributed import Disaggregated, Worker
from nanoserve import LLM, SamplingParams
from reference import NEW

HERE = Path(__file__).parent
SAME = dict.fromkeys(("text", "token_ids", "finish_reason", "error", "prompt_tokens"))


# ---------------------------------------------------------------------------------------------
# A world in this process

class Actor(distributed.Process):
    """A worker that acts when the world says so. It is its own connection."""
    world = None

    def start(self, threads):
        self.heard, self.said, self.worker, self.awake = deque(), deque(), None, True
        self.connection = SimpleNamespace(poll=lambda: bool(self.said) or self.dead, recv=self.say, close=lambda: None)
        self.process = SimpleNamespace(kill=self.kill, wait=lambda: -9)

    def tell(self, *message):
        if self.worker:
            self.heard.append(message)
        elif not hasattr(self, "llm"):
            model, options = message
            self.llm = self.world.engine(model, options)
            self.said.append(("ready", self.llm.pool.num_blocks, self.llm.pool.block_size, self.llm.scheduler.max_seqs))
        else:
            self.worker = Worker(self.llm, lambda *what: self.said.append(what),
                                 {peer: Wire(self, peer) for peer, *_ in message})
            self.world.actors[self.rank] = self
            self.said.append(("linked",))

    def say(self):
        if not self.said:
            raise EOFError
        return self.said.popleft()

    dead = False

    def kill(self):
        self.dead = True

    def act(self):
        """Hear a message, else take a turn."""
        if self.heard:
            name, *what = self.heard.popleft()
            getattr(self.worker, name)(*what)
            self.awake = True
        else:
            self.awake = self.worker.turn()


class Wire:
    """A link on which nothing moves until the world says so."""

    def __init__(self, here, peer):
        self.here, self.peer, self.orders, self.blocks, self.broken = here, peer, deque(), {}, False

    @property
    def there(self):
        return self.here.world.actors[self.peer]

    def send(self, number, blocks):
        self.orders.append((number, blocks))

    def deliver(self):
        """All of a transfer, or its end because one of the two is dead."""
        here, there = self.here, self.there
        if there.dead or self.broken:
            self.orders.clear()
            here.heard.append(("broken", there.rank))
            return
        number, blocks = self.orders.popleft()
        mine, theirs = here.llm.pool, there.llm.pool
        targets, size = there.worker.links[here.rank].blocks.pop(number), 0
        assert blocks is None or len(blocks) == len(targets)
        for source, target in zip(mine.memory, theirs.memory) if blocks else ():
            piece = distributed.gather(source, blocks)
            distributed.scatter(target, targets, piece)
            size += piece.nbytes
        here.heard.append(("sent", number))
        there.heard.append(("came", number, blocks is not None, size, 0.0))


class World:
    """Decides what happens next, by the dice that it is given."""

    def __init__(self, dice, deaths, **options):
        self.dice, self.deaths, self.options, self.weights = dice, deaths, options, None
        self.actors, self.steps = {}, 0

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
        if self.deaths and self.dice.random() < 0.01:
            self.deaths -= 1
            self.dice.choice(alive).dead = True
            for actor in actors:   # who waits to receive notices
                actor.heard += [("broken", peer) for peer, wire in actor.worker.links.items() if wire.there.dead]
            return
        choices = [a.act for a in alive if a.heard or a.awake]
        choices += [wire.deliver for a in alive for wire in a.worker.links.values() if wire.orders]
        assert choices or any(a.connection.poll() for a in actors), "nobody can do anything, and somebody waits"
        if choices:
            self.dice.choice(choices)()

    def settle(self, front):
        """Until nobody has anything left to do."""
        while True:
            front._hear([w.connection for w in front.workers])
            busy = [a for a in self.actors.values() if not a.dead
                    and (a.heard or a.awake or any(w.orders for w in a.worker.links.values()))]
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
            assert not (worker.told or worker.leaving or worker.offers or worker.moving or worker.doomed)
            assert not actor.llm.scheduler.moving and not any(wire.blocks for wire in worker.links.values())
            assert len(pool.free_rows) == len(pool.block_tables_UM)
    assert not front.runs and not front.numbers and not front.requests


PHASES = [Phase.generate] if os.environ.get("FAST") else list(Phase)
PARAMS = st.builds(dict, max_tokens=st.integers(1, NEW), temperature=st.sampled_from([0.0, 0.9]), seed=st.integers(0, 3),
                   n=st.sampled_from([1, 1, 1, 3]), logprobs=st.sampled_from([None, 1]))


@settings(max_examples=60, report_multiple_bugs=False, phases=PHASES)
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
                                         st.sampled_from([0, 0, 0, 3, 9])), min_size=1, max_size=7))
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
                    assert abort_at or not living and sample.error and "no worker process is left" in sample.error, sample
                    assert sample.token_ids == other.token_ids[:n]
                else:
                    assert (sample.token_ids, sample.finish_reason) == (other.token_ids, other.finish_reason)
                assert (sample.logprobs is None) == (params["logprobs"] is None)
                for mine, theirs in zip(sample.logprobs or (), other.logprobs or ()):
                    assert mine.keys() == theirs.keys() or len(mine) == 1
                    assert all(abs(mine[t] - theirs[t]) < 1e-3 for t in mine.keys() & theirs.keys())
                assert sample.logprobs is None or len(sample.logprobs) == n
        check_nothing_is_left(front)
