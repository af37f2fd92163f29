"""What a step must cost: operations, bytes, and the two limits of a machine. (Read nanoserve.py first.)

A step does operations and moves bytes. It takes at least operations / peak seconds and at least bytes / bandwidth
seconds, whichever is longer: that is the roofline (Williams et al. 2009). Two numbers of the same kind say who waits
for whom. A step's arithmetic intensity is its operations per byte. A machine's balance is its peak / bandwidth, the
operations that it does in the time in which a byte arrives. A step with less intensity than the balance is bound by
memory, one with more is bound by compute:

    operations per second
      peak |          ____________
           |        /                  left of the balance operations wait for bytes: bandwidth x intensity
           |      /                    right of it bytes wait for operations: peak
           |    /
           +----------+-----------     operations per byte
                   balance

"The cat sat" on demo/llama in float32: its prefill does 12.2 MFLOP on 8.67 MB, 1.4 operations per byte, and a decode
step after it 4.3 MFLOP on 8.66 MB, 0.5. Both are below the balance of any machine: for three tokens and for one,
what takes time is reading the weights. A prompt of 512 tokens does 223 operations per byte. So a prompt is bound by
compute and a decode by memory, a batch of decodes shares one reading of the weights and costs little more than one
alone, and `crossover` says up to which batch.

`measured_ceiling` measures the limits of this machine. Those of HARDWARE, machines that are not here, come from their
makers' data sheets. `bench.py` measures how near to its limits a step comes, and `--explain` says it of every
step.
"""

from __future__ import annotations

import json
import math
import platform
import re
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from config import Config, Experts, kv_bytes, read_config
from latent import widening_pays
from linear import DTYPES, QUANTIZATIONS, Part, linear, pack, quantize


# ---------------------------------------------------------------------------------------------
# A step

class Cost(NamedTuple):
    flops: float
    bytes: float


