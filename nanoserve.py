"""A server is a loop that decides who runs next. (Read paged_kv.py, batch.py, kernels.py and model.py first.)

    python nanoserve.py --prompt "The cat sat"

Requests wait, run and finish. Every turn of the loop (`LLM.step`) the scheduler fills one budget of
tokens: first the next token of everyone who is decoding, then pieces of the prompts of those who are
not there yet. The model runs them all as one ragged batch; prefill and decode are the same step, a
prefill brings many tokens of a request and a decode brings one. Requests join and leave at any turn:
that is continuous batching (Orca, Yu et al. 2022), and cutting prompts to fit the budget is chunked
prefill (Sarathi, Agrawal et al. 2023).

    text -> token ids -> Request -> Scheduler.schedule -> Batch -> Model -> choose -> text

The file has three parts: a request and what has become of it, the scheduler, and the engine that turns the loop.
"""

from __future__ import annotations

if __name__ == "__main__":   # the command line is a room of its own, which imports this one
    import cli
    raise SystemExit(cli.main())

import math
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from device import find_device, keep_freed_memory, uninterrupted   # before torch

import torch
from torch import Tensor

import kernels
import parallel
from batch import Chunk
from checkpoint import load_weights, random_weights
from config import Config, read_config
from linear import DTYPES, QUANTIZATIONS, Part, fastest_dtype
from model import Model, ModelRunner, make_pool
from paged_kv import BlockTable, KVPool
from sampling import SamplingParams, choose, describe, is_int, log_probabilities, noise_key
from speculate import DraftModel, NgramDrafter, Speculator, load_draft
from tokenizer import load_tokenizer


# ---------------------------------------------------------------------------------------------
# Requests

@dataclass(eq=False)
class Output:
    """What has become of a request so far. It goes on growing until finish_reason is set."""
    id: int
    prompt_tokens: int = 0
    text: str = ""                     # so far, without stop string, end-of-text token and what is no character yet
    token_ids: list[int] = field(default_factory=list)   # all new tokens, those that are not in the text included
    finish_reason: str | None = None   # "stop" | "length"; "error" if it was refused or failed; "abort"
    error: str | None = None           # then: why
    ttft: float = 0.0                  # time to first token, seconds from `add`
    tps: float = 0.0                   # tokens per second after the first, once it has finished
    blocks: int = 0                    # KV blocks held at the end
    reused_tokens: int = 0             # prompt tokens whose K and V were found: in the prefix cache, or by a sibling
    computed_tokens: int = 0           # tokens that the model ran, after a preemption some of them again
    drafted_tokens: int = 0            # of these, drafts
    accepted_tokens: int = 0           # new tokens that came without a step of their own, as a draft was right
    logprobs: list[dict[int, float]] | None = None   # per new token, if asked for: its own, then those of the k best
    samples: list[Output] = field(default_factory=list)   # all n continuations, this one first


