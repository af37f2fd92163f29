"""A token's experts are its own, whoever else is in the batch. (Read it beside experts.py.)"""

import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import bench
import checkpoint
import cli
import config
import experts
import linear
import roofline
from config import Experts, Fields
from experts import choose_experts, mixture, sort_visits
from linear import Part, linear_experts, linear_experts_triton, pack_experts
from nanoserve import LLM, SamplingParams
from reference import (DEEPSEEK_V2_MOE, DEEPSEEK_V3_MOE, EXPERTS, MIXTRAL, QWEN3_MOE, NEW, as_int8, compressed_tensors, dequantised,
                       fp8_blocks, in_8_bits, mlp_shapes, plain, plain_choice, plain_greedy, plain_mixture, random_tensors, silu,
                       tensors_of, write_checkpoint)
from test_linear import DEVICE, FP8, HERE, INT8, multiplied, needs_triton, quantized, random_part, rounding
from test_nanoserve import BUSY, arrivals, assert_tokens_do_not_depend_on_company, engine_options

CPU = torch.device("cpu")
NONE = Experts(layers={0}, X=1, C=1, I=8, names=("mlp", "gate_proj", "up_proj", "down_proj"), normalised=False)


# ---------------------------------------------------------------------------------------------
# Choosing and sorting

@given(data=st.data(), tokens=st.integers(1, 6), X=st.integers(1, 9), normalised=st.booleans())
def test_a_token_chooses_the_experts_of_the_best_scores_and_among_equals_the_first(data, tokens, X, normalised):
    C = data.draw(st.integers(1, X))
    logits = [[data.draw(st.integers(-3, 3)) for _ in range(X)] for _ in range(tokens)]   # with many ties
    weight_TC, expert_TC = choose_experts(torch.tensor(logits).float(), None, replace(NONE, X=X, C=C, normalised=normalised))
    assert weight_TC.dtype == torch.float32
    for row, weights, chosen in zip(logits, weight_TC.tolist(), expert_TC.tolist()):
        assert chosen == sorted(range(X), key=lambda x: (-row[x], x))[:C]
        whole = sum(np.exp(row[x]) for x in (chosen if normalised else range(X)))
        assert weights == pytest.approx([np.exp(row[x]) / whole for x in chosen], rel=1e-5)


def deepseek(change: dict, v3: bool) -> tuple[dict, Experts]:
    """A config, and what is read of it."""
    said = (DEEPSEEK_V3_MOE if v3 else DEEPSEEK_V2_MOE) | change
    raw = config.with_what_is_left_out(Fields(Path("config.json"), said), said["model_type"])
    return said, config.read_experts(raw, said["model_type"], said["num_hidden_layers"])


@given(data=st.data(), v3=st.booleans(), greedy=st.booleans(), groups=st.integers(1, 4), size=st.integers(2, 4), seed=st.integers(0, 999))
def test_a_token_chooses_groups_first_and_corrections_are_in_no_weight(data, v3, greedy, groups, size, seed):
    top = data.draw(st.integers(1, groups))
    C = data.draw(st.integers(1, top * size))
    said, e = deepseek(dict(n_routed_experts=groups * size, n_group=groups, topk_group=top, num_experts_per_tok=C,
                            topk_method="noaux_tc" if v3 else "greedy" if greedy else "group_limited_greedy",
                            norm_topk_prob=v3 and data.draw(st.booleans())), v3)
    rng = np.random.default_rng(seed)
    logits, corrections = rng.normal(0, 2, (5, e.X)), rng.normal(0, 0.5, e.X) if v3 else None
    correction_X = torch.tensor(corrections).float() if v3 else None
    weight_TC, expert_TC = choose_experts(torch.tensor(logits).float(), correction_X, e)
    for row, weights, chosen in zip(logits, weight_TC.tolist(), expert_TC.tolist()):
        expected = plain_choice(said, row.tolist(), corrections.tolist() if v3 else None)
        assert dict(zip(chosen, weights)) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_of_equal_groups_and_equal_experts_the_first_are_chosen():
    for v3 in (False, True):
        _, e = deepseek({}, v3)
        _, expert_TC = choose_experts(torch.zeros(1, e.X), torch.zeros(e.X) if v3 else None, e)
        assert expert_TC.tolist() == [[0, 1, 2]]
        logits = torch.tensor([[0, 0, 0, 5, 5, 0, 5, 5, 0, 5, 5, 0]]).float()   # three equal groups, of which two are chosen
        assert choose_experts(logits, torch.zeros(e.X) if v3 else None, e)[1].tolist() == [[3, 4, 6]]


