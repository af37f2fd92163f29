"""Guess, then verify: speculative decoding. (Read nanoserve.py up to the scheduler first.)

A decode step reads every weight for one token of a request; a step of five tokens reads the same bytes (with experts,
some more). So somebody cheap guesses what comes next, and the model verifies all guesses in one step (Leviathan et al.
2023; Chen et al. 2023):

    text so far           The cat sat by the door all
    drafts                                             morning   .   The   dog      guessed
    the step runs                                 all  morning   .   The   dog      5 tokens of one request
    the model takes                           morning        .  The    cat  ...     a token after each of them

The first three drafts are what the model takes, so " cat" is what it takes after them: four tokens in one step. " dog"
is refused. What the step computed behind it is forgotten, and the next step writes over its slot in the KV pool.

Nothing but the time changes. A token is a pure function of logits, seed and position (sampling.py), also at
temperatures above 0. So a draft is right if it is the very token that the model takes in its place, and the text is the
same token for token, whoever drafts. A draft model uses the model's own noise, and mostly wins or loses with it: what
is likely for both is taken by both (Daliri, Musco and Suresh 2025).

There are two kinds of drafters. `NgramDrafter` looks for the last few tokens earlier in the text, and proposes what
followed them there. `DraftModel` asks a smaller model, which keeps its K and V in blocks with the same numbers as the
model's: one block table serves both. `Speculator` stands between a drafter and the loop, and decides how many drafts
pay.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch

import kernels
from batch import SHORT, Chunk
from checkpoint import load_weights, random_weights
from config import Config, read_config
from model import Model, ModelRunner
from paged_kv import BlockTable, KVPool
from sampling import sample
from tokenizer import load_tokenizer


# ---------------------------------------------------------------------------------------------
# How many drafts pay

MARGIN = 1.1      # speed with drafts must be so many times that without, as measured times are noisy
UNLIKELY = 0.03   # a draft that is right less often is not worth thinking about
THINKING = 0.005  # of the time: what looking for drafts may take while none is found that pays
REST = 100        # steps: it rests no longer, whatever a look has taken


class Speculator:
    """Adds drafts to the decodes of a step, and says which of its tokens count when it has run.

    The rule. Draft n of a request is right with probability chance ** n. Drafts are taken in the order of their
    probability, as many as make the speed largest:

        tokens     one for each request, plus the probabilities of the drafts
        seconds    a decode step, plus what the drafts' rows add to it, plus the passes of the draft model
        speed      tokens / seconds

    With a chance of 0.8, a step of 10 ms and 0.5 ms per draft, one draft makes 1.8 tokens in 10.5 ms, two 2.44 in 11,
    four 3.36 in 12, eight 4.33 in 14: eight it is, or as many as are allowed. If the best speed is less than MARGIN
    times that without drafts, there are none. So the number of drafts follows the text (`Chances`), the batch and the
    machine (`Times`), down to none.

    Chances are hopes, and a short text has no time to make good what they cost. So a step takes no more drafts than can
    be paid for if none is right but those that have been shown to be (`Purse`).

    Before its first draft a draft model reads the text so far, which may take as long as several steps. That is worth
    it if the steps to come gain more than their share of it.

    Looking for drafts takes time itself: 0.2 ms for 16 requests, 5% of a step of demo/llama. So after a step for which
    none were worth it, it rests for as many steps as make that THINKING of the time. With a large model these are few.
    """

    def __init__(self, drafter: Drafter, most: int, runner: ModelRunner | None = None):
        """most: drafts per request and step, of which no more are taken than a short chunk has room for. runner: of the
        model, to measure what its steps cost; None: that is learned as they run."""
        self.drafter, self.most = drafter, min(most, SHORT - 1)
        self.chances, self.purse = Chances(), Purse()
        self.seconds = Times()   # of the model's step by its number of tokens
        self.looking = Times()   # what drafting takes beside passes, by the number of requests
        self.promised = WeakSet()   # requests whose text the drafter has begun to read: it reads the rest as well
        self.since = 0           # steps in a row that had drafts
        self.rest = 0            # for how many steps it does not look for drafts
        # In this step, unless it rests:
        self.decodes = 0         # requests that decode
        self.left = 1            # steps until the last of them is expected to end
        self.offered = []        # those of them that could have had drafts
        self.drafts = {}         # Request -> its drafts
        self.deepest = 0         # drafts of the request that was to have most
        self.unread = 0          # tokens that the drafter reads, beside one of each request
        self.guessing = 0.0      # seconds that drafting took
        if runner:
            self.seconds.measure(runner, 1, 2, 1 + self.most, 32)

    def draft(self, plan: list[tuple], scheduler):
        """Put drafts behind the last tokens of requests that decode. They take what is left of the token budget, and
        blocks that are left now. Such a chunk wants logits for each of its tokens."""
        self.drafts, self.offered, self.guessing = {}, [], 0.0
        if self.rest:
            self.rest -= 1
            return
        begin, rows = time.perf_counter(), sum(len(chunk.tokens) for _, chunk in plan)
        decodes = [(request, chunk) for request, chunk in plan
                   if len(chunk.tokens) == 1 and chunk.logits and len(request.siblings) == 1]
        rooms = [0 if request.params.logits_processor else min(self.most, request.max_length - len(request.tokens) - 1)
                 for request, _ in decodes]
        requests = [request for request, _ in decodes]
        self.decodes = len(requests)
        self.left = max((steps_left(request, scheduler) for request in requests), default=1)
        offers = self.drafter.offers(requests, rooms)
        self.offered = [request for request, offer in zip(requests, offers) if offer]
        counts = self.worthwhile(requests, offers, rows) if self.offered else []
        counts = [count or int(request in self.promised and offer > 0)
                  for request, offer, count in zip(requests, offers, counts)]
        if not any(counts):
            if step := at(self.seconds.curve(), rows):
                self.rest = min(REST, int((time.perf_counter() - begin) / (THINKING * step)))
            return
        budget = scheduler.max_batched_tokens - rows
        for b, request in enumerate(requests):
            if counts[b]:
                counts[b] = scheduler.grow_for_drafts(request, min(counts[b], budget))
                budget -= counts[b]
        unread = sum(self.drafter.unread([request for request, count in zip(requests, counts) if count]))
        self.deepest, self.unread = max(counts), min(unread, scheduler.max_batched_tokens)
        for (request, chunk), drafts in zip(decodes, self.drafter.guess(requests, counts)):
            if drafts:
                self.drafts[request] = drafts
                chunk.tokens, chunk.logits = chunk.tokens + drafts, 1 + len(drafts)
        plan.sort(key=lambda entry: len(entry[1].tokens))
        self.guessing = time.perf_counter() - begin
        self.looking.add(len(requests), self.guessing - self.drafter.spent)

    def worthwhile(self, requests: list, offers: list[int], rows: int) -> list[int]:
        """How many of the offered drafts to take for each request, in a step of so many rows without them. They fill it
        up to 8 rows, or to twice as many as the largest known step has, whichever is more."""
        counts, candidates, B = [0] * len(requests), [], len(requests)
        curve, passes = self.seconds.curve(), self.drafter.seconds.curve()
        if not curve:
            return counts
        alone, without, largest = at(curve, B), at(curve, rows), curve[-1][0]   # alone: no prompts either
        to_read = self.drafter.unread([request for request, offer in zip(requests, offers) if offer])
        for b, (request, offer, (chance, shown)) in enumerate(zip(requests, offers, self.chances.of(requests))):
            unread = to_read.pop(0) if offer else 0
            if unread <= SHORT:
                self.promised.discard(request)
            elif at(passes, unread) > (request.max_length - len(request.tokens)) * alone / B:
                continue   # more than all of its steps
            candidates += [Candidate(b, n, chance ** n, shown ** n, unread * (n == 1), unread > SHORT)
                           for n in range(1, offer + 1) if chance ** n > UNLIKELY]
        candidates.sort(key=lambda it: (it.far, -it.probability, it.n))
        a_pass, looking, share = at(passes, B), at(self.looking.curve(), B), self.share(B)
        best, best_count = MARGIN * B / (alone * STALE ** self.since), 0
        tokens, sure, deepest, all_unread = B, 0.0, 0, 0
        candidates = candidates[:max(0, max(8, 2 * largest) - rows)]
        for count, (_, n, probability, shown, unread, _) in enumerate(candidates, 1):
            tokens, sure = tokens + share * probability, sure + share * shown
            deepest, all_unread = max(deepest, n), all_unread + unread
            if count == about(count, 3) or count == len(candidates):   # 1 to 8, 10, 12, ...: some are enough
                cost = max(0.0, at(curve, rows + count) - without) + deepest * a_pass + looking
                reading = at(passes, B + all_unread) - a_pass
                speed = tokens / (alone + cost + reading * tokens / B / self.left)   # so many steps gain by it
                if speed >= best and self.purse.pays(cost - sure * alone / B, reading, without, self.left):
                    best, best_count = speed, count
        for it in candidates[:best_count]:
            counts[it.b] += 1
            if it.far:
                self.promised.add(requests[it.b])
        return counts

    def share(self, B: int) -> float:
        """What a right draft of one of B requests saves, in B-ths of a step: less than one, as others may still be at
        work when this request has ended. If half is right, the slowest of B is about sqrt(ln B / left) of what is saved
        behind the average. Twice that, as a few drafts in a few steps bring nobody to an earlier end."""
        return max(0.0, 1 - 2 * math.sqrt(math.log(max(1, B)) / self.left))

    def verify(self, takers: list[tuple], tokens: list[int], rows: int, seconds: float) -> list[int]:
        """Which of a step's tokens count: a request's first, and each one after a draft that is what the model takes.

        takers: the request of each token, and how many drafts are before it. rows, seconds: how many tokens the step
        ran, and its time.
        """
        kept, right = list(range(len(takers))), True
        if self.drafts:
            kept = []
            for b, (request, ahead) in enumerate(takers):
                right = ahead == 0 or right and tokens[b - 1] == self.drafts[request][ahead - 1]
                if right:
                    kept.append(b)
        self.account(rows, seconds, sum(takers[b][1] > 0 for b in kept))
        return kept

    def account(self, rows: int, seconds: float, right: int):
        """Learn how long a step of so many tokens takes, and pay for its drafts, of which so many were right. Twice the
        usual time at most is paid for: what takes longer has been compiled, or has busy neighbours."""
        self.seconds.add(rows, seconds)
        self.since = self.since + 1 if self.drafts else 0
        if not self.guessing:
            self.purse.pay(0.0, 0.0, seconds)
            return
        curve, passes, B = self.seconds.curve(), self.drafter.seconds.curve(), self.decodes
        without, a_pass = at(curve, rows - sum(map(len, self.drafts.values()))) or seconds, at(passes, B)
        reading = at(passes, B + self.unread) - a_pass
        usual = reading + self.deepest * a_pass + at(self.looking.curve(), B)
        guessing = min(self.guessing, 2 * usual)
        verifying = min(seconds, 2 * max(without, at(curve, rows))) - without
        saved = right * self.share(B) * at(curve, B) / B
        self.purse.pay(guessing - reading + verifying - saved, reading, without)

    def learn(self, accepted: dict):
        """After the step. accepted: Request -> how many of its drafts were right."""
        self.drafter.keep()
        self.chances.learn(self.offered, self.drafts, accepted, 1 + self.rest)


class Candidate(NamedTuple):
    """Draft n of request b."""
    b: int
    n: int
    probability: float   # of its being right, as it may be hoped
    shown: float         # the same, as it has been shown
    unread: int          # tokens that the drafter must read first; with the request's first draft
    far: bool            # whether these are many: then it comes last


def steps_left(request, scheduler) -> int:
    """As many as the scheduler expects, or as many as the text has gone on for already."""
    expected, written = scheduler.expected_length(request) - len(request.tokens), len(request.output.token_ids)
    return min(max(expected, written), request.max_length - len(request.tokens))


MEMORY = 0.9      # what a trial is worth one trial later
TRUST = 3         # trials that count beside a request's own
HOPE = 0.01       # what a chance gains in a step without a trial


class Chances:
    """How often drafts are right, by the last trials: what may be hoped of a request, and what has been shown.

    Hope decides what is tried. To the request's own trials come TRUST others that went as usual in the last steps; at
    first all are right. To notice that a text has become easy, hope grows by HOPE in each step without a trial. If a
    try costs x of a step, it is made when the chance is about x, every x / HOPE steps: tries cost 1% of the time,
    however large x is.

    What has been shown need not be paid for. To the request's own trials come TRUST others that went like those of the
    requests of this step. These begin with TRUST that were wrong: a hard text after easy ones has shown nothing.
    """

    def __init__(self):
        self.usual = 1.0
        self.trials = WeakKeyDictionary()   # Request -> how many of its drafts were right, and how many were tried
        self.hopes = WeakKeyDictionary()    # Request -> what its chance has gained since its last trial

    def of(self, requests: list) -> list[tuple[float, float]]:
        """Of each request: the chance that may be hoped, and that which has been shown."""
        trials = [self.trials.get(request, (0.0, 0.0)) for request in requests]
        here = sum(right for right, _ in trials) / (TRUST + sum(tried for _, tried in trials))
        return [(min(1.0, (right + TRUST * self.usual) / (tried + TRUST) + self.hopes.get(request, 0.0)),
                 (right + TRUST * here) / (tried + TRUST)) for request, (right, tried) in zip(requests, trials)]

    def learn(self, offered: list, drafts: dict, accepted: dict, steps: int):
        """offered: the requests that could have had drafts; drafts: what some had; accepted: how many of these were
        right. steps: how many will pass until the next chance of a trial."""
        all_right = all_tried = 0
        for request in offered:
            right, tried = self.trials.get(request, (0.0, 0.0))
            n, count = accepted.get(request, 0), len(drafts.get(request, ()))
            all_right, all_tried = all_right + n, all_tried + n + (n < count)
            for success in [1.0] * n + [0.0] * (n < count):
                right, tried = MEMORY * right + success, MEMORY * tried + 1
            self.trials[request] = right, tried
            self.hopes[request] = 0.0 if count else self.hopes.get(request, 0.0) + HOPE * steps
        now = all_right / all_tried if all_tried else min(1.0, self.usual + HOPE * steps)
        if offered:
            old = MEMORY ** max(1, all_tried)
            self.usual = old * self.usual + (1 - old) * now


SPARE = 0.02      # of the time: what drafts may cost while none is right
PURSE = 0.25      # of a step: more than that is not saved up for drafts
LOAN = 4          # steps: more is not lent for drafts
SAVED = 20        # steps: more is not saved for reading
DOUBT = 2         # drafts may cost so many times what the measured times say, above all the first ones


class Purse:
    """What drafts may cost. SPARE of each step's time goes into it, and what right drafts save, until it holds PURSE of
    a step. When it is full, it lends what SPARE of the steps to come will pay back, and may be in debt for a while. So
    drafts that are never right cost SPARE of the time and PURSE of a step; up to LOAN more if the text ends before its
    time.

    What the full purse does not hold goes into savings. They pay for what a draft model reads of a new text; what they
    do not pay for may be lent as well.
    """

    def __init__(self):
        self.held = PURSE     # in steps
        self.savings = 0.0    # in seconds

    def pays(self, price: float, reading: float, step: float, left: int) -> bool:
        """Whether drafts may cost so many seconds, and reading so many, in a step of so many with so many to come.
        Drafts that have been shown to cost less than they save have a price below 0."""
        lent = SPARE * left if self.held == PURSE else 0.0
        whole = price + max(0.0, reading - self.savings)
        return (DOUBT * price <= max(0.0, self.held + min(LOAN, lent)) * step
                and DOUBT * whole <= max(0.0, self.held + lent) * step)

    def pay(self, cost: float, reading: float, step: float):
        """After a step. cost: of the drafts, less what they saved."""
        from_savings = min(reading, self.savings)
        held = self.held + SPARE - (cost + reading - from_savings) / (step or 1.0)
        self.held = min(held, PURSE)
        self.savings = min(self.savings - from_savings + (held - self.held) * step, SAVED * step)


RECENT = 50       # steps for which a measured time stands beside others
FADE = 0.999      # what a measured time is worth a step later
STALE = 0.99      # the same of a step without drafts, while all have drafts


class Times:
    """How long a step takes by its number of tokens: the median of the last three steps of about that size, or of up to
    nine if they were among the last RECENT steps. A token of a prompt counts like a draft: the products, which cost
    most, do not tell them apart.

    The first step of a size does not count: it compiles, records a graph or touches memory for the first time. A size
    is known from its second step on. What is not measured again fades, so that it is tried again one day.
    """

    def __init__(self):
        self.steps = 0
        self.measured: dict[int, deque[tuple[float, int]]] = {}   # size -> seconds, in which step
        self.typical: dict[int, tuple[float, int]] = {}           # size -> median, measured last in which step

    def add(self, rows: int, seconds: float):
        self.steps += 1
        size = about(rows)
        if size not in self.measured:
            self.measured[size] = deque(maxlen=9)
            return
        measured = self.measured[size]
        measured.append((seconds, self.steps))
        while len(measured) > 3 and measured[0][1] <= self.steps - RECENT:
            measured.popleft()
        self.typical.pop(size, None)

    def measure(self, runner: ModelRunner, *sizes: int):
        """Run and time steps of one request with so many tokens, so that something is known of their cost before it
        matters. What is found is worth as much as one step that is measured later."""
        table, pool = BlockTable(), runner.pool
        room = min(pool.block_tables_UM.shape[1] * pool.block_size, runner.model.config.context)
        sizes = [min(size, room) for size in sizes]
        if not pool.grow(table, max(sizes)):
            return
        begin = time.perf_counter()
        for i, size in enumerate(4 * sizes):
            if i < 2 * len(sizes) or time.perf_counter() < begin + 0.5:
                tokens = [token % runner.model.config.V for token in range(size)]   # not all for the same experts
                start = time.perf_counter()
                runner([Chunk(tokens, 0, table.blocks, size if size <= 32 else 1, table.row)]).argmax().item()
                self.add(size, time.perf_counter() - start)
        for measured in self.measured.values():
            typical = sorted(measured)[(len(measured) - 1) // 2]
            measured.clear()
            measured.append(typical)
        pool.release(table)

    def curve(self) -> list[tuple[int, float]]:
        """The known sizes in their order, and their seconds."""
        for size in self.measured.keys() - self.typical.keys():
            times = sorted(seconds for seconds, _ in self.measured[size])
            if times:
                self.typical[size] = times[(len(times) - 1) // 2], self.measured[size][-1][1]
        return sorted((size, seconds * FADE ** (self.steps - step)) for size, (seconds, step) in self.typical.items())


def at(curve: list[tuple[int, float]], rows: int) -> float:
    """Seconds of a step of so many tokens: on a straight line between its neighbours, or beyond the last two. Below
    the smallest known size: in proportion to the tokens, but at least half of its time. If one size is known, a larger
    step is taken to cost the same, so that it is tried."""
    after = bisect_left(curve, (rows, 0.0))
    if not curve:
        return 0.0
    if after == 0 or len(curve) == 1:
        size, seconds = curve[0]
        return seconds * min(1.0, max(0.5, rows / size))
    inside = after < len(curve)
    (size, seconds), (size_2, seconds_2) = curve[after - 1:after + 1] if inside else curve[-2:]
    slope = (seconds_2 - seconds) / (size_2 - size)
    return seconds_2 + (rows - size_2) * (slope if inside else max(0.0, slope))


def about(number: int, digits: int = 4) -> int:
    """The number rounded down to so many binary digits. To four: 1 to 16, 18, 20, ... 32, 36, 40, ..."""
    step = 1 << max(0, number.bit_length() - digits)
    return number // step * step


# ---------------------------------------------------------------------------------------------
# Drafters

class Drafter:
    """Who guesses. This one never does; those that do have methods of their own in place of these."""

    def __init__(self):
        self.seconds = Times()   # of a pass by its number of tokens; who has no passes has none
        self.spent = 0.0         # seconds of the passes of the last guess

    def offers(self, requests: list, rooms: list[int]) -> list[int]:
        """How many drafts each request could have; no more than its room."""
        return [0] * len(requests)

    def guess(self, requests: list, counts: list[int]) -> list[list[int]]:
        """Up to so many drafts for each request."""
        return [[] for _ in requests]

    def unread(self, requests: list) -> list[int]:
        """How many tokens of each request it must read before its first draft, beside the last one."""
        return [0] * len(requests)

    def keep(self):
        """After the step: of what it has run, that remains which the model has accepted."""


class NgramDrafter(Drafter):
    """Proposes what followed the last few tokens where they stood before, in prompt or answer (Saxena 2023).

    It costs a few look-ups per token, and pays where an answer repeats its prompt: quotations, code, summaries.
    """
    SIZES = 4, 3, 2   # the longest n-gram that is found decides

    def __init__(self):
        super().__init__()
        self.places = WeakKeyDictionary()   # Request -> (n-gram -> the place behind its last occurrence, tokens seen)
        self.found = []

    def offers(self, requests: list, rooms: list[int]) -> list[int]:
        self.found = [self.look_up(request, room) if room > 0 else [] for request, room in zip(requests, rooms)]
        return list(map(len, self.found))

    def guess(self, requests: list, counts: list[int]) -> list[list[int]]:
        return [drafts[:count] for drafts, count in zip(self.found, counts)]

    def look_up(self, request, room: int) -> list[int]:
        tokens = request.tokens
        places, seen = self.places.setdefault(request, ({}, [1]))
        for place in range(seen[0], len(tokens)):   # a token stands there, so what ends before it has been followed
            for n in self.SIZES:
                if n <= place:
                    places[tuple(tokens[place - n:place])] = place
        seen[0] = len(tokens)
        for n in self.SIZES:
            if place := places.get(tuple(tokens[-n:]), 0) if n <= len(tokens) else 0:
                period = len(tokens) - place   # where the text ends, go on with the drafts themselves
                return [tokens[place + i % period] for i in range(room)]
        return []


class DraftModel(Drafter):
    """A smaller model with the same vocabulary, which writes ahead.

    Its K and V are in `pool.draft`, in the blocks of the model's tables. `table.drafted` says how many tokens of a
    request it has read. It reads a prompt when drafts seem to pay, in chunks of the token budget, so drafts begin later
    than the text. It falls behind while they do not pay, and catches up when they do. A block that others computed has
    the draft's K and V if it is in `pool.drafted_blocks`; if not, one of those who share it computes them.
    """

    def __init__(self, model: Model, pool: KVPool, max_batched_tokens: int, cuda_graphs: bool):
        super().__init__()
        self.runner, self.cuda_graphs = ModelRunner(model, pool.draft, pool, cuda_graphs), cuda_graphs
        self.pool, self.max_batched_tokens, self.context = pool, max_batched_tokens, model.config.context
        self.reached = {}   # Request -> the end of what was run in this step
        self.seconds.measure(self.runner, 1, 4, 64)

    def offers(self, requests: list, rooms: list[int]) -> list[int]:
        self.reached = {}   # a step that failed may have left something
        return [max(0, min(room, self.context - len(request.tokens))) for request, room in zip(requests, rooms)]

    def unread(self, requests: list) -> list[int]:
        """What others have read is not to be read again, nor what one of these requests reads for the others."""
        S, found, reading = self.pool.block_size, [], set()
        for request in requests:
            table = request.table
            while table.drafted % S == 0 and table.blocks[table.drafted // S] in self.pool.drafted_blocks:
                table.drafted += S
            blocks = table.blocks[table.drafted // S:]
            shared = sum(block in reading for block in blocks)
            found.append(max(0, len(request.tokens) - table.drafted - 1 - S * shared))
            reading.update(blocks)
        return found

    def guess(self, requests: list, counts: list[int]) -> list[list[int]]:
        """Up to so many drafts for each request: one pass for what the draft has not seen yet and the first draft, then
        a pass for each further one."""
        S, budget, writing = self.pool.block_size, self.max_batched_tokens, set()
        drafts, chunks = {request: [] for request in requests}, []
        for request, count in zip(requests, counts):
            table = request.table
            tokens = request.tokens[table.drafted:table.drafted + budget]
            blocks = table.blocks[table.drafted // S:self.pool.blocks_for(table.drafted + len(tokens))]
            if count and tokens and writing.isdisjoint(blocks):   # else another is about to write the same
                wants = int(table.drafted + len(tokens) == len(request.tokens))
                if wants and self.cuda_graphs and len(tokens) <= SHORT:
                    wants = len(tokens)   # so that a graph can replay it; the last ones count
                chunks.append((request, Chunk(tokens, table.drafted, table.blocks, wants, table.row)))
                writing.update(blocks)
                budget -= len(tokens)
        wanted, self.spent = dict(zip(requests, counts)), 0.0
        while chunks:
            begin = time.perf_counter()
            again = [request for request in self.run(chunks, drafts) if len(drafts[request]) < wanted[request]]
            seconds = time.perf_counter() - begin
            self.seconds.add(sum(len(chunk.tokens) for _, chunk in chunks), seconds)
            self.spent += seconds
            chunks = [(request, Chunk(drafts[request][-1:], self.reached[request], request.table.blocks,
                                      row=request.table.row)) for request in again]
        return list(drafts.values())

    def run(self, chunks: list[tuple], drafts: dict) -> list:
        """One pass. The requests that have got a draft."""
        chunks.sort(key=lambda entry: len(entry[1].tokens))
        logits_BV = self.runner([chunk for _, chunk in chunks])
        takers = [request for request, chunk in chunks if chunk.logits]
        if len(takers) < len(logits_BV):
            ends = accumulate(chunk.logits for _, chunk in chunks if chunk.logits)
            logits_BV = logits_BV[[end - 1 for end in ends]]
        positions = [len(request.tokens) + len(drafts[request]) for request in takers]
        tokens = sample(logits_BV, [request.params for request in takers], [request.key for request in takers],
                        positions) if takers else []
        for request, chunk in chunks:
            self.reached[request] = chunk.start + len(chunk.tokens)
        for request, token in zip(takers, tokens):
            if token >= 0:   # else the draft model's logits are not finite
                drafts[request].append(token)
        return [request for request, token in zip(takers, tokens) if token >= 0]

    def keep(self):
        S = self.pool.block_size
        for request, reached in self.reached.items():
            table, before = request.table, request.table.drafted
            table.drafted = min(reached, request.computed)
            self.pool.drafted_blocks.update(table.blocks[before // S:table.drafted // S])
        self.reached = {}


def load_draft(folder: str | Path | Config, config: Config, tokenizer, device: torch.device, dtype: torch.dtype,
               attention: str, quantization: str | None) -> Model:
    """The draft model of a folder (or of a Config, with random weights) beside a model of this config and tokenizer.

    Raises ValueError, in one sentence, for what does not exist, cannot run or has another vocabulary.
    """
    here = isinstance(folder, Config)
    if not here and not Path(folder).is_dir():
        raise ValueError(f"speculative_model {str(folder)!r} does not exist: use ngram, or the folder of a smaller "
                         "model with the same vocabulary")
    try:
        c = folder if here else read_config(Path(folder))
        kernels.check(attention, device, dtype, *c.attended)
        other = None if here else load_tokenizer(Path(folder))
        if c.V != config.V or tokenizer and other and tokenizer.words != other.words:
            size = f"{c.V} tokens and the model's has {config.V}" if c.V != config.V else "other words than the model's"
            raise ValueError(f"its vocabulary has {size}: take a draft model with the same vocabulary")
        quantization = None if c.stored else quantization
        weights = (random_weights(c, device, dtype, quantization) if here else
                   load_weights(Path(folder), c, device, dtype, quantization))
    except ValueError as error:
        raise ValueError(f"speculative_model {'' if here else folder}: {error}") from None
    return Model(c, weights, attention)
