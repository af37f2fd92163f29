"""Measure, then compare with what the hardware allows. (Read roofline.py first.)

    python bench.py               the two phases: what prefill and decode cost, and which limit binds each
    python bench.py batch         decode against batch size: what serving many costs beside serving one
    python bench.py cache         a token's cost with the KV cache and without it
    python bench.py traffic       the bytes of attention, naive and in tiles
    python bench.py estimate      all of this on paper, for a model and a machine that are not here
    python bench.py serve         continuous and static batching, chunked prefill, prefix cache, on the same requests
    python bench.py disaggregate  prompts and decodes in one process and in two, and when two pay
    python bench.py sampling      what choosing tokens costs beside the rest of a decode step
    python bench.py quantization  what weights, keys and values in 8 bits gain, and what they lose
    python bench.py speculate     what drafts gain: how often they are right, and what it costs to verify them
    python bench.py cpu           prefill and decode on this CPU, beside transformers where that is installed
    python bench.py kernels       attention and 8-bit products: without a GPU, what the compiler makes of them for
                                  GPUs that are not here; with one, whether they are right and how near to its limits

Whoever else works on the machine disturbs a measurement. So what is compared is measured in turns, and the median turn
counts; a ratio on which the turns do not agree is not printed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

from device import find_device   # before torch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import experts
import kernels
import latent
import linear
import nanoserve
from batch import Chunk, make_batch
from config import Config, read_config
from cli import check_writable, exit_status
from distributed import Disaggregated
from linear import DTYPES
from nanoserve import LLM, SamplingParams
from roofline import (HARDWARE, LINKS, SHAPES, Ceiling, attention_flops, clock, config_of, cost_of, crossover,
                      gpu_seconds, handing_over, in_8_bits, in_turns, kv_bytes, layer_weights, machine,
                      measured_ceiling, on_paper, ratio, step_cost, weight_bytes)
from sampling import mix
from speculate import Drafter, NgramDrafter, Speculator

DEMO = Path(__file__).parent / "demo/llama"


# ---------------------------------------------------------------------------------------------
# What the reader sees

TABLES: list[dict] = []   # all that were printed, for --json and --plot


def show(value) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3}f}"


def print_table(title: str, header: list[str], rows: list[list], note: str = "", plot: tuple = ()):
    """A table of at most 100 columns, numbers to the right, and below it what it says. plot: the columns to draw, the
    first of them along the x axis."""
    TABLES.append(dict(title=title, header=header, rows=rows, note=note, plot=plot))
    cells = [header] + [[show(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    progress("")
    print(f"\n{textwrap.fill(title, 100)}\n")
    for row in cells:
        line = "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        print(line.rstrip())
    if note:
        print(f"\n{textwrap.fill(note, 100)}")


def progress(text: str):
    """On a terminal, a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def save_json(path: str, command: list[str], device: torch.device):
    packages = [name for name in ("torch", "triton", "transformers") if find_spec(name)]
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    date = datetime.datetime.now().isoformat(timespec="seconds")
    record = dict(command=command, date=date, machine=machine(device), versions=versions, tables=TABLES)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def save_plot(path: str, pyplot):
    """Every table: the columns that it names on logarithmic axes, else its first column of numbers as bars."""
    figure, axes = pyplot.subplots(len(TABLES), figsize=(8, 4.5 * len(TABLES)), squeeze=False)
    for (axis,), table in zip(axes, TABLES):
        header, rows = table["header"], table["rows"]
        axis.set_title(table["title"], fontsize=9)
        if table["plot"]:
            x, *ys = (header.index(name) for name in table["plot"])
            for y in ys:
                axis.plot(*zip(*sorted((row[x], row[y]) for row in rows)), "o-", label=header[y])
            axis.set(xlabel=header[x], xscale="log", yscale="log")
            axis.legend()
        elif numbers := [i for i, cell in enumerate(rows[0]) if not isinstance(cell, str)]:
            axis.barh([row[0] for row in rows][::-1], [row[numbers[0]] for row in rows][::-1])
            axis.set_xlabel(header[numbers[0]])
    figure.tight_layout()
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------
# The engine under test

class Lab:
    """A model on a device, as the arguments ask for, and what the machine could do."""

    def __init__(self, args: argparse.Namespace, ceiling: bool = True, max_seqs: int = 32):
        self.source = config_of(args.random) if args.random else Path(args.model or DEMO)
        name = args.random or "/".join(self.source.parts[-2:])
        self.config = self.source if args.random else read_config(self.source)
        if self.config.context < 256:   # before any weight is read
            raise ValueError(f"{name} has a context of {self.config.context}: the measurements need 256 at least")
        self.llm = LLM(self.source, args.device, args.dtype, prefix_cache=False, max_seqs=max_seqs)
        self.device, self.itemsize = self.llm.device, DTYPES[self.llm.dtype].itemsize
        print(f"{name} in {self.llm.dtype} on {machine(self.device)}, PyTorch {torch.__version__}")
        if ceiling:
            progress("measuring the ceilings")
            self.ceiling = peak, bandwidth = measured_ceiling(self.device, self.llm.dtype)
            print(f"Ceilings as measured: {peak / 1e9:,.0f} GFLOP/s and {bandwidth / 1e9:,.0f} GB/s, a balance of "
                  f"{self.ceiling.balance:.0f} operations per byte")

    def engine(self, **options) -> LLM:
        """Another LLM with the same weights. Each prompt is new to it unless prefix_cache is asked for."""
        options = dict(prefix_cache=False, max_seqs=32) | options
        return LLM(self.source, self.device, self.llm.dtype, weights=self.llm.model.weights, **options)


def random_prompt(c: Config, n: int) -> list[int]:
    return random.choices(range(c.V), k=n)


def generate(llm: LLM, prompts: list[list[int]], new: list[int]):
    """So many new tokens for each prompt."""
    outs = llm.generate(prompts, [SamplingParams(max_tokens=n, ignore_eos=True) for n in new])
    for out, n in zip(outs, new):
        if out.error:
            raise ValueError(f"{llm.folder or 'random weights'}: {out.error}")
        assert len(out.token_ids) == n


def prefill_seconds(llm: LLM, B: int, T: int) -> float:
    """Seconds to the first tokens of B prompts of T tokens."""
    prompts = [random_prompt(llm.config, T) for _ in range(B)]
    return clock(lambda: generate(llm, prompts, [1] * B), llm.device)


WARM = 4   # steps that do not count: on a GPU the first one of a batch size is compiled and recorded