@dataclass(eq=False)
class Request:
    """A prompt on its way to becoming a text: its tokens, and how many of them have K and V in the pool."""
    tokens: list[int]              # the prompt, then every new token; the last one is not run yet
    params: SamplingParams
    max_length: int                # it ends with so many tokens in all, more than its prompt
    output: Output
    key: int                       # of the noise that chooses its tokens, with their positions (sampling.py)
    detokenize: Callable[[int, bool], str]   # a token, and whether it is the last -> the characters that it completes
    arrived: float
    # The n continuations of a prompt are n requests: with n = 3 the first holds [r0, r1, r2] here, and runs the prompt
    # while r1 and r2 are in no queue. The logits after the prompt choose a token for each. Then each runs on its own
    # and holds itself alone: [r0], [r1], [r2].
    siblings: list[Request] = field(default_factory=list)
    table: BlockTable = field(default_factory=BlockTable)
    computed: int = 0
    admitted: bool = False         # has it ever been?
    unshown: str = ""              # text that may yet turn out to be the beginning of a stop string

    def __post_init__(self):
        self.siblings = [self]

    @property
    def pending(self) -> int:
        """Tokens to run before the next one can be chosen: 1 in decode, more in prefill, but for a prompt's last."""
        return len(self.tokens) - self.computed

    def append(self, token: int, eos: list[int], now: float):
        """Take a token chosen now, turn it into text, and decide whether it is the last."""
        out, seconds = self.output, now - self.arrived
        self.tokens.append(token)
        out.token_ids.append(token)
        out.ttft = out.ttft or seconds
        if token in eos and not self.params.ignore_eos:
            out.finish_reason = "stop"
        elif len(self.tokens) >= self.max_length:
            out.finish_reason = "length"
        self._show(self.detokenize(token, out.finish_reason is not None) if out.finish_reason != "stop" else "")
        if out.finish_reason and seconds > out.ttft:
            out.tps = (len(out.token_ids) - 1) / (seconds - out.ttft)

    def _show(self, piece: str):
        """Show the text up to a stop string, or up to what may be the beginning of one."""
        out, stops, text, self.unshown = self.output, self.params.stop, self.unshown + piece, ""
        if places := [text.find(stop) for stop in stops if stop in text]:
            text, out.finish_reason = text[:min(places)], "stop"
        elif stops and not out.finish_reason:
            beginnings = (stop[:n] for stop in stops for n in range(1, len(stop)))
            self.unshown = max(filter(text.endswith, beginnings), key=len, default="")
        out.text += text.removesuffix(self.unshown)


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
        self.aside: list[Request] = []   # they hold blocks and get no tokens: distributed.py set them aside
        self.refused = False       # the first in the queue did not fit, and no block has been given back since
        self.usage = 1.0
        self.preemptions = self.reused_tokens = 0

    def schedule(self) -> list[tuple[Request, Chunk]]:
        """Who runs in this step, and which of their tokens; single tokens first."""
        pool, S, decodes, prompts = self.pool, self.pool.block_size, [], []
        # 1. The next token of everyone who is decoding, the oldest first.
        for request in self.running:   # a preemption takes the youngest from its end: nobody who has a chunk already
            length, table = len(request.tokens), request.table
            if length - request.computed == 1 and self._has_slot(request):
                decodes.append((request, Chunk([request.tokens[-1]], length - 1, table.blocks, 1, table.row)))
                if length // S > table.known:
                    pool.commit(table, request.tokens, length)
        # 2. The prompts that are under way, then newcomers.
        budget = self.max_batched_tokens - len(decodes)
        under_way = deque(r for r in self.running if len(r.tokens) - r.computed > 1)
        while budget and (request := under_way.popleft() if under_way else self._admit()):
            table, start, n = request.table, request.computed, min(request.pending, budget)
            tokens, last = request.tokens[start:start + n], n == request.pending
            prompts.append((request, Chunk(tokens, start, table.blocks, int(last), table.row)))
            pool.commit(table, request.tokens, start + n)   # a newcomer of this very step may find it
            budget -= n
        # A piece of a prompt may be a single token: like a decode, and to be served with them.
        return decodes + sorted(prompts, key=lambda entry: len(entry[1].tokens) > 1)

    def _has_slot(self, request: Request) -> bool:
        """See that the request's next token has a slot of its own, if need be by preempting the youngest who run,
        perhaps itself: then it has none."""
        pool, table, length = self.pool, request.table, len(request.tokens)
        if length <= len(table.blocks) * pool.block_size and pool.references[table.blocks[-1]] == 1:
            return True
        while not (pool.grow(table, length) and pool.own_last(table)):
            self.usage = min(1.0, 1.5 * self.usage)
            if self._preempt() is request:
                return False
        return True

    def grow_for_drafts(self, request: Request, drafts: int) -> int:
        """Slots for so many drafts behind the request's last token, which has one, or for as many as the pool has:
        nobody is preempted for a guess. The blocks stay the request's, which will write real tokens there."""
        while not self.pool.grow(request.table, len(request.tokens) + drafts):
            drafts -= 1
        return drafts

    def _admit(self) -> Request | None:
        """Let the first in the queue run, with blocks for its whole prompt, if it can be expected to fit to its end."""
        if not self.waiting or not self.find_room(self.waiting[0]):
            return None
        request = self.waiting.popleft()
        self.reused_tokens += request.computed
        if not request.admitted:   # after a preemption it may find what it computed itself
            request.admitted, request.output.reused_tokens = True, request.computed
        self.running.append(request)
        return request

    def find_room(self, request: Request) -> bool:
        """Give the request blocks for its tokens, found ones first, if it can be expected to fit to its end."""
        here, pool = self.running + self.aside, self.pool
        if self.refused or sum(len(r.siblings) for r in here) + len(request.siblings) > self.max_seqs:
            return False
        request.computed = pool.match(request.table, request.tokens)
        expected = sum(map(self._expected_blocks, [*here, request]))
        if here and expected > pool.available:
            self.release(request)
            self.refused = True
            return False
        fits = pool.grow(request.table, len(request.tokens), request.max_length)
        assert fits, "it takes no more than was expected, or has the pool to itself"
        return True

    def _expected_blocks(self, request: Request) -> int:
        """Blocks that a request is expected to need beyond those that it holds, to its end.

        A prompt of 23 tokens with n = 4, 12 tokens allowed, usage 0.5, blocks of 4: it is expected to end with 29
        tokens. All four share the 5 full blocks of the prompt, and each needs 3 more for tokens 20 to 28: 17 in all.
        """
        shared = len(request.tokens) // self.pool.block_size
        own = self.pool.blocks_for(self.expected_length(request)) - shared
        return max(0, shared + len(request.siblings) * own - len(request.table.blocks))   # drafts may have more

    def expected_length(self, request: Request) -> int:
        """How many tokens the request is expected to end with: one more than it has, at least."""
        prompt = request.output.prompt_tokens
        expected = prompt + math.ceil(self.usage * (request.max_length - prompt))
        return min(max(len(request.tokens) + 1, expected), request.max_length)

    def _preempt(self) -> Request:
        youngest = self.running.pop()
        self.release(youngest)
        self.waiting.appendleft(youngest)
        self.preemptions += 1
        return youngest

    def fork(self, request: Request):
        """The prompt is computed: its siblings run from here on, too, in the same blocks."""
        at = self.running.index(request)
        self.running[at:at + 1] = request.siblings
        for sibling in request.siblings[1:]:
            self.pool.fork(request.table, sibling.table)
            sibling.computed, sibling.admitted, sibling.output.reused_tokens = request.computed, True, request.computed
            self.reused_tokens += request.computed
        request.siblings = [request]

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
        """Forget a request that has ended. If it came to its own end, learn how much of its allowance it used (a moving
        average)."""
        out = request.output
        for queue in (self.running, self.waiting, self.aside):
            if request in queue:   # else it was to fork from one that was aborted
                queue.remove(request)
                break
        if out.finish_reason in ("stop", "length"):
            self.usage += 0.1 * (len(out.token_ids) / (request.max_length - out.prompt_tokens) - self.usage)
        out.blocks = len(request.table.blocks)
        self.release(request)


