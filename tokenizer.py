"""Text is a list of numbers. (The engine stands on this file; a first reading may skip it.)

A model knows no letters. It knows V tokens by number, and a tokenizer turns text into those numbers and back.
Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019) does so in three moves. A pattern cuts the
text into words, each with the space before it. A word is its UTF-8 bytes, and every byte is a token, so that no
text is unknown. Then pairs of neighbours become one token, the pair that was learned first before all others, until
no known pair is left.
"The cat sat" through demo/llama, where tokens 0 to 255 are the bytes and the others follow in the order of learning:

    words     "The"             " cat"             " sat"
    bytes     84 104 101        32 99 97 116       32 115 97 116
    merged    84 256 "he"       274 " c" 97 116    260 " s" 97 116
              269 "The"         274 " c" 300 "at"  272 " sa" 116
                                341 " cat"         479 " sat"

On the way back the bytes of the tokens are put together again. A token need not end where a character ends: "😀" is
four bytes, perhaps in four tokens. So whoever streams text holds a character back until its last byte is there
(`decoder`).

Around this lesson stand the customs of real checkpoints: control tokens such as "<|endoftext|>" that no merge can make
(`AddedTokens`), three kinds of files that say the same thing (`load_tokenizer`), and tokenizers of another build, which
the `tokenizers` package reads for us (`ForeignTokenizer`).
"""

from __future__ import annotations

import base64
import codecs
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import regex
import tiktoken

from config import read_json

# What is a word. Llama 3 keeps up to three digits together, Qwen each on its own.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(4)),
                  "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id",
                  *(f"reserved_special_token_{i}" for i in range(5, 251))]

# Files spell tokens in GPT-2's alphabet: a printable character for each byte, its own where it has one. " cat": "Ġcat".
UNPRINTABLE = [*range(33), *range(127, 161), 173]
ALPHABET = "".join(chr(256 + UNPRINTABLE.index(b) if b in UNPRINTABLE else b) for b in range(256))
BYTES = {ord(character): b for b, character in enumerate(ALPHABET)}


def to_bytes(token: str) -> bytes:
    """The bytes of a token in GPT-2's spelling."""
    try:
        return token.translate(BYTES).encode("latin-1")
    except UnicodeEncodeError:   # not in the alphabet: a token added as plain text
        return token.encode()


# ---------------------------------------------------------------------------------------------
# Text into pieces: added tokens first, then words

is_word, is_space = regex.compile(r"\w").match, regex.compile(r"\s").match


class AddedTokens:
    """Tokens that stand in a text as they are and are found before it is cut into words: the longest at each place.

    A token is what tokenizer.json says of it: "id" and "content"; "special": it controls the model, and is found only
    if that is asked for; "lstrip", "rstrip": white space on that side belongs to it; "single_word": not inside a word.
    """

    def __init__(self, tokens: list[dict], normalize: Callable[[str], str] = str):
        self.tokens = {normalize(token["content"]): token for token in tokens if token["content"]}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")   # (?!) is found nowhere

    def cut(self, text: str, special: bool) -> Iterator[tuple[str, int | None]]:
        """Each token's id, after the text before it; at the end the rest of the text, and None."""
        end = 0
        for match in self.pattern.finditer(text):
            token, start, stop = self.tokens[match[0]], match.start(), match.end()
            if token.get("special") and not special:
                continue
            if token.get("single_word") and (is_word(text[start - 1:start]) or is_word(text[stop:stop + 1])):
                continue
            while token.get("lstrip") and start > end and is_space(text[start - 1]):
                start -= 1
            while token.get("rstrip") and stop < len(text) and is_space(text[stop]):
                stop += 1
            # A token of white space that the one before it has swallowed is given too, with no text between them.
            yield text[end:start], token["id"]
            end = stop
        yield text[end:], None


def split_by(pattern: str) -> Callable[[str], list[str]]:
    """A function that cuts a text into what the pattern matches and what lies between."""
    find = regex.compile(pattern).finditer

    def split(text: str) -> list[str]:
        pieces, end = [], 0
        for match in find(text):
            if match.start() > end:
                pieces.append(text[end:match.start()])
            if match[0]:
                pieces.append(match[0])
            end = match.end()
        return pieces + [text[end:]] if end < len(text) else pieces
    return split


