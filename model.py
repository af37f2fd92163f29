"""The forward pass: GPT-2 and Llama side by side. (Read kernels.py first; next comes nanoserve.py.)

`Model` runs GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023) or one of Llama's relatives over a ragged
batch. The families are the same machine with different parts:

                  GPT-2                          Llama, Mistral, Mixtral, Qwen2, Qwen3, DeepSeek
    position      learned, added to the input    rotary, applied to q and k in every layer (RoPE)
    norm          LayerNorm                      RMSNorm; Qwen3 also on every q and k head
    MLP           down(act(up(x)))               down(act(gate(x)) * up(x)), or several of them (experts.py)
    heads         one KV head per query head     G query heads share one KV head (GQA); DeepSeek: latent.py
    biases        everywhere                     nowhere; Qwen2 on q, k, v; Llama as its config says

"The cat sat" through demo/llama (E = 192, H = 6, K = 2, D = 32, I = 512, V = 1024):

    tokens_T [269, 341, 479]    x_TE [3, 192]    5 layers    x_BE [1, 192]    logits [1, 1024]    578 " by"
    each layer:    norm -> qkv [3, 6 + 2 + 2, 32] -> rotate q and k -> write k, v -> attend -> out [3, 192]
                   norm -> gate and up [3, 2 x 512] -> silu(gate) * up -> down [3, 192]

Only the last token's row reaches the head: it alone has the whole prompt behind it and a successor to find.
The weights come from checkpoint.py, stacked so that one product computes q, k and v, and another gate and up.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from batch import SHORT, Batch, Chunk, Graphs, make_batch
from config import Config, kv_bytes
from device import memory_for_pool, single_thread
from experts import mixture
from kernels import ATTENTION, WRITE_KV
from latent import attend_to_latents
from linear import Part, linear, rows
from paged_kv import KVMemory, KVPool

GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu": F.gelu, "relu": F.relu,
               "silu": F.silu, "swish": F.silu}
LATENT_EPS = 1e-6           # of the norms of latents, whatever the config says of the others
SINGLE_THREAD = 800_000     # products of the MLP's matrix in a step: with fewer, a second thread mostly waits


class Model:
    """A model of any family over a ragged batch. `weights` as `load_weights` or `random_weights` gives them."""

    def __init__(self, config: Config, weights: dict[str, list], attention: str):
        self.config, self.weights = config, weights
        self.backend, self.attention, self.write_kv = attention, ATTENTION[attention], WRITE_KV[attention]
        self.device = weights["embedding"][0].weight.device
        self.exact = attention == "torch" and not config.latent and weights["out"][0].weight.dtype == torch.int8
        if config.qk_norm:   # one weight per head: q's for each query head, then k's for each KV head
            q_and_k = [part.weight.split(config.D) for part in weights["qk_norm"]]
            self.qk_norm = [torch.cat([q.expand(config.H, -1), k.expand(config.K, -1)]) for q, k in q_and_k]
        if config.rope:
            size = config.latent.rotary if config.latent else config.D
            self.frequencies = rope_frequencies(config.rope, size).to(self.device)

    @torch.inference_mode()
    def __call__(self, batch: Batch, memory: KVMemory) -> Tensor:
        """Run the batch's T tokens, leave their K and V in memory; logits float32 [len(batch.logit_rows), V]."""
        c, w, gated = self.config, self.weights, self.config.family != "gpt2"
        batch.exact = self.exact
        layers = list(zip(*(tensor.unbind() for tensor in memory.memory)))   # K, V, and in INT8 the scales of both
        x_TE, turns_T1P = rows(batch.tokens_T, w["embedding"][0]), None
        if c.rope:
            angles_T1P = batch.positions_T[:, None, None] * self.frequencies    # P = D / 2 pairs
            turns_T1P = torch.polar(torch.full_like(angles_T1P, c.rope["attention_factor"]), angles_T1P)
        else:
            x_TE += w["position"][0].weight[batch.positions_T]

        for l in range(c.L):
            attend = self.attend_to_latents if c.latent else self.attend
            o_THD = attend(linear(norm(x_TE, w["attn_norm"][l], c.eps), w["qkv"][l]), l, turns_T1P, batch, *layers[l])
            x_TE += linear(o_THD.flatten(1), w["out"][l])

            h_TE = norm(x_TE, w["mlp_norm"][l], c.eps)
            if c.experts and l in c.experts.layers:
                x_TE += mixture(h_TE, w, l, c.experts, ACTIVATIONS[c.activation])
                continue
            h = linear(h_TE, w["up"][l])
            if gated:
                gate, up = h.chunk(2, -1)
                h = ACTIVATIONS[c.activation](gate).mul_(up)
            else:
                h = ACTIVATIONS[c.activation](h)
            x_TE += linear(h, w["down"][l])

        x_BE = norm(x_TE[batch.logit_rows], w["final_norm"][0], c.eps)
        return linear(x_BE, w["head"][0]).float()

    def attend(self, qkv_TF: Tensor, l: int, turns_T1P: Tensor | None, batch: Batch, k_KNSD: Tensor, v_KNSD: Tensor,
               *scales: Tensor) -> Tensor:
        """Write the step's K and V into the pool and attend to all that is there; [T, H, D]."""
        c, H, K, D = self.config, self.config.H, self.config.K, self.config.D
        qk, v_TKD = qkv_TF.view(-1, H + 2 * K, D).split([H + K, K], 1)
        if c.qk_norm:
            qk = F.rms_norm(qk, (D,), eps=c.eps) * self.qk_norm[l]
        if c.rope:
            qk = rotate(qk, turns_T1P)
        self.write_kv(qk[:, H:], v_TKD, k_KNSD, v_KNSD, batch.slots_T, *scales)
        return self.attention(qk[:, :H], k_KNSD, v_KNSD, batch, c.scales[l], c.windows[l], *scales)

    def attend_to_latents(self, qkv_TF: Tensor, l: int, turns_T1P: Tensor, batch: Batch, k_KNSD: Tensor,
                          scale_KNS: Tensor | None = None) -> Tensor:
        """The same where a token leaves a latent in the pool (latent.py); [T, H, W]. Queries may come from a latent of
        their own, which saves weights and nothing else."""
        c, w, m = self.config, self.weights, self.config.latent
        q_TF, c_TZ, r_TP = qkv_TF.split([qkv_TF.shape[1] - c.D, m.rank, m.rotary], -1)
        if m.q_rank:
            q_TF = linear(norm(q_TF, w["q_norm"][l], LATENT_EPS), w["q_up"][l])
        q_THU, s_THP = q_TF.view(-1, c.H, m.plain + m.rotary).split([m.plain, m.rotary], -1)
        turned = rotate(torch.cat([s_THP, r_TP[:, None]], 1), turns_T1P)
        c_T1Z = norm(c_TZ, w["kv_norm"][l], LATENT_EPS)[:, None]
        self.write_kv(torch.cat([c_T1Z, turned[:, c.H:]], -1), None, k_KNSD, None, batch.slots_T, scale_KNS)
        q_THF = torch.cat([q_THU, turned[:, :c.H]], -1)
        return attend_to_latents(q_THF, w["kv_up"][l], k_KNSD, batch, c.scales[l], m, self.backend, scale_KNS)


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
        if self.model.exact:   # a draft is verified as a decode would be computed, to the last bit
            chunks = [part for chunk in chunks for part in apart(chunk)]
        if replay and self.graphs and self.graphs.fit(chunks):
            return self.graphs.replay(self.graphs.batch(chunks))[:sum(chunk.logits for chunk in chunks)]
        return self.forward(make_batch(chunks, self.pool.block_size, self.model.device, self.pool.block_tables_UM))

    def forward(self, batch: Batch) -> Tensor:
        """The model's logits of a batch. It works on as many threads as the step can keep busy."""
        with single_thread(len(batch.tokens_T) * self.model.config.I * self.model.config.E < SINGLE_THREAD):
            return self.model(batch, self.memory)


