"""A server is a loop that decides who runs next. (Read paged_kv.py, kernels.py and model.py first.)

    python nanoserve.py --prompt "The cat sat"

Requests wait, run and finish. Every turn of the loop (`LLM.step`) the scheduler fills one budget of
tokens: first the next token of everyone who is decoding, then pieces of the prompts of those who are
not there yet. The model runs them all as one ragged batch; prefill and decode are the same step, a
prefill brings many tokens of a request and a decode brings one. Requests join and leave at any turn:
that is continuous batching (Orca, Yu et al. 2022), and cutting prompts to fit the budget is chunked
prefill (Sarathi, Agrawal et al. 2023).

    text -> token ids -> Request -> Scheduler.schedule -> Batch -> Model -> sample -> text
"""

from __future__ import annotations

import _signal   # `signal` without its detour through enums, a tenth of all bookkeeping
import argparse
import ctypes
import itertools
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from numbers import Integral, Real
from pathlib import Path

if __name__ == "__main__":   # Ctrl-C during the slow imports ends the process quietly; `main` then takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch import Tensor

import kernels
from kernels import Batch, Chunk, make_batch
from model import DTYPES, Config, Model, load_tokenizer, load_weights, race_for, random_weights, read_config
from paged_kv import BlockTable, KVPool


# ---------------------------------------------------------------------------------------------
# Requests

