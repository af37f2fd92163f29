"""Prefill and decode in different processes: cut the work. (Read nanoserve.py and paged_kv.py first.)

A prompt is bound by compute and a decode by memory (roofline.py), and in one loop they wait for each other: a step with
a thousand prompt tokens makes everybody's next token late. Chunks shorten that wait. Two processes, each on a device of
its own, leave only the move, before the second token (DistServe, Zhong et al. 2024; Splitwise, Patel et al. 2024). The
front gives a request to a worker as a run, which messages take from one state to the next:

    a run is     after           where
    waiting      compute         in the queue of a prefill worker
    running      -               its prompt is computed there, up to a first token
    set aside    grown           it stays in its blocks, and gets no tokens
    offered      offer           in the queue of a decode worker, too
    taken        taken           blocks are reserved there; `hand_over` says which K and V it wants
    sent         sent, came      from thread to thread; the prefill worker forgets it
    running      arrived         there, with more `grown`, until it ends, or is `lost` and begins again

Who goes on with a request elsewhere needs its tokens, its parameters and its blocks. Nothing else: a token is a pure
function of logits, key and position (sampling.py), so there is no generator whose state would have to follow.

What moves. The decode worker looks up what it has by prefix, reserves blocks under the rule by which anybody is
admitted, and says from which block on it wants K and V. They go from pool to pool, past the front, in one message per
tensor of `pool.memory`: a block is in as many pieces as there are layers and heads, so they are gathered. (From and to
a GPU they go through host memory.) Threads send and receive, and both loops go on. Full blocks of a prompt with n
continuations are sent once. A draft model's K and V do not travel: it reads the prompt again. A full decode pool takes
nobody: then finished prompts wait in their blocks on the prefill side. A prompt that begins like one that is on its way
waits for that one, and finds it; so does everyone behind it. Who is preempted on the decode side is computed there.

Who dies. The front, which has no model, keeps each request with the tokens that it has shown. It sees the end of a
worker's pipe, and has everything in which that worker had a part run again by those who are left, prompt and shown
tokens together, as if it had been preempted: the tokens are the same, and none is shown twice. (A request that ends
workers is an error: `_again`.) Every worker is a whole LLM, so where nobody of a role is left the others do its work.
Each run has a number, and what is said of a number that has ended is not heard. A prefill worker has a gloo group with
each decode worker, which breaks alone. When the front is dead, its workers see the end of their pipes and end at once,
also in the middle of a step. A process that stands still (SIGSTOP) is not dead: it is waited for, until Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":   # a worker process, which `Disaggregated` starts
    import sys
    from distributed import work
    work(int(sys.argv[1]))

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from bisect import insort
from collections import Counter, deque
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from weakref import finalize

from device import find_device, uninterrupted   # before torch

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from config import Config, read_config
from linear import fastest_dtype
from nanoserve import LLM, Output, Request
from parallel import FOREVER, Broken
from sampling import SamplingParams, describe, is_int
from tokenizer import load_tokenizer


@dataclass
class Job:
    """What it takes to go on with a request elsewhere, but K and V. Its n continuations, too, until it has a token."""
    number: int                # of its run; further continuations have the next numbers
    prompt: list[int]
    params: bytes              # pickled: where nobody knows its logits_processor, this request fails, and no other
    keys: list[int]            # of the noise of each continuation
    new: list[int]             # tokens that are known already
    max_length: int
    counts: dict[str, int]     # what runs before this one have cost


def counts_of(out: Output) -> dict[str, int]:
    names = "reused_tokens", "computed_tokens", "drafted_tokens", "accepted_tokens", "blocks"
    return {name: getattr(out, name) for name in names}


# ---------------------------------------------------------------------------------------------
# A worker: an LLM whose requests come and go

class Worker:
    """An LLM whose requests have the numbers of their runs. What it hears, from the front and from its links, are names
    of methods and their arguments."""

    def __init__(self, llm: LLM, tell, links: dict[int, Link]):
        """tell(name, *arguments) goes to the front. links: by the number of the worker at the other end."""
        self.llm, self.tell, self.links = llm, tell, links
        self.told: dict[int, int] = {}          # run -> tokens that the front knows
        self.leaving: set[int] = set()          # who is set aside after its next token
        self.offers: deque[tuple[int, int]] = deque()   # (run, the worker that has it), in order of arrival
        self.transfers: dict[int, int] = {}     # run -> worker to or from which its blocks are sent now
        self.doomed: set[int] = set()           # of these, who was aborted: the blocks are in use until they are sent
        self.sent_bytes, self.sent_seconds = 0, 0.0

    def turn(self) -> bool:
        """Reserve room, run a step, tell what has grown. False if there was nothing to run."""
        self._take_offers()
        steps, grown = self.llm.steps, []
        for out in self.llm.step():
            told, aside = self.told[out.id], out.id in self.leaving and not out.finish_reason
            if aside:
                self.llm.scheduler.running.remove(self.llm.requests[out.id])
                self.llm.scheduler.aside.append(self.llm.requests[out.id])
            self.leaving.discard(out.id)
            grown.append((out.id, out.token_ids[told:], out.logprobs and out.logprobs[told:], counts_of(out), out.error,
                          aside))
            self.told[out.id] = len(out.token_ids)
            if out.finish_reason:
                del self.told[out.id]
        if grown:
            self.tell("grown", grown)
        return self.llm.steps > steps

    # --- from the front

    def compute(self, job: Job, leave: bool):
        """Run a prompt. leave: up to its next token, and then another worker goes on."""
        if siblings := self._requests(job):
            self.llm.scheduler.waiting.append(siblings[0])
            # 0: who leaves after one token needs no room for an answer; 1: who stays may need all of it. On a decode
            # worker, which prompts reach when no prefill worker is left, this replaces what it has learned.
            self.llm.scheduler.usage = 0.0 if leave else 1.0
            self.leaving |= {request.output.id for request in siblings if leave}

    def offer(self, job: Job, source: int):
        """Go on with a request that another worker has, when there is room for it."""
        if self._requests(job):
            self.offers.append((job.number, source))

    def hand_over(self, number: int, target: int, skip: int):
        """Send a request's blocks, all but so many. If it has gone, tell the other side, which waits for it."""
        blocks, link = None, self.links[target]
        if number in self.told:
            request, self.transfers[number] = self.llm.requests[number], target
            blocks = request.table.blocks[skip:self.llm.pool.blocks_for(request.computed)]
        link.orders.put((number, blocks))
        if link.broken:   # and nobody listens
            self.broken(target)

    def abort(self, number: int):
        if number in self.transfers:
            self.doomed.add(number)
        elif number in self.told:
            self._forget(number)

    def stats(self):
        self.tell("answer", self.llm.stats() | dict(sent_bytes=self.sent_bytes, sent_seconds=self.sent_seconds))

    # --- from the links

    def sent(self, number: int):
        """The other side has it now."""
        if self.transfers.pop(number, None) is not None:
            self._forget(number)

    def came(self, number: int, there: bool, size: int, seconds: float):
        """The answer to `hand_over`: K and V are in the blocks, or the other side has none."""
        del self.transfers[number]
        self.sent_bytes, self.sent_seconds = self.sent_bytes + size, self.sent_seconds + seconds
        if number in self.doomed or not there:
            self._forget(number)
        else:
            self._go_on(self.llm.requests[number])
            self.tell("arrived", number)

    def broken(self, peer: int):
        """The link has broken: what was on its way is lost."""
        self.links[peer].broken = True
        for number in [number for number, other in self.transfers.items() if other == peer]:
            self._forget(number, lost=True)

    # --- inside

    def _take_offers(self):
        """Reserve blocks for those who are offered, in their order, and say which are wanted."""
        scheduler, pool = self.llm.scheduler, self.llm.pool
        while self.offers and not scheduler.waiting:
            number, source = self.offers[0]
            request = self.llm.requests[number]
            if self.links[source].broken:
                self._forget(number, lost=True)
                continue
            computed, table = len(request.tokens) - 1, request.table
            names = pool.names(table, request.tokens, computed)
            coming = {name for n in self.transfers for name in self.llm.requests[n].table.digests}
            if pool.prefix_cache and any(name in coming and name not in pool.index for name in names):
                return   # a block of it is on its way: wait, and find it in the index
            if not scheduler.find_room(request):
                return
            self.offers.popleft()
            scheduler.aside.append(request)
            scheduler.reused_tokens += request.computed
            self.transfers[number], skip = source, pool.blocks_for(request.computed)
            self.links[source].blocks[number] = table.blocks[skip:pool.blocks_for(computed)]
            self.tell("taken", number, source, skip)

    def _requests(self, job: Job) -> list[Request]:
        """The job's requests as they are known here; none if their parameters cannot be read."""
        numbers = range(job.number, job.number + len(job.keys))
        self.tell("trying", *numbers)
        try:
            params = pickle.loads(job.params)
        except Exception as error:   # a stranger's function
            sentence = f"logits_processor: a worker process cannot load it ({describe(error)}): put it into a module"
            self.tell("grown", [(number, [], None, job.counts, sentence, False) for number in numbers])
            return []
        self.llm.next_id = job.number
        siblings = self.llm.siblings(job.prompt, params, job.keys)
        self.told |= dict.fromkeys(numbers, len(job.new))
        for request in siblings:
            if stranger := params.logits_processor:
                request.params = replace(params, logits_processor=partial(self._call, request.output.id, stranger))
            request.max_length = job.max_length
            vars(request.output).update(job.counts)
            for token in job.new:
                request.append(token, self.llm.config.eos, time.perf_counter())
            if params.logprobs is not None:
                request.output.logprobs = [{}] * len(job.new)   # the front has them
        return siblings

    def _call(self, number: int, stranger, *arguments):
        self.tell("at", number)   # it can end this process: then the front knows whose it is
        logits_V = stranger(*arguments)
        self.tell("at", -1)
        return logits_V

    def _go_on(self, request: Request):
        """It runs here from now on, in the order of arrival: K and V of all its tokens but the last are here."""
        scheduler = self.llm.scheduler
        scheduler.aside.remove(request)
        request.computed, request.admitted = len(request.tokens) - 1, True
        scheduler.pool.commit(request.table, request.tokens, request.computed)
        insort(scheduler.running, request, key=lambda r: r.output.id)

    def _forget(self, number: int, lost: bool = False):
        """Whoever is to go on with this request, it is not this worker. lost: nobody is yet."""
        self.llm.requests[number].output.finish_reason = "abort"
        self.llm._drop(self.llm.requests[number])
        self.offers = deque(offer for offer in self.offers if offer[0] != number)
        del self.told[number]
        self.transfers.pop(number, None)
        self.leaving.discard(number)
        self.doomed.discard(number)
        if lost:
            self.tell("lost", number)


