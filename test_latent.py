"""Whether a head's keys are absorbed or widened, it attends to the same. (Read it beside latent.py.)"""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batch as batch_module
import bench
import cli
import config
import latent
import roofline
import watch
from batch import make_batch
from config import Latent
from linear import Part
from nanoserve import LLM, SamplingParams
from reference import (DEEPSEEK_V2, DEEPSEEK_V3, LATENTS, NEW, YOUTU, as_it_is, compressed_tensors, dequantised, fp8_blocks, in_8_bits,
                       int8, plain, plain_greedy, repeat, tensors_of, write_checkpoint)
from test_kernels import BACKENDS, DEVICE, dense_attention, paged, ragged
from test_linear import HERE, needs_triton
from test_nanoserve import BUSY, arrivals, assert_tokens_do_not_depend_on_company, engine_options

sizes = st.builds(Latent, rank=st.sampled_from([4, 16, 24, 32, 80]), plain=st.sampled_from([4, 8, 12, 16]),
                  rotary=st.sampled_from([2, 8, 16, 20]), value=st.sampled_from([3, 8, 16, 40]), q_rank=st.none())


# ---------------------------------------------------------------------------------------------
# Attention

@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12)
@given(requests=ragged, H=st.sampled_from([1, 2, 3, 8, 20]), m=sizes, S=st.sampled_from([1, 3, 8, 16, 32, 64]),
       dtype=st.sampled_from([torch.float32, torch.float16]), int8=st.booleans(), at_once=st.sampled_from([1, 4000, 1 << 28]),
       seed=st.integers(0, 999))
@example(requests=[(1, 90), (1, 3), (5, 60), (16, 0), (17, 0), (20, 90), (70, 20)], H=3, m=Latent(24, 8, 8, 8, None), S=16,
         dtype=torch.float32, int8=True, at_once=4000, seed=0)
