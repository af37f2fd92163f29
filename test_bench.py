"""The measurements: what a step must cost, what `bench.py` prints, and what one sees of the loop. (Read beside
roofline.py, bench.py and watch.py.)

Where time comes in, a clock stands in that moves only when a test tells it to: no outcome depends on the machine.
"""

import itertools
import json
import re
import statistics
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import bench
import checkpoint
import linear
import cli
import kernels
import model
import nanoserve
import roofline
import watch
from batch import Chunk, make_batch
from config import read_config
from nanoserve import LLM, SamplingParams
from reference import CONFIGS, FAMILIES, repeat, tensors_of, write_checkpoint
from roofline import Ceiling, config_of, step_cost

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = roofline.llama(99, 32, 48, 1, 4, 2)


def stand_in_clock(monkeypatch):
    """The time is .now, and .tick(seconds) and time.sleep move it."""
    hands = SimpleNamespace(now=100.0)

    def tick(seconds):
        hands.now += seconds
    hands.tick = tick
    monkeypatch.setattr(time, "perf_counter", lambda: hands.now)
    monkeypatch.setattr(time, "sleep", tick)
    return hands


@pytest.fixture
def hands(monkeypatch):
    return stand_in_clock(monkeypatch)


def taking(function, hands, seconds):
    """The function, and it takes so many seconds, or what seconds(*arguments) says."""
    def call(*arguments):
        hands.tick(seconds(*arguments) if callable(seconds) else seconds)
        return function(*arguments)
    return call


def exit_code(main, arguments):
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def table(*command):
    """The first table that a command of bench.py prints: its rows by their first cell, a cell by its column's name."""
    bench.TABLES.clear()
    assert bench.main([*command, "--device", "cpu", "--dtype", "float32"]) == 0
    return cells(bench.TABLES[0])


def cells(table):
    return {row[0]: dict(zip(table["header"], row)) for row in table["rows"]}


# ---------------------------------------------------------------------------------------------
# What a step must cost

@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral", "qwen2 with windows"])
def test_operations_and_bytes_equal_what_torch_counts(tmp_path, monkeypatch, name):
    config = (FAMILIES | CONFIGS)[name]
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors)
    from torch.utils.flop_counter import FlopCounterMode   # imports Triton, which kernels.py must set up first
    for module in (checkpoint, model, nanoserve):   # operations that the counter knows
        monkeypatch.setattr(module, "pack", lambda part, dtype: part, raising=False)
    monkeypatch.setattr(model, "linear", lambda x, part: torch.nn.functional.linear(x, part.weight, part.bias))
    llm = LLM(tmp_path, device="cpu", dtype="float32", attention="naive", block_size=4)
    c, requests = llm.config, [(1, 20), (1, 0), (9, 5), (7, 0), (4, 26)]
    for wanted in (5, 2, 0):   # how many requests want logits
        chunks = [Chunk([1] * n, past, list(range(8 * i, 8 * i + 8)), int(i < wanted)) for i, (n, past) in enumerate(requests)]
        with FlopCounterMode(display=False) as counter:
            llm.model(make_batch(chunks, 4), llm.pool)
        # Which positions each token sees, and which of the past are read, by the definition of a window.
        sees = [[set(range(max(0, p - (w or 10 ** 9) + 1), p + 1)) for p in range(past, past + n)]
                for w in c.windows for n, past in requests]
        # The definition multiplies every query with every key of its request, seen or not.
        every = c.L * sum(n * (n + past) for n, past in requests)
        cost = step_cost(c, requests, 4, wanted)
        assert cost.flops + 4 * c.H * c.D * (every - sum(map(len, sum(sees, [])))) == counter.get_total_flops()
        read = sum(len([p for p in set().union(*seen) if p < past]) for seen, (_, past) in zip(sees, requests * c.L))
        read += 2 * c.L * sum(n for n, _ in requests)   # the step's own are written and read
        matrices = [t for n, t in tensors.items() if t.dim() == 2 and not re.search("wte|wpe|embed|lm_head", n)]
        head = c.V * c.E * 4 * bool(wanted)
        assert cost.bytes == sum(t.nbytes for t in matrices) + head + read * 2 * c.K * c.D * 4
    assert step_cost(c, requests, 2) == step_cost(c, requests, 2, 5)
    assert roofline.kv_bytes(c, 4) == sum(memory[:, :, 0, 0].nbytes for memory in llm.pool.memory)


@pytest.mark.parametrize("name", ["gpt2", "gpt2 gelu, untied, unscaled", "llama one KV head, own head size, biases, tied", "qwen3"])
def test_bytes_in_8_bits_equal_those_of_the_parts_that_are_multiplied(tmp_path, name):
    config = FAMILIES[name]
    llm = LLM(write_checkpoint(tmp_path, config, tensors_of(config)), device="cpu", dtype="float32", quantization="int8")
    parts = {part: llm.model.weights[part] for part in ("qkv", "out", "up", "down", "head")}
    held = {part: sum(p.weight.numel() + 4 * p.scale.numel() for p in layers) for part, layers in parts.items()}
    assert roofline.weight_bytes(llm.config, 4, True) == sum(held.values())
    assert roofline.weight_bytes(llm.config, 2, True, head=False) == sum(held.values()) - held["head"]
    for logits, kv in ((0, "auto"), (1, "int8")):   # only the weights differ from a step in float32
        plain, small = (step_cost(llm.config, [(3, 5)], 4, logits, kv, bits) for bits in (False, True))
        fewer = 3 * sum(p.weight.numel() for part in parts for p in parts[part] if logits or part != "head") - 4 * sum(
            p.scale.numel() for part in parts for p in parts[part] if logits or part != "head")
        assert plain.flops == small.flops and plain.bytes - small.bytes == fewer


def test_the_least_time_is_the_longer_of_two():
    machine = Ceiling(peak=60.0, bandwidth=20.0)
    assert machine.balance == 3
    for flops, moved, seconds, verdict in [(120, 20, 2, "compute"), (30, 40, 2, "memory"), (61, 20, 61 / 60, "compute")]:
        cost = roofline.Cost(flops, moved)
        assert (machine.seconds(cost), machine.verdict(cost)) == (seconds, verdict)


@settings(max_examples=60)
@given(shape=st.sampled_from(["gpt2", "llama-135m", "llama-8b", "qwen3-0.6b"]), context=st.integers(1, 3000),
       balance=st.floats(2, 500), itemsize=st.sampled_from([2, 4]))
def test_crossover_is_the_first_batch_that_is_bound_by_compute(shape, context, balance, itemsize):
    c, machine = config_of(shape), Ceiling(balance * 1e9, 1e9)
    said = roofline.crossover(c, machine, context, itemsize)

    one, two = (step_cost(c, [(1, context)] * B, itemsize) for B in (1, 2))

    def bound(B):   # every request adds the same
        return machine.verdict(roofline.Cost(*(a + (B - 1) * (b - a) for a, b in zip(one, two))))
    if "no batch" in said:
        assert bound(10 ** 9) == "memory"
        assert f"brings {(two.flops - one.flops) / (two.bytes - one.bytes):.0f} operations" in said
        assert said.endswith(f"balance is {balance:.0f}")
    else:
        B = int(said.split()[-1])   # rounded
        assert bound(B + 1) == "compute" and (B <= 1 or bound(B - 1) == "memory"), said


def test_a_prompt_pays_its_way_over_a_link_as_worked_out_by_hand():
    """Llama 3 8B: 128 KiB of K and V per token. 2 x 6.98 G operations per token in layers, and 2 L H D T per token."""
    rows = roofline.handing_over(config_of("llama-3-8b"), roofline.HARDWARE["h100"], (1000,))
    flops = 2 * 1000 * (32 * (4096 * 6144 + 4096 ** 2 + 3 * 4096 * 14336)) + 2 * 128256 * 4096 + 2 * 32 * 4096 * 1000 * 1001
    size, seconds = 1000 * 131072, flops / 989e12
    assert rows == [[1000, pytest.approx(size / 1e6), pytest.approx(seconds * 1e3), *(
        pytest.approx(x) for speed in (450e9, 50e9) for x in (size / speed * 1e3, size / speed / seconds * 100))]]