def test_a_group_is_as_good_as_its_best_expert_or_its_two_best():
    logits = torch.tensor([[9.0, -9, -9, 4, 4, -9, 3, 3, 3, -9, -9, -9]])
    _, v2 = deepseek(dict(topk_group=1), False)
    assert choose_experts(logits, None, v2)[1].tolist() == [[0, 1, 2]]
    _, v3 = deepseek(dict(topk_group=1), True)
    assert choose_experts(logits, torch.zeros(12), v3)[1].tolist() == [[3, 4, 5]]


visits = st.integers(1, 9).flatmap(lambda X: st.tuples(st.just(X), st.integers(1, 4).flatmap(
    lambda C: st.lists(st.lists(st.integers(0, X - 1), min_size=C, max_size=C), min_size=1, max_size=20))))


@given(visits=visits)
def test_every_visit_is_at_its_expert_and_none_is_lost(visits):
    X, choices = visits
    order_R, starts_X = sort_visits(torch.tensor(choices), X)
    starts, flat = starts_X.tolist(), [x for row in choices for x in row]
    assert len(starts) == X + 1 and starts[0] == 0 and starts[-1] == len(flat)
    assert sorted(order_R.tolist()) == list(range(len(flat)))
    for x in range(X):
        assert [flat[r] for r in order_R[starts[x]:starts[x + 1]]] == [x] * (starts[x + 1] - starts[x])


def test_the_example_in_the_docstring_is_what_is_computed():
    order_R, starts_X = sort_visits(torch.tensor([[2, 0], [2, 1], [0, 2]]), 4)
    assert f"order_R      {'   '.join(map(str, order_R.tolist()))} " in experts.__doc__
    assert starts_X.tolist() == [0, 2, 3, 6, 6]


# ---------------------------------------------------------------------------------------------
# Multiplying

KINDS = {"float32": None, "int8": INT8, "fp8": FP8, "fp8 blocks": FP8}