def apart(chunk: Chunk) -> list[Chunk]:
    """A short chunk that wants logits for all of its tokens, as so many decodes."""
    if chunk.logits < len(chunk.tokens) or len(chunk.tokens) > SHORT:
        return [chunk]
    return [Chunk([token], chunk.start + i, chunk.blocks, row=chunk.row) for i, token in enumerate(chunk.tokens)]


def make_pool(kind: type[KVPool], c: Config, draft: Config | None, dtype: torch.dtype, device: torch.device,
              block_size: int, num_blocks: int | None, max_seqs: int, prefix_cache: bool, processes: int = 1) -> KVPool:
    """A pool for a model: of so many blocks, or with room for max_seqs full contexts, or for as much of them as memory
    allows. dtype: of K and V. draft: of a draft model, whose K and V lie in blocks of their own with the same numbers.
    processes: how many share the device's memory. Raises ValueError for what does not fit."""
    full, stored = -(-c.context // block_size), "int8" if dtype == torch.int8 else "auto"
    block_bytes = block_size * sum(kv_bytes(m, dtype.itemsize, stored) for m in (c, draft) if m)
    most, share = (memory // processes for memory in memory_for_pool(device))
    if num_blocks is None:
        num_blocks = max(1, min(full * max_seqs, share // block_bytes))
    if num_blocks * block_bytes > most:
        raise ValueError(f"{num_blocks} blocks of {block_size} tokens need {num_blocks * block_bytes / 1e9:.1f} GB, "
                         f"and {device} has {most / 1e9:.1f} GB: at most {most // block_bytes} blocks fit")
    tables, width = max_seqs + 1, min(num_blocks, full)   # a table more, for `LLM.logits`
    if tables * width * 8 > most // 8:
        raise ValueError(f"block tables for {max_seqs} requests of {width} blocks need {tables * width / 125e6:.1f} "
                         "GB: lower max_seqs or max_batched_tokens")
    blocks = num_blocks, block_size, dtype, device
    memory = KVMemory(draft.L, draft.K, draft.D, *blocks, bool(draft.latent)) if draft else None
    return kind(c.L, c.K, c.D, *blocks, prefix_cache, tables, width, memory, bool(c.latent))
