"""Files become tensors, each a part of the model, or one clear refusal.
(What the engine stands on: a first reading may skip it, and come back for the table in `plan_parts`.)

In Hugging Face's layout safetensors files hold a model's weights by name, beside the config.json that config.py reads.
A download may be torn, and files may not belong together. So all is checked first, and the cheapest checks come first:

    read_config         config.json -> Config, without a look at the weights
    Checkpoint.check    every tensor's name, shape and dtype, on paper: the files are opened, no weight is read
    load_weights        one part at a time: read, bring into our layout, pack; memory for one copy of the weights,
                        and another one of an embedding that is also a packed head
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
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import Config, Fields
from linear import GROUP, Columns, Part, Vocabulary, has_kernels, pack, pack_experts, quantize, share_of, widen


# ---------------------------------------------------------------------------------------------
# The files

Stored = tuple[str, tuple[int, ...]]   # a tensor in the files: its name, its shape there
LET_GO = 32 << 20   # bytes that are read through open files, after which they are closed
Cut = tuple[int, list[slice]]          # what one rank of several has of a tensor: slices along this axis, as stored


class Checkpoint:
    """The tensors of a folder by name, each read from its memory-mapped file when it is asked for."""

    def __init__(self, folder: Path):
        self.opened, self.taken = {}, 0   # by path; bytes that were read through them
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file():
            files = {name: single for name in self._open(single).keys()}
        elif index.is_file():
            files = {name: folder / str(file) for name, file in Fields(index).need("weight_map", dict).items()}
            placed_in = {path: set() for path in sorted(set(files.values()))}
            for name, path in files.items():
                placed_in[path].add(name)
            for path, placed in placed_in.items():
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
        if path not in self.opened:
            self.opened[path] = self._open_anew(path)
        return self.opened[path]

    def _open_anew(self, path: Path):
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

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        # Closing a file lets go of its mapped pages, so memory holds one copy of the weights. Opening it reads the
        # names of all its tensors: of thousands of small ones, many are read between.
        file = self._open(self.files[self.names[name]])
        tensor = take(file.get_slice(self.names[name]), cut) if cut else file.get_tensor(self.names[name])
        self.taken += tensor.nbytes
        if self.taken > LET_GO:
            self.opened, self.taken = {}, 0
        return tensor

    def read_scale(self, name: str) -> Tensor:
        """float32. Raises ValueError naming a tensor by which no weight can be multiplied."""
        scale = self.read(name).float()
        if not ((scale > 0) & scale.isfinite()).all():
            raise ValueError(f"tensor {self.names[name]} holds a scale that is not a finite number above 0: "
                             "fetch the checkpoint again")
        return scale


def take(tensor: Tensor, cut: Cut) -> Tensor:
    """What a cut leaves of a tensor, or of one that is still in its file."""
    axis, slices = cut
    return torch.cat([tensor[:, one] if axis else tensor[one] for one in slices], axis)


# ---------------------------------------------------------------------------------------------
# The weights

MULTIPLIED = "qkv", "q_up", "out", "up", "down", "shared_up", "shared_down", "head"   # what goes through `linear`


def plan_parts(c: Config) -> Iterator[tuple[str, list[Stored], list[Stored]]]:
    """Every part of the model on paper, layer by layer: its name, the tensors of its weight, those of its bias. Several
    tensors are stacked: one product computes q, k and v, and one computes gate and up. So are the weights of a layer's
    experts, expert by expert. A layer without experts has a router of no tensors."""
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
    if m := c.latent:
        queries = c.H * (m.plain + m.rotary)
        q = ("q_a_proj", (m.q_rank, E)) if m.q_rank else ("q_proj", (queries, E))
        table |= {"qkv":     [(attn + q[0], q[1]), (attn + "kv_a_proj_with_mqa", (c.D, E))],
                  "kv_norm": [(attn + "kv_a_layernorm", (m.rank,))],
                  "kv_up":   [(attn + "kv_b_proj", (c.H * (m.plain + m.value), m.rank))],
                  "out":     [(attn + "o_proj", (E, c.H * m.value))]}
        if m.q_rank:
            table |= {"q_norm": [(attn + "q_a_layernorm", (m.q_rank,))],
                      "q_up":   [(attn + "q_b_proj", (queries, m.q_rank))]}
    if not c.tied:
        table["head"] = [("lm_head", (V, E))]
    sparse, e = {}, c.experts   # what a layer with experts has in the place of its MLP
    if e:
        mlp, gate, up, down = f"layers.{{l}}.{e.names[0]}.", *e.names[1:]
        each = [f"{mlp}experts.{x}." for x in range(e.X)]
        sparse = {"router": [(mlp + "gate", (e.X, E))],
                  "up":     [(expert + name, (e.I, E)) for expert in each for name in (gate, up)],
                  "down":   [(expert + down, (E, e.I)) for expert in each]}
        if e.shared:
            shared = mlp + "shared_experts."
            sparse |= {"shared_up":   [(shared + gate, (e.shared, E)), (shared + up, (e.shared, E))],
                       "shared_down": [(shared + down, (E, e.shared))]}
    outputs = -1 if c.family == "gpt2" else 0   # which axis of a stored weight its bias is as long as
    for part, tensors in (table | sparse).items():
        for l in range(c.L if "{l}" in tensors[0][0] else 1):
            has = sparse[part] if part in sparse and l in e.layers else table.get(part, [])
            weights = [(name.format(l=l) + ".weight", shape) for name, shape in has]
            biases = [(name.format(l=l) + ".bias", (shape[outputs],)) for name, shape in has if part in c.biased]
            if part == "router" and weights and e.corrected:
                biases = [(f"{mlp}gate.e_score_correction_bias".format(l=l), (e.X,))]
            yield part, weights, biases


def plan_scales(c: Config, checkpoint: Checkpoint) -> dict[str, Stored]:
    """For each weight that is stored in 8 bits the tensor of its scales.

    The config says which weights may be stored so, the files say which are. Both kinds of scale multiply what is
    stored: what is called an inverse undoes the quantising.
    """
    may = [(name, shape) for part, weights, _ in plan_parts(c) if c.stored and part in (*MULTIPLIED, "kv_up")
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


def plan_cuts(c: Config, rank: int, size: int) -> dict[str, Cut]:
    """What one of several ranks has of each stored tensor (parallel.py says why): the axis along which it is cut, and
    the slices. What is not named here, or has None for its slice, every rank has whole."""
    def piece(count: int, rows: int = 1) -> slice:
        mine = share_of(count, rank, size)
        return slice(mine.start * rows, mine.stop * rows)

    first = c.K * rank // size   # of the KV heads
    q, kv = piece(c.H, c.D), slice(first * c.D, (first + max(1, c.K // size)) * c.D)
    words, mlp = Vocabulary.piece(c.V, rank, size), piece(c.I)
    # Of weights [out, in]: rows, stacked as in `plan_parts`, or columns.
    rows = {"qkv": [q, kv, kv], "up": [mlp, mlp], "embedding": [words], "head": [words]}
    columns = {"out": [q], "down": [mlp]}
    if m := c.latent:   # heads are cut, and latents are whole
        q = piece(c.H, m.plain + m.rotary)
        rows |= {"qkv": [None if m.q_rank else q, None], "q_up": [q], "kv_up": [piece(c.H, m.plain + m.value)]}
        columns["out"] = [piece(c.H, m.value)]
    if e := c.experts:
        shared, mine = piece(e.shared), piece(e.X)
        rows["shared_up"], columns["shared_down"] = [shared, shared], [shared]
    found = {}
    for part, weights, biases in plan_parts(c):
        for i, (name, _) in enumerate(weights if part in rows or part in columns else ()):
            if expert := re.search(r"\.experts\.(\d+)\.", name):   # whole, on one of the ranks
                if not mine.start <= int(expert[1]) < mine.stop:
                    found[name] = 0, [slice(0, 0)]
                continue
            slices = columns[part] if part in columns else rows[part][i:i + 1]
            if part == "qkv" and len(weights) == 1:   # GPT-2 stores all three as one
                slices = [slice(n * c.E + one.start, n * c.E + one.stop) for n, one in enumerate(rows[part])]
            if slices == [None]:
                continue
            found[name] = int((part in columns) != is_conv1d(name)), slices
            if biases and part in rows:
                found[biases[i][0]] = 0, slices
    return found


def interleave_pairs(weight: Tensor, D: int) -> Tensor:
    """The rows of each head with RoPE's pairs side by side, as `rotate` in model.py wants them; q.k stays the same.

    Two heads of D = 4, stored as   a0 a1 b0 b1 | c0 c1 d0 d1   where a0 and b0 are a pair, so are a1 and b1,
    become                          a0 b0 a1 b1 | c0 d0 c1 d1.
    """
    halves = weight.unflatten(0, (-1, 2, D // 2))   # [heads, half, pair, ...]
    return halves.transpose(1, 2).flatten(0, 2)     # [heads, pair, half, ...], and flat again


def is_conv1d(name: str) -> bool:
    """Whether this is one of GPT-2's weights that are stored as [in, out]."""
    return re.search(r"\.c_\w+\.weight$", name) is not None


