"""How we know that slices add up, that processes agree, and that none is left behind. (Read beside parallel.py.)"""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import cli
import parallel
from batch import Chunk, make_batch
from checkpoint import load_weights
from config import read_config
from linear import linear
from model import Model
from nanoserve import LLM, SamplingParams
from paged_kv import KVMemory
from reference import (EXPERTS, FAMILIES, GPT2, LATENTS, LLAMA, compressed_tensors, dequantised, fp8_blocks, in_8_bits, plain, tensors_of,
                       write_checkpoint)
from test_nanoserve import assert_tokens_do_not_depend_on_company

HERE = Path(__file__).parent
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------
# Slices, without processes: a thread for each rank

class Threads:
    """What `parallel.Ranks` is to linear.py, for ranks that are threads."""

    def __init__(self, rank, size, barrier, tensors):
        self.rank, self.size, self.barrier, self.tensors = rank, size, barrier, tensors

    def exchange(self, x):
        self.tensors[self.rank] = x.clone()
        self.barrier.wait()
        everybody = [tensor.clone() for tensor in self.tensors]
        self.barrier.wait()
        return everybody

    def sum(self, x):
        return x.copy_(torch.stack(self.exchange(x)).sum(0))

    def largest(self, x):
        return x.copy_(torch.stack(self.exchange(x)).amax(0))

    def gather(self, x):
        everybody = self.exchange(x)
        return [] if self.rank else everybody


def on_ranks(size, work):
    """What `work(ranks)` gives on each of so many ranks."""
    barrier, tensors, results, errors = threading.Barrier(size), [None] * size, [None] * size, []

    def run(rank):
        try:
            results[rank] = work(Threads(rank, size, barrier, tensors))
        except BaseException as error:
            errors.append(error)
            barrier.abort()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


