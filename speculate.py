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

import time
from bisect import bisect_left
from collections import deque
from itertools import accumulate
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

import kernels
from batch import SHORT, Chunk
from checkpoint import load_weights, random_weights
from config import Config, read_config
from model import Model, ModelRunner
from paged_kv import KVPool
from sampling import sample
from tokenizer import load_tokenizer


# ---------------------------------------------------------------------------------------------
# How many drafts pay

WEIGHT = 0.1      # of the newest trial in the moving average that a chance is
HOPE = 0.001      # what a chance gains in a step without a trial
FADE = 0.999      # what a measured time is worth a step later
MARGIN = 1.1      # speed with drafts must be so many times that without, as measured times are noisy
UNLIKELY = 0.03   # a draft that is right less often is not worth thinking about
THINKING = 0.01   # of the time: what looking for drafts may take while none is found that pays
SPARE = 0.025     # of the time: what drafts may cost while none is right
PURSE = 0.25      # of a step: more than that is not saved up for drafts
UNKNOWN = 0.3     # of a step: what drafts are taken to cost at least, in a step twice as large as any known one


class Speculator:
    """Adds drafts to the decodes of a step, and says which of its tokens count when it has run.

    The rule. Draft n of a request is right with probability chance ** n, where the chance is a moving average of what
    was right lately. Drafts are taken in the order of their probability, as many as make the speed largest:

        tokens     one for each request, plus the probabilities of the drafts
        seconds    a decode step, plus what the drafts' rows add to it, plus the passes of the draft model
        speed      tokens / seconds

    With a chance of 0.8, a step of 10 ms and 0.5 ms per draft, one draft makes 1.8 tokens in 10.5 ms, two 2.44 in 11,
    four 3.36 in 12, eight 4.33 in 14: eight it is, or as many as are allowed. If the best speed is less than MARGIN
    times that without drafts, there are none.
    The times are measured as steps run (`Times`). So the number of drafts follows the text, the batch and the machine,
    down to none.

    To notice that a text has become easy, a chance grows by HOPE in each step that does not try it. If a try costs x of
    a step, it is made when the chance is about x. Its failure takes WEIGHT * x off the chance, which needs WEIGHT * x /
    HOPE steps to come back. So tries cost HOPE / WEIGHT = 1% of the time, however large x is.

    At first the chances and the times are no more than guesses, and a short text has no time to make good what they
    cost. So drafts are paid for from a purse. SPARE of each step's time goes into it, and what right drafts save, until
    it holds PURSE of a step. A step takes no more drafts than can be paid for if none is right but those that `shown`
    promises: a chance like the other, which begins at 0. (A full purse pays for a first draft, or for those of a lone
    request, whatever they cost: at batch 1 a single draft may cost half a step.) So drafts that are never right cost
    2.5% of the time, and a quarter of a step or one such lump. What a draft model reads of a prompt is not counted.

    Looking for drafts takes time itself: 0.2 ms for 16 requests, 5% of a step of demo/llama. So after a step for which
    none were worth it, it rests for as many steps as make that THINKING of the time. With a large model these are none.
    """

    def __init__(self, drafter: NgramDrafter | DraftModel, most: int):
        """most: drafts per request and step, of which no more are taken than a short chunk has room for."""
        self.drafter, self.most = drafter, min(most, SHORT - 1)
        self.seconds = Times()                  # of the model's step by its number of tokens
        self.usual = 0.5                        # the chance with which a new request begins: that of the last trials
        self.chances = WeakKeyDictionary()      # Request -> chance
        self.shown = WeakKeyDictionary()        # Request -> chance as its own drafts have shown it
        self.purse = PURSE                      # in steps
        self.drafts = {}                        # Request -> its drafts in this step
        self.decodes = 0                        # requests that decode in this step, unless it rests
        self.offered = []                       # those of them that could have had drafts
        self.rest = 0                           # for how many steps it does not look for drafts

    def draft(self, plan: list[tuple], scheduler):
        """Put drafts behind the last tokens of requests that decode. They take what is left of the token budget, and
        blocks that are left now. Such a chunk wants logits for each of its tokens."""
        self.drafts, self.offered = {}, []
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
        offers = self.drafter.offers(requests, rooms)
        self.offered = [request for request, offer in zip(requests, offers) if offer]
        budget = scheduler.max_batched_tokens - rows
        counts = self.worthwhile(requests, offers, rows) if self.offered else []
        if not any(counts):
            if step := at(self.seconds.curve(), rows):
                self.rest = int((time.perf_counter() - begin) / (THINKING * step))
            return
        for b, request in enumerate(requests):
            if counts[b]:
                counts[b] = scheduler.grow_for_drafts(request, min(counts[b], budget))
                budget -= counts[b]
        for (request, chunk), drafts in zip(decodes, self.drafter.guess(requests, counts)):
            if drafts:
                self.drafts[request] = drafts
                chunk.tokens, chunk.logits = chunk.tokens + drafts, 1 + len(drafts)
        plan.sort(key=lambda entry: len(entry[1].tokens))

    def worthwhile(self, requests: list, offers: list[int], rows: int) -> list[int]:
        """How many of the offered drafts to take for each request, in a step that runs so many tokens without them. A
        step gets at most 8 tokens, or twice as many as the largest known one, whichever is more."""
        counts, candidates, curve = [0] * len(requests), [], self.seconds.curve()
        if not curve:
            return counts
        for b, (request, offer) in enumerate(zip(requests, offers)):
            chance, shown = self.chances.get(request, self.usual), self.shown.get(request, 0.0)
            candidates += [(-chance ** n, n, b, shown ** n) for n in range(1, offer + 1) if chance ** n > UNLIKELY]
        candidates.sort()
        alone, without, largest = at(curve, len(requests)), at(curve, rows), curve[-1][0]   # alone: no prompts either
        a_pass, tokens, sure, deepest = at(self.drafter.seconds.curve(), len(requests)), len(requests), 0.0, 0
        best, best_count = MARGIN * tokens / alone, 0
        candidates = candidates[:max(0, max(8, 2 * largest) - rows)]
        for count, (probability, n, _, shown) in enumerate(candidates, 1):
            tokens, sure, deepest = tokens - probability, sure + shown, max(deepest, n)
            if count == about(count, 3) or count == len(candidates):   # 1 to 8, 10, 12, ...: some are enough
                cost = at(curve, rows + count) - without + deepest * a_pass
                speed = tokens / (alone + cost)
                beyond = min(1.0, max(0.0, (rows + count) / largest - 1))
                price = max(cost, UNKNOWN * beyond * without) - sure * alone / len(requests)
                lump = self.purse == PURSE and (count == 1 or len(requests) == 1)
                if speed >= best and (lump or price / without <= self.purse):
                    best, best_count = speed, count
        for _, _, b, _ in candidates[:best_count]:
            counts[b] += 1
        return counts

    def verify(self, takers: list[tuple], tokens: list[int], rows: int, seconds: float) -> list[int]:
        """Which of a step's tokens count: a request's first, and each one after a draft that is what the model takes.

        takers: the request of each token, and how many drafts are before it. rows, seconds: how many tokens the step
        ran, and its time.
        """
        kept, right = [], True
        for b, (request, ahead) in enumerate(takers):
            right = ahead == 0 or right and tokens[b - 1] == self.drafts[request][ahead - 1]
            if right:
                kept.append(b)
        self.pay(rows, seconds, sum(takers[b][1] > 0 for b in kept))
        return kept

    def pay(self, rows: int, seconds: float, right: int):
        """Learn how long a step of so many tokens takes, and pay for its drafts, of which so many were right. A time
        that is not known yet may be that of compiling, or a neighbour's burst: it counts as twice a step without drafts
        at most."""
        self.seconds.add(rows, seconds)
        counts, curve = list(map(len, self.drafts.values())), self.seconds.curve()
        without = at(curve, rows - sum(counts))
        if counts and without:
            verified = at(curve, rows) if about(rows) in self.seconds.typical else min(seconds, 2 * without)
            passes = max(counts) * at(self.drafter.seconds.curve(), self.decodes)
            saved = right * at(curve, self.decodes) / self.decodes
            self.purse += (saved + without - verified - passes) / without
        self.purse = min(self.purse + SPARE, PURSE)

    def learn(self, accepted: dict):
        """After the step. accepted: Request -> how many of its drafts were right."""
        self.drafter.keep()
        hope = HOPE * (1 + self.rest)   # for the steps to come without a trial, too
        for request in self.offered:
            chance, drafts = self.chances.get(request, self.usual), len(self.drafts.get(request, ()))
            shown, right = self.shown.get(request, 0.0), accepted.get(request, 0)
            for success in [1.0] * right + [0.0] * (right < drafts):
                chance, shown, self.usual = (x + WEIGHT * (success - x) for x in (chance, shown, self.usual))
            self.chances[request], self.shown[request] = chance if drafts else min(1.0, chance + hope), shown
        if self.offered and not self.drafts:
            self.usual = min(1.0, self.usual + hope)


