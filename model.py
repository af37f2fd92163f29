"""A checkpoint is a config, some tensors and a tokenizer. (Read kernels.py first; next comes nanoserve.py.)

Read a Hugging Face folder, refuse by name what is not supported, put the weights on the device, and
run GPT-2 (Radford et al. 2019) or Llama (Touvron et al. 2023) over a ragged batch. The families are
the same machine with different parts, and `Model.__call__` shows them side by side:

                  GPT-2                          Llama, Mistral, Qwen2, Qwen3
    position      learned, added to the input    rotary, applied to q and k in every layer (RoPE)
    norm          LayerNorm                      RMSNorm; Qwen3 also on every q and k head
    MLP           down(act(up(x)))               down(act(gate(x)) * up(x))
    heads         one KV head per query head     G query heads share one KV head (GQA)
    biases        everywhere                     nowhere; Qwen2 on q, k, v; Llama as its config says

"The cat sat" through demo/llama (E = 192, H = 6, K = 2, D = 32, I = 512, V = 1024):

    tokens_T [269, 341, 479]    x_TE [3, 192]    5 layers    x_BE [1, 192]    logits [1, 1024]    578 " by"
    each layer:    norm -> qkv [3, 6 + 2 + 2, 32] -> rotate q and k -> write k, v -> attend -> out [3, 192]
                   norm -> gate and up [3, 2 x 512] -> silu(gate) * up -> down [3, 192]

Only the last token's row reaches the head: it alone has the whole prompt behind it and a successor to find.
"""

from __future__ import annotations

import base64
import codecs
import difflib
import json
import math
import os
import re
import sys
import time
import unicodedata
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels import ATTENTION, WRITE_KV, Batch


# ---------------------------------------------------------------------------------------------
# The config

MODEL_TYPES = {"gpt2": ("GPT2LMHeadModel", "GPT2Model"), "llama": ("LlamaForCausalLM", "LlamaModel"),
               "mistral": ("MistralForCausalLM", "MistralModel"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
               "qwen3": ("Qwen3ForCausalLM", "Qwen3Model")}
GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu": F.gelu, "relu": F.relu,
               "silu": F.silu, "swish": F.silu}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    biased: set[str]               # which parts have a bias, as `NAMES` calls them
    qk_norm: bool                  # RMSNorm on each q and k head (Qwen3)
    tied: bool                     # the head is the token embedding
    scales: list[float]            # per layer, what q.k is multiplied by
    windows: list[int | None]      # per layer, how many keys back a query sees; None: all
    rope: dict                     # rope_theta, rope_type and what the type needs
    eos: list[int]                 # tokens that end a text
    dtype: str                     # in which the weights were stored


KINDS = {int: "a whole number from 1 to 2147483647", float: "a number above 0", bool: "true or false", str: "text",
         list: "a list", dict: "an object"}


class Fields:
    """A JSON object from a file; a missing or mistyped entry is named in the error."""

    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)

    def get(self, key: str, default):
        """The entry, of the default's type, or the default where it is absent or null. Numbers are sizes: above 0."""
        value, kind = self.values.get(key), type(default)
        if value is None:
            return default
        limit = {int: 2 ** 31, float: math.inf}.get(kind)
        fits = type(value) in (int, kind) and 0 < value < limit if limit else isinstance(value, kind)
        if not fits:
            raise ValueError(f"{self.path}: {key!r} is {str(value)[:50]!r}, not {KINDS[kind]}")
        return value

    def need(self, key: str, kind: type = int):
        if self.values.get(key) is None:
            raise ValueError(f"{self.path}: {key!r} is missing: fetch the file again")
        return self.get(key, kind())


def read_json(path: Path, optional: bool = False) -> dict:
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object: fetch the file again")
    return value


