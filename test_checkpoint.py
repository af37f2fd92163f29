"""A checkpoint gives the logits of its formulas, whatever its config says, or one sentence.
(Read it beside config.py and checkpoint.py.)

    python -m pytest test_checkpoint.py

reference.py computes the same logits in another way: the tests draw configs, write checkpoints at random, and compare.
"""

import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import checkpoint
import cli
import kernels
import model
from config import ACTIVATIONS, MODEL_TYPES, read_config
from linear import Part, widen
from nanoserve import LLM, SamplingParams
from reference import (FAMILIES, GPT2, LLAMA, LLAMA3_ROPE, MISTRAL, QWEN2, QWEN3, YARN, compressed_tensors, dequantised,
                       fp8_blocks, in_8_bits, linear_layers, llama_tensors, plain, plain_attention_factor, plain_frequencies,
                       plain_greedy, tensors_of, write_checkpoint)
from test_tokenizer import split_by, tokenizer_json

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def assert_logits(folder, expected, ids, **options):
    llm = LLM(folder, dtype="float32", **options)
    error_T = (llm.logits(ids).double().cpu() - expected).abs().amax(-1) / expected.abs().max()
    if llm.config.stored == "int8":   # now and then a number in a row is rounded to the other side
        assert error_T.median() < 5e-3 and error_T.max() < 0.1, options
    else:
        on_gpu = llm.config.stored and llm.device.type == "cuda"   # there rows are in FP8, too
        assert error_T.max() < (0.15 if on_gpu else 1e-4), options


def embedding_of(tensors):
    return next(name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))


# ---------------------------------------------------------------------------------------------
# What a config says

@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_a_plain_forward_at_every_position(tmp_path, name):
    config = FAMILIES[name]
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors)
    ids = torch.randint(61, (110,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = plain(config, tensors, ids)
    for options in (dict(attention="torch"), dict(attention="torch", block_size=5, max_batched_tokens=37)):
        assert_logits(tmp_path, expected, ids, **options)
    if kernels.load_triton():   # two long chunks and a short one
        assert_logits(tmp_path, expected[:55], ids[:55], attention="triton", block_size=8, max_batched_tokens=25)


@st.composite
def llama3_ropes(draw):
    """Parameters of llama3's RoPE that leave some pairs of a head of 32 as they are, squeeze some, and some in part."""
    theta, low = draw(st.sampled_from([200.0, 1e4, 5e5])), draw(st.floats(0.5, 2))
    high = low * draw(st.floats(2.5, 8))
    old = draw(st.floats(1.2, 4)) * 2 * math.pi * high   # the first pair turns more than `high` times in the old context
    return dict(rope_type="llama3", rope_theta=theta, factor=draw(st.floats(1.5, 40)), low_freq_factor=low, high_freq_factor=high,
                original_max_position_embeddings=math.ceil(old))


# Everything in a config that changes what is computed: each option with the values that it may have.
EPS, SWITCH, ACTIVATION = [None, 1e-6, 1e-5, 0.01, 1], [None, False, True], [None, *ACTIVATIONS]
FULL, SLIDING = "full_attention", "sliding_attention"
ROPES = [None, {"rope_type": "default"}, {"type": "linear", "factor": 0.5}, {"rope_type": "linear", "factor": 3},
         LLAMA3_ROPE | {"rope_type": "llama3"}, YARN, YARN | dict(beta_fast=4, beta_slow=0.5), YARN | dict(factor=0.5),
         YARN | dict(mscale=2, mscale_all_dim=0.5), YARN | dict(mscale=2), YARN | dict(attention_factor=1.4, truncate=False)]
GPT2_OPTIONS = dict(
    n_inner=[None, 12, 40], activation_function=ACTIVATION, layer_norm_epsilon=EPS, scale_attn_weights=SWITCH,
    scale_attn_by_inverse_layer_idx=SWITCH, tie_word_embeddings=SWITCH)
LLAMA_OPTIONS = dict(
    num_key_value_heads=[None, 1, 2, 4], head_dim=[None, 4, 32], hidden_act=ACTIVATION, rms_norm_eps=EPS, attention_bias=SWITCH,
    mlp_bias=SWITCH, tie_word_embeddings=SWITCH, sliding_window=[None, 1, 3, 17], use_sliding_window=SWITCH,
    rope_theta=[None, 50, 5e5], rope_scaling=ROPES, rope_parameters=[*ROPES, *(rope | {"rope_theta": 70} for rope in ROPES[1:])])
QWEN_OPTIONS = LLAMA_OPTIONS | dict(
    max_window_layers=[0, 1, 2, 28], layer_types=[None, [FULL, SLIDING, FULL], [SLIDING, SLIDING, FULL], [SLIDING] * 3])
LLAMA_SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                   max_position_embeddings=160)   # a table of RoPE for the 131,072 positions that some have takes longer than all else
#          what a config of the type must say, what it may say, and where the options are turned one at a time
TYPES = {
    "gpt2": (dict(vocab_size=61, n_positions=160, n_embd=32, n_layer=3, n_head=4), GPT2_OPTIONS, {}),
    "llama": (LLAMA_SIZES, LLAMA_OPTIONS, {}),
    "mistral": (LLAMA_SIZES, LLAMA_OPTIONS, {}),
    "qwen2": (LLAMA_SIZES, QWEN_OPTIONS, dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)),
    "qwen3": (LLAMA_SIZES, QWEN_OPTIONS, dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)),
}


