"""Watch the loop decide. (Read nanoserve.py first; for `--explain` also roofline.py.)

    python nanoserve.py --prompts-file F --timeline              who ran in which step
    python nanoserve.py --prompts-file F --timeline chart.svg    the same as a picture
    python nanoserve.py --prompt "The cat sat" --explain         what each step computes, where, and at what cost

`LLM.watchers` are called in every step; what they see is kept here and shown when all is over. Only the
command line imports this file: without it the engine runs the same.
"""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import kernels
import latent
from batch import SHORT, Batch, Chunk, make_batch
from linear import DTYPES
from model import apart
from nanoserve import LLM, Request
from roofline import cost_of, measured_ceiling

KINDS = {   # of what may happen to a request in a step: its sign in a terminal, its colour, what it means
    "waiting": ("·", "#dddddd", "waiting"), "preempted": ("!", "#d62728", "preempted"),
    "prefill": ("8", "#1f77b4", "prefill of 8 tokens"), "hit": ("48+8", "#ffbf00", "after 48 found computed"),
    "verification": ("+3-1", "#9467bd", "3 drafts accepted, 1 refused"),
    "decode": ("━", "#7fc97f", "decode"), "end": ("■", "#333333", "last token"),
    "lost": ("x", "#d62728", "cut short")}
ENDS = {"stop": "end", "length": "end", "error": "lost", "abort": "lost"}   # finish_reason -> kind


class Cell(NamedTuple):
    """One request in one step."""
    kind: str           # waiting, preempted, prefill, decode or verification
    tokens: int = 0     # run in this step
    found: int = 0      # not run, as their K and V were there: prefix hit
    accepted: int = 0   # drafts that were right, of tokens - 1 that were verified

    @property
    def refused(self) -> int:
        return self.tokens - 1 - self.accepted if self.kind == "verification" else 0

    @property
    def sign(self) -> str:
        prefill = f"{self.found}+{self.tokens}" if self.found else f"{self.tokens}"
        signs = {"prefill": prefill, "verification": f"+{self.accepted}-{self.refused}"}
        return signs.get(self.kind) or KINDS[self.kind][0]


