"""KV memory is virtual memory. (Read this file first; next comes batch.py.)

A request's keys and values grow by one token a step, and nobody knows how long they will get. So
the memory is cut into blocks of S slots, one per token, as an operating system cuts RAM into pages, and each
request owns a block table: the list of the physical blocks that hold its tokens, in order
(PagedAttention, Kwon et al. 2023).

    request 0     269 "The"  341 " cat"  |  479 " sat"  578 " by"  |  259 " the"          S = 2
    its table               0            |             1           |       2
    request 1     269 "The"  337 " dog"  |  479 " sat"  578 " by"
    its table               3            |             4               token 2 -> block 4, slot 4 * 2 + 0 = 8
    the pool      [ The, cat | sat, by | the, - | The, dog | sat, by |  -  |  -  | ... ]  N blocks

(`python nanoserve.py --prompt "The cat sat" --prompt "The dog" --block-size 2 --max-tokens 3 --explain`
shows these very numbers: the words are tokens of demo/llama, and what is stored are their keys and values.)

Nothing is wasted but the tail of the last block, and nothing needs to be contiguous. A table is
also what makes sharing possible: two requests with the same beginning can point at the same blocks.
A full block is never written again, so it is indexed by the content of everything up to its end; a
request that starts with the same tokens finds it, even after its first owner has gone. Samples of one
prompt share its blocks too, and whoever first writes into a shared last block gets a copy.

Every block is in exactly one of three states: referenced (in the table of a living request), cached
(in no table, but in the index: a hit away from being used again, or the next to be evicted), free.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

import torch


@dataclass
class BlockTable:
    """One request's view of the pool: token t lives in slot blocks[t // S] * S + t % S."""
    blocks: list[int] = field(default_factory=list)
    row: int = -1          # where the device holds a copy of `blocks`; -1: it has none yet
    known: int = 0         # blocks that `match` found or `commit` offered to the index
    drafted: int = 0       # tokens whose K and V a draft model has computed, too (speculate.py)
    digests: list[bytes] = field(default_factory=list)   # names of full blocks, worked out once and kept for good


class KVMemory:
    """What is in the blocks: N blocks of S token slots for every layer and KV head of a model.

    memory: K and V, [L, K, N, S, D] each: layer, KV head, block, offset, head size. With heads outside blocks, one
    block of one head is contiguous. A latent (latent.py) is K and V in one: then there is one tensor. With dtype int8
    there is a float32 scale for every token and head of each of them, [L, K, N, S]: a number is its byte times its
    scale (kernels.py says how they are made). [:, :, block] of each tensor is what a block holds. The memory starts
    uninitialised: what no request has written, no request reads.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, num_blocks: int, block_size: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", latent: bool = False):
        shape, kinds = (layers, kv_heads, num_blocks, block_size), "k" if latent else "kv"
        self.memory = tuple(torch.empty(*shape, head_dim, dtype=dtype, device=device) for _ in kinds)
        if dtype == torch.int8:
            self.memory += tuple(torch.empty(shape, device=device) for _ in kinds)

    def copy(self, block: int, other: int):
        """Let the other block hold what this one holds."""
        for memory in self.memory:
            memory[:, :, other] = memory[:, :, block]


def quantize_kv(x_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [T, K, D] and float32 scales [T, K]: x is about byte * scale, with the scale largest |x| / 127 of its row.

    A row depends on no other, so what a token leaves behind does not depend on who is in its batch. A row of zeros has
    the scale 0. One with a NaN or an infinity has the scale NaN: whatever reads it becomes NaN, as it should.
    """
    x_TKD = x_TKD.float()
    most_TK1 = x_TKD.abs().amax(-1, keepdim=True)
    bytes_TKD = (x_TKD / most_TK1 * 127).nan_to_num().round().to(torch.int8)   # 0 / 0 gives 0
    return bytes_TKD, (most_TK1 / 127).where(most_TK1 < torch.inf, torch.nan).squeeze(-1)