def read_config(folder: Path) -> Config:
    """Config of the checkpoint in `folder`. Raises ValueError for what is missing or not supported."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give --model a folder with config.json and model.safetensors")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give --model a checkpoint folder in Hugging Face's layout")
    raw = Fields(folder / "config.json")
    architectures = raw.get("architectures", [])
    guess = [kind for kind, names in MODEL_TYPES.items() for name in architectures[:1] if name in names]
    kind = raw.get("model_type", guess[0] if guess else "unnamed")
    if kind not in MODEL_TYPES or any(name not in MODEL_TYPES[kind] for name in architectures):
        raise ValueError(f"{raw.path}: architecture {(architectures or [kind])[0]!r} is not supported: "
                         f"only {', '.join(names[0] for names in MODEL_TYPES.values())} are")
    if raw.values.get("quantization_config"):
        raise ValueError(f"{raw.path}: 'quantization_config' is not supported: use the unquantised checkpoint")

    path = folder / "generation_config.json"
    eos = read_json(path, optional=True).get("eos_token_id")
    if eos is None:
        path, eos = raw.path, raw.values.get("eos_token_id", [])
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in eos):
        raise ValueError(f"{path}: 'eos_token_id' is {eos!r}, not a token id or a list of them")
    dtype = raw.get("dtype", raw.get("torch_dtype", "float32")).removeprefix("torch.")
    c = (read_gpt2_config if kind == "gpt2" else read_llama_config)(raw, kind, {"eos": eos, "dtype": dtype})
    if c.activation not in ACTIVATIONS:
        raise ValueError(f"{raw.path}: activation {c.activation!r} is not supported: only {', '.join(ACTIVATIONS)} are")
    if c.H % c.K:
        raise ValueError(f"{raw.path}: {c.H} query heads cannot share {c.K} KV heads evenly")
    return c


def read_gpt2_config(raw: Fields, kind: str, common: dict) -> Config:
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


def read_llama_config(raw: Fields, kind: str, common: dict) -> Config:
    E, H, L = raw.need("hidden_size"), raw.need("num_attention_heads"), raw.need("num_hidden_layers")
    D = raw.get("head_dim", max(1, E // H))
    # Mistral slides a window over every layer, Qwen over some of them and only if told to.
    window, layers = None, ["sliding_attention"] * L
    if kind == "mistral":   # null is none, too
        window = None if raw.values.get("sliding_window", 4096) is None else raw.get("sliding_window", 4096)
    elif kind != "llama":
        window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
        full = raw.values.get("max_window_layers", 28)   # 0 is possible
        if not isinstance(full, int):
            raise ValueError(f"{raw.path}: 'max_window_layers' is {full!r}, not a whole number")
        layers = raw.get("layer_types", ["full_attention" if l < full else "sliding_attention" for l in range(L)])
    for name in layers:
        if name not in ("sliding_attention", "full_attention"):
            raise ValueError(f"{raw.path}: layer type {name!r} is not supported: "
                             "only sliding_attention and full_attention are")
    if len(layers) != L:
        raise ValueError(f"{raw.path}: 'layer_types' names {len(layers)} layers, 'num_hidden_layers' is {L}")
    biased = {"qkv"} if kind == "qwen2" else set()
    if kind in ("llama", "qwen3") and raw.get("attention_bias", False):
        biased |= {"qkv", "out"}
    if kind == "llama" and raw.get("mlp_bias", False):
        biased |= {"up", "down"}
    return Config(
        family="llama", L=L, E=E, H=H, K=raw.get("num_key_value_heads", H), D=D, I=raw.need("intermediate_size"),
        V=raw.need("vocab_size"), activation=raw.get("hidden_act", "silu"), eps=raw.get("rms_norm_eps", 1e-6),
        context=raw.get("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(kind, 32768)),
        biased=biased, qk_norm=kind == "qwen3", tied=raw.get("tie_word_embeddings", False),
        scales=[D ** -0.5] * L, windows=[window if name == "sliding_attention" else None for name in layers],
        rope=read_rope(raw, D), **common)


def read_rope(raw: Fields, D: int) -> dict:
    """{"rope_type", "rope_theta", ...} from either spelling: `rope_scaling` and `rope_theta`, or `rope_parameters`."""
    rope = dict(raw.get("rope_scaling", raw.get("rope_parameters", {})))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    rope["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    needs = {"default": (), "linear": ("factor",), "llama3": (
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
    return rope


def rope_frequencies(rope: dict, D: int) -> Tensor:
    """float32 [D / 2]: radians per position of each pair of a head's dimensions (Su et al. 2021)."""
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
    if rope["rope_type"] == "linear":       # positions squeezed into the trained range (Chen et al. 2023)
        return frequency / rope["factor"]
    if rope["rope_type"] == "llama3":       # only slow turns are squeezed, with a ramp between (Llama 3.1)
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)   # in the trained context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / rope["factor"]
    return frequency


# ---------------------------------------------------------------------------------------------
# The weights

