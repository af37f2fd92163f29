"""Measure, then compare with what the hardware allows.

    python bench.py cpu        prefill and decode on this machine's CPU, and beside transformers where that is installed
    python bench.py kernels    the attention kernels: without a GPU, what the compiler makes of them for GPUs that are
                               not here; with one, whether they are right and how near to its limits they run

The two limits: a kernel moves bytes and does operations, and takes at least bytes / bandwidth and at least
operations / peak. Both ceilings are measured on the machine, not read from its brochure, and a result is quoted as
the share of the ceiling that binds it (the roofline, Williams et al. 2009).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import Chunk, make_batch
from model import DTYPES, Config, race_for, read_config
from nanoserve import LLM, SamplingParams

try:
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
except ImportError:   # nothing to compare with
    transformers = None

# Shapes of known models, in the words of their config.json, for random weights: nothing is downloaded.
SHAPES = {
    "gpt2": dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
    "llama-135m": dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
                       num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
                       max_position_embeddings=8192),
    "llama-8b": dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                     max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5),
}


def config_of(shape: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape] | {"dtype": "bfloat16"}))
        return read_config(Path(folder))


def print_table(title: str, header: list[str], rows: list[list], note: str = ""):
    """A table of at most 100 columns, numbers to the right, and what it says."""
    cells = [header] + [[f"{c:,.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    progress("")
    print(f"\n{title}\n")
    for row in cells:
        line = "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        print(line.rstrip())
    if note:
        print(f"\n{textwrap.fill(note, 100)}")


def progress(text: str):
    """On a terminal, a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# What a step must cost, and what the machine could do

def step_bytes(c: Config, lens: list[int], itemsize: int) -> int:
    """Bytes that a decode step must read: every weight that takes part in a product once, and each request's K and V."""
    matrices = c.L * (c.E * (c.H + 2 * c.K) * c.D + c.H * c.D * c.E + c.I * c.E * (3 if c.family == "llama" else 2))
    return itemsize * (matrices + c.V * c.E + 2 * c.L * c.K * c.D * sum(lens))


def prefill_flops(c: Config, T: int) -> int:
    """Operations of a prompt of T tokens: two per weight and token, the head for the last alone, four per pair of
    query and key and dimension, half of the pairs being masked."""
    matrices = step_bytes(c, [], 1) - c.V * c.E
    return 2 * T * matrices + 2 * c.V * c.E + 4 * c.L * c.H * c.D * T * (T + 1) // 2


def alternate(calls: list, repeats: int = 3) -> list[float]:
    """Median seconds of each call, run in turns after one warm-up, so that a noisy machine disturbs all alike."""
    times = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, seconds in zip(calls, times):
            begin = time.perf_counter()
            call()
            if turn:
                seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in times]


def cpu_ceilings() -> tuple[float, dict[str, float]]:
    """What this machine reaches at its best: bytes per second reading memory, operations per second in each dtype."""
    x, seconds, peaks = torch.zeros(1 << 27), [], {}
    for _ in range(10):
        begin = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - begin)
    for name, dtype in DTYPES.items():
        x_TE, weight = (torch.randn(2048, 2048).to(dtype) for _ in "xw")
        race = race_for(x_TE, weight)
        while not race.best:
            race(x_TE, weight)
        peaks[name] = 2 * 2048 ** 3 / min(race.seconds.values())
    return x.nbytes / min(seconds), peaks


# ---------------------------------------------------------------------------------------------
# Without a GPU: compile every kernel for GPUs that are not here, and read what came out

REGISTERS, WARPS = 65536, 64                                # per multiprocessor, on every GPU below
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes per multiprocessor; each program costs 1 KiB more
UNITS = {"wgmma": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}   # the instruction that feeds the matrix units