class KVPool(KVMemory):
    """Blocks, and who holds which.

    block_tables_UM is what the device sees of the tables in use, of which there may be `max_tables` of `max_blocks`
    each; `upload` brings it up to date with the few entries that have changed. `draft` is the memory of a draft model,
    in blocks with the same numbers: one table serves both.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, num_blocks: int, block_size: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", prefix_cache: bool = True,
                 max_tables: int = 64, max_blocks: int | None = None, draft: KVMemory | None = None,
                 latent: bool = False):
        super().__init__(layers, kv_heads, head_dim, num_blocks, block_size, dtype, device, latent)
        self.draft = draft
        self.drafted_blocks: set[int] = set()                 # blocks that are full in the draft's memory, too
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self.references = [0] * num_blocks                    # tables that hold each block
        self.free = FreeBlocks(num_blocks)
        self.cached: OrderedDict[int, bytes] = OrderedDict()  # unreferenced but indexed, the first to be evicted first
        self.index: dict[bytes, int] = {}                     # digest of a whole prefix -> block with its last S tokens
        self.digests: dict[int, bytes] = {}                   # the index, read the other way
        self.block_tables_UM = torch.zeros(max_tables, max_blocks or num_blocks, dtype=torch.int64, device=device)
        self.free_rows = list(range(max_tables))
        self.changed: dict[tuple[int, int], int] = {}         # (row, entry) -> block, not yet on the device

    @property
    def available(self) -> int:
        """Blocks that can be allocated now: free ones, and cached ones that would be evicted."""
        return len(self.free) + len(self.cached)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - self.available

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def match(self, table: BlockTable, tokens: list[int]) -> int:
        """Fill an empty table with the blocks that hold the longest prefix of `tokens` known to the index.

        Returns the number of tokens found, a multiple of S, always less than len(tokens), because
        the last token must be computed for its logits. The blocks are now shared: read, never written.
        """
        for i in range((len(tokens) - 1) // self.block_size if self.prefix_cache else 0):
            block = self.index.get(self._digest(table, tokens, i))
            if block is None:
                break
            self.cached.pop(block, None)
            self._append(table, block)
        table.known = len(table.blocks)
        return len(table.blocks) * self.block_size

    def grow(self, table: BlockTable, num_tokens: int, expected_tokens: int = 0) -> bool:
        """Give the table blocks for so many tokens in all. False, and nothing changed, if too few are left.

        expected_tokens: how many it may need one day, for a table that is new (see FreeBlocks).
        """
        need = self.blocks_for(num_tokens) - len(table.blocks)
        if need > self.available:
            return False
        if need > 0:
            beside = table.blocks[-1] + 1 if table.blocks else -1
            if expected_tokens and beside not in self.free:
                beside = self.free.find(self.blocks_for(expected_tokens) - len(table.blocks))
            for _ in range(need):
                self._append(table, self._take(beside))
                beside = table.blocks[-1] + 1
        return True

    def fork(self, table: BlockTable, other: BlockTable):
        """Let an empty table hold all blocks of `table`. Before either writes into the last one: `own_last`."""
        for block in table.blocks:
            self._append(other, block)
        other.known, other.digests = table.known, list(table.digests)

    def own_last(self, table: BlockTable) -> bool:
        """Copy on write: make the table's last block its own. Who holds it alone, as the last one does when the others
        have their copies, keeps it. False, and nothing changed, if no block is left."""
        shared = table.blocks[-1]
        if self.references[shared] > 1:
            if not self.available:
                return False
            self.references[shared] -= 1
            table.blocks.pop()
            self._append(table, self._take(shared + 1))
            self.copy(shared, table.blocks[-1])   # not the draft's: samples have no drafts until they part
        return True

    def _append(self, table: BlockTable, block: int):
        if table.row < 0:
            table.row = self.free_rows.pop()
        self.changed[table.row, len(table.blocks)] = block
        table.blocks.append(block)
        self.references[block] += 1

    def upload(self):
        """Tell the device which entries of its block tables have changed."""
        if self.changed:
            at = torch.tensor(list(self.changed)).T.to(self.block_tables_UM.device)
            self.block_tables_UM[at[0], at[1]] = torch.tensor(list(self.changed.values())).to(at.device)
            self.changed.clear()

    def commit(self, table: BlockTable, tokens: list[int], num_tokens: int):
        """Make the table's full blocks findable: K and V of the first `num_tokens` tokens are in, or will be before
        anybody reads them, as every layer of a step writes before it attends. Drafts are no tokens yet."""
        if not self.prefix_cache:
            return
        for i in range(table.known, num_tokens // self.block_size):
            digest, block = self._digest(table, tokens, i), table.blocks[i]
            if digest not in self.index:   # another request may have computed the same: its block stays the one
                self.index[digest], self.digests[block] = block, digest
            table.known = i + 1

    def forget(self, table: BlockTable, num_tokens: int):
        """Take back what `commit` promised beyond so many tokens: the step that was to compute them has failed. The
        table must be released next."""
        for block in table.blocks[num_tokens // self.block_size:]:
            self.index.pop(self.digests.pop(block, None), None)

    def release(self, table: BlockTable):
        """Give all of the table's blocks back; what the index knows stays cached until it is needed.

        The end of the text goes into the cache before its beginning, and so is evicted before it: without the blocks
        before it no block can be found.
        """
        for block in reversed(table.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self.digests:
                    self.cached[block] = self.digests[block]
                else:
                    self.free.add(block)
        if table.row >= 0:
            self.free_rows.append(table.row)
        table.blocks, table.row, table.drafted = [], -1, 0

    def _take(self, beside: int) -> int:
        """A block that nobody holds: a free one, best this one; else the one that was cached first: it is forgotten."""
        if self.free:
            block = self.free.take(beside)
        else:
            block, digest = self.cached.popitem(last=False)
            del self.index[digest], self.digests[block]
        self.drafted_blocks.discard(block)
        return block

    def names(self, table: BlockTable, tokens: list[int], num_tokens: int) -> list[bytes]:
        """What the index calls each full block of the first `num_tokens` tokens."""
        return [self._digest(table, tokens, i) for i in range(num_tokens // self.block_size)]

    def _digest(self, table: BlockTable, tokens: list[int], i: int) -> bytes:
        """Name of everything up to the end of block i: its tokens chained to the digest before it."""
        if i == len(table.digests):
            before, S = table.digests[-1] if i else b"", self.block_size
            data = before + array("q", tokens[i * S:(i + 1) * S]).tobytes()
            table.digests.append(hashlib.blake2b(data, digest_size=16).digest())
        return table.digests[i]


class FreeBlocks:
    """The blocks that hold nothing, and which of them to take next.

    Any would do. But PyTorch's attention, which cannot walk a block table, reads neighbouring blocks as one piece and
    copies others together first. So a table takes the block beside its last one while that is free, and a new table
    begins where as many neighbours are free as it may need one day.
    """

    def __init__(self, num_blocks: int):
        self.blocks = dict.fromkeys(range(num_blocks - 1, -1, -1))   # an ordered set: without a wish its last is taken
        self.num_blocks, self.found_up_to = num_blocks, 0

    def __len__(self) -> int:
        return len(self.blocks)

    def __contains__(self, block: int) -> bool:
        return block in self.blocks

    def __iter__(self):
        return iter(self.blocks)

    def add(self, block: int):
        self.blocks[block] = None

    def take(self, wish: int) -> int:
        if wish not in self.blocks:
            return self.blocks.popitem()[0]
        del self.blocks[wish]
        return wish

    def find(self, count: int) -> int:
        """The first of so many free neighbours, -1 if there are none. It looks in two places, so that looking stays
        cheap: at the pool's front, and behind the neighbours that it found before."""
        if len(self.blocks) == self.num_blocks:
            self.found_up_to = 0
        for start in (0, self.found_up_to):
            if all(block in self.blocks for block in range(start, start + count)):
                self.found_up_to = max(self.found_up_to, start + count)
                return start
        self.found_up_to = 0
        return -1