def assert_computed_as_said(folder, model_type, config, small):
    """`config` need not say of which type it is in both ways."""
    said = config | {"model_type": model_type}
    tensors = tensors_of(said)
    if small:   # beside such an embedding every eps is felt
        tensors[embedding_of(tensors)] *= 1e-2
    ids = torch.randint(61, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_logits(write_checkpoint(folder, config, tensors), plain(said, tensors, ids), ids, attention="torch")


@pytest.mark.parametrize("model_type", TYPES)
def test_each_option_of_a_config_does_what_its_formula_says(tmp_path, model_type):
    must, options, base = TYPES[model_type]
    for key, values in options.items():
        for value in values:
            assert_computed_as_said(tmp_path, model_type, dict(model_type=model_type) | must | base | {key: value}, small=True)


@pytest.mark.parametrize("model_type", TYPES)
@settings(max_examples=80)
@given(data=st.data())
def test_options_of_a_config_do_what_they_say_in_any_company(tmp_path, model_type, data):
    must, options, _ = TYPES[model_type]
    c, heads_ = dict(must), data.draw(st.integers(1, 4), "heads")
    for key in data.draw(st.lists(st.sampled_from(sorted(options)), unique=True), "options that it mentions"):
        c[key] = data.draw(st.sampled_from(options[key]), key)
    if model_type == "gpt2":
        c |= dict(n_head=heads_, n_embd=heads_ * data.draw(st.sampled_from([4, 5, 16]), "head size"))
        if data.draw(st.booleans(), "old spelling"):
            c["n_ctx"] = c.pop("n_positions")
    else:
        c["num_attention_heads"] = heads_
        c["hidden_size"] = 30 if c.get("head_dim") else heads_ * data.draw(st.sampled_from([4, 16, 32]), "head size")
        if heads_ % (c.get("num_key_value_heads") or 1):
            c["num_key_value_heads"] = heads_
    names = dict(model_type=model_type, architectures=[MODEL_TYPES[model_type][0]])
    for key in data.draw(st.sampled_from([["model_type"], ["architectures"], ["model_type", "architectures"]]), "says its type by"):
        c[key] = names[key]
    assert_computed_as_said(tmp_path, model_type, c, small=data.draw(st.booleans(), "small embedding"))


@settings(max_examples=200)
@given(rope=llama3_ropes())
@example(rope=dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192))   # Llama 3.1
def test_slow_frequencies_are_squeezed_fast_ones_kept_and_those_between_on_a_ramp(rope):
    D = 32
    stretched = [plain_frequencies(dict(rope_parameters=rope | dict(rope_type=kind), num_attention_heads=1, head_dim=D))
                 for kind in ("default", "llama3")]
    kept = [f / full for full, f in zip(*stretched)]
    below, above = sum(k < 1.0001 / rope["factor"] for k in kept), sum(k > 0.9999 for k in kept)
    assert below and above and below + above < D // 2   # all three ranges are there
    torch.testing.assert_close(model.rope_frequencies(rope, D).double(), torch.tensor(stretched[1], dtype=torch.float64),
                               rtol=2e-5, atol=0)


@settings(max_examples=200)
@given(theta=st.floats(2, 1e6), factor=st.floats(0.5, 50), original=st.integers(1, 100000), slow=st.floats(0.1, 4),
       more=st.floats(1, 40), truncate=st.booleans(), D=st.sampled_from([2, 4, 32, 128]))
@example(theta=1e6, factor=4.0, original=32768, slow=1, more=32, truncate=True, D=128)   # Qwen2.5
@example(theta=1e4, factor=40.0, original=4096, slow=1, more=32, truncate=True, D=64)    # DeepSeek-V3
@example(theta=1e6, factor=4.0, original=32768, slow=1, more=1, truncate=False, D=128)   # no ramp
def test_yarn_keeps_pairs_that_turn_often_and_stretches_those_that_turn_seldom(theta, factor, original, slow, more, truncate, D):
    rope = dict(rope_type="yarn", rope_theta=theta, factor=factor, original_max_position_embeddings=original, beta_slow=slow,
                beta_fast=slow * more, truncate=truncate)
    expected = plain_frequencies(dict(rope_parameters=rope, num_attention_heads=1, head_dim=D))
    torch.testing.assert_close(model.rope_frequencies(rope, D).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("said, computed", [
    ({}, dict(beta_fast=32, beta_slow=1, truncate=True, attention_factor=1 + 0.1 * math.log(4))),
    (dict(beta_fast=None, beta_slow=None, truncate=None, attention_factor=None, mscale=None),
     dict(beta_fast=32, beta_slow=1, truncate=True, attention_factor=1 + 0.1 * math.log(4))),
    (dict(mscale=0.5, mscale_all_dim=2), dict(attention_factor=(1 + 0.05 * math.log(4)) / (1 + 0.2 * math.log(4)))),
    (dict(mscale=0.5), dict(attention_factor=1 + 0.1 * math.log(4))), (dict(factor=0.9), dict(attention_factor=1)),
    (dict(mscale=1, mscale_all_dim=1), dict(attention_factor=1)),
    (dict(mscale=0, mscale_all_dim=0.0), dict(attention_factor=1 + 0.1 * math.log(4))),
    (dict(attention_factor=1.25, mscale=0.5, mscale_all_dim=2), dict(attention_factor=1.25)),
    (dict(original_max_position_embeddings=None), dict(original_max_position_embeddings=160)),
])
def test_what_yarn_is_not_told_it_works_out(tmp_path, said, computed):
    config = LLAMA | dict(rope_scaling=YARN | said)
    rope = read_config(write_checkpoint(tmp_path, config, {})).rope
    assert {key: rope[key] for key in computed} == pytest.approx(computed)
    assert rope["attention_factor"] == pytest.approx(plain_attention_factor(config))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "yarn" in name])
def test_the_yarn_configs_above_have_frequencies_in_all_three_ranges(name):
    config = FAMILIES[name]
    rope = config.get("rope_parameters") or config["rope_scaling"]
    theta = rope.get("rope_theta", config.get("rope_theta"))
    kept = [f * theta ** (i / 16) for i, f in enumerate(plain_frequencies(config))]
    assert min(kept) < 0.2501 and max(kept) > 0.9999 and any(0.26 < k < 0.99 for k in kept), kept


@pytest.mark.parametrize("name", [name for name in FAMILIES if "3.1" in name])
def test_the_llama_3_configs_above_have_frequencies_in_all_three_ranges(name):
    config = FAMILIES[name]
    rope = config.get("rope_parameters") or config["rope_scaling"]
    plain_rope = {"rope_parameters": {"rope_theta": rope.get("rope_theta", config.get("rope_theta"))}}
    kept = [f / full for full, f in zip(plain_frequencies({k: v for k, v in config.items() if k != "rope_scaling"} | plain_rope),
                                        plain_frequencies(config))]
    assert min(kept) < 0.126 and max(kept) == 1 and any(0.13 < k < 0.99 for k in kept)


# What transformers assumes where a config says nothing (of an option whose default changes no logit of a short prompt).
@pytest.mark.parametrize("base, change, expected", [
    (GPT2, {}, dict(context=160, tied=True)), (GPT2, dict(n_positions=None), dict(context=1024)),
    (GPT2, dict(n_positions=70, n_ctx=90), dict(context=70)),
    (LLAMA, {}, dict(context=160, tied=False, windows=[None] * 2)),
    (LLAMA, dict(max_position_embeddings=None), dict(context=2048)),
    (LLAMA, dict(rope_scaling=YARN | dict(factor=2.5)), dict(context=160)),   # what yarn stretches to, if that is more
    (LLAMA, dict(rope_scaling=YARN | dict(factor=7.5)), dict(context=300)),
    (LLAMA, dict(rope_scaling=YARN | dict(type="yarn", original_max_position_embeddings=None)), dict(context=640)),
    (MISTRAL, dict(max_position_embeddings=None), dict(context=131072, windows=[4096] * 2)),
    (MISTRAL, dict(sliding_window=None), dict(windows=[None] * 2)),   # null is not what is left out
    (QWEN2, dict(sliding_window=None, use_sliding_window=True, max_window_layers=0), dict(windows=[None] * 2)),
    (QWEN2, dict(max_position_embeddings=None, use_sliding_window=True), dict(context=32768, windows=[None] * 2)),
    (QWEN3, dict(max_position_embeddings=None, use_sliding_window=True, max_window_layers=1),
     dict(context=32768, windows=[None, 4096])),
    (LLAMA, {}, dict(dtype="float32")), (LLAMA, dict(torch_dtype="float16"), dict(dtype="float16")),
    (LLAMA, dict(torch_dtype="torch.float16", dtype="torch.bfloat16"), dict(dtype="bfloat16")),
])
def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path, base, change, expected):
    write_checkpoint(tmp_path, base | change, {})
    c = asdict(read_config(tmp_path))
    assert {key: c[key] for key in expected} == expected