def logits_of(c, weights, ids):
    S, blocks = 16, list(range(-(-len(ids) // 16)))
    memory = KVMemory(c.L, c.K, c.D, len(blocks), S, latent=bool(c.latent))
    return Model(c, weights, "naive")(make_batch([Chunk(ids, 0, blocks, len(ids))], S), memory)


@settings(max_examples=40)
@given(family=st.sampled_from(sorted(FAMILIES)), size=st.integers(2, 4), heads=st.sampled_from([(4, 2), (4, 1), (6, 3), (8, 4), (12, 2), (4, 4), (6, 1)]),
       inner=st.sampled_from([24, 48, 384]), V=st.integers(9, 70), stored=st.sampled_from([None, None, "float", "blocks"]), seed=st.integers(0, 99))
@example(family="llama 2", size=2, heads=(4, 4), inner=384, V=61, stored="blocks", seed=0)   # a block is cut
@example(family="llama 2", size=3, heads=(6, 3), inner=384, V=61, stored="blocks", seed=0)   # none is
def test_the_ranks_logits_are_those_of_the_model(tmp_path, family, size, heads, inner, V, stored, seed):
    """For every family, K below the number of ranks, an uneven vocabulary, and weights stored in 8 bits."""
    H, K = heads
    config = FAMILIES[family] | dict(vocab_size=V)
    gpt2 = config["model_type"] == "gpt2"
    config |= dict(n_embd=8 * H, n_head=H, n_inner=inner) if gpt2 else dict(
        num_attention_heads=H, num_key_value_heads=K, head_dim=8, intermediate_size=inner)
    if "yarn" in family or "3.1" in family:
        config |= dict(head_dim=32)
    tensors = meant = tensors_of(config)
    if stored and not gpt2:
        config |= dict(quantization_config=fp8_blocks() if stored == "blocks" else compressed_tensors("float"))
        tensors = in_8_bits(tensors, config["quantization_config"])
        meant = dequantised(tensors)
    c = read_config(write_checkpoint(tmp_path, config, tensors))
    try:
        parallel.share(c, size)
    except ValueError:
        assume(False)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (20,), generator=generator).tolist()

    def rank(ranks):
        weights = load_weights(tmp_path, c, CPU, torch.float32, None, ranks)
        numbers = sum(part.weight.numel() for name in ("up", "out", "down", "embedding", "head") for part in weights.get(name, []))
        return logits_of(parallel.share(c, size), weights, ids), numbers
    results = on_ranks(size, rank)
    expected = plain(config, meant, ids)
    assert (results[0][0] - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
    whole = load_weights(tmp_path, c, CPU, torch.float32)
    assert sum(numbers for _, numbers in results) == sum(
        part.weight.numel() for name in ("up", "out", "down", "embedding", "head") for part in whole.get(name, []))


@settings(max_examples=15)
@given(gpt2=st.booleans(), size=st.integers(2, 4), quantization=st.sampled_from([None, "int8", "stored"]), rows=st.integers(0, 5), seed=st.integers(0, 99))
def test_slices_in_8_bits_are_rounded_as_the_whole(tmp_path, gpt2, size, quantization, rows, seed):
    """Scales are those of whole rows, of weights as of activations: the sum of the ranks' products is the product."""
    config = GPT2 | dict(n_embd=48, n_head=12) if gpt2 else LLAMA | dict(
        num_attention_heads=12, num_key_value_heads=4, head_dim=8, attention_bias=True, mlp_bias=True)
    assume(size != 3 or gpt2)
    config |= dict(n_inner=36) if gpt2 else {}
    tensors = tensors_of(config)
    if quantization == "stored":
        assume(not gpt2)
        config |= dict(quantization_config=compressed_tensors("int"))
        tensors, quantization = in_8_bits(tensors, config["quantization_config"]), None
    c = read_config(write_checkpoint(tmp_path, config, tensors))
    whole = load_weights(tmp_path, c, CPU, torch.float32, quantization)
    generator = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(rows, width, generator=generator) for name, width in (("out", c.H * c.D), ("down", c.I), ("head", c.E))}

    def rank(ranks):
        weights = load_weights(tmp_path, c, CPU, torch.float32, quantization, ranks)
        return {name: linear(x[name] if name == "head" else x[name].chunk(size, 1)[ranks.rank].clone(), weights[name][-1]) for name in x}
    for number, found in enumerate(on_ranks(size, rank)):
        for name in x if not number else ("out", "down"):
            if rows:
                torch.testing.assert_close(found[name], linear(x[name], whole[name][-1]), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", [*EXPERTS, *LATENTS])
def test_ranks_share_out_experts_and_the_heads_of_latents(tmp_path, name, quantization):
    said = (EXPERTS | LATENTS)[name] | dict(num_attention_heads=6, num_key_value_heads=6, intermediate_size=48, head_dim=8)
    said |= dict(moe_intermediate_size=24) if "moe_intermediate_size" in said else {}
    c, ids = read_config(write_checkpoint(tmp_path, said, tensors_of(said))), list(range(20))
    whole = load_weights(tmp_path, c, CPU, torch.float32, quantization)
    expected, cut = logits_of(c, whole, ids), ("up", "down", "shared_up", "shared_down", "kv_up", "q_up", "out", "head")

    def numbers(weights):
        parts = [part for name in cut for part in weights.get(name, []) if part]
        return sum(one.weight.numel() for part in parts for one in (part if isinstance(part, list) else [part]))
    able = [size for size in (2, 3, 4) if not c.experts or size <= c.experts.X]
    for size in able[:2]:
        def rank(ranks):
            weights = load_weights(tmp_path, c, CPU, torch.float32, quantization, ranks)
            return logits_of(parallel.share(c, size), weights, ids), numbers(weights)
        results = on_ranks(size, rank)
        error_T = (results[0][0] - expected).abs().amax(-1) / expected.abs().max()   # in INT8 a sum may round elsewhere
        assert (error_T.median() if quantization else error_T.max()) < 1e-4
        assert sum(number for _, number in results) == numbers(whole), "each number is on one rank"
    if able != [2, 3, 4]:
        with pytest.raises(ValueError, match=f"cannot all be shared out evenly, and {c.experts.X} experts, {c.V} tokens so that each has some"):
            parallel.share(c, c.experts.X + 1)


@pytest.mark.parametrize("change, size, words", [
    (dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8), 4, "6 query heads, 2 KV heads"), (dict(intermediate_size=50), 4, "50 columns"),
    (dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8), 3, "2 KV heads"), (dict(), 8, "use 1 or 2 or 4"), (dict(), 0, "tensor_parallel_size is 0")])
def test_sizes_that_cannot_be_cut_are_refused_by_name(tmp_path, change, size, words):
    config = LLAMA | change
    write_checkpoint(tmp_path, config, tensors_of(config))
    with pytest.raises(ValueError, match=words):
        LLM(tmp_path, device="cpu", tensor_parallel_size=size)


def test_whole_weights_are_not_cut():
    alone = LLM(HERE / "demo/llama", device="cpu")
    with pytest.raises(ValueError, match="leave one of the two out"):
        LLM(HERE / "demo/llama", device="cpu", weights=alone.model.weights, tensor_parallel_size=2)


def test_devices_that_ranks_cannot_share_are_refused_by_name():
    c = read_config(HERE / "demo/llama")
    for device in ("cuda", "cuda:0", "mps"):
        if not device == "cuda" or torch.cuda.device_count() < 2:
            with pytest.raises(ValueError, match="tensor_parallel_size is 2 and device is"):
                parallel.start(2, c, torch.device(device))


# ---------------------------------------------------------------------------------------------
# Processes

STAYING = []   # ranks of the group that several tests have in common


def ranks_of(pid):
    """The processes that run parallel.py for this one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [child for child in found if child not in STAYING and bytes(HERE / "parallel.py") in Path(f"/proc/{child}/cmdline").read_bytes()]


def gone(pids, seconds=20.0):
    """Whether these processes end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def nobody_is_left_behind():
    yield
    if ranks_of(os.getpid()):
        gc.collect()   # what a test puts around an engine's methods may hold the engine in a circle
    left = ranks_of(os.getpid())
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


ARRIVALS = [(2, 0, 12, 0, 1), (4, 0, 12, 0, 3), (7, 1, 12, 0, 2), (3, 2, 9, 0, 1), (6, 2, 12, 6, 2), (0, 3, 12, 0, 1), (8, 4, 12, 0, 3), (5, 5, 7, 0, 1)]
PLAIN = dict(block_size=3, max_batched_tokens=17, max_seqs=6, prefix_cache=True, quantization=None, kv_cache_dtype="auto")


@pytest.mark.parametrize("config, size, options", [
    ("llama", 2, dict(kv_cache_dtype="int8")), ("llama", 4, dict(quantization="int8")),
    ("gpt2", 2, dict(quantization="int8", kv_cache_dtype="int8")), ("mistral", 2, dict(speculative_model="draft"))])
def test_tokens_do_not_depend_on_the_number_of_processes(lone, config, size, options):
    """Nor on what else happens: a pool that is too small, preemption, samples that share blocks, chunks, aborts, drafts."""
    drafts = None
    if "speculative_model" in options:   # one that is always right
        options, drafts = options | dict(speculative_model=lone[config][0]), lambda llm, prompts, expected: None
    assert_tokens_do_not_depend_on_company(lone, config, "torch", PLAIN | options | dict(tensor_parallel_size=size), 2, ARRIVALS, True, drafts)


@pytest.fixture(scope="module")
def two(lone):
    """One group of two for many examples."""
    folder, prompts, expected = lone["llama"]
    llm = LLM(folder, device="cpu", dtype="float32", num_blocks=34, block_size=4, max_batched_tokens=24, max_seqs=5, tensor_parallel_size=2)
    STAYING.extend(process.pid for process in llm.ranks.processes)
    yield llm, prompts, expected
    llm.ranks.close()
    assert gone(STAYING, 0.1)


@settings(max_examples=12)
@given(wanted=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=6))
def test_two_processes_write_the_same_tokens(two, wanted):
    llm, prompts, expected = two
    outputs = llm.generate([prompts[i] for i, _, _ in wanted], [SamplingParams(max_tokens=m, n=n, ignore_eos=True) for _, m, n in wanted])
    for (i, m, _), out in zip(wanted, outputs):
        assert [sample.token_ids for sample in out.samples] == [expected[i][:m]] * len(out.samples)