class Timeline:
    """A row per request and a column per step, and under them the pool."""

    def __init__(self, llm: LLM, file: str = ""):
        """file: where `show` draws it; "": it prints it."""
        self.llm, self.file = llm, file
        self.rows = defaultdict(dict)   # Request -> its cells by step
        self.pool = []                  # blocks in use, cached and free, by step
        self.computed = {}              # Request -> tokens with K and V after its last step
        llm.watchers.append(self.record)

    def record(self, plan: list[tuple[Request, Chunk]], takers: list[Request], tokens: list[int], logits_BV: Tensor):
        scheduler, pool = self.llm.scheduler, self.llm.pool
        cells = dict.fromkeys([*scheduler.running, *scheduler.waiting], Cell("waiting"))
        for request in scheduler.waiting:
            if self.computed.pop(request, 0):
                cells[request] = Cell("preempted")
        cells |= dict.fromkeys(takers, Cell("decode"))   # whose chunk is another's; who has one comes next
        for request, chunk in plan:
            found = chunk.start if chunk.start != self.computed.get(request, 0) else 0
            cell = Cell(kind_of(request, chunk), len(chunk.tokens), found)
            if cell.kind == "verification":
                cell = cell._replace(accepted=takers.count(request) - 1)
            cells[request] = cell
            # The other samples begin where this one's prompt ends; behind a draft that was refused all is run again.
            self.computed |= dict.fromkeys(request.siblings, chunk.start + cell.tokens - cell.refused)
        for request, cell in cells.items():
            self.rows[request][len(self.pool)] = cell
        self.pool.append((pool.num_referenced, len(pool.cached), len(pool.free)))

    def requests(self) -> Iterator[tuple[str, dict[int, Cell], str | None]]:
        """In order, of each: id and beginning of its prompt, its cells, and why it has ended."""
        for request, cells in sorted(self.rows.items(), key=lambda row: row[0].output.id):
            out, tokenizer = request.output, self.llm.tokenizer
            prompt = request.tokens[:min(12, out.prompt_tokens)]
            text = tokenizer.decode(prompt, True) if tokenizer else " ".join(map(str, prompt))
            text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
            while columns(text) > 16:
                text = text[:-1]
            yield f"{out.id} {text}", cells, out.finish_reason

    def text(self, width: int) -> str:
        """The chart, cut into bands of so many characters. Steps in which the same goes on share a column."""
        rows = {}
        for name, cells, reason in self.requests():
            rows[name] = {step: cell.sign for step, cell in cells.items()}
            if reason:
                rows[name][max(cells)] = cells[max(cells)].sign.removesuffix("━") + KINDS[ENDS[reason]][0]
        signs = [[row.get(step, "") for row in rows.values()] for step in range(len(self.pool))]
        names = ["step", *rows, "blocks in use", "cached", "free"]
        margin, bands, lines = max(map(columns, names)), [[]], []
        kinds = [column if {*column} <= {"", "·", "━"} else step for step, column in enumerate(signs)]
        for _, (first, *others) in groupby(range(len(signs)), kinds.__getitem__):
            last = first + len(others)
            column = [span(first + 1, last + 1), *signs[first], *map(str, self.pool[last])]
            size = max(map(len, column))
            if margin + sum(len(head) for head, *_ in bands[-1]) + 2 + size > width and bands[-1]:
                bands.append([])
            bands[-1].append(["  " + (sign * size if sign in ("━", "·") else sign.rjust(size)) for sign in column])
        for band in bands:
            for name, cells in zip(names, zip(*band)):
                if row := "".join(cells).rstrip():   # whoever is not there has none
                    lines.append(name + " " * (margin - columns(name)) + row)
            lines.append("")
        legend = ", ".join(f"{sign} {meaning}" for kind, (sign, _, meaning) in KINDS.items()
                           if kind != "verification" or self.llm.speculator)
        legend = textwrap.wrap(f"{legend}; blocks: in the column's last step", width)
        return "\n".join([*lines, *legend])

    def svg(self) -> str:
        """The chart as a picture: steps with a prefill are wide enough for its number of tokens."""
        H, left, height, total, parts = 20, 150, 60, self.llm.pool.num_blocks, []
        busy = {step for cells in self.rows.values() for step, cell in cells.items() if cell.kind == "prefill"}
        thin = max(2.0, min(16.0, 1000 / max(1, len(self.pool))))
        widths = [46 if step in busy else thin for step in range(len(self.pool))]
        *xs, right = accumulate(widths, initial=left)

        def box(x, y, width, height, kind, title=""):
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
                         f'fill="{KINDS[kind][1]}"><title>{escape(title)}</title></rect>')

        def text(x, y, label, anchor="start", fill="black"):
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(label)}</text>')

        y = H
        for name, cells, reason in self.requests():
            text(left - 6, y + H - 6, name, "end")
            for step, cell in cells.items():
                x, width, title = xs[step], widths[step], f"step {step + 1}: {cell.kind} {cell.tokens or ''}"
                title += f", {cell.found} found" * (cell.found > 0)
                if cell.kind == "verification":
                    title += f", {cell.tokens - 1} guessed, {cell.accepted} accepted, {cell.refused} refused"
                box(x, y + 2, width, H - 4, cell.kind, title)
                if cell.refused > 0:
                    box(x, y + 2, width, (H - 4) * cell.refused / (cell.tokens - 1), "waiting", title)
                if cell.kind == "prefill":
                    text(x + width / 2, y + H - 5, cell.sign, "middle", "white")
                if cell.found:
                    box(x, y + 2, width, 3, "hit", title)
            if reason:
                box(x + width - 2, y, 4, H, ENDS[reason], reason)
            y += H
        y += H
        text(left - 6, y + height - 6, f"blocks, of {total}", "end")
        for step, (x, width, (used, cached, free)) in enumerate(zip(xs, widths, self.pool), 1):
            title = f"step {step}: {used} in use, {cached} cached"
            box(x, y, width, height, "waiting", f"{title}, {free} free")
            box(x, y + height * free / total, width, height * cached / total, "hit", title)
            box(x, y + height * (1 - used / total), width, height * used / total, "decode", title)
        text(left, y + height + 16, f"{len(self.pool)} steps")
        x, y = left, y + height + 2 * H
        labels = dict(waiting="waiting, free", prefill="prefill, tokens", hit="prefix hit, cached",
                      decode="decode, in use", preempted="preempted", end="last token")
        if self.llm.speculator:
            labels |= dict(verification="accepted; above: refused")
        for kind, label in labels.items():
            box(x, y, 12, 12, kind)
            text(x + 18, y + 11, label)
            x += 140
        size = f'width="{max(right, x) + 20:.0f}" height="{y + 2 * H}"'
        return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
                f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")

    def show(self, say):
        """Write the chart to the file, or print it with `say`."""
        if self.file:
            Path(self.file).write_text(self.svg(), "utf-8")
        else:
            say("\n" + self.text(shutil.get_terminal_size((100, 24)).columns))


