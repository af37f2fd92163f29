"""Prefill and decode in different processes: cut the work. (Read nanoserve.py and paged_kv.py first.)

A prompt is bound by compute and a decode by memory (roofline.py), and in one loop they wait for each other: a step with
a thousand prompt tokens in it takes everybody's next token with it. Chunks shorten that wait; two processes, each on a
device of its own, end it (DistServe, Zhong et al. 2024; Splitwise, Patel et al. 2024). A request's way:

    front             add ----> job                                                               tokens ----> text
                                 |                                                                  ^
    prefill worker               +-> its prompt is computed, a first token -> set aside             |
                                              K and V of its blocks |                               |
    decode worker                         room is reserved, a prefix found -> blocks come -> its next tokens

Who goes on with a request elsewhere needs its tokens, its parameters and its blocks, and nothing else. A token is a
pure function of logits, key and position (sampling.py), so there is no state of a generator to hand over.

Every worker is a whole LLM with a pool of its own; which role it has only decides what it is asked to do. The front
has no model. It keeps each request with the tokens that it has shown, and is the only one who decides.

What moves. The decode worker looks up what it has by prefix, reserves blocks under the rule by which anybody is admitted,
and says from which block on it wants K and V. They go from pool to pool, past the front, a message per tensor of
`pool.memory` (a block is in as many pieces as there are layers and heads, so they are gathered), over a gloo group of
these two, whose threads leave both loops to their steps. With GPUs they go through host memory. A full decode pool
takes nobody: finished prompts wait on the prefill side, in their blocks. A prompt that begins like one that is on its
way waits for that one, and finds it. A draft model has read nothing there: it reads the text itself. Who is
preempted on the decode side is computed again there.

Who dies. A process can be killed at any moment. The front sees the end of its pipe, and has each request in which that
process had a part run again by who is left, prompt and shown tokens together, as if it had been preempted: the tokens
are the same and none is shown twice. Where nobody of a role is left the others do its work. Each run has a number, and
what is still said about a number that has ended is not heard. Each pair of workers has a group of its own, which breaks
alone. A worker whose pipe ends, as the front is dead, ends at once, in the middle of a step if need be.
"""

from __future__ import annotations

if __name__ == "__main__":   # a worker process; `Disaggregated` starts it
    import sys
    from distributed import work
    work(int(sys.argv[1]))

import inspect
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from bisect import insort
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from weakref import finalize

from device import find_device, uninterrupted   # before torch

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from config import Config, read_config
from linear import fastest_dtype
from nanoserve import LLM, Output, Request
from sampling import SamplingParams, describe, is_int
from tokenizer import load_tokenizer

COUNTS = "reused_tokens", "computed_tokens", "drafted_tokens", "accepted_tokens", "blocks"   # of an Output


@dataclass
class Job:
    """All that it takes to go on with a request elsewhere, but K and V. n continuations are one job until their prompt
    is computed, and n from then on."""
    numbers: list[int]         # of the run of each continuation
    prompt: list[int]
    params: bytes              # pickled: a logits_processor may be unknown elsewhere, and only its request must know
    keys: list[int]            # of the noise of each
    new: list[int]             # tokens that are known already
    max_length: int
    counts: dict[str, int]     # what runs before this one have cost


# ---------------------------------------------------------------------------------------------
# A worker: an LLM whose requests come and go