# What each family calls the parts of a layer. {x} stands for several tensors: their rows are stacked into one
# matrix, so that one product computes q, k and v, and one computes gate and up.
NAMES = {
    #                 GPT-2                        Llama
    "embedding":     ("wte",                       "embed_tokens"),
    "position":      ("wpe",                       ""),
    "attn_norm":     ("h.{l}.ln_1",                "layers.{l}.input_layernorm"),
    "qkv":           ("h.{l}.attn.c_attn",         "layers.{l}.self_attn.{x}_proj"),
    "qk_norm":       ("",                          "layers.{l}.self_attn.{x}_norm"),
    "out":           ("h.{l}.attn.c_proj",         "layers.{l}.self_attn.o_proj"),
    "mlp_norm":      ("h.{l}.ln_2",                "layers.{l}.post_attention_layernorm"),
    "up":            ("h.{l}.mlp.c_fc",            "layers.{l}.mlp.{x}_proj"),
    "down":          ("h.{l}.mlp.c_proj",          "layers.{l}.mlp.down_proj"),
    "final_norm":    ("ln_f",                      "norm"),
    "head":          ("lm_head",                   "lm_head"),
}
BUFFERS = r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$"   # stored beside the weights by old versions, never needed


@dataclass(slots=True)
class Part:
    """One weight of the model: [out, in], or [out] for a norm, and its bias [out] or None."""
    weight: Tensor
    bias: Tensor | None = None
    ways: dict = field(default_factory=dict)   # (rows - 1).bit_length() -> how to multiply so many by it, once known


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

    def check(self, expected: dict[str, tuple[int, ...]]):
        """Every expected tensor is there, in its shape and a known dtype, and no layer holds one more."""
        for name, shape in expected.items():
            if name not in self.names:
                extra = difflib.get_close_matches(name, self.names.keys() - expected.keys(), 1, 0.8)
                hint = f", which has {self.names[extra[0]]} instead" if extra else ""
                raise ValueError(f"tensor {name} is missing from {self.folder}{hint}: fetch the checkpoint again")
            view = self._open(self.files[self.names[name]]).get_slice(self.names[name])
            if tuple(view.get_shape()) != shape:
                raise ValueError(f"tensor {self.names[name]} has shape {list(view.get_shape())}, "
                                 f"but config.json asks for {list(shape)}: the two do not belong together")
            if view.get_dtype() not in ("F32", "F16", "BF16"):
                raise ValueError(f"tensor {self.names[name]} is stored as {view.get_dtype()}: only float32, float16 "
                                 "and bfloat16 are supported, so use the unquantised checkpoint")
        for name in self.names.keys() - expected.keys():
            if re.match(r"(h|layers)\.\d+\.", name) and not re.search(BUFFERS, name):
                raise ValueError(f"tensor {self.names[name]} has no place in the model that config.json describes: "
                                 "the two do not belong together")

    def read_into(self, target: Tensor, name: str):
        # Opening the file for each tensor lets go of its mapped pages, so memory holds one copy of the weights.
        target.copy_(self._open(self.files[self.names[name]]).get_tensor(self.names[name]).view(target.shape))


