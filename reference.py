"""The models once more, in the most naive way, for tests to compare with. (Test support: the engine imports none of it.)

The whole sequence at once, in float64, a head at a time where that is plainer: no cache, no paging, nothing fused,
nothing stacked. It is written from the papers and from what transformers computes, and it shares no code with the engine,
not even the reading of a config: a mistake would have to be made twice, in two ways, to go unseen.

    config     a config.json as a dict: GPT2 and LLAMA are the smallest, FAMILIES has one for each kind of checkpoint
    tensors    name -> tensor, as the checkpoint's file holds them: `tensors_of(config)`, at random, always the same
    folder     `write_checkpoint(folder, config, tensors)` is what the engine loads
    8 bits     `in_8_bits(tensors, quantization)` are the tensors as such a file holds them, `dequantised` what they stand for
    logits     `plain(config, tensors, ids)` is what it must compute
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GPT2 = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=61, n_positions=160, n_embd=32, n_layer=2,
            n_head=4, eos_token_id=50256, bos_token_id=50256)
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=61, hidden_size=32, intermediate_size=48,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160,
             rms_norm_eps=1e-5, eos_token_id=None)
MISTRAL, QWEN2, QWEN3 = (LLAMA | dict(model_type=name.lower(), architectures=[f"{name}ForCausalLM"])
                         for name in ("Mistral", "Qwen2", "Qwen3"))
MIXTRAL = LLAMA | dict(model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=4, num_experts_per_tok=2)
QWEN3_MOE = LLAMA | dict(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], head_dim=16, num_experts=7,
                         num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True)
DEEPSEEK_V2_MOE = dict(model_type="deepseek_v2", hidden_size=32, intermediate_size=48, num_hidden_layers=3, n_routed_experts=12,
                       num_experts_per_tok=3, moe_intermediate_size=20, n_shared_experts=2, first_k_dense_replace=1,
                       topk_method="group_limited_greedy", n_group=4, topk_group=2, scoring_func="softmax",
                       routed_scaling_factor=1.5, norm_topk_prob=False)   # of a config, what says something of experts
DEEPSEEK_V3_MOE = DEEPSEEK_V2_MOE | dict(model_type="deepseek_v3", topk_method="noaux_tc", scoring_func="sigmoid",
                                         norm_topk_prob=True, routed_scaling_factor=2.5)
LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=40)
FAMILIES = {
    "gpt2": GPT2,
    "gpt2 relu, n_inner, scaled by layer": GPT2 | dict(activation_function="relu", n_inner=40, layer_norm_epsilon=1e-3,
                                                       scale_attn_by_inverse_layer_idx=True),
    "gpt2 gelu, untied, unscaled": GPT2 | dict(activation_function="gelu", tie_word_embeddings=False, scale_attn_weights=False),
    "llama 2": LLAMA | dict(num_key_value_heads=4),
    "llama one KV head, own head size, biases, tied": LLAMA | dict(
        num_attention_heads=5, num_key_value_heads=1, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama 3.1": LLAMA | dict(head_dim=32, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE | {"rope_type": "llama3"},
                              torch_dtype="bfloat16"),
    "llama 3.1, new spelling": LLAMA | dict(head_dim=32, rope_parameters=LLAMA3_ROPE | dict(rope_type="llama3", rope_theta=2e4),
                                            dtype="float32"),
    "llama linear rope, old spelling": LLAMA | dict(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama yarn, as DeepSeek has it": LLAMA | dict(head_dim=32, rope_parameters=YARN | dict(
        mscale=0.707, mscale_all_dim=0.5, beta_fast=3, beta_slow=0.2, truncate=False, rope_theta=300.0)),
    "mistral": MISTRAL | dict(sliding_window=9, num_key_value_heads=1),
    "mistral without a window": MISTRAL | dict(sliding_window=None),
    "qwen2": QWEN2 | dict(sliding_window=5),
    "qwen2 with windows": QWEN2 | dict(sliding_window=5, use_sliding_window=True, max_window_layers=1),
    "qwen2 yarn, old spelling": QWEN2 | dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=40),
                                             max_position_embeddings=40, head_dim=32, rope_theta=200.0),
    "qwen3": QWEN3 | dict(head_dim=16, num_attention_heads=6),
    "qwen3 with biases, windows by name": QWEN3 | dict(attention_bias=True, sliding_window=7, use_sliding_window=True,
                                                       layer_types=["sliding_attention", "full_attention"]),
}
EXPERTS = {
    "mixtral": MIXTRAL,
    "mixtral with a window, eps by default": MIXTRAL | dict(sliding_window=9, rms_norm_eps=None, num_local_experts=3),
    "mixtral, all experts": MIXTRAL | dict(num_experts_per_tok=4),
    "mixtral, one expert": MIXTRAL | dict(num_local_experts=1, num_experts_per_tok=1),
    "qwen3 moe": QWEN3_MOE,
    "qwen3 moe, not renormalised": QWEN3_MOE | dict(norm_topk_prob=False, num_experts_per_tok=1),
    "qwen3 moe, some layers dense, biases, a window": QWEN3_MOE | dict(
        num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3], attention_bias=True, use_sliding_window=True,
        sliding_window=11, tie_word_embeddings=True),
    "qwen3 moe, yarn": QWEN3_MOE | dict(rope_scaling=YARN, mlp_only_layers=[0]),
}
LATENT = LLAMA | dict(kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, num_attention_heads=3)
YOUTU = LATENT | dict(model_type="youtu", architectures=["YoutuForCausalLM"], tie_word_embeddings=False)
DEEPSEEK_V2, DEEPSEEK_V3 = (LATENT | moe | dict(architectures=[f"Deepseek{version}ForCausalLM"], intermediate_size=40)
                            for version, moe in (("V2", DEEPSEEK_V2_MOE), ("V3", DEEPSEEK_V3_MOE)))
LATENTS = {
    "youtu": YOUTU | dict(tie_word_embeddings=True, num_nextn_predict_layers=1),
    "youtu, pairs apart, no latent queries": YOUTU | dict(rope_interleave=False, q_lora_rank=None),
    "deepseek v2": DEEPSEEK_V2 | dict(q_lora_rank=None, num_attention_heads=4, rms_norm_eps=0.01),
    "deepseek v2, yarn": DEEPSEEK_V2 | dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=0.9), topk_method="greedy"),
    "deepseek v3, biases, yarn": DEEPSEEK_V3 | dict(attention_bias=True, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    "deepseek v3, pairs apart, large values": DEEPSEEK_V3 | dict(rope_interleave=False, v_head_dim=25, kv_lora_rank=8),
    "kimi k2": DEEPSEEK_V3 | dict(model_type="kimi_k2", n_group=1, topk_group=1, num_attention_heads=2),
    "glm 4.7 flash": DEEPSEEK_V3 | dict(model_type="glm4_moe_lite", architectures=["Glm4MoeLiteForCausalLM"], n_group=1, topk_group=1,
                                        mlp_layer_types=["sparse", "dense", "sparse"], first_k_dense_replace=None),
}
CONFIGS = {"llama": LLAMA, "mistral": FAMILIES["mistral"], "gpt2": GPT2}


# ---------------------------------------------------------------------------------------------
# Checkpoints: written at random, in the names of the real ones

def gpt2_tensors(c: dict) -> dict[str, Tensor]:
    E, I = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    shapes = {"wte.weight": (c["vocab_size"], E), "wpe.weight": (c.get("n_positions") or c["n_ctx"], E),
              "ln_f.weight": (E,), "ln_f.bias": (E,)}
    for l in range(c["n_layer"]):
        for name, shape in {"ln_1": (E,), "ln_2": (E,), "attn.c_attn": (E, 3 * E), "attn.c_proj": (E, E),
                            "mlp.c_fc": (E, I), "mlp.c_proj": (I, E)}.items():
            shapes[f"h.{l}.{name}.weight"], shapes[f"h.{l}.{name}.bias"] = shape, shape[-1:]
    if c.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = c["vocab_size"], E
    return random_tensors(shapes)


def llama_tensors(c: dict) -> dict[str, Tensor]:
    E, (H, K, D) = c["hidden_size"], heads(c)
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], E), "model.norm.weight": (E,)}
    for l in range(c["num_hidden_layers"]):
        at = f"model.layers.{l}."
        shapes |= {at + "input_layernorm.weight": (E,), at + "post_attention_layernorm.weight": (E,)}
        attention = {"self_attn.q_proj": (H * D, E), "self_attn.k_proj": (K * D, E), "self_attn.v_proj": (K * D, E),
                     "self_attn.o_proj": (E, H * D)}
        if "kv_lora_rank" in c:
            attention, norms = latent_shapes(c)
            shapes |= {f"{at}{name}.weight": shape for name, shape in norms.items()}
        for name, shape in (attention | mlp_shapes(c, l)).items():
            shapes[f"{at}{name}.weight"] = shape
            if has_bias(c, name):
                shapes[f"{at}{name}.bias"] = shape[:1]
        if c["model_type"] in SIGMOIDS and experts_of(c, l):
            shapes[at + "mlp.gate.e_score_correction_bias"] = c["n_routed_experts"],
        if c["model_type"] in ("qwen3", "qwen3_moe"):
            shapes |= {at + "self_attn.q_norm.weight": (D,), at + "self_attn.k_norm.weight": (D,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = c["vocab_size"], E
    return random_tensors(shapes)


def latent_shapes(c: dict) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """The matrices of a layer's latent attention, and its norms."""
    E, H, R, P = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    queries, widened = H * (c["qk_nope_head_dim"] + P), H * (c["qk_nope_head_dim"] + c["v_head_dim"])
    matrices = {"kv_a_proj_with_mqa": (R + P, E), "kv_b_proj": (widened, R), "o_proj": (E, H * c["v_head_dim"])}
    norms = {"kv_a_layernorm": (R,)}
    if c["q_lora_rank"]:
        matrices |= {"q_a_proj": (c["q_lora_rank"], E), "q_b_proj": (queries, c["q_lora_rank"])}
        norms["q_a_layernorm"] = c["q_lora_rank"],
    else:
        matrices["q_proj"] = queries, E
    return tuple({"self_attn." + name: shape for name, shape in found.items()} for found in (matrices, norms))