def test_two_processes_have_the_same_logits(two, lone):
    llm, prompts, _ = two
    alone = LLM(lone["llama"][0], device="cpu", dtype="float32")
    for prompt in prompts:
        assert (llm.logits(prompt) - alone.logits(prompt)).abs().max() < 1e-4


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 700), min_size=1, max_size=4), changed=st.integers(0, 60))
def test_a_step_survives_being_one_list_of_numbers(lengths, changed):
    """Whatever its length, in one message or two."""
    sent, tables, seen, copies = [], parallel.defaultdict(list), [], []

    class Group:
        def broadcast(self, tensor, root):
            sent.append(tensor.clone()) if self.leads else tensor.copy_(sent.pop(0))
            return self

        def wait(self):
            pass
    ranks = object.__new__(parallel.Ranks)
    ranks.gloo, ranks.broken = Group(), ""
    chunks = [Chunk(list(range(n)), 7 * row, [], min(n, 1), row) for row, n in enumerate(lengths)]
    entries = {(row, entry): 100 * row + entry for row in range(4) for entry in range(changed)}
    ranks.gloo.leads = True
    ranks.tell(parallel.encode(chunks, True, entries, [1, 2, 3, 4]))
    ranks.gloo.leads = False

    class Runner:
        class pool:
            changed = {}
            copy = staticmethod(lambda *blocks: copies.append(blocks))

        def __call__(self, chunks, replay):
            seen.append((chunks, replay))
    parallel.run(ranks.listen(), Runner(), tables)
    (found, replay), = seen
    assert replay and not sent and copies == [(1, 2), (3, 4)] and Runner.pool.changed == entries
    assert [(c.tokens, c.start, c.logits, c.row) for c in found] == [(c.tokens, c.start, c.logits, c.row) for c in chunks]
    assert all(c.blocks == [100 * c.row + entry for entry in range(changed)] for c in found)


