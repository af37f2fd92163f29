"""How we know that products are right, and that threads and types are chosen by reason. (Read beside linear.py, device.py.)"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import device
import linear
import nanoserve
from linear import Part, pack
from nanoserve import LLM, SamplingParams
from reference import LLAMA, tensors_of, write_checkpoint

HERE = Path(__file__).parent


@settings(max_examples=150)
@given(rows=st.one_of(st.integers(0, 3), st.integers(0, 70)), inputs=st.integers(1, 70), outputs=st.integers(1, 120),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), biased=st.booleans(), small=st.booleans(),
       transposed=st.booleans(), seed=st.integers(0, 99))
def test_a_packed_part_gives_the_product(poisoned, rows, inputs, outputs, dtype, biased, small, transposed, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = (torch.from_numpy(rng.standard_normal(shape)).to(dtype)
                       for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    expected = x.double().numpy() @ weight.double().numpy().T + (bias.double().numpy() if biased else 0)
    x, weight = (x.T.contiguous().T, weight.T.contiguous().T) if transposed else (x, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "SMALL", 1 << 20 if small else 0)
        part = pack(Part(weight, bias if biased else None), weight.dtype)
    assert part.weight.is_mkldnn == (linear.has_instructions_for(dtype) and not (small and dtype == torch.float32))
    weight.fill_(torch.nan)   # the plain weight may be let go
    if not part.weight.is_mkldnn:
        return
    out = linear.linear(x, part)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
    np.testing.assert_allclose(out.double(), expected, rtol=tolerance, atol=2 * tolerance * inputs ** 0.5)


@settings(max_examples=40)
@given(rows=st.integers(0, 20), biased=st.booleans(), seed=st.integers(0, 99))
def test_a_plain_part_gives_the_product(poisoned, rows, biased, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((rows, 12), (30, 12), (30,)))
    part = pack(Part(weight, bias if biased else None), weight.dtype)
    assert part.weight is weight
    np.testing.assert_allclose(linear.linear(x, part), x.numpy() @ weight.numpy().T + (bias.numpy() if biased else 0), atol=1e-5)


def test_a_row_is_the_same_in_any_company(poisoned):
    """One step's rows are multiplied together: none may change what another gets beyond rounding."""
    for outputs, inputs in ((300, 192), (640, 520)):
        generator = torch.Generator().manual_seed(0)
        part, x = pack(Part(torch.randn(outputs, inputs, generator=generator)), torch.float32), torch.randn(33, inputs, generator=generator)
        together = linear.linear(x, part)
        for row in range(33):
            torch.testing.assert_close(linear.linear(x[row:row + 1], part)[0], together[row], rtol=1e-5, atol=1e-4)
        x[7] = torch.nan
        others = [row for row in range(33) if row != 7]
        assert linear.linear(x, part)[others].isfinite().all()


@pytest.mark.parametrize("stored, instructions, inputs, expected, why", [
    ("bfloat16", True, 4096, "bfloat16", "as stored"), ("bfloat16", True, 64, "float32", "caches"),
    ("bfloat16", False, 4096, "float32", "converts bfloat16"), ("float32", True, 4096, "float32", "as stored"),
    ("float16", True, 4096, "float16", "as stored"), ("int8", True, 4096, "float32", "as stored"),
    ("bfloat16", True, 1023, "float32", "caches"), ("bfloat16", True, 1024, "bfloat16", "as stored")])
def test_dtype_auto_follows_from_the_processor_and_the_size_of_the_weights(monkeypatch, stored, instructions, inputs, expected, why):
    monkeypatch.setattr(linear, "has_instructions_for", lambda dtype: instructions)
    name, reason = linear.fastest_dtype(stored, torch.device("cpu"), 256, inputs)
    assert name == expected and why in reason
    assert linear.fastest_dtype(stored, torch.device("cuda"), 256, inputs) == (stored if stored != "int8" else "float32", "as stored")


def test_the_engine_takes_the_dtype_that_was_chosen(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, LLAMA | dict(dtype="bfloat16"), tensors_of(LLAMA))
    asked = []
    monkeypatch.setattr(nanoserve, "fastest_dtype", lambda *what: asked.append(what) or ("bfloat16", "because"))
    llm = LLM(tmp_path, device="cpu")
    assert asked == [("bfloat16", torch.device("cpu"), LLAMA["intermediate_size"], LLAMA["hidden_size"])]
    assert (llm.dtype, llm.dtype_reason, llm.pool.k_LKNSD.dtype) == ("bfloat16", "because", torch.bfloat16)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    assert (llm.dtype, llm.dtype_reason) == ("float32", "as asked") and len(asked) == 1


def test_a_small_step_takes_one_thread_and_gives_the_others_back(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, LLAMA, tensors_of(LLAMA))
    llm, threads, before = LLM(tmp_path, device="cpu"), [], torch.get_num_threads()
    model, products = llm.model, LLAMA["intermediate_size"] * LLAMA["hidden_size"]

    def watched(batch, pool):
        threads.append(torch.get_num_threads())
        return model(batch, pool)
    llm.model = watched
    monkeypatch.setattr(nanoserve, "SINGLE_THREAD", 9 * products)
    torch.set_num_threads(3)
    try:
        for tokens in (1, 8, 9, 20):
            llm.generate([[1] * tokens], SamplingParams(max_tokens=1))
            assert torch.get_num_threads() == 3
        llm.model = lambda batch, pool: 1 / 0
        with pytest.raises(ZeroDivisionError):
            llm.generate([[1]])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1, 3, 3]


@pytest.mark.parametrize("module", ["nanoserve", "cli", "bench"])
def test_how_threads_wait_is_decided_before_torch_is_loaded(module):
    """libgomp reads its environment once."""
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ["GOMP_SPINCOUNT"])
sys.meta_path.insert(0, Watch())
import {module}"""
    for given, expected in ((None, "10000"), ("77", "77")):
        env = {"PATH": "", "HOME": "/"} | ({"GOMP_SPINCOUNT": given} if given else {})
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env=env)
        assert done.stdout.splitlines()[:1] == [expected], done.stderr


def test_a_device_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match="no device 'abacus' here: use auto, cpu"):
        device.find_device("abacus")
    assert device.find_device("cpu") == torch.device("cpu")