@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises ValueError for values that make no sense."""
    max_tokens: int = 32           # at most so many new tokens
    temperature: float = 0.0       # logits are divided by it; 0 takes the most likely token
    top_k: int = 0                 # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0             # sample from the fewest most likely tokens that add up to p (Holtzman et al. 2019)
    seed: int | None = None        # the same seed gives the same text, whatever else runs (in float32, up to ties that
                                   # rounding decides); None: by chance
    stop: str | tuple[str, ...] = ()   # end the text before any of these strings
    ignore_eos: bool = False       # go on to max_tokens
    n: int = 1                     # so many continuations of the prompt; with a seed, each has the next one
    logprobs: int | None = None    # log-probabilities of each token and of the k most likely ones; None: of none
    logits_processor: Callable[[list[int], Tensor], Tensor] | None = None   # (new tokens so far, logits_V) -> logits_V

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {self.stop!r}: it must be a string or several, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))
        temperature, top_p = (x if isinstance(x, Real) and not isinstance(x, bool) else math.nan
                              for x in (self.temperature, self.top_p))
        for name, fits, kind in (
                ("max_tokens", is_int(self.max_tokens) and self.max_tokens > 0, "a whole number, 1 or more"),
                ("temperature", 0 <= temperature <= 1e6, "a number from 0 (greedy) to a million"),
                ("top_k", is_int(self.top_k) and 0 <= self.top_k < 2 ** 31, "a whole number, 0 (off) to 2147483647"),
                ("top_p", 0 < top_p <= 1, "a number above 0 and at most 1"),
                ("seed", self.seed is None or is_int(self.seed) and self.seed >= 0, "None or a whole number from 0 on"),
                ("n", is_int(self.n) and self.n > 0, "a whole number, 1 or more"),
                ("logprobs", self.logprobs is None or is_int(self.logprobs) and self.logprobs >= 0, "None, 0 or more"),
                ("logits_processor", self.logits_processor is None or callable(self.logits_processor), "a function")):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {kind}")


def is_int(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(eq=False)
class Output:
    """What has become of a request so far. It goes on growing until finish_reason is set."""
    id: int
    prompt_tokens: int = 0
    text: str = ""                     # so far, without half characters, stop string and end-of-text token
    token_ids: list[int] = field(default_factory=list)   # all new tokens, the end-of-text token included
    finish_reason: str | None = None   # "stop" | "length"; "error" if it was refused or failed; "abort"
    error: str | None = None           # then: why
    ttft: float = 0.0                  # time to first token, seconds from `add`
    tps: float = 0.0                   # tokens per second after the first, once it has finished
    blocks: int = 0                    # KV blocks held at the end
    reused_tokens: int = 0             # prompt tokens whose K and V were found in the prefix cache
    computed_tokens: int = 0           # tokens that the model ran, after a preemption some of them again
    logprobs: list[dict[int, float]] | None = None   # per new token, if asked for: its own, then those of the k best
    samples: list[Output] = field(default_factory=list)   # all n continuations, this one first


@dataclass(eq=False)
class Request:
    """A prompt on its way to becoming a text: its tokens, and how many of them have K and V in the pool."""
    tokens: list[int]              # the prompt, then every sampled token
    params: SamplingParams
    limit: int                     # it ends with so many tokens in all, more than its prompt; the last is never run
    output: Output
    random: random.Random          # one number per sampled token, so neighbours cannot disturb it
    decode: Callable[[int, bool], str]   # a token, and whether it is the last -> the characters that it completes
    arrived: float
    # Who takes a token when it is computed: with its prompt itself and its n - 1 siblings, from then on itself alone.
    samples: list[Request] = field(default_factory=list)
    table: BlockTable = field(default_factory=BlockTable)
    computed: int = 0
    admitted: bool = False         # for the first time
    unshown: str = ""              # text that may yet turn out to be the beginning of a stop string
    uniform: float = 0.0           # the random number that chooses its next token

    def __post_init__(self):
        self.samples, self.uniform = [self], self.random.random()

    @property
    def pending(self) -> int:
        """Tokens to run before the next one can be sampled: 1 in decode, more in prefill."""
        return len(self.tokens) - self.computed

    def append(self, token: int, eos: list[int], now: float):
        """Take a token sampled now, turn it into text, and decide whether it is the last."""
        out, params, seconds = self.output, self.params, now - self.arrived
        self.tokens.append(token)
        out.token_ids.append(token)
        out.ttft = out.ttft or seconds
        if params.temperature:
            self.uniform = self.random.random()
        if token in eos and not params.ignore_eos:
            out.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            out.finish_reason = "length"
        # Text is shown up to a stop string, or up to what may be the beginning of one.
        piece = self.decode(token, out.finish_reason is not None) if out.finish_reason != "stop" else ""
        text, stops, self.unshown = self.unshown + piece, params.stop, ""
        if ends := [text.find(stop) for stop in stops if stop in text]:
            text, out.finish_reason = text[:min(ends)], "stop"
        elif stops and not out.finish_reason:
            beginnings = (stop[:n] for stop in stops for n in range(1, len(stop)))
            self.unshown = max(filter(text.endswith, beginnings), key=len, default="")
        out.text += text.removesuffix(self.unshown)
        if out.finish_reason and seconds > out.ttft:
            out.tps = (len(out.token_ids) - 1) / (seconds - out.ttft)


# ---------------------------------------------------------------------------------------------
# Who runs next

class Scheduler:
    """First come, first served, under one token budget per step.

    The budget at work, 6 tokens a step (columns are steps, numbers are prompt tokens, lines decode, dots wait):

        step                  1    2    3    4    5  6-7    8
        0 The cat sat         3  ━━━  ━━━    ■
        1 Once upon a time    3    3  ━━━  ━━━    ■
        2 The dog           ···    2  ━━━  ━━━    ■
        3 One day, Max wen  ···  ···    3    3    3  ━━━    ■

    That is `python nanoserve.py --prompt "The cat sat" --prompt "Once upon a time, Tom" --prompt "The dog" --prompt
    "One day, Max went to the park." --max-batched-tokens 6 --max-tokens 4 --timeline`, which also draws the pool.

    `running` and `waiting` are both in order of arrival, and everyone running came before everyone waiting; nobody
    is overtaken, so nobody starves. Everyone decoding gets a token in every step, unless it is preempted: no more
    run at once (max_seqs) than a step has tokens.

    A request is admitted when the pool can be expected to hold it and everyone running to their ends. How long an
    answer will get nobody knows: `usage` is the part of what they were allowed (max_tokens, or less if the context
    is short) that requests have used lately, at first all of it. A prompt gets all its blocks when it is admitted,
    so its chunks never want for any. The pool runs out when answers grow longer than expected: then the youngest
    of the running, decoding or still in its chunks, is preempted. It gives its blocks back and waits
    again at the front, and `usage` is multiplied by 1.5. Nothing is lost: its tokens are run again as if they were
    a prompt, less those that the prefix index still knows.
    """

    def __init__(self, pool: KVPool, max_batched_tokens: int, max_seqs: int):
        self.pool, self.max_batched_tokens, self.max_seqs = pool, max_batched_tokens, max_seqs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.refused = False       # the first in the queue did not fit, and no block has been given back since
        self.usage = 1.0
        self.preemptions = self.reused_tokens = 0

    def schedule(self) -> list[tuple[Request, Chunk]]:
        """Who runs in this step, and which of their tokens; single tokens first."""
        pool, S, plan, prompts = self.pool, self.pool.block_size, [], []
        # 1. The next token of everyone who is decoding, the oldest first.
        for request in self.running:   # which a preemption may cut short, from its end
            length, table = len(request.tokens), request.table
            if length - request.computed > 1:
                prompts.append(request)
                continue
            has_slot = length <= len(table.blocks) * S and pool.references[table.blocks[-1]] == 1   # and to itself
            if has_slot or self._make_slot(request):
                plan.append((request, Chunk([request.tokens[-1]], length - 1, table.blocks, 1, table.row)))
                if length % S == 0:
                    pool.commit(table, request.tokens, length)
        # 2. The prompts that are under way, then newcomers.
        decodes, queue = len(plan), itertools.chain(prompts, self._newcomers())
        budget = self.max_batched_tokens - decodes
        while budget and (request := next(queue, None)):
            table, start, n = request.table, request.computed, min(request.pending, budget)
            if table.blocks:   # else it has just been preempted
                tokens, last = request.tokens[start:start + n], n == request.pending
                plan.append((request, Chunk(tokens, start, table.blocks, int(last), table.row)))
                budget -= n
                pool.commit(table, request.tokens, start + n)   # a newcomer of this very step may find it
        # A piece of a prompt may be a single token: like a decode, and to be served with them.
        return plan[:decodes] + sorted(plan[decodes:], key=lambda entry: len(entry[1].tokens) > 1)

    def _newcomers(self) -> Iterator[Request]:
        """Admit from the front of the queue those who can be expected to fit: one each time that budget is left."""
        if not self.waiting or self.refused:
            return
        places, promised = sum(len(r.samples) for r in self.running), sum(map(self._expected, self.running))
        while self.waiting:
            request = self.waiting[0]
            places += len(request.samples)
            if places > self.max_seqs:
                return
            request.computed = self.pool.match(request.table, request.tokens)
            if self.running and promised + self._expected(request) > self.pool.available:
                self.release(request)
                self.refused = True
                return
            fits = self.pool.grow(request.table, len(request.tokens), request.limit)
            assert fits, "it takes no more than was expected, or has the pool to itself"
            promised += self._expected(request)
            self.reused_tokens += request.computed
            if not request.admitted:   # after a preemption it may find what it computed itself
                request.admitted, request.output.reused_tokens = True, request.computed
            self.running.append(self.waiting.popleft())
            yield request

    def _expected(self, request: Request) -> int:
        """Blocks that a request and its samples to come are expected to need beyond those that it holds: the full
        ones in common, and from there on each its own."""
        prompt, common = request.output.prompt_tokens, len(request.tokens) // self.pool.block_size
        end = max(len(request.tokens) + 1, prompt + math.ceil(self.usage * (request.limit - prompt)))
        each = self.pool.blocks_for(min(end, request.limit)) - common
        return common + len(request.samples) * each - len(request.table.blocks)

    def _make_slot(self, request: Request) -> bool:
        """A slot of its own for the request's next token, if need be by preempting the youngest, perhaps itself."""
        while not (self.pool.grow(request.table, len(request.tokens)) and self.pool.own_last(request.table)):
            self.usage = min(1.0, 1.5 * self.usage)
            if self._preempt() is request:
                return False
        return True

    def _preempt(self) -> Request:
        youngest = self.running.pop()
        self.release(youngest)
        self.waiting.appendleft(youngest)
        self.preemptions += 1
        return youngest

    def fork(self, request: Request):
        """The prompt is computed: the other samples run from here on, in the same blocks."""
        at = self.running.index(request)
        self.running[at:at + 1] = request.samples
        for sample in request.samples[1:]:
            self.pool.fork(request.table, sample.table)
            sample.computed, sample.admitted, sample.output.reused_tokens = request.computed, True, request.computed
            self.reused_tokens += request.computed
        request.samples = [request]

    def undo(self, plan: list[tuple[Request, Chunk]]):
        """The step that was planned has failed: what it was to compute is not there, and everyone begins again."""
        for request, _ in plan:
            self.pool.forget(request.table, request.computed)
        while self.running:
            self._preempt()

    def release(self, request: Request):
        """Give the request's blocks back; what it computed may be found again in the prefix cache."""
        self.pool.release(request.table)
        request.computed, self.refused = 0, False

    def remove(self, request: Request):
        """Forget a request that has ended, and learn how much of its allowance it has used (a moving average)."""
        out = request.output
        for queue in (self.running, self.waiting):
            if request in queue:   # else it was to fork from one that was aborted
                queue.remove(request)
                break
        if out.finish_reason in ("stop", "length"):
            self.usage += 0.1 * (len(out.token_ids) / (request.limit - out.prompt_tokens) - self.usage)
        out.blocks = len(request.table.blocks)
        self.release(request)


