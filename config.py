"""config.json says how large a model is, and which variant of its family.
(What the engine stands on: a first reading may skip it, and come back for `Config`, which is what the others see.)

A config may ask for what this engine does not compute, and a wrong guess would not crash: it would write plausible
nonsense. So every entry that changes a result is read, and what is not supported is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from linear import GROUP

MODEL_TYPES = {"gpt2": ("GPT2LMHeadModel", "GPT2Model"), "llama": ("LlamaForCausalLM", "LlamaModel"),
               "mistral": ("MistralForCausalLM", "MistralModel"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
               "qwen3": ("Qwen3ForCausalLM", "Qwen3Model"), "mixtral": ("MixtralForCausalLM", "MixtralModel"),
               "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
               "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Model"),
               "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Model"),
               "kimi_k2": ("DeepseekV3ForCausalLM",), "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", "Glm4MoeLiteModel"),
               "youtu": ("YoutuForCausalLM", "YoutuModel")}
LATENT = "deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "youtu"   # all but V2 are computed alike
ACTIVATIONS = "gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "swish"   # model.py has the functions


@dataclass
class Latent:
    """The sizes of latent attention (latent.py says what they are)."""
    rank: int              # Z, of the latent: kv_lora_rank
    plain: int             # U, the unrotated numbers of a head's key: qk_nope_head_dim
    rotary: int            # P, the rotary ones: qk_rope_head_dim
    value: int             # W, of a head's value: v_head_dim
    q_rank: int | None     # of the queries' own latent; None: they have none


@dataclass
class Experts:
    """What a model says of its experts (experts.py). In its other layers a token meets one MLP."""
    layers: Set[int]               # those that have experts
    X: int                         # experts of such a layer
    C: int                         # how many of them a token chooses
    I: int                         # their hidden size
    names: tuple[str, ...]         # in the files: the place of router and experts; an expert's gate, up and down
    normalised: bool               # the weights of a token's choices are made to add up to 1
    scoring: str = "softmax"       # what makes scores of the router's products: "softmax" or "sigmoid"
    corrected: bool = False        # choices, not weights, are by score plus a correction that is stored per expert
    groups: int = 1                # of neighbouring experts; a token chooses among those of its best groups alone
    top_groups: int = 1            # how many those are
    ranked_by: int = 1             # a group is as good as so many of its best experts together
    factor: float = 1.0            # the weights are multiplied by it in the end
    shared: int = 0                # hidden size of the MLP that all tokens share beside their experts; 0: there is none
    precise: bool = False          # the router multiplies in float32, whatever the others do


@dataclass
class Config:
    """What a model needs to know about itself, whatever the family. Letters as in the shape suffixes."""
    family: str                    # "gpt2", "llama" or "deepseek"
    L: int                         # layers
    E: int                         # hidden size
    H: int                         # query heads
    K: int                         # KV heads
    D: int                         # head size
    I: int                         # hidden size of the MLP
    V: int                         # vocabulary
    context: int                   # the longest sequence, prompt and continuation together
    activation: str
    eps: float                     # of the norms
    biased: set[str]               # which parts have a bias, as `plan_parts` calls them
    qk_norm: bool                  # RMSNorm on each q and k head (Qwen3)
    tied: bool                     # the head is the token embedding
    scales: list[float]            # per layer, what q.k is multiplied by
    windows: list[int | None]      # per layer, how many keys back a query sees; None: all
    rope: dict                     # rope_theta, rope_type, what the type needs; attention_factor multiplies q and k
    eos: list[int]                 # tokens that end a text
    dtype: str                     # in which the weights were stored
    stored: str | None             # "int8" or "fp8" where those that are multiplied may be stored so, with scales
    blocks: bool                   # whether a scale is that of a block of 128 x 128, not of a row
    ignored: list[str]             # regular expressions of the modules that are not stored in 8 bits
    experts: Experts | None = None
    latent: Latent | None = None   # latent attention; then K is 1, and D what a token leaves in the pool
    interleaved: bool = False      # whether the files hold the two numbers of RoPE's pairs side by side
    extra_layers: int = 0          # behind the last, for drafting: not read

    @property
    def attended(self) -> tuple[int, int, int]:
        """H, K and D of attention as it is in the definition: latents are widened for every head."""
        m = self.latent
        return (self.H, self.H, max(m.plain + m.rotary, m.value)) if m else (self.H, self.K, self.D)


def kv_bytes(c: Config, itemsize: int, kv_cache_dtype: str = "auto") -> int:
    """Bytes of K and V per token of context, or of the latents; in INT8 with a scale of 4 bytes per head."""
    return (1 if c.latent else 2) * c.L * c.K * (c.D + 4 if kv_cache_dtype == "int8" else c.D * itemsize)


def read_json(path: Path, optional: bool = False) -> dict:
    """The object in a file; {} where the file is optional and absent. Raises ValueError naming the file."""
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object: fetch the file again")
    return value


KINDS = {int: "a whole number from 1 to 2147483647", float: "a number above 0", bool: "true or false", str: "text",
         list: "a list", dict: "an object"}


class Fields:
    """A JSON object from a file; a missing or mistyped entry is named in the error."""

    def __init__(self, path: Path, values: dict | None = None):
        """values: an object inside the one of the file."""
        self.path, self.values = path, read_json(path) if values is None else values

    def get(self, key: str, default):
        """The entry, of the default's type, or the default where it is absent or null. Numbers are sizes: above 0, or
        what the default is."""
        value, kind = self.values.get(key), type(default)
        if value is None:
            return default
        if kind in (int, float):   # 1 is a float, too, but true is no number
            most = 2 ** 31 if kind is int else math.inf
            fits = type(value) in (int, kind) and (0 < value < most or value == default)
        else:
            fits = isinstance(value, kind)
        if not fits:
            raise ValueError(f"{self.path}: {key!r} is {str(value)[:50]!r}, not {KINDS[kind]}")
        return value

    def need(self, key: str, kind: type = int):
        if self.values.get(key) is None:
            raise ValueError(f"{self.path}: {key!r} is missing: fetch the file again")
        return self.get(key, kind(1) if kind in (int, float) else kind())


def read_config(folder: Path) -> Config:
    """Config of the checkpoint in `folder`. Raises ValueError for what is missing or not supported."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give --model a folder with config.json and model.safetensors")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give --model a checkpoint folder in Hugging Face's layout")
    raw = Fields(folder / "config.json")
    model_type = read_model_type(raw)
    eos = read_eos(raw, folder / "generation_config.json")
    dtype = raw.get("dtype", raw.get("torch_dtype", "float32")).removeprefix("torch.")
    read = dict.fromkeys(LATENT, read_deepseek_config) | {"gpt2": read_gpt2_config}
    common = {"eos": eos, "dtype": dtype} | read_quantization(raw, model_type)
    c = read.get(model_type, read_llama_config)(raw, model_type, common)
    if c.activation not in ACTIVATIONS:
        raise ValueError(f"{raw.path}: activation {c.activation!r} is not supported: only {', '.join(ACTIVATIONS)} are")
    if c.H % c.K:
        raise ValueError(f"{raw.path}: {c.H} query heads cannot share {c.K} KV heads evenly")
    return c