# ---------------------------------------------------------------------------------------------
# The engine

class LLM:
    """A model, its KV pool and the loop.

    model: a checkpoint folder, or a Config for random weights of that shape. device: "auto" takes a GPU if
    there is one; several GPUs take a process each. dtype: "auto" is the checkpoint's own, or on a CPU float32
    where 16 bits gain nothing. attention: "auto" is "triton" on a GPU and "torch" elsewhere; "triton" on a CPU
    runs the same kernels in Triton's interpreter, slowly. block_size: tokens per KV block; num_blocks: blocks
    in the pool; max_batched_tokens: tokens per step; None is what suits the device. max_seqs: texts that may be
    written at once. prefix_cache: whether to look for prompts' beginnings among blocks computed before.
    kv_cache_dtype: "auto" keeps K and V as the model computes them; "int8" in a byte a number and a scale per token and
    KV head, in little more than a quarter of float32's memory or half of bfloat16's. quantization: "int8" or "fp8"
    brings the weights into 8 bits while they are loaded.
    speculative_model: who guesses tokens for the model to verify, "ngram" or the folder of a smaller model with the
    same vocabulary; num_speculative_tokens: how many of a request in a step, 15 at most.
    cuda_graphs: whether decode steps are replayed; None: wherever attention is "triton" on a GPU. weights: those of
    another LLM of the same model, to share; None: they are read. tensor_parallel_size: how many processes share the
    model; this one is the first, and the others end with it. processes: how many share the device's memory.
    Raises ValueError, in one sentence, for what does not exist or does not fit.
    """

    def __init__(self, model: str | Path | Config, device: str = "auto", dtype: str = "auto", attention: str = "auto",
                 block_size: int | None = None, num_blocks: int | None = None, max_batched_tokens: int | None = None,
                 max_seqs: int = 64, prefix_cache: bool = True, quantization: str | None = None,
                 kv_cache_dtype: str = "auto", speculative_model: str | Path | Config | None = None,
                 num_speculative_tokens: int = 4, cuda_graphs: bool | None = None,
                 weights: dict[str, list[Part]] | None = None, tensor_parallel_size: int = 1, processes: int = 1):
        parallel.enter(tensor_parallel_size, device)   # what torchrun starts beside the first process stays in there
        self.folder = None if isinstance(model, Config) else Path(model)
        self.config = c = read_config(self.folder) if self.folder else model
        self.device = find_device(device)
        gpu = self.device.type == "cuda"
        self.dtype, self.dtype_reason = str(dtype).removeprefix("torch."), "as asked"
        if self.dtype == "auto":
            self.dtype, self.dtype_reason = fastest_dtype(c.dtype, self.device, c.I, c.E)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not supported: use auto, {', '.join(DTYPES)}")
        if quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantization {quantization!r} is not supported: use {' or '.join(QUANTIZATIONS)}")
        if quantization and c.stored:
            raise ValueError(f"{self.folder} is stored in {c.stored} already: leave quantization out")
        if kv_cache_dtype not in ("auto", "int8"):
            raise ValueError(f"kv_cache_dtype {kv_cache_dtype!r} is not supported: use auto or int8")
        self.kv_cache_dtype = kv_cache_dtype
        if attention == "auto":
            able = gpu and kernels.capability_of(self.device) >= 80 and kernels.load_triton()
            attention = "triton" if able else "torch"
        block_size = (64 if gpu else 16) if block_size is None else block_size
        max_batched_tokens = (4096 if gpu else 512) if max_batched_tokens is None else max_batched_tokens
        for what, value in (("block_size", block_size), ("num_blocks", num_blocks),
                            ("max_batched_tokens", max_batched_tokens), ("max_seqs", max_seqs),
                            ("num_speculative_tokens", num_speculative_tokens),
                            ("tensor_parallel_size", tensor_parallel_size), ("processes", processes)):
            if value is not None and (not is_int(value) or not 0 < value < 2 ** 31):
                raise ValueError(f"{what} is {str(value)[:50]}: it must be a whole number from 1 to 2147483647")
        kernels.check(attention, self.device, DTYPES[self.dtype], *c.attended)
        if cuda_graphs and attention != "triton":
            raise ValueError(f"cuda_graphs=True needs attention='triton', not {attention!r}: leave one of them out")

        self.tokenizer = load_tokenizer(self.folder) if self.folder else None
        self.ranks = None
        if tensor_parallel_size > 1:
            if weights is not None:
                raise ValueError("weights are whole, and tensor_parallel_size cuts them: leave one of the two out")
            self.ranks = parallel.start(tensor_parallel_size, c, self.device,
                                        self.folder, DTYPES[self.dtype], quantization, attention)
            weakref.finalize(self, self.ranks.close)   # also when Python ends
        keep_freed_memory(False)
        if weights is None:
            read, source = (load_weights, (self.folder, c)) if self.folder else (random_weights, (c,))
            weights = read(*source, self.device, DTYPES[self.dtype], quantization, self.ranks)
        draft = None if speculative_model in (None, "ngram") else load_draft(
            speculative_model, c, self.tokenizer, self.device, DTYPES[self.dtype], attention, quantization)
        keep_freed_memory(True)
        self.model = Model(parallel.share(c, tensor_parallel_size), weights, attention)
        max_seqs = min(max_seqs, max_batched_tokens)   # so that a step has a token for everyone who decodes
        kv_dtype = torch.int8 if kv_cache_dtype == "int8" else DTYPES[self.dtype]
        self.pool = make_pool(parallel.LeadingPool if self.ranks else KVPool, self.model.config,
                              draft.config if draft else None, kv_dtype, self.device, block_size, num_blocks, max_seqs,
                              prefix_cache, self.ranks.here if self.ranks and not gpu else processes)
        self.scheduler = Scheduler(self.pool, max_batched_tokens, max_seqs)
        if cuda_graphs is None:
            cuda_graphs = gpu and attention == "triton" and not kernels.INTERPRETED
        self.runner = (parallel.LeadingRunner(self.ranks, self.model, self.pool, cuda_graphs) if self.ranks else
                       ModelRunner(self.model, self.pool, self.pool, cuda_graphs))
        self.speculator = None
        if speculative_model is not None:
            drafter = DraftModel(draft, self.pool, max_batched_tokens, cuda_graphs) if draft else NgramDrafter()
            self.speculator = Speculator(drafter, num_speculative_tokens, self.runner)
        self.requests: dict[int, Request] = {}
        self.grown: dict[Output, None] = {}   # since `step` last returned; an ordered set
        self.stepping, self.doomed = False, []   # who was aborted within a step, by a logits_processor or watcher
        self.next_id = self.steps = self.computed_tokens = self.drafted_tokens = self.accepted_tokens = 0
        self.watchers = []   # called in every step, with what was planned, who gets a token, which one, and the logits

    # --- the loop, one turn at a time

    @uninterrupted
    def add(self, prompt: str | list[int], params: SamplingParams = SamplingParams()) -> int:
        """Queue a prompt, text or token ids; returns the request's id. Raises ValueError if it can never run."""
        first = self.siblings(prompt, params)[0]
        self.scheduler.waiting.append(first)
        return first.output.id

    def siblings(self, prompt: str | list[int], params: SamplingParams, keys: list[int] | None = None) -> list[Request]:
        """The n requests of a prompt, in no queue yet. keys: of their noise; None: by the seed."""
        tokens = self._tokens(prompt)
        room = min(self.config.context, self.pool.num_blocks * self.pool.block_size)
        if len(tokens) >= room:
            what = "the model's context" if room == self.config.context else "the KV pool (raise num_blocks)"
            raise ValueError(f"the prompt has {len(tokens)} tokens and {what} holds {room}, "
                             f"with at least one for the answer: shorten it to {room - 1}")
        if params.n > self.scheduler.max_seqs:
            raise ValueError(f"n is {params.n} and {self.scheduler.max_seqs} requests may run at once: "
                             "raise max_seqs and max_batched_tokens")
        keys = keys or [noise_key(params.seed, i) for i in range(params.n)]
        siblings, max_length, now = [], min(room, len(tokens) + params.max_tokens), time.perf_counter()
        for i, key in enumerate(keys):
            out = Output(self.next_id + i, prompt_tokens=len(tokens), logprobs=None if params.logprobs is None else [])
            detokenize = self.tokenizer.decoder(tokens) if self.tokenizer else lambda token, last: ""
            siblings.append(Request(list(tokens), params, max_length, out, key, detokenize, now))
        for request in siblings:
            request.output.samples = [sibling.output for sibling in siblings]
        siblings[0].siblings = siblings
        self.requests |= {request.output.id: request for request in siblings}
        self.next_id += params.n
        return siblings

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{self.folder or 'a Config'} has no tokenizer (tokenizer.json, vocab.json with "
                                 "merges.txt, or tokenizer.model): add one, or give token ids")
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
        its work again; but ranks that share the model end with the step that failed."""
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
                self._run(plan)
        finally:
            self.stepping = False
            while self.doomed:
                self.abort(self.doomed.pop())

    def _run(self, plan: list[tuple[Request, Chunk]]):
        """Logits for the plan, tokens from the logits, and then, when nothing can fail any more, the books.

        Request a, with n = 3, is at the end of its prompt, and b decodes with two drafts:
            rows      (a, 0)                        (b, 0)  (b, 1)  (b, 2)
            takers    (a, 0)  (a', 0)  (a'', 0)     (b, 0)  (b, 1)  (b, 2)
            kept         0       1        2            3       4            if b's first draft is right, its second not
        """
        try:
            if self.speculator:
                self.speculator.draft(plan, self.scheduler)
            begin = time.perf_counter()
            # Of each row of logits: its request, and how many drafts stand between its last token and the row's place.
            rows = [(request, ahead) for request, chunk in plan for ahead in range(chunk.logits)]
            takers = [(sibling, ahead) for request, ahead in rows for sibling in request.siblings]
            logits_BV = self._logits([chunk for _, chunk in plan])
            if len(takers) > len(rows):
                logits_BV = logits_BV[[row for row, (request, _) in enumerate(rows) for _ in request.siblings]]
            tokens, errors = choose(logits_BV, takers)
            now, count = time.perf_counter(), sum(len(chunk.tokens) for _, chunk in plan)
            kept = range(len(takers))
            if self.speculator:
                kept = self.speculator.verify(takers, tokens, count, now - begin)
            for watcher in self.watchers:
                watcher(plan, [takers[b][0] for b in kept], [tokens[b] for b in kept], logits_BV[list(kept)])
        except BaseException:
            self.scheduler.undo(plan)
            raise

        self.steps, self.computed_tokens = self.steps + 1, self.computed_tokens + count
        accepted = Counter(takers[b][0] for b in kept if takers[b][1])
        for request, chunk in plan:
            drafts = max(0, chunk.logits - 1)
            request.computed += len(chunk.tokens) - drafts + accepted[request]
            request.output.computed_tokens += len(chunk.tokens)
            request.output.drafted_tokens += drafts
            self.drafted_tokens += drafts
        if self.speculator:
            self.speculator.learn(accepted)
        for request, chunk in plan:
            if chunk.logits and len(request.siblings) > 1:
                self.scheduler.fork(request)
        for b in kept:
            (request, ahead), out = takers[b], takers[b][0].output
            if out.finish_reason:
                continue   # a draft was its last token
            try:
                if b in errors:
                    out.finish_reason, out.error = "error", errors[b]
                else:
                    request.append(tokens[b], self.config.eos, now)
                    out.accepted_tokens += ahead > 0
                    self.accepted_tokens += ahead > 0
                    if out.logprobs is not None:
                        out.logprobs.append(log_probabilities(logits_BV[b], tokens[b], request.params.logprobs))
            except Exception as error:   # it ends alone
                out.finish_reason, out.error = "error", describe(error)
            if out.finish_reason:
                self.pool.commit(request.table, request.tokens, min(request.computed, len(request.tokens)))
                self._drop(request)
            self.grown[out] = None

    def _logits(self, chunks: list[Chunk]) -> Tensor:
        """float32 [rows that want logits, V], in the order of the chunks. (Tests put a failing one in its place.)"""
        return self.runner(chunks)

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
        """Forget a request that has ended. If it was aborted or has failed, it may still hold text back."""
        request.output.text += request.unshown
        self.scheduler.remove(request)
        del self.requests[request.output.id]

    def stats(self) -> dict[str, int]:
        """What the engine has done so far, and how things stand: tokens run by the model, tokens whose K and V were
        there already, preemptions, tokens guessed and tokens that came without a step of their own, as a guess was
        right; requests running and waiting; blocks of the pool by state."""
        pool, scheduler = self.pool, self.scheduler
        return dict(steps=self.steps, computed_tokens=self.computed_tokens, reused_tokens=scheduler.reused_tokens,
                    preemptions=scheduler.preemptions, drafted_tokens=self.drafted_tokens,
                    accepted_tokens=self.accepted_tokens, running=len(scheduler.running),
                    waiting=len(scheduler.waiting), blocks=pool.num_blocks, blocks_referenced=pool.num_referenced,
                    blocks_cached=len(pool.cached), blocks_free=len(pool.free))

    # --- whole prompts

    def generate(self, prompts: str | list,
                 params: SamplingParams | list[SamplingParams] = SamplingParams()) -> list[Output]:
        """Run prompts (texts or lists of token ids) as one batch; outputs in their order.

        A prompt that cannot run ends with finish_reason "error" and the reason in `error`; the others
        are not affected.
        """
        first, stop = self.next_id, None
        try:
            outputs = self.start(prompts, params)
            stop = self.next_id   # what a watcher or logits_processor adds from here on is none of these prompts
            for out in outputs:
                for sample in out.samples:
                    while sample.finish_reason is None:
                        self._turn()
            return outputs
        finally:
            self._leave(range(first, stop or self.next_id))

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
                             f"{self.folder or 'a Config'} has no tokenizer, and a stream is text: use generate")
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
                rows.append(self.runner([Chunk(chunk, start, table.blocks, len(chunk), table.row)], replay=False))
        finally:
            self.pool.release(table)
        return torch.cat(rows)