def prefix_space(text: str) -> list[str]:
    """Some checkpoints read every text as if a space stood before it, so that its first word is a word like others."""
    return [text if text.startswith(" ") else " " + text]


# ---------------------------------------------------------------------------------------------
# Byte-pair encoding

class Tokenizer:
    """Byte-level BPE, with what a checkpoint adds to it.

    tiktoken does the merging. It knows a token by its rank, the place in the order of learning, and merges the pair
    whose union has the lowest rank, where a merge list names pairs: for trained lists the two agree, because a token is
    only ever reached by one pair. A checkpoint may number its tokens in another order: `id_of_rank` has its numbers.
    """

    def __init__(self, vocab: dict[str, int], merges: list, splits: list[Callable[[str], list[str]]],
                 added: list[dict], unknown: int | None = None, before: Sequence[int] = (), after: Sequence[int] = (),
                 normal_form: str | None = None, whole_words: bool = False):
        """vocab: token -> id, in GPT-2's spelling. merges: pairs of tokens, or what becomes of them, in the order of
        learning. splits: functions from a text to pieces, each applied to the pieces of the one before. added: see
        AddedTokens; those said to be "normalized" are looked for in the text's normal form, others in the text as it
        is. unknown: the id of bytes that have none; None: they are left out. before, after: ids around every text.
        normal_form: "NFC", say (Unicode Annex 15). whole_words: words that are tokens stay whole, merges or not."""
        spelled = {token: to_bytes(token) for token in vocab}
        ranked = {bytes([b]): vocab.get(character, unknown) for b, character in enumerate(ALPHABET)}   # bytes -> id
        for pair in merges:
            token = "".join(pair.split(" ") if isinstance(pair, str) else pair)
            ranked[spelled[token]] = vocab[token]
        ranks = {word: rank for rank, word in enumerate(ranked)}
        self.id_of_rank = list(ranked.values())
        self.merge = tiktoken.Encoding("checkpoint", pat_str=r"[\s\S]+", special_tokens={},
                                       mergeable_ranks=ranks).encode_ordinary
        self.whole_words = {spelled[token]: i for token, i in vocab.items()} if whole_words else {}
        self.bytes_of = {i: spelled[token] for token, i in vocab.items()}
        self.bytes_of |= {a["id"]: a["content"].encode() for a in added}
        self.special = {a["id"] for a in added if a.get("special")}
        self.before, self.after, self.splits = before, after, splits
        self.normalize = partial(unicodedata.normalize, normal_form) if normal_form else str
        self.verbatim = AddedTokens([a for a in added if not a.get("normalized")])
        self.normalized = AddedTokens([a for a in added if a.get("normalized")], self.normalize)
        self.encode_word = lru_cache(1 << 16)(self._encode_word)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids, with BOS where the checkpoint asks for it. `special`: read "<|...|>" as control tokens."""
        ids = list(self.before)
        for part, found in self.verbatim.cut(text, special):
            for plain, found_there in self.normalized.cut(self.normalize(part), special):
                for word in self._words(plain):
                    ids += self.encode_word(word)
                if found_there is not None:
                    ids.append(found_there)
            if found is not None:
                ids.append(found)
        return [*ids, *self.after]

    @property
    def words(self) -> dict[int, bytes]:
        """The vocabulary, without control tokens."""
        return {i: word for i, word in self.bytes_of.items() if i not in self.special}

    def _words(self, text: str) -> list[str]:
        pieces = [text] if text else []
        for split in self.splits:
            pieces = [word for piece in pieces for word in split(piece)]
        return pieces

    def _encode_word(self, word: str) -> list[int]:
        data = word.encode()
        if data in self.whole_words:
            return [self.whole_words[data]]
        ids = [self.id_of_rank[rank] for rank in self.merge(word)]
        return [i for i in ids if i is not None]

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        skip = self.special if skip_special else ()
        return b"".join(self.bytes_of.get(i, b"") for i in ids if i not in skip).decode("utf-8", "replace")

    def decoder(self, prompt: list[int]) -> Callable[[int, bool], str]:
        """A function from the next token after the prompt, and whether it is the last, to the characters that it
        completes. Joined, they are what `decode` makes of the tokens without the special ones."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")

        def push(i: int, last: bool) -> str:
            return utf8.decode(b"" if i in self.special else self.bytes_of.get(i, b""), last)
        return push