def read_model_type(raw: Fields) -> str:
    """The key of MODEL_TYPES: `model_type`, or what the architecture implies where the config does not say."""
    architectures = raw.get("architectures", [])
    implied = [kind for kind, names in MODEL_TYPES.items() if architectures and architectures[0] in names]
    model_type = raw.get("model_type", implied[0] if implied else "unnamed")
    if model_type not in MODEL_TYPES or any(name not in MODEL_TYPES[model_type] for name in architectures):
        raise ValueError(f"{raw.path}: architecture {(architectures or [model_type])[0]!r} is not supported: "
                         f"only {', '.join(names[0] for names in MODEL_TYPES.values())} are")
    return model_type


def read_eos(raw: Fields, generation: Path) -> list[int]:
    """The tokens that end a text: generation_config.json has the last word, and it may name several."""
    path, eos = generation, read_json(generation, optional=True).get("eos_token_id")
    if eos is None:
        path, eos = raw.path, raw.values.get("eos_token_id", [])
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in eos):
        raise ValueError(f"{path}: 'eos_token_id' is {eos!r}, not a token id or a list of them")
    return eos


FORMATS = "int-quantized", "float-quantized", "naive-quantized"   # of compressed-tensors: the same under three names


def read_quantization(raw: Fields, model_type: str) -> dict:
    """`stored`, `blocks` and `ignored` of the Config. Whatever else a `quantization_config` asks for is refused.

    Two ways to store are read, both for products whose rows of activations are quantised as they come: "fp8", with a
    scale per block (DeepSeek-V3, 2024, section 3.3), and "compressed-tensors", vLLM's own, with a scale per row.
    """
    said = raw.get("quantization_config", {})
    if not said:
        return dict(stored=None, blocks=False, ignored=[])
    expect(raw, said, "", quant_method=("fp8", "compressed-tensors"))
    if model_type == "gpt2":
        raise ValueError(f"{raw.path}: 'quantization_config' is not supported for gpt2: use the unquantised checkpoint")
    if said["quant_method"] == "fp8":
        expect(raw, said, "", activation_scheme=("dynamic", None), fmt=("e4m3", "float8_e4m3fn", None),
               weight_block_size=([GROUP, GROUP],))
        key = "modules_to_not_convert" if said.get("modules_to_not_convert") else "ignored_layers"
        return dict(stored="fp8", blocks=True, ignored=read_ignored(raw, said, key))

    expect(raw, said, "", format=FORMATS, kv_cache_scheme=(None,), transform_config=(None, {}))
    expect(raw, inner(said, "sparsity_config"), "sparsity_config.", format=("dense", None))
    types, groups = ("int", "float"), inner(said, "config_groups")
    for name in groups:
        group, where = inner(groups, name), f"config_groups.{name}."
        weights, activations = inner(group, "weights"), inner(group, "input_activations")
        expect(raw, group, where, format=(*FORMATS, None), output_activations=(None,))
        expect(raw, weights, where + "weights.", type=types, num_bits=(8,), strategy=("channel",), symmetric=(True,),
               dynamic=(False, None))
        types = (weights["type"],)   # all groups have one type
        expect(raw, activations, where + "input_activations.", type=types, num_bits=(8,), strategy=("token",),
               symmetric=(True,), dynamic=(True,))
    stored = {"int": "int8", "float": "fp8"}[types[0]] if groups else None
    return dict(stored=stored, blocks=False, ignored=read_ignored(raw, said, "ignore"))