class Worker:
    """What it hears from the front, and from its links, is the name of a method and its arguments."""

    def __init__(self, llm: LLM, tell, links: dict[int, Link]):
        """tell(name, *what) goes to the front. links: by the number of the worker at the other end."""
        self.llm, self.tell, self.links = llm, tell, links
        self.requests: dict[int, Request] = {}
        self.numbers: dict[Output, int] = {}
        self.told: dict[int, int] = {}          # tokens that the front knows
        self.leaving: set[int] = set()          # who is set aside after its next token
        self.sending: set[int] = set()          # whose blocks are read by a link, and must not be given back
        self.offers: deque[tuple[int, int]] = deque()   # (run, worker that has it), in order of arrival
        self.arriving: dict[int, int] = {}      # run -> worker that sends its blocks, which are reserved here
        self.doomed: set[int] = set()           # of these two: who was aborted meanwhile
        self.sent_bytes, self.sent_seconds = 0, 0.0

    def turn(self) -> bool:
        """Reserve room, run a step, tell what has grown. False if there was nothing to run."""
        self._take_offers()
        steps, grown = self.llm.steps, []
        for out in self.llm.step():
            number = self.numbers[out]
            request, told = self.requests[number], self.told[number]
            parked = number in self.leaving and not out.finish_reason
            if parked:
                self.llm.scheduler.running.remove(request)
                self.llm.scheduler.moving.append(request)
            self.told[number] = len(out.token_ids)
            self.leaving.discard(number)
            counts = {name: getattr(out, name) for name in COUNTS}
            logprobs = out.logprobs and out.logprobs[told:]
            grown.append((number, out.token_ids[told:], logprobs, counts, out.error, parked))
            if out.finish_reason:
                self._forget(number)
        if grown:
            self.tell("grown", grown)
        return self.llm.steps > steps

    # --- from the front

    def run(self, job: Job, leave: bool):
        """Compute a prompt. leave: up to its next token, and then another worker goes on."""
        siblings = self._requests(job)
        if siblings:
            self.llm.scheduler.waiting.append(siblings[0])
            self.llm.scheduler.usage = 0.0 if leave else 1.0   # of its allowance it needs nothing here, or who knows
            self.leaving.update(job.numbers if leave else ())

    def offer(self, job: Job, source: int):
        """Go on with a request that another worker holds, when there is room for it."""
        if self._requests(job):
            self.offers.append((job.numbers[0], source))

    def hand_over(self, number: int, target: int, skip: int):
        """Send the blocks of a request that was set aside, but so many at its beginning. If it is no longer here, who
        waits for them is told."""
        request, blocks = self.requests.get(number), None
        if request:
            self.sending.add(number)
            blocks = request.table.blocks[skip:self.llm.pool.blocks_for(request.computed)]
        self.links[target].send(number, blocks)

    def keep(self, number: int):
        """Nobody takes a request that was set aside: it stays."""
        if number in self.requests:
            self.llm.scheduler.usage = 1.0
            self._go_on(number)

    def abort(self, numbers: list[int]):
        for number in numbers:
            if number in self.sending or number in self.arriving:
                self.doomed.add(number)
            elif number in self.requests:
                self._drop(number)

    def stats(self):
        self.tell("stats", self.llm.stats() | dict(sent_bytes=self.sent_bytes, sent_seconds=self.sent_seconds))

    # --- from the links

    def sent(self, number: int):
        self.sending.discard(number)
        self._drop(number)

    def came(self, number: int, there: bool, sent_bytes: int, seconds: float):
        """The answer to what was asked for in `_take_offers`: K and V are in the blocks, or the other side has none."""
        del self.arriving[number]
        self.sent_bytes, self.sent_seconds = self.sent_bytes + sent_bytes, self.sent_seconds + seconds
        if number in self.doomed or not there:
            self._drop(number)
        else:
            self._go_on(number)
            self.tell("arrived", number)

    def broken(self, source: int):
        """The link of this worker has broken: what was to come will not."""
        self.links[source].broken = True
        for number in [n for n, worker in self.arriving.items() if worker == source]:
            del self.arriving[number]
            self._lose(number)

    # --- inside

    def _take_offers(self):
        """Reserve blocks for those who are offered, in their order, and ask for what is not here."""
        llm, pool = self.llm, self.llm.pool
        while self.offers:
            number, source = self.offers[0]
            request = self.requests[number]
            tokens, table = request.tokens, request.table
            if self.links[source].broken:
                self.offers.popleft()
                self._lose(number)
                continue
            names = pool.names(table, tokens, len(tokens) - 1)
            coming = {name for n in self.arriving for name in self.requests[n].table.digests}
            if any(name in coming and name not in pool.index for name in names) and pool.prefix_cache:
                return
            if llm.scheduler.waiting or not llm.scheduler.find_room(request):
                return
            self.offers.popleft()
            llm.scheduler.moving.append(request)
            llm.scheduler.reused_tokens += request.computed
            skip = len(pool.names(table, tokens, request.computed))
            self.arriving[number] = source
            self.links[source].blocks[number] = table.blocks[skip:pool.blocks_for(len(tokens) - 1)]
            self.tell("taken", number, source, skip)

    def _requests(self, job: Job) -> list[Request]:
        """The job's requests as this engine knows them; none if their parameters cannot be read here."""
        try:
            params = pickle.loads(job.params)
        except Exception as error:   # a stranger's function
            sentence = f"logits_processor: another process cannot read it ({describe(error)}): put it into a module"
            self.tell("grown", [(number, [], None, job.counts, sentence, False) for number in job.numbers])
            return []
        siblings = self.llm.siblings(job.prompt, params, job.keys)
        for number, request in zip(job.numbers, siblings):
            self.requests[number], self.numbers[request.output], self.told[number] = request, number, len(job.new)
            request.max_length = job.max_length
            vars(request.output).update(job.counts)
            for token in job.new:
                request.append(token, self.llm.config.eos, time.perf_counter())
            if params.logprobs is not None:
                request.output.logprobs = [{}] * len(job.new)   # the front has them
        return siblings

    def _go_on(self, number: int):
        """The request runs here from now on, in the order of arrival: K and V of all tokens but the last are here."""
        request, scheduler = self.requests[number], self.llm.scheduler
        scheduler.moving.remove(request)
        request.computed, request.admitted = len(request.tokens) - 1, True
        scheduler.pool.commit(request.table, request.tokens, request.computed)
        insort(scheduler.running, request, key=lambda r: r.output.id)

    def _lose(self, number: int):
        self._drop(number)
        self.tell("lost", number)

    def _drop(self, number: int):
        """Whoever is to go on with this request, it is not this worker."""
        request = self.requests[number]
        request.output.finish_reason = "abort"
        self.offers = deque(offer for offer in self.offers if offer[0] != number)
        self.llm._drop(request)
        self._forget(number)

    def _forget(self, number: int):
        del self.numbers[self.requests.pop(number).output], self.told[number]
        self.leaving.discard(number)
        self.doomed.discard(number)