# ---------------------------------------------------------------------------------------------
# Ends

def test_a_rank_that_dies_ends_the_run_in_one_sentence():
    llm = LLM(HERE / "demo/llama", device="cpu", dtype="float32", tensor_parallel_size=2)
    (pid,) = ranks_of(os.getpid())
    llm.watchers.append(lambda *seen: llm.steps == 3 and os.kill(pid, signal.SIGKILL))
    begin = time.monotonic()
    with pytest.raises(parallel.Broken, match=r"^rank 1 of 2 has ended \(signal 9\), and the run with it: start it again$") as first:
        llm.generate(["The cat sat"], SamplingParams(max_tokens=100, ignore_eos=True))
    assert time.monotonic() - begin < 10 and gone([pid])
    with pytest.raises(parallel.Broken) as again:
        llm.generate(["The cat sat"])
    assert str(again.value) == str(first.value) and llm.pool.num_referenced == 0


@pytest.mark.parametrize("joins, end, why", [(False, "print('no GPU'); raise SystemExit(1)", "no GPU"), (False, "os.kill(os.getpid(), 9)", "signal 9"),
                                             (True, "os.kill(os.getpid(), 9)", "signal 9")])
def test_a_rank_that_ends_before_it_is_connected_is_noticed_at_once(tmp_path, monkeypatch, joins, end, why):
    """Rank 2 of 3: while rank 1 is not there, or when both are there and gloo has begun to wait for them. Then rank 1 ends because of rank 2."""
    assert parallel.SOON.total_seconds() <= 10
    monkeypatch.setattr(parallel, "SOON", timedelta(seconds=0.3))
    popen, started, begin = subprocess.Popen, [], time.monotonic()
    stays = f"raise SystemExit({parallel.CONNECTION_LOST})" if joins else "import select, sys; select.select([sys.stdin], [], [], 20); print('nobody has noticed')"

    def start(arguments, **more):
        url = arguments[2]
        if joins:
            next(dist.rendezvous(url))[0].add("ranks", 1)
        started.append(popen([sys.executable, "-c", "import os; " + (end if url.endswith("rank=2") else stays)], **more))
        return started[-1]
    monkeypatch.setattr(parallel.subprocess, "Popen", start)
    with pytest.raises(parallel.Broken) as error:
        parallel.start_processes(3, CPU)
    assert str(error.value) == f"rank 2 of 3 has ended ({why}), and the run with it: start it again"
    assert len(started) == 2 and all(process.poll() is not None for process in started) and time.monotonic() - begin < 60


