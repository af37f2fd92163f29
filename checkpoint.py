"""A folder becomes a config and tensors, or one clear refusal.
(What the engine stands on: a first reading may skip it, and come back for `Config` and the table in `plan_parts`.)

In Hugging Face's layout, config.json says how large the model is and which variant of its family, and safetensors files
hold its weights by name. A download may be torn, and a config may ask for what this engine does not compute: a wrong
guess would not crash, it would write plausible nonsense. So all is checked first, and the cheapest checks come first:

    read_config         config.json -> Config, without a look at the weights
    Checkpoint.check    every tensor's name, shape and dtype, on paper: the files are opened, no weight is read
    load_weights        one part at a time: read, bring into our layout, pack; memory for one copy of the weights
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linear import GROUP, Part, has_kernels, pack, quantize, widen


# ---------------------------------------------------------------------------------------------
# The config

MODEL_TYPES = {"gpt2": ("GPT2LMHeadModel", "GPT2Model"), "llama": ("LlamaForCausalLM", "LlamaModel"),
               "mistral": ("MistralForCausalLM", "MistralModel"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
               "qwen3": ("Qwen3ForCausalLM", "Qwen3Model")}
ACTIVATIONS = "gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "swish"   # model.py has the functions


@dataclass
class Config:
    """What a model needs to know about itself, whatever the family. Letters as in the shape suffixes."""
    family: str                    # "gpt2" or "llama"
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
        """The entry, of the default's type, or the default where it is absent or null. Numbers are sizes: above 0."""
        value, kind = self.values.get(key), type(default)
        if value is None:
            return default
        if kind in (int, float):   # 1 is a float, too, but true is no number
            fits = type(value) in (int, kind) and 0 < value < (2 ** 31 if kind is int else math.inf)
        else:
            fits = isinstance(value, kind)
        if not fits:
            raise ValueError(f"{self.path}: {key!r} is {str(value)[:50]!r}, not {KINDS[kind]}")
        return value

    def need(self, key: str, kind: type = int):
        if self.values.get(key) is None:
            raise ValueError(f"{self.path}: {key!r} is missing: fetch the file again")
        return self.get(key, kind())


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
    read = read_gpt2_config if model_type == "gpt2" else read_llama_config
    c = read(raw, model_type, {"eos": eos, "dtype": dtype} | read_quantization(raw, model_type))
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
    context = raw.get("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(model_type, 32768))
    rope = read_rope(raw, D, context)
    if rope["rope_type"] == "yarn":   # the context beside it is often still that without it
        context = max(context, int(rope["factor"] * rope["original_max_position_embeddings"]))
    biased = {"qkv"} if model_type == "qwen2" else set()
    if model_type in ("llama", "qwen3") and raw.get("attention_bias", False):
        biased |= {"qkv", "out"}
    if model_type == "llama" and raw.get("mlp_bias", False):
        biased |= {"up", "down"}
    return Config(
        family="llama", L=L, E=E, H=H, K=raw.get("num_key_value_heads", H), D=D, I=raw.need("intermediate_size"),
        V=raw.need("vocab_size"), activation=raw.get("hidden_act", "silu"), eps=raw.get("rms_norm_eps", 1e-6),
        context=context, biased=biased, qk_norm=model_type == "qwen3", tied=raw.get("tie_word_embeddings", False),
        scales=[D ** -0.5] * L, windows=windows, rope=rope, **common)


def read_windows(raw: Fields, model_type: str, L: int) -> list[int | None]:
    """Per layer, how many keys back a query sees: in Mistral in every layer, in Qwen in some and only if told to."""
    window = None
    if model_type == "mistral" or model_type != "llama" and raw.get("use_sliding_window", False):
        if raw.values.get("sliding_window", 4096) is not None:   # null: no window, where elsewhere it is the default
            window = raw.get("sliding_window", 4096)
    if model_type in ("llama", "mistral"):
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


def read_rope(raw: Fields, D: int, context: int) -> dict:
    """{"rope_type", "rope_theta", ...} from either spelling: `rope_scaling` and `rope_theta`, or `rope_parameters`."""
    rope = dict(raw.get("rope_scaling", raw.get("rope_parameters", {})))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    rope["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
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


# ---------------------------------------------------------------------------------------------
# The files

Stored = tuple[str, tuple[int, ...]]   # a tensor in the files: its name, its shape there


class Checkpoint:
    """The tensors of a folder by name, each read from its memory-mapped file when it is asked for."""

    def __init__(self, folder: Path):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file():
            files = {name: single for name in self._open(single).keys()}
        elif index.is_file():
            files = {name: folder / str(file) for name, file in Fields(index).need("weight_map", dict).items()}
            for path in sorted(set(files.values())):
                placed = {name for name in files if files[name] == path}
                if not path.is_file():
                    raise ValueError(f"{path}, where {index.name} places tensor {min(placed)}, is missing: "
                                     "fetch it into the folder")
                if lacking := placed - set(self._open(path).keys()):
                    raise ValueError(f"{path} lacks tensor {min(lacking)}, which {index.name} places there: "
                                     "fetch both again")
        else:
            raise ValueError(f"{folder} has no model.safetensors: fetch the weights in that format "
                             "(other formats can run code when loaded, and are not read)")
        # "transformer." and "model." are where the language model sits inside its head's class.
        self.names = {re.sub(r"^(transformer|model)\.", "", name): name for name in files}
        self.files, self.folder = files, folder

    def _open(self, path: Path):
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be read: give yourself the permission to read it")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is torn{self._torn_tensor(path)} ({error}): fetch the file again") from None

    @staticmethod
    def _torn_tensor(path: Path) -> str:
        """Name the first tensor that the file is too short for. Layout: header size, JSON header, data."""
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            ends = [(8 + size + entry["data_offsets"][1], name) for name, entry in header.items()]
            return " at tensor " + min(end for end in ends if end[0] > path.stat().st_size)[1]
        except (ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError):
            return " in its header"

    def stored_type(self, name: str) -> str:
        """The type of a tensor, in the words of safetensors."""
        return self._open(self.files[self.names[name]]).get_slice(self.names[name]).get_dtype()

    def check(self, expected: dict[str, tuple[int, ...]], scales: dict[str, Stored]):
        """Every expected tensor is there, in its shape and a known dtype, and no layer holds one more. So are the
        scales of those that are stored in 8 bits."""
        expected = expected | dict(scales.values())
        for name, shape in expected.items():
            if name not in self.names:
                extra = difflib.get_close_matches(name, self.names.keys() - expected.keys(), 1, 0.8)
                hint = f", which has {self.names[extra[0]]} instead" if extra else ""
                raise ValueError(f"tensor {name} is missing from {self.folder}{hint}: fetch the checkpoint again")
            view = self._open(self.files[self.names[name]]).get_slice(self.names[name])
            flat = shape[:1] if name.endswith("_scale") else shape   # a scale per row may be a column, or flat
            if tuple(view.get_shape()) not in (shape, flat):
                raise ValueError(f"tensor {self.names[name]} has shape {list(view.get_shape())}, "
                                 f"but config.json asks for {list(shape)}: the two do not belong together")
            if view.get_dtype() not in ("F32", "F16", "BF16") and name not in scales:
                raise ValueError(f"tensor {self.names[name]} is stored as {view.get_dtype()}: beside this config.json "
                                 "only float32, float16 and bfloat16 are supported, so use the unquantised checkpoint")
        for name in sorted(self.names.keys() - expected.keys()):
            # Old versions stored the causal mask and RoPE's frequencies beside the weights. They are not needed.
            buffer = re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name)
            if re.match(r"(h|layers)\.\d+\.", name) and not buffer:
                raise ValueError(f"tensor {self.names[name]} has no place in the model that config.json describes: "
                                 "the two do not belong together")

    def read(self, name: str) -> Tensor:
        # Opening the file for each tensor lets go of its mapped pages, so memory holds one copy of the weights.
        return self._open(self.files[self.names[name]]).get_tensor(self.names[name])

    def read_scale(self, name: str) -> Tensor:
        """float32. Raises ValueError naming a tensor by which no weight can be multiplied."""
        scale = self.read(name).float()
        if not ((scale > 0) & scale.isfinite()).all():
            raise ValueError(f"tensor {self.names[name]} holds a scale that is not a finite number above 0: "
                             "fetch the checkpoint again")
        return scale