class Link:
    """The way of K and V from a prefill worker to a decode worker, with a thread at each end."""

    def __init__(self, pool, inbox: SimpleQueue, peer: int, name: str, port: int, sends: bool):
        """inbox: where the worker hears of what has gone or come. peer: the worker at the other end. name, port: of the
        store in which the two find each other."""
        self.pool, self.inbox, self.peer = pool, inbox, peer
        self.orders, self.blocks, self.broken = SimpleQueue(), {}, False   # blocks: run -> where its K and V go
        threading.Thread(target=self._work, args=(name, port, sends), daemon=True).start()

    def send(self, number: int, blocks: list[int] | None):
        """In the order of the calls, while the worker goes on. None: there is nothing to send, and the peer is told."""
        self.orders.put((number, blocks))

    def _work(self, name: str, port: int, sends: bool):
        try:
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = [ProcessGroupGloo.create_device("127.0.0.1")], timedelta(days=20)
            store = PrefixStore(name, TCPStore("127.0.0.1", port, is_master=False))
            self.group = ProcessGroupGloo(store, int(sends), 2, options)
            while True:
                self._send() if sends else self._receive()
        except RuntimeError:   # the peer is dead. The front notices, too
            self.inbox.put(("broken", self.peer))
            while sends:
                self.inbox.put(("sent", self.orders.get()[0]))

    def _send(self):
        number, blocks = self.orders.get()
        try:
            self.group.send([torch.tensor([number, blocks is not None])], 0, 0).wait()
            for piece in gather(self.pool.memory, blocks or []):
                self.group.send([piece.cpu()], 0, 0).wait()
        finally:
            if blocks is not None:
                self.inbox.put(("sent", number))

    def _receive(self):
        word = torch.empty(2, dtype=torch.int64)
        self.group.recv([word], 1, 0).wait()
        (number, there), begin, size = word.tolist(), time.perf_counter(), 0
        blocks = self.blocks.pop(number)
        for memory in self.pool.memory if there and blocks else ():
            piece = torch.empty_like(memory[:, :, :len(blocks)], device="cpu", memory_format=torch.contiguous_format)
            self.group.recv([piece], 1, 0).wait()
            scatter(memory, blocks, piece)
            size += piece.nbytes
        self.inbox.put(("came", number, bool(there), size, time.perf_counter() - begin))