def compile_launches(launch, capability: int) -> list[dict]:
    """Run `launch` on tensors of the CPU, but compile each Triton kernel for sm_<capability> instead of running it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type
    found = []

    def compile_instead(kernel, *args, grid, warmup, **options):
        launch_options = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
        values = dict(zip(kernel.arg_names, args)) | options
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        signature = {p.name: "constexpr" if p.is_constexpr else mangle_type(values[p.name]) for p in kernel.params}
        aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params)   # as a real launch would find
                   if not p.is_constexpr and (torch.is_tensor(values[p.name]) or values[p.name] % 16 == 0)}
        source, target = ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", capability, 32)
        binary = kernels.triton.compile(source, target, launch_options)
        registers, spills = resources(binary.asm["cubin"])
        warps, shared = binary.metadata.num_warps, binary.metadata.shared
        programs = min(REGISTERS // (32 * warps * -(-registers // 8) * 8), WARPS // warps,
                       SHARED[capability] // (shared + 1024))
        found.append(dict(
            kernel=kernel.__name__.strip("_").removesuffix("_kernel"), gpu=f"sm_{capability}",
            tile=f"{constants['ROWS']} x {constants['TILE']}" if "TILE" in constants else "-",
            warps=warps, stages=binary.metadata.num_stages, registers=registers, spills=spills, shared=shared / 1024,
            units=next((name for word, name in UNITS.items() if word in binary.asm["ptx"]), "-"),
            programs=programs, occupancy=programs * warps / WARPS))

    run, JITFunction.run = JITFunction.run, compile_instead
    pretend, kernels.capability_of = kernels.capability_of, lambda device: capability
    try:
        launch()
    finally:
        JITFunction.run, kernels.capability_of = run, pretend
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
               window: int | None = None, slopes_H: torch.Tensor | None = None):
    """One launch of every kernel."""
    pool_KNSD, q_THD = torch.empty(K, 16, S, D, dtype=dtype), torch.empty(81, H, D, dtype=dtype)
    batch = make_batch([Chunk([0], 99, list(range(7))), Chunk([0] * 80, 0, list(range(7, 14)))], S)
    kernels.write_kv_triton(q_THD[:, :K], q_THD[:, :K], pool_KNSD, pool_KNSD, batch.slots_T)
    kernels.attention_triton(q_THD, pool_KNSD, pool_KNSD, batch, D ** -0.5, window, slopes_H)


def show_compiled():
    rows = []
    for D in (64, 128, 256):
        for capability in SHARED:
            progress(f"compiling for sm_{capability}, head size {D}")
            for c in compile_launches(lambda: launch_all(D), capability):
                rows.append([f"{c['kernel']}, D = {D}", c["gpu"], c["tile"], c["warps"], c["stages"], c["registers"],
                             c["spills"], f"{c['shared']:.0f}", c["units"], c["programs"], f"{c['occupancy']:.0%}"])
    rows.sort(key=lambda row: row[0].split(",")[0])
    print_table("The kernels as compiled for bfloat16, 32 query and 8 KV heads, blocks of 64 tokens",
                ["kernel", "GPU", "tile", "warps", "stages", "regs", "spills", "KiB", "units", "per SM", "occupied"],
                rows)
    print("\ntile: query rows x keys; regs: registers per thread; spills: bytes of them that did not fit;\n"
          "KiB: shared memory; units: the instruction that feeds the matrix units; per SM: programs that fit\n"
          "on a multiprocessor by registers, shared memory and warps; occupied: how many of its warps they fill")


# ---------------------------------------------------------------------------------------------
# With a GPU: check, then time

def paged_inputs(lens: list[tuple[int, int]], H: int, K: int, D: int, S: int, dtype) -> tuple:
    """q, K and V pools with shuffled blocks, and the batch, for requests of (query tokens, past)."""
    need = [-(-(n + past) // S) for n, past in lens]
    blocks = torch.randperm(sum(need)).tolist()
    chunks = [Chunk([0] * n, past, [blocks.pop() for _ in range(b)]) for (n, past), b in zip(lens, need)]
    batch = make_batch(chunks, S, "cuda")
    q = torch.randn(sum(n for n, _ in lens), H, D, device="cuda", dtype=dtype)
    k, v = (torch.randn(K, sum(need), S, D, device="cuda", dtype=dtype) for _ in "kv")
    return q, k, v, batch, D ** -0.5


def gpu_seconds(calls: list, repeats: int = 20) -> float:
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
    return statistics.median(times[2:])


def check_on_gpu():
    """Every kernel against the float64 definition, on fresh random data. Exits at the first that differs."""
    shapes = [(D, 32, 8, 64, None) for D in (64, 80, 128, 256)] + [(128, 32, 8, 16, None), (128, 32, 8, 64, 100)]
    shapes += [(128, H, K, 64, None) for H, K in ((8, 8), (14, 2), (71, 1))]
    worst, dtypes = 0.0, ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2))
    for (dtype, tolerance), (D, H, K, S, window) in itertools.product(dtypes, shapes):
        try:
            kernels.check("triton", torch.device("cuda"), dtype, H, K, D, S)
        except ValueError:
            continue
        inputs = paged_inputs([(1, 700), (1, 0), (1, 3000), (300, 500), (77, 0)], H, K, D, S, dtype)
        exact = kernels.attention_naive(*[x.double() if torch.is_tensor(x) else x for x in inputs], window)
        error = (kernels.attention_triton(*inputs, window) - exact).abs().max().item()
        if not error < tolerance:
            sys.exit(f"bench.py: {dtype}, D={D}, {H}:{K} heads, blocks of {S}, window {window}: off by {error}")
        worst = max(worst, error / tolerance)
    print(f"All kernels equal the float64 definition; the largest error is {worst:.0%} of what the dtype allows.")


def show_measured():
    check_on_gpu()
    a, b = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in "ab")
    bandwidth = 2 * a.nbytes / gpu_seconds([lambda: b.copy_(a)])
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192 ** 3 / gpu_seconds([lambda: x @ x])
    del a, b, x
    print(f"Ceilings: copy {bandwidth / 1e12:.2f} TB/s, bfloat16 product {peak / 1e12:.0f} TFLOP/s")

    rows, H, K, D = [], 32, 8, 128
    for T in (2048, 8192, 16384):
        operations = 4 * D * H * T * T / 2
        copies = max(2, 32768 // T)   # together more than the L2 cache holds
        sets = [paged_inputs([(T, 0)], H, K, D, 64, torch.bfloat16) for _ in range(copies)]
        ours = gpu_seconds([lambda s=s: kernels.attention_triton(*s) for s in sets])
        row = [f"prefill {T}", f"{operations / ours / 1e12:.0f} TFLOP/s", f"{operations / ours / peak:.0%}"]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            sets = [[torch.randn(1, h, T, D, device="cuda", dtype=torch.bfloat16) for h in (H, K, K)]
                    for _ in range(copies)]
            try:
                with sdpa_kernel(backend):
                    row.append(gpu_seconds([lambda s=s: F.scaled_dot_product_attention(
                        *s, is_causal=True, enable_gqa=True) for s in sets]) / ours)
            except RuntimeError:   # a build of PyTorch without this backend
                row.append("-")
        rows.append(row)
    print_table("Causal prefill through block tables, bfloat16, 32:8 heads, head size 128",
                ["", "ours", "of the product", "speed / flash", "speed / cuDNN"], rows)

    rows = []
    neighbours = [(B, 8192) for B in (1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 24, 32)]   # a cliff would show
    for B, T in ((1, 131072), (8, 16384), (64, 4096), *neighbours):
        moved = 2 * B * T * K * D * 2
        sets = [paged_inputs([(1, T - 1)] * B, H, K, D, 64, torch.bfloat16) for _ in range(1 + int(2e8 / moved))]
        seconds = gpu_seconds([lambda s=s: kernels.attention_triton(*s) for s in sets])
        rows.append([f"decode {B} x {T}", f"{seconds * 1e6:.0f} us", f"{moved / seconds / 1e12:.2f} TB/s",
                     f"{moved / seconds / bandwidth:.0%}"])
    print_table("Decode through block tables, bfloat16, 32:8 heads, head size 128",
                ["", "time", "K and V read at", "of the copy"], rows)

    rows = []
    for shape in ("gpt2", "llama-8b"):
        try:
            llm = LLM(config_of(shape))
        except (ValueError, RuntimeError):   # a smaller GPU
            rows.append([shape, "does not fit", "-", "-"])
            continue
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        llm.generate([[1] * 100], params)   # compile and record
        tps = statistics.median(llm.generate([[1] * 100], params)[0].tps for _ in range(5))
        bound = bandwidth / step_bytes(llm.config, [300], 2)   # at the mean context
        rows.append([shape, f"{tps:.0f}", f"{bound:.0f}", f"{tps / bound:.0%}"])
        del llm
    print_table("End to end at batch 1, random weights, bfloat16", ["", "tokens/s", "bandwidth bound", "reached"], rows)
    print("\nThe bound: bytes of the weights that a token reads, and of its K and V, over the copy's bandwidth.")


# ---------------------------------------------------------------------------------------------
# A CPU, beside transformers

class Ours:
    """nanoserve, for token ids: so many new tokens for each prompt."""

    def __init__(self, model: Config | Path, dtype: str):
        self.llm = LLM(model, "cpu", dtype, prefix_cache=False, max_seqs=32, num_blocks=1024)

    def __call__(self, prompts: list[list[int]], new: list[int]):
        outs = self.llm.generate(prompts, [SamplingParams(max_tokens=n, ignore_eos=True) for n in new])
        assert [len(out.token_ids) for out in outs] == new, [out.error for out in outs]


class Theirs:
    """transformers, from the same folder; requests of several lengths by its continuous batching."""

    def __init__(self, folder: Path, dtype: str):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        self.options = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def __call__(self, prompts: list[list[int]], new: list[int]):
        if len(set(map(len, prompts))) == 1:
            x = torch.tensor(prompts)
            out = self.model.generate(x, self.options, attention_mask=torch.ones_like(x), max_new_tokens=new[0])
            assert out.shape[1] == x.shape[1] + new[0]
            return
        with self.model.continuous_batching_context_manager(generation_config=self.options) as manager:
            for prompt, n in zip(prompts, new):
                manager.add_request(prompt, max_new_tokens=n)
            outs = []
            while len(outs) < len(prompts):
                result = manager.get_result(timeout=1)
                outs += [result] if result and result.is_finished() else []
        assert sorted(len(out.generated_tokens) for out in outs) == sorted(new), [out.error for out in outs]


def both(shape: str, dtype: str) -> list:
    """Ours, and theirs if it is installed, with the same random weights."""
    if not transformers:
        return [Ours(config_of(shape), dtype)]
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.AutoConfig.for_model(**SHAPES[shape])
        transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).save_pretrained(folder)
        return [Ours(Path(folder), dtype), Theirs(Path(folder), dtype)]


def tokens_per_second(systems: list, prompts: list[list[int]], new: list[int], decode: bool, repeats: int = 3):
    """Of each system, in turns: of decode, that is less the time for a first token, or of the whole."""
    calls = [lambda s=s, n=n: s(prompts, n) for s in systems for n in ([new, [1] * len(new)] if decode else [new])]
    seconds = alternate(calls, repeats)
    if decode:
        return [(sum(new) - len(new)) / (whole - first) for whole, first in zip(seconds[::2], seconds[1::2])]
    return [sum(new) / s for s in seconds]


def show_cpu():
    """Prefill, decode and a crowd, against this CPU's ceilings and beside transformers; then what a context costs."""
    progress("measuring the ceilings")
    bandwidth, peaks = cpu_ceilings()
    print(f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
          f"transformers {transformers.__version__ if transformers else 'not installed'}\n"
          f"Ceilings: memory is read at {bandwidth / 1e9:.0f} GB/s; products reach "
          + ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {name}" for name, peak in peaks.items()))
    dice, rows = random.Random(0), []

    def row(name, c, systems, lens, new, dtype, decode=True, repeats=3):
        progress(name)
        prompts = [[dice.randrange(c.V) for _ in range(n)] for n in lens]
        ours, *theirs = tokens_per_second(systems, prompts, new, decode, repeats)
        reached = share = "-"
        if decode:       # a step for every len(lens) tokens
            rate = ours / len(lens) * step_bytes(c, [n + m // 2 for n, m in zip(lens, new)], DTYPES[dtype].itemsize)
            reached, share = f"{rate / 1e9:.0f} GB/s", f"{rate / bandwidth:.0%}"
        elif new == [1]:
            rate, ours, theirs = ours * prefill_flops(c, lens[0]), ours * lens[0], [t * lens[0] for t in theirs]
            reached, share = f"{rate / 1e9:.0f} GFLOP/s", f"{rate / peaks[dtype]:.0%}"
        rows.append([name, f"{ours:.0f}", reached, share,
                     *([f"{theirs[0]:.0f}", ours / theirs[0]] if theirs else ["-", "-"])])

    for shape, dtype in itertools.product(("gpt2", "llama-135m"), ("float32", "bfloat16")):
        progress(f"making {shape}")
        c, systems, name = config_of(shape), both(shape, dtype), f"{shape} {dtype}"
        row(f"{name}: prefill 512", c, systems, [512], [1], dtype, decode=False)
        row(f"{name}: decode, batch 1", c, systems, [32], [33], dtype)
        row(f"{name}: decode, batch 16", c, systems, [32] * 16, [33] * 16, dtype)
        if shape == "llama-135m":
            lens, new = [[dice.randint(8, most) for _ in range(32)] for most in (128, 96)]
            row(f"{name}: 32 mixed requests", c, systems, lens, new, dtype, decode=False, repeats=1)
    demo = Path(__file__).parent / "demo/llama"
    ours = Ours(demo, "auto")
    row(f"demo/llama {ours.llm.dtype}: decode, batch 1", ours.llm.config,
        [ours] + ([Theirs(demo, ours.llm.dtype)] if transformers else []), [8], [201], ours.llm.dtype)
    print_table("Tokens per second, random weights", ["", "nanoserve", "reached", "of ceiling", "transformers", "ratio"],
                rows, "Decode reads every weight once per step and is held against the memory's bandwidth, prefill multiplies "
                "and is held against the product. Mixed: 8 to 128 tokens in, 8 to 96 out, tokens out per second.")

    rows, c = [], config_of("llama-135m")
    for dtype in ("float32", "bfloat16"):
        llm, seconds = LLM(c, "cpu", dtype, prefix_cache=False, max_seqs=1), {}
        for context in (128, 4096, 128, 4096):   # the first two also let the races run
            llm.add([1] * context, SamplingParams(max_tokens=42, ignore_eos=True))
            steps = []
            while llm.requests:
                begin = time.perf_counter()
                llm.step()
                steps.append(time.perf_counter() - begin)
            seconds[context] = statistics.median(steps[-40:])
        extra = seconds[4096] - seconds[128]
        floor = (step_bytes(c, [4096], DTYPES[dtype].itemsize) - step_bytes(c, [128], DTYPES[dtype].itemsize)) / bandwidth
        rows.append([dtype, *(f"{x * 1000:.1f} ms" for x in (seconds[128], seconds[4096], extra, floor)), extra / floor])
    print_table("What a long context adds to a decode step of llama-135m",
                ["", "at 128", "at 4096", "extra", "its bytes / bandwidth", "ratio"], rows)

    spent = []
    run, ours.llm.model = ours.llm.model, lambda *a: (begin := time.perf_counter(), run(*a), spent.append(
        time.perf_counter() - begin))[1]
    begin = time.perf_counter()
    ours([[1] * 8], [201])
    step = (time.perf_counter() - begin) / 201
    print(f"\nA decode step of demo/llama takes {step * 1e6:.0f} us, of which {1e6 * (step - sum(spent) / 201):.0f} "
          "are not the model: deciding who runs, building the batch, choosing the token.")


def processor() -> str:
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(prog="bench.py", description="Measure, then compare with what hardware allows.")
    parser.add_argument("command", choices=["kernels", "cpu"], help="kernels: the attention kernels, compiled or "
                        "measured; cpu: prefill and decode on this CPU, beside transformers if it is installed")
    if parser.parse_args().command == "cpu":
        return show_cpu()
    if kernels.load_triton() is None:
        sys.exit("bench.py: the kernels need the triton package, which is not installed: "
                 "pip install -r requirements.txt on Linux")
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {kernels.triton.__version__}")
        show_measured()
    elif kernels.INTERPRETED:   # the compiler instead of the interpreter, which must be chosen before the import
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "0"})
    else:
        print(f"No GPU here: PyTorch {torch.__version__}, Triton {kernels.triton.__version__}")
        show_compiled()


if __name__ == "__main__":
    main()