def mlp_shapes(c: dict, l: int) -> dict[str, tuple[int, int]]:
    """The matrices in layer l's MLP, or of its router and experts."""
    E, I, X = c["hidden_size"], c["intermediate_size"], experts_of(c, l)

    def mlp(at, I, gate="gate_proj", up="up_proj", down="down_proj"):
        return {f"{at}.{gate}": (I, E), f"{at}.{up}": (I, E), f"{at}.{down}": (E, I)}
    if not X:
        return mlp("mlp", I)
    place, *names = expert_names(c)
    shapes, I = {place + ".gate": (X, E)}, c.get("moe_intermediate_size", I)
    for x in range(X):
        shapes |= mlp(f"{place}.experts.{x}", I, *names)
    if c.get("n_shared_experts"):
        shapes |= mlp(place + ".shared_experts", I * c["n_shared_experts"])
    return shapes


def experts_of(c: dict, l: int) -> int:
    """How many experts layer l has; 0: it has one MLP."""
    if c["model_type"] == "mixtral":
        return c["num_local_experts"]
    if c["model_type"] == "glm4_moe_lite":
        return c["n_routed_experts"] if c["mlp_layer_types"][l] == "sparse" else 0
    if c["model_type"] in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        return c["n_routed_experts"] if l >= c["first_k_dense_replace"] else 0
    dense = c["model_type"] != "qwen3_moe" or l in (c.get("mlp_only_layers") or [])
    return 0 if dense or (l + 1) % (c.get("decoder_sparse_step") or 1) else c["num_experts"]