def gather(memories: tuple[Tensor, ...], blocks: list[int]):
    """Of each memory [layers, heads, N, ...] these blocks, side by side."""
    for memory in memories if blocks else ():
        yield memory.index_select(2, torch.tensor(blocks, device=memory.device))


def scatter(memory: Tensor, blocks: list[int], piece: Tensor):
    """The other way round, for one memory."""
    memory.index_copy_(2, torch.tensor(blocks, device=memory.device), piece.to(memory.device))


def work(descriptor: int):
    """The life of a worker process: messages between steps, until the front closes the pipe or is dead."""
    connection, inbox = Connection(descriptor), SimpleQueue()

    def listen():
        try:
            while True:
                inbox.put(connection.recv())
        finally:   # the pipe has ended
            os._exit(0)
    threading.Thread(target=listen, daemon=True).start()

    def tell(*message):
        with suppress(OSError):
            connection.send(message)
    try:
        model, options = inbox.get()
        llm = LLM(model, **options)
        tell("ready", llm.pool.num_blocks, llm.pool.block_size, llm.scheduler.max_seqs)
        worker = Worker(llm, tell, {peer: Link(llm.pool, inbox, peer, *more) for peer, *more in inbox.get()})
        idle = True
        while True:
            while idle or not inbox.empty():
                name, *what = inbox.get()
                getattr(worker, name)(*what)
                idle = False
            idle = not worker.turn()
    except Exception as error:
        tell("failed", error)
        os._exit(1)


# ---------------------------------------------------------------------------------------------
# The front: an LLM whose turns happen elsewhere

@dataclass(eq=False)
class Process:
    """A worker process, as the front knows it."""
    rank: int
    role: str                            # "prefill" | "decode"
    process: subprocess.Popen | None = None
    connection: Connection | None = None
    alive: bool = True
    end: str = ""                        # why it ended, if it said so

    def start(self, threads: int):
        ours, theirs = socket.socketpair()
        environment = dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        # A session of its own: Ctrl-C in the terminal is for the front.
        self.process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                                        stdin=subprocess.DEVNULL, start_new_session=True, env=os.environ | environment)
        theirs.close()
        self.connection = Connection(ours.detach())

    def tell(self, *message):
        with suppress(OSError):   # it is dead, which its pipe will say
            self.connection.send(message)

    def close(self):
        self.alive = False
        self.connection.close()
        self.process.kill()
        self.process.wait()


def close_all(workers: list[Process]):
    for worker in workers:
        if worker.alive:
            worker.close()


@dataclass(eq=False)
class Run:
    """A request in the hands of a worker."""
    request: Request
    worker: Process
    target: Process | None = None   # who is to go on with it
    begun: bool = False             # it has brought a token


