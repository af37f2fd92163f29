"""Cut the weights: one model on several processes. (Read nanoserve.py first.)

    python nanoserve.py --prompt "The cat sat" --tensor-parallel-size 2

A model that is too large for one device is cut: of several processes, the ranks, each has a slice of every weight
(Megatron-LM, Shoeybi et al. 2019). Two products follow each other in attention, and two in the MLP. The first is cut by
rows and the second by columns, so what a rank has computed is what it needs next:

    demo/llama     cut by     rank 0                           rank 1
    qkv            rows       query heads 0 1 2, KV head 0     query heads 3 4 5, KV head 1
    out            columns    those of its heads [T, 192]  +   those of its heads [T, 192]     all-reduce
    up             rows       gate and up 0 to 255             gate and up 256 to 511
    down           columns    0 to 255           [T, 192]  +   256 to 511         [T, 192]     all-reduce

The product of a weight that is cut by columns is the sum of the ranks' products, which an all-reduce gives to all: two
per layer. Embedding and head are cut by vocabulary: one all-reduce per step adds up rows of the embedding (zeros from
ranks that do not have them), and one gather brings the logits to rank 0. INT8 takes two more all-reduces per layer, of
a number per token: the largest of a row of activations decides how it is rounded, and the ranks have pieces of the row.
Norms and learned positions are small: every rank has them. Where KV heads are few, several ranks have the same one.

The forward pass does not know of it: a rank's model has fewer heads and a narrower MLP, and `linear` joins what is to
be joined. A rank has K and V of its heads, in blocks with the same numbers. Only rank 0 has requests, a scheduler and
the books of the pool. A step reaches the others as one list of numbers: its chunks, the entries of block tables that
have changed, the blocks that were copied. Rank 0 starts the others, or torchrun starts all. A rank that stands still
(SIGSTOP) is not dead, and is waited for, in code that hears no Ctrl-C: Ctrl-\\ ends rank 0, and with it the others.
"""

from __future__ import annotations

import os
import sys
import threading

if __name__ == "__main__":   # rank 0 holds the other end of this pipe; whatever becomes of it, this process ends, too
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()

import pickle
import re
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from itertools import islice

from device import find_device   # before torch

import torch
import torch.distributed as dist
from torch import Tensor

from batch import Chunk
from checkpoint import load_weights, random_weights
from config import Config
from model import Model, ModelRunner
from paged_kv import BlockTable, KVPool

FIRST = 256           # numbers of a message that travel at once; the rest of a longer one follows
CONNECTION_LOST = 3   # exit status of a rank that ends because another one has ended
SOON, LATE = timedelta(seconds=10), timedelta(minutes=5)   # to connect: to ranks that are there; to those of torchrun
FOREVER = timedelta(days=300)   # for a message: hours may pass between two, and a process that stands still is not dead


class Broken(RuntimeError):
    """A process has ended, and with it the group. It is said in one sentence."""