class Link:
    """The way of K and V from a prefill worker to a decode worker, with a thread at each end."""

    def __init__(self, pool, inbox: SimpleQueue, peer: int, name: str, port: int, sends: bool):
        """Returns when the peer is there, too. inbox: where the worker hears of what has gone or come. peer: the worker
        at the other end. name, port: of the store in which the two find each other."""
        self.pool, self.inbox, self.peer, self.broken = pool, inbox, peer, False
        self.orders = SimpleQueue()   # (run, its blocks to send; None: it has gone, and the peer is told)
        self.blocks: dict[int, list[int]] = {}   # run -> where its K and V go
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [ProcessGroupGloo.create_device("127.0.0.1")], FOREVER
        store = TCPStore("127.0.0.1", port, is_master=False)
        self.group = ProcessGroupGloo(PrefixStore(name, store), int(sends), 2, options)
        threading.Thread(target=self._work, args=(self._send if sends else self._receive,), daemon=True).start()

    def _work(self, task):
        try:
            while True:
                task()
        except Exception:        # the peer is dead, or a tensor found no memory here
            self.group = None    # this breaks the connection, so the other end notices, too
            self.inbox.put(("broken", self.peer))

    def _send(self):
        number, blocks = self.orders.get()
        self.group.send([torch.tensor([number, blocks is not None])], 0, 0).wait()
        for memory in self.pool.memory if blocks else ():
            piece = memory.index_select(2, torch.tensor(blocks, device=memory.device))   # blocks side by side
            self.group.send([piece.cpu()], 0, 0).wait()
        self.inbox.put(("sent", number))

    def _receive(self):
        word = torch.empty(2, dtype=torch.int64)
        self.group.recv([word], 1, 0).wait()
        (number, there), begin, size = word.tolist(), time.perf_counter(), 0
        blocks = self.blocks.pop(number)
        for memory in self.pool.memory if there and blocks else ():
            piece = torch.empty([*memory.shape[:2], len(blocks), *memory.shape[3:]], dtype=memory.dtype)
            self.group.recv([piece], 1, 0).wait()
            memory.index_copy_(2, torch.tensor(blocks, device=memory.device), piece.to(memory.device))
            size += piece.nbytes
        self.inbox.put(("came", number, bool(there), size, time.perf_counter() - begin))