def expert_names(c: dict) -> tuple[str, str, str, str]:
    """Where a layer's router and experts are, and an expert's gate, up and down."""
    return (("block_sparse_moe", "w1", "w3", "w2") if c["model_type"] == "mixtral" else
            ("mlp", "gate_proj", "up_proj", "down_proj"))


def heads(c: dict) -> tuple[int, int, int]:
    """Query heads, KV heads and head size of a Llama-like config."""
    H = c["num_attention_heads"]
    return H, c.get("num_key_value_heads") or H, c.get("qk_rope_head_dim") or c.get("head_dim") or c["hidden_size"] // H


def has_bias(c: dict, name: str) -> bool:
    if c["model_type"] == "qwen2":
        return name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    if "kv_lora_rank" in c:
        return bool(c.get("attention_bias")) and name in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
    if name.startswith("self_attn"):
        return c["model_type"] in ("llama", "qwen3", "qwen3_moe") and bool(c.get("attention_bias"))
    return c["model_type"] == "llama" and bool(c.get("mlp_bias"))


def random_tensors(shapes: dict[str, tuple]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=g) * (0.3 if len(shape) > 1 else 0.1)
            + (1 if "norm.weight" in name or "ln_" in name and "weight" in name else 0) for name, shape in shapes.items()}


