"""The forward pass: GPT-2 and Llama side by side. (Read kernels.py first; next comes nanoserve.py.)

`Model` runs GPT-2 (Radford et al. 2019) or Llama (Touvron et al. 2023) over a ragged batch. The families are
the same machine with different parts:

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
The weights come from checkpoint.py, stacked so that one product computes q, k and v, and one gate and up.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from batch import Batch, Chunk, Graphs, make_batch
from config import Config
from device import single_thread
from kernels import ATTENTION, WRITE_KV
from linear import Part, linear, rows

GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu": F.gelu, "relu": F.relu,
               "silu": F.silu, "swish": F.silu}
SINGLE_THREAD = 2_000_000   # products of the MLP's matrix in a step: with fewer, a second thread mostly waits


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
        layers = list(zip(*(memory.unbind() for memory in pool.memory)))   # K, V, and in INT8 the scales of both
        x_TE = rows(batch.tokens_T, w["embedding"][0])
        if llama:
            angles_T1P = batch.positions_T[:, None, None] * self.frequencies    # P = D / 2 pairs
            turns_T1P = torch.polar(torch.full_like(angles_T1P, c.rope["attention_factor"]), angles_T1P)
        else:
            x_TE += w["position"][0].weight[batch.positions_T]

        for l in range(c.L):
            qkv = linear(norm(x_TE, w["attn_norm"][l], c.eps), w["qkv"][l]).view(-1, H + 2 * K, D)
            qk, v_TKD = qkv[:, :H + K], qkv[:, H + K:]
            if c.qk_norm:
                qk = F.rms_norm(qk, (D,), eps=c.eps) * self.qk_norm[l]
            if llama:
                qk = rotate(qk, turns_T1P)
            k_KNSD, v_KNSD, *scales = layers[l]
            self.write_kv(qk[:, H:], v_TKD, k_KNSD, v_KNSD, batch.slots_T, *scales)
            o_THD = self.attention(qk[:, :H], k_KNSD, v_KNSD, batch, c.scales[l], c.windows[l], *scales)
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


def norm(x_TE: Tensor, part: Part, eps: float) -> Tensor:
    """LayerNorm where there is a bias, RMSNorm (Zhang and Sennrich 2019) where there is none."""
    if part.bias is None:
        return F.rms_norm(x_TE, part.weight.shape, part.weight, eps)
    return F.layer_norm(x_TE, part.weight.shape, part.weight, part.bias, eps)


def rotate(x_THD: Tensor, turns_T1P: Tensor) -> Tensor:
    """RoPE: a pair of a head's dimensions is a complex number, turned by its position times the pair's frequency.

    Checkpoints store a pair D / 2 apart; `interleave_pairs` in checkpoint.py puts their rows side by side.
    """
    x_THP = torch.view_as_complex(x_THD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(x_THP * turns_T1P).flatten(-2).type_as(x_THD)


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
    if rope["rope_type"] == "yarn":         # this ramp is even over the pairs, not over their turns (Peng et al. 2023)
        first, last = (D / 2 * math.log(rope["original_max_position_embeddings"] / (2 * math.pi * turns))
                       / math.log(rope["rope_theta"]) for turns in (rope["beta_fast"], rope["beta_slow"]))
        if rope["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        keep = 1 - ((torch.arange(D // 2) - first) / (last - first or 0.001)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / rope["factor"]
    return frequency


class ModelRunner:
    """A model at work: it runs chunks, and its K and V are in one memory, in the blocks of a pool."""

    def __init__(self, model: Model, memory, pool, cuda_graphs: bool):
        """memory: a KVMemory, the pool itself or one whose blocks have the same numbers. cuda_graphs: whether steps are
        replayed where a graph can do so."""
        self.model, self.memory, self.pool = model, memory, pool
        self.graphs = Graphs(self.forward, pool.block_size, pool.block_tables_UM) if cuda_graphs else None

    def __call__(self, chunks: list[Chunk], replay: bool = True) -> Tensor:
        """float32 [rows that want logits, V], in the order of the chunks. The next call may write over them, unless
        replay is false: then no graph is used."""
        self.pool.upload()
        if replay and self.graphs and self.graphs.fit(chunks):
            return self.graphs.replay(self.graphs.batch(chunks))[:sum(chunk.logits for chunk in chunks)]
        return self.forward(make_batch(chunks, self.pool.block_size, self.model.device, self.pool.block_tables_UM))

    def forward(self, batch: Batch) -> Tensor:
        """The model's logits of a batch. It works on as many threads as the step can keep busy."""
        with single_thread(len(batch.tokens_T) * self.model.config.I * self.model.config.E < SINGLE_THREAD):
            return self.model(batch, self.memory)