def step_cost(c: Config, chunks: list[tuple[int, int]], itemsize: int, logits: int | None = None,
              kv_cache_dtype: str = "auto", eight_bits: bool = False) -> Cost:
    """Operations and bytes of one step for requests of (new, past) tokens, of whom `logits` (None: all) want logits.
    eight_bits: each of the weights is a byte, while activations have `itemsize`.

    Operations: two per weight of a layer and new token; two per weight of the head and request; those of
    `attention_flops`. Norms, RoPE and softmax are left out: they are a few per mille. Bytes: each of these weights
    once, for all requests together; K and V of the past once, and those of new tokens written and read. Activations
    stay in caches. (Pope et al. 2022, section 2.) A new token computes with its own experts; the bytes are those of all
    that are `touched`.
    """
    weights, head, logits = layer_weights(c), c.V * c.E, len(chunks) if logits is None else logits
    new, attention, rows = sum(n for n, _ in chunks), 0, 0   # rows: of K and V of all heads
    for window in c.windows:   # a query sees itself and window - 1 tokens before it
        attention += sum(attention_flops(c, n, past, window) for n, past in chunks)
        rows += sum(min(past, (window or c.context) - 1) for _, past in chunks) + 2 * new
    return Cost(2 * new * weights + 2 * logits * head + attention,
                weight_bytes(c, itemsize, eight_bits, bool(logits), new)
                + kv_bytes(c, itemsize, kv_cache_dtype) // c.L * rows)


def attention_flops(c: Config, n: int, past: int, window: int | None = None) -> int:
    """Operations of a layer's attention for a chunk of n tokens: four per head dimension and pair of a query and a key
    that it sees (q.k and the weighted sum of v); for latents as latent.py counts them."""
    pairs = sum(min(past + i + 1, window) for i in range(n)) if window else n * past + n * (n + 1) // 2
    if not (m := c.latent):
        return 4 * c.H * c.D * pairs
    if widening_pays(n, past, m):
        return 2 * c.H * ((m.plain + m.rotary + m.value) * pairs + m.rank * (m.plain + m.value) * past)
    return 2 * c.H * (2 * m.rank + m.rotary) * pairs


def in_8_bits(llm) -> bool:
    """Whether what an engine multiplies by is in memory so; on a CPU, FP8 is not."""
    return llm.model.weights["out"][0].scale is not None


def cost_of(llm, chunks: list[tuple[int, int]], logits: int | None = None) -> Cost:
    """`step_cost` with the types of an engine's weights, keys and values."""
    return step_cost(llm.config, chunks, DTYPES[llm.dtype].itemsize, logits, llm.kv_cache_dtype, in_8_bits(llm))


def touched(e: Experts, tokens: int) -> float:
    """How many of a layer's X experts a step of so many tokens reads: X (1 - (1 - C/X)^tokens), the expected number if
    each token chooses C of them at random. A token misses an expert with probability 1 - C/X, and it is not read if all
    of them do. A router that prefers some experts touches fewer."""
    return e.X * (1 - (1 - e.C / e.X) ** tokens)


def attention_weights(c: Config) -> tuple[int, int, int]:
    """Of a layer's attention: the weights of its products, their rows, and the weights that are never in 8 bits, those
    that widen latents."""
    if not (m := c.latent):
        return c.E * (c.H + 2 * c.K) * c.D + c.H * c.D * c.E, (c.H + 2 * c.K) * c.D + c.E, 0
    queries, q, widen = c.H * (m.plain + m.rotary), m.q_rank or 0, c.H * (m.plain + m.value) * m.rank
    down = q + c.D if q else queries + c.D   # what the first product gives
    return c.E * down + queries * q + widen + c.H * m.value * c.E, down + queries * (q > 0) + c.E, widen


def mlp_weights(c: Config, experts: float | None = None) -> tuple[float, float, int]:
    """Of the MLPs of all layers: the weights of their products, the rows of these, and the weights of routers, which
    are never in 8 bits. Of a layer's experts count those that a token chooses, or as many as `experts` says."""
    e, ups = c.experts, 1 if c.family == "gpt2" else 2   # Llama has a gate as well
    sparse = len(e.layers) if e else 0
    weights, rows = (c.L - sparse) * (ups + 1) * c.I * c.E, (c.L - sparse) * (ups * c.I + c.E)
    if not e:
        return weights, rows, 0
    count = e.C if experts is None else experts
    hidden, downs = count * e.I + e.shared, count + (e.shared > 0)
    return (weights + sparse * (ups + 1) * hidden * c.E, rows + sparse * (ups * hidden + downs * c.E),
            sparse * e.X * c.E)


def layer_weights(c: Config, experts: float | None = None) -> float:
    """Weights of all layers that take part in products: q, k, v and out; up and down, and Llama's gate; routers.
    experts: as for `mlp_weights`."""
    weights, _, routers = mlp_weights(c, experts)
    return c.L * attention_weights(c)[0] + weights + routers


def weight_bytes(c: Config, itemsize: int, eight_bits: bool = False, head: bool = True,
                 tokens: int | None = None) -> float:
    """Bytes of the weights that take part in products; in 8 bits with a scale of 4 bytes per row. The embedding, of
    which a token reads a row, and the norms do not count. Of experts count those that a step of so many tokens touches;
    None: all."""
    experts = None if not c.experts else c.experts.X if tokens is None else touched(c.experts, tokens)
    numbers, (_, rows, routers) = layer_weights(c, experts) + c.V * c.E * head, mlp_weights(c, experts)
    _, outputs, widen = attention_weights(c)
    rows, floats = rows + c.L * outputs + c.V * head, routers + c.L * widen
    return numbers - floats + 4 * rows + floats * itemsize if eight_bits else numbers * itemsize


# ---------------------------------------------------------------------------------------------
# A machine

class Ceiling(NamedTuple):
    """A machine: operations per second in one dtype, bytes per second read from memory."""
    peak: float
    bandwidth: float

    @property
    def balance(self) -> float:
        """Operations that it does while a byte arrives."""
        return self.peak / self.bandwidth

    def seconds(self, cost: Cost) -> float:
        """The least time in which a step can be done."""
        return max(cost.flops / self.peak, cost.bytes / self.bandwidth)

    def verdict(self, cost: Cost) -> str:
        return "compute" if cost.flops / cost.bytes > self.balance else "memory"


HARDWARE = {   # the makers' data sheets: dense operations per second in bfloat16 (m3-max: float16), bytes per second
    "a100": Ceiling(312e12, 2.039e12), "h100": Ceiling(989e12, 3.35e12), "h200": Ceiling(989e12, 4.8e12),
    "rtx-4090": Ceiling(165e12, 1.008e12), "m3-max": Ceiling(28e12, 0.4e12)}

LINKS = {"NVLink": 450e9, "Ethernet": 50e9}   # bytes per second one way: an H100's, and a card's of 400 Gbit


def handing_over(c: Config, m: Ceiling, lengths: tuple[int, ...], itemsize: int = 2) -> list[list]:
    """Whether a prompt may be computed on another machine (distributed.py): for each length MB of K and V, least ms
    of its prefill, ms on each of LINKS, and these in % of the prefill."""
    rows = []
    for T in lengths:
        size, compute = T * kv_bytes(c, itemsize), m.seconds(step_cost(c, [(T, 0)], itemsize))
        times = [(size / speed * 1e3, size / speed / compute * 100) for speed in LINKS.values()]
        rows.append([T, size / 1e6, compute * 1e3, *(number for pair in times for number in pair)])
    return rows


def crossover(c: Config, ceiling: Ceiling, context: int, itemsize: int) -> str:
    """From which batch on a decode step has more operations than the machine does while its bytes arrive."""
    one, two = (step_cost(c, [(1, context)] * B, itemsize) for B in (1, 2))
    flops, each = two.flops - one.flops, two.bytes - one.bytes        # per request
    balance = ceiling.balance
    if c.experts:   # a larger batch touches more of them, until it touches all
        each -= weight_bytes(c, itemsize, tokens=2) - weight_bytes(c, itemsize, tokens=1)
    if flops <= balance * each:
        return (f"compute-bound at no batch, as a request brings {flops / each:.0f} operations per byte of its K and V "
                f"and the machine's balance is {balance:.0f}")
    if c.experts:
        def enough(B: int) -> bool:
            return B * (flops - balance * each) >= balance * weight_bytes(c, itemsize, tokens=B)
        return f"compute-bound at batch {bisect_left(range(1 << 31), True, lo=1, key=enough)}"
    # At batch B: B flops operations, and the weights and B each bytes, of which one.bytes has the weights and one each.
    return f"compute-bound at batch {balance * (one.bytes - each) / (flops - balance * each):.0f}"


def on_paper(c: Config, m: Ceiling, name: str, T: int) -> list[list[str]]:
    """What a model in a 2-byte dtype must cost on the machine of this name with T tokens of context: rows of what it
    is, its formula with the numbers in it, and its value."""
    weights, kv, G = layer_weights(c), kv_bytes(c, 2), 1e9
    P, decode, prefill = weights + c.V * c.E, step_cost(c, [(1, T)], 2), step_cost(c, [(T, 0)], 2)
    tps, ttft = 1 / m.seconds(decode), m.seconds(prefill)
    met, size, per_token = f"{P / G:.2f} G", f"{2 * P / G:.2f} GB", f"{kv / 1024:.0f} KiB"   # for later rows
    read, ops, prompt = f"{decode.bytes / G:.2f}", f"{decode.flops / G:.1f}", f"{prefill.flops / 1e12:.2f} TFLOP"
    peak, memory = f"{m.peak / 1e12:.1f} TFLOP/s", f"{m.bandwidth / 1e12:.3f} TB/s"
    step, wait, speed = f"{1e3 / tps:.2f} ms", f"{ttft * 1e3:.1f} ms", f"{T / ttft:,.0f}"
    rows = []
    if e := c.experts:
        held = layer_weights(c, e.X) + c.V * c.E
        rows = [["weights in memory", f"with all {e.X} experts of {len(e.layers)} layers; 2 bytes each: "
                 f"{2 * held / G:.1f} GB", f"{held / G:.2f} G"]]
    if a := c.latent:   # all letters but these are those of the shape suffixes
        letters, sizes = f"Z = {a.rank}, U = {a.plain}, P = {a.rotary}, W = {a.value}", a.plain + a.rotary + a.value
        pair, prompt_pair = "2 L H (2 Z + P)", "L H (U + P + W)"
        keys = [["latents per token", f"L (Z + P) x 2 = {c.L} x {c.D} x 2; {letters}", per_token],
                ["K and V of all heads instead", f"L H (U + P + W) x 2 = {c.L} x {c.H} x {sizes} x 2",
                 f"{c.L * c.H * sizes / 512:.0f} KiB"]]
    else:
        pair, prompt_pair = "4 L H D", "2 L H D"
        keys = [["K and V per token", f"2 x L K D x 2 = 2 x {c.L} x {c.K} x {c.D} x 2", per_token],
                ["the same without GQA", f"2 x L H D x 2 = 2 x {c.L} x {c.H} x {c.D} x 2",
                 f"{kv * c.H // c.K / 1024:.0f} KiB"]]
    key_flops = attention_flops(c, 1, T) - attention_flops(c, 1, T - 1)
    return rows + [
        ["weights that a token meets", f"{weights / G:.3f} G in layers + V E = {c.V} x {c.E}", met],
        ["their bytes", f"2 x {met}", size],
        *keys,
        [f"bytes of a decode step at {T}", f"{size} + {T} x {per_token}", f"{read} GB"],
        ["its operations", f"2 x {met} + {pair} x {T}", f"{ops} GFLOP"],
        ["its intensity", f"{ops} / {read}", f"{decode.flops / decode.bytes:.2f} FLOP/B"],
        ["attention's own intensity", f"{pair} / {per_token}", f"{c.L * key_flops / kv:.0f} FLOP/B"],
        [f"balance of {name}", f"{peak} / {memory}", f"{m.balance:.0f} FLOP/B"],
        ["its least time", f"{read} GB / {memory}" if m.verdict(decode) == "memory" else f"{ops} GFLOP / {peak}", step],
        ["bound on TPS at batch 1", f"1 / {step}", f"{tps:.0f} tokens/s"],
        [f"operations of a prompt of {T}",
         f"2 x {weights / G:.2f} G x {T} + 2 V E + {prompt_pair} x {T} x {T + 1}", prompt],
        ["bound on its TTFT", f"{prompt} / {peak}" if m.verdict(prefill) == "compute" else
         f"{prefill.bytes / G:.2f} GB / {memory}", wait],
        ["prefill tokens/s", f"{T} / {wait}", speed],
        ["prefill over decode, per token", f"{speed} / {tps:.0f}", f"{T / ttft / tps:.0f} times"],
    ]


def measured_ceiling(device: torch.device, dtype: str) -> Ceiling:
    """What this machine reaches at its best: the sum of a large tensor, and a large product. The best of 30 tries, as a
    neighbour can only slow them down; on a GPU the median of 20. dtype: one of DTYPES, or of QUANTIZATIONS for products
    of quantised rows."""
    x = torch.zeros(1 << 27, device=device)
    eight_bits = dtype in QUANTIZATIONS
    size = 8192 if device.type != "cpu" else 4096 if eight_bits else 2048   # quantising rows is little beside 4096
    x_TE, weight = (torch.randn(size, size, device=device).to(DTYPES.get(dtype, torch.float32)) for _ in "xw")
    part = None
    if device.type == "cpu" or eight_bits:
        part = pack(quantize(Part(weight), dtype if eight_bits else None), weight.dtype)
    product = (lambda: linear(x_TE, part)) if part else (lambda: x_TE @ weight.T)

    def least(call):   # a GPU's own clock: waiting for it takes a tenth of the time in which it reads x
        if device.type == "cuda":
            return gpu_seconds([call])
        call()
        return min(clock(call, device) for _ in range(30))
    return Ceiling(2 * size ** 3 / least(product), x.nbytes / least(x.sum))


def machine(device: torch.device) -> str:
    """What it is called, and on a CPU how many threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------
# Measuring, on a machine on which others may be at work

def clock(call: Callable, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait = getattr(torch, device.type).synchronize   # on a CPU it returns at once
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def gpu_seconds(calls: list[Callable], repeats: int = 20) -> float:
    """Median seconds of one call, by CUDA events around a replayed graph of all of them: launching costs nothing."""
    for call in calls:   # compile, plan
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000 / len(calls))
    return median(times[2:])


def in_turns(measures: list[Callable[[], float]], turns: int = 5) -> list[list[float]]:
    """What each measurement gives in each turn, after a turn that does not count: it compiles, records and touches
    memory for the first time. Whoever disturbs the machine for a while disturbs all of them alike."""
    found = [[measure() for measure in measures] for _ in range(turns + 1)]
    return [list(column) for column in zip(*found[1:])]


def ratio(dividends: list[float], divisors: list[float]) -> float | str:
    """The median turn's ratio; "-" if most turns are not within a factor of two of it: nobody could believe it."""
    found = [a / b if b > 0 else math.inf for a, b in zip(dividends, divisors)]
    middle = median(found)
    agree = sum(middle / 2 <= x <= middle * 2 for x in found if 0 < x < math.inf)
    return middle if agree > len(found) / 2 else "-"


# ---------------------------------------------------------------------------------------------
# Shapes of known models, in the words of their config.json: nothing is downloaded

def llama(V: int, E: int, I: int, L: int, H: int, K: int, **more) -> dict:
    """The config.json of a Llama of this shape."""
    return dict(model_type="llama", vocab_size=V, hidden_size=E, intermediate_size=I, num_hidden_layers=L,
                num_attention_heads=H, num_key_value_heads=K, max_position_embeddings=8192, dtype="bfloat16") | more


SHAPES = {
    "gpt2": dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12,
                 dtype="bfloat16"),
    "llama-135m": llama(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "llama-1b": llama(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True, rope_theta=500000.0),
    "llama-2-7b": llama(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "llama-8b": llama(128256, 4096, 14336, 32, 32, 8, rope_theta=500000.0),
    "qwen3-0.6b": llama(151936, 1024, 3072, 28, 16, 8, model_type="qwen3", head_dim=128, tie_word_embeddings=True,
                        rope_theta=1e6),
    "mixtral-8x7b": llama(32000, 4096, 14336, 32, 32, 8, model_type="mixtral", max_position_embeddings=32768),
    "qwen3-30b-a3b": llama(151936, 2048, 6144, 48, 32, 4, model_type="qwen3_moe", head_dim=128, rope_theta=1e6,
                           max_position_embeddings=40960, num_experts=128, num_experts_per_tok=8,
                           moe_intermediate_size=768, norm_topk_prob=True),
}
YARN = dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)
SHAPES["deepseek-v2-lite"] = llama(
    102400, 2048, 10944, 27, 16, 16, model_type="deepseek_v2", kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64,
    qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
    moe_intermediate_size=1408, first_k_dense_replace=1, topk_method="greedy", max_position_embeddings=163840,
    rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707))
SHAPES["deepseek-v3"] = llama(
    129280, 7168, 18432, 61, 128, 128, model_type="deepseek_v3", kv_lora_rank=512, q_lora_rank=1536,
    qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=256, num_experts_per_tok=8,
    n_shared_experts=1, moe_intermediate_size=2048, first_k_dense_replace=3, n_group=8, topk_group=4,
    routed_scaling_factor=2.5, max_position_embeddings=163840, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0))
SHAPES["llama-3-8b"] = SHAPES["llama-8b"]


def config_of(shape: str) -> Config:
    """The Config of a name in SHAPES, for random weights or for `estimate`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        return read_config(Path(folder))
