"""A step is one tensor, ragged over requests. (Read paged_kv.py first; next comes kernels.py.)

Every turn of the loop runs some tokens of some requests: all of a short prompt, a piece of a long one,
or the one token that a request sampled last. Nobody is padded to anybody's length. The tokens of all
requests stand in one row, and a few index tensors say whose they are. "The cat sat" arrives while
"The dog" is about to run its token 2 (" sat", 479), with blocks of S = 2 as in paged_kv.py:

    chunks          [479]  then  [269, 341, 479]      in order of length
    tokens_T         479          269  341  479       T = 4
    positions_T        2            0    1    2       in its own request
    slots_T            8            0    1    2       where its K and V go: block * S + offset
    query_starts       0            1              4  request b owns rows query_starts[b] to query_starts[b + 1]
    kv_lens            3            3                 keys that the request's last row sees
    table_rows         1            0                 which of the block tables on the device is theirs
    logit_rows         0                      3       the rows whose logits choose a token

All of it is one int64 tensor, so a step reaches the device in one transfer. (The block tables are there
already: a step only sends the entries that have changed.)

One tensor is also what lets a CUDA graph replay a step. Launching the hundreds of kernels of a decode
from Python takes longer than running them. A graph is recorded once and launches them all at once, but
always on the same memory: so a new step is copied into the memory on which the graph was recorded.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


SHORT = 16   # tokens. A chunk of so many or fewer is short: kernels.py attends to it as it does to a decode


@dataclass(slots=True)
class Chunk:
    """Consecutive tokens of one request: a prompt, a piece of one, the one token of a decode, or a verification, which
    is the token of a decode and the drafts that are guessed to follow it."""
    tokens: list[int]
    start: int          # position of tokens[0] in its request
    blocks: list[int]   # the request's block table, covering at least start + len(tokens) tokens
    logits: int = 1     # how many of its last tokens want logits
    row: int = 0        # where the device holds that block table, among all of them


@dataclass
class Batch:
    """The chunks of one step, flattened to T tokens of B requests. Build it with `make_batch`.

    In Triton short chunks go to the decode kernel and the others to the prefill kernel, so a mixed step takes one
    launch of each per layer. All tensors are int64 views of `memory`.
    """
    memory: Tensor
    tokens_T: Tensor           # token ids
    positions_T: Tensor        # each token's position in its request
    slots_T: Tensor            # where its K and V go: block * S + offset; -1: nowhere
    query_starts: Tensor       # [B + 1], request b owns rows query_starts[b]:query_starts[b + 1]
    kv_lens: Tensor            # [B], tokens that request b can look back on, its chunk included
    table_rows: Tensor         # [B], request b has block table block_tables_UM[table_rows[b]]
    logit_rows: Tensor         # the rows whose logits are wanted, request by request
    block_tables_UM: Tensor    # on the device, of all requests that run; what lies behind a table's end is not read
    chunks: list[Chunk]
    starts: list[int]          # query_starts, for Python
    lens: list[int]            # kv_lens, for Python
    exact: bool = False        # attention is the same to the last bit, whoever is beside a decode or a short chunk
    kept: dict = field(default_factory=dict)     # see `once`
    tables: dict = field(default_factory=dict)   # see `table`

    def once(self, key, make: Callable):
        """What `make()` gives. The first layer that asks has it made, and the others find it."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def table(self, key, rows_of: Callable[[Batch], list[tuple[int, ...]]]) -> Tensor:
        """The rows that `rows_of(batch)` works out, int32 on the device, for all layers. In a graph they are worked out
        anew for each step, so their number may depend on the number of requests alone."""
        if key not in self.tables:
            self.tables[key] = rows_of, torch.tensor(rows_of(self), dtype=torch.int32).to(self.memory.device)
        return self.tables[key][1]