def tensors_of(config: dict) -> dict[str, Tensor]:
    return (gpt2_tensors if config["model_type"] == "gpt2" else llama_tensors)(config)


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, Tensor], shards: int = 1, **more) -> Path:
    """A checkpoint folder. `more`: further JSON files, by name and content."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in more.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    (folder / "model.safetensors").unlink(missing_ok=True)
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file)
        where |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


# ---------------------------------------------------------------------------------------------
# Checkpoints stored in 8 bits: the layers that transformers calls Linear, each with its scales

def compressed_tensors(kind: str, ignore: list[str] = ["lm_head"], format: str = "naive-quantized") -> dict:
    """The `quantization_config` that llm-compressor writes for scales per row; `kind` is "int" or "float"."""
    numbers = dict(num_bits=8, type=kind, symmetric=True, group_size=None)
    group = dict(targets=["Linear"], weights=numbers | dict(strategy="channel", dynamic=False, observer="minmax"),
                 input_activations=numbers | dict(strategy="token", dynamic=True, observer=None), output_activations=None)
    return dict(quant_method="compressed-tensors", format=format, config_groups=dict(group_0=group), ignore=ignore,
                kv_cache_scheme=None, quantization_status="compressed", global_compression_ratio=None)


def fp8_blocks(ignore: list[str] = ["lm_head"]) -> dict:
    """The `quantization_config` of DeepSeek-V3 and Qwen3: scales per block."""
    return dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128],
                modules_to_not_convert=ignore)


def linear_layers(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if re.search(r"(_proj|_mqa|lm_head|\.w[123])\.weight$", name)]


def in_8_bits(tensors: dict[str, Tensor], quantization: dict, but: list[str] = ["lm_head"],
              scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors as the file of a quantised checkpoint holds them: all linear layers but those named are in 8 bits."""
    blocks, stored = quantization["quant_method"] == "fp8", dict(tensors)
    integers = not blocks and quantization["config_groups"]["group_0"]["weights"]["type"] == "int"
    largest = 127 if integers else 448
    for layer in linear_layers(tensors):
        if layer in but:
            continue
        weight = tensors[layer + ".weight"]
        if blocks:
            scale = torch.tensor([[block.abs().max() / largest for block in rows.split(128, 1)] for rows in weight.split(128)])
        else:
            scale = weight.abs().amax(1, keepdim=True) / largest
        scale = scale.to(scale_dtype)
        each = scale.float()
        if blocks:
            each = each.repeat_interleave(128, 0).repeat_interleave(128, 1)[:weight.shape[0], :weight.shape[1]]
        numbers = (weight / each).clamp(-largest, largest)
        stored[layer + ".weight"] = numbers.round().to(torch.int8) if integers else numbers.to(torch.float8_e4m3fn)
        stored[layer + (".weight_scale_inv" if blocks else ".weight_scale")] = scale
    return stored