class ForeignTokenizer:
    """Whatever else a tokenizer.json may hold (SentencePiece-style BPE, Unigram), by the `tokenizers` package."""

    def __init__(self, inner):   # the package's own Tokenizer
        self.inner = inner

    @property
    def words(self) -> dict[int, str]:
        """The vocabulary, without what was added to it."""
        return {i: word for word, i in self.inner.get_vocab(with_added_tokens=False).items()}

    def encode(self, text: str, special: bool = False) -> list[int]:
        self.inner.encode_special_tokens = not special
        return self.inner.encode(text).ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special)

    def decoder(self, prompt: list[int]) -> Callable[[int, bool], str]:
        """As in Tokenizer, but a token's text depends on those before it: the first of a text loses its space. So new
        tokens are decoded behind those seen before them, and what these say alone is taken off: of "▁cat" "▁sat"
        comes "cat sat", less "cat". A character that the prompt has begun belongs to the answer, which ends it."""
        seen, new = list(prompt), []
        while (said := self.decode(seen, True)).endswith("\ufffd") and len(new) < 3:   # 3 of a character's 4 bytes
            new.insert(0, seen.pop())
        begun = self.decode(new, True)

        def push(i: int, last: bool) -> str:
            nonlocal seen, new, said, begun
            new.append(i)
            text, alone = self.decode(seen + new, True), self.decode(new, True)
            if text.endswith("\ufffd") and not last:   # in the middle of a character
                return ""
            # For a byte that fits nowhere the package gives up all bytes beside it. What is said stays said.
            piece = text[len(said):] if text.startswith(said) else alone
            piece, begun = piece.removeprefix(begun), ""   # U+FFFD at the prompt's end is not the answer's
            # Tokens without text of their own (special ones) are no context: those before them stay in view.
            seen, said = (new, alone) if alone else (seen + new, text)
            new = []
            return piece
        return push


# ---------------------------------------------------------------------------------------------
# From the files

def load_tokenizer(folder: Path) -> Tokenizer | ForeignTokenizer | None:
    """The folder's tokenizer, or None if it has none: such a checkpoint serves token ids only. Raises ValueError."""
    file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    try:
        if file.is_file():
            return from_tokenizer_json(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return from_vocab_and_merges(folder)
        return from_llama3(model) if model.is_file() else None
    except NotImplementedError as reason:   # other than byte-level BPE
        return from_foreign_json(file, str(reason))
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError, regex.error) as error:
        raise ValueError(f"the tokenizer files in {folder} are damaged ({error!r}): fetch them again") from None


def from_tokenizer_json(folder: Path) -> Tokenizer:
    """From tokenizer.json, the `tokenizers` package's own format. NotImplementedError: it is not byte-level BPE."""
    raw = read_json(folder / "tokenizer.json")
    model, added = raw["model"], [*added_tokens(folder), *(raw.get("added_tokens") or [])]
    added = list({a["id"]: a for a in added}.values())   # this file has the last word
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
    normal_form = read_normal_form(raw.get("normalizer"))
    splits = read_splits(raw.get("pre_tokenizer"))
    before, after = read_template(raw.get("post_processor"))
    return Tokenizer(vocab, model["merges"], splits, added, unknown, before, after, normal_form,
                     whole_words=bool(model.get("ignore_merges")))


def steps(section: dict | None, plural: str) -> list[dict]:
    """The steps of a section of tokenizer.json, which is nothing, one step or a (nested) Sequence of them."""
    if not section:
        return []
    return [s for part in section[plural] for s in steps(part, plural)] if section["type"] == "Sequence" else [section]


def read_normal_form(section: dict | None) -> str | None:
    normal_form = None
    for step in steps(section, "normalizers"):
        if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD") or normal_form:
            raise NotImplementedError(f"a {step['type']} normalizer")
        normal_form = step["type"]
    return normal_form