def inner(values: dict, key: str) -> dict:
    """The object in an object; {}, which has nothing of what is expected, where there is none."""
    return values[key] if isinstance(values.get(key), dict) else {}


def expect(raw: Fields, values: dict, where: str, **supported: tuple):
    """Each key has one of its supported values, or is refused by its name. None: it may be absent, or null."""
    for key, good in supported.items():
        if values.get(key) not in good:
            raise ValueError(f"{raw.path}: quantization_config.{where}{key} is {json.dumps(values.get(key))[:50]}, "
                             f"which is not supported: use a checkpoint that has {' or '.join(map(json.dumps, good))} "
                             "there, or the unquantised one")


def read_ignored(raw: Fields, said: dict, key: str) -> list[str]:
    """Regular expressions of modules: "re:" begins one, and a plain name stands for its module and all in it."""
    names = said.get(key) or []
    try:
        if not isinstance(names, list):
            raise TypeError
        patterns = [name[3:] if name.startswith("re:") else re.escape(name) + r"(\.|$)" for name in names]
        for pattern in patterns:
            re.compile(pattern)
    except (AttributeError, TypeError, re.error):
        raise ValueError(f"{raw.path}: quantization_config.{key} is {json.dumps(names)[:50]}, not a list of names and "
                         "of regular expressions that begin with re:") from None
    return patterns