class Times:
    """How long a step takes by its number of tokens: the median of the last nine steps of about that size. A token of a
    prompt counts like a draft: the products, which cost most, do not tell them apart.

    The first step of a size does not count: it compiles, records a graph or touches memory for the first time. A size
    is known from its third step on. What is not measured again fades, so that it is tried again one day.
    """

    def __init__(self):
        self.steps = 0
        self.recent: dict[int, deque[float]] = {}
        self.typical: dict[int, tuple[float, int]] = {}   # size -> median, measured in which step

    def add(self, rows: int, seconds: float):
        self.steps += 1
        size = about(rows)
        if size not in self.recent:
            self.recent[size] = deque()
            return
        _, measured = self.typical.get(size, (0.0, self.steps - 1))
        fade = FADE ** (self.steps - 1 - measured)
        recent = self.recent[size] = deque([*(old * fade for old in self.recent[size]), seconds], maxlen=9)
        if len(recent) > 1:
            self.typical[size] = sorted(recent)[(len(recent) - 1) // 2], self.steps

    def curve(self) -> list[tuple[int, float]]:
        """The known sizes in their order, and their seconds."""
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
# Drafts from the text

class NgramDrafter:
    """Proposes what followed the last few tokens where they stood before, in prompt or answer (Saxena 2023).

    It costs a few look-ups per token, and pays where an answer repeats its prompt: quotations, code, summaries.
    """
    SIZES = 4, 3, 2   # the longest n-gram that is found decides

    def __init__(self):
        self.seconds = Times()              # of its passes: none
        self.places = WeakKeyDictionary()   # Request -> (n-gram -> the place behind its last occurrence, tokens seen)
        self.found = []

    def offers(self, requests: list, rooms: list[int]) -> list[int]:
        """How many drafts each request could have; no more than its room."""
        self.found = [self.look_up(request, room) if room > 0 else [] for request, room in zip(requests, rooms)]
        return list(map(len, self.found))

    def guess(self, requests: list, counts: list[int]) -> list[list[int]]:
        """So many drafts for each request."""
        return [drafts[:count] for drafts, count in zip(self.found, counts)]

    def keep(self):
        """After the step: nothing, as it has no K and V."""

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


# ---------------------------------------------------------------------------------------------
# Drafts from a smaller model

class DraftModel:
    """A smaller model with the same vocabulary, which writes ahead.

    Its K and V are in `pool.draft`, in the blocks of the model's tables. `table.drafted` says how many tokens of a
    request it has read. It reads a prompt when the request begins to decode, in chunks of the token budget, so drafts
    begin a little later than the text. It falls behind while drafts do not pay, and catches up when they do. A block
    that others computed has the draft's K and V if it is in `pool.drafted_blocks`; if not, one of those who share it
    computes them.
    """

    def __init__(self, model: Model, pool: KVPool, max_batched_tokens: int, cuda_graphs: bool):
        self.runner, self.cuda_graphs = ModelRunner(model, pool.draft, pool, cuda_graphs), cuda_graphs
        self.pool, self.max_batched_tokens, self.context = pool, max_batched_tokens, model.config.context
        self.seconds = Times()   # of a pass by the number of requests
        self.reached = {}        # Request -> the end of what was run in this step

    def offers(self, requests: list, rooms: list[int]) -> list[int]:
        """How many drafts each request could have: its room, within the draft model's own context."""
        self.reached = {}   # a step that failed may have left something
        return [max(0, min(room, self.context - len(request.tokens))) for request, room in zip(requests, rooms)]

    def guess(self, requests: list, counts: list[int]) -> list[list[int]]:
        """Up to so many drafts for each request: one pass for what the draft has not seen yet and the first draft, then
        a pass for each further one."""
        S, budget, writing = self.pool.block_size, self.max_batched_tokens, set()
        drafts, chunks = {request: [] for request in requests}, []
        for request, count in zip(requests, counts):
            table = request.table
            while count and table.drafted % S == 0 and table.blocks[table.drafted // S] in self.pool.drafted_blocks:
                table.drafted += S
            tokens = request.tokens[table.drafted:table.drafted + budget]
            blocks = table.blocks[table.drafted // S:self.pool.blocks_for(table.drafted + len(tokens))]
            if count and tokens and writing.isdisjoint(blocks):   # else another is about to write the same
                wants = int(table.drafted + len(tokens) == len(request.tokens))
                if wants and self.cuda_graphs and len(tokens) <= SHORT:
                    wants = len(tokens)   # so that a graph can replay it; the last ones count
                chunks.append((request, Chunk(tokens, table.drafted, table.blocks, wants, table.row)))
                writing.update(blocks)
                budget -= len(tokens)
        wanted = dict(zip(requests, counts))
        while chunks:
            begin = time.perf_counter()
            again = [request for request in self.run(chunks, drafts) if len(drafts[request]) < wanted[request]]
            if all(len(chunk.tokens) <= 2 for _, chunk in chunks):   # what else is run is to catch up, once
                self.seconds.add(len(chunks), time.perf_counter() - begin)
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
        """After the step: of what the draft has run, that remains which the model has accepted."""
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