def read_splits(section: dict | None) -> list[Callable[[str], list[str]]]:
    *first, last = steps(section, "pretokenizers") or [{"type": "nothing"}]
    if last["type"] != "ByteLevel":
        raise NotImplementedError(f"a BPE model that is not byte-level (its pre-tokenizer ends in {last['type']})")
    splits = []
    for step in first:
        if step["type"] == "Digits":
            splits.append(split_by(r"\p{N}" if step.get("individual_digits") else r"\p{N}+"))
        elif step["type"] == "Split" and step["behavior"] == "Isolated":
            pattern = step["pattern"]
            splits.append(split_by(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])))
        else:
            raise NotImplementedError(f"a {step['type']} pre-tokenizer")
    if last.get("add_prefix_space", True):
        splits.append(prefix_space)
    if last.get("use_regex", True):
        splits.append(split_by(GPT2_SPLIT))
    return splits


def read_template(section: dict | None) -> tuple[list[int], list[int]]:
    """The ids before and after every text."""
    before, after = [], []
    for step in steps(section, "processors"):
        if step["type"] == "TemplateProcessing":
            side = before
            for item in step["single"]:
                if "Sequence" in item:   # the text
                    side = after
                else:
                    side += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        elif step["type"] != "ByteLevel":
            raise NotImplementedError(f"a {step['type']} post-processor")
    return before, after


def from_vocab_and_merges(folder: Path) -> Tokenizer:
    """From GPT-2's vocab.json and merges.txt, with what tokenizer_config.json and added_tokens.json add."""
    vocab, options = read_json(folder / "vocab.json"), read_json(folder / "tokenizer_config.json", optional=True)
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    added = added_tokens(folder)
    if not added and "<|endoftext|>" in vocab:
        added = [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True}]
    bos = options.get("bos_token", "<|endoftext|>")
    bos = (vocab | {a["content"]: a["id"] for a in added}).get(bos["content"] if isinstance(bos, dict) else bos)
    qwen = str(options.get("tokenizer_class")).startswith("Qwen2")   # the same files, another split
    splits = [prefix_space] if options.get("add_prefix_space") else []
    splits.append(split_by(QWEN_SPLIT if qwen else GPT2_SPLIT))
    before = [bos] if options.get("add_bos_token") and bos is not None else []
    return Tokenizer(vocab, merges, splits, added, before=before, normal_form="NFC" if qwen else None)


def added_tokens(folder: Path) -> list[dict]:
    """Tokens that tokenizer_config.json or (before that existed) added_tokens.json add to the vocabulary."""
    options = read_json(folder / "tokenizer_config.json", optional=True)
    if options.get("added_tokens_decoder"):
        return [{"id": int(i), **a} for i, a in options["added_tokens_decoder"].items()]
    named = [v["content"] if isinstance(v, dict) else v for key, v in options.items() if key.endswith("_token")]
    return [{"id": i, "content": token, "special": token in named or token.startswith("<|"), "normalized": False}
            for token, i in read_json(folder / "added_tokens.json", optional=True).items()]


def from_llama3(path: Path) -> Tokenizer:
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
    added = [{"id": i, "content": f"<|{name}|>", "special": True} for i, name in enumerate(LLAMA3_SPECIAL, len(vocab))]
    return Tokenizer(vocab, list(vocab), [split_by(LLAMA3_SPLIT)], added, before=[len(vocab)])


def from_foreign_json(path: Path, reason: str) -> ForeignTokenizer:
    """From a tokenizer.json that is not byte-level BPE, as `reason` says."""
    try:
        from tokenizers import Tokenizer as Inner
        inner = Inner.from_file(str(path))
    except ImportError:
        raise ValueError(f"{path} uses {reason}, which takes the tokenizers package: pip install tokenizers") from None
    except Exception as error:   # the package has no exception of its own
        raise ValueError(f"{path} cannot be used ({error}): fetch it again") from None
    inner.no_truncation()   # some checkpoints carry the settings of their training
    inner.no_padding()
    return ForeignTokenizer(inner)