def share(c: Config, size: int) -> Config:
    """The model that one of so many ranks computes; `plan_cuts` in checkpoint.py has its slices. Raises ValueError if
    they cannot share it."""
    e = c.experts
    cut = [c.H, e.shared if e else 0, c.I if not e or len(e.layers) < c.L else 0]   # MLPs that all tokens meet
    able = [n for n in range(1, 65) if not any(x % n for x in cut)   # as many for each rank,
            and (c.K % n == 0 or n % c.K == 0)                       # or a KV head for as many ranks as any other,
            and not (e and e.X < n)                                  # an expert at least,
            and -(-c.V // n) * (n - 1) < c.V]                        # a row of the vocabulary when the others are full
    if size not in able:
        raise ValueError(f"tensor_parallel_size is {size}, and {c.H} query heads, {c.K} KV heads and the MLP's {c.I} "
                         f"columns cannot all be shared out evenly, and {f'{e.X} experts, ' if e else ''}{c.V} tokens "
                         f"so that each has some: use {' or '.join(map(str, able))}")
    return replace(c, H=c.H // size, K=max(1, c.K // size), I=c.I // size)


# ---------------------------------------------------------------------------------------------
# How ranks talk

class Ranks:
    """The ranks that share a model, as one of them sees them. gloo carries what CPUs tell each other and, without GPUs,
    the reductions. NCCL carries those of GPUs, and CUDA graphs record them. Raises Broken when a rank has ended."""

    def __init__(self, url: str, here: int, device: torch.device, processes: list[subprocess.Popen] = ()):
        """url: where they meet. here: how many are on this machine. processes: those that this one has started."""
        store, self.rank, self.size = next(dist.rendezvous(url))
        if store.add("ranks", 1) > self.size:
            raise ValueError("under torchrun one LLM can have tensor_parallel_size: start a run for each")
        self.here, self.processes, self.broken = here, list(processes), ""
        while processes and store.add("ranks", 0) < self.size:   # their imports take seconds
            if any(process.poll() is not None for process in processes):   # gloo would not notice
                raise Broken(who_ended(processes))
            time.sleep(0.02)
        options, near = dist.ProcessGroupGloo._Options(), here == self.size
        options._timeout = SOON if processes else LATE
        try:
            options._devices = [network(near)]
            self.gloo = self.group = dist.ProcessGroupGloo(
                dist.PrefixStore("gloo", store), self.rank, self.size, options)
        except RuntimeError as error:
            remedy = "start the run again" if near else "set GLOO_SOCKET_IFNAME on each machine, as README.md says"
            words = who_ended(processes) or f"{self.size} ranks could not connect: {remedy}"
            raise (ValueError if self.rank else Broken)(words) from error   # of Broken another rank says nothing
        self.gloo._set_default_timeout(FOREVER)
        if device.type == "cuda":
            self.group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), self.rank, self.size)
            threading.Thread(target=self._watch, args=(self.group,), daemon=True).start()
        self.sum(torch.zeros(1, device=device))   # all have met

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in the place of this one."""
        self._do(lambda: self.group.allreduce(x))
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest of all ranks' numbers, in the place of this one's."""
        self._do(lambda: self.group.allreduce(x, dist.ReduceOp.MAX))
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor, on rank 0; elsewhere nothing."""
        found = [] if self.rank else [torch.empty_like(x) for _ in range(self.size)]
        self._do(lambda: self.group.gather(found, x, 0))
        return found

    def tell(self, numbers: list[int]):
        """Rank 0 to all others."""
        message = torch.tensor([len(numbers), *numbers] + [0] * (FIRST - 1 - len(numbers)))
        for piece in (message[:FIRST], message[FIRST:]):
            if len(piece):
                self._do(lambda: self.gloo.broadcast(piece, 0))

    def listen(self) -> list[int]:
        """What rank 0 tells next, however long that takes."""
        first = torch.empty(FIRST, dtype=torch.int64)
        self._do(lambda: self.gloo.broadcast(first, 0))
        length, *numbers = first.tolist()
        if length >= FIRST:
            rest = torch.empty(length + 1 - FIRST, dtype=torch.int64)
            self._do(lambda: self.gloo.broadcast(rest, 0))
            numbers += rest.tolist()
        return numbers[:length]

    def _do(self, operation: Callable):
        try:
            if not self.broken:
                operation().wait()
        except RuntimeError as error:
            why = re.sub(r"^\[.*?\] ", "", str(error)).split(". ")[0]
            self.close(who_ended(self.processes) or
                       f"the connection to another rank is lost ({why}): start the run again")
        if self.broken:
            raise Broken(self.broken)

    def _watch(self, group: dist.ProcessGroupNCCL):
        """NCCL does not notice that a rank is gone, and its kernels wait for ever: until somebody aborts them."""
        while self.processes and all(process.poll() is None for process in self.processes):
            time.sleep(0.1)
        if self.processes:
            group.abort()

    def check(self):
        """After a step: see that it was not aborted."""
        if self.group is not self.gloo:
            torch.cuda.current_stream().synchronize()
            if any(process.poll() is not None for process in self.processes):
                raise Broken(who_ended(self.processes))

    def close(self, why: str = "the ranks of this LLM have ended: make another LLM"):
        """End the ranks that this one has started, and wait until they are gone. The first reason remains."""
        self.broken = self.broken or why
        self.gloo = self.group = None   # this breaks the connections, and so ends ranks that torchrun has started
        stop(self.processes)


def network(near: bool):
    """Where gloo listens. near: to this machine only. Else others reach it under its hostname, or in the network whose
    interface GLOO_SOCKET_IFNAME names, as in all of PyTorch."""
    gloo, interface = dist.ProcessGroupGloo, os.environ.get("GLOO_SOCKET_IFNAME")
    if near or interface:
        return gloo.create_device(hostname="127.0.0.1") if near else gloo.create_device(interface=interface)
    return gloo.create_default_device()


def who_ended(processes: list[subprocess.Popen]) -> str:
    """The rank that ended first, and its last words. The others have ended because it did."""
    end = time.monotonic() + 10
    while processes and time.monotonic() < end:
        for rank, process in enumerate(processes, 1):
            if process.poll() not in (None, CONNECTION_LOST):
                words = process.stdout.read().decode("utf-8", "replace").strip().split("\n")[-1]
                why = words or (f"signal {-process.returncode}" if process.returncode < 0 else "without a word")
                return f"rank {rank} of {len(processes) + 1} has ended ({why}), and the run with it: start it again"
        time.sleep(0.02)
    return ""


def stop(processes: list[subprocess.Popen]):
    for process in processes:
        process.stdin.close()   # it ends by itself, unless it is stuck
    while processes:
        process = processes.pop()
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
        process.kill()
        process.wait()
        process.stdout.close()


# ---------------------------------------------------------------------------------------------
# Rank 0 leads

def start(size: int, c: Config, device: torch.device, *settings) -> Ranks:
    """The group as rank 0 sees it: of processes that it starts, or of those of torchrun. c and settings are what
    `follow` begins with. Raises ValueError for what cannot be shared."""
    share(c, size)
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else size
    gpus = torch.cuda.device_count() if device.type == "cuda" else here
    if device.type not in ("cpu", "cuda") or device.index is not None or gpus < here:
        raise ValueError(f"tensor_parallel_size is {size} and device is {device}: ranks are on cpu, or on cuda with a "
                         f"GPU each, and of {here} ranks on this machine {min(here, gpus)} could have one")
    ranks = Ranks("env://", here, device) if under_torchrun() else start_processes(size, device)
    ranks.tell(list(pickle.dumps((c, *settings))))
    return ranks


def start_processes(size: int, device: torch.device) -> Ranks:
    processes, threads = [], max(1, torch.get_num_threads() // size)
    with tempfile.TemporaryDirectory(prefix="nanoserve-") as folder:
        url = f"file://{folder}/store?world_size={size}&rank="
        try:
            for rank in range(1, size):   # each in a session of its own: Ctrl-C is not for it
                processes.append(subprocess.Popen(
                    [sys.executable, __file__, url + str(rank), str(size), device.type], start_new_session=True,
                    env=os.environ | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            return Ranks(url + "0", size, device, processes)
        except BaseException:
            stop(processes)
            raise


class LeadingPool(KVPool):
    """The pool of rank 0. It keeps in mind what the others do not know yet."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.untold: dict[tuple[int, int], int] = {}   # like `changed`
        self.copied: list[int] = []                    # a block and its copy, another block and its copy, ...

    def _append(self, table: BlockTable, block: int):
        super()._append(table, block)
        self.untold[table.row, len(table.blocks) - 1] = block

    def copy(self, block: int, other: int):
        super().copy(block, other)
        self.copied += block, other


class LeadingRunner(ModelRunner):
    """The runner of rank 0. The others run what it runs."""

    def __init__(self, ranks: Ranks, model: Model, pool: LeadingPool, cuda_graphs: bool):
        super().__init__(model, pool, pool, cuda_graphs)
        self.ranks, self.threads = ranks, max(1, torch.get_num_threads() // ranks.here)   # they share the cores
        ranks.tell(list(pickle.dumps((cuda_graphs, pool.num_blocks, pool.block_size, pool.memory[0].dtype,
                                      *pool.block_tables_UM.shape))))
        ranks.sum(torch.zeros(1, device=model.device))   # all are ready

    def __call__(self, chunks: list[Chunk], replay: bool = True) -> Tensor:
        pool, threads = self.pool, torch.get_num_threads()
        self.ranks.tell(encode(chunks, replay, pool.untold, pool.copied))
        pool.untold, pool.copied = {}, []
        torch.set_num_threads(self.threads)
        try:
            logits_BV = super().__call__(chunks, replay)
            self.ranks.check()
            return logits_BV
        except BaseException as error:   # the others are in the middle of the step
            self.ranks.close(f"a step has failed on rank 0 ({error!r:.200}), and the run with it: start it again")
            raise
        finally:
            torch.set_num_threads(threads)


def encode(chunks: list[Chunk], replay: bool, changed: dict[tuple[int, int], int], copied: list[int]) -> list[int]:
    """A step as numbers."""
    numbers = [int(replay), len(changed), len(copied), len(chunks)]
    for (row, entry), block in changed.items():
        numbers += row, entry, block
    numbers += copied
    for chunk in chunks:
        numbers += len(chunk.tokens), chunk.start, chunk.logits, chunk.row, *chunk.tokens
    return numbers


# ---------------------------------------------------------------------------------------------
# The others follow

def follow(ranks: Ranks, device: torch.device):
    """The life of a rank other than 0: load what rank 0 loads, then run what it runs, until the connection ends."""
    c, folder, dtype, quantization, attention = pickle.loads(bytes(ranks.listen()))
    read, source = (load_weights, (folder, c)) if folder else (random_weights, (c,))
    model = Model(share(c, ranks.size), read(*source, device, dtype, quantization, ranks), attention)
    c = model.config
    cuda_graphs, num_blocks, block_size, kv_dtype, rows, width = pickle.loads(bytes(ranks.listen()))
    pool = KVPool(c.L, c.K, c.D, num_blocks, block_size, kv_dtype, device, max_tables=rows, max_blocks=width,
                  latent=bool(c.latent))
    runner, tables = ModelRunner(model, pool, pool, cuda_graphs), defaultdict(list)
    ranks.sum(torch.zeros(1, device=device))
    while True:
        run(ranks.listen(), runner, tables)


def run(numbers: list[int], runner: ModelRunner, tables: dict[int, list[int]]):
    """A step as `encode` has written it. tables: the block table of each row, as far as this rank was told; what lies
    behind its end is left from another one."""
    words, pool = iter(numbers), runner.pool
    replay, num_changed, num_copied, num_chunks = islice(words, 4)
    for _ in range(num_changed):
        row, entry, block = islice(words, 3)
        tables[row] += [0] * (entry + 1 - len(tables[row]))
        pool.changed[row, entry] = tables[row][entry] = block
    for _ in range(num_copied // 2):
        pool.copy(*islice(words, 2))
    chunks = []
    for _ in range(num_chunks):
        length, start, logits, row = islice(words, 4)
        chunks.append(Chunk(list(islice(words, length)), start, tables[row], logits, row))
    runner(chunks, bool(replay))


def serve(url: str, here: int, device: str) -> int:
    """Join a group and follow. The exit status. Last words are for rank 0, or under torchrun for the terminal."""
    try:
        device = find_device(device)
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}") if device.type == "cuda" else device
        follow(Ranks(url, here, device), device)
    except Broken:
        return CONNECTION_LOST
    except Exception as error:
        words = str(error) if isinstance(error, ValueError) else repr(error)
        print(words, file=sys.stdout if __name__ == "__main__" else sys.stderr, flush=True)
        return 1


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def enter(size: int, device: str):
    """Under torchrun rank 0 goes on; another rank follows it here, and ends with it."""
    if size > 1 and under_torchrun():
        if size != int(os.environ["WORLD_SIZE"]):
            raise ValueError(f"tensor_parallel_size is {size} and torchrun has started {os.environ['WORLD_SIZE']} "
                             "processes: let the two be the same")
        if os.environ["RANK"] != "0":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            status = serve("env://", int(os.environ["LOCAL_WORLD_SIZE"]), device)
            raise SystemExit(0 if status == CONNECTION_LOST else status)


if __name__ == "__main__":
    os._exit(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))   # at once, as rank 0 waits for it