# ---------------------------------------------------------------------------------------------
# Choosing a token

def sample(logits_BV: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    """One token per row: the most likely at temperature 0, else drawn by the row's uniform number in [0, 1).

    Tokens are put in order of probability, cut after the k-th and where their sum reaches p, and the
    uniform number, scaled to what is left, falls into one of them. -1 where logits are not finite.
    """
    top, best = logits_BV.max(-1, keepdim=True)
    greedy = [token if math.isfinite(value) else -1 for (token,), (value,) in zip(best.tolist(), top.tolist())]
    if not any(p.temperature for p in params):
        return greedy

    def column(values):
        return torch.tensor(values, dtype=torch.float32, device=logits_BV.device)[:, None]

    V, temperature = logits_BV.shape[1], column([p.temperature for p in params])
    logits, order = ((logits_BV - top) / temperature.clamp(min=1e-6)).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(V, device=logits.device)
    logits = logits.masked_fill(rank >= column([p.top_k or V for p in params]), -torch.inf)
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    kept = (probabilities > 0) & (cumulative - probabilities < column([p.top_p for p in params]))
    last = (kept.sum(-1, keepdim=True) - 1).clamp(min=0)   # at least the first is kept
    chosen = (cumulative <= column(uniforms) * cumulative.gather(1, last)).sum(-1, keepdim=True)
    drawn = order.gather(1, chosen.minimum(last))[:, 0].tolist()   # rounding must not pass the last one
    return [token if p.temperature and likely >= 0 else likely for token, likely, p in zip(drawn, greedy, params)]


def choose(logits_BV: Tensor, requests: list[Request]) -> tuple[list[int], dict[Request, str]]:
    """A token for each request, and what went wrong instead: in its logits_processor, or in the model."""
    errors, processed_BV = {}, logits_BV
    rows = [b for b, request in enumerate(requests) if request.params.logits_processor]
    if rows:
        processed_BV = logits_BV.clone()
    for b in rows:
        request, logits_V = requests[b], logits_BV[b].clone()
        try:
            logits_V = request.params.logits_processor(list(request.output.token_ids), logits_V)
            if not torch.is_tensor(logits_V) or logits_V.shape != logits_BV[b].shape:
                raise ValueError(f"it gave {str(logits_V)[:50]} and not logits of shape {list(logits_BV[b].shape)}")
            processed_BV[b] = logits_V
            if not processed_BV[b].max().isfinite():
                raise ValueError("it left no token to choose: the largest logit must be a finite number")
        except Exception as error:   # anything may happen in a stranger's function
            processed_BV[b], errors[request] = 0.0, f"logits_processor: {describe(error)}"
    tokens = sample(processed_BV, [r.params for r in requests], [r.uniform for r in requests]) if requests else []
    for request, token in zip(requests, tokens):
        if token < 0:
            errors[request] = ("the model's logits are not finite: its weights are damaged, "
                               "or its dtype is too small, so try float32 or bfloat16")
    return tokens, errors


def describe(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:   # a stranger's exception, which fails to describe itself
        return type(error).__name__


def log_probabilities(logits_V: Tensor, token: int, k: int) -> dict[int, float]:
    """Of the token, then of the k most likely ones, by the model alone: no temperature, no logits_processor."""
    logprobs_V = logits_V.log_softmax(-1)
    values, ids = logprobs_V.topk(min(k, len(logprobs_V)))
    return {token: logprobs_V[token].item()} | dict(zip(ids.tolist(), values.tolist()))


# ---------------------------------------------------------------------------------------------
# The engine

def uninterrupted(method):
    """Ctrl-C during a call waits until the call is over and the books are in order."""
    @wraps(method)
    def call(*arguments, **named):
        handler, caught = _signal.getsignal(signal.SIGINT), []
        if not callable(handler) or threading.current_thread() is not threading.main_thread():
            return method(*arguments, **named)
        _signal.signal(signal.SIGINT, lambda *what: caught.append(what))
        try:
            return method(*arguments, **named)
        finally:
            _signal.signal(signal.SIGINT, handler)
            if caught:
                handler(*caught[0])
    return call


class LLM:
    """A model, its KV pool and the loop.

    model: a checkpoint folder, or a Config for random weights of that shape. device: "auto" takes a GPU if
    there is one; several GPUs take a process each. dtype: "auto" is the checkpoint's own, or on a CPU float32
    if that measures faster. attention: "auto" is "triton" on a GPU and "torch" elsewhere; "triton" on a CPU
    runs the same kernels in Triton's interpreter, slowly. block_size: tokens per KV block; num_blocks: blocks
    in the pool; max_batched_tokens: tokens per step; None is what suits the device. max_seqs: texts that may be
    written at once. prefix_cache: whether to look for prompts' beginnings among blocks computed before.
    cuda_graphs: whether decode steps are replayed; None: wherever attention is "triton" on a GPU.
    Raises ValueError, in one sentence, for what does not exist or does not fit.
    """

    def __init__(self, model: str | Path | Config, device: str = "auto", dtype: str = "auto", attention: str = "auto",
                 block_size: int | None = None, num_blocks: int | None = None, max_batched_tokens: int | None = None,
                 max_seqs: int = 64, prefix_cache: bool = True, cuda_graphs: bool | None = None):
        self.folder = None if isinstance(model, Config) else Path(model)
        self.config = c = read_config(self.folder) if self.folder else model
        self.device = find_device(device)
        gpu = self.device.type == "cuda"
        if gpu and self.device.index is not None:   # Triton and CUDA graphs launch on the current device
            torch.cuda.set_device(self.device)
        name, self.dtype_reason = str(dtype).removeprefix("torch."), "as asked"
        if name == "auto":
            name, self.dtype_reason = choose_dtype(c, self.device)
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} is not supported: use auto, {', '.join(DTYPES)}")
        if attention == "auto":
            able = gpu and kernels.capability_of(self.device) >= 80 and kernels.load_triton()
            attention = "triton" if able else "torch"
        block_size = (64 if gpu else 16) if block_size is None else block_size
        max_batched_tokens = (4096 if gpu else 512) if max_batched_tokens is None else max_batched_tokens
        for what, value in (("block_size", block_size), ("num_blocks", num_blocks),
                            ("max_batched_tokens", max_batched_tokens), ("max_seqs", max_seqs)):
            if value is not None and (not is_int(value) or not 0 < value < 2 ** 31):
                raise ValueError(f"{what} is {str(value)[:50]}: it must be a whole number from 1 to 2147483647")
        kernels.check(attention, self.device, DTYPES[name], c.H, c.K, c.D, block_size)
        self.dtype = name
        if self.device.type == "cpu":
            keep_freed_memory()
        if cuda_graphs and attention != "triton":
            raise ValueError(f"cuda_graphs=True needs attention='triton', not {attention!r}: leave one of them out")

        self.tokenizer = load_tokenizer(self.folder) if self.folder else None
        weights = (load_weights(self.folder, c, self.device, DTYPES[name]) if self.folder else
                   random_weights(c, self.device, DTYPES[name]))
        self.model = Model(c, weights, attention)
        max_seqs = min(max_seqs, max_batched_tokens)   # so that a step has a token for everyone who decodes
        self.pool = self._make_pool(block_size, num_blocks, max_seqs, DTYPES[name], prefix_cache)
        self.scheduler = Scheduler(self.pool, max_batched_tokens, max_seqs)
        if cuda_graphs is None:
            cuda_graphs = gpu and attention == "triton" and not kernels.INTERPRETED
        self.graphs = {} if cuda_graphs else None   # batch size -> (batch that stays, replay, logits)
        self.requests: dict[int, Request] = {}
        self.grown: dict[Output, None] = {}   # since `step` last returned; an ordered set
        self.stepping, self.doomed = False, []   # who was aborted within a step, by a logits_processor or watcher
        self.next_id = self.steps = self.computed_tokens = 0
        self.watchers = []   # called in every step, with what was planned, who gets a token, which one, and the logits

    def _make_pool(self, block_size, num_blocks, max_seqs, dtype, prefix_cache) -> KVPool:
        """The pool: room for max_seqs full contexts, but at most 80% of a GPU's free memory or a quarter of RAM."""
        c = self.config
        block_bytes = 2 * c.L * c.K * block_size * c.D * dtype.itemsize
        if self.device.type == "cuda":
            torch.cuda.empty_cache()   # what PyTorch keeps of engines that are gone
            memory = int(torch.cuda.mem_get_info(self.device)[0] * 0.8)
        else:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
        if num_blocks is None:
            most = memory if self.device.type == "cuda" else memory // 4
            num_blocks = max(1, min(-(-c.context // block_size) * max_seqs, most // block_bytes))
        if num_blocks * block_bytes > memory:
            size = num_blocks * block_bytes / 1e9
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens need {size:.1f} GB, and {self.device} has "
                             f"{memory / 1e9:.1f} GB: at most {memory // block_bytes} blocks fit")
        tables, width = max_seqs + 1, min(num_blocks, -(-c.context // block_size))   # a table more, for `logits`
        if tables * width * 8 > memory // 8:
            raise ValueError(f"block tables for {max_seqs} requests of {width} blocks need {tables * width / 125e6:.1f}"
                             " GB: lower max_seqs or max_batched_tokens")
        return KVPool(c.L, c.K, c.D, num_blocks, block_size, dtype, self.device, prefix_cache, tables, width)

    # --- the loop, one turn at a time

    @uninterrupted
    def add(self, prompt: str | list[int], params: SamplingParams = SamplingParams()) -> int:
        """Queue a prompt, text or token ids; returns the request's id. Raises ValueError if it can never run."""
        tokens = self._tokens(prompt)
        room = min(self.config.context, self.pool.num_blocks * self.pool.block_size)
        if len(tokens) >= room:
            what = "the model's context" if room == self.config.context else "the KV pool (raise num_blocks)"
            raise ValueError(f"the prompt has {len(tokens)} tokens and {what} holds {room}, "
                             f"with at least one for the answer: shorten it to {room - 1}")
        if params.n > self.scheduler.max_seqs:
            raise ValueError(f"n is {params.n} and {self.scheduler.max_seqs} requests may run at once: "
                             "raise max_seqs and max_batched_tokens")
        samples, limit, now = [], min(room, len(tokens) + params.max_tokens), time.perf_counter()
        for i in range(params.n):
            out = Output(self.next_id + i, prompt_tokens=len(tokens), logprobs=None if params.logprobs is None else [])
            samples.append(Request(
                list(tokens), params, limit, out, random.Random(None if params.seed is None else int(params.seed) + i),
                self.tokenizer.decoder(tokens) if self.tokenizer else lambda token, last: "", now))
        for request in samples:
            request.output.samples = [sample.output for sample in samples]
        samples[0].samples = list(samples)
        self.requests |= {request.output.id: request for request in samples}
        self.next_id += params.n
        self.scheduler.waiting.append(samples[0])
        return samples[0].output.id

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{self.folder} has no tokenizer (tokenizer.json, vocab.json with merges.txt, or "
                                 "tokenizer.model): add one, or give token ids")
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ValueError("the prompt is not valid UTF-8: re-encode it as UTF-8") from None
            if not prompt:
                raise ValueError("the prompt is empty: give at least one character")
            prompt = self.tokenizer.encode(prompt)
        if not isinstance(prompt, (list, tuple)):
            raise ValueError(f"a prompt is text or a list of token ids, and this one is {str(prompt)[:50]!r}")
        tokens = list(prompt)
        if not tokens:
            raise ValueError("the prompt is empty: give at least one token")
        for token in tokens:
            if not is_int(token) or not 0 <= token < self.config.V:
                raise ValueError(f"token id {token!r} is outside the vocabulary of {self.config.V}: "
                                 f"use ids from 0 to {self.config.V - 1}")
        return list(map(int, tokens))

    def step(self) -> list[Output]:
        """One turn of the loop: schedule, run, sample. Returns the outputs that have grown since it last returned,
        some of them finished. If the model raises (for want of memory, say) the step is undone, and the next one does
        its work again."""
        self._turn()
        grown, self.grown = self.grown, {}
        return list(grown)

    @uninterrupted
    def _turn(self):
        if self.stepping:
            raise RuntimeError("a step is under way: a logits_processor or watcher cannot start another")
        self.stepping = True
        try:
            if plan := self.scheduler.schedule():
                self._run_and_choose(plan)
        finally:
            self.stepping = False
            while self.doomed:
                self.abort(self.doomed.pop())

    def _run_and_choose(self, plan: list[tuple[Request, Chunk]]):
        """Logits for the plan, tokens from the logits, and then, when nothing can fail any more, the books."""
        # Only who has no tokens left to compute gets a new one: not a prompt that is still in pieces.
        ready = [request for request, chunk in plan if chunk.logits]
        takers = [sample for request in ready for sample in request.samples]
        try:
            logits_BV = self._run([chunk for _, chunk in plan])
            if len(takers) > len(ready):
                logits_BV = logits_BV[[row for row, request in enumerate(ready) for _ in request.samples]]
            tokens, errors = choose(logits_BV, takers)
            for watcher in self.watchers:
                watcher(plan, takers, tokens, logits_BV)
        except BaseException:
            self.scheduler.undo(plan)
            raise

        self.steps, now = self.steps + 1, time.perf_counter()
        for request, chunk in plan:
            request.computed += len(chunk.tokens)
            request.output.computed_tokens += len(chunk.tokens)
            self.computed_tokens += len(chunk.tokens)
        if len(takers) > len(ready):
            for request in ready:
                self.scheduler.fork(request)
        for b, (request, token) in enumerate(zip(takers, tokens)):
            out = request.output
            try:
                if request in errors:
                    out.finish_reason, out.error = "error", errors[request]
                else:
                    request.append(token, self.config.eos, now)
                    if out.logprobs is not None:
                        out.logprobs.append(log_probabilities(logits_BV[b], token, request.params.logprobs))
            except Exception as error:   # it ends alone
                out.finish_reason, out.error = "error", describe(error)
            if out.finish_reason:
                self._drop(request)
            self.grown[out] = None

    def _run(self, chunks: list[Chunk]) -> Tensor:
        n, S, tables_UM = len(chunks), self.pool.block_size, self.pool.block_tables_UM
        self.pool.upload()
        if self.graphs is None or not all(len(chunk.tokens) == 1 == chunk.logits for chunk in chunks):
            return self.model(make_batch(chunks, S, self.device, tables_UM), self.pool)
        size = 1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8    # 1, 2, 4, 8, 16, 24, ...
        return self._replay(make_batch(chunks + [kernels.PADDING] * (size - n), S, "cpu", tables_UM))[:n]

    @torch.inference_mode()
    def _replay(self, batch: Batch) -> Tensor:
        """Decode by a CUDA graph, recorded once per batch size: the GPU does not wait for Python to launch kernels.

        A graph repeats its launches on the same memory, so everything that changes between steps is copied into
        a batch that stays, and a step of 5 requests runs as one of 8. The other three are padding: token 0 of a
        request that owns nothing, which writes no K and V and reads none. What comes out for it is thrown away.
        """
        size = len(batch.chunks)
        if size not in self.graphs:
            static = make_batch([kernels.PADDING] * size, self.pool.block_size, self.device, self.pool.block_tables_UM)
            self.graphs[size] = static, *record(lambda: self.model(static, self.pool))
        static, replay, logits_BV = self.graphs[size]
        kernels.refresh(static, batch, self.config.K)
        replay()
        return logits_BV

    @uninterrupted
    def abort(self, request_id: int):
        """End a request with all its samples now (in a logits_processor or watcher: when the step is over) and give its
        blocks back; what they have produced stays in their outputs. Nothing happens if it has ended."""
        if self.stepping:
            self.doomed.append(request_id)
            return
        request = self.requests.get(request_id) or next(   # the first sample may have ended before the others
            (r for r in self.requests.values() if r.output.samples[0].id == request_id), None)
        for out in request.output.samples if request else ():
            if out.id in self.requests:
                out.finish_reason = "abort"
                self._drop(self.requests[out.id])

    def _drop(self, request: Request):
        self.scheduler.remove(request)
        del self.requests[request.output.id]

    def stats(self) -> dict[str, int]:
        """What the engine has done so far, and how things stand: tokens run by the model, tokens whose K and V were
        there already, preemptions; requests running and waiting; blocks of the pool by state."""
        pool, scheduler = self.pool, self.scheduler
        return dict(steps=self.steps, computed_tokens=self.computed_tokens, reused_tokens=scheduler.reused_tokens,
                    preemptions=scheduler.preemptions, running=len(scheduler.running), waiting=len(scheduler.waiting),
                    blocks=pool.num_blocks, blocks_referenced=pool.num_referenced, blocks_cached=len(pool.cached),
                    blocks_free=len(pool.free))

    # --- whole prompts

    def generate(self, prompts: str | list,
                 params: SamplingParams | list[SamplingParams] = SamplingParams()) -> list[Output]:
        """Run prompts (texts or lists of token ids) as one batch; outputs in their order.

        A prompt that cannot run ends with finish_reason "error" and the reason in `error`; the others
        are not affected.
        """
        first = self.next_id
        try:
            outputs = self.start(prompts, params)
            for out in outputs:
                for sample in out.samples:
                    while sample.finish_reason is None:
                        self._turn()
            return outputs
        finally:
            self._leave(range(first, self.next_id))

    def _leave(self, ids: range):
        """Interrupted or not, leave nothing behind of these requests. What others have grown meanwhile the next `step`
        hands out."""
        for request_id in [i for i in self.requests if i in ids]:
            self.abort(request_id)
        self.grown = {out: None for out in self.grown if out.id not in ids}

    def start(self, prompts: str | list, params: SamplingParams | list[SamplingParams]) -> list[Output]:
        """`add` every prompt; one that is refused gets an output that has already ended, with its error."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(params) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(params)} sampling parameters: "
                             "give one for all or one for each")
        if not all(isinstance(p, SamplingParams) for p in params):
            raise ValueError("sampling parameters are SamplingParams, one for all prompts or a list of one for each")
        outputs = []
        for prompt, p in zip(prompts, params):
            try:
                outputs.append(self.requests[self.add(prompt, p)].output)
            except ValueError as error:
                outputs.append(Output(-1, finish_reason="error", error=str(error)))
                outputs[-1].samples = outputs[-1:]
        return outputs

    def stream(self, prompt: str | list[int], params: SamplingParams = SamplingParams()) -> Iterator[str]:
        """The text of one prompt, piece by piece as it appears. Raises ValueError, at the first piece if it cannot run
        and later if it fails."""
        if params.n > 1 or not self.tokenizer:
            raise ValueError(f"n is {params.n}: a stream is one text, so use generate, or n=1" if params.n > 1 else
                             f"{self.folder} has no tokenizer, and a stream is text: use generate")
        first = self.next_id
        try:
            (out,) = self.start([prompt], params)
            yield from self.follow(out)
            if out.error:
                raise ValueError(out.error)
        finally:
            self._leave(range(first, first + 1))

    def follow(self, out: Output) -> Iterator[str]:
        """Run until this text is complete, and give it piece by piece as it appears."""
        shown = 0
        while out.finish_reason is None or shown < len(out.text):   # other calls make it grow, too
            if shown == len(out.text):
                self._turn()
            shown, piece = len(out.text), out.text[shown:]
            if piece:
                yield piece

    @uninterrupted
    def logits(self, prompt: str | list[int]) -> Tensor:
        """float32 [T, V]: what the model predicts after each of the prompt's tokens, through the same paged path."""
        tokens, table, rows = self._tokens(prompt), BlockTable(), []
        if len(tokens) > self.config.context or not self.pool.grow(table, len(tokens)):
            raise ValueError(f"the prompt has {len(tokens)} tokens: the context holds {self.config.context}, "
                             f"and the KV pool has room for {self.pool.available * self.pool.block_size} now")
        try:
            for start in range(0, len(tokens), self.scheduler.max_batched_tokens):
                chunk = tokens[start:start + self.scheduler.max_batched_tokens]
                self.pool.upload()
                batch = make_batch([Chunk(chunk, start, table.blocks, len(chunk), table.row)], self.pool.block_size,
                                   self.device, self.pool.block_tables_UM)
                rows.append(self.model(batch, self.pool))
        finally:
            self.pool.release(table)
        return torch.cat(rows)


def record(step):
    """A function that repeats what `step` launches on the GPU, and the tensor in which it leaves the result."""
    if not torch.cuda.is_available():
        raise ValueError("CUDA graphs need a CUDA device, and there is none: use cuda_graphs=False")
    step()   # compiles the kernels and plans their work outside of the recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def choose_dtype(c: Config, device: torch.device) -> tuple[str, str]:
    """The fastest type that holds the checkpoint's weights as they are stored, and why it was chosen.

    On a CPU that is their own or float32: some processors multiply 16-bit numbers several times faster, others first
    convert each. Measured on a matrix like the MLP's, at most 2048 x 2048, by the time of a decoded token and of one
    of a prompt together.
    """
    stored = c.dtype if c.dtype in DTYPES else "float32"
    if device.type != "cpu" or stored == "float32":
        return stored, "as stored"
    seconds = {}
    for name in (stored, "float32"):
        weight = torch.randn(min(c.I, 2048), min(c.E, 2048)).to(DTYPES[name])
        seconds[name] = 0.0
        for rows in (1, 64):
            x = torch.randn(rows, weight.shape[1]).to(DTYPES[name])
            race = race_for(x, weight)
            while not race.best:
                race(x, weight)
            seconds[name] += min(race.seconds.values()) / rows
    best, other = sorted(seconds, key=seconds.get)
    return best, f"{seconds[other] / seconds[best]:.1f} times as fast as {other} here"


def keep_freed_memory():
    """Have glibc keep what a step frees: given back, it would cost the next step a page fault per 4 KiB (a quarter of
    GPT-2's prefill where this was measured)."""
    with suppress(OSError, AttributeError, TypeError):   # another C library has no such function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)      # M_MMAP_THRESHOLD: up to its maximum, memory comes from the heap
        mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: and the heap does not shrink


def find_device(name: str) -> torch.device:
    """The device by name. Raises ValueError if it does not exist here."""
    there = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if "cuda" in there else "cpu"
    if str(name) not in there:
        raise ValueError(f"PyTorch finds no device {str(name)!r} here: use auto, {', '.join(there)}")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------
# The command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nanoserve.py", description="Continue a text with a GPT-2 or Llama checkpoint. Several prompts run as one "
        "batch. The text goes to standard output, everything else to standard error.")
    parser.error = lambda message: parser.exit(2, f"nanoserve.py: {message}; see --help\n")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT",
        help='text to continue; repeatable; "-" reads standard input')
    add("--prompts-file", metavar="FILE", help="a prompt per line (UTF-8); empty lines are skipped")
    add = parser.add_argument_group("model").add_argument
    add("--model", default=Path(__file__).parent / "demo/llama", metavar="DIR",
        help="folder with config.json, model.safetensors and the tokenizer's files (default: demo/llama)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: a GPU if there is one)")
    add("--dtype", default="auto",
        help="auto, float32, float16 or bfloat16 (default: the checkpoint's own; on a CPU float32 if that is faster)")
    add("--attention", default="auto", help="auto, torch, triton or naive (default: triton on a GPU, torch elsewhere)")
    add = parser.add_argument_group("choosing tokens").add_argument   # what is not given is as in SamplingParams
    add("--max-tokens", type=int, default=512, metavar="N", help="at most N new tokens per prompt (default: 512)")
    add("--temperature", type=float, metavar="T", help="0: the most likely token; higher: more surprise (default: 0)")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (default: all)")
    add("--top-p", type=float, metavar="P", help="sample from the fewest tokens that add up to P (default: 1)")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    add("--ignore-eos", action="store_true", help="go on to --max-tokens even if the model ends its text")
    add("--n", type=int, metavar="N", help="so many continuations of each prompt (default: 1)")
    add("--logprobs", type=int, metavar="K", help="with --json: log-probabilities of each token and of the K best")
    add = parser.add_argument_group("engine").add_argument
    add("--block-size", type=int, metavar="N", help="tokens per KV block (default: 64 on a GPU, 16 elsewhere)")
    add("--num-blocks", type=int, metavar="N",
        help="KV blocks in the pool (default: what --max-seqs needs and memory allows)")
    add("--max-batched-tokens", type=int, metavar="N",
        help="token budget of a step (default: 4096 on a GPU, 512 elsewhere)")
    add("--max-seqs", type=int, default=64, metavar="N", help="texts that may be written at once (default: 64)")
    add("--json", action="store_true", help="print one JSON object per text instead of the text itself")
    add("--timeline", nargs="?", const="", metavar="FILE.svg",
        help="then draw who ran in which step, and the pool; to the terminal, or as a picture")
    add("--explain", action="store_true", help="then say what each step computed, where and at what cost")
    return parser.parse_args(argv)


def say(line: str, end: str = "\n"):
    """To standard error, if anybody listens."""
    with suppress(OSError):
        print(line, end=end, file=sys.stderr, flush=True)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line; those read from elsewhere lose the newline that ends them."""
    prompts = [read_text().removesuffix("\n") if prompt == "-" else prompt for prompt in args.prompt]
    if args.prompts_file:
        lines = read_text(args.prompts_file).replace("\r\n", "\n").split("\n")
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError('there is no prompt: give --prompt "The cat sat", --prompt - or --prompts-file FILE')
    return prompts


def read_text(file: str | None = None) -> str:
    """Of the file, or without one of standard input (which is None if the shell closed it)."""
    source = file or "standard input"
    try:
        data = Path(file).read_bytes() if file else sys.stdin.buffer.read() if sys.stdin else b""
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error.strerror}): give --prompts-file a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not valid UTF-8 at byte {error.start}: re-encode it as UTF-8") from None


def serve(args: argparse.Namespace) -> int:
    """Run the prompts of the command line and print their texts in order, each as it appears."""
    if args.timeline:
        if not args.timeline.endswith(".svg"):
            raise ValueError(f"--timeline {args.timeline}: the picture's name must end in .svg")
        check_writable(Path(args.timeline))
    prompts = read_prompts(args)
    params = SamplingParams(**{name: value for name, value in vars(args).items()
                               if name in SamplingParams.__dataclass_fields__ and value is not None})
    llm = LLM(args.model, args.device, args.dtype, args.attention, args.block_size, args.num_blocks,
              args.max_batched_tokens, args.max_seqs)
    if llm.device.type == "cuda":   # what is compiled, loaded and recorded once is no part of TTFT and TPS
        with suppress(ValueError):   # hardly room for a prompt
            llm.generate([[0, 0]], SamplingParams(max_tokens=2, ignore_eos=True))
        llm.next_id = 0
    import watch   # nothing else needs it
    watchers = [watch.Timeline(llm, args.timeline)] if args.timeline is not None else []
    watchers += [watch.Explanation(llm)] if args.explain else []
    outputs = llm.start(prompts, params)
    for number, (prompt, first) in enumerate(zip(prompts, outputs), 1):
        for out in first.samples:
            if sys.stdout.isatty() and not args.json and not out.error:
                say(prompt, end="")   # a terminal shows the whole text, a pipe gets only what is new
            for piece in llm.follow(out):
                print("" if args.json else piece, end="", flush=True)
            if args.json:
                record = {key: value for key, value in vars(out).items() if key != "samples"}
                print(json.dumps({"prompt": prompt} | record, ensure_ascii=False), flush=True)
            elif out.token_ids:
                print(flush=True)
            if out.error:
                say(f"nanoserve.py: prompt {number}: {out.error}")
            else:
                say(f"prefill: {out.prompt_tokens} tokens, first token after {out.ttft * 1000:.0f} ms (TTFT) | "
                    f"decode: {len(out.token_ids)} tokens at {out.tps:.0f} per second (TPS) | "
                    f"KV: {out.blocks} blocks of {llm.pool.block_size} tokens")
    if args.dtype == "auto" and any(out.token_ids for out in outputs):
        say(f"{llm.dtype}: {llm.dtype_reason}")
    for watcher in watchers:
        watcher.show(say if args.json else print)
    return 2 if any(sample.error for out in outputs for sample in out.samples) else 0


def check_writable(path: Path):
    """Now rather than after minutes of work. Raises ValueError."""
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): name another file") from None
    if new:
        path.unlink()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_status("nanoserve.py", lambda: serve(args))


def exit_status(name: str, command: Callable[[], int]) -> int:
    """What the command returns; 2 for bad input, 1 if standard output was closed or is full, 130 after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.stderr or open(os.devnull, "w")   # None: the shell closed it
    if sys.stdout is None:
        say(f"{name}: standard output is closed: give the text somewhere to go")
        return 1
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return command()
    except KeyboardInterrupt:
        say(f"\n{name}: interrupted")
        return 130
    except ValueError as error:
        say(f"{name}: {error}")
        return 2
    except OSError as error:
        if error.filename:
            say(f"{name}: {error.filename} cannot be opened ({error.strerror}): give yourself the permission to")
            return 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # or Python complains again when it exits
        say(f"{name}: the text could not be written ({error.strerror}), as standard output was closed or is full: "
            "keep it open, or send it elsewhere")
        return 1
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        say(f"{name}: out of memory ({str(error).splitlines()[0]}): take a smaller model, dtype or number of tokens")
        return 2


if __name__ == "__main__":
    sys.exit(main())