def stacked(rng, X, out, inputs, kind):
    """X weights along their rows, and what they stand for, float64 [X, out, inputs]."""
    if kind == "float32":
        part = Part(torch.from_numpy(rng.standard_normal((X * out, inputs))).float().to(DEVICE))
    else:
        part = random_part(rng, X * out, inputs, KINDS[kind], -(-inputs // 128) if "blocks" in kind else 1, False)
    return part, linear.widen(part, torch.float64).weight.cpu().double().unflatten(0, (X, out))


@settings(max_examples=60)
@given(visits=visits, kind=st.sampled_from(list(KINDS)), out=st.integers(1, 40), inputs=st.sampled_from([1, 7, 32, 130, 300]),
       shared=st.booleans(), seed=st.integers(0, 99))
@example(visits=(3, [[1, 1]] * 20), kind="int8", out=40, inputs=32, shared=True, seed=0)    # all at one, none at the others
@example(visits=(1, [[0]]), kind="float32", out=5, inputs=7, shared=False, seed=0)
def test_each_expert_multiplies_its_own_rows(poisoned, visits, kind, out, inputs, shared, seed):
    (X, choices), rng = visits, np.random.default_rng(seed)
    part, meant = stacked(rng, X, out, inputs, kind)
    flat, C = [x for row in choices for x in row], len(choices[0])
    x = torch.from_numpy(rng.standard_normal((len(choices) if shared else len(flat), inputs))).float()
    order_R, starts_X = sort_visits(torch.tensor(choices), X)
    if kind == "int8":
        q, scale = quantized(x, INT8, 1)
        x_meant = q.double() * scale.double()
    else:
        x_meant = x.double()
    expected = torch.stack([meant[e] @ x_meant[r // C if shared else r] for r, e in enumerate(flat)])
    part = Part(part.weight.cpu(), None, None if part.scale is None else part.scale.cpu())
    y = linear_experts(x, pack_experts(part, X, torch.float32), order_R, starts_X)
    size = torch.stack([meant[e].abs() @ x_meant[r // C if shared else r].abs() for r, e in enumerate(flat)])
    assert y.shape == (len(flat), out) and ((y - expected).abs() <= 2e-6 * size + 1e-9).all()


@needs_triton
@settings(max_examples=25)
@given(visits=visits, kind=st.sampled_from(list(KINDS)), out=st.sampled_from([1, 40, 70]), inputs=st.sampled_from([7, 32, 130, 272]),
       shared=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 99))
@example(visits=(3, [[1, 1]] * 40), kind="float32", out=130, inputs=32, shared=True, dtype=torch.float16, seed=0)   # large tiles
@example(visits=(9, [[8]]), kind="float32", out=5, inputs=7, shared=False, dtype=torch.float16, seed=0)
@example(visits=(3, [[1, 0, 1]] * 30), kind="fp8 blocks", out=70, inputs=272, shared=True, dtype=torch.float16, seed=0)
@example(visits=(2, [[1, 0]] * 70), kind="int8", out=70, inputs=144, shared=False, dtype=torch.float32, seed=0)
def test_the_grouped_kernel_is_the_definition(poisoned, visits, kind, out, inputs, shared, dtype, seed):
    (X, choices), rng = visits, np.random.default_rng(seed)
    part, meant = stacked(rng, X, out, inputs, kind)
    if kind == "float32":
        part = Part(part.weight.to(dtype))
        meant = part.weight.cpu().double().unflatten(0, (X, out))
    flat, C, G = [x for row in choices for x in row], len(choices[0]), 1 if part.scale is None else part.scale.shape[1]
    x = torch.from_numpy(rng.standard_normal((len(choices) if shared else len(flat), inputs))).to(dtype)
    order_R, starts_X = sort_visits(torch.tensor(choices, device=DEVICE), X)
    y = linear_experts_triton(x.to(DEVICE), part, order_R, starts_X)
    assert y.dtype == dtype and y.shape == (len(flat), out)
    if kind == "float32":
        products = [(x.double() @ m.T, x.double().abs() @ m.abs().T) for m in meant]
    else:
        q, scale = quantized(x, KINDS[kind], G)
        each = list(zip(part.weight.cpu().float().chunk(X), part.scale.cpu().chunk(X)))
        products = [(multiplied(q.float(), scale, Part(w, None, s))[0], multiplied(q.float().abs(), scale, Part(w.abs(), None, s))[0])
                    for w, s in each]   # and what the terms amount to
    for r, e in enumerate(flat):
        expected, size = (both[r // C if shared else r] for both in products[e])
        assert ((y[r].cpu().double() - expected).abs() <= 2e-6 * size + 2 * rounding(expected, dtype)).all(), (r, e)


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_harms_no_other_visit(kind):
    rng = np.random.default_rng(0)
    part, _ = stacked(rng, 3, 20, 40, kind)
    x = torch.from_numpy(rng.standard_normal((30, 40))).float().to(DEVICE)
    order_R, starts_X = sort_visits(torch.tensor(rng.integers(0, 3, (30, 2)), device=DEVICE), 3)
    alone = linear_experts_triton(x, part, order_R, starts_X)
    x[7, 3] = torch.nan
    y = linear_experts_triton(x, part, order_R, starts_X)
    others = [r for r in range(60) if r // 2 != 7]
    assert torch.equal(y[others], alone[others]) and y[14:16].isnan().all()


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
def test_a_graph_replays_a_mixture_whoever_is_chosen():
    (up, _), (down, _) = stacked(np.random.default_rng(0), 8, 64, 128, "float32"), stacked(np.random.default_rng(1), 8, 128, 32, "float32")
    x, router = torch.randn(20, 128, device=DEVICE), Part(torch.randn(8, 128, device=DEVICE), torch.rand(8, device=DEVICE))
    e = replace(NONE, X=8, C=2, groups=4, top_groups=2, scoring="sigmoid", corrected=True, ranked_by=2)

    def step():
        return mixture(x, dict(router=[router], up=[up], down=[down]), 0, e, silu)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, step())


@pytest.mark.skipif(linear.load_triton() is None or sys.platform != "linux", reason="compiles for NVIDIA's GPUs")
@pytest.mark.compiles("""
import bench, kernels
kernels.load_triton()
for kind in ("bfloat16", "float32", *bench.BYTES):   # few rows per expert, many, and sizes that are no multiples
    for sizes in (16,), (512,), (5, 3, 33, 1001):
        for c in bench.compile_launches(lambda: bench.launch_experts(kind, *sizes), 80):
            assert c["spills"] == 0 and c["programs"] >= 1, c
            assert (c["units"] == "-") == (c["kernel"] != "experts" or kind == "float32"), c""")
def test_the_grouped_kernel_compiles_without_spills(compiled):
    """The program checks it."""


# ---------------------------------------------------------------------------------------------
# A mixture, alone and in models

@pytest.mark.parametrize("v3, change", [(False, {}), (True, {}), (False, dict(topk_method="greedy", n_shared_experts=0)),
                                        (True, dict(n_group=1, topk_group=1, n_shared_experts=1)), (True, dict(norm_topk_prob=False))])
@pytest.mark.parametrize("way", ["each for itself", pytest.param("one launch", marks=needs_triton)])
def test_a_layer_of_deepseeks_is_what_its_experts_make_of_each_token(monkeypatch, v3, change, way):
    """Loaded as any model's parts are."""
    said, e = deepseek(change, v3)
    c = replace(config.read_config(HERE / "demo/llama"), L=3, E=32, I=48, H=4, K=4, D=8, V=11, experts=e)
    shapes = {f"layers.1.{name}.weight": shape for name, shape in mlp_shapes(said, 1).items()}
    w = random_tensors(shapes | {"layers.1.mlp.gate.e_score_correction_bias": (12,)} if v3 else shapes)
    planned = {name: shape for part, weights, biases in checkpoint.plan_parts(c) for name, shape in weights + biases}
    assert {name: tuple(tensor.shape) for name, tensor in w.items()}.items() <= planned.items()
    if way == "one launch":
        monkeypatch.setattr(linear, "has_kernels", lambda device: True)
    parts = checkpoint.make_parts(c, torch.device(DEVICE), torch.float32, None, lambda name, shape: w.get(name, torch.zeros(shape)))
    assert {part: [p is not None for p in parts[part]] for part in ("router", "shared_up") if part in parts} == (
        {part: [False, True, True] for part in ("router", "shared_up")[:1 + (e.shared > 0)]})
    h = torch.randn(9, 32, generator=torch.Generator().manual_seed(5))
    y = mixture(h.to(DEVICE), parts, 1, e, silu).cpu()
    w = {name: tensor.double() for name, tensor in w.items()}

    def mlp(h, at, gate, up, down):
        return silu(h @ w[f"{at}.{gate}.weight"].T) * (h @ w[f"{at}.{up}.weight"].T) @ w[f"{at}.{down}.weight"].T
    expected = plain_mixture(said, w, h.double(), "layers.1.", mlp)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


def test_deepseeks_router_and_its_corrections_stay_in_float32():
    _, e = deepseek({}, True)
    c = replace(config.read_config(HERE / "demo/llama"), L=3, E=32, I=48, H=4, K=4, D=8, V=11, experts=e)
    weights = checkpoint.random_weights(c, CPU, torch.bfloat16, "int8")
    router = weights["router"][2]
    assert router.weight.dtype == router.bias.dtype == torch.float32 and router.scale is None
    assert weights["up"][2][11].scale is not None and weights["shared_down"][2].scale is not None
    weights = checkpoint.random_weights(replace(c, experts=replace(e, precise=False)), CPU, torch.bfloat16)
    assert weights["router"][2].weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_checkpoint(tmp_path_factory.mktemp("experts"), config, tensors_of(config)) for name, config in EXPERTS.items()}


@pytest.mark.parametrize("name", EXPERTS)
def test_logits_equal_a_plain_forward_at_every_position(folders, name):
    ids = torch.randint(61, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = plain(EXPERTS[name], tensors_of(EXPERTS[name]), ids)
    for options in (dict(attention="torch"), dict(attention="naive", block_size=5, max_batched_tokens=37)):
        logits = LLM(folders[name], dtype="float32", **options).logits(ids).double().cpu()
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def alone(folders):
    """As `lone` in conftest.py: for each config its folder, prompts and each one's greedy tokens, by the plain forward;
    with weights or a cache of int8, by an engine that serves nobody else."""
    rng, made = random.Random(3), {}
    common = [rng.randrange(61) for _ in range(50)]
    prompts = [common[:n] + [rng.randrange(61) for _ in range(m)]
               for n, m in [(0, 1), (0, 2), (0, 40), (20, 3), (20, 30), (33, 1), (50, 1), (50, 9), (50, 0)]]
    for name in ("mixtral", "qwen3 moe, some layers dense, biases, a window"):
        said, folder = EXPERTS[name], folders[name]
        made[name] = folder, prompts, [plain_greedy(said, tensors_of(said), p, NEW) for p in prompts]
        for suffix, options in {" int8 weights": dict(quantization="int8"), " int8 kv": dict(kv_cache_dtype="int8"),
                                " int8 weights int8 kv": dict(quantization="int8", kv_cache_dtype="int8")}.items():
            llm = LLM(folder, dtype="float32", attention="torch", num_blocks=30, prefix_cache=False, **options)
            made[name + suffix] = folder, prompts, [
                llm.generate([prompt], SamplingParams(max_tokens=NEW, ignore_eos=True))[0].token_ids for prompt in prompts]
    return made


@settings(max_examples=60)
@given(name=st.sampled_from(["mixtral", "qwen3 moe, some layers dense, biases, a window"]), options=engine_options,
       spare=st.integers(0, 6), arrivals=arrivals, hopeful=st.booleans())
def test_tokens_do_not_depend_on_who_else_has_the_same_experts(alone, name, options, spare, arrivals, hopeful):
    assert_tokens_do_not_depend_on_company(alone, name, "torch", options, spare, arrivals, hopeful)


@needs_triton
@settings(max_examples=1 if DEVICE == "cpu" else 20)
@example(**BUSY)
@given(options=engine_options, spare=st.integers(0, 6), arrivals=arrivals, hopeful=st.booleans())
def test_nor_do_they_where_one_launch_serves_all_experts(alone, options, spare, arrivals, hopeful):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "has_kernels", lambda device: True)
        patch.setattr(checkpoint, "has_kernels", lambda device: True)
        options = options | dict(max_batched_tokens=options["max_batched_tokens"] + 20, quantization=None)
        assert_tokens_do_not_depend_on_company(alone, "mixtral", "triton", options, spare, arrivals[:3], hopeful)


def test_int8_experts_give_the_logits_of_int8_experts(folders):
    ids = list(range(50))
    for name in ("mixtral", "qwen3 moe"):
        llm = LLM(folders[name], dtype="float32", quantization="int8")
        expected = plain(EXPERTS[name], as_int8(tensors_of(EXPERTS[name])), ids)
        error_T = (llm.logits(ids).double().cpu() - expected).abs().amax(-1) / expected.abs().max()
        assert error_T.median() < 1e-3, "now and then a number in a row is rounded to the other side"


@pytest.mark.parametrize("base", [MIXTRAL, QWEN3_MOE])
@pytest.mark.parametrize("said", [fp8_blocks(), compressed_tensors("float"), compressed_tensors("int")])
def test_experts_stored_in_8_bits_give_the_logits_of_what_they_stand_for(tmp_path, base, said):
    inner = dict(intermediate_size=140) if base is MIXTRAL else dict(moe_intermediate_size=140)
    said_of_model = base | dict(hidden_size=148, head_dim=16) | inner
    stored, ids = in_8_bits(tensors_of(said_of_model), said), list(range(40))
    write_checkpoint(tmp_path, said_of_model | dict(quantization_config=said), stored)
    expected = plain(said_of_model, dequantised(stored), ids)
    error_T = (LLM(tmp_path, device="cpu", dtype="float32").logits(ids) - expected).abs().amax(-1) / expected.abs().max()
    if "int" in str(said.get("format")):   # its rows are rounded, too, now and then to the other side
        assert error_T.median() < 1e-3
    else:
        assert error_T.max() < 1e-4


@pytest.mark.parametrize("name", EXPERTS)
def test_random_weights_have_the_shapes_of_loaded_ones(folders, name):
    c = config.read_config(folders[name])

    def shapes(weights):
        return {kind: [[one and one.weight.shape for one in (part if isinstance(part, list) else [part])] for part in parts]
                for kind, parts in weights.items()}
    assert shapes(checkpoint.load_weights(folders[name], c, CPU, torch.float32)) == shapes(checkpoint.random_weights(c, CPU, torch.float32))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to say what its peak was")
def test_loading_experts_needs_little_more_memory_than_one_copy_of_them(tmp_path):
    said = QWEN3_MOE | dict(vocab_size=500, hidden_size=256, moe_intermediate_size=128, num_experts=64, num_hidden_layers=12)
    write_checkpoint(tmp_path, said, tensors_of(said), shards=3)
    weights = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    code = f"""
from pathlib import Path; import torch, checkpoint, config
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
c, before = config.read_config(Path({str(tmp_path)!r})), peak()
checkpoint.LET_GO = 4 << 20   # as these weights are small
weights = checkpoint.load_weights(Path({str(tmp_path)!r}), c, torch.device("cpu"), torch.float32)
print(peak() - before)"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2 ** 17)}
    grown = int(subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, capture_output=True, text=True, check=True).stdout)
    assert weights > 250e6 and 0.95 * weights < grown < 1.4 * weights   # a layer's experts are 1/12 of it, and there twice


def test_a_file_of_thousands_of_small_tensors_is_not_opened_for_each(tmp_path, monkeypatch):
    save_file({f"t{i}": torch.zeros(4) + i for i in range(3000)}, tmp_path / "model.safetensors")
    opened, open_anew = [], checkpoint.Checkpoint._open_anew
    monkeypatch.setattr(checkpoint.Checkpoint, "_open_anew", lambda self, path: opened.append(path) or open_anew(self, path))
    monkeypatch.setattr(checkpoint, "LET_GO", 16 * 1000)
    files = checkpoint.Checkpoint(tmp_path)
    assert [int(files.read(f"t{i}")[0]) for i in range(3000)] == list(range(3000))
    assert len(opened) == 3


# ---------------------------------------------------------------------------------------------
# What a config says

@pytest.mark.parametrize("base, change, expected, more", [
    (MIXTRAL, {}, dict(layers={0, 1}, X=4, C=2, I=48, normalised=True, shared=0, scoring="softmax"), dict(windows=[None] * 2)),
    (MIXTRAL, dict(num_local_experts=None, num_experts_per_tok=None, max_position_embeddings=None), dict(X=8, C=2), dict(context=131072)),
    (MIXTRAL, dict(sliding_window=7, rms_norm_eps=None), {}, dict(windows=[7, 7], eps=1e-5)),
    (QWEN3_MOE, {}, dict(layers={0, 1}, X=7, C=3, I=24, normalised=True, groups=1, factor=1, precise=False), dict(qk_norm=True)),
    (QWEN3_MOE, dict(num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None, norm_topk_prob=None),
     dict(X=128, C=8, I=768, normalised=False), {}),
    (QWEN3_MOE, dict(num_experts=None, num_local_experts=9), dict(X=9), {}),
    (QWEN3_MOE, dict(num_hidden_layers=6, decoder_sparse_step=2), dict(layers={1, 3, 5}), {}),
    (QWEN3_MOE, dict(num_hidden_layers=6, mlp_only_layers=[0, 5, 9]), dict(layers={1, 2, 3, 4}), {}),
    (QWEN3_MOE, dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), {}, dict(windows=[5, 5])),
])
def test_what_a_config_says_of_experts(tmp_path, base, change, expected, more):
    c = config.read_config(write_checkpoint(tmp_path, base | change, {}))
    assert {key: getattr(c.experts, key) for key in expected} == expected and {key: getattr(c, key) for key in more} == more
    assert c.rope["rope_theta"] == (1e6 if base is MIXTRAL else 1e4)


def test_a_model_without_a_layer_of_experts_has_none(tmp_path):
    assert config.read_config(write_checkpoint(tmp_path, QWEN3_MOE | dict(mlp_only_layers=[0, 1]), {})).experts is None
    assert config.read_config(HERE / "demo/llama").experts is None


V2_LITE = dict(n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408, n_group=1, topk_group=1, topk_method="greedy",
               routed_scaling_factor=1.0, num_hidden_layers=27)


@pytest.mark.parametrize("v3, change, expected", [
    (False, V2_LITE, dict(layers=set(range(1, 27)), X=64, C=6, I=1408, groups=1, shared=2816, factor=1.0, normalised=False, precise=True)),
    (False, {}, dict(scoring="softmax", groups=4, top_groups=2, ranked_by=1, corrected=False, factor=1.5)),
    (True, {}, dict(scoring="sigmoid", groups=4, top_groups=2, ranked_by=2, corrected=True, factor=2.5, normalised=True, shared=40)),
    (True, dict.fromkeys(["topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "moe_layer_freq"]),
     dict(scoring="sigmoid", factor=2.5, normalised=True)),
    (True, dict(n_shared_experts=0, first_k_dense_replace=0), dict(shared=0, layers={0, 1, 2})),
    (False, dict(n_shared_experts=None, topk_method=None), dict(shared=0, groups=1, top_groups=1)),
])
def test_what_a_deepseek_says_of_experts(v3, change, expected):
    e = deepseek(change, v3)[1]
    assert {key: getattr(e, key) for key in expected} == expected


@pytest.mark.parametrize("v3, change, words", [
    (False, dict(topk_method="noaux_tc"), ["topk_method", "noaux_tc", "greedy"]), (True, dict(topk_method="greedy"), ["topk_method"]),
    (True, dict(scoring_func="softmax"), ["scoring_func", "softmax", "sigmoid"]), (False, dict(scoring_func=["x"]), ["scoring_func"]),
    (False, dict(norm_topk_prob=True), ["norm_topk_prob", "True"]), (True, dict(moe_layer_freq=2), ["moe_layer_freq", "2"]),
    (True, dict(n_group=5), ["12", "n_group", "5"]), (True, dict(topk_group=5), ["topk_group", "5"]),
    (True, dict(n_group=12), ["n_group"]), (True, dict(num_experts_per_tok=7), ["num_experts_per_tok", "7"]),
    (False, dict(num_experts_per_tok=13, n_group=1, topk_group=1), ["num_experts_per_tok", "13"]),
    (False, dict(num_experts_per_tok=None), ["num_experts_per_tok"]), (False, dict(routed_scaling_factor=0), ["routed_scaling_factor"]),
    (False, dict(first_k_dense_replace="one"), ["first_k_dense_replace", "one"]), (True, dict(n_shared_experts=-1), ["n_shared_experts"]),
])
def test_what_a_deepseek_says_of_experts_and_nobody_supports_is_refused_by_name(v3, change, words):
    with pytest.raises(ValueError) as error:
        deepseek(change, v3)
    assert all(word in str(error.value) for word in ["config.json", *words]), error.value


BROKEN = {
    "more choices than experts": (MIXTRAL, dict(num_experts_per_tok=5), None, "num_experts_per_tok", "5", "4"),
    "experts as text": (QWEN3_MOE, dict(num_experts="many"), None, "num_experts", "many"),
    "no experts": (MIXTRAL, dict(num_local_experts=0), None, "num_local_experts"),
    "dense layers by name": (QWEN3_MOE, dict(mlp_only_layers=["first"]), None, "mlp_only_layers", "first"),
    "an expert is missing": (QWEN3_MOE, {}, "model.layers.1.mlp.experts.6.up_proj.weight", "layers.1.mlp.experts.6.up_proj.weight", "missing"),
    "a router is missing": (MIXTRAL, {}, "model.layers.0.block_sparse_moe.gate.weight", "block_sparse_moe.gate.weight", "missing"),
    "an expert too many": (QWEN3_MOE, dict(num_experts=6), None, "mlp.gate.weight", "[7, 32]", "[6, 32]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_experts_are_refused_in_one_sentence_that_names_them(tmp_path, capfd, name):
    base, change, lacks, *words = BROKEN[name]
    tensors = {key: tensor for key, tensor in tensors_of(base).items() if key != lacks}
    write_checkpoint(tmp_path, base | change, tensors)
    assert cli.main(["--model", str(tmp_path), "--prompt", "x"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in words), err


# ---------------------------------------------------------------------------------------------
# What it costs

@settings(max_examples=20)
@given(X=st.integers(1, 4), tokens=st.integers(1, 4), data=st.data())
def test_experts_that_a_step_touches_are_the_mean_over_all_choices(X, tokens, data):
    C = data.draw(st.integers(1, X))
    cases = [len(set().union(*case)) for case in product(combinations(range(X), C), repeat=tokens)]
    assert roofline.touched(replace(NONE, X=X, C=C), tokens) == pytest.approx(sum(cases) / len(cases))


@pytest.mark.parametrize("name", EXPERTS)
def test_bytes_and_operations_are_those_of_the_parts(folders, name):
    c = config.read_config(folders[name])
    shapes = {n: shape for _, weights, _ in checkpoint.plan_parts(c) for n, shape in weights if len(shape) == 2 and "embed" not in n}
    every = sum(a * b for a, b in shapes.values()) + c.V * c.E * c.tied
    assert roofline.weight_bytes(c, 2) == 2 * every
    one = sum(a * b for n, (a, b) in shapes.items() if ".experts." not in n or int(n.split(".experts.")[1].split(".")[0]) < c.experts.C)
    one += c.V * c.E * c.tied
    assert roofline.layer_weights(c) + c.V * c.E == one and roofline.weight_bytes(c, 2, tokens=1) == pytest.approx(2 * one)
    assert roofline.weight_bytes(c, 2, tokens=10 ** 6) == pytest.approx(2 * every)
    bits = LLM(folders[name], device="cpu", dtype="float32", quantization="int8").model.weights
    parts = [p for kind in ("qkv", "out", "up", "down", "head") for part in bits[kind] for p in (part if isinstance(part, list) else [part])]
    routers = sum(4 * part.weight.numel() for part in bits["router"] if part)
    assert roofline.weight_bytes(c, 4, True) == sum(p.weight.numel() + 4 * p.scale.numel() for p in parts) + routers


def test_shared_experts_count_for_every_token():
    c = replace(config.read_config(HERE / "demo/llama"), L=3, E=32, I=48, H=4, K=4, D=8, V=11, experts=deepseek({}, True)[1])
    shapes = [shape for _, weights, _ in checkpoint.plan_parts(c) for name, shape in weights if len(shape) == 2 and "embed" not in name]
    assert roofline.weight_bytes(c, 2) == 2 * (sum(a * b for a, b in shapes) + c.V * c.E * c.tied)
    assert roofline.layer_weights(c, 12) - roofline.layer_weights(c) == 2 * (12 - 3) * 3 * 20 * 32
    rows = sum(a for a, _ in shapes) + c.V * c.tied - 2 * 12   # of routers none
    assert roofline.weight_bytes(c, 4, True) == sum(a * b for a, b in shapes) + c.V * c.E * c.tied + 4 * rows + 3 * 2 * 12 * 32


def test_qwen3_30b_a3b_has_30_billion_weights_of_which_a_token_meets_3(capsys):
    c = roofline.config_of("qwen3-30b-a3b")
    assert round((roofline.layer_weights(c, c.experts.X) + 2 * c.V * c.E) / 1e9, 1) == 30.5   # the embedding included
    assert round((roofline.layer_weights(c) + 2 * c.V * c.E) / 1e9, 1) == 3.4
    c = roofline.config_of("mixtral-8x7b")
    assert round((roofline.layer_weights(c, c.experts.X) + 2 * c.V * c.E) / 1e9, 1) == 46.7
    for machine in roofline.HARDWARE.values():   # from its batch on there are more operations than the machine does meanwhile
        B = int(roofline.crossover(c, machine, 300, 2).removeprefix("compute-bound at batch "))
        assert machine.verdict(roofline.step_cost(c, [(1, 300)] * (B + 1), 2)) == "compute"
        assert machine.verdict(roofline.step_cost(c, [(1, 300)] * (B - 1), 2)) == "memory"
    assert bench.main(["estimate", "--model", "qwen3-30b-a3b"]) == 0
    said = {row[0]: row[1:] for row in bench.TABLES[-1]["rows"]}
    assert said["weights in memory"] == ["with all 128 experts of 48 layers; 2 bytes each: 60.4 GB", "30.22 G"]