def test_crossover_at_a_short_context_by_hand():
    """Two tokens of context: K and V are hardly there, and the weights want balance / 2 requests per 2 bytes."""
    c = config_of("llama-8b")
    weights = 32 * (4096 * (32 + 16) * 128 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    flops, each = 2 * weights + 4 * 32 * 128 * 32 * 3, 2 * 2 * 8 * 128 * 32 * (2 + 2)
    exact = 300 * 2 * weights / (flops - 300 * each)
    assert exact == pytest.approx(300, rel=0.02)
    assert roofline.crossover(c, Ceiling(300e9, 1e9), 2, 2) == f"compute-bound at batch {exact:.0f}"
    long = [(2 * 2 * 8 * 128 * 32) * (T + 2) for T in (700,)][0]
    exact = 40 * 2 * weights / (2 * weights + 4 * 32 * 128 * 32 * 701 - 40 * long)
    assert roofline.crossover(c, Ceiling(40e9, 1e9), 700, 2) == f"compute-bound at batch {exact:.0f}"


def test_ceilings_are_the_best_of_many_tries(monkeypatch):
    tries = {"sum": itertools.cycle([0.5, 0.25, 0.75]), "other": itertools.cycle([9.0, 5.0, 4.0, 7.0])}
    monkeypatch.setattr(roofline, "clock", lambda call, device: next(tries[call.__name__ if call.__name__ == "sum" else "other"]))
    found = roofline.measured_ceiling(torch.device("cpu"), "float32")
    assert found == Ceiling(2 * 2048 ** 3 / 4.0, 2 ** 29 / 0.25)


def test_turns_go_round_and_the_first_does_not_count():
    ran = []

    def measure(name):
        ran.append(name)
        return len(ran)
    assert roofline.in_turns([partial(measure, "a"), partial(measure, "b")], 3) == [[3, 5, 7], [4, 6, 8]]
    assert "".join(ran) == "abababab"


@pytest.mark.parametrize("dividends, divisors, expected", [
    ([4, 9, 6], [2, 3, 2], 3), ([4, 900, 4], [2, 1, 2], 2),            # a burst in one turn is outvoted
    ([4, 900, 4, 70, 1], [1, 1, 2, 1, 9], "-"), ([1, 2, 3], [0, 0, 1], "-"), ([3, 3, 3], [-1, -1, -1], "-"),
    ([-1, -2, -1], [1, 1, 1], "-"), ([1300, 1, 1], [1, 1, 500], "-")])
def test_a_ratio_that_nobody_can_believe_is_not_printed(dividends, divisors, expected):
    assert roofline.ratio(dividends, divisors) == expected


def test_estimate_reproduces_the_published_figures(capsys):
    """LLaMA-2 7B on an A100: about one operation per byte in decode, 143 tokens/s, prefill over 100 times faster."""
    assert bench.main(["estimate", "--model", "llama-2-7b", "--hardware", "a100"]) == 0
    value = {row[0]: row[-1] for row in bench.TABLES[-1]["rows"]}
    assert value["its intensity"] == "1.00 FLOP/B" and value["bound on TPS at batch 1"] == "143 tokens/s"
    assert int(value["prefill over decode, per token"].split()[0]) > 100 and value["K and V per token"] == "512 KiB"
    bench.main(["estimate", "--random", "llama-8b"])
    value = {row[0]: row[-1] for row in bench.TABLES[-1]["rows"]}
    assert (value["K and V per token"], value["the same without GQA"]) == ("128 KiB", "512 KiB")


@pytest.mark.parametrize("shape, T, peak, bandwidth", [("llama-8b", 2048, 312e12, 2.039e12), ("llama-8b", 8, 10e12, 2e12),
                                                       ("gpt2", 900, 28e12, 0.4e12), ("qwen3-0.6b", 100, 1e11, 9e11)])
def test_every_formula_of_the_estimate_gives_its_value(shape, T, peak, bandwidth):
    c, machine = config_of(shape), Ceiling(peak, bandwidth)
    rows = {name: (formula, value) for name, formula, value in roofline.on_paper(c, machine, "somewhere", T)}
    parameters = {"llama-8b": 8030261248 - 128256 * 4096, "gpt2": 124439808 - 1024 * 768, "qwen3-0.6b": 596049920}[shape]
    P = parameters   # all but the embedding where it is not the head, and but positions: norms and biases are a few per mille
    kv, pairs = 2 * 2 * c.L * c.K * c.D, T * (T + 1) // 2
    decode_flops, decode_bytes = 2 * P + 4 * c.L * c.H * c.D * (T + 1), 2 * P + kv * (T + 2)
    prefill_flops = 2 * (P - c.V * c.E) * T + 2 * c.V * c.E + 4 * c.L * c.H * c.D * pairs
    step = max(decode_flops / peak, decode_bytes / bandwidth)
    wait = max(prefill_flops / peak, (2 * P + kv * 2 * T) / bandwidth)
    expected = {
        "weights that a token meets": P / 1e9, "their bytes": 2 * P / 1e9, "K and V per token": kv / 1024,
        "the same without GQA": kv * c.H / c.K / 1024, f"bytes of a decode step at {T}": decode_bytes / 1e9,
        "its operations": decode_flops / 1e9, "its intensity": decode_flops / decode_bytes,
        "attention's own intensity": 4 * c.L * c.H * c.D / kv,
        "balance of somewhere": peak / bandwidth, "its least time": step * 1e3, "bound on TPS at batch 1": 1 / step,
        f"operations of a prompt of {T}": prefill_flops / 1e12, "bound on its TTFT": wait * 1e3,
        "prefill tokens/s": T / wait, "prefill over decode, per token": T / wait * step}
    assert rows.keys() == expected.keys()
    for name, number in expected.items():
        said = rows[name][1].split()[0].replace(",", "")
        digits = len(said.partition(".")[2])
        assert abs(float(said) - number) <= 0.51 * 10 ** -digits + 2e-3 * number, name
    units = {"G": 1e9, "GB": 1e9, "KiB": 1024, "TFLOP/s": 1e12, "TB/s": 1e12, "GFLOP": 1e9, "TFLOP": 1e12, "ms": 1e-3,
             "FLOP/B": 1, "tokens/s": 1, "times": 1}
    letters = {"V": c.V, "E": c.E, "L": c.L, "H": c.H, "K": c.K, "D": c.D}

    def value_of(text):
        """Of a sum, product or quotient of numbers with units and letters."""
        total = 0.0
        for term in re.sub(r" in layers", "", text).split(" + "):
            product, divide = 1.0, False
            for word in term.split():
                if word in ("x", "/"):
                    divide = word == "/"
                    continue
                factor = letters.get(word) or units.get(word) or float(word.replace(",", ""))
                product, divide = product / factor if divide and word not in units else product * factor, divide and word not in units
            total += product
        return total
    for name, (formula, value) in rows.items():
        if name in ("its intensity", "attention's own intensity", "prefill tokens/s", "prefill over decode, per token", "bound on TPS at batch 1",
                    "weights that a token meets") or "least time" in name or "TTFT" in name or "balance" in name:
            continue   # quotients and values whose unit is the formula's
        number, unit = value.split()
        rounding = (0.5 * 10 ** -len(number.partition(".")[2]) + 0.011) * units[unit]   # of the value, and of 2 x G
        for side in formula.split(" = "):
            assert value_of(side) == pytest.approx(value_of(value), rel=0.005, abs=rounding), (name, side)
    assert ("GFLOP /" in rows["its least time"][0]) == (machine.verdict(step_cost(c, [(1, T)], 2)) == "compute")
    assert ("TFLOP /" in rows["bound on its TTFT"][0]) == (machine.verdict(step_cost(c, [(T, 0)], 2)) == "compute")


def test_the_docstrings_example_is_true():
    c = read_config(HERE / "demo/llama")
    for n, past, says in ((3, 0, "does {f:.1f} MFLOP on {b:.2f} MB, {i:.1f} operations"), (1, 3, "{f:.1f} MFLOP on {b:.2f} MB, {i:.1f}."),
                          (512, 0, "512 tokens does {i:.0f} operations per byte")):
        flops, moved = step_cost(c, [(n, past)], 4)
        assert says.format(f=flops / 1e6, b=moved / 1e6, i=flops / moved) in " ".join(roofline.__doc__.split())


# ---------------------------------------------------------------------------------------------
# What bench.py prints

@pytest.fixture
def demo():
    """Operations and bytes of a step of demo/llama in float32, counted from its file: f(requests, new tokens, past)."""
    config, tensors = json.loads((HERE / "demo/llama/config.json").read_text()), load_file(HERE / "demo/llama/model.safetensors")
    W = sum(t.numel() for name, t in tensors.items() if t.dim() == 2 and "layers" in name)
    V, E, L, H, K = (config[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"))

    def cost(B, n, past):
        seen = sum(past + i + 1 for i in range(n))
        return (B * (2 * n * W + 2 * V * E + 4 * E * L * seen), 4 * (W + V * E + B * 2 * E // H * K * L * (past + 2 * n)))
    return cost


def test_phases_prints_time_rate_cost_and_parts_of_the_ceilings(monkeypatch, demo):
    monkeypatch.setattr(bench, "measured_ceiling", lambda device, dtype: Ceiling(1e12, 1e10))
    monkeypatch.setattr(bench, "prefill_seconds", lambda llm, B, T: T / 1000)
    monkeypatch.setattr(bench, "decode_seconds", lambda llm, B, T: B ** 0.5 / 100)
    rows = table("phases")
    for B, n, past, seconds in [(1, 32, 0, 0.032), (1, 128, 0, 0.128), (1, 512, 0, 0.512), (1, 1, 128, 0.01), (4, 1, 128, 0.02), (16, 1, 128, 0.04)]:
        flops, moved = demo(B, n, past)
        assert rows[f"decode {B} x {past}" if past else f"prefill {B} x {n}"] == {
            "": f"decode {B} x {past}" if past else f"prefill {B} x {n}", "ms": pytest.approx(seconds * 1000),
            "tokens/s": pytest.approx(B * n / seconds), "MFLOP": pytest.approx(flops / 1e6), "MB": pytest.approx(moved / 1e6),
            "FLOP/B": pytest.approx(flops / moved), "% of peak": pytest.approx(flops / seconds / 1e12 * 100),
            "% of bandwidth": pytest.approx(moved / seconds / 1e10 * 100), "bound": "compute" if n == 512 else "memory"}
    assert "prefill does 10 times as many tokens per second as decode at batch 1" in bench.TABLES[0]["note"]


def test_batch_prints_rates_the_roofline_and_where_it_turns(monkeypatch, demo):
    seconds = {1: 0.010, 2: 0.012, 4: 0.020, 8: 0.021, 16: 0.03, 32: 0.05}
    monkeypatch.setattr(bench, "measured_ceiling", lambda device, dtype: Ceiling(2e10, 1e10))
    monkeypatch.setattr(bench, "decode_seconds", lambda llm, B, T: seconds[B])
    rows = table("batch")
    for B, s in seconds.items():
        flops, moved = demo(B, 1, 128)
        least = max(flops / 2e10, moved / 1e10)
        assert rows[B] == {"batch": B, "ms per step": pytest.approx(s * 1000), "tokens/s": pytest.approx(B / s), "each": pytest.approx(1 / s),
                           "roofline ms": pytest.approx(least * 1000), "% of roofline": pytest.approx(least / s * 100)}
    note = bench.TABLES[0]["note"]
    assert "batch 8 is the first to take more than twice" in note and "A request of 1024 tokens holds 2.6 MB" in note
    assert "room for 32 of them" in note
    turns = next(B for B in itertools.count(1) if demo(B, 1, 128)[0] / demo(B, 1, 128)[1] > 2)
    assert int(re.search(r"compute-bound at batch (\d+)", note)[1]) in (turns - 1, turns)
    monkeypatch.setattr(bench, "decode_seconds", lambda llm, B, T: 1.0 + B / 100)
    table("batch")
    assert "a step of batch 32 takes less than twice" in bench.TABLES[0]["note"]


def test_cache_adds_up_what_a_text_costs_with_and_without(monkeypatch):
    monkeypatch.setattr(bench, "decode_seconds", lambda llm, B, T: 0.001 + B - 1)
    monkeypatch.setattr(bench, "prefill_seconds", lambda llm, B, T: T / 1000 + B - 1)
    rows, again = table("cache"), 0.0
    assert list(rows) == [32, 64, 128, 256, 512, 960]
    for T, before in zip(rows, [0, *rows]):   # the first tokens cost what the 32nd does, then it rises evenly
        again += sum(max(32.0, t + 0.5) for t in range(before, T)) / 1000
        assert list(rows[T].values()) == [T, pytest.approx(1), pytest.approx(T), pytest.approx(T), pytest.approx(T / 1000),
                                          pytest.approx(again), pytest.approx(again / T * 1000)]


def test_traffic_counts_what_goes_through_memory(monkeypatch):
    monkeypatch.setattr(bench, "in_turns", lambda measures: [[0.006, 0.009, 0.3], [0.002, 0.003, 0.1]])
    rows = table("traffic", "--tokens", "1024", "--head-dim", "64")
    assert list(rows) == [128, 512, 1024]
    for T, row in rows.items():
        vectors, scores = 2 * T * 64, 2 * T * T                      # bytes of q, k, v or the result; of all scores
        naive = 3 * vectors + scores + scores + scores + scores + vectors   # q, k, v; scores out, in; weights out, in; result
        assert list(row) == ["tokens", "8 T^2 MiB", "naive MiB", "tiled MiB", "ratio", "T / d", "naive ms", "tiled ms", "faster"]
        assert list(row.values()) == [T, 4 * scores / 2 ** 20, naive / 2 ** 20, 4 * vectors / 2 ** 20, naive / (4 * vectors), T / 64,
                                      pytest.approx(9), pytest.approx(3), pytest.approx(3)]


class OneASecond:
    """In the place of an LLM: every request gets a token in every step, and a step takes a second."""

    def __init__(self, hands):
        self.hands, self.requests, self.ids = hands, {}, itertools.count()

    def add(self, prompt, params):
        out = SimpleNamespace(id=next(self.ids), token_ids=[], max_tokens=params.max_tokens)
        self.requests[out.id] = out
        return out.id

    def step(self):
        self.hands.tick(len(self.requests) > 0)
        outs = list(self.requests.values())
        for out in outs:
            out.token_ids.append(0)
            if len(out.token_ids) == out.max_tokens:
                del self.requests[out.id]
        return outs


@pytest.mark.parametrize("group, ttft", [(0, [1, 1.5, 1]), (2, [1, 3.5, 1])])
def test_ttft_counts_from_arrival_and_gaps_from_token_to_token(hands, group, ttft):
    seen = bench.play(OneASecond(hands), [(0.0, [1], 3), (0.5, [1], 2), (9.0, [1], 1)], group)
    assert seen == {"ttft": ttft, "gap": [1, 1, 1], "tokens/s": [6 / 10]}


def test_static_batches_wait_for_their_longest(hands):
    """Two at a time: the third waits for the second, which is longer than the first."""
    seen = bench.play(OneASecond(hands), [(0.0, [1], 1), (0.0, [1], 4), (0.0, [1], 1), (2.0, [1], 1)], 2)
    assert seen["ttft"] == [1, 1, 5, 3] and seen["tokens/s"] == [7 / 5]


def test_compare_puts_each_number_into_its_column(monkeypatch):
    made, played = itertools.count(), []

    def play(llm, requests, group):
        played.append((llm, requests, group))
        if requests == 0:   # the first turn
            return {"tokens/s": [1e9], "ttft": [1e9], "gap": [1e9]}
        unit = {"A": 1, "B": 3}[llm]
        return {"tokens/s": [unit * [10, 30, 20][requests - 1]], "ttft": [unit * i / 1000 for i in range(101)],
                "gap": [unit * i / 500 for i in range(101)]}
    monkeypatch.setattr(bench, "play", play)
    monkeypatch.setattr(bench, "TABLES", [])
    bench.compare("title", {"a": ("A", 0), "b": ("B", 8)}, lambda: next(made), "note")
    assert played == [(llm, turn, group) for turn in range(4) for llm, group in (("A", 0), ("B", 8))]
    (shown,) = bench.TABLES
    assert shown["header"] == ["", "tokens/s", "TTFT p50", "p95", "p99 ms", "gap p50", "p95", "p99", "longest ms"]
    expected = [20, 50, 95, 99, 100, 190, 198, 200]
    assert shown["rows"] == [["a", *map(pytest.approx, expected)], ["b", *(pytest.approx(3 * x) for x in expected)]]


def test_tps_counts_the_tokens_after_the_first_and_ttft_the_time_from_arrival(lone, hands):
    """Tokens at 1, 2 and 3 seconds are 1.0 per second; whoever waits for a place has waited since it came."""
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, max_seqs=1, device="cpu", dtype="float32")
    llm.runner.forward = taking(llm.runner.forward, hands, 1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    first = llm.requests[llm.add(prompts[0], params)].output
    hands.tick(0.5)
    second = llm.requests[llm.add(prompts[1], params)].output
    while llm.requests:
        llm.step()
    assert (first.ttft, first.tps) == (1.5, 1.0) and (second.ttft, second.tps) == (4.0, 1.0)
    (out,) = llm.generate([prompts[0]], SamplingParams(max_tokens=1))
    assert (out.ttft, out.tps) == (1.0, 0.0)


@pytest.mark.parametrize("B, context", [(1, 60), (3, 40)])
def test_a_decode_is_measured_at_its_context_and_once_it_is_warm(lone, hands, B, context):
    llm = LLM(lone["llama"][0], max_seqs=4, device="cpu", dtype="float32", max_batched_tokens=48)
    lens, forward = [], llm.runner.forward

    def run(batch):
        lens.append(batch.lens)
        decodes = sum(len(chunk.tokens) == 1 for chunk in batch.chunks) == B == len(batch.chunks)
        hands.tick(2 if decodes and len(lens) % 7 else 90)   # now and then somebody disturbs it
        return forward(batch)
    llm.runner.forward = run
    assert bench.decode_seconds(llm, B, context) == 2 and not llm.requests
    counted = lens[-12:]
    assert all(len(step) == B for step in counted) and abs(statistics.mean(sum(counted, [])) - context) <= 2
    assert len(bench.decode_steps(llm, B, context, 20)) == 20


def test_a_measurement_whose_requests_end_says_so(lone):
    with pytest.raises(ValueError, match="a request ended before its measurement did"):
        bench.decode_seconds(LLM(lone["llama"][0], device="cpu"), 1, 158)


def test_prefill_is_measured_to_the_first_tokens(lone, hands):
    llm, batches = LLM(lone["llama"][0], max_seqs=4, device="cpu", dtype="float32", prefix_cache=False), []
    llm.runner.forward = taking(llm.runner.forward, hands, lambda batch: batches.append(batch.lens) or 3)
    assert bench.prefill_seconds(llm, 2, 30) == 3 and batches == [[30, 30]]


def test_serve_says_where_the_time_of_a_step_goes(monkeypatch, lone, hands):
    """Deciding takes 1 second, the model 7 and choosing 2; while the prompts are read, in many chunks, ten times as much."""
    llm = LLM(lone["llama"][0], device="cpu", dtype="float32", max_batched_tokens=8)
    llm.runner.forward = taking(llm.runner.forward, hands, lambda batch: 7 if len(batch.tokens_T) == 2 else 70)
    monkeypatch.setattr(nanoserve, "choose", taking(nanoserve.choose, hands, lambda logits, requests: 2 if len(requests) == 2 else 20))
    llm.scheduler.schedule = taking(llm.scheduler.schedule, hands, 1)
    assert bench.loop_seconds(llm, 2, 9) == (10, 7, 2)


def test_sampling_prints_what_choosing_costs_beside_a_step(monkeypatch, hands, capsys):
    """A forward takes 10 seconds; choosing takes 1, or more in each way in which it is not greedy."""
    costs = {(0, 0, 1): 1, (0.8, 0, 1): 2, (0.8, 50, 1): 3, (0.8, 1000, 1): 4, (0.8, 0, 0.9): 5,
             (0.8, 0, 0.3): 6, (0.8, 1000, 0.9): 7}
    names = ["greedy", "temperature 0.8", "top-k 50", "top-k 1000", "top-p 0.9", "top-p 0.3", "top-k 1000, top-p 0.9"]
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    monkeypatch.setattr(model.ModelRunner, "forward", taking(model.ModelRunner.forward, hands, 10))
    monkeypatch.setattr(nanoserve, "choose", taking(nanoserve.choose, hands, lambda logits, takers: statistics.mean(
        costs[r.params.temperature, r.params.top_k, r.params.top_p] for r, _ in takers)))
    rows = table("sampling", "--random", "tiny")
    assert list(rows) == [f"tiny, batch {B}: {name}" for B in (1, 16) for name in names]
    for (name, row), cost in zip(rows.items(), [*costs.values()] * 2):
        assert list(row.values()) == [name, (10 + cost) * 1e3, (10 + cost) / 11, cost * 1e3, pytest.approx(cost / (10 + cost) * 100)]
    assert list(row) == ["", "ms per step", "of greedy", "choosing ms", "% of step"]
    assert "Choosing takes 41.2% of a step at most (tiny, batch 1: top-k 1000, top-p 0.9)" in bench.TABLES[0]["note"]


def test_an_oracle_is_right_as_often_as_it_is_told_and_its_dice_fall_again_as_they_fell():
    texts, V = [[i] * 3 + [(7 * j + i) % 50 for j in range(2000)] for i in range(2)], 50
    for right in (0.0, 0.3, 0.8, 1.0):
        drafted = []
        for _ in range(2):
            oracle = bench.Oracle(texts, 3, right, V)
            requests = [SimpleNamespace(tokens=text[:length]) for text in texts for length in (3, 700, 1990)]
            assert oracle.offers(requests, [8, 0, 20] * 2) == [8, 0, 13] * 2, "its room, and as far as it knows"
            drafted.append(oracle.guess(requests, [690, 1200, 13] * 2))
        assert drafted[0] == drafted[1] and list(map(len, drafted[0])) == [690, 1200, 13] * 2
        hits = [[a == b for a, b in zip(drafts, texts[i // 3][len(request.tokens):])] for i, (drafts, request) in enumerate(zip(drafted[0], requests))]
        share = sum(sum(hits, [])) / sum(map(len, hits))
        assert abs(share - right) < 0.03 and (share == right or 0 < right < 1) and (hits[0] != hits[3] or right in (0, 1))


@pytest.mark.parametrize("B, drafts", [(1, 0), (1, 4), (3, 2), (3, 8)])
def test_drafts_are_measured_by_their_steps_and_predicted_from_them(hands, B, drafts):
    """A step takes 10 seconds and one for each token that it runs; guessing takes 2."""
    llm = LLM(config_of_tiny(), "cpu", "float32", prefix_cache=False, max_seqs=4, speculative_model="ngram")
    prompts = [[i, 5, 7, 2] for i in range(B)]
    llm.speculator = None
    texts = [prompt + llm.generate([prompt], SamplingParams(max_tokens=160, ignore_eos=True))[0].token_ids for prompt in prompts]
    llm.runner.forward = taking(llm.runner.forward, hands, lambda batch: 10 + len(batch.tokens_T))
    plain = bench.run_drafts(llm, None, prompts, 9)
    assert plain == bench.Run(10 + B, 0, 0, 0, 0, 0, 1, B / (10 + B)) and not llm.requests and not llm.watchers
    for right in (0.0, 0.6, 1.0):
        oracle = bench.Oracle(texts, 4, right, 99)
        oracle.guess = taking(oracle.guess, hands, 2)
        run = bench.run_drafts(llm, bench.forced(oracle, drafts), prompts, 9)
        if not drafts:
            assert run == plain
            continue
        step = 10 + B * (1 + drafts)
        assert run[:4] == (step, 2, 1, 1) and run.drafts == drafts and run.speed == pytest.approx(B * run.tokens / (step + 2))
        # By the dice: how many drafts are right behind every place at which a verification begins.
        taken, tries, hits = 0, 0, 0
        for text in texts:
            at = len(text) - 160 + 1
            for step_number in range(bench.WARM + 9):
                guessed = oracle.guess([SimpleNamespace(tokens=text[:at])], [drafts])[0]
                n = next((i for i, token in enumerate(guessed) if token != text[at + i]), drafts)
                if step_number >= bench.WARM:
                    taken, hits, tries = taken + n + 1, hits + n, tries + min(n + 1, drafts)
                at += n + 1
        assert (run.tokens, run.right) == (pytest.approx(taken / 9 / B), pytest.approx(hits / tries))
        expected = sum(run.right ** n for n in range(drafts + 1))
        assert run.predicted(plain, B, drafts) == pytest.approx(B * expected / (step + 2))
        if right in (0, 1):
            assert run.right == right and run.speed == pytest.approx(run.predicted(plain, B, drafts))


def test_a_prediction_counts_the_decodes_without_drafts():
    """In half of the steps one of two requests has drafts: 1.25 x 0.5 + 0.25 x 0.25 more tokens, between steps of 6 and 4 seconds."""
    run = bench.Run(seconds=6, guessing=1, busy=0.5, drafted=0.25, right=0.5, drafts=0.5, tokens=9, speed=9)
    assert run.predicted(bench.Run(4, 0, 0, 0, 0, 0, 1, 1), 2, 2) == 2 * (1 + 0.25 * 0.75) / (1 + 5)


def config_of_tiny(context=512):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SHAPES, "tiny", TINY | dict(max_position_embeddings=context))
        return config_of("tiny")


def test_speculation_off_and_on_take_turns(hands):
    """A step takes 10 seconds and one for each token that it runs; so much more takes every step of a busy minute."""
    llm = LLM(config_of_tiny(), "cpu", "float32", prefix_cache=False, max_seqs=4, speculative_model="ngram")
    prompts = [[i, 5, 7, 2] for i in range(2)]
    llm.speculator = None
    texts = [prompt + llm.generate([prompt], SamplingParams(max_tokens=160, ignore_eos=True))[0].token_ids for prompt in prompts]
    order = []
    llm.runner.forward = taking(llm.runner.forward, hands, lambda batch: order.append(len(batch.tokens_T)) or 10 + len(batch.tokens_T))
    plain = bench.beside(llm)
    ways = bench.off_and_on(plain, llm, bench.Oracle(texts, 4, 1.0, 99))
    assert plain.speculator is ways[0][1] is None and ways[1][0] is llm and "worthwhile" not in vars(ways[1][1]), "it decides for itself"
    plain.runner.forward = taking(plain.runner.forward, hands, lambda batch: order.append(len(batch.tokens_T)) or 10 + len(batch.tokens_T))
    assert order == [1, 2, 5, 32] * 2, "it measures, twice as this takes so long, and then it decides"
    order.clear()
    off, on = bench.run_ways([ways[0], (llm, bench.forced(bench.Oracle(texts, 4, 1.0, 99), 3))], prompts, 6)
    assert order == [8] + [2] * 4 + [8] + [8] * 4 + [2] * 4 + [8] * 4 + [2] * 2 + [8] * 2, "prompts, the warm ones, and turns of 4 and 2"
    assert (off.tokens, off.seconds, off.drafts) == (1, 12, 0) and (on.tokens, on.seconds, on.drafts) == (4, 18, 3)
    assert off.speed == pytest.approx(2 / 12) and on.speed == pytest.approx(8 / 18)


def test_speculate_puts_each_number_into_its_column(monkeypatch, capsys):
    seen = []

    def run_drafts(llm, speculator, prompts, steps):
        """Each draft adds 1% to a step of 10 ms, and 2% in int8; a forced one half a token; speculation on, 5 tokens in a step, n-grams 6."""
        B, n, kind = len(prompts), speculator.most if speculator else 0, type(speculator.drafter).__name__ if speculator else ""
        free = speculator and "worthwhile" not in vars(speculator)
        seen.append((kind, n, B, bool(free), getattr(getattr(speculator, "drafter", None), "right", None)))
        seconds = 0.01 * (1 + n * (0.02 if llm.model.weights["down"][0].scale is not None else 0.01))
        tokens = (6 if kind == "NgramDrafter" else 0.5 if getattr(speculator.drafter, "right", 1) == 0 else 5) if free else 1 + n / 2
        return bench.Run(seconds, 0.001 * bool(n), float(n > 0), float(n > 0), 0.5 * (n > 0), float(n), tokens, B * tokens / (seconds + 0.001 * bool(n)))

    def run_ways(ways, prompts, steps):
        return [run_drafts(llm, speculator, prompts, steps) for llm, speculator in ways]
    for name, value in (("TABLES", []), ("run_drafts", run_drafts), ("run_ways", run_ways)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY | dict(max_position_embeddings=512))
    assert bench.main(["speculate", "--random", "tiny", "--device", "cpu"]) == 0
    pair, pair_rule, plain, plain_rule, small, small_rule = bench.TABLES
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[1:])) <= 100
    draft = "demo/draft" if (HERE / "demo/draft").exists() else "demo/gpt2"
    for table, names, more in ((pair, [draft, "n-grams"], 0.01), (plain, ["drafts"], 0.01), (small, ["drafts"], 0.02)):
        assert table["header"] == ["", "drafted %", "right", "tokens/step", "cost", "guess ms", "tokens/s", "predicted", "gain"]
        rows = cells(table)
        assert rows.keys() == {f"batch {B}, {name} {n}" for B in (1, 4, 16) for name in names for n in (0, 1, 2, 4, 8)}
        for B, name, n in itertools.product((1, 4, 16), names, (0, 1, 2, 4, 8)):
            seconds, guess = 0.01 * (1 + n * more), 0.001 * (n > 0)
            speed, predicted = B * (1 + n / 2) / (seconds + guess), B * sum(0.5 ** i for i in range(n + 1)) / (seconds + guess)
            assert list(rows[f"batch {B}, {name} {n}"].values())[1:] == [
                *([100, 0.5] if n else ["-", "-"]), 1 + n / 2, pytest.approx(1 + n * more), pytest.approx(1) if n else "-",
                pytest.approx(speed), pytest.approx(predicted), pytest.approx(speed / (B / 0.01))]
    for table, names, more in ((pair_rule, [draft, "n-grams"], 0.01), (plain_rule, ["right with 0.8", "always wrong", "n-grams, repeating"], 0.01),
                               (small_rule, ["right with 0.8", "always wrong", "n-grams, repeating"], 0.02)):
        assert [row[0] for row in table["rows"]] == [f"batch {B}, {name}" for B in (1, 4, 16) for name in names] or table is pair_rule
        for row in table["rows"]:
            B, tokens = int(row[0].split(",")[0].split()[1]), 0.5 if "wrong" in row[0] else 6 if "n-grams" in row[0] else 5
            speed = B * tokens / (0.01 * (1 + 4 * more) + 0.001)
            assert row[1:] == [4, tokens, pytest.approx(B / 0.01), pytest.approx(speed), pytest.approx(speed / (B / 0.01))]
        smallest = (5 if table is pair_rule else 0.5) / (1 + 4 * more + 0.1)
        assert table["note"].endswith(f"The smallest ratio is {bench.show(smallest)}.")
    told = " ".join(out.split())
    for kind, more, goal in (("float32", 0.01, 1.35), ("int8", 0.02, 1.15)):
        step = 1 + 4 * more
        assert (f"In {kind}, verifying 4 drafts costs {step:.2f} of a decode (goal: at most {goal}); 4 drafts, each right with a chance of 0.8, "
                f"are {3 / (step + 0.1):.2f} times as fast (goal: 2.2); n-grams on an answer that repeats its prompt {6 / (step + 0.1):.2f} times") in told
    assert {(*way, B, False, right) for B in (1, 4, 16) for right in (0.8,) for way in (("Oracle", 1), ("Oracle", 2), ("Oracle", 4), ("Oracle", 8))} <= set(seen)
    assert {(kind, 4, B, True, right) for B in (1, 4, 16) for kind, right in (("Oracle", 0.8), ("Oracle", 0.0), ("NgramDrafter", None), ("DraftModel", None))} <= set(seen)


SPEEDS = {   # of each variant: a decode step of one, of 16, and a prefill, in milliseconds
    "float32": (8, 32, 64), "bfloat16": (6, 24, 40), "int8": (2, 16, 32), "int8 in bfloat16": (3, 17, 33),
    "int8 KV": (9, 30, 65), "int8 + int8 KV": (2.5, 18, 34)}


def test_quantization_puts_each_speed_and_bound_into_its_column(monkeypatch):
    def measured(i, n):
        def seconds(llm, B, T):
            bits = llm.model.weights["qkv"][0].scale is not None
            name = {False: {"float32": "float32", "bfloat16": "bfloat16"}, True: {"float32": "int8", "bfloat16": "int8 in bfloat16"}}[bits][llm.dtype]
            if llm.pool.memory[0].dtype == torch.int8:
                name = {"float32": "int8 KV", "int8": "int8 + int8 KV"}[name]
            assert T == n
            return SPEEDS[name][i + (B == 16)] / 1000
        return seconds
    ceilings = {"float32": Ceiling(1e9, 1e7), "bfloat16": Ceiling(2e9, 3e7), "int8": Ceiling(4e9, 2e7)}
    for name, value in (("measured_ceiling", lambda device, kind: ceilings[kind]), ("decode_seconds", measured(0, 112)),
                        ("prefill_seconds", measured(2, 448)), ("TABLES", [])):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY | dict(max_position_embeddings=512))
    assert bench.main(["quantization", "--random", "tiny", "--device", "cpu"]) == 0
    speed, bound = bench.TABLES
    assert speed["header"] == ["", "weights MB", "KV bytes", "decode 1", "ratio", "decode 16", "ratio", "prefill 448", "ratio"]
    assert bound["header"] == ["", "decode 1", "%", "decode 16", "%", "prefill 448", "%"]
    numbers, outputs = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 99 * 32, 64 + 32 + 96 + 32 + 99
    expected, bounds = [], []
    for name, (one, many, prefill) in SPEEDS.items():
        bits, itemsize = name.startswith("int8") and name != "int8 KV", 2 if "bfloat16" in name else 4
        weights, kv = numbers + 4 * outputs if bits else numbers * itemsize, 2 * 2 * (8 + 4 if name.endswith("KV") else 8 * itemsize)
        expected.append([name, weights / 1e6, kv, 1000 / one, 8 / one, 16000 / many, 32 / many, 448000 / prefill, 64 / prefill])
        row, peak = [name], 4e9 if bits else {4: 1e9, 2: 2e9}[itemsize]
        for B, n, past, ms in ((1, 1, 112, one), (16, 1, 112, many), (1, 448, 0, prefill)):
            pairs = B * (n * past + n * (n + 1) // 2)
            flops = 2 * B * n * (numbers - 99 * 32) + 2 * B * 99 * 32 + 4 * 32 * pairs
            least = max(flops / peak, (weights + kv * B * (past + 2 * n)) / 3e7)   # the largest bandwidth is everybody's
            row += [B * n / least, least / ms * 1e5]
        bounds.append(row)
    assert speed["rows"] == [[row[0], *map(pytest.approx, row[1:])] for row in expected]
    assert bound["rows"] == [[row[0], *map(pytest.approx, row[1:])] for row in bounds]
    assert "the model is 4.00 times in decode 1, 2.00 times in decode 16, 2.00 times in prefill 448 as fast" in speed["note"]
    assert "Fp8 is widened" in speed["note"] and "come from a cache" not in bound["note"]


def test_what_is_lost_equals_its_definition():
    g = torch.Generator().manual_seed(1)
    exact, found, after = torch.randn(9, 5, generator=g), torch.randn(9, 5, generator=g), torch.randint(5, (9,), generator=g)
    p, q = (np.exp(x.double().numpy()) / np.exp(x.double().numpy()).sum(-1, keepdims=True) for x in (exact, found))
    kl = sum(p[t, v] * np.log(p[t, v] / q[t, v]) for t in range(9) for v in range(5))
    differ = sum(int(np.argmax(p[t]) != np.argmax(q[t])) for t in range(9))
    loss = -sum(np.log(q[t, after[t]]) for t in range(9))
    assert 0 < differ < 9 and bench.surprise(exact, found, after).tolist() == pytest.approx([kl, differ, loss])
    assert bench.surprise(exact, exact + 3, after).tolist()[:2] == pytest.approx([0, 0], abs=1e-6)


def test_losses_are_means_over_all_tokens_beside_float32(monkeypatch):
    """Two stories of 3 and 2 tokens; the stand-ins answer float32's logits times a factor of their own."""
    factors = dict(zip(bench.VARIANTS, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, -1.0)))
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    engines = {name: SimpleNamespace(logits=lambda ids, f=f: table[ids] * f, factor=f) for name, f in factors.items()}
    monkeypatch.setattr(bench, "TABLES", [])
    monkeypatch.setattr(bench, "consistent", lambda llm, temperature: abs(llm.factor) / (2 if temperature else 1))
    stories = [[0, 3, 1, 4], [2, 2, 0]]
    bench.show_losses(engines, stories, demo=True)
    bench.show_losses(engines, stories, demo=False)
    shown, alone = bench.TABLES
    sums = {name: sum(bench.surprise(table[s[:-1]], table[s[:-1]] * f, torch.tensor(s[1:])) for s in stories) / 5 for name, f in factors.items()}
    assert shown["header"] == ["", "KL, nats", "differ %", "loss", "more loss", "consistent %", "at 0.8, %"]
    for row, (name, f) in zip(shown["rows"], factors.items(), strict=True):
        kl, differ, loss = sums[name].tolist()
        assert row == [name, pytest.approx(kl), pytest.approx(differ * 100), f"{loss:.4f}", pytest.approx(loss - sums["float32"][2].item()),
                       pytest.approx(abs(f) * 100), pytest.approx(abs(f) * 50)]
    assert alone["header"] == shown["header"][:5] and [row[:5] for row in shown["rows"]] == alone["rows"]
    assert shown["rows"][0][1:3] == [0, 0] and shown["rows"][-1][2] == 100
    for name, what in (("int8", "Int8 weights"), ("int8 KV", "Int8 keys and values")):
        assert f"{what} move that distribution by {bench.show(sums[name][0].item())} nats" in shown["note"]


def test_a_story_counts_as_consistent_if_it_ends_and_nothing_is_wrong():
    teller = bench.storyteller()

    def generate(prompts, params):
        assert len(set(prompts)) == len(prompts) == 8 and [p.seed for p in params] == list(range(8)) and params[0].temperature == 0.8
        for i, prompt in enumerate(prompts):
            whole = next(story for story in map(teller.write_story, teller.HELD_OUT) if story.startswith(prompt))
            rest = whole[len(prompt):] if i else " The cat was a stone."   # one that is wrong, one that does not end
            yield SimpleNamespace(text=rest, finish_reason="length" if i == 1 else "stop")
    assert bench.consistent(SimpleNamespace(generate=generate), 0.8, 8) == 6 / 8


def test_quantization_measures_any_checkpoint_whose_tokenizer_writes_stories(tmp_path, monkeypatch, capsys):
    config = FAMILIES["llama 2"] | dict(vocab_size=1024, max_position_embeddings=512, eos_token_id=1023)
    write_checkpoint(tmp_path, config, tensors_of(config))
    (tmp_path / "tokenizer.json").write_bytes((HERE / "demo/llama/tokenizer.json").read_bytes())
    for name, value in (("TABLES", []), ("measured_ceiling", lambda device, kind: Ceiling(4e11, 3e10)),
                        ("decode_seconds", lambda llm, B, T: 1.0), ("prefill_seconds", lambda llm, B, T: 1.0)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench.storyteller(), "HELD_OUT", range(2))
    assert bench.main(["quantization", "--model", str(tmp_path), "--device", "cpu"]) == 0
    lost = cells(bench.TABLES[2])
    assert list(lost) == list(bench.VARIANTS) and all(lost[name]["KL, nats"] > 0 for name in lost if name != "float32")
    stories = [LLM(HERE / "demo/llama").tokenizer.encode(bench.storyteller().write_story(seed)) + [1023] for seed in range(2)]
    assert bench.TABLES[2]["title"] == f"What is lost, on 2 held-out stories, {sum(map(len, stories)) - 2} tokens"
    assert max(map(len, capsys.readouterr().out.splitlines()[2:])) <= 100
    tokenizer = LLM(HERE / "demo/llama").tokenizer
    for V, context, expected in ((1024, 512, stories), (1023, 512, []), (1024, 10, [])):
        stand_in = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(V=V, context=context, eos=[1023]))
        assert bench.stories_for(stand_in) == expected


@pytest.mark.parametrize("command", ["phases", "batch", "cache", "traffic --tokens 512", "serve", "disaggregate", "sampling", "quantization"])
def test_each_measurement_prints_a_narrow_table_and_writes_it_as_json(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(bench, "TABLES", [])
    monkeypatch.setattr(bench, "measured_ceiling", lambda device, dtype: Ceiling(4e11, 3e10))
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY | dict(max_position_embeddings=512))
    play = bench.play
    monkeypatch.setattr(bench, "play", lambda llm, requests, group=0: play(llm, requests[:10], group))   # so many fill a table
    assert bench.main([*command.split(), "--random", "tiny", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["command"][1] == command.split()[0] and record["machine"] and record["versions"]["torch"] == torch.__version__
    assert record["date"][:2] == "20" and record["tables"]
    for table in record["tables"]:
        header = next(line for line in lines if line.split() == " ".join(table["header"]).split())
        assert len(header) <= 100 and all(len(row) == len(table["header"]) for row in table["rows"])
        assert all(cell > 0 for row in table["rows"] for cell in row if not isinstance(cell, str))
    assert max(map(len, lines[1:])) <= 100


def test_cpu_holds_every_row_against_the_right_ceiling(monkeypatch, capsys):
    """With small shapes in the place of gpt2 and llama-135m, without transformers, and with times of 2 and 1 seconds."""
    for name, value in (("gpt2", bench.SHAPES["gpt2"] | dict(n_embd=32, n_layer=1, n_head=2, vocab_size=99)), ("llama-135m", TINY)):
        monkeypatch.setitem(bench.SHAPES, name, value)
    ceilings = {"float32": Ceiling(4e11, 3e10), "bfloat16": Ceiling(8e11, 2e10), "int8": Ceiling(9e11, 1e10)}
    for name, value in (
            ("TABLES", []), ("transformers", lambda: None), ("measured_ceiling", lambda device, dtype: ceilings[dtype]),
            ("in_turns", lambda measures, turns=5: [[measure() * 0 + seconds] * turns for measure, seconds in zip(measures, (2.0, 1.0))])):
        monkeypatch.setattr(bench, name, value)
    assert bench.main(["cpu"]) == 0
    speed, context = bench.TABLES
    rows = cells(speed)
    for (shape, dtype), itemsize in zip(itertools.product(("gpt2", "llama-135m"), ceilings), (4, 2, 4) * 2):
        c = config_of(shape)
        rate, reached, percent, *theirs = list(rows[f"{shape} {dtype}: prefill 512"].values())[1:]
        flops = step_cost(c, [(512, 0)], 1).flops / 2
        assert (rate, reached, percent) == (256, f"{flops / 1e9:.0f} GFLOP/s", pytest.approx(flops / ceilings[dtype].peak * 100))
        for B in (1, 16):   # less the second until the first tokens: 32 steps of 48 tokens, on average
            rate, reached, percent, *theirs = list(rows[f"{shape} {dtype}: decode, batch {B}"].values())[1:]
            moved = 32 * step_cost(c, [(1, 48)] * B, itemsize, eight_bits=dtype == "int8").bytes
            assert (rate, reached, percent) == (32 * B, f"{moved / 1e9:.0f} GB/s", pytest.approx(moved / 3e10 * 100)) and theirs == ["-", "-"]
    assert len(rows) == 22 and any(row.startswith("demo/llama") for row in rows)
    # More context took less time: a neighbour was at work. A ratio that nobody can believe is not printed.
    assert [(row[0], row[1], row[2], row[3], row[-1]) for row in context["rows"]] == [(d, 2000, 1000, -1000, "-") for d in ("float32", "bfloat16")]
    kv = 2 * 1 * 2 * 8
    assert [row[4] for row in context["rows"]] == [pytest.approx(3968 * kv * size / 3e10 * 1000) for size in (4, 2)]
    assert "A decode step of demo/llama takes" in capsys.readouterr().out


def test_speed_beside_another_system_is_theirs_over_ours_in_time(monkeypatch):
    llm = SimpleNamespace(config=config_of("llama-135m"), device=torch.device("cpu"), dtype="float32")
    monkeypatch.setattr(bench, "cost_of", lambda llm, chunks: step_cost(llm.config, chunks, 4))
    for case, lens, new, columns, expected in [
            ("prefill 512", [512], [1], [[2.0, 2, 9], [3.0, 3, 3]], [256, 171, 1.5]),
            ("32 mixed requests", [5, 9], [6, 10], [[2.0, 2, 9], [1.0, 1, 1]], [8, 16, 0.5]),
            ("decode, batch 1", [32], [33], [[5.0, 6, 70], [1.0, 2, 30], [9.0, 9, 9], [1.0, 1, 1]], [8, 4, 2.0]),
            ("decode, batch 1", [32], [33], [[5.0, 6, 7], [7.0, 8, 9], [9.0, 9, 9], [1.0, 1, 1]], ["-", 4, "-"])]:
        monkeypatch.setattr(bench, "in_turns", lambda measures, turns: columns)
        rate, reached, percent, theirs, ratio = bench.speeds(llm, [print] * 2, case, lens, new, Ceiling(1e12, 1e10))
        assert [rate, theirs, ratio] == expected, case
        assert (reached, percent) == ("-", "-") if rate == "-" or "mixed" in case else percent > 0


@pytest.mark.skipif(kernels.load_triton() is None or torch.cuda.is_available(), reason="no Triton here, or a GPU")
@pytest.mark.compiles("""
import bench, json
print(json.dumps([bench.kernels.load_triton().__version__, [list(map(str, row)) for row in bench.compiled_rows((90,))]]))""")
def test_compiled_kernels_are_those_in_the_results(compiled):
    """Compiled for one of the GPUs, as that takes a while; `python bench.py kernels` compiles for all."""
    version, rows = json.loads(compiled)
    _, recorded_versions, *recorded = (HERE / "results/kernels-compiled.txt").read_text().splitlines()
    if version == recorded_versions.split("Triton ")[1]:
        assert rows == [re.split(r"\s{2,}", line.strip()) for line in recorded if " sm_90 " in line]


@pytest.mark.skipif(kernels.load_triton() is None, reason="no Triton here")
def test_the_measurements_of_a_gpu_run_to_their_end(poisoned, monkeypatch, capsys):
    """Where there is none, with a stand-in for the clock and in the interpreter. What padding computes is nobody's, but
    it is finite: memory is poisoned, and a stand-in for a graph hands out the logits of padding."""
    def seconds(calls):
        for call in calls:
            call()
        return 1e-3
    if DEVICE == "cpu":
        monkeypatch.setattr(bench, "gpu_seconds", seconds)
        monkeypatch.setattr("batch.record", repeat)
    for name, value in (("TABLES", []), ("CACHE", 0)):
        monkeypatch.setattr(bench, name, value)
    device = torch.device(DEVICE)
    with monkeypatch.context() as patch:
        if DEVICE == "cpu":   # the interpreter serves one head size; test_kernels.py has them all
            triton = kernels.attention_triton
            patch.setattr(kernels, "attention_triton", lambda q, *more: (triton if q.shape[-1] == 64 else kernels.attention_naive)(q, *more))
        bench.check_kernels(device, [(1, 70), (5, 3)], (torch.float16,))
    assert "equal the float64 definition" in capsys.readouterr().out
    bench.time_prefill(device, torch.float16, (64, 96), 1e12, H=4, K=2, D=16)
    bench.time_decode(device, torch.float16, [(1, 400), (3, 200)], 1e8, H=4, K=2, D=16)
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    monkeypatch.setitem(bench.SHAPES, "huge", roofline.llama(99, 1 << 20, 1 << 20, 99, 4, 2))
    monkeypatch.setattr(bench, "SamplingParams", lambda max_tokens, **more: SamplingParams(max_tokens=40, **more))
    bench.time_texts(("tiny", "huge"), 1e9)
    prefill, decode, texts = bench.TABLES
    assert [row[0] for row in prefill["rows"]] == ["prefill 64", "prefill 96"]
    assert all(isinstance(row[3], float) and row[3] > 0 for row in prefill["rows"])
    assert [row[0] for row in decode["rows"]] == ["decode 1 x 400", "decode 3 x 200"]
    if DEVICE == "cpu":   # a millisecond for 2 K D T numbers of 2 bytes, which 0.1 GB/s would read in 0.512
        assert decode["rows"][0][1:] == ["1000 us", "0.00 TB/s", "51%"]
        assert prefill["rows"][0][1:3] == ["0 TFLOP/s", "0%"] and prefill["rows"][0][3] == 1.0
    bound = 1e9 / step_cost(config_of("tiny"), [(1, 300)], torch.empty(0, dtype=linear.DTYPES[texts["rows"][0][0].split()[1]]).itemsize).bytes
    assert texts["rows"][0][2] == f"{bound:.0f}" and int(texts["rows"][0][1]) > 0
    assert texts["rows"][1] == ["huge", "does not fit", "-", "-"]

    capsys.readouterr()
    small = dict(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    monkeypatch.setitem(bench.SHAPES, "deepseek-v3", bench.SHAPES["deepseek-v3"] | small)
    bench.check_latents(device, [(1, 40), (20, 0)], (torch.float16,), (1,))
    assert "Latent attention equals the float64 definition" in capsys.readouterr().out
    bench.TABLES.clear()
    bench.time_latents(device, torch.float16, [(1, 1, 100), (2, 2, 40)], 1e9, 1e12, H=1)
    (latents,) = bench.TABLES
    assert [row[0] for row in latents["rows"]] == ["1 x 1 of 100", "2 x 2 of 40"]
    if DEVICE == "cpu":   # in a millisecond, 100 x 48 x 2 bytes of a GB/s
        assert latents["rows"][0][1:4] == ["1000 us", "0.00 TB/s", "1%"]

    capsys.readouterr()
    bench.check_products(device, [(1, 20, 300), (17, 70, 40), (40, 16, 130)])
    assert "All 8-bit products equal those of float64" in capsys.readouterr().out
    bench.TABLES.clear()
    with monkeypatch.context() as patch:
        if DEVICE == "cpu":   # of 512 rows, the interpreter multiplies 40
            triton_product = linear.linear_triton
            patch.setattr(linear, "linear_triton", lambda x, part: triton_product(x[:40], part))
        bench.time_products(device, [(64, 256)], 1e9, 1e12)
    few, many = bench.TABLES
    kinds = ("int8", "fp8", "fp8 blocks")
    assert [row[0] for row in few["rows"]] == [f"{kind}, {T} x 256 x 64" for T in (1, 16) for kind in kinds]
    assert [row[0] for row in many["rows"]] == [f"{kind}, 512 x 256 x 64" for kind in kinds]
    assert all(row[-1] > 0 for row in few["rows"] + many["rows"])
    if DEVICE == "cpu":   # 16 KB, which a GB/s reads in 16 us, in a millisecond
        assert few["rows"][0][1:] == ["1000.0 us", "16.4 us", "2%", 1.0] and many["rows"][0][3:] == [1.0, 1.0]
    with monkeypatch.context() as patch:
        patch.setattr(bench.linear, "linear_triton", lambda x, part: torch.zeros(len(x), len(part.weight), device=device))
        with pytest.raises(SystemExit, match="int8, 3 x 9 x 5: the largest error"):
            bench.check_products(device, [(3, 5, 9)])

    llm = LLM(config_of("tiny"), attention="triton", dtype="float32", cuda_graphs=True)
    if DEVICE == "cpu":   # as a graph does, without Python's model: 5 seconds
        hands = stand_in_clock(monkeypatch)
        monkeypatch.setattr("batch.record", lambda step: (partial(hands.tick, 5), step()))
        monkeypatch.setattr(nanoserve, "choose", taking(nanoserve.choose, hands, 1))
    step, inside, choosing = bench.loop_seconds(llm, 1, 30)
    assert 0 < choosing < step and 0 < inside < step
    assert DEVICE == "cuda" or (step, inside, choosing) == (6, 5, 1), "the model is timed inside a graph, too"

    monkeypatch.setattr(kernels, "attention_triton", lambda q, k, v, batch, *more: kernels.attention_naive(q, k, v, batch, *more) + 0.01)
    with pytest.raises(SystemExit, match="torch.float16, D=64, 32:8 heads, blocks of 64, window None: the largest error"):
        bench.check_kernels(device, [(3, 0)], (torch.float16,))


def test_static_batches_wait_for_their_longest_and_continuous_ones_do_not(lone):
    folder, prompts, expected = lone["llama"]
    requests = [(0.0, prompts[i % 2], n) for i, n in enumerate([3, 9, 2, 5, 4])]
    for group in (0, 2):
        llm, steps = LLM(folder, max_seqs=2, device="cpu"), []
        step = llm.step

        def watched():
            outs = step()
            steps.append([out.id for out in outs])
            return outs
        llm.step = watched
        seen = bench.play(llm, requests, group)
        assert len(seen["ttft"]) == 5 and len(seen["gap"]) == 3 + 9 + 2 + 5 + 4 - 5 and max(map(len, steps)) == 2
        assert len(steps) == (9 + 5 + 4 if group else 9 + 4)   # the fifth request takes the place of the second


@pytest.mark.parametrize("arguments, words", [
    (["--model", "/nowhere"], "/nowhere"), (["frobnicate"], "frobnicate"), (["--random", "gpt9"], "gpt9"),
    (["--json", "/nowhere/file"], "/nowhere/file"), (["traffic", "--tokens", "0"], "--tokens"), (["--dtype", "int3"], "int3"),
    (["--device", "abacus"], "abacus"), (["estimate", "--plot", "/nowhere/file"], "cannot be drawn|matplotlib"),
    (["traffic", "--tokens", "9000000", "--head-dim", "8"], "out of memory"), (["traffic", "--dtype", "int8"], "int8")])
def test_bench_refuses_bad_input_in_one_sentence(capsys, arguments, words):
    code = exit_code(bench.main, arguments)
    out, err = capsys.readouterr()
    assert code == 2 and re.search(words, err) and err.count("\n") == 1 and "Traceback" not in err, err


# ---------------------------------------------------------------------------------------------
# What one sees of the loop

def test_timeline_shows_what_happened_in_every_step(lone):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, block_size=4, num_blocks=40, max_batched_tokens=8)
    timeline = watch.Timeline(llm)
    llm.generate([prompts[3], prompts[3], prompts[0]], SamplingParams(max_tokens=3, ignore_eos=True))
    drawn = [re.sub("·+", "·", re.sub("━+", "━", line)).split() for line in timeline.text(100).split("\n")]
    assert drawn[0][1:] == ["1", "2", "3", "4", "5", "6"]
    text = " ".join(map(str, prompts[3]))[:16].split()   # 23 tokens: chunks of 8, 8 and 7; the rest of the budget goes on
    assert drawn[1] == ["0", *text, "8", "8", "7", "━", "■"]
    assert drawn[2] == ["1", *text, "·", "·", "20+1", "2", "━", "■"], "5 full blocks of the first's are found"
    assert drawn[3] == ["2", "55", "·", "·", "·", "1", "━", "■"]
    assert drawn[4:7] == [["blocks", "in", "use", "6", "6", "7", "8", "9", "8"], ["cached", "0", "0", "0", "0", "0", "1"],
                          ["free", "34", "34", "33", "32", "31", "31"]]


@pytest.mark.parametrize("who", [None, "ngram"])
def test_timeline_fits_the_terminal_and_loses_no_step(lone, who):
    folder, prompts, _ = lone["llama"]
    llm = LLM(folder, block_size=4, num_blocks=22, max_batched_tokens=12, speculative_model=who)
    if who:
        llm.speculator.worthwhile = lambda requests, offers, rows: list(offers)
    timeline = watch.Timeline(llm)
    for i, n in [(4, 1), (4, 3), (0, 1), (7, 1), (2, 1)]:
        llm.add(prompts[i], SamplingParams(max_tokens=12, ignore_eos=True, n=n))
    while llm.requests:
        llm.scheduler.usage = 0.0
        if llm.steps == 9:
            llm.abort(llm.scheduler.running[0].output.id)
        llm.step()
    stats = llm.stats()
    cells = [cell for row in timeline.rows.values() for cell in row.values()]
    assert stats["preemptions"] and stats["preemptions"] == sum(cell.kind == "preempted" for cell in cells)
    assert stats["computed_tokens"] == sum(cell.tokens for cell in cells) and stats["steps"] == len(timeline.pool)
    forked = sum(r.output.reused_tokens for r in timeline.rows if r.output.samples[0] is not r.output)
    assert stats["reused_tokens"] - forked == sum(cell.found for cell in cells)
    for width in (40, 80, 1000):
        chart = timeline.text(width)
        lines = chart.split("\n")
        assert max(map(len, lines)) <= width and (chart.count("blocks in use") == 1) == (width == 1000)
        spans = [span.split("-") for line in lines if line.startswith("step") for span in line.split()[1:]]
        assert [n for span in spans for n in range(int(span[0]), int(span[-1]) + 1)] == list(range(1, len(timeline.pool) + 1))
    picture = ElementTree.fromstring(timeline.svg())
    titles = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    for kind in ("waiting", "preempted", "prefill", "decode") + ("verification",) * bool(who):
        assert sum(f": {kind}" in title for title in titles) >= sum(cell.kind == kind for cell in cells) > 0
    assert sum("in use" in title for title in titles) == 3 * len(timeline.pool)


def watched_drafts(monkeypatch, who, prompts, params, **options):
    """demo/llama with everything that is offered as a draft: timeline, explanation, outputs, and of each step for each
    request (id, start, drafts, how many of them are what a lone run without drafts says)."""
    monkeypatch.setattr(watch, "measured_ceiling", lambda device, dtype: Ceiling(5e11, 2e10))
    llm = LLM(HERE / "demo/llama", dtype="float32", device="cpu", speculative_model=who, **options)
    llm.speculator.worthwhile = lambda requests, offers, rows: list(offers)
    plain = LLM(HERE / "demo/llama", dtype="float32", device="cpu")
    texts = [plain.tokenizer.encode(prompt) + plain.generate([prompt], params)[0].token_ids for prompt in prompts]
    timeline, explanation, steps = watch.Timeline(llm), watch.Explanation(llm), []

    def note(plan, takers, tokens, logits_BV):
        found = {}
        for request, chunk in plan:
            after, drafts = texts[request.output.id][chunk.start + 1:], chunk.tokens[1:] if chunk.logits > 1 else []
            right = sum(all(a == b for a, b in itertools.zip_longest(drafts[:n], after[:n])) for n in range(1, len(drafts) + 1))
            found[request.output.id] = chunk.start, drafts, right, after
        steps.append(found)
    llm.watchers.append(note)
    outs = llm.generate(prompts, params)
    assert [plain.tokenizer.encode(p) + o.token_ids for p, o in zip(prompts, outs)] == texts
    return llm, timeline, explanation, outs, steps


DRAFTERS = pytest.mark.parametrize("who, most", [("ngram", 4), (HERE / "demo/gpt2", 4), (HERE / "demo/gpt2", 1)], ids=["ngram", "gpt2", "gpt2, one"])


@DRAFTERS
def test_timeline_shows_how_many_drafts_were_accepted_and_refused(monkeypatch, who, most):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    llm, timeline, _, outs, steps = watched_drafts(monkeypatch, who, ["The cat sat", "One day, Tom"], params, num_speculative_tokens=most)
    boxes = [(rect[0].text, rect.get("fill"), float(rect.get("height")))
             for rect in ElementTree.fromstring(timeline.svg()).iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    head, *rows = [re.split("  +", line) for line in timeline.text(10 ** 4).split("\n")[:3]]
    ends = [[int(n) for n in span.split("-")] for span in head[1:]]
    columns = [column for column, span in enumerate(ends, 1) for _ in range(span[0], span[-1] + 1)]   # of each step
    expected = Counter()
    for out in outs:
        signs, mine = [], [(step, found[out.id]) for step, found in enumerate(steps, 1) if out.id in found]
        for step, (start, drafts, right, after) in mine:
            if drafts:   # the part that was refused has a box of its own
                told = f"step {step}: verification {len(drafts) + 1}, {len(drafts)} guessed, {right} accepted, {len(drafts) - right} refused"
                expected[told, "#9467bd", 16.0] += 1
                expected[told, "#dddddd", round(16 * (1 - right / len(drafts)), 1)] += right < len(drafts)
            signs.append(f"+{right}-{len(drafts) - right}" if drafts else "━" if start else str(out.prompt_tokens))
        signs[-1] = signs[-1].removesuffix("━") + "■"
        assert [re.sub("━+", "━", rows[out.id][columns[step - 1]]) for step, _ in mine] == signs
        assert sum(right + 1 for _, (_, _, right, _) in mine) == len(out.token_ids) == 60
        assert sum(right for _, (_, _, right, _) in mine) == out.accepted_tokens
    assert Counter(box for box in boxes if box[0] and "guessed" in box[0]) == +expected
    kinds = [cell.kind for row in timeline.rows.values() for cell in row.values()]
    assert sum(out.accepted_tokens for out in outs) > 3 and kinds.count("prefill") == 2 and not any(cell.found for row in timeline.rows.values() for cell in row.values())
    assert "+3-1 3 drafts accepted, 1 refused" in " ".join(timeline.text(100).split()) and ">accepted; above: refused<" in timeline.svg()


def test_timeline_of_an_engine_without_drafts_does_not_speak_of_them():
    llm = LLM(HERE / "demo/llama", dtype="float32", device="cpu")
    timeline = watch.Timeline(llm)
    llm.generate(["The cat sat"], SamplingParams(max_tokens=9))
    assert "refused" not in timeline.text(100) + timeline.svg() and "#9467bd" not in timeline.svg()


@DRAFTERS
def test_explanation_says_what_was_guessed_accepted_refused_and_taken(monkeypatch, who, most):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    llm, _, explanation, _, steps = watched_drafts(monkeypatch, who, ["The cat sat", "One day, Tom"], params, block_size=32,
                                                  num_speculative_tokens=most)
    lines = []
    explanation.show(lines.append)
    assert max(map(len, "\n".join(lines).split("\n"))) <= 110
    text = re.sub(r"\n {6,}", " ", "\n".join(lines))
    told = dict(re.findall(r"^step (\S+): (.*(?:\n  .*)*)", text, re.M))

    def ids(spelt):
        return [int(word) for word in re.findall(r"(?:^|, )(\d+) ['\"]", spelt or "")]
    for step, found in enumerate(steps, 1):
        verified = {i: seen for i, seen in found.items() if seen[1]}
        if not verified:
            continue
        heading, *_ = told[str(step)].split("\n")
        parts = [f"{len(verified)} verification"] + [f"{len(found) - len(verified)} decode"] * (len(found) > len(verified))
        assert heading == " and ".join(parts)
        said = re.findall(r"^  drafts     request (\d+) guessed \[(.*?)\]: (accepted all|refused all|accepted \[(.*)\], refused \[(.*)\]), "
                          r"took \[(.*?)\] (behind them|instead)$", told[str(step)], re.M)
        assert {int(i) for i, *_ in said} == verified.keys() and len(said) == len(verified)
        for i, guessed, became, accepted, refused, took, how in said:
            start, drafts, right, after = verified[int(i)]
            assert ids(guessed) == drafts and (ids(took) == after[right:right + 1] or not after[right:])
            assert (how == "behind them") == (right == len(drafts)) == (became == "accepted all") and (became == "refused all") == (not right)
            assert (ids(accepted), ids(refused)) == ((drafts[:right], drafts[right:]) if 0 < right < len(drafts) else ([], []))
            assert f"request {i}, position {start}-{start + len(drafts)}: " in told[str(step)]
        assert told[str(step)].count("\n  next  ") == sum(1 + right for _, _, right, _ in found.values())
        cost = step_cost(llm.config, [(1 + len(drafts), start) for start, drafts, *_ in found.values()], 4,
                         sum(1 + len(drafts) for _, drafts, *_ in found.values()))
        assert f"cost       {cost.flops / 1e6:.1f} MFLOP / {cost.bytes / 1e6:.2f} MB = " in told[str(step)]
    repeated = [list(map(int, span.split("-"))) for span, what in told.items() if what == "decodes like the one before"]
    quiet = {step for step, found in enumerate(steps, 1) if not any(drafts for _, drafts, *_ in found.values())}
    assert bool(repeated) == (who == "ngram") and all(set(range(first, last + 1)) <= quiet for first, last in ([*span, *span][:2] for span in repeated))


def test_timeline_holds_any_prompt():
    llm = LLM(HERE / "demo/llama", dtype="float32")
    timeline = watch.Timeline(llm)
    llm.generate(["日本語の猫はここに座った", "a\x1b[31m\x00 <b>&", "cafe\u0301 \u0301e"], SamplingParams(max_tokens=2, ignore_eos=True, n=2))
    head, *rows = timeline.text(99).split("\n")[:7]
    assert len({watch.columns(row) for row in [*rows, head]}) == 1 and "\x1b" not in "".join(rows)
    ElementTree.fromstring(timeline.svg())


def test_timeline_from_the_command_line(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat sat\nOne day, Tom\n")
    demo = ["--prompts-file", str(prompts), "--max-tokens", "9"]
    assert cli.main([*demo, "--timeline"]) == 0
    text, chart = capsys.readouterr().out.split("\n\n", 1)
    assert "━" not in text and re.search(r"^0 The cat sat +3 +━+ +■$", chart, re.M) and "preempted" in chart
    assert cli.main([*demo, "--timeline", str(tmp_path / "chart.svg"), "--json", "--n", "2", "--logprobs", "1"]) == 0
    texts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [t["prompt"] for t in texts] == ["The cat sat"] * 2 + ["One day, Tom"] * 2
    assert all({"computed_tokens", "reused_tokens"} < t.keys() and len(t["logprobs"]) == 9 for t in texts)
    assert [t["computed_tokens"] + t["reused_tokens"] for t in texts] == [3 + 8] * 2 + [texts[2]["prompt_tokens"] + 8] * 2
    ElementTree.parse(tmp_path / "chart.svg")
    assert exit_code(cli.main, [*demo, "--timeline", "chart.png"]) == 2
    assert exit_code(cli.main, [*demo, "--timeline", str(tmp_path / "no/chart.svg")]) == 2
    assert "no/chart.svg cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["torch"] + (["triton"] if kernels.load_triton() and kernels.INTERPRETED else []))
def test_explanation_gives_the_tokens_slots_cost_and_choice_of_each_step(monkeypatch, backend):
    monkeypatch.setattr(watch, "measured_ceiling", lambda device, dtype: Ceiling(5e11, 2e10))
    llm = LLM(HERE / "demo/llama", dtype="float32", attention=backend, block_size=4, device="cpu")
    explanation, lines = watch.Explanation(llm), []
    (out,) = llm.generate(["The cat sat"], SamplingParams(max_tokens=8))
    explanation.show(lines.append)
    text = re.sub(r"\n {6,}", " ", "\n".join(lines))
    ids = llm.tokenizer.encode("The cat sat")
    assert re.findall(r"^step (\S+): (.*)$", text, re.M) == [
        ("1", "1 prefill"), ("2", "1 decode"), ("3", "1 decode"), ("4-6", "decodes like the one before"), ("7", "1 decode"), ("8", "1 decode")]
    told = [1, 2, 3, 7, 8]   # the first token at position 4 and 8 takes a block
    tokens = re.findall(r"^  tokens +request 0, position (\S+): (.*)$", text, re.M)
    assert tokens[0] == ("0-2", f"[{ids[0]} 'The', {ids[1]} ' cat', {ids[2]} ' sat']")
    assert [int(where) for where, _ in tokens[1:]] == [step + 1 for step in told[1:]]
    assert [int(what[1:].split()[0]) for _, what in tokens[1:]] == [out.token_ids[step - 2] for step in told[1:]]
    slots = [list(map(int, slot)) for slot in re.findall(r"slot (\d+) \(block (\d+) x 4 \+ (\d)\)", text)]
    assert [slot for slot, *_ in slots] == [0, 2] + [step + 1 for step in told[1:]], "a pool all to itself: blocks 0, 1, 2"
    assert all(slot == block * 4 + offset for slot, block, offset in slots)
    logits = llm.logits(ids + out.token_ids[:-1])[len(ids) - 1:]
    for step, line in zip(told, re.findall(r"^  next +(.*)$", text, re.M)):
        probabilities = logits[step - 1].softmax(-1)
        for i, p in re.findall(r"\[(\d+) [^]]*\] ([\d.]+)%", line):
            assert abs(probabilities[int(i)].item() * 100 - float(p)) < 0.1
        assert int(re.search(r"-> \[(\d+) ", line)[1]) == out.token_ids[step - 1]
    for step, line in zip(told, re.findall(r"^  cost +(.*)$", text, re.M)):
        cost = step_cost(llm.config, [(3, 0) if step == 1 else (1, step + 1)], 4)
        assert line.startswith(f"{cost.flops / 1e6:.1f} MFLOP / {cost.bytes / 1e6:.2f} MB = ") and "below the machine's 25: memory-bound" in line
        assert f"{cost.bytes / 2e10 * 1e3:.2f} ms" in line
    words = {"torch": ["1 short chunk of 3 tokens, which reads the keys as a decode does, 2 KV heads, 3 x 3 query rows each",
                       "1 decode, 2 KV heads, 3 query rows each", "in place"],
             "triton": ["1 splits of keys for 1 requests, to fill 4 multiprocessors, x 2 KV heads; each runs its 3 query heads against tiles of 32 keys",
                        "each runs the 3 query heads of its tokens, 3 at most, against tiles of 32 keys"]}
    assert all(word in text for word in words[backend]) and max(map(len, "\n".join(lines).split("\n"))) <= 110


@pytest.mark.parametrize("backend, full, window", [
    ("torch", "1 decode, 2 KV heads, 2 query rows each; 41 keys", "1 decode, 2 KV heads, 2 query rows each; 5 keys"),
    *[("triton", "decode kernel: 2 splits of keys", "decode kernel: 1 splits of keys")] * bool(kernels.load_triton() and kernels.INTERPRETED),
    ("naive", "naive: a product", "naive: a product")])
def test_explanation_describes_each_window_and_how_a_token_was_chosen(tmp_path, monkeypatch, backend, full, window):
    """One layer sees all keys, the other one 5."""
    monkeypatch.setattr(watch, "measured_ceiling", lambda device, dtype: Ceiling(5e11, 2e10))
    for name in ("qwen2 with windows", "mistral"):
        folder = write_checkpoint(tmp_path / name, FAMILIES[name], tensors_of(FAMILIES[name]))
        llm, lines = LLM(folder, dtype="float32", attention=backend, block_size=4, device="cpu"), []
        explanation = watch.Explanation(llm)
        llm.generate([list(range(40))] * 2, [SamplingParams(max_tokens=2, temperature=0.8, seed=1), SamplingParams(max_tokens=1)])
        explanation.show(lines.append)
        first, second = re.sub(r"\n {6,}", " ", "\n".join(lines)).split("step 2")
        assert re.findall(r"-> .*, (.*)$", first, re.M) == ["drawn at temperature 0.8", "greedy"]
        attention = re.findall(r"^  attention +(.*)$", second, re.M)
        if name == "mistral":   # one window in all layers
            assert len(attention) == 1 and "layers" not in attention[0]
            continue
        whole, part = attention
        assert whole.startswith("layers [0], which see all keys: ") and full in whole
        assert part.startswith("layers [1], which see 5 keys back: ") and window in part


def test_explanation_counts_the_head_where_somebody_wants_logits(monkeypatch):
    """A prompt of three tokens in chunks of two and one: only the second reaches the head."""
    monkeypatch.setattr(watch, "measured_ceiling", lambda device, dtype: Ceiling(5e11, 2e10))
    llm, lines = LLM(HERE / "demo/llama", dtype="float32", device="cpu", max_batched_tokens=2), []
    explanation = watch.Explanation(llm)
    llm.generate(["The cat sat"], SamplingParams(max_tokens=1))
    explanation.show(lines.append)
    first, second = step_cost(llm.config, [(2, 0)], 4, 0), step_cost(llm.config, [(1, 2)], 4, 1)
    assert re.findall(r"cost +(.*?) =", "\n".join(lines)) == [f"{c.flops / 1e6:.1f} MFLOP / {c.bytes / 1e6:.2f} MB" for c in (first, second)]