def test_every_activation_that_a_config_may_name_has_a_function():
    assert list(ACTIVATIONS) == list(model.ACTIVATIONS)


# ---------------------------------------------------------------------------------------------
# What becomes of the weights

@settings(max_examples=60)
@given(heads=st.integers(1, 5), half=st.integers(1, 8), columns=st.sampled_from([(), (1,), (3,)]))
def test_pairs_lie_side_by_side(heads, half, columns):
    D = 2 * half
    rows = torch.randn(heads * D, *columns)
    ours = checkpoint.interleave_pairs(rows, D)
    assert ours.shape == rows.shape
    for head in range(heads):
        for i in range(half):
            assert torch.equal(ours[head * D + 2 * i], rows[head * D + i])
            assert torch.equal(ours[head * D + 2 * i + 1], rows[head * D + half + i])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_have_the_shapes_of_loaded_ones(tmp_path, monkeypatch, name, dtype):
    write_checkpoint(tmp_path, FAMILIES[name], tensors_of(FAMILIES[name]))
    c = read_config(tmp_path)
    monkeypatch.setattr(checkpoint, "pack", lambda part, dtype: part)   # a packed weight hides its shape
    loaded, made_up = ({kind: [(part.weight, part.bias) for part in parts] for kind, parts in weights.items()} for weights in
                       (checkpoint.load_weights(tmp_path, c, CPU, dtype), checkpoint.random_weights(c, CPU, dtype)))
    shapes = [{kind: [[tensor is not None and tensor.shape for tensor in pair] for pair in pairs] for kind, pairs in weights.items()}
              for weights in (loaded, made_up)]
    assert shapes[0] == shapes[1]
    for tensor in (tensor for weights in (loaded, made_up) for pairs in weights.values() for pair in pairs for tensor in pair):
        assert tensor is None or tensor.dtype == dtype and tensor.is_contiguous()