def decode_steps(llm: LLM, B: int, context: int, steps: int, params=lambda i: None) -> list[float]:
    """Seconds of so many decode steps of B requests that have so many tokens, on average. params(i): with which
    SamplingParams step i chooses, i < 0 for those that do not count; None: as before, at first greedily."""
    until_all_decode = 2 * B * (1 + context // llm.scheduler.max_batched_tokens)   # steps, at most
    first = SamplingParams(max_tokens=until_all_decode + steps + WARM + 2, ignore_eos=True)
    for _ in range(B):
        llm.add(random_prompt(llm.config, max(1, context - steps // 2 - WARM)), first)
    while any(request.pending > 1 for request in llm.requests.values()):
        llm.step()
    seconds = []
    for i in range(-WARM, steps):
        for request in llm.requests.values():
            request.params = params(i) or request.params
        seconds.append(clock(llm.step, llm.device))
    if len(llm.requests) < B:
        raise ValueError("a request ended before its measurement did: its context is too short, or its logits are not "
                         "finite")
    for request_id in list(llm.requests):
        llm.abort(request_id)
    return seconds[WARM:]


def decode_seconds(llm: LLM, B: int, context: int, steps: int = 12) -> float:
    """Median seconds of a decode step."""
    return median(decode_steps(llm, B, context, steps))


@contextmanager
def stopwatch(llm: LLM):
    """While it runs: the seconds of every call of the model (or of the graph that replays it) and of every choice of
    tokens, as two lists."""
    def timed(function, seconds: list[float]):
        def call(*arguments):
            results = []
            seconds.append(clock(lambda: results.append(function(*arguments)), llm.device))
            return results[0]
        return call

    model, choosing = [], []
    owner, name = (llm.runner.graphs, "replay") if llm.runner.graphs else (llm.runner, "forward")
    with (patch.object(owner, name, timed(getattr(owner, name), model)),
          patch.object(nanoserve, "choose", timed(nanoserve.choose, choosing))):
        yield model, choosing


def loop_seconds(llm: LLM, B: int, steps: int = 160) -> tuple[float, float, float]:
    """Median seconds of a decode step, and of the model and of choosing tokens in it."""
    with stopwatch(llm) as (model, choosing):
        whole = decode_steps(llm, B, 128, steps)
    return median(whole), median(model[-steps:]), median(choosing[-steps:])


# ---------------------------------------------------------------------------------------------
# The commands

def phases(args: argparse.Namespace):
    """Prefill and decode: time, operations, bytes, and which of the two limits binds."""
    lab, rows = Lab(args), []
    longest = min(512, lab.config.context - 64)
    cases = [("prefill", prefill_seconds, 1, T, (T, 0)) for T in (longest // 16, longest // 4, longest)]
    cases += [("decode", decode_seconds, B, longest // 4, (1, longest // 4)) for B in (1, 4, 16)]
    progress("measuring in turns")
    columns = in_turns([partial(measure, lab.llm, B, T) for _, measure, B, T, _ in cases])
    for (phase, _, B, T, chunk), column in zip(cases, columns):
        seconds, cost = median(column), step_cost(lab.config, [chunk] * B, lab.itemsize)
        rows.append([f"{phase} {B} x {T}", seconds * 1e3, B * chunk[0] / seconds, cost.flops / 1e6, cost.bytes / 1e6,
                     cost.flops / cost.bytes, cost.flops / seconds / lab.ceiling.peak * 100,
                     cost.bytes / seconds / lab.ceiling.bandwidth * 100, lab.ceiling.verdict(cost)])
    gain = ratio([longest * seconds for seconds in columns[3]], columns[2])   # of tokens/s
    gain = "many" if gain == "-" else round(gain)
    print_table("The two phases (batch x tokens; a decode step makes one token per request)",
                ["", "ms", "tokens/s", "MFLOP", "MB", "FLOP/B", "% of peak", "% of bandwidth", "bound"], rows,
                "For a prompt, the time is TTFT; for batch 1, tokens/s of decode is TPS. A prompt's tokens share every "
                f"weight read, so prefill does {gain} times as many tokens per second as decode at batch 1; "
                "batching gives decode a part of that back. Where neither share is near 100%, fixed costs rule.",
                ("FLOP/B", "% of peak"))


def batch(args: argparse.Namespace):
    """Decode against batch size, measured and by the roofline: a step reads the weights once for all its requests, so
    it costs little more for several, until their own K and V, or their operations, outweigh the weights."""
    lab, rows, context = Lab(args), [], 128
    c, pool, sizes = lab.config, lab.llm.pool, [1, 2, 4, 8, 16, 32]
    progress("measuring in turns")
    for B, column in zip(sizes, in_turns([partial(decode_seconds, lab.llm, B, context) for B in sizes])):
        seconds, floor = median(column), lab.ceiling.seconds(step_cost(c, [(1, context)] * B, lab.itemsize))
        rows.append([B, seconds * 1e3, B / seconds, 1 / seconds, floor * 1e3, floor / seconds * 100])
    knee = next((row[0] for row in rows if row[1] > 2 * rows[0][1]), None)
    turn = f"batch {knee} is the first to take more" if knee else f"batch {sizes[-1]} takes less"
    print_table(f"Decode at {context} tokens of context against batch size",
                ["batch", "ms per step", "tokens/s", "each", "roofline ms", "% of roofline"], rows,
                f"By the roofline decode turns {crossover(c, lab.ceiling, context, lab.itemsize)}. Measured, a step of "
                f"{turn} than twice the time of batch 1. By the roofline a decode's cost is reading the weights once "
                "for all; where its measured time grows sooner, products of a few rows are slow, or each request's own "
                f"costs are not small beside them. A request of {c.context} tokens holds "
                f"{kv_bytes(c, lab.itemsize) * c.context / 1e6:,.1f} MB of K and V, and this pool has room for "
                f"{pool.num_blocks * pool.block_size // c.context} of them.", ("batch", "tokens/s", "each"))


def kv_cache(args: argparse.Namespace):
    """A token's cost with the KV cache, and with the whole prefix computed again."""
    lab, rows, total = Lab(args, ceiling=False), [], [0.0, 0.0]
    most = min(lab.config.context - 64, 1024)
    before = (0, 0.0, 0.0)
    for T in [n for n in (32, 64, 128, 256, 512, 1024) if n < most] + [most]:
        progress(f"a token at position {T}")
        cached, again = in_turns([partial(decode_seconds, lab.llm, 1, T), partial(prefill_seconds, lab.llm, 1, T)])
        now = (T, median(cached), median(again))
        total = [s + (now[0] - before[0]) * (now[i] + (before[i] or now[i])) / 2 for i, s in enumerate(total, 1)]
        rows.append([T, now[1] * 1e3, now[2] * 1e3, ratio(again, cached), *total, total[1] / total[0]])
        before = now
    print_table("The next token at a position: with the KV cache, and recomputing its whole prefix",
                ["position", "cached ms", "recomputed ms", "ratio", "total s", "recomputed total s", "ratio of totals"],
                rows, "With the cache a token costs about the same wherever it stands: a text grows linearly dearer. "
                "Without it a token costs what its prefix costs, and a text grows quadratically dearer.",
                ("position", "cached ms", "recomputed ms"))


def traffic(args: argparse.Namespace):
    """The bytes of one head's attention: intermediates written and read, against tiles that never leave the chip."""
    device, d, rows = find_device(args.device), args.head_dim, []
    name = ("float32" if device.type == "cpu" else "bfloat16") if args.dtype == "auto" else args.dtype
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported: use auto, {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    for T in sorted({args.tokens // 8, args.tokens // 2, args.tokens}):
        progress(f"attention over {T} tokens")
        naive, tiled = 8 * T * T + 8 * T * d, 8 * T * d
        q, k, v = (torch.randn(1, 1, T, d, device=device, dtype=dtype) for _ in "qkv")
        ways = (lambda: (q @ k.mT * d ** -0.5).softmax(-1) @ v, lambda: F.scaled_dot_product_attention(q, k, v))
        slow, fast = in_turns([partial(clock, way, device) for way in ways])
        rows.append([T, 8 * T * T / 2 ** 20, naive / 2 ** 20, tiled / 2 ** 20, naive / tiled, T / d, median(slow) * 1e3,
                     median(fast) * 1e3, ratio(slow, fast)])
    print_table(f"Attention's traffic for one head of size {d}, two-byte types; times: {dtype} on {machine(device)}",
                ["tokens", "8 T^2 MiB", "naive MiB", "tiled MiB", "ratio", "T / d", "naive ms", "tiled ms", "faster"],
                rows, "Naive attention writes the T x T scores, reads them for the softmax, writes the weights and "
                "reads them for the product with V: four times 2 T^2 bytes. Tiles leave q, k, v and the result, 8 T d "
                "bytes, so the ratio is 1 + T / d. (Keys that every tile of queries reads anew come from the cache.) "
                "Time follows bytes only where bytes are the limit.", ("tokens", "naive ms", "tiled ms"))


def estimate(args: argparse.Namespace):
    """What a model must cost on a machine, on paper, each formula with its numbers in it."""
    name = args.random or args.model or "llama-3-8b"
    path = Path(name)
    c = config_of(name) if name in SHAPES else read_config(path.parent if path.name == "config.json" else path)
    if args.hardware == "cpu":
        progress("measuring the ceilings")
    m = measured_ceiling(torch.device("cpu"), "bfloat16") if args.hardware == "cpu" else HARDWARE[args.hardware]
    T = min(args.context, c.context)
    decode, prefill = (m.verdict(step_cost(c, [chunk], 2)) for chunk in ((1, T), (T, 0)))
    print_table(f"{name} in bfloat16 on {args.hardware}, {T} tokens of context, on paper",
                ["", "formula", "value"], on_paper(c, m, args.hardware, T),
                f"Decode at batch 1 is {decode}-bound, a prompt of {T} {prefill}-bound. Decode "
                f"with {T} tokens of context each turns {crossover(c, m, T, 2)}; with next to none, "
                f"{crossover(c, m, 1, 2)}." + " Values count sliding windows, formulas do not." * any(c.windows))


def play(llm: LLM, requests: list[tuple[float, list[int], int]], group: int = 0) -> dict[str, list[float]]:
    """Send (arrival in seconds, prompt, new tokens), which are in order, and note when each token appears.

    group: static batching, that many requests together and the next ones when all of these have finished.
    """
    waiting, last, begin = list(requests), {}, time.perf_counter()   # last: of a request's arrival and its tokens
    seen = {"tokens/s": [], "ttft": [], "gap": []}
    while waiting or llm.requests:
        now = time.perf_counter() - begin
        there = [] if group and llm.requests else [request for request in waiting if request[0] <= now][:group or None]
        for start, prompt, new in there:
            last[llm.add(prompt, SamplingParams(max_tokens=new, ignore_eos=True))] = start
        del waiting[:len(there)]
        if not llm.requests:
            time.sleep(max(0.0, waiting[0][0] - now))
        for out in llm.step():
            now = time.perf_counter() - begin
            seen["gap" if len(out.token_ids) > 1 else "ttft"].append(now - last[out.id])
            last[out.id] = now
    seen["tokens/s"].append(sum(new for _, _, new in requests) / max(last.values()))
    return seen


def compare(title: str, contestants: dict, make, note: str):
    """A row per contestant (an LLM and its group) on the requests that `make` gives, played in turns; the first turn is
    not counted."""
    found = {name: {} for name in contestants}
    for turn in range(4):
        requests = make()
        for name, (llm, group) in contestants.items():
            progress(f"{title}: {name}, {turn + 1} of 4")
            for key, values in play(llm, requests, group).items():
                found[name].setdefault(key, []).extend(values if turn else [])
    rows = []
    for name, seen in found.items():
        times = [quantiles(seen[key], n=100, method="inclusive")[p - 1] * 1e3
                 for key in ("ttft", "gap") for p in (50, 95, 99)]
        rows.append([name, median(seen["tokens/s"]), *times, max(seen["gap"]) * 1e3])
    print_table(title, ["", "tokens/s", "TTFT p50", "p95", "p99 ms", "gap p50", "p95", "p99", "longest ms"], rows, note)


def serve(args: argparse.Namespace):
    """The same requests, served in different ways."""
    lab, dice = Lab(args, ceiling=False, max_seqs=8), random.Random(0)
    context, prompt = lab.config.context, partial(random_prompt, lab.config)

    def crowd(gap: float = 0.0):
        """32 requests, prompts of 8 to 64 tokens, answers of 4 to 128, most of them short."""
        at = itertools.accumulate(dice.expovariate(1 / gap) if gap else 0.0 for _ in range(32))
        return [(start, prompt(dice.randint(8, 64)), min(128, 4 + int(dice.expovariate(1 / 32)))) for start in at]

    ways = {"static": (lab.llm, 8), "continuous": (lab.llm, 0)}
    play(lab.llm, crowd())
    pace = clock(lambda: play(lab.llm, crowd()), lab.device) / 32    # seconds per request, when eight are served
    compare("Eight at a time, all 32 there at once", ways, crowd,
            "Static batching waits for the longest of eight; continuous batching fills each place as it becomes free.")
    compare("Eight at a time, arriving one by one (Poisson)", ways, lambda: crowd(pace),
            "They come as fast as continuous batching can serve them. gap: between two tokens of a request.")

    sizes = min(64, (context - 200) // 4), context
    compare(f"A prompt of {context - 200} tokens arrives among six that are decoding",
            {f"chunks of {n}": (lab.engine(max_batched_tokens=n), 0) for n in sizes},
            lambda: [(0.0, prompt(16), 100) for _ in range(6)] + [(4 * pace, prompt(context - 200), 8)],
            "In one piece, the long prompt stops everybody for as long as it takes; in chunks, it takes turns.")

    def shared():
        start = prompt(context // 2)
        return [(0.0, start + prompt(16), 16) for _ in range(12)]
    compare(f"Twelve requests that begin with the same {context // 2} tokens", {
        f"prefix cache {'on' if on else 'off'}": (lab.engine(prefix_cache=on, max_seqs=4), 0) for on in (True, False)},
            shared, "With the cache, whoever comes after the first computes only what is new.")

    step, model, choosing = loop_seconds(lab.engine(), 32)
    print(f"\nA decode step at batch 32 takes {step * 1e3:.2f} ms: the model {model / step:.1%}, choosing tokens "
          f"{choosing / step:.1%},\ndeciding who runs, building the batch and keeping the books "
          f"{1 - (model + choosing) / step:.1%}.")


def disaggregate(args: argparse.Namespace):
    """Long prompts arrive among requests that decode: in one process, and in two."""
    lab, dice = Lab(args, ceiling=False), random.Random(0)
    context, prompt = lab.config.context, partial(random_prompt, lab.config)
    length, sizes = context - 200, sorted({min(64, (context - 200) // 4), 512})
    pace = min(prefill_seconds(lab.llm, 1, length) for _ in range(5))
    options = dict(prefix_cache=False, max_seqs=32)

    def arrivals():
        """Six who decode for as long as six long prompts come, one by one (Poisson), and have short answers."""
        at = itertools.accumulate(dice.expovariate(1 / (1.5 * pace)) for _ in range(6))
        return [(0.0, prompt(16), 180) for _ in range(6)] + [(start, prompt(length), 16) for start in at]

    with Disaggregated(lab.source, 1, 1, lab.device.type, lab.llm.dtype, **options) as apart:
        ways = {f"one, chunks of {n}": (lab.engine(max_batched_tokens=n), 0) for n in sizes}
        ways["prefill and decode"] = apart, 0
        compare(f"Prompts of {length} tokens arrive among six that are decoding", ways, arrivals,
                "Apart, no prompt is in the step of a decode. But each of the two computes with a part of the machine, "
                "and a prompt's K and V must move before its second token: the longest gaps hold such a move.")
        stats = apart.stats()
    size, seconds = stats["sent_bytes"], stats["sent_seconds"]
    print(f"\nIn all turns {size / 1e6:.1f} MB of K and V were sent from one process to the other; they travelled for "
          f"{seconds:.2f} s,\nat {size / seconds / 1e9:.2f} GB/s.")
    print_table("When it pays: Llama 3 8B in bfloat16 between two H100s, on paper",
                ["tokens", "MB of K, V", "prefill ms", *(f"{name} {unit}" for name in LINKS for unit in ("ms", "%"))],
                handing_over(config_of("llama-3-8b"), HARDWARE["h100"], (512, 2048, 8192)),
                "NVLink moves 450 GB/s one way, Ethernet of 400 Gbit 50 GB/s. %: of the time in which the prompt is "
                "computed. Far below 100, its K and V are there long before the next prompt is computed, and the link "
                "is no limit.")


WAYS = {"greedy": {}, "temperature 0.8": {}, "top-k 50": dict(top_k=50), "top-k 1000": dict(top_k=1000),
        "top-p 0.9": dict(top_p=0.9), "top-p 0.3": dict(top_p=0.3),
        "top-k 1000, top-p 0.9": dict(top_k=1000, top_p=0.9)}


def sampling(args: argparse.Namespace):
    """A decode step with each way of choosing tokens, in turns: the same requests take one way after the other."""
    rows, steps = [], 10 * len(WAYS)
    ways = [SamplingParams(ignore_eos=True, temperature=0.8 if i else 0.0, seed=0, **way)
            for i, way in enumerate(WAYS.values())]
    for shape in [args.random] if args.random else ["gpt2", "llama-1b"]:
        progress(f"making {shape}")
        llm = LLM(config_of(shape), args.device, args.dtype, prefix_cache=False, max_seqs=16, num_blocks=256)
        print(f"{shape} (V = {llm.config.V:,}) in {llm.dtype} on {machine(llm.device)}, PyTorch {torch.__version__}")
        for B in (1, 16):
            with stopwatch(llm) as (_, choosing):
                seconds = decode_steps(llm, B, 64, 3 * steps, lambda i: ways[i % len(ways)])[-steps:]   # memory is warm
            turns = [(seconds[i::len(ways)], choosing[-steps:][i::len(ways)]) for i in range(len(ways))]
            for name, (step, choice) in zip(WAYS, turns):
                rows.append([f"{shape}, batch {B}: {name}", median(step) * 1e3, ratio(step, turns[0][0]),
                             median(choice) * 1e3, median(a / b for a, b in zip(choice, step)) * 100])
        del llm   # before the next one is made
    name, *_, most = max(rows, key=lambda row: row[-1])
    print_table("Choosing tokens, at temperature 0.8 where not greedy, random weights",
                ["", "ms per step", "of greedy", "choosing ms", "% of step"], rows,
                f"Choosing takes {show(most)}% of a step at most ({name}). A step costs the same whichever way its "
                "tokens are chosen where the second column stays near 1. Random weights find thousands of tokens about "
                "as likely as the best one, which is the hardest case: a trained model is sure more often.")


# ---------------------------------------------------------------------------------------------
# 8 bits: what they gain, and what they lose

VARIANTS = {   # the dtype of activations and of weights not in 8 bits; quantization; kv_cache_dtype
    "float32": ("float32", None, "auto"), "bfloat16": ("bfloat16", None, "auto"), "int8": ("float32", "int8", "auto"),
    "int8 in bfloat16": ("bfloat16", "int8", "auto"), "fp8": ("float32", "fp8", "auto"),
    "int8 KV": ("float32", None, "int8"), "int8 + int8 KV": ("float32", "int8", "int8")}


def quantization(args: argparse.Namespace):
    """What a model reads, how fast it is and what it says with weights, keys and values in 8 bits."""
    device = find_device(args.device)
    progress("measuring the ceilings")
    kinds = ["float32", "bfloat16", "int8"] + ["fp8"] * linear.has_kernels(device)
    ceilings = {kind: measured_ceiling(device, kind) for kind in kinds}
    bandwidth = max(ceiling.bandwidth for ceiling in ceilings.values())
    print(f"Ceilings as measured: {bandwidth / 1e9:,.0f} GB/s; "
          + ", ".join(f"{ceiling.peak / 1e9:,.0f} GFLOP/s in {kind}" for kind, ceiling in ceilings.items()))
    for model in [args.model] if args.model or args.random else [DEMO, DEMO.parent / "gpt2"]:
        print()
        lab = Lab(argparse.Namespace(**vars(args) | dict(model=model, dtype="float32")), ceiling=False)
        engines, weights = {}, {("float32", None): lab.llm.model.weights}
        for name, (dtype, bits, kv) in VARIANTS.items():
            progress(f"making {name}")
            if args.random and bits == "fp8" and bits not in kinds:
                continue   # float32 once more, of which nobody asks what it says
            engines[name] = LLM(lab.source, device, dtype, prefix_cache=False, max_seqs=32, num_blocks=512,
                                quantization=bits, kv_cache_dtype=kv, weights=weights.get((dtype, bits)))
            weights[dtype, bits] = engines[name].model.weights
        del lab.llm
        show_speed(engines, ceilings, bandwidth)
        if stories := stories_for(engines["float32"]):
            show_losses(engines, stories, demo=Path(model).resolve().parent == DEMO.parent.resolve())
        del engines, weights   # before the next model is read


def show_speed(engines: dict[str, LLM], ceilings: dict[str, Ceiling], bandwidth: float):
    """Tables of bytes and tokens per second, and of the bounds. On a CPU fp8 is left out: it is float32 there."""
    engines = {name: llm for name, llm in engines.items() if VARIANTS[name][1] in (None, *ceilings)}
    c = engines["float32"].config
    T = min(512, c.context - 64)
    cases = [(f"decode {B}", decode_seconds, B, T // 4, (1, T // 4)) for B in (1, 16)]
    cases += [(f"prefill {T}", prefill_seconds, 1, T, (T, 0))]
    progress("measuring in turns")
    measures = [partial(measure, llm, B, n) for llm in engines.values() for _, measure, B, n, _ in cases]
    columns = iter(in_turns(measures, 3))
    rates, bounds, plain = [], [], []
    for name, llm in engines.items():
        itemsize, dtype, bits = DTYPES[llm.dtype].itemsize, *VARIANTS[name][:2]
        weights = weight_bytes(c, itemsize, in_8_bits(llm), tokens=1)
        rates.append([name, weights / 1e6, kv_bytes(c, itemsize, llm.kv_cache_dtype)])
        bounds.append([name])
        for i, (_, _, B, _, chunk) in enumerate(cases):
            column, tokens = next(columns), B * chunk[0]
            plain += [column] * (name == "float32")
            least = Ceiling(ceilings[bits or dtype].peak, bandwidth).seconds(cost_of(llm, [chunk] * B))
            rates[-1] += [tokens / median(column), ratio(plain[i], column)]
            bounds[-1] += [tokens / least, least / median(column) * 100]

    by_name = {row[0]: row for row in rates}
    gains = [f"{show(gain)} times in {case[0]}" for case, gain in zip(cases, by_name["int8"][4::2]) if gain != "-"]
    told = f"with int8 weights alone the model is {', '.join(gains)} as fast" if gains else "the turns do not agree"
    fewer, smaller = (by_name["float32"][i] / by_name["int8 + int8 KV"][i] for i in (1, 2))
    print_table(f"Tokens per second: decode of 1 and 16 requests of {T // 4} tokens, prefill of {T}",
                ["", "weights MB", "KV bytes"] + [word for case in cases for word in (case[0], "ratio")], rates,
                "Weights: what a decode step reads of them. KV: per token of context. Ratio: to float32. In int8 the "
                f"weights are {show(fewer)} times fewer bytes, and keys and values {show(smaller)} times fewer. "
                f"Measured, {told}."
                + " Fp8 is widened on a CPU and multiplies as float32 does." * ("fp8" not in ceilings))
    most = max(percent for row in bounds for percent in row[2::2])
    print_table("The bound, in tokens per second, and what part of it is reached",
                ["", *(word for case in cases for word in (case[0], "%"))], bounds,
                "A step takes at least its bytes over the bandwidth, and at least its operations over the rate of a "
                "large product of its own type."
                + " Above 100%, weights come from a cache and not from memory." * (most > 100))


@cache
def storyteller():
    """demo/train.py: it writes stories, and says whether one is consistent."""
    with patch.object(sys, "path", [str(DEMO.parent), *sys.path]):
        return import_module("train")


def stories_for(llm: LLM) -> list[list[int]]:
    """200 stories that no demo model has seen, as tokens; none where the tokenizer cannot write them."""
    if llm.tokenizer is None:
        return []
    texts = [storyteller().write_story(seed) for seed in storyteller().HELD_OUT[:200]]
    stories = [llm.tokenizer.encode(text) + llm.config.eos[:1] for text in texts]
    for text, story in zip(texts, stories):
        if text not in llm.tokenizer.decode(story) or max(story) >= llm.config.V:
            return []
    return [story for story in stories if len(story) <= llm.config.context]


def surprise(exact_TV: torch.Tensor, found_TV: torch.Tensor, next_T: torch.Tensor) -> torch.Tensor:
    """float64 [3], sums over the tokens: the KL divergence of what is found from what is exact, in nats; how often the
    most likely token is another; minus the log probability of what comes next."""
    exact, found = (logits.cpu().double().log_softmax(-1) for logits in (exact_TV, found_TV))
    return torch.stack([(exact.exp() * (exact - found)).sum(), (exact.argmax(-1) != found.argmax(-1)).sum(),
                        -found.gather(1, next_T[:, None]).sum()])


def first_sentences(count: int) -> list[str]:
    """Of held-out stories, so many different ones."""
    teller = storyteller()
    first = (re.match(r".*?[.!?](?=\s)", teller.write_story(seed)).group() for seed in teller.HELD_OUT)
    return list(itertools.islice(dict.fromkeys(first), count))


def consistent(llm: LLM, temperature: float, count: int = 100) -> float:
    """The share of stories that end and in which nothing is wrong; each begins with the first sentence of one of so
    many held-out ones."""
    teller, prompts = storyteller(), first_sentences(count)
    outs = llm.generate(prompts, [SamplingParams(max_tokens=teller.LONGEST, temperature=temperature, seed=i)
                                  for i in range(count)])
    good = [out.finish_reason == "stop" and teller.why_wrong(prompt + out.text) is None
            for prompt, out in zip(prompts, outs)]
    return sum(good) / count


def show_losses(engines: dict[str, LLM], stories: list[list[int]], demo: bool):
    """A table of what the model says of held-out stories, and if it is one of the demo's, of how it tells its own."""
    found = {name: torch.zeros(3, dtype=torch.float64) for name in engines}
    for i, story in enumerate(stories):
        progress(f"reading story {i + 1} of {len(stories)}")
        exact, after = engines["float32"].logits(story[:-1]), torch.tensor(story[1:])
        for name, llm in engines.items():
            logits = exact if name == "float32" else llm.logits(story[:-1])
            found[name] += surprise(exact, logits, after)
    tokens, rows = sum(len(story) - 1 for story in stories), []
    for name, llm in engines.items():
        kl, differ, loss = (found[name] / tokens).tolist()
        more = loss - found["float32"][2].item() / tokens
        rows.append([name, kl, differ * 100, f"{loss:.4f}", more])
        for temperature in (0.0, 0.8) if demo else ():
            progress(f"{name} tells stories")
            rows[-1].append(consistent(llm, temperature) * 100)
    by_name = {row[0]: row for row in rows}
    told = [f"{what} move that distribution by {show(by_name[name][1])} nats, change the most likely token in "
            f"{show(by_name[name][2])}% of places and the loss by {show(by_name[name][4])}."
            for what, name in (("Int8 weights", "int8"), ("Int8 keys and values", "int8 KV"))]
    print_table(f"What is lost, on {len(stories)} held-out stories, {tokens:,} tokens",
                ["", "KL, nats", "differ %", "loss", "more loss"] + ["consistent %", "at 0.8, %"] * demo, rows,
                "KL: of the next token's distribution from that of float32, per token. Differ: another token is the "
                f"most likely. Loss: nats per token. {' '.join(told)}"
                + " Consistent: of 100 stories of its own, greedy and at temperature 0.8." * demo)


# ---------------------------------------------------------------------------------------------
# Drafts: how often they are right, and what it costs to verify them

DRAFTS = 0, 1, 2, 4, 8
SURE = 0.8          # how often a draft is right that is made to be right so often
TURN = 4            # steps of an engine, before it is another one's turn
PROMPT = 8          # tokens of the prompts that the oracle knows
RULED = 11          # turns of off and on: it is about 5%, and neighbours make a turn of a tiny model differ by that
REPEATED = 24       # tokens of its own answer, at the end of the prompt that n-grams go on from


class Oracle(Drafter):
    """A drafter that knows what the model says, and makes each draft right with a given probability.

    Of a real pair, acceptance is a property of the two models and of the text. What it gains at that acceptance is a
    property of the machine, and that is measured here: with random weights, and with drafts that cost nothing. The dice
    are a counter, so a run can be repeated.
    """

    def __init__(self, texts: list[list[int]], prompt: int, right: float, V: int):
        """texts: prompts of so many tokens with what the model says after them. right: the probability."""
        super().__init__()
        self.texts = {tuple(text[:prompt]): (i, text) for i, text in enumerate(texts)}
        self.prompt, self.right, self.V = prompt, right, V

    def offers(self, requests: list, rooms: list[int]) -> list[int]:
        return [max(0, min(room, len(self.text_of(request)[1]) - len(request.tokens)))
                for request, room in zip(requests, rooms)]

    def guess(self, requests: list, counts: list[int]) -> list[list[int]]:
        return [[self.draft(*self.text_of(request), len(request.tokens) + i) for i in range(count)]
                for request, count in zip(requests, counts)]

    def text_of(self, request) -> tuple[int, list[int]]:
        return self.texts[tuple(request.tokens[:self.prompt])]

    def draft(self, i: int, text: list[int], position: int) -> int:
        spoiled = mix((i << 32) + position) >= self.right * 2 ** 64
        return (text[position] + spoiled) % self.V


def forced(drafter, most: int) -> Speculator | None:
    """Takes as many drafts as there are, whether they pay or not. None: no drafts."""
    speculator = Speculator(drafter, most)
    speculator.worthwhile = lambda requests, offers, rows: offers
    return speculator if most else None


class Run(NamedTuple):
    """Some steps in which every request decodes or verifies drafts."""
    seconds: float    # of a step in which somebody verifies (if nobody ever does, of any), without the drafting: median
    guessing: float   # seconds of drafting per step
    busy: float       # the share of the steps in which somebody verifies, and
    drafted: float    # of the chunks with drafts
    right: float      # the chance of a draft behind right ones; 0 if there was none
    drafts: float     # per request and step
    tokens: float     # per request and step
    speed: float      # tokens per second

    def predicted(self, plain: Run, B: int, drafts: int) -> float:
        """Tokens per second of B requests with so many drafts in a verification: by the chance, and by what a step
        costs."""
        tokens = 1 + self.drafted * sum(self.right ** n for n in range(1, drafts + 1))
        return B * tokens / (self.guessing + self.busy * self.seconds + (1 - self.busy) * plain.seconds)


def run_drafts(llm: LLM, speculator: Speculator | None, prompts: list[list[int]], steps: int) -> Run:
    """Decode so many steps with this speculator, after WARM that do not count."""
    return run_ways([(llm, speculator)], prompts, steps)[0]


def run_ways(ways: list[tuple[LLM, Speculator | None]], prompts: list[list[int]], steps: int) -> list[Run]:
    """The same for several engines with speculators, which take turns of a few steps: whoever disturbs the machine
    disturbs all of them alike. (In one engine a draft model would find, in each of its turns, that it has fallen
    behind.)"""
    runs, outs = [], []

    def watch(run, plan, takers, tokens, logits_BV):
        verified = [(takers.count(request) - 1, len(chunk.tokens) - 1) for request, chunk in plan if chunk.logits > 1]
        run.chunks.append(len(verified))   # with drafts
        run.right += sum(n for n, _ in verified)
        run.drafts += sum(m for _, m in verified)
        run.tries += sum(min(n + 1, m) for n, m in verified)
        run.tokens += len(tokens)

    enough = (1 + max(DRAFTS)) * (1 + WARM + steps)   # of more the pool may not expect to hold all
    for llm, llm.speculator in ways:
        for prompt in prompts:
            llm.add(prompt, SamplingParams(max_tokens=enough, ignore_eos=True))
        outs += [request.output for request in llm.requests.values()]
        while any(request.pending > 1 for request in llm.requests.values()):
            llm.step()
        for _ in range(WARM):
            llm.step()
        runs.append(SimpleNamespace(chunks=[], tries=0, right=0, drafts=0, guessing=[], whole=[], tokens=0))
        llm.watchers.append(partial(watch, runs[-1]))
    for begin in range(0, steps, TURN):
        for (llm, _), run in zip(ways, runs):
            with timed_drafts(llm, run.guessing):
                run.whole += [clock(llm.step, llm.device) for _ in range(min(TURN, steps - begin))]
    ended = [out.error or out.finish_reason for out in outs if out.finish_reason]
    for llm, _ in ways:
        llm.watchers.pop()
        for request_id in list(llm.requests):
            llm.abort(request_id)
    if ended:
        raise ValueError(f"a request ended before its measurement did ({ended[0]}): its context is too short, or its "
                         "logits are not finite")
    return [sum_up(run, len(prompts)) for run in runs]


def beside(llm: LLM) -> LLM:
    """An engine with the same weights that does not speculate."""
    return LLM(llm.folder or llm.config, llm.device, llm.dtype, prefix_cache=False, max_seqs=llm.scheduler.max_seqs,
               num_blocks=llm.pool.num_blocks, weights=llm.model.weights)


def off_and_on(plain: LLM, llm: LLM, drafter) -> list[tuple[LLM, Speculator | None]]:
    """Two ways: an engine that does not speculate, and one that does and decides for itself how much."""
    return [(plain, None), (llm, Speculator(drafter, 4, llm.runner))]


def sum_up(run: SimpleNamespace, B: int) -> Run:
    steps, guessing = len(run.whole), run.guessing or [0.0] * len(run.whole)
    inside, here = [a - b for a, b in zip(run.whole, guessing)], steps * B
    verifying = [seconds for seconds, n in zip(inside, run.chunks) if n] or inside
    return Run(median(verifying), sum(guessing) / steps, sum(map(bool, run.chunks)) / steps, sum(run.chunks) / here,
               run.right / max(1, run.tries), run.drafts / here, run.tokens / here, run.tokens / sum(run.whole))


@contextmanager
def timed_drafts(llm: LLM, seconds: list[float]):
    """While it runs, `seconds` grows by the time of every step's drafting."""
    if llm.speculator is None:
        yield
        return
    draft = llm.speculator.draft
    with patch.object(llm.speculator, "draft", lambda *plan: seconds.append(clock(lambda: draft(*plan), llm.device))):
        yield


def draft_rows(name: str, B: int, columns: list[list[Run]]) -> list[list]:
    """A row for each of DRAFTS. columns: the turns of each."""
    rows, plain = [], columns[0]
    for n, turns in zip(DRAFTS, columns):
        guessed = ["-", "-", "-"]
        if n:
            guessed = [median(getattr(run, name) for run in turns) for name in ("drafted", "right", "guessing")]
            guessed = [guessed[0] * 100, guessed[1], guessed[2] * 1e3]
        cost = ratio([run.seconds for run in turns], [run.seconds for run in plain])
        rows.append([f"batch {B}, {name} {n}", *guessed[:2], median(run.tokens for run in turns),
                     cost if n == 0 or any(run.busy for run in turns) else "-", guessed[2],
                     median(run.speed for run in turns),
                     median(run.predicted(before, B, n) for run, before in zip(turns, plain)),
                     ratio([run.speed for run in turns], [run.speed for run in plain])])
    return rows


def rule_row(name: str, turns: list[list[Run]]) -> list:
    """Speculation on, which decides for itself how many drafts pay, beside speculation off. turns: off and on."""
    off, on = zip(*turns)
    return [name, median(run.drafts for run in on), median(run.tokens for run in on), median(run.speed for run in off),
            median(run.speed for run in on), ratio([run.speed for run in on], [run.speed for run in off])]


def print_drafts(what: str, rows: list[list], rules: list[list], note: str):
    print_table(f"{what}: decode with so many drafts in each verification, whether they pay or not",
                ["", "drafted %", "right", "tokens/step", "cost", "guess ms", "tokens/s", "predicted", "gain"], rows,
                "Drafted: decodes that had drafts. Right: the chance of a draft behind right ones. Tokens: per request."
                " Cost: a step with drafts beside one without, the guessing left out. Predicted: 1 + chance + ... + "
                f"chance^n tokens, in such a step and the guessing before it. {note}")
    worst = min((row[-1] for row in rules if row[-1] != "-"), default="-")
    print_table(f"{what}: speculation on, which decides how many of up to 4 drafts pay, beside off",
                ["", "drafts/step", "tokens/step", "tokens/s off", "on", "ratio"], rules,
                f"The ratio may not be below 0.95, whatever the text. The smallest ratio is {show(worst)}.")


def speculate(args: argparse.Namespace):
    """Drafts of 0 to 8 tokens: by a draft model and by n-grams, and on a large model by an oracle."""
    shape, device = args.random or "llama-135m", find_device(args.device)
    dtype = "float32" if args.dtype == "auto" and device.type == "cpu" else args.dtype
    print(f"{machine(device)}, PyTorch {torch.__version__}")
    show_pair(device, dtype)
    told = [f"{shape} at batch 1, beside what llama-1b (--random llama-1b) should reach on 2 cores."]
    for bits, goal in ((None, 1.35), ("int8", 1.15)):
        progress(f"making {shape}")
        llm = LLM(config_of(shape), device, dtype, prefix_cache=False, max_seqs=16, num_blocks=512, quantization=bits,
                  speculative_model="ngram")
        cost, gain, repeated = show_oracle(llm, f"{shape} in {bits or llm.dtype}, random weights")
        told += [f"In {bits or llm.dtype}, verifying 4 drafts costs {show(cost)} of a decode (goal: at most {goal});",
                 f"4 drafts, each right with a chance of {SURE}, are {show(gain)} times as fast (goal: 2.2);",
                 f"n-grams on an answer that repeats its prompt {show(repeated)} times (goal: 2)."]
        del llm   # before the next one is made
    print("\n" + textwrap.fill(" ".join(told), 100))


def show_pair(device: torch.device, dtype: str):
    """demo/llama with drafts of a demo model and of n-grams, on stories; each prompt is a held-out story's first
    sentence."""
    folder = next(DEMO.parent / name for name in ("draft", "gpt2") if (DEMO.parent / name).exists())
    llm = LLM(DEMO, device, dtype, prefix_cache=False, max_seqs=16, num_blocks=1024, speculative_model=folder)
    plain, prompts = beside(llm), [llm.tokenizer.encode(text) for text in first_sentences(16)]
    drafters = {f"demo/{folder.name}": llm.speculator.drafter, "n-grams": NgramDrafter()}
    rows, rules = {name: [] for name in drafters}, {name: [] for name in drafters}
    steps = 60
    for B in (1, 4, 16):
        progress(f"demo/llama, batch {B}")
        for name, drafter in drafters.items():
            runs = in_turns([partial(run_drafts, llm, forced(drafter, n), prompts[:B], steps) for n in DRAFTS], 3)
            rows[name] += draft_rows(name, B, runs)
        ways = [partial(run_ways, off_and_on(plain, llm, drafter), prompts[:B], steps) for drafter in drafters.values()]
        for name, turns in zip(drafters, in_turns(ways, RULED)):
            rules[name].append(rule_row(f"batch {B}, {name}", turns))
    print_drafts(f"demo/llama in {llm.dtype}", sum(rows.values(), []), sum(rules.values(), []),
                 "Stories, greedy.")


def show_oracle(llm: LLM, what: str) -> tuple:
    """A large model with drafts of an oracle, at batch 1, 4 and 16; on a CPU one as large as llama-1b at batch 1 only.

    It gives what was found at batch 1: the cost of verifying 4 drafts, the gain of 4 drafts, and that of n-grams on an
    answer that repeats its prompt; "-" for what the turns do not agree on."""
    plain, rows, rules, found = beside(llm), [], [], ()
    slow = llm.device.type == "cpu" and layer_weights(llm.config) > 5e8   # a second per step at batch 16
    for B, steps in ((1, 16),) if slow else ((1, 16), (4, 8), (16, 4)):
        progress(f"{what}, batch {B}")
        texts = sure_texts(llm, min(B, 4), 6 * (WARM + steps)) * max(1, B // 4)
        prompts = [text[:PROMPT] for text in texts]
        easy, wrong = (Oracle(texts, PROMPT, right, llm.config.V) for right in (SURE, 0.0))
        runs = in_turns([partial(run_drafts, llm, forced(easy, n), prompts, steps) for n in DRAFTS], 3)
        rows += draft_rows("drafts", B, runs)
        repeating = [text[:PROMPT + REPEATED] for text in texts]
        ways = {f"right with {SURE}": (easy, prompts), "always wrong": (wrong, prompts),
                "n-grams, repeating": (NgramDrafter(), repeating)}
        turns = in_turns([partial(run_ways, off_and_on(plain, llm, drafter), begun, steps)
                          for drafter, begun in ways.values()], RULED)
        rules += [rule_row(f"batch {B}, {name}", turn) for name, turn in zip(ways, turns)]
        if B == 1:
            row = rows[DRAFTS.index(4)]
            found = row[4], row[-1], rules[-1][-1]
    print_drafts(what, rows, rules, f"An oracle drafts, and each draft is right with a chance of {SURE}: acceptance "
                 "is a property of a pair of models, and cost of the machine.")
    print("\n" + textwrap.fill(
        "n-grams, repeating: random weights of the smaller shapes write the same token again and again. These prompts "
        f"end with the first {REPEATED} tokens of their own answer, and the answer goes on so. (llama-1b does not "
        "repeat itself: there n-grams find nothing to propose.)", 100))
    return found


def sure_texts(llm: LLM, B: int, n: int) -> list[list[int]]:
    """Prompts with n more tokens each, the same with any number of drafts. Of two tokens that random weights find about
    as likely rounding takes one, above all in INT8, and no oracle could know which."""
    texts, params = [], SamplingParams(max_tokens=n, ignore_eos=True)
    while len(texts) < B:
        prompts, written = [random_prompt(llm.config, PROMPT) for _ in range(B - len(texts))], []
        for count in DRAFTS:
            llm.speculator = forced(NgramDrafter(), count)
            written.append([out.token_ids for out in llm.generate(prompts, params)])
        texts += [prompt + one for prompt, one, *more in zip(prompts, *written) if more == [one] * len(more)]
    return texts


# ---------------------------------------------------------------------------------------------
# A CPU, beside transformers

@cache
def transformers():
    """The package, or None."""
    try:
        package = import_module("transformers")
    except ImportError:
        return None
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    return package


class Theirs:
    """transformers, from the same folder; requests of several lengths by its continuous batching."""

    def __init__(self, folder: Path, dtype: str):
        self.model = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        self.options = transformers().GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def __call__(self, prompts: list[list[int]], new: list[int]):
        if len(set(map(len, prompts))) == 1:
            x = torch.tensor(prompts)
            out = self.model.generate(x, self.options, attention_mask=torch.ones_like(x), max_new_tokens=new[0])
            assert out.shape[1] == x.shape[1] + new[0]
            return
        with self.model.continuous_batching_context_manager(generation_config=self.options) as manager:
            for prompt, n in zip(prompts, new):
                manager.add_request(prompt, max_new_tokens=n)
            outs = list(itertools.islice(manager, len(prompts)))   # each as it is finished
        assert sorted(len(out.generated_tokens) for out in outs) == sorted(new), [out.error for out in outs]


def both(name: str, kind: str) -> tuple[LLM, list]:
    """nanoserve on the CPU, with random weights of a shape or with the demo's, in a dtype or in int8; and a list of
    what writes so many new tokens for each prompt: it, and transformers with the same weights, beside int8 in float32,
    where that is installed."""
    dtype, bits = ("float32", kind) if kind == "int8" else (kind, None)
    with tempfile.TemporaryDirectory() as folder:
        source = config_of(name) if name in SHAPES else DEMO
        if transformers() and name in SHAPES:
            source, config = Path(folder), transformers().AutoConfig.for_model(**SHAPES[name])
            transformers().AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).save_pretrained(source)
        llm = LLM(source, "cpu", dtype, prefix_cache=False, max_seqs=32, num_blocks=1024, quantization=bits)
        return llm, [partial(generate, llm)] + ([Theirs(source, llm.dtype)] if transformers() else [])


def speeds(llm: LLM, systems: list, case: str, lens: list[int], new: list[int], ceiling: Ceiling) -> list:
    """Ours in tokens per second, what of the ceiling it reaches, theirs, and the ratio."""
    prompts, decode = [random_prompt(llm.config, n) for n in lens], case.startswith("decode")
    runs = [new, [1] * len(new)] if decode else [new]
    calls = [partial(system, prompts, run) for system in systems for run in runs]
    columns = in_turns([partial(clock, call, llm.device) for call in calls], 3)
    tokens, reached = sum(new), ["-", "-"]
    if decode:   # less the time for first tokens
        columns = [[a - b for a, b in zip(*pair)] for pair in zip(columns[::2], columns[1::2])]
        tokens -= len(new)
    ours, *others = map(median, columns)
    if decode and ours > 0:
        step = cost_of(llm, [(1, n + m // 2) for n, m in zip(lens, new)])
        moved = step.bytes * (new[0] - 1) / ours
        reached = [f"{moved / 1e9:.0f} GB/s", moved / ceiling.bandwidth * 100]
    elif case.startswith("prefill"):   # quoted by the prompt's tokens
        tokens, flops = lens[0], step_cost(llm.config, [(lens[0], 0)], 1).flops / ours
        reached = [f"{flops / 1e9:.0f} GFLOP/s", flops / ceiling.peak * 100]
    rates = [round(tokens / seconds) if seconds > 0 else "-" for seconds in (ours, *others)]   # 0 or less: a neighbour
    return [rates[0], *reached, *([rates[1], ratio(columns[1], columns[0])] if others else ["-", "-"])]


def cpu(args: argparse.Namespace):
    """Prefill, decode and a crowd, against this CPU's ceilings and beside transformers; then what a context costs."""
    device = torch.device("cpu")
    progress("measuring the ceilings")
    ceilings = {kind: measured_ceiling(device, kind) for kind in ("float32", "bfloat16", "int8")}
    bandwidth = max(ceiling.bandwidth for ceiling in ceilings.values())
    theirs = transformers()
    print(f"{machine(device)}, PyTorch {torch.__version__}, transformers "
          f"{theirs.__version__ if theirs else 'not installed'}\nCeilings as measured: {bandwidth / 1e9:.0f} GB/s; "
          + ", ".join(f"{ceiling.peak / 1e9:.0f} GFLOP/s in {kind}" for kind, ceiling in ceilings.items()))
    three = [("prefill 512", [512], [1]), ("decode, batch 1", [32], [33]), ("decode, batch 16", [32] * 16, [33] * 16)]
    mixed = ("32 mixed requests", random.choices(range(8, 129), k=32), random.choices(range(8, 97), k=32))
    cases = {"gpt2": three, "llama-135m": [*three, mixed], "demo/llama": [("decode, batch 1", [8], [201])]}
    rows = []
    for name, kind in [*itertools.product(("gpt2", "llama-135m"), ceilings), ("demo/llama", "auto")]:
        progress(f"making {name}")
        llm, systems = both(name, kind)
        kind = llm.dtype if kind == "auto" else kind
        for case in cases[name]:
            row = f"{name} {kind}: {case[0]}"
            progress(row)
            rows.append([row, *speeds(llm, systems, *case, Ceiling(ceilings[kind].peak, bandwidth))])
    print_table("Tokens per second, random weights",
                ["", "nanoserve", "reached", "% of ceiling", "transformers", "ratio"], rows,
                "Decode reads every weight once per step and is held against the memory's bandwidth; prefill "
                "multiplies and is held against the product of its own type. Beside int8, transformers is in float32. "
                "Mixed: 8 to 128 tokens in, 8 to 96 out, and tokens out per second.")

    rows, c = [], config_of("llama-135m")
    for dtype in ("float32", "bfloat16"):
        llm = LLM(c, "cpu", dtype, prefix_cache=False, max_seqs=1)
        short, long = in_turns([partial(decode_seconds, llm, 1, context) for context in (128, 4096)])
        extra = [b - a for a, b in zip(short, long)]
        floor = 3968 * kv_bytes(c, DTYPES[dtype].itemsize) / bandwidth
        rows.append([dtype, *(x * 1000 for x in (median(short), median(long), median(extra), floor)),
                     ratio(extra, [floor] * len(extra))])
    print_table("What a long context adds to a decode step of llama-135m",
                ["", "ms at 128", "ms at 4096", "extra ms", "its bytes / bandwidth, ms", "ratio"], rows)
    step, model, _ = loop_seconds(LLM(DEMO, "cpu"), 1)
    print(f"\nA decode step of demo/llama takes {step * 1e6:.0f} us, of which {(step - model) * 1e6:.0f} are not the "
          "model:\ndeciding who runs, building the batch, choosing the token, keeping the books.")


# ---------------------------------------------------------------------------------------------
# Without a GPU: compile every kernel for GPUs that are not here, and read what came out

REGISTERS, WARPS = 65536, 64                                # per multiprocessor, on every GPU below
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes per multiprocessor; each program costs 1 KiB more
UNITS = {"wgmma": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}   # the instruction that feeds the matrix units


def compile_launches(launch, capability: int) -> list[dict]:
    """Run `launch` on tensors of the CPU, but compile each Triton kernel for sm_<capability> instead of running it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver
    run, found = JITFunction.run, []

    def compile_instead(kernel, *args, grid, warmup, **options):
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        registers, spills = resources(binary.asm["cubin"])
        warps, shared = binary.metadata.num_warps, binary.metadata.shared
        given = dict(zip(kernel.arg_names, args))
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        name += f" of {given.get('longest')} tokens" * (given.get("longest", 1) > 1)
        name += " int8" * (given.get("k_scale_ptr") is not None)   # such a pool
        programs = min(REGISTERS // (32 * warps * -(-registers // 8) * 8), WARPS // warps,
                       SHARED[capability] // (shared + 1024))
        found.append(dict(   # the columns of the table, in their order
            kernel=name, gpu=f"sm_{capability}",
            tile=f"{options['ROWS']} x {options['TILE']}" if "TILE" in options else "-",
            warps=warps, stages=binary.metadata.num_stages, regs=registers, spills=spills, KiB=f"{shared / 1024:.0f}",
            units=next((name for word, name in UNITS.items() if word in binary.asm["ptx"]), "-"),
            programs=programs, occupancy=f"{programs * warps / WARPS:.0%}"))

    gpu = SimpleNamespace(get_current_device=lambda: capability, get_current_stream=lambda device: None,
                          get_current_target=lambda: GPUTarget("cuda", capability, 32))
    with (patch.object(JITFunction, "run", compile_instead), patch.object(driver, "_active", gpu),
          patch.object(kernels, "capability_of", lambda device: capability)):
        launch()
    return found


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of spilled registers, by NVIDIA's cuobjdump, which comes with Triton."""
    tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def launch_all(D: int, dtype: torch.dtype = torch.bfloat16, S: int = 64, H: int = 32, K: int = 8,
               window: int | None = None):
    """One launch of every kernel, of decode also for a verification, on a pool of this dtype and on one of int8."""
    for int8 in (False, True):
        inputs = paged_inputs([(1, 99), (80, 0)], H, K, D, S, dtype, window=window, int8=int8)
        q, k, v, batch, _, _, *scales = inputs
        kernels.write_kv_triton(q[:, :K], q[:, :K], k, v, batch.slots_T, *scales)
        kernels.attention_triton(*inputs)
        kernels.attention_triton(*paged_inputs([(5, 99)], H, K, D, S, dtype, window=window, int8=int8))


LATENT_LAUNCHES = {   # of DeepSeek-V3's shape: tokens, past, query heads, whether the pool is of int8
    "decode": (1, 200, 128, False), "decode, int8": (1, 200, 128, True), "verification": (5, 200, 128, False),
    "prefill, widened": (200, 0, 16, False)}


def launch_latents(way: str):
    """One launch of the kernels of latent attention."""
    tokens, past, H, int8 = LATENT_LAUNCHES[way]
    latent.attend_to_latents(*latent_inputs([(tokens, past)], H, torch.bfloat16, int8=int8))


def latent_inputs(lens: list[tuple[int, int]], H: int, dtype: torch.dtype, device: torch.device | str = "cpu",
                  int8: bool = False) -> tuple:
    """What latent attention takes, in DeepSeek-V3's sizes, for requests of (query tokens, past)."""
    m = config_of("deepseek-v3").latent
    _, k, _, batch, _, _, *scales = paged_inputs(lens, 1, 1, m.rank + m.rotary, 64, dtype, device, int8=int8)
    q = torch.randn(sum(n for n, _ in lens), H, m.plain + m.rotary, dtype=dtype, device=device)
    part = linear.Part(torch.randn(H * (m.plain + m.value), m.rank, dtype=dtype, device=device) / m.rank ** 0.5)
    return q, part, k, batch, (m.plain + m.rotary) ** -0.5, m, "triton", *scales[:1]


BYTES = {"int8": (torch.int8, 1), "fp8": (torch.float8_e4m3fn, 1), "fp8 blocks": (torch.float8_e4m3fn, 128)}


def random_part(out: int, inputs: int, kind: str, device: torch.device | str = "cpu") -> linear.Part:
    """A weight of int8, or FP8 with a scale per row or per row and 128 columns."""
    dtype, columns = BYTES[kind]
    weight = (torch.randn(out, inputs, device=device) * 40).clamp(-127, 127).to(dtype)
    return linear.Part(weight, None, torch.rand(out, -(-inputs // 128) if columns > 1 else 1, device=device) / 1000)


def launch_products(kind: str, rows: int, out: int = 2048, inputs: int = 2048, by_torch: bool = False):
    """One launch of the kernels that multiply so many rows."""
    with patch.object(linear, "torch_multiplies", lambda x, part: by_torch):
        linear.linear_triton(torch.randn(rows, inputs, dtype=torch.bfloat16), random_part(out, inputs, kind))


def launch_experts(kind: str, rows: int, X: int = 8, out: int = 256, inputs: int = 2048):
    """One launch of the kernels that multiply so many rows, each by its two of X weights, in 8 bits or a dtype."""
    part = random_part(X * out, inputs, kind) if kind in BYTES else linear.Part(
        torch.zeros(X * out, inputs, dtype=DTYPES[kind]))
    order_R, starts_X = experts.sort_visits(torch.arange(2 * rows).view(rows, 2) % X, X)
    dtype = torch.bfloat16 if kind in BYTES else DTYPES[kind]
    linear.linear_experts_triton(torch.zeros(rows, inputs, dtype=dtype), part, order_R, starts_X)


def compiled_rows(capabilities: Iterable[int]) -> list[list]:
    """A row for each kernel and GPU: the columns of the table that `show_compiled` prints."""
    rows = []
    for D, capability in itertools.product((64, 128, 256), capabilities):
        progress(f"compiling for sm_{capability}, head size {D}")
        for c in compile_launches(lambda: launch_all(D), capability):
            rows.append([f"{c.pop('kernel')}, D = {D}", *c.values()])
    rows.sort(key=lambda row: row[0].split(",")[0])
    for kind, T, capability in itertools.product(BYTES, (16, 512), capabilities):
        progress(f"compiling for sm_{capability}, {kind}, {T} rows")
        for c in compile_launches(partial(launch_products, kind, T), capability):
            if T == 16 or c["kernel"] == "product":
                rows.append([f"{c.pop('kernel')}, {kind}, {T} rows", *c.values()])
    for kind, T, capability in itertools.product(("bfloat16", *BYTES), (16, 512), capabilities):
        progress(f"compiling for sm_{capability}, experts, {kind}, {T} rows")
        rows += [[f"experts, {kind}, {T} rows", *list(c.values())[1:]]   # 4 rows per expert, or 128
                 for c in compile_launches(partial(launch_experts, kind, T), capability) if c["kernel"] == "experts"]
    for way, capability in itertools.product(LATENT_LAUNCHES, capabilities):
        progress(f"compiling for sm_{capability}, latent attention, {way}")
        rows += [[f"{c['kernel'].split()[0]}, {way}, 512 + 64", *list(c.values())[1:]]
                 for c in compile_launches(partial(launch_latents, way), capability)]
    return rows


def show_compiled():
    print_table("The kernels as compiled for bfloat16 (int8: with such a pool), 32:8 heads, blocks of 64; 2048 inputs",
                ["kernel", "GPU", "tile", "warps", "stages", "regs", "spills", "KiB", "units", "per SM", "occupied"],
                compiled_rows(SHARED))
    print("\ntile: query rows x keys, or rows x outputs; regs: registers per thread; spills: bytes that did not fit;\n"
          "KiB: shared memory; units: the instruction that feeds the matrix units; per SM: programs that fit\n"
          "on a multiprocessor by registers, shared memory and warps; occupied: how many of its warps they fill")


# ---------------------------------------------------------------------------------------------
# With a GPU: check, then time

def paged_inputs(lens: list[tuple[int, int]], H: int, K: int, D: int, S: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu", window: int | None = None, int8: bool = False) -> tuple:
    """What attention takes, with shuffled blocks, for requests of (query tokens, past)."""
    need = [-(-(n + past) // S) for n, past in lens]
    tables = torch.randperm(sum(need)).split(need)
    batch = make_batch([Chunk([0] * n, past, t.tolist()) for (n, past), t in zip(lens, tables)], S, device)
    q = torch.randn(sum(n for n, _ in lens), H, D, device=device, dtype=dtype)
    k, v = (torch.randn(K, sum(need), S, D, device=device, dtype=dtype) for _ in "kv")
    if not int8:
        return q, k, v, batch, D ** -0.5, window
    (k, k_scale), (v, v_scale) = map(kernels.quantize_kv, (k, v))
    return q, k, v, batch, D ** -0.5, window, k_scale, v_scale


CACHE = 2e8   # bytes, more than the L2 cache of any GPU: so much is read before anything is read again
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}   # of results around 1


def largest_error(found: Iterable[tuple[str, float]], allowed: str) -> float:
    """The largest of what was found: names, and errors in parts of what is allowed. Exits at the first above 1."""
    worst = 0.0
    for name, error in found:
        if not error < 1:
            sys.exit(f"bench.py: {name}: the largest error is {error:.1f} times {allowed}")
        worst = max(worst, error)
    progress("")
    return worst


def check_kernels(device: torch.device, lens: list[tuple[int, int]], dtypes=tuple(TOLERANCE)):
    """Every kernel against the float64 definition, on fresh random data. Exits at the first that differs."""
    shapes = [(D, 32, 8, 64, None) for D in (64, 80, 128, 256)] + [(128, 32, 8, 16, None), (128, 32, 8, 64, 100)]
    shapes += [(128, H, K, 64, None) for H, K in ((8, 8), (14, 2), (71, 1))]

    def errors():
        for dtype, (D, H, K, S, window), int8 in itertools.product(dtypes, shapes, (False, True)):
            progress(f"checking {dtype}, head size {D}")
            try:
                kernels.check("triton", device, dtype, H, K, D)
            except ValueError:
                continue
            inputs = paged_inputs(lens, H, K, D, S, dtype, device, window, int8)
            exact = kernels.attention_naive(*[x.double() if torch.is_tensor(x) else x for x in inputs])
            error = (kernels.attention_triton(*inputs) - exact).abs().max().item() / TOLERANCE[dtype]
            yield f"{dtype}, D={D}, {H}:{K} heads, blocks of {S}, window {window}{', int8' * int8}", error
    worst = largest_error(errors(), "what the dtype allows")
    print(f"All kernels equal the float64 definition; the largest error is {worst:.0%} of what the dtype allows.")


def check_latents(device: torch.device, lens: list[tuple[int, int]], dtypes=tuple(TOLERANCE), heads=(16, 128)):
    """Latent attention against the float64 definition. Exits at the first that differs."""
    def errors():
        for dtype, H, int8 in itertools.product(dtypes, heads, (False, True)):
            progress(f"checking latents, {dtype}, {H} heads")
            inputs = latent_inputs(lens, H, dtype, device, int8)
            q, part, k, batch, scale, m, _, *scales = inputs
            exact = latent.attend_to_latents(q.double(), linear.Part(part.weight.double()), k.double(), batch, scale,
                                             m, "naive", *scales)
            error = (latent.attend_to_latents(*inputs) - exact).abs().max().item() / TOLERANCE[dtype]
            yield f"latents, {dtype}, {H} heads{', int8' * int8}", error
    worst = largest_error(errors(), "what the dtype allows")
    print(f"Latent attention equals the float64 definition; the largest error is {worst:.0%} of what the dtype allows.")


def time_latents(device: torch.device, dtype: torch.dtype, loads: list[tuple[int, int, int]], bandwidth: float,
                 peak: float, H: int = 128):
    """loads: (requests, tokens of each, context of each)."""
    rows, c = [], config_of("deepseek-v3")
    m = c.latent
    for B, n, T in loads:
        progress(f"latents {B} x {n} of {T}")
        moved = B * T * c.D * dtype.itemsize
        each = attention_flops(c, n, T - n) / c.H + 2 * n * m.rank * (m.plain + m.value)   # of a head
        operations = B * H * each
        sets = cold(partial(latent_inputs, [(n, T - n)] * B, H, dtype, device), moved)
        seconds = gpu_seconds([partial(latent.attend_to_latents, *s) for s in sets])
        rows.append([f"{B} x {n} of {T}", f"{seconds * 1e6:.0f} us", f"{moved / seconds / 1e12:.2f} TB/s",
                     f"{moved / seconds / bandwidth:.0%}", f"{operations / seconds / 1e12:.0f} TFLOP/s",
                     f"{operations / seconds / peak:.0%}"])
    print_table(f"Latent attention, requests x tokens of their context, {dtype}, {H} heads",
                ["", "time", "latents read at", "of the copy", "rate", "of the product"], rows,
                "What K_h and V_h cost is in the time and the rate.")


def cold(make: Callable[[], list], moved: float) -> list[list]:
    """Inputs by `make`, so many that others of more than a cache come before each is read again. moved: bytes of one"""
    return [make() for _ in range(1 + int(CACHE / moved))]


def time_prefill(device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...], peak: float, H=32, K=8, D=128):
    """Beside PyTorch's kernels, which get contiguous K and V."""
    rows = []
    for T in lengths:
        progress(f"prefill {T}")
        operations, moved = 4 * D * H * T * T / 2, T * (H + 2 * K) * D * dtype.itemsize
        sets = cold(partial(paged_inputs, [(T, 0)], H, K, D, 64, dtype, device), moved)
        ours = gpu_seconds([partial(kernels.attention_triton, *s) for s in sets])
        row = [f"prefill {T}", f"{operations / ours / 1e12:.0f} TFLOP/s", f"{operations / ours / peak:.0%}"]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            sets = cold(lambda: [torch.randn(1, h, T, D, device=device, dtype=dtype) for h in (H, K, K)], moved)
            try:
                with sdpa_kernel(backend):
                    row.append(gpu_seconds([partial(F.scaled_dot_product_attention, *s, is_causal=True, enable_gqa=True)
                                            for s in sets]) / ours)
            except RuntimeError:   # a build of PyTorch without this backend
                row.append("-")
        rows.append(row)
    print_table(f"Causal prefill through block tables, {dtype}, {H}:{K} heads, head size {D}",
                ["", "ours", "of the product", "speed / flash", "speed / cuDNN"], rows)


def time_decode(device: torch.device, dtype: torch.dtype, loads: list[tuple[int, int]], bandwidth: float, H=32, K=8,
                D=128):
    """loads: (requests, tokens of context each)."""
    rows = []
    for B, T in loads:
        progress(f"decode {B} x {T}")
        moved = 2 * B * T * K * D * dtype.itemsize
        sets = cold(partial(paged_inputs, [(1, T - 1)] * B, H, K, D, 64, dtype, device), moved)
        seconds = gpu_seconds([partial(kernels.attention_triton, *s) for s in sets])
        rows.append([f"decode {B} x {T}", f"{seconds * 1e6:.0f} us", f"{moved / seconds / 1e12:.2f} TB/s",
                     f"{moved / seconds / bandwidth:.0%}"])
    print_table(f"Decode through block tables, {dtype}, {H}:{K} heads, head size {D}",
                ["", "time", "K and V read at", "of the copy"], rows)


def check_products(device: torch.device, shapes: list[tuple[int, int, int]]):
    """8-bit products of (rows, outputs, inputs) against float64, on fresh data. Exits at the first that differs."""
    def errors():
        for (T, out, inputs), kind in itertools.product(shapes, BYTES):
            progress(f"checking {kind}, {T} x {inputs} x {out}")
            part, x = random_part(out, inputs, kind, device), torch.randn(T, inputs, device=device)
            q, scale = linear.quantize_rows_triton(x, part.weight.dtype, part.scale.shape[1])
            group_of = torch.arange(inputs, device=device) // 128 % scale.shape[1]   # of each column; 0 if there is one
            x_TE, w_FE = q.double() * scale[:, group_of], part.weight.double() * part.scale[:, group_of]
            room = 1e-5 * (x_TE.abs() @ w_FE.abs().T)
            yield (f"{kind}, {T} x {inputs} x {out}",
                   ((linear.linear_triton(x, part) - x_TE @ w_FE.T).abs() / room).max().item())
    worst = largest_error(errors(), "what rounding explains")
    print(f"All 8-bit products equal those of float64; the largest error is {worst:.0%} of what rounding explains.")


def time_products(device: torch.device, shapes: list[tuple[int, int]], bandwidth: float, peak: float):
    """Products by weights [out, inputs], quantised rows included, beside those by bfloat16 weights."""
    few, many = [], []
    for (out, inputs), T, kind in itertools.product(shapes, (1, 16, 512), BYTES):
        name, moved = f"{kind}, {T} x {inputs} x {out}", out * inputs
        progress(f"multiplying {name}")
        if kind == "int8":
            sets = cold(lambda: [torch.randn(n, inputs, device=device, dtype=torch.bfloat16) for n in (T, out)],
                        2 * moved)
            plain = gpu_seconds([partial(F.linear, *s) for s in sets])
        sets = cold(lambda: [torch.randn(T, inputs, device=device, dtype=torch.bfloat16),
                             random_part(out, inputs, kind, device)], moved)
        ours = gpu_seconds([partial(linear.linear_triton, *s) for s in sets])
        if T <= linear.FEW:
            few.append([name, f"{ours * 1e6:.1f} us", f"{moved / bandwidth * 1e6:.1f} us",
                        f"{moved / ours / bandwidth:.0%}", plain / ours])
        else:
            with patch.object(linear, "torch_multiplies", lambda x, part: False):
                kernel = gpu_seconds([partial(linear.linear_triton, *s) for s in sets])
            operations = 2 * T * out * inputs
            many.append([name, f"{operations / ours / 1e12:.0f} TFLOP/s", f"{operations / ours / peak:.0%}",
                         plain / ours, plain / kernel])
        del sets
    print_table("8-bit products of few rows", ["", "time", "weight / bandwidth", "reached", "speed / bfloat16"], few)
    print_table("8-bit products of many rows", ["", "rate", "of the bfloat16 product", "speed / bfloat16",
                                                "our kernel / bfloat16"], many)


def time_texts(shapes: tuple[str, ...], bandwidth: float):
    """The whole engine on random weights, one text at a time."""
    rows, params = [], SamplingParams(max_tokens=400, ignore_eos=True)
    for shape in shapes:
        progress(f"generating with {shape}")
        try:
            llm = LLM(config_of(shape))
        except (ValueError, RuntimeError):   # a smaller GPU
            rows.append([shape, "does not fit", "-", "-"])
            continue
        llm.generate([[1] * 100], params)   # compile and record
        tps = median(llm.generate([[1] * 100], params)[0].tps for _ in range(5))
        bound = bandwidth / step_cost(llm.config, [(1, 300)], DTYPES[llm.dtype].itemsize).bytes   # at the mean context
        rows.append([f"{shape} {llm.dtype}", f"{tps:.0f}", f"{bound:.0f}", f"{tps / bound:.0%}"])
        del llm
    print_table("End to end at batch 1, random weights", ["", "tokens/s", "bandwidth bound", "reached"], rows,
                "The bound: bytes of the weights that a token reads, and of its K and V, over the copy's bandwidth.")


def show_measured():
    device, dtype = torch.device("cuda"), torch.bfloat16
    check_kernels(device, [(1, 700), (1, 0), (1, 3000), (5, 2000), (16, 9), (77, 0), (300, 500)])
    a, b = (torch.empty(1 << 30, dtype=torch.int8, device=device) for _ in "ab")
    bandwidth = 2 * a.nbytes / gpu_seconds([lambda: b.copy_(a)])
    x = torch.randn(8192, 8192, device=device, dtype=dtype)
    peak = 2 * 8192 ** 3 / gpu_seconds([lambda: x @ x])
    del a, b, x
    print(f"Ceilings: copy {bandwidth / 1e12:.2f} TB/s, {dtype} product {peak / 1e12:.0f} TFLOP/s")
    time_prefill(device, dtype, (2048, 8192, 16384), peak)
    neighbours = [(B, 8192) for B in (1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 24, 32)]   # a cliff would show
    time_decode(device, dtype, [(1, 131072), (8, 16384), (64, 4096), *neighbours], bandwidth)
    check_latents(device, [(1, 700), (1, 0), (1, 3000), (5, 2000), (16, 9), (77, 0), (20, 900), (300, 500)])
    time_latents(device, dtype, [(1, 1, 131072), (8, 1, 16384), (64, 1, 4096), (64, 2, 4096), (1, 8192, 8192)],
                 bandwidth, peak)
    check_products(device, [(1, 70, 300), (16, 2048, 2048), (30, 4100, 1000), (100, 72, 264), (512, 2048, 2048)])
    time_products(device, [(2048, 2048), (3072, 2048), (16384, 2048), (2048, 8192), (128256, 2048)], bandwidth, peak)
    time_texts(("gpt2", "llama-8b"), bandwidth)


# ---------------------------------------------------------------------------------------------
# The command line

def kernels_command(args: argparse.Namespace):
    """Attention and 8-bit products: compiled for GPUs that are not here, or checked and timed on the one that is."""
    gpu = torch.cuda.is_available()
    if not gpu:   # the compiler instead of the interpreter, which must be chosen before the import
        os.environ["TRITON_INTERPRET"] = "0"
    triton = kernels.load_triton()
    if triton is None:
        raise ValueError("the kernels need the triton package, which is not installed: "
                         "pip install -r requirements.txt on Linux")
    place = f"{torch.cuda.get_device_name()}," if gpu else "No GPU here:"
    print(f"{place} PyTorch {torch.__version__}, Triton {triton.__version__}")
    (show_measured if gpu else show_compiled)()


COMMANDS = {"phases": phases, "batch": batch, "cache": kv_cache, "traffic": traffic, "estimate": estimate,
            "serve": serve, "disaggregate": disaggregate, "sampling": sampling, "quantization": quantization,
            "speculate": speculate, "cpu": cpu, "kernels": kernels_command}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}; see --help\n")
    add = parser.add_argument
    add("command", nargs="?", default="phases", choices=COMMANDS, metavar="command", help=f"{', '.join(COMMANDS)}")
    add("--model", metavar="DIR", help="a checkpoint folder (default: demo/llama); for estimate also a config.json or "
        "a known name (default: llama-3-8b)")
    add("--random", choices=SHAPES, metavar="NAME", help=f"random weights of a known shape: {', '.join(SHAPES)}")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    add("--tokens", type=int, default=8192, metavar="T", help="for traffic: length of the sequence (default: 8192)")
    add("--head-dim", type=int, default=128, metavar="D", help="for traffic: size of a head (default: 128)")
    add("--hardware", choices=[*HARDWARE, "cpu"], default="a100", metavar="NAME",
        help=f"for estimate: {', '.join(HARDWARE)}, or cpu, which is measured (default: a100)")
    add("--context", type=int, default=2048, metavar="T", help="for estimate: tokens of context (default: 2048)")
    add("--json", metavar="FILE", help="write the tables as JSON, with machine, versions, command and date")
    add("--plot", metavar="FILE", help="draw them; needs matplotlib")
    args = parser.parse_args(argv)
    return exit_status("bench.py", lambda: measure(args, sys.argv if argv is None else ["bench.py", *argv]))


def measure(args: argparse.Namespace, command: list[str]) -> int:
    """Run the command that the arguments name, and write what it found."""
    for name in ("tokens", "head_dim", "context"):
        if getattr(args, name) < 8:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be 8 or more")
    try:
        pyplot = import_module("matplotlib.pyplot") if args.plot else None
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    if args.plot and args.command == "estimate":
        raise ValueError("a table of formulas cannot be drawn: leave --plot out")
    device = find_device("cpu" if args.command == "cpu" or args.command == "estimate" else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for path in map(Path, filter(None, (args.json, args.plot))):
        check_writable(path)
    try:
        COMMANDS[args.command](args)
    finally:
        progress("")
    if args.json:
        save_json(args.json, command, device)
    if args.plot:
        save_plot(args.plot, pyplot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