def empty_weights(c: Config, device: torch.device, dtype: torch.dtype) -> tuple[dict, list]:
    """Memory for every part by its name in NAMES, one entry per layer (or one), and what to fill it with: a list of
    (a view of that memory in the order in which the tensor is stored, its name in the checkpoint, its shape there)."""
    llama = c.family == "llama"
    # The shape of each part: its rows (of each of its tensors, where there are several) and, unless a vector, columns.
    shapes = {"embedding": (c.V, c.E), "position": (c.context, c.E), "attn_norm": (c.E,),
              "qkv": ({"q": c.H * c.D, "k": c.K * c.D, "v": c.K * c.D} if llama else 3 * c.E, c.E),
              "qk_norm": ({"q": c.D, "k": c.D},), "out": (c.E, c.H * c.D), "mlp_norm": (c.E,),
              "up": ({"gate": c.I, "up": c.I} if llama else c.I, c.E), "down": (c.E, c.I),
              "final_norm": (c.E,), "head": (c.V, c.E)}
    absent = {"position": llama, "qk_norm": not c.qk_norm, "head": c.tied}
    parts, jobs = {}, []
    for part, (rows, *columns) in shapes.items():
        if absent.get(part):
            continue
        pattern, rows = NAMES[part][llama], rows if isinstance(rows, dict) else {"": rows}
        kinds = {"weight": columns, "bias": []} if part in c.biased else {"weight": columns}
        for l in range(c.L if "{l}" in pattern else 1):
            made = {}
            for kind, width in kinds.items():
                made[kind] = torch.empty(sum(rows.values()), *width, dtype=dtype, device=device)
                for x, target in zip(rows, made[kind].split(list(rows.values()))):
                    if not llama and part in ("qkv", "out", "up", "down"):
                        target = target.mT if width else target   # Conv1D stores [in, out]
                    shape = tuple(target.shape)
                    if x in ("q", "k"):   # a head is stored [2, D / 2], `rotate` wants pairs
                        target = target.unflatten(0, (-1, c.D // 2, 2)).transpose(1, 2)
                    jobs.append((target, f"{pattern.format(l=l, x=x)}.{kind}", shape))
            parts.setdefault(part, []).append(Part(**made))
    if c.tied:
        parts["head"] = parts["embedding"]
    return parts, jobs


def load_weights(folder: Path, c: Config, device: torch.device, dtype: torch.dtype) -> dict[str, list[Part]]:
    """The parts of a checkpoint, straight from its mapped files. Raises ValueError naming a bad tensor."""
    embedding, head = (f"{NAMES[part][c.family == 'llama']}.weight" for part in ("embedding", "head"))
    checkpoint = Checkpoint(folder)
    if c.tied and embedding not in checkpoint.names and head in checkpoint.names:   # its other name
        checkpoint.names[embedding] = checkpoint.names.pop(head)
    doubtful = c.tied and head in checkpoint.names   # said to be tied, and yet stored: tied only if it is the same
    c = replace(c, tied=c.tied and not doubtful)
    _, jobs = empty_weights(c, torch.device("meta"), dtype)   # on paper first
    checkpoint.check({name: shape for _, name, shape in jobs})
    total = sum(target.nbytes for target, *_ in jobs)
    try:
        parts, jobs = empty_weights(c, device, dtype)
    except RuntimeError:
        raise ValueError(f"{folder} needs {total / 1e9:.1f} GB, and {device} does not have them: "
                         "use a smaller dtype, or another device") from None
    begin, done = time.perf_counter(), 0
    for target, name, _ in jobs:
        checkpoint.read_into(target, name)
        done += target.nbytes
        if sys.stderr.isatty() and time.perf_counter() - begin > 1:
            text = f"loading {folder}: {done / total:4.0%} of {total / 1e9:.1f} GB" if done < total else "\x1b[K"
            print("\r" + text, end="", file=sys.stderr, flush=True)
    if doubtful and torch.equal(parts["head"][0].weight, parts["embedding"][0].weight):
        parts["head"] = parts["embedding"]
    return parts


def random_weights(c: Config, device: torch.device, dtype: torch.dtype) -> dict[str, list[Part]]:
    """Weights of the right shape that know nothing, for measuring."""
    parts, jobs = empty_weights(c, device, dtype)
    for target, name, shape in jobs:
        target.normal_(0, 0.02) if len(shape) > 1 else target.fill_(name.endswith("weight"))
    return parts


# ---------------------------------------------------------------------------------------------
# The forward pass

class Model:
    """GPT-2 or Llama over a ragged batch. `weights` as `load_weights` or `random_weights` gives them."""

    def __init__(self, config: Config, weights: dict[str, list[Part]], attention: str):
        self.config, self.weights = config, weights
        self.attention, self.write_kv = ATTENTION[attention], WRITE_KV[attention]
        self.device = weights["embedding"][0].weight.device
        if config.qk_norm:   # one weight per head: q's for each query head, then k's for each KV head
            q_and_k = [part.weight.split(config.D) for part in weights["qk_norm"]]
            self.qk_norm = [torch.cat([q.expand(config.H, -1), k.expand(config.K, -1)]) for q, k in q_and_k]
        if config.rope:
            self.frequencies = rope_frequencies(config.rope, config.D).to(self.device)

    @torch.inference_mode()
    def __call__(self, batch: Batch, pool) -> Tensor:
        """Run the batch's T tokens, leave their K and V in the pool; logits float32 [len(batch.logit_rows), V]."""
        c, w, llama = self.config, self.weights, self.config.family == "llama"
        H, K, D = c.H, c.K, c.D
        k_LKNSD, v_LKNSD = pool.k_LKNSD.unbind(), pool.v_LKNSD.unbind()
        x_TE = w["embedding"][0].weight[batch.tokens_T]
        if llama:
            angles_T1P = batch.positions_T[:, None, None] * self.frequencies    # P = D / 2 pairs
            turns_T1P = torch.polar(torch.ones_like(angles_T1P), angles_T1P)
        else:
            x_TE += w["position"][0].weight[batch.positions_T]

        for l in range(c.L):
            qkv = linear(norm(x_TE, w["attn_norm"][l], c.eps), w["qkv"][l]).contiguous().view(-1, H + 2 * K, D)
            qk, v_TKD = qkv[:, :H + K], qkv[:, H + K:]
            if c.qk_norm:
                qk = F.rms_norm(qk, (D,), eps=c.eps) * self.qk_norm[l]
            if llama:
                qk = rotate(qk, turns_T1P)
            self.write_kv(qk[:, H:], v_TKD, k_LKNSD[l], v_LKNSD[l], batch.slots_T)
            o_THD = self.attention(qk[:, :H], k_LKNSD[l], v_LKNSD[l], batch, c.scales[l], c.windows[l])
            x_TE += linear(o_THD.flatten(1), w["out"][l])

            h = linear(norm(x_TE, w["mlp_norm"][l], c.eps), w["up"][l])
            if llama:
                gate, up = h.chunk(2, -1)
                h = ACTIVATIONS[c.activation](gate).mul_(up)
            else:
                h = ACTIVATIONS[c.activation](h)
            x_TE += linear(h, w["down"][l])

        x_BE = norm(x_TE[batch.logit_rows], w["final_norm"][0], c.eps)
        return linear(x_BE, w["head"][0]).float()


def linear(x_TE: Tensor, part: Part) -> Tensor:
    """x W^T + b. On a CPU it is computed in whichever way wins the race, and may be transposed in memory."""
    rows, weight, bias = x_TE.shape[0], part.weight, part.bias
    size = (rows - 1).bit_length()
    way = part.ways.get(size)
    if not way:
        if not rows or x_TE.device.type != "cpu":   # no rows: a step of prompt chunks alone wants no logits
            return F.linear(x_TE, weight, bias)
        race = race_for(x_TE, weight)
        way = part.ways[size] = race.best
    out = way(x_TE, weight) if way else race(x_TE, weight)
    return out if bias is None else out.add_(bias)


def race_for(x_TE: Tensor, weight: Tensor) -> Race:
    """One race for all weights of a shape and, up to a factor of two, numbers of rows."""
    rows = len(x_TE)
    kind = weight.shape, weight.dtype, (rows - 1).bit_length()
    if kind not in RACES:
        RACES[kind] = Race(ways_to_multiply(rows, weight))
    return RACES[kind]


RACES: dict[tuple, Race] = {}


class Race:
    """Ways to compute the same: the first calls try them in turn, three times each, and the fastest one stays.

    Which that is depends on the processor and its libraries, so it is measured. Every trial is real work on real
    data, in place of the call that was due: choosing costs no more than what the slower ways lose.
    """

    def __init__(self, ways: list):
        self.waiting, self.seconds, self.best = ways * 3, dict.fromkeys(ways, math.inf), None

    def __call__(self, *arguments):
        if self.best:
            return self.best(*arguments)
        way, begin = self.waiting.pop(), time.perf_counter()
        result = way(*arguments)
        self.seconds[way] = min(self.seconds[way], time.perf_counter() - begin)
        if not self.waiting:
            self.best = min(self.seconds, key=self.seconds.get)
        return result


def ways_to_multiply(rows: int, weight: Tensor) -> list:
    """Functions from x and a weight [out, in] to x W^T, equal up to rounding.

    One row is bound by reading the weight, many are bound by arithmetic, and libraries are tuned for the second: for
    few rows MKL may run on a single thread or at half the speed, and oneDNN may first copy W into another order.
    """
    def blocks(size):
        """(W x^T)^T with W cut into blocks of so many rows: one batched product, a block at a time to any free core."""
        def product(x, w):
            n, rest = divmod(len(w), size)
            if n == 1:
                return torch.mm(w, x.T).T
            out = x.new_empty(len(w), len(x))
            torch.bmm(w[:n * size].view(n, size, -1), x.T.expand(n, -1, -1), out=out[:n * size].view(n, size, -1))
            if rest:
                torch.mm(w[n * size:], x.T, out=out[n * size:])
            return out.T
        return product

    ways = [F.linear]
    if rows <= 64:
        ways += [blocks(size) for size in (12, 48, len(weight) // 4, len(weight)) if 0 < size <= len(weight)]
    if rows == 1:
        ways.append(lambda x, w: torch.mv(w, x[0])[None])
    if weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():   # other types are oneDNN's anyway
        ways.append(lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    return ways


def norm(x_TE: Tensor, part: Part, eps: float) -> Tensor:
    """LayerNorm where there is a bias, RMSNorm (Zhang and Sennrich 2019) where there is none."""
    if part.bias is None:
        return F.rms_norm(x_TE, part.weight.shape, part.weight, eps)
    return F.layer_norm(x_TE, part.weight.shape, part.weight, part.bias, eps)


def rotate(x_THD: Tensor, turns_T1P: Tensor) -> Tensor:
    """RoPE: a pair of a head's dimensions is a complex number, turned by its position times the pair's frequency.

    Checkpoints store a pair D / 2 apart; `empty_weights` puts their rows of q and k side by side: q.k is the same.
    """
    x_THP = torch.view_as_complex(x_THD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(x_THP * turns_T1P).flatten(-2).type_as(x_THD)


# ---------------------------------------------------------------------------------------------
# The tokenizer

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(4)),
                  "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id",
                  *(f"reserved_special_token_{i}" for i in range(5, 251))]

# GPT-2's alphabet: the printable character that stands for each byte, its own where it has one.
UNPRINTABLE = [*range(33), *range(127, 161), 173]
ALPHABET = "".join(chr(256 + UNPRINTABLE.index(b) if b in UNPRINTABLE else b) for b in range(256))
BYTES = {ord(character): b for b, character in enumerate(ALPHABET)}


def splitter(pattern: str | None):
    """A function from a text to its pieces; what the pattern does not match is one as well. None: a space before it."""
    if pattern is None:
        return lambda text: [text if text[0] == " " else " " + text]
    find = regex.compile(rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+").finditer
    return lambda text: [match[0] for match in find(text)]


def finder(added: list[dict], normal):
    """A function from a text to pieces of what `normal` makes of it, and ids of the added tokens between them."""
    patterns, ids = [], {normal(a["content"]): a["id"] for a in added}
    for a in sorted(added, key=lambda a: -len(a["content"])):
        pattern = f"({regex.escape(normal(a['content']))})"
        if a.get("single_word"):
            pattern = rf"(?<!\w){pattern}(?!\w)"
        patterns.append((r"\s*" if a.get("lstrip") else "") + pattern + (r"\s*" if a.get("rstrip") else ""))
    pattern = regex.compile(f"(?|{'|'.join(patterns) or '(?!)'})")   # the longest first; all groups are group 1

    def find(text: str) -> list[str | int]:
        parts = pattern.split(normal(text))
        parts[1::2] = [ids[token] for token in parts[1::2]]
        return parts
    return find


def load_tokenizer(folder: Path):
    """The folder's tokenizer, or None if it has none: such a checkpoint serves token ids only. Raises ValueError."""
    file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    try:
        if file.is_file():
            return Tokenizer.from_json(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return Tokenizer.from_gpt2(folder)
        return Tokenizer.from_llama3(model) if model.is_file() else None
    except NotImplementedError as reason:   # other than byte-level BPE
        try:
            return ForeignTokenizer(file)
        except ImportError:
            raise ValueError(f"{file} uses {reason}, which takes the tokenizers package: "
                             "pip install tokenizers") from None
        except Exception as error:   # the package has no exception of its own
            raise ValueError(f"{file} cannot be used ({error}): fetch it again") from None
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError, regex.error) as error:
        raise ValueError(f"the tokenizer files in {folder} are damaged ({error!r}): fetch them again") from None


class Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): split text into words, merge each word's bytes.

    tiktoken does the merging. It merges the pair whose union has the lowest rank, where a merge list
    names pairs: for trained lists the two agree, because a token is only ever reached by one pair.
    Its ranks are the order of merges; `ids` turns them into the checkpoint's own token ids.
    """

    def __init__(self, vocab: dict[str, int], merges: list, splits: list[str | None], added: list[dict],
                 unknown: int | None = None, before: list[int] = [], after: list[int] = [],
                 normal_form: str | None = None, whole: bool = False):
        """vocab: token -> id, in GPT-2's spelling, where a byte is a printable character. merges: pairs of tokens, or
        what becomes of them, in the order of merging. splits: patterns, each applied to the pieces of the one before;
        None puts a space before every piece. added: tokens that are found before splitting, as in tokenizer.json.
        unknown: the id of bytes that have none; None: they are left out. before, after: ids around every text. whole:
        words that are tokens stay whole, merges or not."""
        import tiktoken
        words = {token: to_bytes(token) for token in vocab}
        ids = {bytes([b]): vocab.get(character, unknown) for b, character in enumerate(ALPHABET)}
        for pair in merges:
            token = "".join(pair.split(" ") if isinstance(pair, str) else pair)
            ids.setdefault(words[token], vocab[token])
        self.ids = list(ids.values())
        self.merge = tiktoken.Encoding("checkpoint", pat_str=r"[\s\S]+", special_tokens={},
                                       mergeable_ranks={word: rank for rank, word in enumerate(ids)}).encode_ordinary
        self.tokens = {i: words[token] for token, i in vocab.items()}
        self.whole = {word: i for i, word in self.tokens.items()} if whole else {}
        self.tokens |= {a["id"]: a["content"].encode() for a in added}
        self.special = {a["id"] for a in added if a.get("special")}
        self.before, self.after = before, after
        # Added tokens are cut out of the text as it is, then as it is once normalized, special ones only if asked for.
        normal = partial(unicodedata.normalize, normal_form) if normal_form else str
        rest = *map(splitter, splits), lru_cache(1 << 16)(self._encode_word)
        self.stages = {}
        for special, wanted in (True, added), (False, [a for a in added if not a.get("special")]):
            self.stages[special] = (finder([a for a in wanted if not a.get("normalized")], str),
                                    finder([a for a in wanted if a.get("normalized")], normal), *rest)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids, with BOS where the checkpoint asks for it. `special`: read "<|...|>" as control tokens."""
        pieces = [text]
        for stage in self.stages[special]:
            pieces = [new for piece in pieces if piece != ""
                      for new in ([piece] if isinstance(piece, int) else stage(piece))]
        return self.before + pieces + self.after

    def _encode_word(self, word: str) -> list[int]:
        i = self.whole.get(word.encode())
        return [self.ids[rank] for rank in self.merge(word) if self.ids[rank] is not None] if i is None else [i]

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        skip = self.special if skip_special else ()
        return b"".join(self.tokens.get(i, b"") for i in ids if i not in skip).decode("utf-8", "replace")

    def decoder(self, prompt: list[int]):
        """A function from a token, and whether it is the last, to the characters that it completes."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")

        def push(i: int, last: bool) -> str:
            token = b"" if i in self.special else self.tokens.get(i, b"")
            return token.decode() if token.isascii() and not utf8.buffer else utf8.decode(token, last)
        return push

    # --- from the three kinds of files

    @classmethod
    def from_json(cls, folder: Path):
        """From tokenizer.json, the `tokenizers` package's own format."""
        raw = read_json(folder / "tokenizer.json")
        model, added = raw["model"], [*added_tokens(folder), *(raw.get("added_tokens") or [])]
        added = {a["id"]: a for a in added}.values()   # this file has the last word
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            kind = "SentencePiece-style" if model.get("byte_fallback") else model["type"]
            raise NotImplementedError(f"a {kind} model")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise NotImplementedError(f"the BPE option {option}")
        vocab = model["vocab"]
        unknown = vocab.get(model.get("unk_token"))
        if unknown is not None and model.get("fuse_unk") and not all(c in vocab for c in ALPHABET):
            raise NotImplementedError("the BPE option fuse_unk")
        normal_form = None
        for step in steps(raw.get("normalizer"), "normalizers"):
            if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD") or normal_form:
                raise NotImplementedError(f"a {step['type']} normalizer")
            normal_form = step["type"]

        *first, last = steps(raw.get("pre_tokenizer"), "pretokenizers") or [{"type": "nothing"}]
        if last["type"] != "ByteLevel":
            raise NotImplementedError(f"a BPE model that is not byte-level (its pre-tokenizer ends in {last['type']})")
        splits = []
        for step in first:
            if step["type"] == "Digits":
                splits.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
            elif step["type"] == "Split" and step["behavior"] == "Isolated":
                pattern = step["pattern"]
                splits.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
            else:
                raise NotImplementedError(f"a {step['type']} pre-tokenizer")
        splits += [None] if last.get("add_prefix_space", True) else []
        splits += [GPT2_SPLIT] if last.get("use_regex", True) else []

        before, after = [], []
        for step in steps(raw.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing":
                side = before
                for item in step["single"]:
                    if "Sequence" in item:
                        side = after
                    else:
                        side += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
            elif step["type"] != "ByteLevel":
                raise NotImplementedError(f"a {step['type']} post-processor")
        return cls(vocab, model["merges"], splits, added, unknown, before, after, normal_form,
                   whole=model.get("ignore_merges"))

    @classmethod
    def from_gpt2(cls, folder: Path):
        """From vocab.json and merges.txt, with what tokenizer_config.json and added_tokens.json add."""
        vocab, options = read_json(folder / "vocab.json"), read_json(folder / "tokenizer_config.json", optional=True)
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        added = added_tokens(folder)
        if not added and "<|endoftext|>" in vocab:
            added = [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True}]
        bos = options.get("bos_token", "<|endoftext|>")
        bos = (vocab | {a["content"]: a["id"] for a in added}).get(bos["content"] if isinstance(bos, dict) else bos)
        qwen = str(options.get("tokenizer_class")).startswith("Qwen2")   # the same files, another split
        splits = ([None] if options.get("add_prefix_space") else []) + [QWEN_SPLIT if qwen else GPT2_SPLIT]
        before = [bos] if options.get("add_bos_token") and bos is not None else []
        return cls(vocab, merges, splits, added, before=before, normal_form="NFC" if qwen else None)

    @classmethod
    def from_llama3(cls, path: Path):
        """From Llama 3's own tokenizer.model: a line per token, its bytes in base64 and its rank, which is its id."""
        vocab = {}
        for number, line in enumerate(path.read_bytes().splitlines()):
            try:
                word, rank = line.split()
                vocab[base64.b64decode(word, validate=True).decode("latin-1").translate(ALPHABET)] = int(rank)
            except ValueError:
                raise ValueError(f"{path} is torn at line {number + 1}: fetch it again" if number else
                                 f"{path} is a SentencePiece model: put the tokenizer.json of the same checkpoint "
                                 "beside it and pip install tokenizers") from None
        if list(vocab.values()) != list(range(len(vocab))) or not vocab.keys() >= set(ALPHABET):
            raise ValueError(f"{path} is torn: its ranks have gaps, or a byte has none: fetch it again")
        added = [{"id": i, "content": f"<|{name}|>", "special": True}
                 for i, name in enumerate(LLAMA3_SPECIAL, len(vocab))]
        return cls(vocab, list(vocab), [LLAMA3_SPLIT], added, before=[len(vocab)])


class ForeignTokenizer:
    """Whatever else a tokenizer.json may hold (SentencePiece-style BPE, Unigram), by the `tokenizers` package."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Inner
        self.inner = Inner.from_file(str(path))
        self.inner.no_truncation()   # some checkpoints carry the settings of their training
        self.inner.no_padding()

    def encode(self, text: str, special: bool = False) -> list[int]:
        self.inner.encode_special_tokens = not special
        return self.inner.encode(text).ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special)

    def decoder(self, prompt: list[int]):
        """As in Tokenizer. A token's text depends on those before it (a first token loses its space), so a window of
        them, which begins with the prompt's end, is decoded with it and without; half a character waits."""
        seen, new = prompt[-6:], []

        def push(i: int, last: bool) -> str:
            new.append(i)
            before, after = self.decode(seen, True), self.decode(seen + new, True)
            if after.endswith("\ufffd") and not last:
                return ""
            seen[:], new[:] = new, []
            return after[len(before):]
        return push


def added_tokens(folder: Path) -> list[dict]:
    """Tokens that tokenizer_config.json or (before that existed) added_tokens.json add to the vocabulary."""
    options = read_json(folder / "tokenizer_config.json", optional=True)
    if options.get("added_tokens_decoder"):
        return [{"id": int(i), **a} for i, a in options["added_tokens_decoder"].items()]
    named = [v["content"] if isinstance(v, dict) else v for key, v in options.items() if key.endswith("_token")]
    return [{"id": i, "content": token, "special": token in named or token.startswith("<|"), "normalized": False}
            for token, i in read_json(folder / "added_tokens.json", optional=True).items()]


def steps(section: dict | None, plural: str) -> list[dict]:
    """The steps of a section of tokenizer.json, which is nothing, one step or a (nested) Sequence of them."""
    if not section:
        return []
    return [s for part in section[plural] for s in steps(part, plural)] if section["type"] == "Sequence" else [section]


def to_bytes(token: str) -> bytes:
    try:
        return token.translate(BYTES).encode("latin-1")
    except UnicodeEncodeError:   # not in the alphabet: a token added as plain text
        return token.encode()