# ---------------------------------------------------------------------------------------------
# The weights

MULTIPLIED = "qkv", "out", "up", "down", "head"   # the parts that go through `linear`


def plan_parts(c: Config) -> Iterator[tuple[str, list[Stored], list[Stored]]]:
    """Every part of the model on paper, layer by layer: its name, the tensors of its weight, those of its bias. Several
    tensors are stacked: one product computes q, k and v, and one computes gate and up."""
    E, I, V, D, q, kv = c.E, c.I, c.V, c.D, c.H * c.D, c.K * c.D
    if c.family == "gpt2":   # its matrices are Conv1D, which stores [in, out]
        table = {"embedding":  [("wte", (V, E))],
                 "position":   [("wpe", (c.context, E))],
                 "attn_norm":  [("h.{l}.ln_1", (E,))],
                 "qkv":        [("h.{l}.attn.c_attn", (E, 3 * E))],
                 "out":        [("h.{l}.attn.c_proj", (E, E))],
                 "mlp_norm":   [("h.{l}.ln_2", (E,))],
                 "up":         [("h.{l}.mlp.c_fc", (E, I))],
                 "down":       [("h.{l}.mlp.c_proj", (I, E))],
                 "final_norm": [("ln_f", (E,))]}
    else:
        attn, mlp = "layers.{l}.self_attn.", "layers.{l}.mlp."
        table = {"embedding":  [("embed_tokens", (V, E))],
                 "attn_norm":  [("layers.{l}.input_layernorm", (E,))],
                 "qkv":        [(attn + "q_proj", (q, E)), (attn + "k_proj", (kv, E)), (attn + "v_proj", (kv, E))],
                 "qk_norm":    [(attn + "q_norm", (D,)), (attn + "k_norm", (D,))],
                 "out":        [(attn + "o_proj", (E, q))],
                 "mlp_norm":   [("layers.{l}.post_attention_layernorm", (E,))],
                 "up":         [(mlp + "gate_proj", (I, E)), (mlp + "up_proj", (I, E))],
                 "down":       [(mlp + "down_proj", (E, I))],
                 "final_norm": [("norm", (E,))]}
        if not c.qk_norm:
            del table["qk_norm"]
    if not c.tied:
        table["head"] = [("lm_head", (V, E))]
    outputs = -1 if c.family == "gpt2" else 0   # which axis of a stored weight its bias is as long as
    for part, tensors in table.items():
        for l in range(c.L if "{l}" in tensors[0][0] else 1):
            weights = [(name.format(l=l) + ".weight", shape) for name, shape in tensors]
            biases = [(name.format(l=l) + ".bias", (shape[outputs],)) for name, shape in tensors]
            yield part, weights, biases if part in c.biased else []