@pytest.mark.parametrize("name", ["gpt2", "llama one KV head, own head size, biases, tied", "qwen3", "qwen3 in 8 bits"])
@pytest.mark.parametrize("random", [False, True])
def test_what_is_multiplied_is_packed_and_its_plain_weight_let_go_at_once(tmp_path, monkeypatch, name, random):
    if name == "qwen3 in 8 bits":
        write_quantised(tmp_path, QWEN3 | ODD, fp8_blocks())
    else:
        write_checkpoint(tmp_path, FAMILIES[name], tensors_of(FAMILIES[name]))
    c, read = read_config(tmp_path), checkpoint.Checkpoint.read
    plain_weights, packed = [], []

    def nothing_plain_is_left(*arguments):
        assert not [ref for ref in plain_weights if ref() is not None], "the part before is still there"
        return read(*arguments)

    def pack(part, dtype):
        assert part.weight.is_contiguous() and dtype == torch.float32
        assert part.weight.dtype == (dtype if part.scale is None else torch.float8_e4m3fn)
        plain_weights.append(weakref.ref(part.weight))
        packed.append(Part(widen(part, dtype).weight.to_mkldnn(), part.bias))
        return packed[-1]
    monkeypatch.setattr(checkpoint, "pack", pack)
    monkeypatch.setattr(checkpoint.Checkpoint, "read", nothing_plain_is_left)
    weights = checkpoint.random_weights(c, CPU, torch.float32) if random else checkpoint.load_weights(tmp_path, c, CPU, torch.float32)
    multiplied = {kind: weights.pop(kind) for kind in ("qkv", "out", "up", "down", "head")}
    assert [*map(id, packed)] == [id(part) for parts in multiplied.values() for part in parts] and len(packed) == 4 * c.L + 1
    assert not any(part.weight.is_mkldnn for parts in weights.values() for part in parts)
    if c.tied:
        assert torch.equal(multiplied["head"][0].weight.to_dense(), weights["embedding"][0].weight)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_prefix_shards_buffers_and_stored_dtype_make_no_difference(tmp_path, name, stored):
    config = FAMILIES[name] | dict(torch_dtype=str(stored))
    tensors = {n: t.to(stored) for n, t in tensors_of(config).items()}
    if name == "gpt2":   # as transformers saves it, with the mask buffers of old versions
        write_checkpoint(tmp_path / "other", config, {f"transformer.{n}": t for n, t in tensors.items()}
                         | {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool),
                            "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}, shards=3)
    else:
        write_checkpoint(tmp_path / "other", config, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, shards=3)
    write_checkpoint(tmp_path / "one", config, tensors)
    a, b = (LLM(tmp_path / which, dtype="float32").logits(list(range(50))).cpu() for which in ("one", "other"))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    expected = plain(config, tensors, list(range(50)))
    assert (a - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_tied_head_is_found_under_either_name(tmp_path):
    for base in (LLAMA, GPT2):
        config, ids = base | dict(tie_word_embeddings=True), list(range(40))
        tensors = tensors_of(config)
        embedding = embedding_of(tensors)
        other = {name: tensor for name, tensor in tensors.items() if name != embedding} | {"lm_head.weight": tensors[embedding]}
        assert_logits(write_checkpoint(tmp_path, config, other), plain(config, tensors, ids), ids)


@pytest.mark.parametrize("config", [GPT2, LLAMA | dict(tie_word_embeddings=True)])
@pytest.mark.parametrize("row", [0, 1, 30, 60, None])
def test_a_head_said_to_be_tied_is_its_own_if_any_row_differs(tmp_path, monkeypatch, config, row):
    tensors, ids = tensors_of(config), list(range(40))
    embedding = embedding_of(tensors)
    tensors["lm_head.weight"] = tensors[embedding].clone()
    if row is not None:
        tensors["lm_head.weight"][row, -1] += 3
    write_checkpoint(tmp_path, config, tensors)
    assert_logits(tmp_path, plain(config, tensors, ids), ids)   # the reference uses the head that is stored
    monkeypatch.setattr(checkpoint, "pack", lambda part, dtype: part)
    weights = checkpoint.load_weights(tmp_path, read_config(tmp_path), CPU, torch.bfloat16)
    assert torch.equal(weights["head"][0].weight, weights["embedding"][0].weight) == (row is None)


def test_a_head_that_equals_the_embedding_takes_no_memory_of_its_own(tmp_path, monkeypatch):
    config = LLAMA | dict(tie_word_embeddings=True)
    tensors = tensors_of(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    monkeypatch.setattr(checkpoint, "pack", lambda part, dtype: part)   # as on a GPU
    weights = checkpoint.load_weights(write_checkpoint(tmp_path, config, tensors), read_config(tmp_path), CPU, torch.float32)
    assert weights["head"][0].weight is weights["embedding"][0].weight


def test_weights_that_are_not_finite_end_their_request_with_a_reason(tmp_path):
    tensors = llama_tensors(LLAMA)
    tensors["model.embed_tokens.weight"][7] = math.nan   # only who uses token 7 is harmed
    llm = LLM(write_checkpoint(tmp_path, LLAMA, tensors))
    hot = SamplingParams(max_tokens=3, temperature=1.0, seed=0)
    outs = llm.generate([[1, 2], [1, 7, 2], [1, 7], [3]], [SamplingParams(max_tokens=3), hot, SamplingParams(max_tokens=3), hot])
    assert [out.finish_reason for out in outs] == ["length", "error", "error", "length"] and "not finite" in outs[1].error
    assert llm.pool.num_referenced == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to say what its peak was")
def test_loading_needs_little_more_memory_than_one_copy_of_the_weights(tmp_path):
    config = LLAMA | dict(vocab_size=4000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6,
                          num_attention_heads=8, num_key_value_heads=8)
    write_checkpoint(tmp_path, config, llama_tensors(config))
    weights = (tmp_path / "model.safetensors").stat().st_size
    code = f"""
from pathlib import Path; import torch, checkpoint, config
def peak():   # of this process: getrusage also counts the one that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
c, before = config.read_config(Path({str(tmp_path)!r})), peak()
weights = checkpoint.load_weights(Path({str(tmp_path)!r}), c, torch.device("cpu"), torch.float32)
print(peak() - before)"""
    # glibc shall give back what is freed: what its heap keeps is no memory of ours.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2 ** 20)}
    grown = int(subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, capture_output=True, text=True, check=True).stdout)
    assert weights > 250e6 and 0.95 * weights < grown < 1.25 * weights


def test_want_of_memory_is_said_before_any_weight_is_read(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, LLAMA, llama_tensors(LLAMA))
    size = sum(tensor.numel() for tensor in llama_tensors(LLAMA).values())
    asked = []

    def refuse(size, **options):
        asked.append(size)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    c = read_config(tmp_path)
    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(checkpoint.Checkpoint, "read", lambda *a: pytest.fail("read a tensor"))
    for dtype, itemsize in [(torch.float32, 4), (torch.bfloat16, 2)]:
        with pytest.raises(ValueError, match=r"needs 0\.0 GB, and cpu does not have them: use a smaller dtype, or another device"):
            checkpoint.load_weights(tmp_path, c, CPU, dtype)
        assert asked.pop() == size * itemsize


def test_loading_shows_how_far_it_is_where_somebody_watches(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path, LLAMA, llama_tensors(LLAMA))
    c, clock = read_config(tmp_path), iter(range(1000))
    checkpoint.load_weights(tmp_path, c, CPU, torch.float32)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: next(clock) * 0.4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    checkpoint.load_weights(tmp_path, c, CPU, torch.float32)
    *shown, last = capsys.readouterr().err.split("\r")[1:]
    assert last == "\x1b[K" and all(line.startswith(f"loading {tmp_path}: ") and line.endswith("% of 0.0 GB") for line in shown)
    shares = [int(line.split(": ")[1].split("%")[0]) for line in shown]
    assert shares == sorted(shares) and len(shares) == len(llama_tensors(LLAMA)) - 3 and shares[0] > 0 and shares[-1] > 70


def test_eos_comes_from_generation_config_first_and_may_be_a_list(tmp_path):
    for config_eos, generation, expected in [(3, None, [3]), ([3, 5], None, [3, 5]), (3, {"eos_token_id": [7, 8]}, [7, 8]),
                                             (3, {}, [3]), (None, None, []), (50256, None, [50256])]:
        more = {} if generation is None else {"generation_config": generation}
        write_checkpoint(tmp_path, LLAMA | dict(eos_token_id=config_eos), {}, **more)
        assert read_config(tmp_path).eos == expected


def test_eos_ends_a_text_unless_ignored(tmp_path):
    tensors = llama_tensors(LLAMA)
    first = plain_greedy(LLAMA, tensors, [1, 2, 3], 12)
    eos = first[5]
    write_checkpoint(tmp_path, LLAMA | dict(eos_token_id=[60, eos]), tensors)
    llm = LLM(tmp_path)
    out, on = llm.generate([[1, 2, 3]] * 2, [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, ignore_eos=True)])
    assert out.token_ids == first[:first.index(eos) + 1] and out.finish_reason == "stop"
    assert on.token_ids == first and on.finish_reason == "length"


# ---------------------------------------------------------------------------------------------
# Weights stored in 8 bits

QUANTISED = {"int8": compressed_tensors("int"), "fp8": compressed_tensors("float"), "blocks": fp8_blocks()}
INT8, FP8, BLOCKS = QUANTISED.values()
# No size is a multiple of 128; the first 128 rows of q end within a head, those of gate within its first half; q, k and v
# Nothing is a multiple of 128: heads 2 and 5 of q cross from one block of rows into the next, and each last block is cut.
ODD = dict(hidden_size=148, intermediate_size=200, num_attention_heads=6, num_key_value_heads=2, head_dim=44)


def uneven(tensors):
    """Rows, and blocks of 128 columns, of very different size: their scales differ as much."""
    g, made = torch.Generator().manual_seed(5), dict(tensors)
    for name in (layer + ".weight" for layer in linear_layers(tensors)):
        out, inputs = tensors[name].shape
        rows, blocks = (torch.exp2(torch.randint(-2, 2, (n,), generator=g).float()) for n in (out, -(-inputs // 128)))
        made[name] = tensors[name] * rows[:, None] * blocks.repeat_interleave(128)[:inputs] * (32 / inputs) ** 0.5
    return made


def write_quantised(folder, config, quantization, **how):
    """Odd as it is; returns what the tensors stand for."""
    tensors = in_8_bits(uneven(llama_tensors(config)), quantization, **how)
    write_checkpoint(folder, config | dict(quantization_config=quantization), tensors)
    return dequantised(tensors)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("base", [LLAMA, QWEN2, QWEN3])
def test_what_is_stored_in_8_bits_gives_the_logits_of_what_it_stands_for(tmp_path, kind, base):
    meant, ids = write_quantised(tmp_path, base | ODD, QUANTISED[kind]), list(range(40))
    assert_logits(tmp_path, plain(base | ODD, meant, ids), ids)
    c = read_config(tmp_path)
    assert c.stored == {"int8": "int8", "fp8": "fp8", "blocks": "fp8"}[kind] and c.blocks == (kind == "blocks")


@settings(max_examples=60)
@given(data=st.data(), base=st.sampled_from([LLAMA, QWEN2, QWEN3]), kind=st.sampled_from(list(QUANTISED)), heads=st.integers(1, 6),
       D=st.sampled_from([2, 6, 44, 64, 130]), E=st.integers(1, 300), I=st.integers(1, 300), tied=st.booleans(),
       scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), flat=st.booleans(), shards=st.integers(1, 3))
def test_any_layers_may_be_stored_in_8_bits(tmp_path, data, base, kind, heads, D, E, I, tied, scale_dtype, flat, shards):
    """Whatever the sizes, the type and form of the scales, which layers are left out, and in which words."""
    config = base | dict(num_attention_heads=heads, hidden_size=E, intermediate_size=I, head_dim=D, tie_word_embeddings=tied,
                         num_key_value_heads=data.draw(st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0])))
    tensors = llama_tensors(config)
    layers = linear_layers(tensors)
    but = data.draw(st.lists(st.sampled_from(layers), unique=True), "not in 8 bits")
    words = [data.draw(st.sampled_from([layer, "re:.*" + layer.removeprefix("model."), "re:" + layer])) for layer in but]
    if all(layer in but for layer in layers if "layers.1.mlp" in layer):
        words = [word for word in words if "layers.1.mlp" not in word] + ["model.layers.1.mlp"]
    key = "ignore" if kind != "blocks" else data.draw(st.sampled_from(["modules_to_not_convert", "ignored_layers"]))
    quantization = {k: v for k, v in QUANTISED[kind].items() if k != "modules_to_not_convert"} | {key: words or data.draw(
        st.sampled_from([None, []]))}
    stored = in_8_bits(uneven(tensors), quantization, but, scale_dtype)
    if flat and kind != "blocks":
        stored = {name: tensor.flatten() if name.endswith("_scale") else tensor for name, tensor in stored.items()}
    write_checkpoint(tmp_path, config | dict(quantization_config=quantization), stored, shards)
    ids = torch.randint(61, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    meant = dequantised(stored)
    for together in [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]:   # one product, in 8 bits if all of it is
        for layer in {name.split(".")[2] for name in meant if ".layers." in name}:
            marks = [name for name in meant if f".layers.{layer}." in name and name.split(".")[-2] in together and name.endswith("rounded")]
            if len(marks) < len(together):
                meant = {name: tensor for name, tensor in meant.items() if name not in marks}
    assert_logits(tmp_path, plain(config, meant, ids), ids, attention="torch")


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("base", [LLAMA | dict(attention_bias=True), QWEN3])
def test_8_bits_stay_8_bits_in_our_layout_with_a_scale_for_every_row(tmp_path, monkeypatch, kind, base):
    meant = {name: tensor for name, tensor in write_quantised(tmp_path, base | ODD, QUANTISED[kind]).items() if tensor.ndim}
    monkeypatch.setattr(checkpoint, "pack", lambda part, dtype: part)
    weights = checkpoint.load_weights(tmp_path, read_config(tmp_path), CPU, torch.bfloat16)
    H, K, D = 6, 2, 44
    for l in range(2):
        m = {name.split(".")[-2]: tensor for name, tensor in meant.items() if f"layers.{l}." in name and name.endswith("weight")}
        pairs = [h * D + i + half for h in range(H + K) for i in range(D // 2) for half in (0, D // 2)]
        ours = dict(qkv=torch.cat([torch.cat([m["q_proj"], m["k_proj"]])[pairs], m["v_proj"]]), out=m["o_proj"],
                    up=torch.cat([m["gate_proj"], m["up_proj"]]), down=m["down_proj"])
        for name, expected in ours.items():
            part, G = weights[name][l], -(-expected.shape[1] // 128) if kind == "blocks" else 1
            assert part.weight.dtype == (torch.int8 if kind == "int8" else torch.float8_e4m3fn) and part.weight.shape == expected.shape
            assert part.scale.dtype == torch.float32 and part.scale.shape == (len(expected), G)
            assert part.weight.is_contiguous() and part.scale.is_contiguous()
            each = part.scale.double().repeat_interleave(128 if G > 1 else expected.shape[1], 1)[:, :expected.shape[1]]
            assert torch.equal(part.weight.double() * each, expected)
            assert part.bias is None or part.bias.dtype == torch.bfloat16
    assert all(part.scale is None and part.weight.dtype == torch.bfloat16
               for name in ("embedding", "head", "attn_norm", "mlp_norm", "final_norm") for part in weights[name])


@settings(max_examples=100)
@given(out=st.integers(1, 5), inputs=st.integers(1, 400), blocks=st.booleans(), integers=st.booleans(), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_widened_part_is_every_number_times_its_scale(out, inputs, blocks, integers, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out, inputs), generator=g).to(torch.int8)
    weight = weight if integers else (weight.float() / 3).to(torch.float8_e4m3fn)
    scale, bias = torch.rand(out, -(-inputs // 128) if blocks else 1, generator=g) + 0.1, torch.ones(out)
    expected = [[weight[o, i].double() * scale[o, i // 128 if blocks else 0] for i in range(inputs)] for o in range(out)]
    part = widen(Part(weight, bias, scale), dtype)
    assert part.weight.dtype == dtype and part.bias is bias and part.scale is None
    torch.testing.assert_close(part.weight, torch.tensor(expected).to(dtype), rtol=1e-6 if dtype == torch.float32 else 0.01, atol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_head_in_8_bits_is_its_own_even_if_said_to_be_tied(tmp_path, kind, tied):
    config, ids, quantization = LLAMA | ODD | dict(tie_word_embeddings=tied), list(range(40)), dict(QUANTISED[kind])
    quantization.pop("ignore", None), quantization.pop("modules_to_not_convert", None)
    stored = in_8_bits(llama_tensors(LLAMA | ODD), quantization, but=[])
    stored["model.embed_tokens.weight"] = stored["lm_head.weight"].float()   # the same numbers, but for their scales
    write_checkpoint(tmp_path, config | dict(quantization_config=quantization), stored)
    assert_logits(tmp_path, plain(config, dequantised(stored), ids), ids)


def groups(change, kind="int", part="weights"):
    """A quantization_config whose group has other weights, or activations."""
    said = compressed_tensors(kind)
    group = said["config_groups"]["group_0"]
    return said | dict(config_groups=dict(group_0=group | {part: group[part] | change}))


UNSUPPORTED = {   # what a config says, and what the refusal must name
    "gptq": (dict(quant_method="gptq", bits=8), "quant_method", "gptq"),
    "awq": (dict(quant_method="awq", bits=4), "quant_method", "awq"),
    "bitsandbytes": (dict(quant_method="bitsandbytes", load_in_8bit=True), "quant_method", "bitsandbytes"),
    "mxfp4": (dict(quant_method="mxfp4"), "quant_method", "mxfp4"),
    "no method": (dict(bits=8), "quant_method", "null"),
    "method as a list": (BLOCKS | dict(quant_method=["fp8"]), "quant_method"),
    "not an object": (["fp8"], "quantization_config", "fp8"),
    "fp8, static activations": (BLOCKS | dict(activation_scheme="static"), "activation_scheme", "static"),
    "fp8, other blocks": (BLOCKS | dict(weight_block_size=[64, 128]), "weight_block_size", "[64, 128]"),
    "fp8, no blocks": ({k: v for k, v in BLOCKS.items() if k != "weight_block_size"}, "weight_block_size", "null"),
    "fp8, e5m2": (BLOCKS | dict(fmt="e5m2"), "fmt", "e5m2"),
    "packed": (INT8 | dict(format="pack-quantized"), "format", "pack-quantized"),
    "mixed": (INT8 | dict(format="mixed-precision"), "format", "mixed-precision"),
    "no format": (INT8 | dict(format=None), "format", "null"),
    "keys and values": (INT8 | dict(kv_cache_scheme=dict(num_bits=8, type="float")), "kv_cache_scheme"),
    "sparse": (INT8 | dict(sparsity_config=dict(format="sparse-24-bitmask")), "sparsity_config", "sparse-24-bitmask"),
    "rotated": (INT8 | dict(transform_config=dict(config_groups=dict(R1={}))), "transform_config", "R1"),
    "4 bits": (groups(dict(num_bits=4)), "group_0.weights.num_bits", "4"),
    "groups": (groups(dict(strategy="group", group_size=128)), "weights.strategy", "group"),
    "tensor": (groups(dict(strategy="tensor"), "float"), "weights.strategy", "tensor"),
    "asymmetric": (groups(dict(symmetric=False)), "weights.symmetric", "false"),
    "dynamic weights": (groups(dict(dynamic=True)), "weights.dynamic", "true"),
    "a type of numbers": (groups(dict(type="complex")), "weights.type", "complex"),
    "static activations": (groups(dict(dynamic=False), part="input_activations"), "input_activations.dynamic", "false"),
    "activations by tensor": (groups(dict(strategy="tensor"), part="input_activations"), "input_activations.strategy", "tensor"),
    "asymmetric activations": (groups(dict(symmetric=False), part="input_activations"), "input_activations.symmetric", "false"),
    "4-bit activations": (groups(dict(num_bits=4), part="input_activations"), "input_activations.num_bits", "4"),
    "other activations": (groups(dict(type="float"), part="input_activations"), "input_activations.type", "float"),
    "no activations": (INT8 | dict(config_groups=dict(group_0=dict(INT8["config_groups"]["group_0"], input_activations=None))),
                       "input_activations"),
    "outputs": (INT8 | dict(config_groups=dict(group_0=dict(INT8["config_groups"]["group_0"], output_activations=dict(num_bits=8)))),
                "output_activations"),
    "a group's own format": (INT8 | dict(config_groups=dict(group_0=dict(INT8["config_groups"]["group_0"], format="marlin-24"))),
                             "group_0.format", "marlin-24"),
    "two types": (INT8 | dict(config_groups=INT8["config_groups"] | dict(g=FP8["config_groups"]["group_0"])), "g.weights.type", "float"),
    "a group by name": (INT8 | dict(config_groups=dict(W8A8=["Linear"])), "W8A8"),
    "ignore as text": (INT8 | dict(ignore="lm_head"), "ignore", "lm_head"),
    "ignore as numbers": (BLOCKS | dict(modules_to_not_convert=[1]), "modules_to_not_convert"),
    "ignore with a torn pattern": (INT8 | dict(ignore=["re:("]), "ignore", "re:("),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_another_way_to_quantise_is_refused_by_name_before_any_weight_is_read(tmp_path, capfd, monkeypatch, name):
    said, *words = UNSUPPORTED[name]
    write_checkpoint(tmp_path, LLAMA | dict(quantization_config=said), llama_tensors(LLAMA))
    monkeypatch.setattr(checkpoint.Checkpoint, "__init__", lambda *a: pytest.fail("opened the weights"))
    assert cli.main(["--model", str(tmp_path), "--prompt", "x"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in ["config.json", *words]), err


@pytest.mark.parametrize("more", [dict(sparsity_config={}, transform_config={}, version="0.12.2"),
                                  dict(sparsity_config=dict(format="dense", global_sparsity=0.1), quantization_status="frozen"),
                                  dict(format="int-quantized"), dict(format="float-quantized"), dict(config_groups={})])
def test_what_other_versions_write_is_read(tmp_path, more):
    write_checkpoint(tmp_path, LLAMA | dict(quantization_config=INT8 | more), {})
    assert read_config(tmp_path).stored == ("int8" if more.get("config_groups") is None else None)


@pytest.mark.parametrize("kind", QUANTISED)
def test_gpt2_in_8_bits_is_refused(tmp_path, kind):
    write_checkpoint(tmp_path, GPT2 | dict(quantization_config=QUANTISED[kind]), {})
    with pytest.raises(ValueError, match="quantization_config.*gpt2"):
        read_config(tmp_path)


DOWN, Q = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"   # [148, 200] and [264, 148]
ROWS, BLOCK = {"int8": DOWN + "_scale", "fp8": DOWN + "_scale"}, {"blocks": DOWN + "_scale_inv"}
DAMAGED = {   # which tensor, in which checkpoints; what becomes of it; what the refusal must name besides
    "missing": (ROWS | BLOCK, lambda scale: None, "missing"),
    "a row too few": (ROWS | BLOCK, lambda scale: scale[1:].clone(), "shape"),
    "transposed": (ROWS | {"blocks": Q + "_scale_inv"}, lambda scale: scale.T.contiguous(), "shape"),
    "per block, not per row": (ROWS, lambda scale: torch.ones(2, 2), "[2, 2]", "[148, 1]"),
    "per row, not per block": (BLOCK, lambda scale: torch.ones(148, 1), "[148, 1]", "[2, 2]"),
    "per tensor": (ROWS | BLOCK, lambda scale: torch.ones(1), "[1]"),
    "of integers": (ROWS | BLOCK, lambda scale: scale.to(torch.int8), "I8"),
    "in 8 bits": (ROWS | BLOCK, lambda scale: scale.to(torch.float8_e4m3fn), "F8_E4M3"),
    **{f"one is {bad}": (ROWS | BLOCK, lambda scale, bad=bad: scale.index_fill(0, torch.tensor([1]), bad), "above 0")
       for bad in (0.0, -1e-3, math.nan, math.inf, -math.inf)},
    "weight in another type": ({"int8": DOWN}, lambda weight: weight.float().to(torch.float8_e4m3fn), "F8_E4M3"),
    "weight in integers": ({"fp8": DOWN, "blocks": DOWN}, lambda weight: weight.float().to(torch.int8), "I8"),
    "weight in e5m2": ({"fp8": DOWN, "blocks": DOWN}, lambda weight: weight.float().to(torch.float8_e5m2), "F8_E5M2"),
    "weight in floats beside scales": ({"int8": DOWN, "fp8": DOWN, "blocks": DOWN}, lambda weight: weight.float(), "scale", "no place"),
    "a norm in 8 bits": (dict.fromkeys(QUANTISED, "model.norm.weight"), lambda norm: norm.to(torch.int8), "I8"),
    "the embedding in 8 bits": (dict.fromkeys(QUANTISED, "model.embed_tokens.weight"), lambda e: e.to(torch.float8_e4m3fn), "F8_E4M3"),
}


@pytest.mark.parametrize("kind, name", [(kind, name) for name, (where, *_) in DAMAGED.items() for kind in where])
def test_a_damaged_scale_is_refused_in_one_sentence_that_names_it(tmp_path, capfd, kind, name):
    where, change, *words = DAMAGED[name]
    tensors = in_8_bits(llama_tensors(LLAMA | ODD), QUANTISED[kind])
    tensors[where[kind]] = change(tensors[where[kind]])
    write_checkpoint(tmp_path, LLAMA | ODD | dict(quantization_config=QUANTISED[kind]),
                     {name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert cli.main(["--model", str(tmp_path), "--prompt", "x"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert all(word in err for word in [where[kind].removeprefix("model."), *words]), err


@pytest.mark.parametrize("kind, key", [("int8", "ignore"), ("fp8", "ignore"), ("blocks", "modules_to_not_convert"),
                                       ("blocks", "ignored_layers")])
@pytest.mark.parametrize("word", ["model.layers.1.mlp.down_proj", "model.layers.1.mlp", "re:.*down_proj$", "re:.*layers\\.1\\."])
def test_a_layer_said_to_be_left_out_and_yet_stored_in_8_bits_is_refused_by_name(tmp_path, kind, key, word):
    said = {k: v for k, v in QUANTISED[kind].items() if k != "modules_to_not_convert"}
    write_quantised(tmp_path, LLAMA | ODD, said | {key: ["lm_head", "model.layers.1.mlp.down", word]})
    c = read_config(tmp_path)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.\d\..* is stored as (I8|F8_E4M3): beside this config\.json only float32"):
        checkpoint.load_weights(tmp_path, c, CPU, torch.float32)
    write_quantised(tmp_path, LLAMA | ODD, said | {key: ["lm_head", "model.layers.1.mlp.down", "re:down_proj"]})
    checkpoint.load_weights(tmp_path, read_config(tmp_path), CPU, torch.float32)   # these name no layer


def test_scales_that_have_no_use_are_refused_by_name(tmp_path):
    for name in ("weight_zero_point", "input_scale"):
        tensors = in_8_bits(llama_tensors(LLAMA), INT8) | {f"model.layers.0.mlp.down_proj.{name}": torch.zeros(1)}
        write_checkpoint(tmp_path, LLAMA | dict(quantization_config=INT8), tensors)
        with pytest.raises(ValueError, match=f"down_proj.{name} has no place"):
            LLM(tmp_path)


def test_8_bits_that_no_config_speaks_of_are_refused(tmp_path):
    tensors = in_8_bits(llama_tensors(LLAMA), INT8)
    write_checkpoint(tmp_path, LLAMA, tensors)
    with pytest.raises(ValueError, match="is stored as I8"):
        LLM(tmp_path)


# ---------------------------------------------------------------------------------------------
# Everything that can be wrong with a checkpoint, and what the error must name

def broken(name, *words):
    def register(change):
        BROKEN[name] = change, words
    return register


BROKEN = {}
broken("no config", "config.json")(lambda f, c, t: (f / "config.json").unlink())
broken("config torn", "config.json", "JSON")(lambda f, c, t: (f / "config.json").write_text('{"model_type": "lla'))
broken("config not UTF-8", "config.json")(lambda f, c, t: (f / "config.json").write_bytes(b'{"a": "\xff"}'))
broken("config without a key", "hidden_size")(lambda f, c, t: rewrite(f, c, hidden_size=None))
broken("config with text for a number", "vocab_size", "many")(lambda f, c, t: rewrite(f, c, vocab_size="many"))
broken("architecture", "BertModel")(lambda f, c, t: rewrite(f, c, model_type="bert", architectures=["BertModel"]))
broken("architecture of a known type", "LlamaForSequenceClassification")(
    lambda f, c, t: rewrite(f, c, architectures=["LlamaForSequenceClassification"]))
broken("rope type", "longrope")(lambda f, c, t: rewrite(f, c, rope_scaling={"rope_type": "longrope", "factor": 2.0}))
broken("rope type as a list", "rope type")(lambda f, c, t: rewrite(f, c, rope_scaling={"rope_type": ["linear"], "factor": 2.0}))
broken("rope without its factor", "factor")(lambda f, c, t: rewrite(f, c, rope_scaling={"type": "linear"}))
broken("yarn without its factor", "yarn", "factor")(lambda f, c, t: rewrite(f, c, rope_scaling={"rope_type": "yarn"}))
for key, value in dict(beta_fast="fast", beta_slow=0, truncate=1, attention_factor=-1, mscale=[1], mscale_all_dim=-1,
                       original_max_position_embeddings=-5).items():
    broken(f"yarn with a wrong {key}", key)(
        lambda f, c, t, key=key, value=value: rewrite(f, c, rope_scaling=YARN | {key: value}))
broken("yarn with a ramp upside down", "beta_fast", "beta_slow")(
    lambda f, c, t: rewrite(f, c, rope_scaling=YARN | dict(beta_fast=1, beta_slow=1.5)))
broken("yarn with a base of 1", "rope_theta", "above 1")(lambda f, c, t: rewrite(f, c, rope_scaling=YARN, rope_theta=1))
broken("activation", "swish7")(lambda f, c, t: rewrite(f, c, hidden_act="swish7"))
broken("eps as text", "rms_norm_eps", "1e-5")(lambda f, c, t: rewrite(f, c, rms_norm_eps="1e-5"))
broken("eps below 0", "rms_norm_eps")(lambda f, c, t: rewrite(f, c, rms_norm_eps=-1))
broken("architectures as a number", "architectures")(lambda f, c, t: rewrite(f, c, architectures=5))
broken("architectures as lists", "[1]")(lambda f, c, t: rewrite(f, c, architectures=[[1]]))
broken("model type as a list", "model_type")(lambda f, c, t: rewrite(f, c, model_type=["llama"]))
broken("rope as text", "rope_scaling")(lambda f, c, t: rewrite(f, c, rope_scaling="llama3"))
broken("eos as text", "eos_token_id", "x")(lambda f, c, t: rewrite(f, c, eos_token_id="x"))
broken("another eos as text", "generation_config.json", "eos_token_id")(
    lambda f, c, t: write_checkpoint(f, c, t, generation_config={"eos_token_id": "x"}))
broken("tied as text", "tie_word_embeddings")(lambda f, c, t: rewrite(f, c, tie_word_embeddings="x"))
broken("a size beyond reason", "num_attention_heads")(lambda f, c, t: rewrite(f, c, num_attention_heads=10 ** 30))
broken("a vocabulary larger than memory", "embed_tokens.weight", "2000000000")(lambda f, c, t: rewrite(f, c, vocab_size=2 * 10 ** 9))
broken("weight map as a list", "weight_map")(
    lambda f, c, t: (write_checkpoint(f, c, t, shards=2) / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'))
broken("weight map to nothing", "places tensor a")(
    lambda f, c, t: (write_checkpoint(f, c, t, shards=2) / "model.safetensors.index.json").write_text('{"weight_map": {"a": null}}'))
broken("JSON without end", "config.json")(lambda f, c, t: (f / "config.json").write_text("[" * 100000))
broken("heads", "4", "3")(lambda f, c, t: rewrite(f, c, num_key_value_heads=3))
broken("layer type", "chunked_attention")(
    lambda f, c, t: rewrite(f, c, model_type="qwen3", architectures=None, layer_types=["chunked_attention"] * 2))
broken("no weights", "model.safetensors")(lambda f, c, t: (f / "model.safetensors").unlink())
broken("only pickled weights", "model.safetensors")(
    lambda f, c, t: (f / "model.safetensors").rename(f / "pytorch_model.bin"))
broken("missing tensor", "layers.1.mlp.up_proj.weight")(lambda f, c, t: reweigh(f, t, "model.layers.1.mlp.up_proj.weight", None))
broken("misnamed tensor", "layers.1.mlp.up_proj.weight", "layers.1.mlp.upp_proj.weight")(
    lambda f, c, t: reweigh(f, t | {"model.layers.1.mlp.upp_proj.weight": torch.ones(48, 32)}, "model.layers.1.mlp.up_proj.weight", None))
broken("misshapen tensor", "model.layers.0.self_attn.k_proj.weight", "[16, 31]", "[16, 32]")(
    lambda f, c, t: reweigh(f, t, "model.layers.0.self_attn.k_proj.weight", torch.ones(16, 31)))
broken("tensor of integers", "model.norm.weight", "I8")(
    lambda f, c, t: reweigh(f, t, "model.norm.weight", torch.ones(32, dtype=torch.int8)))
broken("a tensor too many", "model.layers.0.self_attn.q_proj.bias")(
    lambda f, c, t: reweigh(f, t, "model.layers.0.self_attn.q_proj.bias", torch.ones(32)))
broken("untied without a head", "lm_head.weight")(lambda f, c, t: reweigh(f, t, "lm_head.weight", None))
broken("torn in the data", "model.safetensors", "torn at tensor")(lambda f, c, t: cut(f / "model.safetensors", 0.6))
broken("torn in the header", "model.safetensors", "header")(lambda f, c, t: cut(f / "model.safetensors", 0.001))
broken("empty weights", "model.safetensors", "torn")(lambda f, c, t: cut(f / "model.safetensors", 0))
broken("missing shard", "model-00002-of-00002.safetensors")(
    lambda f, c, t: (write_checkpoint(f, c, t, shards=2) / "model-00002-of-00002.safetensors").unlink())
broken("shard without its tensor", "model-00001-of-00002.safetensors", "lm_head.weight")(
    lambda f, c, t: save_file({"a": torch.ones(1)}, write_checkpoint(f, c, t, shards=2) / "model-00001-of-00002.safetensors"))
broken("tokenizer torn", "tokenizer.json")(lambda f, c, t: (f / "tokenizer.json").write_text("{"))
broken("tokenizer.model without some bytes", "tokenizer.model", "byte")(
    lambda f, c, t: (f / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 1\n"))
broken("tokenizer.model torn", "tokenizer.model", "line 2")(lambda f, c, t: (f / "tokenizer.model").write_bytes(b"YQ== 0\nYg=="))
broken("tokenizer with a torn pattern", "tokenizer", "damaged")(lambda f, c, t: (f / "tokenizer.json").write_text(json.dumps(
    tokenizer_json(split_by("(?i:a"), None, None))))
broken("tokenizer without its parts", "tokenizer")(lambda f, c, t: (f / "tokenizer.json").write_text("{}"))


def rewrite(folder, config, **changes):
    (folder / "config.json").write_text(json.dumps(config | changes))


def reweigh(folder, tensors, name, tensor):
    save_file({n: t for n, t in (tensors | {name: tensor}).items() if t is not None}, folder / "model.safetensors")


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_refused_in_one_sentence_that_names_the_fault(tmp_path, capfd, name):
    change, words = BROKEN[name]
    tensors = llama_tensors(LLAMA)
    change(write_checkpoint(tmp_path, LLAMA, tensors), LLAMA, tensors)
    assert cli.main(["--model", str(tmp_path), "--prompt", "x"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in words), err


def test_unsupported_config_is_refused_before_any_weight_is_read(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, LLAMA | dict(rope_scaling={"rope_type": "dynamic"}), llama_tensors(LLAMA))
    monkeypatch.setattr(checkpoint.Checkpoint, "__init__", lambda *a: pytest.fail("opened the weights"))
    with pytest.raises(ValueError, match="dynamic"):
        LLM(tmp_path)
    rewrite(tmp_path, LLAMA, head_dim=300)
    with pytest.raises(ValueError, match="head size 300"):
        LLM(tmp_path)
    rewrite(tmp_path, LLAMA)
    with pytest.raises(ValueError, match="magic"):
        LLM(tmp_path, attention="magic")
    with pytest.raises(ValueError, match="cuda_graphs"):
        LLM(tmp_path, attention="torch", cuda_graphs=True)
    if kernels.INTERPRETED:
        with pytest.raises(ValueError, match="bfloat16"):
            LLM(tmp_path, attention="triton", dtype="bfloat16")