def test_ranks_that_do_not_find_each_other_say_so(tmp_path, monkeypatch):
    """On several machines each says it, as each has a terminal."""
    monkeypatch.setattr(parallel, "LATE", timedelta(seconds=0.3))

    def alone(rank, here):
        try:
            parallel.Ranks(f"file://{tmp_path}/store-{rank}-{here}?world_size=2&rank={rank}", here, CPU)
        except (parallel.Broken, ValueError) as error:
            return type(error), str(error)
    with ThreadPoolExecutor() as pool:
        far, other, near = pool.map(alone, (0, 1, 0), (1, 1, 2))
    words = "2 ranks could not connect: set GLOO_SOCKET_IFNAME on each machine, as README.md says"
    assert far == (parallel.Broken, words) and other == (ValueError, words)
    assert near == (parallel.Broken, "2 ranks could not connect: start the run again")


@pytest.mark.parametrize("here, network, works", [(1, "lo", True), (1, "nowhere", False), (2, "nowhere", True)])
def test_ranks_on_several_machines_meet_where_gloo_socket_ifname_says(tmp_path, monkeypatch, here, network, works):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", network)
    sums = []

    def rank(number):
        with suppress(parallel.Broken, ValueError):
            sums.append(parallel.Ranks(f"file://{tmp_path}/store?world_size=2&rank={number}", here, CPU).sum(torch.tensor([1.0 + number])).item())
    with ThreadPoolExecutor() as pool:
        list(pool.map(rank, range(2)))
    assert sums == [3.0, 3.0] * works


def test_rank_0_waits_for_everybody_however_long_imports_take(tmp_path, monkeypatch):
    """Rank 2 comes while rank 0 waits for it, and rank 1 has been there for long."""
    monkeypatch.setattr(parallel, "SOON", timedelta(seconds=0.3))
    monkeypatch.setattr(parallel, "LATE", timedelta(seconds=20))
    url = f"file://{tmp_path}/store?world_size=3&rank="
    store, _, _ = next(dist.rendezvous(url + "0"))
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(parallel.Ranks, url + "1", 3, CPU)]
        while not store.add("ranks", 0):
            time.sleep(0.01)

        def sleep(seconds):
            if len(others) == 1:
                others.append(pool.submit(parallel.Ranks, url + "2", 3, CPU))
        monkeypatch.setattr(parallel, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        assert parallel.Ranks(url + "0", 3, CPU, [Rank(), Rank()]).size == 3
        assert [other.result().rank for other in others] == [1, 2]


class Rank:
    """A process that ends when it is told to."""

    ended = False

    def poll(self):
        return 0 if self.ended else None


def test_who_watches_the_ranks_aborts_the_group_that_close_forgets():
    aborted, ranks = [], object.__new__(parallel.Ranks)
    ranks.gloo = ranks.group = group = SimpleNamespace(abort=lambda: aborted.append(True))
    ranks.processes, ranks.broken = [Rank(), Rank()], ""
    watching = threading.Thread(target=ranks._watch, args=(group,))
    watching.start()
    ranks.gloo = ranks.group = None   # as `close` begins, with processes that have not ended yet
    ranks.processes[0].ended = True
    watching.join(20)
    assert aborted == [True]


def test_a_step_that_fails_on_rank_0_ends_the_group_and_del_ends_it_too():
    llm = LLM(HERE / "demo/llama", device="cpu", dtype="float32", tensor_parallel_size=2)
    (pid,) = ranks_of(os.getpid())
    whole, llm.model.write_kv = llm.model.write_kv, lambda *arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):
        llm.generate(["The cat sat"])
    assert gone([pid], 5)
    llm.model.write_kv = whole
    with pytest.raises(parallel.Broken, match="a step has failed on rank 0"):
        llm.generate(["The cat sat"])

    llm = LLM(HERE / "demo/llama", device="cpu", dtype="float32", tensor_parallel_size=2)
    pids = ranks_of(os.getpid())
    del llm
    assert len(pids) == 1 and gone(pids, 0.1)