def work(descriptor: int):
    """The life of a worker process: messages between steps, until the front closes the pipe or is dead."""
    connection, inbox = Connection(descriptor), SimpleQueue()

    def listen():
        try:
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):   # the pipe has ended
            os._exit(0)
        except BaseException as error:
            print(f"a message to a worker process cannot be read ({describe(error)})", file=sys.stderr, flush=True)
            os._exit(1)

    def tell(*message):
        with suppress(OSError):   # `listen` knows
            connection.send(message)
    threading.Thread(target=listen, daemon=True).start()
    try:
        model, options = inbox.get()
        llm = LLM(model, **options)
        tell("answer", llm.pool.num_blocks, llm.pool.block_size, llm.scheduler.max_seqs)
        worker = Worker(llm, tell, {peer: Link(llm.pool, inbox, peer, *more) for peer, *more in inbox.get()})
        tell("answer")
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
    """A worker, as the front knows it."""
    rank: int
    role: str          # "prefill" | "decode"
    alive: bool = True
    end: str = ""      # why it has ended
    error: Exception | None = None
    at: int = -1       # the run in whose logits_processor it is; -1: in none
    process: subprocess.Popen | None = None

    def start(self, threads: int):
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        environment = dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        self.process = subprocess.Popen(   # in a session of its own: Ctrl-C is for the front
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | environment)
        theirs.close()
        self.outbox = SimpleQueue()
        threading.Thread(target=self._post, daemon=True).start()

    def tell(self, *message):
        self.outbox.put(pickle.dumps(message))

    def _post(self):
        """In a thread: a worker that stands still and reads nothing holds up nobody else, and no Ctrl-C."""
        with suppress(OSError):   # it is dead, as its pipe will say
            for message in iter(self.outbox.get, None):
                self.connection.send_bytes(message)

    def close(self, why: str = ""):
        self.process.kill()
        code = self.process.wait()
        self.outbox.put(None)
        self.connection.close()
        self.alive, self.end = False, self.end or why or (f"signal {-code}" if code < 0 else f"exit status {code}")