def columns(text: str) -> int:
    """How wide a terminal shows it."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def kind_of(request: Request, chunk: Chunk) -> str:
    """What a step does for a request: prefill, decode or verification."""
    if chunk.logits > 1:
        return "verification"
    return "decode" if len(chunk.tokens) == 1 and request.output.token_ids else "prefill"


class Explanation:
    """What each step computes, where it puts it, by which kernel, at what cost, and what comes out."""

    def __init__(self, llm: LLM):
        self.llm, self.ceiling = llm, measured_ceiling(llm.device, llm.dtype)
        self.steps = []    # what makes a step worth telling, and its lines
        llm.watchers.append(self.record)

    def record(self, plan: list[tuple[Request, Chunk]], takers: list[Request], tokens: list[int], logits_BV: Tensor):
        llm, S, lines = self.llm, self.llm.pool.block_size, []
        for request, chunk in plan:
            first, last = chunk.start, chunk.start + len(chunk.tokens) - 1
            slots = [f"slot {chunk.blocks[t // S] * S + t % S} (block {chunk.blocks[t // S]} x {S} + {t % S})"
                     for t in sorted({first, last})]
            where = f"request {request.output.id}, position {span(first, last)}"
            lines += [f"tokens     {where}: {self.spell(chunk.tokens)}",
                      f"memory     block table {short(chunk.blocks)}; K and V go to {' to '.join(slots)}"]
            if chunk.logits > 1:
                taken = [token for taker, token in zip(takers, tokens) if taker is request]
                lines.append(f"drafts     request {request.output.id} {self.verdict(chunk.tokens[1:], taken)}")
        lines += [f"attention  {line}" for line in describe_attention(llm, [chunk for _, chunk in plan])]
        cost = cost_of(llm, [(len(c.tokens), c.start) for _, c in plan], sum(c.logits for _, c in plan))
        bound = self.ceiling.verdict(cost)
        lines.append(f"cost       {cost.flops / 1e6:.1f} MFLOP / {cost.bytes / 1e6:.2f} MB = "
                     f"{cost.flops / cost.bytes:.2g} FLOP/B, {'below' if bound == 'memory' else 'above'} the machine's "
                     f"{self.ceiling.balance:.0f}: {bound}-bound, {self.ceiling.seconds(cost) * 1e3:.2f} ms at least")
        for request, token, logits_V in zip(takers, tokens, logits_BV):
            values, ids = logits_V.softmax(-1).topk(min(3, len(logits_V)))
            best = ", ".join(f"{self.spell([i])} {p:.1%}" for i, p in zip(ids.tolist(), values.tolist()))
            temperature = request.params.temperature
            how = f"drawn at temperature {temperature:g}" if temperature else "greedy"
            lines.append(f"next       {best} -> {self.spell([token])}, {how}")
        # A table's second block is news, and the first step of a third one; later ones are not.
        kinds = [(kind_of(request, chunk), request, len(chunk.blocks) == 2) for request, chunk in plan]
        self.steps.append((kinds, lines))

    def verdict(self, drafts: list[int], taken: list[int]) -> str:
        """What became of a request's drafts. taken: the tokens that the model took in their places, the last of them
        in the place of the first draft that was refused, or behind all."""
        n, all_right = len(taken) - 1, len(taken) > len(drafts)
        became = "accepted all" if all_right else "refused all" if not n else (
            f"accepted {self.spell(drafts[:n])}, refused {self.spell(drafts[n:])}")
        return (f"guessed {self.spell(drafts)}: {became}, took {self.spell(taken[n:])} "
                f"{'behind them' if all_right else 'instead'}")

    def spell(self, tokens: list[int]) -> str:
        """Token ids with their texts; -1 is none."""
        decode = self.llm.tokenizer.decode if self.llm.tokenizer else lambda ids: ""
        return "none" if tokens == [-1] else short([f"{i} {decode([i])!r}" for i in tokens])

    def show(self, say):
        """Every step that is not like the one before it, and the last one."""
        told, last = -1, len(self.steps) - 1
        for i, (kinds, lines) in enumerate(self.steps):
            counts = sorted(Counter(kind for kind, *_ in kinds).items(), reverse=True)   # decodes last
            if 1 < i < last and kinds == self.steps[i - 1][0] and counts[0][0] == "decode":
                continue
            if i - told > 1:
                say(f"step {span(told + 2, i)}: decodes like the one before")
            say(f"step {i + 1}: {' and '.join(f'{n} {kind}' for kind, n in counts)}")
            for line in lines:
                say(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent=13 * " ", break_on_hyphens=False))
            told = i


def span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def short(things: list) -> str:
    """A list, without its middle if it is long."""
    things = [str(thing) for thing in things]
    return "[" + ", ".join(things if len(things) <= 8 else [*things[:5], "...", *things[-2:]]) + "]"


def describe_attention(llm: LLM, chunks: list[Chunk]) -> Iterator[str]:
    """Which calls or launches serve a step's chunks in a layer, and why these; for each window that layers have."""
    c, pool, device, dtype, G = llm.config, llm.pool, llm.device, DTYPES[llm.dtype], llm.config.H // llm.config.K
    if llm.model.exact:
        chunks = [part for chunk in chunks for part in apart(chunk)]
    batch = make_batch(chunks, pool.block_size, device, pool.block_tables_UM)
    batch.exact = llm.model.exact
    if c.latent:
        yield from describe_latents(llm, batch)
        return
    windows = list(dict.fromkeys(c.windows))
    for window in windows:
        layers = [l for l in range(c.L) if c.windows[l] == window]
        sees = f"{window} keys back" if window else "all keys"
        of = f"layers {short(layers)}, which see {sees}: " if len(windows) > 1 else ""
        if llm.model.attention is kernels.attention_naive:
            yield f"{of}naive: a product per request and head, {len(chunks)} x {c.H} of them"
        elif llm.model.attention is kernels.attention_torch:
            for call in kernels.plan_torch(batch, c.H, pool.memory[0][0], window, dtype):
                rows, in_place = len(batch.positions_T[call.rows]), isinstance(call.keys, slice)
                length = call.keys.stop - call.keys.start if in_place else call.keys.shape[-1]
                n, count = call.tokens, rows // (call.tokens or rows)   # tokens of each chunk, chunks
                what = (f"{count} decode{'s' * (count > 1)}, {c.K} KV heads, {G} query rows each" if n == 1
                        else f"{count} short chunk{'s' * (count > 1)} of {n} tokens, which read{'s' * (count == 1)} "
                             f"the keys as a decode does, {c.K} KV heads, {n} x {G} query rows each" if n
                        else f"prefill, {c.K} KV heads, {rows} x {G} query rows each")
                where = ("in place (neighbouring blocks)" if in_place else "gathered, padded to the longest"
                         f" and to a multiple of {kernels.WHOLE}" if call.shared else "gathered (scattered blocks)")
                how = "two products around a softmax" if call.shared else "one fused call"
                yield f"{of}{how} per layer: {what}; {length} keys, {where}"
        else:
            if few := [len(chunk.tokens) for chunk in chunks if len(chunk.tokens) <= SHORT]:
                longest, tile = max(few), kernels.decode_options(c.D, max(few) * G, dtype)["TILE"]
                splits = sum(b >= 0 for b, *_ in kernels.share_out(batch, c.K, window, tile, device))
                each = f"{G} query heads"
                each = f"its {each}" if longest == 1 else f"the {each} of its tokens, {longest} at most,"
                yield (f"{of}decode kernel: {splits} splits of keys for {len(few)} requests, to fill "
                       f"{kernels.multiprocessors_of(device)} multiprocessors, x {c.K} KV heads; each runs {each} "
                       f"against tiles of {tile} keys")
            if len(few) < len(chunks):
                options = kernels.prefill_options(c.D, G, dtype, kernels.capability_of(device))
                rows, tiles = options["ROWS"], len(kernels.cut_prompts(batch, options["ROWS"] // G))
                yield (f"{of}prefill kernel: {tiles} tiles of {rows} rows ({rows // G} tokens x {G} query heads) x "
                       f"{c.K} KV heads, each over tiles of {options['TILE']} keys")


def describe_latents(llm: LLM, batch: Batch) -> Iterator[str]:
    """Which chunks absorb what would widen their keys, and which do not."""
    c, m = llm.config, llm.config.latent
    key_bytes = c.D + 4 if llm.kv_cache_dtype == "int8" else c.D * DTYPES[llm.dtype].itemsize
    intensity = 2 * c.H * (2 * m.rank + m.rotary) / key_bytes
    for way in latent.plan(batch, llm.pool.block_size, m):
        n, tokens = len(way.batch.chunks), len(way.batch.positions_T)
        chunks = f"{n} chunk{'s' * (n > 1)} of {tokens} token{'s' * (tokens > 1)}"
        if way.slots_J is None:
            yield (f"{llm.model.backend}, absorbed: {chunks}, {c.H} query rows each against latents of {c.D} numbers, "
                   f"{intensity:.0f} operations per byte of a key that one token reads")
        else:
            yield (f"{llm.model.backend}, widened: {chunks}, {c.H} heads with K of {m.plain + m.rotary} and V of "
                   f"{m.value} numbers, made of the latents of {sum(way.batch.lens)} keys")