class Disaggregated(LLM):
    """LLM's interface, with so many processes for prompts and for decodes, each an LLM of the same model.

    prefill, decode: processes of each role. Other options are those of LLM, and hold for each process: each has a pool
    of num_blocks. On a CPU they share the threads; several GPUs are taken in turn. `close`, a `with` block or the end
    of the program ends the processes. `logits` and watchers are for an LLM in this process.
    Raises ValueError, in one sentence, for what LLM refuses, here or in a worker.
    """

    def __init__(self, model: str | Path | Config, prefill: int = 1, decode: int = 1, device: str = "auto",
                 dtype: str = "auto", **options):
        inspect.signature(LLM).bind(model, device, dtype, **options)   # TypeError for an option that LLM does not have
        for what, number in (("prefill", prefill), ("decode", decode)):
            if not is_int(number) or not 0 < number <= 64:
                raise ValueError(f"{what} is {str(number)[:50]}: it must be a number of processes from 1 to 64")
        if options.get("weights") is not None:
            raise ValueError("weights cannot be shared between processes: leave weights out")
        self.folder = None if isinstance(model, Config) else Path(model)
        self.config = c = read_config(self.folder) if self.folder else model
        self.tokenizer = load_tokenizer(self.folder) if self.folder else None
        self.device, self.dtype, self.dtype_reason = find_device(device), dtype, "as asked"
        if dtype == "auto":   # once for all: their K and V must be of one kind
            self.dtype, self.dtype_reason = fastest_dtype(c.dtype, self.device, c.I, c.E)
        self.speculator = options.get("speculative_model")
        self.requests: dict[int, Request] = {}
        self.waiting: list[list[Request]] = []    # siblings whom no worker has yet
        self.runs: dict[int, Run] = {}
        self.numbers: dict[Request, int] = {}     # of each one's run
        self.counter = count()
        self.grown: dict[Output, None] = {}
        self.stepping, self.doomed, self.next_id, self.watchers = False, [], 0, []
        self.workers = [Process(i, "prefill" if i < prefill else "decode") for i in range(prefill + decode)]
        self.close = finalize(self, close_all, self.workers)   # also at the program's end
        try:
            self._start(model, device, options)
        except BaseException:
            self.close()
            raise

    def _start(self, model, device: str, options: dict):
        """Processes that have loaded the model and are linked, each prefill worker with each decode worker."""
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for worker in self.workers:
            worker.start(max(1, torch.get_num_threads() // len(self.workers)))
            if self.device.type == "cuda" and self.device.index is None:
                device = f"cuda:{worker.rank % torch.cuda.device_count()}"
            worker.tell(model, dict(device=device, dtype=self.dtype, **options))
        facts = []
        for worker in self.workers:
            try:
                name, *what = worker.connection.recv()
            except (EOFError, OSError):
                raise RuntimeError("a worker process ended while it loaded the model") from None
            if name == "failed":
                raise what[0]
            facts.append(what)
        sizes, block_sizes, max_seqs = zip(*facts)
        self.pool = SimpleNamespace(num_blocks=min(sizes), block_size=block_sizes[0])   # what holds for each of them
        self.scheduler = SimpleNamespace(max_seqs=min(max_seqs))
        for worker in self.workers:
            peers = [other for other in self.workers if other.role != worker.role]
            worker.tell(*((peer.rank, "-".join(map(str, sorted((peer.rank, worker.rank)))), self.store.port,
                           worker.role == "prefill") for peer in peers))

    def __enter__(self) -> Disaggregated:
        return self

    def __exit__(self, *error):
        self.close()

    # --- LLM's methods that differ

    @uninterrupted
    def add(self, prompt: str | list[int], params: SamplingParams = SamplingParams()) -> int:
        """As LLM's. Raises ValueError also for a logits_processor that cannot travel."""
        try:
            pickle.dumps(params)
        except Exception:
            raise ValueError("logits_processor cannot travel to another process, as pickle does not take it: make it a "
                             "function of a module, or use LLM") from None
        siblings = self.siblings(prompt, params)
        self.waiting.append(siblings)
        return siblings[0].output.id

    def _turn(self):
        """Hand out what waits, then hear what the workers have to say, and wait for it if need be."""
        self._assign()
        if self.requests:
            self._hear(wait([worker.connection for worker in self._alive()]))   # which Ctrl-C may end

    def _drop(self, request: Request):
        del self.requests[request.output.id]
        if request in self.numbers:
            number = self.numbers.pop(request)
            run = self.runs.pop(number)
            for worker in filter(None, (run.worker, run.target)):
                if request.output.finish_reason == "abort":
                    worker.tell("abort", [number])

    def stats(self) -> dict[str, int | float]:
        """As LLM's, summed over the workers that live; and the requests that are moving or wait to, bytes of K and V
        sent so far, and the seconds in which they travelled."""
        self.answers = {}
        asked = self._alive()
        for worker in asked:
            worker.tell("stats")
        while missing := [worker for worker in asked if worker.alive and worker not in self.answers]:
            self._hear(wait([worker.connection for worker in missing]))
        total = dict(moving=sum(run.target is not None for run in self.runs.values()))
        for answer in self.answers.values():
            total = {name: total.get(name, 0) + answer.get(name, 0) for name in total | answer}
        return total

    # --- who does what

    def _alive(self, role: str | None = None) -> list[Process]:
        return [worker for worker in self.workers if worker.alive and role in (None, worker.role)]

    @uninterrupted
    def _assign(self):
        waiting, self.waiting = self.waiting, []
        for siblings in waiting:
            if siblings[0].output.finish_reason is None:   # else it was aborted
                self._run(siblings)

    def _run(self, requests: list[Request], stay: bool = False):
        """Give a prompt with its continuations, or one of them that has begun, to who has the fewest tokens to compute
        before a first one comes. stay: nobody else is to go on with it then."""
        workers = self._alive("prefill") or self._alive()
        if not workers:
            ends = {worker.end for worker in self.workers}
            for request in requests:
                request.output.finish_reason = "error"
                request.output.error = f"no worker process is left ({', '.join(sorted(ends))}): make a new Disaggregated"
                self.grown[request.output] = None
                self._drop(request)
            return
        loads = {worker: 0 for worker in workers}
        for run in self.runs.values():
            if not run.begun and run.worker in loads:
                loads[run.worker] += len(run.request.tokens)
        worker = min(workers, key=loads.get)
        numbers = [next(self.counter) for _ in requests]
        for number, request in zip(numbers, requests):
            self.runs[number], self.numbers[request] = Run(request, worker), number
        leave = worker.role == "prefill" and not stay and bool(self._alive("decode"))
        worker.tell("run", self._job(numbers, requests), leave)

    def _job(self, numbers: list[int], requests: list[Request]) -> Job:
        first = requests[0]
        out = first.output
        params = pickle.dumps(replace(first.params, n=len(requests)))
        return Job(numbers, first.tokens[:out.prompt_tokens], params, [request.key for request in requests],
                   out.token_ids, first.max_length, {name: getattr(out, name) for name in COUNTS})

    def _offer(self, number: int, run: Run):
        """To the decode worker whose requests may come to need the fewest blocks."""
        workers = self._alive("decode")
        if not workers:
            run.worker.tell("keep", number)
            return
        loads = {worker: 0 for worker in workers}
        for other in self.runs.values():
            if (other.target or other.worker) in loads:
                loads[other.target or other.worker] += -(-other.request.max_length // self.pool.block_size)
        run.target = min(workers, key=loads.get)
        run.target.tell("offer", self._job([number], [run.request]), run.worker.rank)

    # --- what the workers say

    @uninterrupted
    def _hear(self, connections: list[Connection]):
        """Everything that has come through these."""
        for worker in self._alive():
            try:
                while worker.connection in connections and worker.alive and worker.connection.poll():
                    name, *what = worker.connection.recv()
                    getattr(self, f"_on_{name}")(worker, *what)
            except (EOFError, OSError):
                self._bury(worker)

    def _on_grown(self, worker: Process, entries: list[tuple]):
        now = time.perf_counter()
        for number, tokens, logprobs, counts, error, parked in entries:
            if number not in self.runs:
                continue
            run = self.runs[number]
            request, out, run.begun = run.request, run.request.output, True
            vars(out).update(counts)
            try:
                for token in tokens:
                    request.append(token, self.config.eos, now)
                if logprobs:
                    out.logprobs += logprobs
            except Exception as failure:   # a tokenizer's: it ends alone, as in LLM
                error = describe(failure)
            if error:
                out.finish_reason, out.error = "error", error
            self.grown[out] = None
            if out.finish_reason:
                self._drop(request)
            elif parked:
                self._offer(number, run)

    def _on_taken(self, worker: Process, number: int, source: int, skip: int):
        self.workers[source].tell("hand_over", number, worker.rank, skip)   # who answers, whatever has become of it

    def _on_arrived(self, worker: Process, number: int):
        if number in self.runs:
            self.runs[number].worker, self.runs[number].target = worker, None

    def _on_lost(self, worker: Process, number: int):
        if number in self.runs:
            self._again(number, stay=True)

    def _on_stats(self, worker: Process, answer: dict):
        self.answers[worker] = answer

    def _on_failed(self, worker: Process, error: Exception):
        worker.end = describe(error)

    def _bury(self, worker: Process):
        """Everything in which a dead worker had a part is run again, in the order of arrival."""
        worker.close()
        code = worker.process.returncode
        worker.end = worker.end or f"{worker.role} worker ended by {f'signal {-code}' if code < 0 else f'exit {code}'}"
        had = [number for number, run in self.runs.items() if worker in (run.worker, run.target)]
        for number in sorted(had, key=lambda number: self.runs[number].request.output.id):
            self._again(number)

    def _again(self, number: int, stay: bool = False):
        """Under a new number, and who lives and knows the old one forgets it."""
        run = self.runs.pop(number)
        for worker in filter(None, (run.worker, run.target)):
            worker.tell("abort", [number])
        self._run([run.request], stay)