def as_int8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What LLM(quantization="int8") makes of the tensors, in float64: whatever rows are multiplied by is in 127 steps for
    each output, and is marked. A tied head is no longer the embedding."""
    meant = {name: tensor.double() for name, tensor in tensors.items()}
    (embedding,) = (name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
    tensors = {"lm_head.weight": tensors[embedding]} | tensors
    for name, tensor in tensors.items():
        if re.search(r"(_proj|_mqa|lm_head|c_attn|c_proj|c_fc|\.w[123])\.weight$", name):
            outputs_last = ".c_" in name
            meant[name] = (int8(tensor.T).T if outputs_last else int8(tensor)).double()
            meant[name.removesuffix("weight") + "rounded"] = torch.ones(())
    return meant


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the tensors of such a file stand for, in float64. A scale multiplies, also where it is called an inverse. A
    layer in int8 is marked: its rows are in 8 bits, too."""
    meant = {name.removesuffix("weight") + "rounded": torch.ones(()) for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    for name, tensor in tensors.items():
        if name.endswith(("_scale", "_scale_inv")):
            continue
        meant[name] = tensor.double()
        if name + "_scale" in tensors:
            for o, scale in enumerate(tensors[name + "_scale"].flatten().tolist()):
                meant[name][o] *= scale
        if name + "_scale_inv" in tensors:
            for i, row in enumerate(tensors[name + "_scale_inv"].tolist()):
                for j, scale in enumerate(row):
                    meant[name][128 * i:128 * (i + 1), 128 * j:128 * (j + 1)] *= scale
    return meant


# ---------------------------------------------------------------------------------------------
# The forward pass

def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


ACTIVATIONS = {"gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
               "relu": lambda x: x.clamp(min=0), "silu": silu, "swish": silu}


def as_it_is(x: Tensor) -> Tensor:
    return x


def int8(x: Tensor) -> Tensor:
    """Every row in 127 steps up to its largest element: K or V [K, T, D] as a cache of int8 gives them back, or what a
    product of int8 makes of a matrix."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def rows_for(name: str, x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Rows as a layer takes them: one in int8 rounds them, too."""
    return int8(x) if name + ".rounded" in w else x


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [H, T, D], k and v [K, T, D]."""
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    ones = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
    seen = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
    return torch.where(seen, q @ k.mT * scale, -torch.inf).softmax(-1) @ v


def plain_gpt2(c: dict, w: dict[str, Tensor], ids: list[int], kv) -> Tensor:
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in w.items()}
    E, H = c["n_embd"], c["n_head"]
    act = ACTIVATIONS[c.get("activation_function") or "gelu_new"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        eps = c.get("layer_norm_epsilon") or 1e-5
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def conv(x, name):
        return rows_for(name, x, w) @ w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    for l in range(c["n_layer"]):
        q, k, v = (part.view(-1, H, E // H).transpose(0, 1) for part in conv(norm(x, f"h.{l}.ln_1"), f"h.{l}.attn.c_attn").split(E, -1))
        scale = 1.0 if c.get("scale_attn_weights") is False else 1 / math.sqrt(E // H)
        if c.get("scale_attn_by_inverse_layer_idx"):
            scale /= l + 1
        x = x + conv(plain_attention(q, kv(k), kv(v), scale, None).transpose(0, 1).reshape(-1, E), f"h.{l}.attn.c_proj")
        x = x + conv(act(conv(norm(x, f"h.{l}.ln_2"), f"h.{l}.mlp.c_fc")), f"h.{l}.mlp.c_proj")
    return rows_for("lm_head", norm(x, "ln_f"), w) @ w.get("lm_head.weight", w["wte.weight"]).T


def plain_frequencies(c: dict) -> list[float]:
    """RoPE's radians per position, for each pair of a head's dimensions."""
    rope, D, frequencies = c.get("rope_scaling") or c.get("rope_parameters") or {}, heads(c)[2], []
    kind, theta = rope.get("rope_type", rope.get("type")), rope.get("rope_theta") or c.get("rope_theta") or (
        1e6 if c.get("model_type") == "mixtral" else 1e4)
    for i in range(D // 2):
        f = theta ** (-2 * i / D)
        if kind == "linear":
            f /= rope["factor"]
        if kind == "llama3":
            wavelength, old = 2 * math.pi / f, rope["original_max_position_embeddings"]
            if wavelength > old / rope["low_freq_factor"]:
                f /= rope["factor"]
            elif wavelength > old / rope["high_freq_factor"]:
                smooth = (old / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
                f = (1 - smooth) * f / rope["factor"] + smooth * f
        if kind == "yarn":
            first, last = yarn_pairs(c, rope, theta)
            stretched = min(1, max(0, (i - first) / (last - first if last != first else 0.001)))
            f = stretched * f / rope["factor"] + (1 - stretched) * f
        frequencies.append(f)
    return frequencies


def yarn_pairs(c: dict, rope: dict, theta: float) -> tuple[float, float]:
    """The last pair that is left as it is, and the first that is stretched in full: those that turn beta_fast and
    beta_slow times within the context of the training. Pairs are counted in real numbers, or rounded away from each other."""
    D, old = heads(c)[2], rope.get("original_max_position_embeddings") or c["max_position_embeddings"]
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    # theta ^ (-2 i / D) * old = 2 pi turns, solved for i
    first, last = (D / 2 * math.log(old / (2 * math.pi * n), theta) for n in turns)
    if rope.get("truncate") is not False:
        first, last = math.floor(first), math.ceil(last)
    return max(first, 0), min(last, D - 1)


def plain_attention_factor(c: dict) -> float:
    """What yarn multiplies q and k by."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return 1.0
    if rope.get("attention_factor"):
        return rope["attention_factor"]
    if rope["factor"] <= 1:
        return 1.0
    m, n = rope.get("mscale"), rope.get("mscale_all_dim")
    return (0.1 * m * math.log(rope["factor"]) + 1) / (0.1 * n * math.log(rope["factor"]) + 1) if m and n else (
        0.1 * math.log(rope["factor"]) + 1)


def plain_window(c: dict, l: int) -> int | None:
    """How many keys back a query of layer l sees, itself included; None: all."""
    if c["model_type"] == "mistral":
        return c.get("sliding_window", 4096)
    if c["model_type"] == "mixtral":
        return c.get("sliding_window")
    if c["model_type"] == "qwen3_moe":
        return c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    if c["model_type"] == "llama" or not c.get("use_sliding_window"):
        return None
    if c.get("layer_types"):
        return c.get("sliding_window", 4096) if c["layer_types"][l] == "sliding_attention" else None
    return c.get("sliding_window", 4096) if l >= c.get("max_window_layers", 28) else None


SIGMOIDS = "deepseek_v3", "kimi_k2", "glm4_moe_lite"   # the scores of their routers


def plain_choice(c: dict, logits: list[float], corrections: list[float] | None = None) -> dict[int, float]:
    """The experts that a token chooses and the weight of each, of what the router says of it. Of equals the first is chosen."""
    X, kind, exps = len(logits), c["model_type"], [math.exp(z) for z in logits]
    score = [e / (1 + e) for e in exps] if kind in SIGMOIDS else [e / sum(exps) for e in exps]
    rank, allowed = [s + b for s, b in zip(score, corrections or [0] * X)], range(X)
    if kind in SIGMOIDS or c.get("topk_method") == "group_limited_greedy":
        size, best = X // c["n_group"], 2 if kind in SIGMOIDS else 1
        worth = {g: sum(sorted(rank[g * size:(g + 1) * size])[-best:]) for g in range(c["n_group"])}
        groups = sorted(worth, key=lambda g: -worth[g])[:c["topk_group"]]
        allowed = [x for x in range(X) if x // size in groups]
    chosen = sorted(allowed, key=lambda x: -rank[x])[:c["num_experts_per_tok"]]
    whole = sum(score[x] for x in chosen) if kind == "mixtral" or c.get("norm_topk_prob") else 1
    return {x: score[x] / whole * c.get("routed_scaling_factor", 1.0) for x in chosen}


def plain_mixture(c: dict, w: dict[str, Tensor], h: Tensor, at: str, mlp) -> Tensor:
    """A token at a time, its experts one after another, and what all tokens share. mlp(h, at, gate, up, down): one MLP."""
    (place, *names), y = expert_names(c), torch.zeros_like(h)
    corrections = w.get(f"{at}{place}.gate.e_score_correction_bias")
    for t in range(len(h)):
        logits = (w[f"{at}{place}.gate.weight"] @ h[t]).tolist()
        for x, weight in plain_choice(c, logits, None if corrections is None else corrections.tolist()).items():
            y[t] += weight * mlp(h[t:t + 1], f"{at}{place}.experts.{x}", *names)[0]
    return y + mlp(h, f"{at}{place}.shared_experts", *names) if c.get("n_shared_experts") else y


def plain_llama(c: dict, w: dict[str, Tensor], ids: list[int], kv) -> Tensor:
    w = {name.removeprefix("model."): tensor.double() for name, tensor in w.items()}
    T, D, act = len(ids), heads(c)[2], ACTIVATIONS[c.get("hidden_act") or "silu"]
    angles = torch.arange(T)[:, None] * torch.tensor(plain_frequencies(c), dtype=torch.float64)

    def norm(x, name):
        eps = c.get("rms_norm_eps") or (1e-5 if c["model_type"] == "mixtral" else 1e-6)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]

    def project(x, name):
        return rows_for(name, x, w) @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def turn(x):   # each pair of a head's dimensions as a complex number
        x = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([x.real, x.imag], -1) * plain_attention_factor(c)

    def latents(h, at):
        """Every head's own keys and values, made of each token's latent as the cache gives it back."""
        U, P, W, R = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]

        def small_norm(x, name):
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[at + name + ".weight"]

        def side_by_side(x):   # the other order of the same pairs
            apart = c["model_type"] != "deepseek_v2" and c.get("rope_interleave") is False
            return x if apart else torch.cat([x[..., 0::2], x[..., 1::2]], -1)
        if c["q_lora_rank"]:
            q = project(small_norm(project(h, at + "q_a_proj"), "q_a_layernorm"), at + "q_b_proj")
        else:
            q = project(h, at + "q_proj")
        q, down, H = q.view(T, -1, U + P).transpose(0, 1), project(h, at + "kv_a_proj_with_mqa"), c["num_attention_heads"]
        rotary = turn(side_by_side(down[:, R:]))
        kept = kv(torch.cat([small_norm(down[:, :R], "kv_a_layernorm"), rotary], -1)[None])[0]
        widened = (kept[:, :R] @ w[at + "kv_b_proj.weight"].T).view(T, H, U + W).transpose(0, 1)
        k = torch.cat([widened[..., :U], kept[None, :, R:].expand(H, -1, -1)], -1)
        q = torch.cat([q[..., :U], turn(side_by_side(q[..., U:]))], -1)
        rope, scale = c.get("rope_scaling") or {}, (U + P) ** -0.5
        if rope.get("mscale_all_dim"):
            scale *= (1 + 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"])) ** 2
        return plain_attention(q, k, widened[..., U:], scale, None)

    def mlp(h, at, gate="gate_proj", up="up_proj", down="down_proj"):
        return project(act(project(h, f"{at}.{gate}")) * project(h, f"{at}.{up}"), f"{at}.{down}")

    x = w["embed_tokens.weight"][ids]
    for l in range(c["num_hidden_layers"]):
        at, h = f"layers.{l}.", norm(x, f"layers.{l}.input_layernorm")
        if "kv_lora_rank" in c:
            o = latents(h, at + "self_attn.")
        else:
            q, k, v = (project(h, f"{at}self_attn.{name}_proj").view(T, -1, D).transpose(0, 1) for name in "qkv")
            if c["model_type"] in ("qwen3", "qwen3_moe"):
                q, k = norm(q, at + "self_attn.q_norm"), norm(k, at + "self_attn.k_norm")
            o = plain_attention(turn(q), kv(turn(k)), kv(v), D ** -0.5, plain_window(c, l))
        x = x + project(o.transpose(0, 1).reshape(T, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        x = x + (plain_mixture(c, w, h, at, mlp) if experts_of(c, l) else mlp(h, at + "mlp"))
    return project(norm(x, "norm"), "lm_head" if "lm_head.weight" in w else "embed_tokens")


def plain(config: dict, tensors: dict[str, Tensor], ids: list[int], kv=as_it_is) -> Tensor:
    """float64 [T, V]: the logits after each token. Tensors that no layer names are ignored, as biases and heads are used
    wherever they are stored. kv: what a cache makes of K and V."""
    return (plain_gpt2 if config["model_type"] == "gpt2" else plain_llama)(config, tensors, ids, kv)


def plain_greedy(config: dict, tensors: dict[str, Tensor], ids: list[int], n: int, kv=as_it_is) -> list[int]:
    """n greedy tokens, the whole prefix recomputed for each."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(plain(config, tensors, ids, kv)[-1].argmax()))
    return ids[-n:]


NEW = 12   # tokens that most tests of the engine ask for


@cache
def keeps_the_order_of_sums() -> bool:
    """Whether PyTorch's products on this processor are the same to the last bit with other matrices beside them and with
    more zeros at their end, as long as there are a multiple of 16 of them. Nobody promises that."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, n, 64, generator=generator) for n in (3, 192, 192))

    def attend(n: int, keys: int) -> Tensor:
        mask = torch.zeros(n, 3, keys)
        mask[:, :, 45:] = -torch.inf
        return torch.baddbmm(mask, q[:n], k[:n, :keys].mT).softmax(-1) @ v[:n, :keys]

    return all(attend(40, keys)[:n].equal(attend(n, 48)) for n in (1, 2, 8) for keys in (48, 64, 144, 192))


def repeat(step):
    """In the place of `batch.record` where there is no GPU: what it gives runs the step again."""
    result = step()
    return lambda: result.copy_(step()), result
