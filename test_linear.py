"""How we know that products are right, and that threads and types are chosen by reason. (Read beside linear.py, device.py.)"""

import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import device
import linear
import nanoserve
from linear import Part, pack
from nanoserve import LLM, SamplingParams
from reference import (FAMILIES, LLAMA, as_int8, compressed_tensors, dequantised, in_8_bits, plain, tensors_of,
                       write_checkpoint)

HERE = Path(__file__).parent
HAS_TRITON = device.load_triton() is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.parametrize("packed", [True, False])
def test_numbers_in_the_middle_between_two_steps_go_to_the_even_one(poisoned, packed):
    """With 127 as the largest a step is 1, and the identity shows what became of each number."""
    numbers = torch.cat([torch.arange(-127, 127.1, 0.5), torch.tensor([0.49999997, -0.49999997, 126.49999, -1e-30])])
    numbers = torch.stack([numbers, -numbers, torch.zeros_like(numbers)])
    identity = Part(torch.eye(numbers.shape[1], dtype=torch.int8), None, torch.ones(numbers.shape[1], 1))
    part = pack(identity, torch.float32) if packed else identity
    np.testing.assert_array_equal(linear.linear(numbers, part).numpy(), np.rint(numbers.numpy()))


@pytest.mark.parametrize("dtype, outputs", [(torch.float32, 700), (torch.bfloat16, 1400), (torch.int8, 2800)])
def test_few_rows_of_a_large_weight_are_filled_up_and_get_their_own_products(poisoned, dtype, outputs):
    """One or two rows become five, and only theirs come out; nobody's rows are filled up where the weight is small."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((7, 784))).to(torch.float32 if dtype == torch.int8 else dtype)
    plain = Part(torch.from_numpy(rng.standard_normal((outputs, 784))).to(x.dtype), torch.from_numpy(rng.standard_normal(outputs)).to(x.dtype))
    part = pack(linear.quantize(plain, "int8" if dtype == torch.int8 else None), x.dtype)
    if not part.weight.is_mkldnn:
        pytest.skip("this processor has no packed product of the type")
    expected = x.double().numpy() @ plain.weight.double().numpy().T + plain.bias.double().numpy()
    for rows in range(7):
        found = linear.linear(x[:rows], part)
        assert found.shape == (rows, outputs)
        np.testing.assert_allclose(found.double().numpy(), expected[:rows], atol={torch.float32: 1e-4, torch.bfloat16: 0.6, torch.int8: 2.0}[dtype])
        filled = linear.enough_rows(x[:rows], part)
        assert len(filled) == (5 if 0 < rows < 3 else rows) and torch.equal(filled[:rows], x[:rows]) and not filled[rows:].any()
    assert len(linear.enough_rows(x[:1], Part(torch.zeros(600, 784)))) == 1


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
    assert (llm.dtype, llm.dtype_reason, llm.pool.memory[0].dtype) == ("bfloat16", "because", torch.bfloat16)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    assert (llm.dtype, llm.dtype_reason) == ("float32", "as asked") and len(asked) == 1


def test_a_small_step_takes_one_thread_and_gives_the_others_back(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, LLAMA, tensors_of(LLAMA))
    llm, threads, before = LLM(tmp_path, device="cpu"), [], torch.get_num_threads()
    run, products = type(llm.model).__call__, LLAMA["intermediate_size"] * LLAMA["hidden_size"]

    def watched(model, batch, pool):
        threads.append(torch.get_num_threads())
        return run(model, batch, pool)
    monkeypatch.setattr("model.Model.__call__", watched)
    monkeypatch.setattr("model.SINGLE_THREAD", 9 * products)
    torch.set_num_threads(3)
    try:
        for tokens in (1, 8, 9, 20):
            llm.generate([[1] * tokens], SamplingParams(max_tokens=1))
            assert torch.get_num_threads() == 3
        monkeypatch.setattr("model.Model.__call__", lambda model, batch, pool: 1 / 0)
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
            print(os.environ["GOMP_SPINCOUNT"], flush=True)
            os._exit(0)   # all is said
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


# ---------------------------------------------------------------------------------------------
# 8-bit products on a CPU

INT8, FP8 = torch.int8, torch.float8_e4m3fn
HAS_VNNI = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
ways = st.sampled_from(["packed", "portable"] if HAS_VNNI else ["portable"])
widths = st.one_of(st.integers(1, 140), st.integers(1000, 4200), st.sampled_from([1024, 1025, 2049, 4100]))   # of rows and weights


def packed(way, part):
    """In oneDNN's order, or as a processor without VNNI keeps it."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "portable":
            patch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        made = pack(part, torch.float32)
    assert made.weight.is_mkldnn == (way == "packed")
    return made