def test_a_rank_that_cannot_load_says_why(tmp_path, monkeypatch):
    """What is on its machine may differ: here only the others find the folder empty."""
    monkeypatch.chdir(tmp_path)
    config = LLAMA | dict(vocab_size=50)
    write_checkpoint(tmp_path / "model", config, tensors_of(config))
    popen = subprocess.Popen
    monkeypatch.setattr(parallel.subprocess, "Popen", lambda *arguments, **more: popen(*arguments, **more | dict(cwd="/")))
    with pytest.raises(parallel.Broken, match=r"^rank 1 of 2 has ended \(model has no model.safetensors: .*\), and the run"):
        LLM("model", device="cpu", tensor_parallel_size=2)
    assert not ranks_of(os.getpid())


def test_whatever_becomes_of_rank_0_the_others_end_with_it():
    """Two runs at once: one is interrupted, one is killed."""
    command = [sys.executable, str(HERE / "nanoserve.py"), "--device", "cpu", "--prompt", "The cat sat", "--ignore-eos",
               "--max-tokens", "900", "--tensor-parallel-size", "2"]
    interrupted, killed = runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    try:
        assert all(run.stdout.read(20) for run in runs)
        pids = [pid for run in runs for pid in ranks_of(run.pid)]
        killed.kill()
        interrupted.send_signal(signal.SIGINT)
        err = interrupted.communicate(timeout=60)[1].decode()
        assert interrupted.returncode == 130 and err.strip() == "nanoserve.py: interrupted"
        assert len(pids) == 2 and gone(pids)
    finally:
        for run in runs:
            run.kill()
            run.communicate()


def test_the_command_line_says_it_in_one_sentence(monkeypatch, capsys):
    def kill(llm, prompts, params):
        os.kill(llm.ranks.processes[0].pid, signal.SIGKILL)
        return start(llm, prompts, params)
    start = LLM.start
    monkeypatch.setattr(LLM, "start", kill)
    assert cli.main(["--device", "cpu", "--prompt", "The cat sat", "--tensor-parallel-size", "2"]) == 1
    assert capsys.readouterr().err == "nanoserve.py: rank 1 of 2 has ended (signal 9), and the run with it: start it again\n"


def test_torchrun_makes_the_group(capfd):
    """As on two machines: one torchrun on each, with one rank."""
    arguments = ["--device", "cpu", "--dtype", "float32", "--prompt", "The cat sat", "--max-tokens", "12"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    machines = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
         "--master-port", port, str(HERE / "nanoserve.py"), *arguments, "--tensor-parallel-size", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | dict(GLOO_SOCKET_IFNAME="lo")) for node in range(2)]
    try:
        said = [machine.communicate(timeout=120) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()   # torchrun ends its ranks
            machine.communicate()
    assert cli.main(arguments) == 0
    assert [out for out, _ in said] == [capfd.readouterr().out, ""] and ["TTFT" in err for _, err in said] == [True, False]
    assert [machine.returncode for machine in machines] == [0, 0]