def make_batch(chunks: list[Chunk], block_size: int, device: torch.device | str = "cpu",
               block_tables_UM: Tensor | None = None) -> Batch:
    """Flatten chunks into the index tensors of one step. Any order of chunks is right. Single tokens come first for the
    sake of speed: they are quick to flatten.

    block_tables_UM: the tables as the device holds them (chunk.row says where); None: they are made from chunk.blocks.
    """
    if block_tables_UM is None:
        tables = [chunk.blocks for chunk in chunks]
        width = max(1, *map(len, tables))
        block_tables_UM = torch.tensor([table + [0] * (width - len(table)) for table in tables]).to(device)
        chunks = [replace(chunk, row=row) for row, chunk in enumerate(chunks)]
    S, n = block_size, next((b for b, chunk in enumerate(chunks) if len(chunk.tokens) != 1), len(chunks))
    decodes, others = chunks[:n], chunks[n:]
    tokens = [chunk.tokens[0] for chunk in decodes]
    positions = [chunk.start for chunk in decodes]
    slots = [chunk.blocks[t // S] * S + t % S if chunk.blocks else -1 for chunk, t in zip(decodes, positions)]
    logit_rows = [row for row, chunk in enumerate(decodes) if chunk.logits]
    lens = [chunk.start + 1 if chunk.blocks else 0 for chunk in decodes]
    starts = list(range(n + 1))
    for chunk in others:
        places = range(chunk.start, chunk.start + len(chunk.tokens))
        tokens += chunk.tokens
        positions += places
        slots += [chunk.blocks[t // S] * S + t % S for t in places] if chunk.blocks else [-1] * len(places)
        logit_rows += range(len(tokens) - chunk.logits, len(tokens))
        lens.append(places.stop if chunk.blocks else 0)
        starts.append(len(tokens))
    parts = tokens, positions, slots, starts, lens, [chunk.row for chunk in chunks], logit_rows
    memory = torch.frombuffer(array("q", sum(parts, [])), dtype=torch.int64).to(device)
    return Batch(memory, *memory.split(list(map(len, parts))), block_tables_UM, chunks, starts, lens)


# ---------------------------------------------------------------------------------------------
# A graph replays a step

IDLE = Chunk([0], 0, [])       # token 0 of a request that owns no block: it writes no K and V, and sees no key
EMPTY = Chunk([], 0, [], 0)    # not even a token


class Graphs:
    """Steps of decodes and verifications as CUDA graphs, recorded when they first occur.

    Recording takes a second, so not every number of tokens gets a graph: a step of 5 is replayed as one of 8, of which
    three are idle. What comes out for these is thrown away. A graph wants tensors of the same size in every step, so it
    has as many requests as tokens. It is known by this number and by its longest chunk, rounded up to a power of two:
    the kernels' shapes depend on both. Verifications of 5 and 2 tokens are replayed by the graph of 8 tokens in chunks
    of up to 8. An idle request makes them 8 tokens, and five empty ones make them 8 requests: 2, 5, 1, 0, 0, 0, 0, 0.
    """

    def __init__(self, forward: Callable[[Batch], Tensor], block_size: int, block_tables_UM: Tensor):
        """forward: from a batch to its logits, by launches that are the same for all steps of a graph."""
        self.forward, self.block_size, self.block_tables_UM = forward, block_size, block_tables_UM
        self.recorded = {}   # (tokens, longest) -> (the batch that stays, what replays the launches, logits_TV)

    @staticmethod
    def fit(chunks: list[Chunk]) -> bool:
        """Whether a graph can replay this step: short chunks that want logits for each of their tokens."""
        return all(len(chunk.tokens) == chunk.logits <= SHORT for chunk in chunks)

    def batch(self, chunks: list[Chunk]) -> Batch:
        """The step in host memory, filled up to the size of its graph."""
        T = sum(len(chunk.tokens) for chunk in chunks)
        size = 1 << (T - 1).bit_length() if T <= 8 else -(-T // 8) * 8    # 1, 2, 4, 8, 16, 24, ...
        idle = [IDLE] * (size - T) + [EMPTY] * (T - len(chunks))
        return make_batch(chunks + idle, self.block_size, "cpu", self.block_tables_UM)

    @torch.inference_mode()
    def replay(self, batch: Batch) -> Tensor:
        """float32 [tokens, V]: logits of a step that `batch` has made, with the chunks of nobody at its end. The
        next replay writes over them."""
        size, longest = len(batch.chunks), max(len(chunk.tokens) for chunk in batch.chunks)
        longest = 1 << (longest - 1).bit_length()
        if (size, longest) not in self.recorded:
            idle = [Chunk([0] * longest, 0, [], longest)] + [IDLE] * (size - longest) + [EMPTY] * (longest - 1)
            stays = make_batch(idle, self.block_size, self.block_tables_UM.device, self.block_tables_UM)
            stays.positions_T.zero_()   # within any context
            self.recorded[size, longest] = stays, *record(lambda: self.forward(stays))
        stays, replay, logits_TV = self.recorded[size, longest]
        stays.memory.copy_(batch.memory)
        for rows_of, table in stays.tables.values():
            table.copy_(torch.tensor(rows_of(batch), dtype=torch.int32))
        replay()
        return logits_TV


def record(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A function that repeats what `step` launches on the GPU, and the tensor in which it leaves the result."""
    if not torch.cuda.is_available():
        raise ValueError("CUDA graphs need a CUDA device, and there is none: use cuda_graphs=False")
    step()   # compiles the kernels and makes their tables, outside of the recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):   # other threads may copy (distributed.py)
        result = step()
    return graph.replay, result