def in_127_steps(x):
    """The definition: whole numbers, int64, and a scale for each row, float32. Rows of zeros have the scale 0."""
    x = x.float().numpy()
    scale = np.abs(x).max(1, keepdims=True, initial=0) / np.float32(127)
    return np.rint(x / np.where(scale > 0, scale, 1)).astype(np.int64), scale


def uneven(rng, rows, columns):
    """Rows that differ a millionfold, one of them zeros, and one with an element far above the others."""
    x = rng.standard_normal((rows, columns)) * 10 ** rng.uniform(-4, 2, (rows, 1))
    if rows:
        x[rng.integers(rows)] = 0
        x[rng.integers(rows), rng.integers(columns)] = 1e6
    return torch.from_numpy(x)


@settings(max_examples=80)
@given(way=ways, rows=st.integers(0, 70), inputs=widths, outputs=st.integers(1, 60), biased=st.booleans(), stored=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_an_int8_product_on_a_cpu_is_the_definition(poisoned, way, rows, inputs, outputs, biased, stored, dtype, seed):
    rng = np.random.default_rng(seed)
    x, bias = uneven(rng, rows, inputs).to(dtype), torch.from_numpy(rng.standard_normal(outputs)).to(dtype) if biased else None
    if stored:   # some have -128 as well
        weight = torch.from_numpy(rng.integers(-128, 128, (outputs, inputs))).to(INT8)
        part = Part(weight, bias, torch.from_numpy(10 ** rng.uniform(-4, 0, (outputs, 1))).float())
        w, w_scale = weight.long().numpy(), part.scale.numpy()
    else:
        plain = uneven(rng, outputs, inputs).to(dtype)
        w, w_scale = in_127_steps(plain)
        part = linear.quantize(Part(plain, bias), "int8")
        plain.fill_(torch.nan)   # the plain weight may be let go
        assert part.weight.dtype == INT8 and (part.weight.numpy() == w).all()
        assert part.scale.dtype == torch.float32 and (part.scale.numpy() == w_scale).all()
    made = packed(way, part)
    if way == "packed":
        part.weight.fill_(99)
    q, scale = in_127_steps(x)
    terms = (q @ w.T).astype(np.float64) * scale * w_scale.T.astype(np.float64)
    b = bias.double().numpy() if biased else np.zeros(outputs)
    y = linear.linear(x, made)
    assert y.dtype == dtype and y.shape == (rows, outputs) and y.is_contiguous()
    size = np.abs(terms) + np.abs(b)
    assert (np.abs(y.double().numpy() - (terms + b)) <= size * 3e-7 + np.abs(terms + b) * (2 ** -8 if dtype == torch.bfloat16 else 0)).all()


@settings(max_examples=80)
@given(way=ways, rows=st.integers(1, 40), inputs=widths, outputs=st.integers(1, 60),
       kind=st.sampled_from(["any", "largest", "lowest", "alternating"]), seed=st.integers(0, 99))
def test_whole_numbers_are_multiplied_exactly(poisoned, way, rows, inputs, outputs, kind, seed):
    """All scales are 1. Pairs of the largest products overflow 16 bits, and beyond 1,024 columns floats would round."""
    rng = np.random.default_rng(seed)
    low, high = {"any": (-127, 128), "largest": (125, 128), "lowest": (-127, -125), "alternating": (125, 128)}[kind]
    x, w = rng.integers(low, high, (rows, inputs)), rng.integers(*((-128, 128) if kind == "any" else (-128, -125)), (outputs, inputs))
    if kind == "alternating":   # what has become large becomes small again
        x[:, inputs // 2:] *= -1
    x[np.arange(rows), rng.integers(inputs, size=rows)] = 127
    y = linear.linear(torch.from_numpy(x).float(), packed(way, Part(torch.from_numpy(w).to(INT8), None, torch.ones(outputs, 1))))
    assert (y.numpy() == (x @ w.T).astype(np.float32)).all()


@settings(max_examples=40)
@given(rows=st.integers(1, 70), inputs=widths, outputs=st.integers(1, 60), biased=st.booleans(), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]), data=st.data())
def test_a_row_in_int8_has_the_same_bits_in_any_company(poisoned, rows, inputs, outputs, biased, seed, dtype, bad, data):
    rng = np.random.default_rng(seed)
    part = linear.quantize(Part(uneven(rng, outputs, inputs).float(), torch.randn(outputs, dtype=dtype) if biased else None), "int8")
    x = uneven(rng, rows, inputs).to(dtype)
    results = []
    for way in ["packed", "portable"] if HAS_VNNI else ["portable"]:
        made = packed(way, part)
        together = linear.linear(x, made)
        results.append(together)
        at = data.draw(st.integers(0, rows - 1))
        some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1))
        assert torch.equal(linear.linear(x[at:at + 1], made), together[at:at + 1])
        assert torch.equal(linear.linear(x[some], made), together[some])
        harmed = x.clone()
        harmed[at, data.draw(st.integers(0, inputs - 1))] = bad
        y, others = linear.linear(harmed, made), [row for row in range(rows) if row != at]
        assert not y[at].isfinite().any() and torch.equal(y[others], together[others])
        zeros = linear.linear(torch.zeros_like(x), made)
        assert torch.equal(zeros, (part.bias if biased else torch.zeros(outputs, dtype=dtype)).expand(rows, -1))
    torch.testing.assert_close(results[0], results[-1], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_weight_of_many_rows_is_quantised_in_pieces_as_in_one(quantization):
    weight = uneven(np.random.default_rng(0), 2100, 5).float()
    whole = linear.quantize(Part(weight), quantization)
    rows = [linear.quantize(Part(row[None]), quantization) for row in weight]
    numbers, scales = torch.cat([row.weight for row in rows]), torch.cat([row.scale for row in rows])
    assert torch.equal(whole.weight.view(torch.uint8), numbers.view(torch.uint8)) and torch.equal(whole.scale, scales)
    part = Part(weight)
    assert linear.quantize(part, None) is part


E4M3 = np.array([m / 8 * 2 ** -6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])


@settings(max_examples=60)
@given(rows=st.integers(0, 20), inputs=st.one_of(st.integers(1, 140), st.sampled_from([128, 256, 300])), outputs=st.integers(1, 60),
       biased=st.booleans(), stored=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_fp8_on_a_cpu_is_the_widened_product(poisoned, rows, inputs, outputs, biased, stored, dtype, seed):
    rng = np.random.default_rng(seed)
    bias = torch.from_numpy(rng.standard_normal(outputs)).to(dtype) if biased else None
    if stored:   # a scale per row, or per row and 128 columns
        part = random_part(rng, outputs, inputs, FP8, rng.choice([1, -(-inputs // 128)]), False)
        part = Part(part.weight.cpu(), bias, part.scale.cpu())
        byte = part.weight.view(torch.uint8).numpy()
        meant = np.where(byte < 128, 1, -1) * E4M3[byte & 0x7F] * part.scale.numpy().repeat(128 if part.scale.shape[1] > 1 else inputs, 1)[:, :inputs]
    else:
        weight = uneven(rng, outputs, inputs).to(dtype)
        part = linear.quantize(Part(weight, bias), "fp8")
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        scaled = (weight.float() / torch.where(scale > 0, scale, 1.0)).double().numpy()
        distance = np.abs(np.abs(scaled)[..., None] - E4M3)
        assert torch.equal(part.scale, scale)
        number = part.weight.double().numpy()   # one of the nearest
        assert (np.abs(number - scaled) == distance.min(-1)).all()
        meant = number * scale.double().numpy()
    x = uneven(rng, rows, inputs).to(dtype)
    widened = torch.from_numpy(meant).float().to(dtype)
    made = pack(part, dtype)
    assert made.scale is None
    assert torch.equal(linear.linear(x, made), linear.linear(x, pack(Part(widened, bias), dtype)))


def test_a_part_without_a_scale_is_not_widened():
    part = Part(torch.ones(2, 2))
    assert linear.widen(part, torch.bfloat16) is part


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_weights_give_the_logits_of_int8_weights(tmp_path, name):
    """And leave the embedding and the norms as they are, also where the head is tied to the embedding."""
    config = FAMILIES[name]
    tensors = tensors_of(config)
    ids = torch.randint(61, (110,), generator=torch.Generator().manual_seed(4)).tolist()
    llm = LLM(write_checkpoint(tmp_path, config, tensors), dtype="float32", quantization="int8")
    expected = plain(config, as_int8(tensors), ids)
    error_T = (llm.logits(ids).double().cpu() - expected).abs().amax(-1) / expected.abs().max()
    assert error_T.median() < 1e-4 and error_T.max() < 0.1, "now and then a number in a row is rounded to the other side"
    for part, stored in (("embedding", "embed_tokens.weight"), ("final_norm", "norm.weight")):
        stored = {"embedding": "wte.weight", "final_norm": "ln_f.weight"}[part] if config["model_type"] == "gpt2" else "model." + stored
        assert torch.equal(llm.model.weights[part][0].weight.cpu(), tensors[stored])
    for part in ("qkv", "out", "up", "down", "head"):
        assert all(p.scale is not None for p in llm.model.weights[part]), part


def test_fp8_weights_give_the_logits_of_fp8_weights(tmp_path):
    tensors, ids = tensors_of(LLAMA), list(range(60))
    llm = LLM(write_checkpoint(tmp_path, LLAMA, tensors), device="cpu", dtype="float32", quantization="fp8")
    expected = plain(LLAMA, dequantised(in_8_bits(tensors, compressed_tensors("float"), but=[])), ids)
    assert (llm.logits(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_quantization_that_cannot_be_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(nanoserve, "load_weights", None)
    write_checkpoint(tmp_path / "plain", LLAMA, tensors_of(LLAMA))
    for wrong in ("int4", "INT8", "", 8, torch.int8):
        with pytest.raises(ValueError, match=f"^quantization {re.escape(repr(wrong))} is not supported: use int8 or fp8$"):
            LLM(tmp_path / "plain", quantization=wrong)
    for kind, stored in (("int", "int8"), ("float", "fp8")):
        folder = write_checkpoint(tmp_path / kind, LLAMA | dict(quantization_config=compressed_tensors(kind)), {})
        for asked in ("int8", "fp8"):
            words = f"{folder} is stored in {stored} already: leave quantization out"
            with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
                LLM(folder, quantization=asked)
        assert cli.main(["--model", str(folder), "--prompt", "x", "--quantization", "int8"]) == 2
        assert words in (err := capfd.readouterr().err) and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# 8-bit products on a GPU, or in Triton's interpreter

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton for this platform")


def groups_of(x, G):
    """[R, E] as [R, G, columns], the last group filled up with zeros."""
    width = 128 if G > 1 else x.shape[1]
    return torch.nn.functional.pad(x, (0, G * width - x.shape[1])).unflatten(1, (G, width))


def quantized(x, dtype, G):
    """The definition: bytes [R, E] and scales [R, G], from a largest number of each group."""
    scale = groups_of(x.float(), G).abs().amax(-1) / (127 if dtype == INT8 else 448)
    q = groups_of(x.float(), G) / torch.where(scale > 0, scale, 1.0)[..., None]
    return (q.round() if dtype == INT8 else q).to(dtype).flatten(1)[:, :x.shape[1]].contiguous(), scale


def multiplied(q, scale, part):
    """Integers multiplied in int64, or e4m3 in float64, then scaled: the product, and what its terms amount to."""
    G, exact = scale.shape[1], torch.int64 if q.dtype == INT8 else torch.float64
    sums = torch.einsum("tgc,ogc->tog", groups_of(q.to(exact), G), groups_of(part.weight.cpu().to(exact), G))
    terms = sums.double() * scale.double()[:, None] * part.scale.cpu().double()
    bias = part.bias.cpu().double() if part.bias is not None else torch.zeros(())
    return terms.sum(-1) + bias, terms.abs().sum(-1) + bias.abs()


def random_part(rng, out, inputs, dtype, G, biased, x_dtype=torch.float32):
    """Every byte that is a number may be in the weight; scales of rows and groups differ a hundredfold."""
    byte = torch.from_numpy(rng.integers(0, 256, (out, inputs), dtype=np.uint8))
    byte[byte & 0x7F == 0x7F] = 1   # NaN in e4m3; -1 and 127 are missing in int8
    scale = torch.from_numpy(10 ** rng.uniform(-4, -2, (out, G))).float()
    bias = torch.from_numpy(rng.standard_normal(out)).to(x_dtype).to(DEVICE) if biased else None
    return Part(byte.view(dtype).to(DEVICE), bias, scale.to(DEVICE))


def rounding(y, dtype):
    """What it may change to be stored in this type. (The interpreter cuts off what bfloat16 has no room for.)"""
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8 if DEVICE == "cuda" else 7}[dtype]
    return y.abs() * 2.0 ** -bits + (2 ** -25 if dtype == torch.float16 else 0)


@contextmanager
def fences(patch):
    """Every torch.empty lies between fences; who writes on one is seen."""
    empty, made = torch.empty, []

    def fenced(*shape, dtype=torch.float32, device=DEVICE):
        size = int(np.prod(shape)) * dtype.itemsize
        memory = empty(size + 2048, dtype=torch.uint8, device=device).fill_(0xA5)
        made.append((memory, size))
        return memory[1024:1024 + size].view(dtype).view(shape)
    patch.setattr(torch, "empty", fenced)
    yield
    assert made and all((memory[:1024] == 0xA5).all() and (memory[1024 + size:] == 0xA5).all() for memory, size in made)


tokens = st.one_of(st.just(1), st.integers(2, 33), st.integers(34, 70))
sizes = st.one_of(st.integers(1, 140), st.integers(1, 1200), st.sampled_from([128, 256, 512, 513, 1024]))


@needs_triton
@settings(max_examples=40)
@given(rows=tokens, inputs=sizes, out=st.integers(1, 140), dtype=st.sampled_from([INT8, FP8]), grouped=st.booleans(),
       biased=st.booleans(), x_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
       instruction=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99))
def test_an_8_bit_product_on_a_gpu_is_the_definition(rows, inputs, out, dtype, grouped, biased, x_dtype, instruction, strided, seed):
    rng = np.random.default_rng(seed)
    G = -(-inputs // 128) if grouped else 1
    part = random_part(rng, out, inputs, dtype, G, biased, x_dtype)
    x = torch.from_numpy(rng.standard_normal((rows, inputs + 3 * strided)) * 10 ** rng.uniform(-2, 1, (rows, 1))).to(x_dtype)[:, :inputs]
    x[rng.integers(rows)] = 0
    x[rng.integers(rows), rng.integers(inputs)] = 2000
    expected, size = multiplied(*quantized(x, dtype, G), part)
    with pytest.MonkeyPatch.context() as patch, fences(patch):
        if DEVICE == "cpu":   # both ways to widen, without and with the instruction
            patch.setattr(linear.tl.target_info, "cuda_capability_geq", lambda *version: instruction)
        y = linear.linear_triton(x.to(DEVICE), part)
    assert y.dtype == x_dtype and y.shape == (rows, out)
    error = (y.cpu().double() - expected).abs()
    assert (error <= size * (1e-6 if dtype == INT8 else 1e-5) + rounding(expected, x_dtype)).all()


@needs_triton
@settings(max_examples=80)
@given(rows=st.integers(0, 5), inputs=sizes, dtype=st.sampled_from([INT8, FP8]), grouped=st.booleans(),
       x_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), spread=st.integers(0, 8), seed=st.integers(0, 99))
def test_rows_become_the_nearest_bytes(rows, inputs, dtype, grouped, x_dtype, spread, seed):
    rng = np.random.default_rng(seed)
    G = -(-inputs // 128) if grouped else 1
    x = torch.from_numpy(rng.standard_normal((rows, inputs)) * 10 ** rng.uniform(-spread / 2, 0, (rows, inputs))).to(x_dtype)
    if rows:
        x[rng.integers(rows)] = 0
        x[rng.integers(rows)] = torch.from_numpy(rng.integers(-254, 255, inputs) / 2)   # halves are ties
        x[rng.integers(rows), rng.integers(inputs)] = 127
    q, scale = linear.quantize_rows_triton(x.to(DEVICE), dtype, G)
    expected_q, expected_scale = quantized(x, dtype, G)
    assert q.dtype == dtype and torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(q.cpu().view(INT8), expected_q.view(INT8))


def test_all_bytes_of_e4m3_are_found_and_read():
    """Both directions, by hand where PyTorch could be wrong, too: 1 sign, 4 bits of exponent, 3 of mantissa."""
    if not HAS_TRITON:
        pytest.skip("no Triton for this platform")
    magnitude = [m / 8 * 2 ** -6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
    numbers = torch.tensor(magnitude + [-m for m in magnitude])
    x = numbers[None].to(DEVICE)
    q, scale = linear.quantize_rows_triton(x, FP8)
    assert scale.item() == 1 and q.view(torch.uint8)[0].tolist() == [*range(127), *range(128, 255)]
    for instruction in (False, True) if DEVICE == "cpu" else (True,):
        with pytest.MonkeyPatch.context() as patch:
            if DEVICE == "cpu":
                patch.setattr(linear.tl.target_info, "cuda_capability_geq", lambda *version: instruction)
            one = torch.zeros(1, len(numbers), device=DEVICE)
            one[0, 0] = 448.0
            weight = torch.zeros(len(numbers), len(numbers))
            weight[:, 0] = numbers
            y = linear.linear_triton(one, Part(weight.to(FP8).to(DEVICE), None, torch.ones(len(numbers), 1, device=DEVICE)))
        assert torch.equal(y[0].cpu(), numbers * 448)


@needs_triton
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows", [5, 20, 40])
def test_rows_that_are_not_finite_harm_nobody_else(poisoned, dtype, grouped, rows):
    rng = np.random.default_rng(0)
    part = random_part(rng, 50, 300, dtype, 3 if grouped else 1, True)
    x = torch.from_numpy(rng.standard_normal((rows, 300))).float().to(DEVICE)
    alone = linear.linear_triton(x, part)
    x[1, 299], x[2, 0], x[rows - 1, 150] = torch.nan, torch.inf, -torch.inf
    y = linear.linear_triton(x, part)
    others = [0, *range(3, rows - 1)]
    assert y[[1, 2, rows - 1]].isnan().all() and torch.equal(y[others], alone[others])


@needs_triton
def test_a_row_of_tiny_numbers_is_zero():
    """A scale below the smallest normal number would have lost its bits."""
    part = random_part(np.random.default_rng(0), 9, 20, FP8, 1, False)
    x = torch.full((2, 20), 1e-39, device=DEVICE)
    assert (linear.linear_triton(x, part) == 0).all()


@needs_triton
@pytest.mark.parametrize("rows, inputs, out, dtype, biased", [   # of what PyTorch's product accepts
    (67, 592, 144, INT8, True), (40, 16, 16, INT8, False), (34, 272, 64, INT8, True), (66, 640, 16, FP8, False), (35, 144, 160, FP8, True)])
def test_integers_give_the_same_bits_in_any_company(rows, inputs, out, dtype, biased):
    """By either kernel and by PyTorch's product, in tiles of few rows and of many. With FP8, up to rounding."""
    rng = np.random.default_rng(inputs)
    part = random_part(rng, out, inputs, dtype, 1, biased, torch.bfloat16)
    x = torch.from_numpy(rng.standard_normal((rows, inputs))).bfloat16().to(DEVICE)
    calls = []

    def by_torch(x, part):
        calls.append(len(x))
        return True
    expected, size = multiplied(*quantized(x.cpu(), dtype, 1), part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "torch_multiplies", lambda x, part: False)
        kernel = linear.linear_triton(x, part)
        few = torch.cat([linear.linear_triton(some, part) for some in x.split([1, 2, 20, rows - 23])])
        if DEVICE == "cpu" or dtype == INT8 or torch.cuda.get_device_capability() >= (8, 9):
            patch.setattr(linear, "torch_multiplies", by_torch)
            of_torch = linear.linear_triton(x, part)
            assert calls == [rows]
        else:
            of_torch = kernel
    if dtype == INT8:
        assert torch.equal(few, kernel) and torch.equal(of_torch, kernel)
    for y in (few, kernel, of_torch):
        error = (y.cpu().double() - expected).abs()
        assert (error <= size * 1e-5 + 2 * rounding(expected, torch.bfloat16)).all()


@needs_triton
def test_pytorch_multiplies_what_it_can(monkeypatch):
    class Rows:
        def __init__(self, T, dtype=torch.bfloat16):
            self.T, self.dtype, self.device, self.is_cuda = T, dtype, "cuda", True

        def __len__(self):
            return self.T

    def can(x, out=64, inputs=64, dtype=FP8, G=1):
        return linear.torch_multiplies(x, Part(torch.empty(out, inputs).to(dtype), None, torch.empty(out, G)))
    capability = (8, 9)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can(Rows(33)) and can(Rows(33), dtype=INT8) and can(Rows(33), 8, 24, INT8)
    assert not can(torch.empty(99, 64, dtype=torch.bfloat16)), "on a CPU"
    assert not can(Rows(32)) and not can(Rows(32), dtype=INT8)
    assert not can(Rows(33), 65) and not can(Rows(33), inputs=72) and not can(Rows(33), 60, 64, INT8) and not can(Rows(33), 64, 60, INT8)
    assert not can(Rows(33), inputs=256, G=2) and not can(Rows(33), inputs=256, G=2, dtype=INT8)
    assert not can(Rows(33, torch.float32)) and can(Rows(33, torch.float32), dtype=INT8)
    capability = (8, 6)
    assert not can(Rows(33)) and can(Rows(33), dtype=INT8)


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_graph_replays_8_bit_products(dtype, rows):
    part = random_part(np.random.default_rng(0), 256, 512, dtype, 1, True, torch.bfloat16)
    x = torch.randn(rows, 512, device=DEVICE, dtype=torch.bfloat16)
    linear.linear_triton(x, part)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear.linear_triton(x, part)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, linear.linear_triton(x, part))


@pytest.mark.skipif(not HAS_TRITON or sys.platform != "linux", reason="compiles for NVIDIA's GPUs")
@pytest.mark.compiles("""
import bench, kernels
kernels.load_triton()
found = []
for kind in bench.BYTES:   # split in four, in two, for 32 rows, for many, and sizes that are no multiples
    for rows, out, inputs in ((1, 64, 2048), (16, 2048, 2048), (32, 256, 2048), (512, 256, 2048), (5, 33, 1001)):
        found += bench.compile_launches(lambda: bench.launch_products(kind, rows, out, inputs), 80)
found += bench.compile_launches(lambda: bench.launch_products("int8", 64, 64, by_torch=True), 80)
assert {c["kernel"] for c in found} == {"quantize_rows", "product", "scale"}
for c in found:
    assert c["spills"] == 0 and c["programs"] >= 1, c
    assert (c["units"] == "-") == (c["kernel"] != "product"), c""")
def test_8_bit_products_compile_without_spills(compiled):
    """The program checks it."""