def test_absorbed_and_widened_equal_attention_with_keys_of_every_heads_own(poisoned, backend, requests, H, m, S, dtype, int8, at_once, seed):
    rng = np.random.default_rng(seed)
    chunks, dense, pool, _, *scales = paged(requests, S, 1, m.rank + m.rotary, dtype, seed, int8=int8)
    batch, scale = make_batch(chunks, S, DEVICE), 1.5 * (m.plain + m.rotary) ** -0.5
    up = torch.from_numpy(rng.standard_normal((H * (m.plain + m.value), m.rank)) / m.rank ** 0.5).to(dtype)
    q = torch.from_numpy(rng.standard_normal((len(batch.tokens_T), H, m.plain + m.rotary))).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "WIDENED", at_once)   # bytes: one head at a time, some, all
        out = latent.attend_to_latents(q.to(DEVICE), Part(up.to(DEVICE)), pool, batch, scale, m, backend, *scales[:1])
    assert out.shape == (len(q), H, m.value) and out.dtype == dtype
    out, start, up_HFZ = out.double().cpu().numpy(), 0, up.double().numpy().reshape(H, -1, m.rank)
    for chunk, (kept, _) in zip(chunks, dense):
        rows, (c, r) = slice(start, start := start + len(chunk.tokens)), np.split(kept[:, 0], [m.rank], -1)
        for h in range(H):
            k = np.concatenate([c @ up_HFZ[h, :m.plain].T, r], -1)[:, None]
            v = (c @ up_HFZ[h, m.plain:].T)[:, None]
            expected = dense_attention(q[rows, h:h + 1].double().numpy(), k, v, scale, None)
            tolerance = 2e-5 if dtype == torch.float32 else 1e-2
            np.testing.assert_allclose(out[rows, h], expected[:, 0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_hold_when_scores_differ_by_hundreds(poisoned, backend):
    """Without the running max, exp overflows; without the rescale, early keys keep a weight that they lost."""
    m, rng = Latent(16, 8, 8, 8, None), np.random.default_rng(0)
    chunks, dense, pool, _ = paged([(1, 199), (5, 140), (20, 0), (20, 190)], 8, 1, 24, torch.float32, 0)
    batch, up = make_batch(chunks, 8, DEVICE), rng.standard_normal((2 * 16, 16)) / 4
    q = rng.standard_normal((46, 2, 16))
    out = latent.attend_to_latents(torch.from_numpy(q).float().to(DEVICE), Part(torch.from_numpy(up).float().to(DEVICE)), pool,
                                   batch, 100.0, m, backend).cpu().numpy()
    for rows, (kept, _) in zip((slice(0, 1), slice(1, 6), slice(6, 26), slice(26, 46)), dense):
        for h, (key, value) in enumerate((up[:8], up[8:16]) if h == 0 else (up[16:24], up[24:]) for h in range(2)):
            k = np.concatenate([kept[:, 0, :16] @ key.T, kept[:, 0, 16:]], -1)[:, None]
            expected = dense_attention(q[rows, h:h + 1], k, (kept[:, 0, :16] @ value.T)[:, None], 100.0, None)
            np.testing.assert_allclose(out[rows, h], expected[:, 0], atol=3e-3)


@given(m=sizes, n=st.integers(1, 400), past=st.integers(0, 3000))
def test_keys_are_widened_where_that_takes_fewer_operations(m, n, past):
    seen = [past + i + 1 for i in range(n)]
    absorbed = sum(2 * m.rank * (m.plain + m.value) + 2 * (2 * m.rank + m.rotary) * keys for keys in seen)
    widened = 2 * m.rank * (m.plain + m.value) * (n + past) + sum(2 * (m.plain + m.rotary + m.value) * keys for keys in seen)
    assert latent.widening_pays(n, past, m) == (n > 16 and widened < absorbed)


def test_the_numbers_of_the_docstring_are_deepseeks():
    m = Latent(512, 128, 64, 128, 1536)
    pays = [n for n in range(1, 400) if latent.widening_pays(n, 10 ** 6, m)]
    assert pays[0] == 171 and "at 171 tokens" in " ".join(latent.__doc__.split())
    c = roofline.config_of("deepseek-v3")
    a, b = (roofline.attention_flops(c, 1, keys) for keys in (0, 1))
    assert b - a == 128 * 2176 and (b - a) // (2 * c.D) == 241 and roofline.kv_bytes(c, 2) == 61 * 1152


def test_kernels_fit_the_registers():
    """By the record of `python bench.py kernels`, which test_bench.py compares with what is compiled."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in (HERE / "results/kernels-compiled.txt").read_text().splitlines()
            if line.startswith(("latent,", "merge,"))]
    assert {(row[0], row[1]) for row in rows} >= {
        (f"latent, {way}, 512 + 64", f"sm_{sm}") for way in bench.LATENT_LAUNCHES for sm in bench.SHARED}
    for name, gpu, tile, warps, stages, registers, spills, *_, units, programs, _ in rows:
        assert int(spills) == 0 and int(programs) >= 1 and (units == "-") == name.startswith("merge"), name


# ---------------------------------------------------------------------------------------------
# Models

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_checkpoint(tmp_path_factory.mktemp("latent"), said, tensors(said)) for name, said in LATENTS.items()}


def tensors(said):
    """With a layer behind the last, as checkpoints have it that can draft with it."""
    found = tensors_of(said)
    extra = said["num_hidden_layers"] if said.get("num_nextn_predict_layers") else None
    return found if extra is None else found | {f"model.layers.{extra}.eh_proj.weight": torch.zeros(3, 3)}


@pytest.mark.parametrize("name", LATENTS)
def test_logits_equal_a_plain_forward_at_every_position(folders, name):
    ids = torch.randint(61, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = plain(LATENTS[name], tensors_of(LATENTS[name]), ids)
    for n, options in ((70, dict(attention="torch")), (70, dict(attention="naive", block_size=5, max_batched_tokens=37)),
                       (70, dict(attention="torch", block_size=3, max_batched_tokens=21)),
                       *[(50, dict(attention="triton", max_batched_tokens=40))] * ("triton" in BACKENDS and name.startswith("deepseek"))):
        logits = LLM(folders[name], dtype="float32", **options).logits(ids[:n]).double().cpu()
        assert (logits - expected[:n]).abs().max() < 1e-4 * expected.abs().max(), options


def test_the_pool_keeps_a_latent_and_a_rotary_key_and_nothing_else(folders):
    for kv, each in (("auto", 4), ("int8", 1)):
        pool = LLM(folders["deepseek v2"], dtype="float32", num_blocks=7, block_size=5, kv_cache_dtype=kv).pool
        assert [tuple(memory.shape) for memory in pool.memory] == [(3, 1, 7, 5, 32), (3, 1, 7, 5)][:1 + (kv == "int8")]
        assert pool.memory[0].element_size() == each


def alone_in(said, folder, kv):
    """As `lone` in conftest.py."""
    rng = np.random.default_rng(5 if kv is as_it_is else 8)
    common = rng.integers(0, 61, 50).tolist()
    prompts = [common[:n] + rng.integers(0, 61, m).tolist()
               for n, m in [(0, 1), (0, 2), (0, 40), (20, 3), (20, 30), (33, 1), (50, 1), (50, 9), (50, 0)]]
    return folder, prompts, [plain_greedy(said, tensors_of(said), p, NEW, kv) for p in prompts]


@pytest.fixture(scope="module")
def alone(folders):
    return {name + suffix: alone_in(LATENTS[name], folders[name], kv) for name in ("youtu", "deepseek v3, biases, yarn")
            for suffix, kv in (("", as_it_is), (" int8 kv", int8))}


@settings(max_examples=80)
@given(name=st.sampled_from(["youtu", "deepseek v3, biases, yarn"]), options=engine_options, spare=st.integers(0, 6), arrivals=arrivals,
       hopeful=st.booleans())
def test_tokens_do_not_depend_on_company(alone, name, options, spare, arrivals, hopeful):
    assert_tokens_do_not_depend_on_company(alone, name, "torch", options | dict(quantization=None), spare, arrivals, hopeful)


@needs_triton
@settings(max_examples=1 if DEVICE == "cpu" else 20)
@example(**BUSY)
@given(options=engine_options, spare=st.integers(0, 6), arrivals=arrivals, hopeful=st.booleans())
def test_nor_do_they_in_triton(alone, options, spare, arrivals, hopeful):
    options = options | dict(max_batched_tokens=options["max_batched_tokens"] + 20, quantization=None)
    assert_tokens_do_not_depend_on_company(alone, "youtu", "triton", options, spare, arrivals[:3], hopeful)


@needs_triton
def test_a_graph_replays_absorbed_decodes_and_verifications(alone, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(batch_module, "record", repeat)
    folder, prompts, expected = alone["youtu"]
    for drafts in (None, "ngram"):
        llm = LLM(folder, dtype="float32", attention="triton", cuda_graphs=True, block_size=8, speculative_model=drafts)
        outs = llm.generate(prompts[2:5], SamplingParams(max_tokens=5, ignore_eos=True))
        assert [out.token_ids for out in outs] == [tokens[:5] for tokens in expected[2:5]]
        assert llm.runner.graphs.recorded


def test_a_latent_model_drafts_for_another(folders, alone):
    folder, prompts, expected = alone["youtu"]
    llm = LLM(folder, dtype="float32", speculative_model=folder)
    llm.speculator.worthwhile = lambda requests, offers, rows: offers   # whether they pay or not
    outs = llm.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True))
    assert [out.token_ids for out in outs] == expected
    assert 0.8 * llm.stats()["drafted_tokens"] <= llm.stats()["accepted_tokens"] != 0   # some are behind the last token


@pytest.mark.parametrize("stored", [fp8_blocks(), compressed_tensors("float"), compressed_tensors("int")])
def test_latents_stored_in_8_bits_give_the_logits_of_what_they_stand_for(tmp_path, stored):
    said = DEEPSEEK_V3 | dict(hidden_size=148, kv_lora_rank=132, qk_nope_head_dim=70, v_head_dim=66, rope_interleave=False)
    files, ids = in_8_bits(tensors_of(said), stored), list(range(40))
    write_checkpoint(tmp_path, said | dict(quantization_config=stored), files)
    meant = dequantised(files)   # what widens latents multiplies them in float, whatever it is stored in
    meant = {name: tensor for name, tensor in meant.items() if not name.endswith("kv_b_proj.rounded")}
    expected = plain(said, meant, ids)
    error_T = (LLM(tmp_path, device="cpu", dtype="float32").logits(ids) - expected).abs().amax(-1) / expected.abs().max()
    if stored == compressed_tensors("int"):   # its rows are rounded, too, now and then to the other side
        assert error_T.median() < 2e-3
    else:
        assert error_T.max() < 1e-4


def test_explain_says_what_is_absorbed_and_what_is_widened(folders, monkeypatch):
    monkeypatch.setattr(watch, "measured_ceiling", lambda device, dtype: roofline.Ceiling(5e11, 2e10))
    llm = LLM(folders["deepseek v2"], dtype="float32", attention="torch")
    explain = watch.Explanation(llm)
    llm.generate([list(range(40))], SamplingParams(max_tokens=2, ignore_eos=True))
    said = []
    explain.show(said.append)
    text = " ".join(" ".join(said).split())
    assert "widened: 1 chunk of 40 tokens, 4 heads with K of 20 and V of 10 numbers, made of the latents of 40 keys" in text
    assert "absorbed: 1 chunk of 1 token, 4 query rows each against latents of 32 numbers" in text


# ---------------------------------------------------------------------------------------------
# Configs, and what they cost

@pytest.mark.parametrize("base, change, expected", [
    (YOUTU, dict.fromkeys(["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]),
     dict(latent=Latent(512, 128, 64, 128, 20), D=576, experts=None)),
    (DEEPSEEK_V3, {}, dict(K=1, D=32, latent=Latent(24, 12, 8, 10, 20), interleaved=True, extra_layers=0)),
    (DEEPSEEK_V3, dict(num_nextn_predict_layers=0), dict(extra_layers=0)),
    (DEEPSEEK_V3, dict(rope_interleave=False, num_nextn_predict_layers=1), dict(interleaved=False, extra_layers=1)),
    (DEEPSEEK_V2, dict(rope_interleave=False, q_lora_rank=None), dict(interleaved=True, latent=Latent(24, 12, 8, 10, None))),
    (DEEPSEEK_V2, dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=400, mscale_all_dim=0.5)),
     dict(context=1600, scales=[20 ** -0.5 * (1 + 0.05 * math.log(4)) ** 2] * 3)),
])
def test_what_a_config_says_of_latents(tmp_path, base, change, expected):
    c = config.read_config(write_checkpoint(tmp_path, base | change, {}))
    assert {key: getattr(c, key) for key in expected} == expected


LEFT_OUT = dict(deepseek_v2=(2048, 1536, 64, 2, None), deepseek_v3=(4096, 1536, 256, 1, 8), kimi_k2=(4096, 1536, 256, 1, 8),
                glm4_moe_lite=(202752, 768, 64, 1, 4))


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path, kind):
    context, q_rank, X, shared, C = LEFT_OUT[kind]
    said = dict(model_type=kind, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2)
    c = config.read_config(write_checkpoint(tmp_path, said | dict(num_experts_per_tok=6) if C is None else said, {}))
    assert (c.context, c.latent.q_rank, c.experts.X, c.experts.C) == (context, q_rank, X, C or 6)
    assert c.experts.shared == shared * c.experts.I and c.latent.rank == 512 and not c.tied


@pytest.mark.parametrize("base, change, words", [
    (DEEPSEEK_V2, dict(mlp_bias=True), ["mlp_bias"]), (DEEPSEEK_V3, dict(attention_bias=True, q_lora_rank=None), ["attention_bias"]),
    (DEEPSEEK_V3, dict(kv_lora_rank=0), ["kv_lora_rank", "0"]), (DEEPSEEK_V3, dict(v_head_dim="wide"), ["v_head_dim", "wide"]),
    (DEEPSEEK_V3, dict(qk_rope_head_dim=7), ["odd"]), (DEEPSEEK_V3, dict(mlp_layer_types=["sparse"]), ["mlp_layer_types"]),
    (DEEPSEEK_V3, dict(qk_nope_head_dim=300), ["308", "256"]), (DEEPSEEK_V3, dict(kv_lora_rank=20), ["[32, 32]", "[28, 32]"]),
])
def test_latents_that_nobody_supports_are_refused_by_name(tmp_path, capfd, base, change, words):
    write_checkpoint(tmp_path, base | change, tensors_of(base))
    assert cli.main(["--model", str(tmp_path), "--prompt", "x"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in words), err


@pytest.mark.parametrize("name", LATENTS)
def test_weights_that_a_token_meets_are_those_of_the_files(folders, name):
    c, files = config.read_config(folders[name]), tensors_of(LATENTS[name])
    every = sum(tensor.numel() for key, tensor in files.items() if tensor.dim() == 2 and "embed" not in key)
    X = c.experts.X if c.experts else None
    assert roofline.layer_weights(c, X) + c.V * c.E * (not c.tied) == every
    assert roofline.weight_bytes(c, 4) == 4 * (every + c.V * c.E * c.tied)


def test_deepseek_v3_has_671_billion_weights_of_which_a_token_meets_37(capsys):
    c = roofline.config_of("deepseek-v3")
    assert round((roofline.layer_weights(c, 256) + 2 * c.V * c.E) / 1e9) == 671
    assert 36 < (roofline.layer_weights(c) + c.V * c.E) / 1e9 < 38
    assert bench.main(["estimate", "--model", "deepseek-v3", "--hardware", "h100"]) == 0
    said = {row[0]: row[-1] for row in bench.TABLES[-1]["rows"]}
    assert said["attention's own intensity"] == "242 FLOP/B" and said["latents per token"] == "69 KiB"
    c = roofline.config_of("deepseek-v2-lite")
    assert round((roofline.layer_weights(c, 64) + 2 * c.V * c.E) / 1e9, 1) == 15.7