def close_all(workers: list[Process]):
    for worker in workers:
        if worker.alive and worker.process:
            worker.close("closed")


@dataclass(eq=False)
class Run:
    """A request in the hands of a worker."""
    request: Request
    worker: Process
    target: Process | None = None   # who is to go on with it
    begun: bool = False             # it has brought a token
    tried: bool = False             # its worker has begun something with it that has brought no token yet


class Disaggregated(LLM, AbstractContextManager):
    """LLM's interface before processes for prompts and processes for decodes.

    prefill, decode: how many there are of each. Other options are those of LLM and hold for each process: each has a
    pool of num_blocks. On a CPU they share threads and memory; several GPUs are taken in turn. `close()`, the end of a
    `with` block or of the program ends them. There are no `logits` and no watchers. Raises ValueError as LLM does.
    """

    def __init__(self, model: str | Path | Config, prefill: int = 1, decode: int = 1, device: str = "auto",
                 dtype: str = "auto", **options):
        for what, number in (("prefill", prefill), ("decode", decode)):
            if not is_int(number) or not 0 < number <= 64:
                raise ValueError(f"{what} is {str(number)[:50]}: it must be a number of processes from 1 to 64")
        for name in ("weights", "tensor_parallel_size"):
            if options.get(name) not in (None, 1):
                raise ValueError(f"leave {name} out: each worker reads a whole model of its own")
        self.folder = None if isinstance(model, Config) else Path(model)
        self.config = c = read_config(self.folder) if self.folder else model
        self.tokenizer = load_tokenizer(self.folder) if self.folder else None
        self.device, self.dtype, self.dtype_reason = find_device(device), dtype, "as asked"
        if dtype == "auto":   # one for all, as K and V go from each to each
            self.dtype, self.dtype_reason = fastest_dtype(c.dtype, self.device, c.I, c.E)
        self.speculator = options.get("speculative_model")
        self.requests: dict[int, Request] = {}
        self.waiting: list[list[Request]] = []    # siblings whom no worker has yet
        self.runs: dict[int, Run] = {}
        self.numbers: dict[Request, int] = {}     # of each one's run
        self.suspects: set[Request] = set()       # with whom a worker has ended, until they bring a token
        self.next_id, self.next_number, self.grown, self.stepping = 0, 0, {}, False
        self.workers = [Process(i, "prefill" if i < prefill else "decode") for i in range(prefill + decode)]
        self.close = finalize(self, close_all, self.workers)
        try:
            self._start(model, device, options)
        except BaseException:
            self.close()
            raise

    def _start(self, model: str | Path | Config, device: str, options: dict):
        """Start the processes, let them load the model, and link each prefill worker with each decode worker."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        gpus = torch.cuda.device_count() if self.device.type == "cuda" and self.device.index is None else 0
        options |= dict(dtype=self.dtype, processes=-(-len(self.workers) // max(1, gpus)))   # on a device, at most
        for worker in self.workers:
            worker.start(max(1, torch.get_num_threads() // len(self.workers)))
            worker.tell(model, options | dict(device=f"cuda:{worker.rank % gpus}" if gpus else device))
        sizes, block_sizes, max_seqs = zip(*self._answers())
        self.pool = SimpleNamespace(num_blocks=min(sizes), block_size=block_sizes[0])   # what holds for each of them
        self.scheduler = SimpleNamespace(max_seqs=min(max_seqs), remove=lambda request: None)   # workers have queues
        for worker in self.workers:   # each in order of rank, so that nobody waits for who waits for it
            worker.tell(*((peer.rank, str(sorted((peer.rank, worker.rank))), store.port, worker.role == "prefill")
                          for peer in self.workers if peer.role != worker.role))
        self._answers()

    def _answers(self, starting: bool = True) -> list:
        """One of each worker that lives, in any order. starting: each must live, as others wait for a link to it."""
        self.answers = {}
        while missing := [worker for worker in self._alive() if worker not in self.answers]:
            self._hear(wait([worker.connection for worker in missing]))
            if starting and (dead := next((worker for worker in self.workers if not worker.alive), None)):
                raise dead.error or Broken(f"a {dead.role} worker has ended ({dead.end}) while it started: start again")
        return [self.answers[worker] for worker in self._alive()]

    def __exit__(self, *error):
        self.close()

    # --- where it differs from LLM

    @uninterrupted
    def add(self, prompt: str | list[int], params: SamplingParams = SamplingParams()) -> int:
        """As LLM's. Raises ValueError also for a logits_processor that cannot travel."""
        try:
            pickle.dumps(params)
        except Exception:
            raise ValueError("logits_processor cannot travel to another process: make it a function of a module, "
                             "which pickle can name, or use LLM") from None
        self.waiting.append(self.siblings(prompt, params))
        return self.waiting[-1][0].output.id

    def _turn(self):
        """Hand out what waits, and hear what the workers say; wait for it if need be."""
        self._assign()
        if self.runs:
            self._hear(wait([worker.connection for worker in self._alive()]))   # Ctrl-C may end the waiting

    def _drop(self, request: Request):
        super()._drop(request)
        self.suspects.discard(request)
        self._end_run(request)

    def logits(self, prompt: str | list[int]):
        raise ValueError("Disaggregated has no logits, as the model is in other processes: use LLM")

    def stats(self) -> dict[str, int | float]:
        """As LLM's, the sum of all workers; requests that move or wait to; bytes of K and V sent, and the seconds in
        which they travelled."""
        for worker in self._alive():
            worker.tell("stats")
        total = dict(moving=sum(run.target is not None for run in self.runs.values()))
        for answer, in self._answers(starting=False):
            total |= {name: total.get(name, 0) + number for name, number in answer.items()}
        return total

    # --- who does what

    def _alive(self, role: str = "") -> list[Process]:
        return [worker for worker in self.workers if worker.alive and role in worker.role]

    @uninterrupted
    def _assign(self):
        for dead in [worker for worker in self.workers if not worker.alive]:
            self._again(dead)
        waiting, self.waiting = sorted(self.waiting, key=lambda siblings: siblings[0].output.id), []
        for siblings in waiting:
            if siblings[0] in self.suspects and not self.suspects.isdisjoint(self.numbers):
                self.waiting.append(siblings)   # one at a time
            elif not siblings[0].output.finish_reason:   # else it was aborted
                self._place(siblings)

    def _again(self, dead: Process):
        """Run again what the worker had. If it was killed, no request is to blame. If it ended by itself, in a
        logits_processor, that request is an error. Else those that it had begun with are suspects until they bring a
        token: they run one at a time, and whose second worker ends by itself is an error, too. Not saved: the rest, if
        the last worker dies of a prompt, or if the system kills for want of memory whoever takes it."""
        by_itself = not dead.error and dead.end not in ("closed", "signal 9", "signal 15")
        for number, run in list(self.runs.items()):
            request = run.request
            if dead not in (run.worker, run.target) or number not in self.runs:
                continue   # or another sample of it has failed
            if by_itself and number == dead.at:
                self._fail(request, f"a worker process has ended ({dead.end}) in its logits_processor: mend it")
            elif by_itself and run.tried and request in self.suspects:
                self._fail(request, f"two worker processes have ended before its next token (the second: {dead.end}): "
                                    "run it alone in an LLM to see why")
            else:
                self._end_run(request)
                self.waiting.append([request])
                if by_itself and run.tried:
                    self.suspects.add(request)

    def _place(self, requests: list[Request], stay: bool = False):
        """Give a prompt and its continuations, or one that has begun, to who has the fewest tokens to compute before
        their next one. stay: who computes it goes on with it."""
        workers = self._alive("prefill") or self._alive()
        if not workers:
            ends = ", ".join(f"{worker.role}: {worker.end}" for worker in self.workers)
            return self._fail(requests[0], f"no worker process is left ({ends}): make a new Disaggregated")
        loads = Counter()
        for run in self.runs.values():
            loads[run.worker] += 0 if run.begun else len(run.request.tokens)
        worker, first = min(workers, key=loads.__getitem__), self.next_number
        for number, request in enumerate(requests, first):
            self.runs[number], self.numbers[request] = Run(request, worker), number
        self.next_number += len(requests)
        leave = worker.role == "prefill" and bool(self._alive("decode")) and not stay
        worker.tell("compute", self._job(first, requests), leave)

    def _offer(self, number: int, run: Run):
        """To the decode worker whose requests may come to need the fewest blocks."""
        workers, loads = self._alive("decode"), Counter()
        if not workers:
            return self._on_lost(run.worker, number)
        for other in self.runs.values():
            loads[other.target or other.worker] += -(-other.request.max_length // self.pool.block_size)
        run.target = min(workers, key=loads.__getitem__)
        run.target.tell("offer", self._job(number, [run.request]), run.worker.rank)

    def _job(self, number: int, requests: list[Request]) -> Job:
        first, out = requests[0], requests[0].output
        return Job(number, first.tokens[:out.prompt_tokens], pickle.dumps(replace(first.params, n=len(requests))),
                   [request.key for request in requests], out.token_ids, first.max_length, counts_of(out))

    def _end_run(self, request: Request):
        number = self.numbers.pop(request, None)
        run = self.runs.pop(number, None)   # None: no worker has it
        for worker in filter(None, (run.worker, run.target) if run else ()):
            worker.tell("abort", number)   # if it does not know yet

    def _fail(self, request: Request, error: str):
        """It ends, with all its samples."""
        for out in request.output.samples:
            if out.id in self.requests:
                out.finish_reason, out.error, self.grown[out] = "error", error, None
                self._drop(self.requests[out.id])

    # --- what the workers say

    @uninterrupted
    def _hear(self, connections: list[Connection]):
        """Everything that has come through these."""
        for worker in [worker for worker in self._alive() if worker.connection in connections]:
            try:
                while worker.connection.poll():
                    name, *what = worker.connection.recv()
                    getattr(self, f"_on_{name}")(worker, *what)
            except (EOFError, OSError):
                worker.close()   # `_assign` sees it

    def _on_trying(self, worker: Process, *numbers: int):
        for number in numbers:
            if number in self.runs:
                self.runs[number].tried = True

    def _on_at(self, worker: Process, number: int):
        worker.at = number
        self._on_trying(worker, number)

    def _on_grown(self, worker: Process, grown: list[tuple]):
        now = time.perf_counter()
        for number, tokens, logprobs, counts, error, aside in grown:
            if number not in self.runs:
                continue
            run = self.runs[number]
            request, out, run.begun, run.tried = run.request, run.request.output, True, False
            self.suspects.discard(request)
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
            elif aside:
                self._offer(number, run)

    def _on_taken(self, worker: Process, number: int, source: int, skip: int):
        self.workers[source].tell("hand_over", number, worker.rank, skip)   # who answers, whatever has become of it

    def _on_arrived(self, worker: Process, number: int):
        if number in self.runs:
            self.runs[number].worker, self.runs[number].target = worker, None

    def _on_lost(self, worker: Process, number: int):
        if number in self.runs:
            request = self.runs[number].request
            self._end_run(request)
            self._place([request], stay=True)

    def _on_answer(self, worker: Process, *answer):
        self.answers[worker] = answer

    def _on_failed(self, worker: Process, error: Exception):
        worker.end, worker.error = describe(error), error