def read_gpt2_config(raw: Fields, model_type: str, common: dict) -> Config:
    E, H, L = raw.need("n_embd"), raw.need("n_head"), raw.need("n_layer")
    if E % H:
        raise ValueError(f"{raw.path}: 'n_embd' {E} is not a multiple of 'n_head' {H}")
    if raw.get("add_cross_attention", False):
        raise ValueError(f"{raw.path}: 'add_cross_attention' is not supported: only decoders that stand alone are")
    scale = (E // H) ** -0.5 if raw.get("scale_attn_weights", True) else 1.0
    by_layer = raw.get("scale_attn_by_inverse_layer_idx", False)
    return Config(
        family="gpt2", L=L, E=E, H=H, K=H, D=E // H, I=raw.get("n_inner", 4 * E), V=raw.need("vocab_size"),
        context=raw.get("n_positions", raw.get("n_ctx", 1024)), activation=raw.get("activation_function", "gelu_new"),
        eps=raw.get("layer_norm_epsilon", 1e-5), tied=raw.get("tie_word_embeddings", True), qk_norm=False,
        biased={"attn_norm", "qkv", "out", "mlp_norm", "up", "down", "final_norm"},
        scales=[scale / (l + 1 if by_layer else 1) for l in range(L)], windows=[None] * L, rope={}, **common)


def read_llama_config(raw: Fields, model_type: str, common: dict) -> Config:
    E, H, L = raw.need("hidden_size"), raw.need("num_attention_heads"), raw.need("num_hidden_layers")
    D = raw.get("head_dim", max(1, E // H))
    windows = read_windows(raw, model_type, L)
    context = {"llama": 2048, "mistral": 131072, "mixtral": 131072}.get(model_type, 32768)
    context = raw.get("max_position_embeddings", context)
    rope = read_rope(raw, D, context, 1e6 if model_type == "mixtral" else 1e4)
    if rope["rope_type"] == "yarn":   # the context beside it is often still that without it
        context = max(context, int(rope["factor"] * rope["original_max_position_embeddings"]))
    biased = {"qkv"} if model_type == "qwen2" else set()
    if model_type in ("llama", "qwen3", "qwen3_moe") and raw.get("attention_bias", False):
        biased |= {"qkv", "out"}
    if model_type == "llama" and raw.get("mlp_bias", False):
        biased |= {"up", "down"}
    return Config(
        family="llama", L=L, E=E, H=H, K=raw.get("num_key_value_heads", H), D=D, I=raw.need("intermediate_size"),
        V=raw.need("vocab_size"), activation=raw.get("hidden_act", "silu"),
        eps=raw.get("rms_norm_eps", 1e-5 if model_type == "mixtral" else 1e-6), context=context, biased=biased,
        qk_norm=model_type in ("qwen3", "qwen3_moe"), tied=raw.get("tie_word_embeddings", False),
        scales=[D ** -0.5] * L, windows=windows, rope=rope, experts=read_experts(raw, model_type, L), **common)


def read_experts(raw: Fields, model_type: str, L: int) -> Experts | None:
    """What a config says of experts; None for a model that has none. Where it says nothing, what its family takes."""
    if model_type == "mixtral":
        e = Experts(layers=set(range(L)), X=raw.get("num_local_experts", 8), C=raw.get("num_experts_per_tok", 2),
                    I=raw.need("intermediate_size"), names=("block_sparse_moe", "w1", "w3", "w2"), normalised=True)
    elif model_type == "qwen3_moe":
        every, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers", [])
        if not all(type(l) is int for l in dense):
            raise ValueError(f"{raw.path}: 'mlp_only_layers' is {str(dense)[:50]}, not a list of layers")
        e = Experts(layers={l for l in range(L) if (l + 1) % every == 0 and l not in dense},
                    X=raw.get("num_experts", raw.get("num_local_experts", 128)), C=raw.get("num_experts_per_tok", 8),
                    I=raw.get("moe_intermediate_size", 768), names=("mlp", "gate_proj", "up_proj", "down_proj"),
                    normalised=raw.get("norm_topk_prob", False))
    elif model_type in ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"):
        e = read_deepseek_experts(raw, model_type != "deepseek_v2", L)
    else:
        return None
    if e.C > e.X:
        raise ValueError(f"{raw.path}: 'num_experts_per_tok' is {e.C}, and there are {e.X} experts")
    return e if e.layers else None


# What DeepSeek-V3's config leaves out, and where the others differ from it: as in transformers.
DEEPSEEK = dict(max_position_embeddings=4096, rms_norm_eps=1e-6, q_lora_rank=1536, kv_lora_rank=512,
                qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=3,
                n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8,
                topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
                routed_scaling_factor=2.5)
NULL_IS_NONE = "q_lora_rank", "n_shared_experts", "first_k_dense_replace"   # elsewhere null is as good as nothing
DIFFERENT = {
    "deepseek_v2": dict(max_position_embeddings=2048, first_k_dense_replace=0, n_routed_experts=64, n_shared_experts=2,
                        num_experts_per_tok=None, moe_intermediate_size=1407, topk_method="greedy",
                        scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.0),
    "glm4_moe_lite": dict(max_position_embeddings=202752, rms_norm_eps=1e-5, q_lora_rank=768, qk_nope_head_dim=192,
                          v_head_dim=256, first_k_dense_replace=1, n_routed_experts=64, num_experts_per_tok=4,
                          moe_intermediate_size=1536, n_group=1, topk_group=1, routed_scaling_factor=1.8),
    "youtu": dict(max_position_embeddings=131072, tie_word_embeddings=True),
}


def with_what_is_left_out(raw: Fields, model_type: str) -> Fields:
    said = {key: value for key, value in raw.values.items() if value is not None or key in NULL_IS_NONE}
    return Fields(raw.path, DEEPSEEK | DIFFERENT.get(model_type, {}) | said)


def read_deepseek_config(raw: Fields, model_type: str, common: dict) -> Config:
    """Latent attention, and experts in all but Youtu."""
    raw = with_what_is_left_out(raw, model_type)
    H, L, P = (raw.need(key) for key in ("num_attention_heads", "num_hidden_layers", "qk_rope_head_dim"))
    biased = {"qkv", "out"} if raw.get("attention_bias", False) else set()
    q_rank = None if raw.values["q_lora_rank"] is None else raw.need("q_lora_rank")
    m = Latent(raw.need("kv_lora_rank"), raw.need("qk_nope_head_dim"), P, raw.need("v_head_dim"), q_rank)
    context = raw.need("max_position_embeddings")
    rope, scale = read_rope(raw, P, context), (m.plain + P) ** -0.5
    if rope["rope_type"] == "yarn":
        context = max(context, int(rope["factor"] * rope["original_max_position_embeddings"]))
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):   # see `read_yarn`
        scale *= (1 + 0.1 * rope["mscale_all_dim"] * math.log(max(1, rope["factor"]))) ** 2
    if raw.get("mlp_bias", False) or biased and not q_rank:
        raise ValueError(f"{raw.path}: 'mlp_bias', and 'attention_bias' without 'q_lora_rank', are not supported: "
                         "no known checkpoint has them")
    return Config(
        family="deepseek", L=L, E=raw.need("hidden_size"), H=H, K=1, D=m.rank + P, I=raw.need("intermediate_size"),
        V=raw.need("vocab_size"), activation=raw.get("hidden_act", "silu"), eps=raw.need("rms_norm_eps", float),
        context=context, biased=biased, qk_norm=False, tied=raw.get("tie_word_embeddings", False), scales=[scale] * L,
        windows=[None] * L, rope=rope, experts=read_experts(raw, model_type, L), latent=m,
        interleaved=model_type == "deepseek_v2" or raw.get("rope_interleave", True),
        extra_layers=raw.get("num_nextn_predict_layers", 0), **common)


def read_deepseek_experts(raw: Fields, v3: bool, L: int) -> Experts:
    """DeepSeek-V2 (2024, section 2.1.2) and DeepSeek-V3 (2024, section 2.1.2), each with one kind of scores."""
    # DeepSeek's code of V2 normalises without the factor, transformers with the factor and not at all: nobody can say.
    supported = dict(topk_method=("greedy", "group_limited_greedy"), scoring_func=("softmax",), norm_topk_prob=(False,))
    if v3:
        supported = dict(topk_method=("noaux_tc",), scoring_func=("sigmoid",), norm_topk_prob=(True, False))
    for key, good in (supported | {"moe_layer_freq": (1,)}).items():
        if raw.values.get(key) not in (*good, None):
            raise ValueError(f"{raw.path}: {key!r} is {str(raw.values[key])[:50]!r}, which is not supported here: "
                             f"only {' or '.join(map(json.dumps, good))} is")
    dense, shared = (raw.values.get(key) or 0 for key in ("first_k_dense_replace", "n_shared_experts"))
    if type(dense) is not int or type(shared) is not int or dense < 0 or shared < 0:
        raise ValueError(f"{raw.path}: 'first_k_dense_replace' and 'n_shared_experts' are {str(dense)[:50]!r} and "
                         f"{str(shared)[:50]!r}, not whole numbers from 0")
    kinds = raw.get("mlp_layer_types", ["dense"] * dense + ["sparse"] * (L - dense))   # GLM's way to say it
    if len(kinds) < L or not all(kind in ("dense", "sparse") for kind in kinds):
        raise ValueError(f"{raw.path}: 'mlp_layer_types' is {str(kinds)[:50]}, not dense or sparse for each of the "
                         f"{L} layers")
    I, (groups, top) = raw.need("moe_intermediate_size"), (1, 1)
    if raw.get("topk_method", "greedy") != "greedy" or v3:
        groups, top = raw.need("n_group"), raw.need("topk_group")
    e = Experts(layers={l for l in range(L) if kinds[l] == "sparse"}, X=raw.need("n_routed_experts"),
                C=raw.need("num_experts_per_tok"), I=I, names=("mlp", "gate_proj", "up_proj", "down_proj"),
                scoring="sigmoid" if v3 else "softmax", corrected=v3, groups=groups, top_groups=top,
                ranked_by=2 if v3 else 1, normalised=raw.get("norm_topk_prob", v3), shared=shared * I,
                factor=raw.need("routed_scaling_factor", float), precise=True)
    if e.X % groups or top > groups or e.X // groups < e.ranked_by or e.C > e.X // groups * top:
        raise ValueError(f"{raw.path}: {e.X} experts in 'n_group' {groups} groups, of which 'topk_group' {top} are "
                         f"chosen, do not give each token 'num_experts_per_tok' {e.C} experts of groups of equal size")
    return e


def read_windows(raw: Fields, model_type: str, L: int) -> list[int | None]:
    """Per layer, how many keys back a query sees: in Mistral in every layer, in Qwen in some and only if told to."""
    window, default = None, None if model_type == "mixtral" else 4096
    if model_type in ("mistral", "mixtral") or model_type != "llama" and raw.get("use_sliding_window", False):
        if raw.values.get("sliding_window", default) is not None:   # null: no window, where elsewhere it is the default
            window = raw.get("sliding_window", 4096)
    if model_type in ("llama", "mistral", "mixtral", "qwen3_moe"):
        return [window] * L
    full = raw.values.get("max_window_layers", 28)   # how many layers come before the first with a window; may be 0
    if not isinstance(full, int):
        raise ValueError(f"{raw.path}: 'max_window_layers' is {full!r}, not a whole number")
    layers = raw.get("layer_types", ["full_attention" if l < full else "sliding_attention" for l in range(L)])
    for name in layers:
        if name not in ("sliding_attention", "full_attention"):
            raise ValueError(f"{raw.path}: layer type {name!r} is not supported: "
                             "only sliding_attention and full_attention are")
    if len(layers) != L:
        raise ValueError(f"{raw.path}: 'layer_types' names {len(layers)} layers, 'num_hidden_layers' is {L}")
    return [window if name == "sliding_attention" else None for name in layers]


def read_rope(raw: Fields, D: int, context: int, theta: float = 1e4) -> dict:
    """{"rope_type", "rope_theta", ...} from either spelling: `rope_scaling` and `rope_theta`, or `rope_parameters`.
    theta: what the family takes where the config does not say."""
    rope = dict(raw.get("rope_scaling", raw.get("rope_parameters", {})))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    rope["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", theta))
    needs = {"default": (), "linear": ("factor",), "yarn": ("factor",), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in list(needs):   # it may be anything
        raise ValueError(f"{raw.path}: rope type {rope['rope_type']!r} is not supported: only {', '.join(needs)} are")
    for key in ("rope_theta", *needs[rope["rope_type"]]):
        rope[key] = rope.get(key, raw.values.get(key))
        if not isinstance(rope[key], (int, float)) or not 0 < rope[key] < math.inf:
            raise ValueError(f"{raw.path}: rope type {rope['rope_type']!r} needs a number above 0 for {key!r}")
    if rope.get("partial_rotary_factor", raw.values.get("partial_rotary_factor", 1)) != 1 or D % 2:
        raise ValueError(f"{raw.path}: rotating part of a head is not supported ('partial_rotary_factor' other than 1, "
                         "or an odd head size)")
    return rope | (read_yarn(raw, rope, context) if rope["rope_type"] == "yarn" else {"attention_factor": 1.0})


def read_yarn(raw: Fields, rope: dict, context: int) -> dict:
    """What yarn is told beside its factor, or what it takes where it is told nothing. `attention_factor` makes q.k
    larger, the more the further positions are stretched: attention over more tokens is too even (Peng et al. 2023,
    section 3.4)."""
    said, trained = Fields(raw.path, rope), "original_max_position_embeddings"
    yarn = {trained: said.get(trained, raw.get(trained, context)), "truncate": said.get("truncate", True),
            "beta_fast": said.get("beta_fast", 32.0), "beta_slow": said.get("beta_slow", 1.0)}
    if yarn["beta_fast"] < yarn["beta_slow"] or rope["rope_theta"] <= 1:
        raise ValueError(f"{raw.path}: rope type 'yarn' needs a 'beta_fast' that is not below its 'beta_slow', "
                         "and a 'rope_theta' above 1")
    mscales = said.get("mscale", 0.0), said.get("mscale_all_dim", 0.0)   # DeepSeek's; they count only together
    above, below = (1 + 0.1 * m * math.log(max(1, rope["factor"])) for m in (mscales if all(mscales) else (1, 0)))
    return yarn | {"attention_factor": said.get("attention_factor", above / below)}