def plan_scales(c: Config, checkpoint: Checkpoint) -> dict[str, Stored]:
    """For each weight that is stored in 8 bits the tensor of its scales.

    The config says which weights may be stored so, the files say which are. Both kinds of scale multiply what is
    stored: what is called an inverse undoes the quantising.
    """
    may = [(name, shape) for part, weights, _ in plan_parts(c) if c.stored and part in MULTIPLIED
           for name, shape in weights if name in checkpoint.names]
    scales = {}
    for name, (out, inputs) in may:
        module = checkpoint.names[name].removesuffix(".weight")
        if any(re.match(pattern, module) for pattern in c.ignored):
            continue
        if checkpoint.stored_type(name) == {"int8": "I8", "fp8": "F8_E4M3"}[c.stored]:
            blocks = -(-out // GROUP), -(-inputs // GROUP)
            scales[name] = (name + "_scale_inv", blocks) if c.blocks else (name + "_scale", (out, 1))
    return scales


def interleave_pairs(weight: Tensor, D: int) -> Tensor:
    """The rows of each head with RoPE's pairs side by side, as `rotate` in model.py wants them; q.k stays the same.

    Two heads of D = 4, stored as   a0 a1 b0 b1 | c0 c1 d0 d1   where a0 and b0 are a pair, so are a1 and b1,
    become                          a0 b0 a1 b1 | c0 d0 c1 d1.
    """
    halves = weight.unflatten(0, (-1, 2, D // 2))   # [heads, half, pair, ...]
    return halves.transpose(1, 2).flatten(0, 2)     # [heads, pair, half, ...], and flat again


def to_our_layout(stored: Tensor, name: str, c: Config) -> Tensor:
    """A stored tensor in the order in which the model uses it: a weight is [out, in]."""
    if re.search(r"\.c_\w+\.weight$", name):   # GPT-2's Conv1D: [in, out]
        return stored.T
    if re.search(r"\.[qk]_(proj|norm)\.", name):
        return interleave_pairs(stored, c.D)
    return stored


def make_parts(c: Config, device: torch.device, dtype: torch.dtype, quantization: str | None,
               read: Callable[[str, tuple[int, ...]], Tensor],
               read_scale: Callable[[str, tuple[int, ...]], Tensor | None] = lambda name, shape: None,
               ) -> dict[str, list[Part]]:
    """Every part by its name, one entry per layer (or one). `read` gives the stored tensor of a name and shape, and
    `read_scale` the scale of its rows, float32 [out, G], if it is stored in 8 bits.

    One part is made at a time, and of what is packed the plain form is let go: beside the model, memory holds a part
    or two.
    """
    def stack(pieces: list[Tensor], dtype: torch.dtype) -> Tensor:
        whole = torch.empty(sum(map(len, pieces)), *pieces[0].shape[1:], dtype=dtype, device=device)
        for rows, piece in zip(whole.split([len(piece) for piece in pieces]), pieces):
            rows.copy_(piece)
        return whole

    def read_piece(name: str, shape: tuple[int, ...]) -> Part:
        weight, scale = read(name, shape), read_scale(name, shape)
        return Part(to_our_layout(weight, name, c), None, None if scale is None else to_our_layout(scale, name, c))

    def make_part(weights: list[Stored], biases: list[Stored]) -> Part:
        pieces = [read_piece(*tensor) for tensor in weights]
        bias = stack([to_our_layout(read(*tensor), tensor[0], c) for tensor in biases], dtype) if biases else None
        if all(piece.scale is not None for piece in pieces):
            return Part(stack([piece.weight for piece in pieces], pieces[0].weight.dtype), bias,
                        stack([piece.scale for piece in pieces], torch.float32))
        pieces = [widen(piece, dtype) for piece in pieces]   # of q, k and v some may be stored in 8 bits, others not
        return Part(stack([piece.weight for piece in pieces], dtype), bias)

    parts = {}
    for name, weights, biases in plan_parts(c):
        part = make_part(weights, biases)
        if name in MULTIPLIED:
            part = pack(quantize(part, quantization), dtype)
        parts.setdefault(name, []).append(part)
    if c.tied:   # the embedding stays as it is: the model takes rows of it
        parts["head"] = [pack(quantize(Part(parts["embedding"][0].weight), quantization), dtype)]
    return parts


def load_weights(folder: Path, c: Config, device: torch.device, dtype: torch.dtype,
                 quantization: str | None = None) -> dict[str, list[Part]]:
    """The parts of a checkpoint, straight from its mapped files. Raises ValueError naming a bad tensor."""
    checkpoint = Checkpoint(folder)
    embedding, head = ("wte.weight" if c.family == "gpt2" else "embed_tokens.weight"), "lm_head.weight"
    if c.tied and embedding not in checkpoint.names and head in checkpoint.names:   # its other name
        checkpoint.names[embedding] = checkpoint.names.pop(head)
    doubtful = c.tied and head in checkpoint.names   # said to be tied, and yet stored: tied only if it is the same
    c = replace(c, tied=c.tied and not doubtful)
    expected = {name: shape for _, weights, biases in plan_parts(c) for name, shape in weights + biases}
    scales = plan_scales(c, checkpoint)
    checkpoint.check(expected, scales)   # on paper first
    doubtful &= head not in scales   # a head in 8 bits is its own
    if doubtful and torch.equal(checkpoint.read(head).to(dtype), checkpoint.read(embedding).to(dtype)):
        c = replace(c, tied=True)
        del expected[head]

    eight_bits = set(scales)
    if quantization:
        eight_bits = {name for part, weights, _ in plan_parts(c) if part in MULTIPLIED for name, _ in weights}
    if "fp8" in (quantization, c.stored) and not has_kernels(device):   # `pack` widens them
        eight_bits = set()
    sizes = {name: math.prod(shape) * (1 if name in eight_bits else dtype.itemsize) for name, shape in expected.items()}
    total = sum(sizes.values())
    try:
        torch.empty(total, dtype=torch.uint8, device=device)   # all of it once, so as not to fail half-way
    except RuntimeError:
        raise ValueError(f"{folder} needs {total / 1e9:.1f} GB, and {device} does not have them: "
                         "use a smaller dtype, or another device") from None
    begin, done = time.perf_counter(), 0

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        nonlocal done
        done += sizes[name]
        if sys.stderr.isatty() and time.perf_counter() - begin > 1:
            text = f"loading {folder}: {done / total:4.0%} of {total / 1e9:.1f} GB" if done < total else "\x1b[K"
            print("\r" + text, end="", file=sys.stderr, flush=True)
        return checkpoint.read(name)

    def read_scale(name: str, shape: tuple[int, ...]) -> Tensor | None:
        if name not in scales:
            return None
        scale = checkpoint.read_scale(scales[name][0])
        return scale.repeat_interleave(GROUP, 0)[:shape[0]] if c.blocks else scale.view(-1, 1)
    return make_parts(c, device, dtype, quantization, read, read_scale)


def random_weights(c: Config, device: torch.device, dtype: torch.dtype,
                   quantization: str | None = None) -> dict[str, list[Part]]:
    """Weights of the right shape that know nothing, for measuring."""
    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        stored = torch.empty(shape, dtype=dtype, device=device)
        return stored.normal_(0, 0.02) if len(shape) > 1 else stored.fill_(name.endswith("weight"))
    return make_parts(c, device, dtype, quantization, read)