def to_our_layout(stored: Tensor, name: str, c: Config) -> Tensor:
    """A stored tensor in the order in which the model uses it: a weight is [out, in]."""
    if is_conv1d(name):
        return stored.T
    if c.latent:
        if c.interleaved or not re.search(r"\.(q|q_b|kv_a)_proj", name):
            return stored
        size = c.D if "kv_a" in name else c.latent.plain + c.latent.rotary
        heads = stored.unflatten(0, (-1, size))   # the last rows of each are the rotary ones
        plain, rotary = heads.split([heads.shape[1] - c.latent.rotary, c.latent.rotary], 1)
        rotary = interleave_pairs(rotary.flatten(0, 1), c.latent.rotary).view_as(rotary)
        return torch.cat([plain, rotary], 1).flatten(0, 1)
    if re.search(r"\.[qk]_(proj|norm)\.", name):
        return interleave_pairs(stored, c.D)
    return stored


def make_parts(c: Config, device: torch.device, dtype: torch.dtype, quantization: str | None,
               read: Callable[[str, tuple[int, ...]], Tensor],
               read_scale: Callable[[str, tuple[int, ...]], Tensor | None] = lambda name, shape: None, ranks=None,
               ) -> dict[str, list[Part | list[Part] | None]]:
    """Every part by its name, one entry per layer (or one); of a layer's experts what `pack_experts` gives, and None
    for the router of a layer without them. `read` gives the stored tensor of a name and shape, and `read_scale` the
    scale of its rows, float32 [out, G], if it is stored in 8 bits. ranks: they share the model, and of a tensor that is
    cut, what is read is this rank's slice; None: it is whole.

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

    def make_part(weights: list[Stored], biases: list[Stored], dtype: torch.dtype) -> Part:
        pieces = [read_piece(*tensor) for tensor in weights]
        bias = stack([to_our_layout(read(*tensor), tensor[0], c) for tensor in biases], dtype) if biases else None
        if all(piece.scale is not None for piece in pieces):
            return Part(stack([piece.weight for piece in pieces], pieces[0].weight.dtype), bias,
                        stack([piece.scale for piece in pieces], torch.float32))
        pieces = [widen(piece, dtype) for piece in pieces]   # of q, k and v some may be stored in 8 bits, others not
        return Part(stack([piece.weight for piece in pieces], dtype), bias)

    parts = {}
    for name, weights, biases in plan_parts(c):
        precise = name == "router" and c.experts.precise
        part = make_part(weights, biases, torch.float32 if precise else dtype) if weights else None
        experts = weights and ".experts." in weights[0][0]
        if name == "kv_up":   # it multiplies queries and answers head by head, in float
            part = widen(part, dtype)
        if ranks and part and name in ("out", "down", "shared_down", "router") and not experts:
            # The bias of columns is added once. A router is whole, and what its experts give is the sum of the ranks'.
            bias = part.bias if name == "router" or not ranks.rank else None
            part = replace(part, bias=bias, slice=Columns(ranks))
        if ranks and name in ("embedding", "head"):
            part = replace(part, slice=Vocabulary(ranks, c.V))
        if part and name in MULTIPLIED:
            part = quantize(part, quantization)
            if experts:
                mine = Columns(ranks).piece(c.experts.X) if ranks else slice(0, c.experts.X)
                part = pack_experts(part, mine.stop - mine.start, dtype)
            else:
                part = pack(part, dtype)
        parts.setdefault(name, []).append(part)
    if c.tied:   # the embedding stays as it is: the model takes rows of it
        parts["head"] = [pack(quantize(replace(parts["embedding"][0]), quantization), dtype)]
    return parts


def load_weights(folder: Path, c: Config, device: torch.device, dtype: torch.dtype,
                 quantization: str | None = None, ranks=None) -> dict[str, list[Part]]:
    """The parts of a checkpoint, straight from its mapped files. ranks: they share the model (parallel.py), and each
    reads its slices only. Raises ValueError naming a bad tensor."""
    checkpoint = Checkpoint(folder)
    embedding, head = ("wte.weight" if c.family == "gpt2" else "embed_tokens.weight"), "lm_head.weight"
    if c.tied and embedding not in checkpoint.names and head in checkpoint.names:   # its other name
        checkpoint.names[embedding] = checkpoint.names.pop(head)
    extra = tuple(f"layers.{l}." for l in range(c.L, c.L + c.extra_layers))
    checkpoint.names = {name: stored for name, stored in checkpoint.names.items() if not name.startswith(extra)}
    doubtful = c.tied and head in checkpoint.names   # said to be tied, and yet stored: tied only if it is the same
    c = replace(c, tied=c.tied and not doubtful)
    expected = {name: shape for _, weights, biases in plan_parts(c) for name, shape in weights + biases}
    scales = plan_scales(c, checkpoint)
    checkpoint.check(expected, scales)   # on paper first
    doubtful &= head not in scales   # a head in 8 bits is its own
    if doubtful and torch.equal(checkpoint.read(head).to(dtype), checkpoint.read(embedding).to(dtype)):
        c = replace(c, tied=True)
        del expected[head]

    cuts = plan_cuts(c, ranks.rank, ranks.size) if ranks else {}
    for name, (axis, slices) in cuts.items():
        length = sum(one.stop - one.start for one in slices)
        expected[name] = (*expected[name][:axis], length, *expected[name][axis + 1:])
    eight_bits = {name for part, weights, _ in plan_parts(c) if part in MULTIPLIED
                  for name, _ in weights if quantization or name in scales}
    if "fp8" in (quantization, c.stored) and not has_kernels(device):   # `pack` widens them
        eight_bits = set()
    sizes = {name: math.prod(shape) * (1 if name in eight_bits else dtype.itemsize) for name, shape in expected.items()}
    needed = total = sum(sizes.values())
    if c.tied and (quantization or device.type == "cpu"):   # the head is the embedding again, in 8 bits or packed
        needed += math.prod(expected[embedding]) * (1 if eight_bits else dtype.itemsize)
    try:
        torch.empty(needed, dtype=torch.uint8, device=device)   # all of it once, so as not to fail half-way
    except RuntimeError:
        raise ValueError(f"{folder} needs {needed / 1e9:.1f} GB, and {device} does not have them: "
                         "use a smaller dtype, or another device") from None
    begin, done = time.perf_counter(), 0

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        nonlocal done
        done += sizes[name]
        if not (ranks and ranks.rank) and sys.stderr.isatty() and time.perf_counter() - begin > 1:
            text = f"loading {folder}: {done / total:4.0%} of {total / 1e9:.1f} GB" if done < total else "\x1b[K"
            print("\r" + text, end="", file=sys.stderr, flush=True)
        weight = checkpoint.read(name, cuts.get(name))
        if name in widened:
            scale = checkpoint.read_scale(scales[name][0]).repeat_interleave(GROUP, 0)[:shape[0]]
            weight = weight.to(dtype).mul_(take(scale.repeat_interleave(GROUP, 1), cuts[name]))
        return weight

    def read_scale(name: str, shape: tuple[int, ...]) -> Tensor | None:
        if name not in scales or name in widened:
            return None
        scale = checkpoint.read_scale(scales[name][0])
        scale = scale.repeat_interleave(GROUP, 0)[:shape[0]] if c.blocks else scale.view(-1, 1)
        axis, (piece,) = cuts.get(name, (0, [slice(0, len(scale))]))
        if axis == 0:
            return scale[piece]
        return scale[:, piece.start // GROUP:piece.stop // GROUP] if c.blocks else scale
    # A rank that begins within a block of 128 columns has no scale for its groups of 128: such weights become floats.
    widened = {name for name in cuts if c.blocks and name in scales and cuts[name][0] and expected[name][1] % GROUP}
    return make_parts(c, device, dtype, quantization, read, read_scale, ranks)


def random_weights(c: Config, device: torch.device, dtype: torch.dtype,
                   quantization: str | None = None, ranks=None) -> dict[str, list[Part]]:
    """Weights of the right shape that know nothing, for measuring."""
    cuts = plan_cuts(c, ranks.rank, ranks.size) if ranks else {}

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        stored = torch.empty(shape, dtype=dtype, device=device)
        stored = stored.normal_(0, 0.02) if len(shape) > 1 else stored.fill_(name.endswith("weight"))
        return take(stored, cuts[name]) if name in cuts else stored
    return make_parts(c, device, dtype, quantization, read, ranks=ranks)
