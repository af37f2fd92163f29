"""Text is a list of numbers: against byte-pair encoding as its paper describes it, one merge at a time, and against plain
readings of the rest. Where the `tokenizers` package is installed, it is asked too. (Read beside tokenizer.py.)"""

import base64
import json
import random
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tokenizer as tokenizer_file
from tokenizer import GPT2_SPLIT, LLAMA3_SPLIT, QWEN_SPLIT, ForeignTokenizer, Tokenizer, load_tokenizer, split_by as splitter

HERE = Path(__file__).parent


def byte_alphabet():
    """GPT-2's bytes_to_unicode, by its rule: printable bytes stand for themselves, the others follow from 256 on."""
    alphabet, n = {}, 256
    for b in range(256):
        if unicodedata.category(chr(b)) not in ("Cc", "Cf", "Zs"):
            alphabet[b] = chr(b)
        else:
            alphabet[b], n = chr(n), n + 1
    return alphabet


def merging(word, merges):
    """Merge the earliest pair of the list wherever it occurs, from the left, until none is left: the parts at every stage."""
    parts, rank = [byte_alphabet()[b] for b in word.encode()], {tuple(m): i for i, m in enumerate(merges)}
    stages = [list(parts)]
    while pairs := [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in rank]:
        _, i = min(pairs)
        parts[i:i + 2] = ["".join(parts[i:i + 2])]
        stages.append(list(parts))
    return stages


def plain_bpe(word, merges):
    return merging(word, merges)[-1]


@lru_cache
def train_bpe(text, n):
    """The most frequent pair, n times. Learned across words, so that a wrong split into words is seen in the ids."""
    parts, merges = [byte_alphabet()[b] for b in text.encode()], []
    for _ in range(n):
        counts = Counter(zip(parts, parts[1:]))
        pair = max(counts, key=lambda p: (counts[p], p))
        merges.append(list(pair))
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == pair:
                parts[i:i + 2] = ["".join(pair)]
            i += 1
    return merges


SAMPLE = ("The cat sat on the mat. It's 12345 o'clock and we'll see 678 cats' tails\n\n  They've  sat there,\tthere!\r\n"
          "Привет, мир! Приветы кота. ភាសាខ្មែរ ភាសា 😀😀 👩‍👩‍👧 naïve café " * 2)
BORDERS = "1234 123 456 a12 !\n !\n\n t's t'LL \n\n at.\n " * 4   # merges across what one family or another splits
FRAGMENTS = ["the", " cat", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "1", "23", "456", ".", "!?", "привет", "ភាសា", "😀", "👩\u200d👩",
             "e\u0301", "\xa0", "\x85", "\u3000", "Ⅷ", "<|bos|>"]
PIECE = st.one_of(st.sampled_from(FRAGMENTS), st.integers(0, len(SAMPLE)).flatmap(lambda i: st.integers(0, 9).map(lambda n: SAMPLE[i:i + n])))
WILD = st.lists(st.one_of(PIECE, PIECE, PIECE, st.characters(codec="utf-8")), max_size=16).map("".join)


def find_words(pattern):
    import regex
    return lambda text: regex.findall(pattern, text)


def words_of_qwen(text):
    """Qwen's split, by its own description: like Llama 3's, with digits one by one."""
    return find_words(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")(text)


def words_of_smollm(text):
    """SmolLM2's split: every digit alone, then GPT-2's split of what is between them."""
    words = []
    for part in find_words(r"\p{N}|\P{N}+")(text):
        words += find_words(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")(part)
    return words


words_of_gpt2 = find_words(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
words_of_llama3 = find_words(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_by(pattern):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level(False)]}


BOS_TEMPLATE = {"type": "Sequence", "processors": [byte_level(False), {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [], "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [1000], "tokens": ["<|bos|>"]}}}]}
#             words, pre-tokenizer, normalizer, post-processor, ids before the text
TOKENIZERS = {
    "gpt2": (words_of_gpt2, byte_level(True), None, byte_level(False), []),
    "llama 3": (words_of_llama3, split_by(LLAMA3_SPLIT), None, BOS_TEMPLATE, [1000]),
    "qwen": (words_of_qwen, split_by(LLAMA3_SPLIT.replace("{1,3}", "")), {"type": "NFC"}, byte_level(False), []),
    "smollm": (words_of_smollm, {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, byte_level(True)]}, None, None, []),
}
ADDED = [{"id": 1000, "content": "<|bos|>", "special": True}, {"id": 1001, "content": "<tool>", "special": False},
         {"id": 1002, "content": "<tool>s", "special": False}]


def tokenizer_json(pre, normalizer, post, shuffle=0):
    """A tokenizer.json with merges learned from SAMPLE and BORDERS; ids in an order of their own if shuffle is given."""
    merges = train_bpe(SAMPLE + BORDERS, 120)
    tokens = list(dict.fromkeys([*byte_alphabet().values(), *("".join(m) for m in merges)]))
    random.Random(shuffle).shuffle(tokens)
    return {"version": "1.0", "added_tokens": ADDED, "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": post,
            "decoder": byte_level(True), "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                                                   "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}
    for name, (_, pre, normalizer, post, _) in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        raw = tokenizer_json(pre, normalizer, post, shuffle=5)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        made[name] = load_tokenizer(folder), raw, folder
    return made


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150)
@given(text=WILD)
def test_ids_equal_plain_byte_pair_encoding(tokenizers, name, text):
    (words, _, normalizer, _, before), (tokenizer, raw, _) = TOKENIZERS[name], tokenizers[name]
    normal = unicodedata.normalize("NFC", text) if normalizer else text
    expected = before + [raw["model"]["vocab"][part] for word in words(normal) for part in plain_bpe(word, raw["model"]["merges"])]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected[len(before):]) == normal


def test_each_family_has_its_own_ids_so_that_a_wrong_split_is_seen(tokenizers):
    ids = {name: tokenizers[name][0].encode(BORDERS) for name in TOKENIZERS}
    assert len({tuple(i for i in ids[name] if i != 1000) for name in TOKENIZERS}) == len(TOKENIZERS)


@pytest.mark.parametrize("pattern, words", [(GPT2_SPLIT, words_of_gpt2), (LLAMA3_SPLIT, words_of_llama3), (QWEN_SPLIT, words_of_qwen)])
@settings(max_examples=150)
@given(text=WILD)
@example(text="WE'LL we'll It'S 'D")
def test_words_are_those_of_each_family(pattern, words, text):
    assert splitter(pattern)(text) == words(text)


def test_other_files_of_the_same_tokenizer_give_the_same_ids(tokenizers, tmp_path):
    """vocab.json + merges.txt for GPT-2, tokenizer.model for Llama 3."""
    tokenizer, raw, _ = tokenizers["gpt2"]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"] | {"<|endoftext|>": 999}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in raw["model"]["merges"]))
    classic = load_tokenizer(tmp_path)
    assert classic.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert classic.encode("a<|endoftext|>", special=True) == classic.encode("a") + [999] and classic.decode([999]) == "<|endoftext|>"

    tokenizer, raw, _ = tokenizers["llama 3"]
    of = {character: b for b, character in byte_alphabet().items()}
    words = [bytes([b]) for b in range(256)] + [bytes(of[c] for c in "".join(m)) for m in raw["model"]["merges"]]
    words = list(dict.fromkeys(words))
    (tmp_path / "original").mkdir()
    (tmp_path / "original/tokenizer.model").write_text("".join(f"{base64.b64encode(w).decode()} {i}\n" for i, w in enumerate(words)))
    original = load_tokenizer(tmp_path / "original")
    back = {i: t for t, i in raw["model"]["vocab"].items()}
    expected = [words.index(bytes(of[c] for c in back[i])) for i in tokenizer.encode(SAMPLE)[1:]]
    assert original.encode(SAMPLE) == [len(words)] + expected
    assert original.encode("<|eot_id|>", special=True) == [len(words), len(words) + 9]


def test_special_tokens_in_a_prompt_are_plain_text_unless_asked_for(tokenizers):
    tokenizer = tokenizers["gpt2"][0]
    assert 1000 not in tokenizer.encode("a<|bos|>b") and tokenizer.decode(tokenizer.encode("a<|bos|>b")) == "a<|bos|>b"
    assert tokenizer.encode("a<|bos|>b", special=True) == tokenizer.encode("a") + [1000] + tokenizer.encode("b")
    assert tokenizer.encode("x<tool>s<tool>") == tokenizer.encode("x") + [1002, 1001], "not special: always found, the longest first"
    assert tokenizer.decode([1000, 1001]) == "<|bos|><tool>" and tokenizer.decode([1000, 1001], skip_special=True) == "<tool>"


def test_tokens_added_beside_the_vocabulary_are_found(tokenizers, tmp_path):
    _, raw, _ = tokenizers["gpt2"]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in raw["model"]["merges"]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 1001, "<|im_end|>": 1002}))
    old = load_tokenizer(tmp_path)
    assert old.encode("a<tool>")[-1] == 1001 and old.encode("<|im_end|>") != [1002] == old.encode("<|im_end|>", special=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "bos_token": {"content": "<s>"}, "added_tokens_decoder": {"1003": {"content": "<s>", "special": True}}}))
    new = load_tokenizer(tmp_path)
    assert new.encode("a") == [1003] + old.encode("a") and new.decode([1003]) == "<s>" and 1001 not in new.encode("<tool>")


def test_tokenizer_json_has_the_last_word_on_an_added_token(tokenizers, tmp_path):
    raw = dict(tokenizers["gpt2"][1], added_tokens=[{"id": 1000, "content": "<new>", "special": False}])
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        "1000": {"content": "<old>", "special": False}, "1001": {"content": "<more>", "special": False}}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<new><more>") == [1000, 1001] and tokenizer.decode([1000, 1001]) == "<new><more>"
    assert tokenizer.encode("<old>") == tokenizers["gpt2"][0].encode("<old>")


@settings(max_examples=100)
@given(text=WILD, prefix=st.booleans(), qwen=st.booleans())
def test_vocab_and_merges_are_read_as_their_config_says(tokenizers, tmp_path, text, prefix, qwen):
    tokenizer, raw, _ = tokenizers["qwen" if qwen else "gpt2"]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in raw["model"]["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2TokenizerFast" if qwen else "GPT2Tokenizer", "add_prefix_space": prefix}))
    expected = " " + text if prefix and text and text[0] != " " else text
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(expected)


STEPS = {   # a step of a pre-tokenizer, and what it does to a piece
    "digits": ({"type": "Digits", "individual_digits": False}, lambda text: re.findall(r"\d+|\D+", text)),
    "each digit": ({"type": "Digits", "individual_digits": True}, lambda text: re.findall(r"\d|\D+", text)),
    "regex": ({"type": "Split", "pattern": {"Regex": "t+|[.]"}, "behavior": "Isolated", "invert": False},
              lambda text: [piece for piece in re.split("(t+|[.])", text) if piece]),
    "string": ({"type": "Split", "pattern": {"String": "a."}, "behavior": "Isolated", "invert": False},
               lambda text: [piece for piece in re.split(r"(a\.)", text) if piece]),
}


@settings(max_examples=300)
@given(names=st.lists(st.sampled_from(list(STEPS)), max_size=3), prefix=st.sampled_from([False, True, None]),
       use_regex=st.sampled_from([False, True, None]), nested=st.booleans(),
       text=st.lists(st.sampled_from(["the", " cat", "att", "a.", "ab", "12", " 3", " ", "\n", ".", "é", "'s"]), max_size=8).map("".join))
def test_words_are_cut_by_every_step_in_order(tmp_path, names, prefix, use_regex, nested, text):
    """prefix, use_regex: as the file says; None: it does not, and they hold."""
    options = {key: value for key, value in (("add_prefix_space", prefix), ("use_regex", use_regex)) if value is not None}
    first = [STEPS[name][0] for name in names]
    raw = tokenizer_json({"type": "Sequence", "pretokenizers": [
        *([{"type": "Sequence", "pretokenizers": first}] if nested and first else first), {"type": "ByteLevel", "trim_offsets": True, **options}]},
        None, None, shuffle=5)
    raw["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    words = [text] if text else []
    for name in names:
        words = [new for word in words for new in STEPS[name][1](word)]
    words = [" " + word if prefix is not False and word[0] != " " else word for word in words]
    words = [new for word in words for new in (words_of_gpt2(word) if use_regex is not False else [word])]
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode(text) == [raw["model"]["vocab"][p] for word in words for p in plain_bpe(word, raw["model"]["merges"])]
    try:
        import tokenizers
    except ImportError:
        return
    if prefix is not None:   # the package insists on an answer
        assert tokenizer.encode(text) == tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


def test_added_tokens_are_found_in_normalized_text_and_words_after_prefix_spaces(tmp_path):
    raw = tokenizer_json({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, byte_level(True) | {"add_prefix_space": True}]}, {"type": "NFC"}, None)
    raw["added_tokens"] = [{"id": 1001, "content": "\xe9", "special": False, "normalized": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    expected = [raw["model"]["vocab"][p] for word in (" a", " 1", " 2", " b") for p in plain_bpe(word, raw["model"]["merges"])]
    assert tokenizer.encode("a12b") == tokenizer.encode(" a12b") == expected
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\xe9") == [1001]


def test_a_template_puts_ids_before_and_after_every_text(tmp_path):
    pieces = {name: {"id": name, "ids": ids, "tokens": [name]} for name, ids in (("<|bos|>", [1000]), ("two", [7, 8]), ("<tool>", [1001]))}
    raw = tokenizer_json(byte_level(True), None, {"type": "TemplateProcessing", "pair": [], "special_tokens": pieces, "single": [
        {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"SpecialToken": {"id": "two", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<tool>", "type_id": 0}}]})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("a", "", "a"):
        assert tokenizer.encode(text) == [1000, 7, 8, *[raw["model"]["vocab"][c] for c in text], 1001]


@pytest.mark.parametrize("character", [" ", "\n", "\t", "a", "1", "!", "😀"])
def test_a_long_run_of_the_same_character_is_encoded(tokenizers, character):
    """So many that work for every pair of them would take for ever."""
    for name in TOKENIZERS:
        tokenizer = tokenizers[name][0]
        ids = tokenizer.encode(character * 200_000 + "x")
        assert tokenizer.decode([i for i in ids if i != 1000]) == character * 200_000 + "x"


def test_a_byte_without_a_token_is_left_out_or_unknown(tmp_path):
    raw = tokenizer_json(byte_level(True), None, None)
    raw["model"]["merges"], raw["model"]["vocab"] = [], {"a": 3, "b": 4}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(tmp_path).encode("a b") == [3, 4]
    raw["model"] |= {"vocab": {"a": 3, "b": 4, "u": 9}, "unk_token": "u"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(tmp_path).encode("a  b") == [3, 9, 9, 4]


def test_sentencepiece_goes_through_the_tokenizers_package_or_says_so(tmp_path):
    raw = {"version": "1.0", "added_tokens": [{"id": 4, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
                                               "normalized": False, "special": True}],
           "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},   # of its training
           "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                       "pad_token": "<unk>"},
           "normalizer": {"type": "Prepend", "prepend": "▁"}, "pre_tokenizer": None,
           "post_processor": None, "decoder": None, "model": {
               "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
               "fuse_unk": True, "byte_fallback": True, "vocab": {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}, "merges": [["▁", "a"]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    try:
        import tokenizers
    except ImportError:
        with pytest.raises(ValueError, match="pip install tokenizers"):
            load_tokenizer(tmp_path)
    else:
        foreign, plain = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_str(json.dumps(raw | {"truncation": None, "padding": None}))
        assert foreign.encode("aaaa") == plain.encode("aaaa").ids == [3, 2, 2, 2]
        assert foreign.decode([3, 2]) == plain.decode([3, 2])
        assert foreign.encode("a<s>", special=True) == [3, 4] and 4 not in foreign.encode("a<s>")
        assert foreign.decode([3, 4]) != foreign.decode([3, 4], skip_special=True) == foreign.decode([3])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00")
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


@settings(max_examples=300)
@given(pattern=st.sampled_from([r"\d+", r"[a-c]|\d{2}", r"\d*", r"(?=[A-Z])", r"a|", r"(?<=a)", r"\s+(?!\S)"]),
       text=st.text(st.sampled_from("aAb12 \né"), max_size=12))
def test_a_split_gives_the_matches_and_what_lies_between(pattern, text):
    pieces, start = [], 0
    for match in re.finditer(pattern, text):
        pieces += [text[start:match.start()], match[0]]
        start = match.end()
    expected = [piece for piece in [*pieces, text[start:]] if piece]
    assert splitter(pattern)(text) == expected and "".join(expected) == text


def test_words_that_are_tokens_stay_whole_only_where_the_file_says_so(tmp_path):
    raw = tokenizer_json(byte_level(True), None, None, shuffle=5)
    raw["model"]["vocab"] |= {"Ġzqz": 900, "Ġkatë": 901}   # no merge leads to them; the second is spelled in bytes: " kat" and EB
    apart = [raw["model"]["vocab"][p] for word in (" zqz", " kat\xeb") for p in plain_bpe(word, raw["model"]["merges"])]
    merged = len(plain_bpe(" zqz", raw["model"]["merges"]))
    for ignore_merges, expected in ((False, apart), (True, [900, *apart[merged:]])):
        raw["model"]["ignore_merges"] = ignore_merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        assert load_tokenizer(tmp_path).encode(" zqz kat\xeb") == expected


@pytest.mark.parametrize("change, words", [
    ({"model": {"dropout": 0.1}}, "dropout"), ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
    ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"), ({"model": {"byte_fallback": True}}, "SentencePiece-style"),
    ({"model": {"type": "Unigram"}}, "Unigram"), ({"model": {"vocab": {"u": 0}, "merges": [], "unk_token": "u", "fuse_unk": True}}, "fuse_unk"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}}, "NFKC"),
    ({"pre_tokenizer": None}, "nothing"), ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, byte_level(True)]}}, "Punctuation"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed"}, byte_level(True)]}}, "Split"),
    ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing")])
def test_what_is_not_byte_level_is_left_to_the_tokenizers_package_with_its_reason(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(tokenizer_file, "from_foreign_json", lambda path, reason: (path, reason))
    raw = tokenizer_json(byte_level(True), None, None)
    raw |= change | {"model": raw["model"] | change.get("model", {})}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    path, reason = load_tokenizer(tmp_path)
    assert path == tmp_path / "tokenizer.json" and words in reason


# ---------------------------------------------------------------------------------------------
# Added tokens: against a plain reading of what their flags say

WHITE = " \t\n\x0b\x0c\r\x85\xa0\u2003\u3000"
CONTENTS = ["<x>", "<x>y", "<<x>", "ab", "abc", "\n", "  ", "e\u0301", "\xe9f", "\ufb01n"]
FLAG_NAMES = "special", "lstrip", "rstrip", "single_word", "normalized"
FLAGS = st.fixed_dictionaries({flag: st.booleans() for flag in FLAG_NAMES})
ADDITIONS = st.dictionaries(st.sampled_from(CONTENTS), FLAGS, max_size=5).map(
    lambda chosen: [{"id": 1000 + i, "content": content, **flags} for i, (content, flags) in enumerate(chosen.items())])
NEAR = st.lists(st.sampled_from([*CONTENTS, *CONTENTS, *WHITE, "\x1c", "x", "y", "_", ".", "1", "\xb2", "\u0301", "\u200d"]),
                max_size=14).map("".join)


def in_word(character):
    return unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc") or character == "\u200d"


def plain_added(text, added, special):
    """[text, id, text, ..., id, text], from the left, the longest token at each place."""
    parts, i, begin = [], 0, 0
    while i < len(text):
        here = [a for a in added if text[i:i + len(a["content"])] == a["content"]]
        if not here:
            i += 1
            continue
        token = max(here, key=lambda a: len(a["content"]))
        start, i = i, i + len(token["content"])
        inside = any(map(in_word, text[start - 1:start] if start else "")) or any(map(in_word, text[i:i + 1]))
        if not (token["special"] and not special or token["single_word"] and inside):
            left, right = text[begin:start], text[i:]
            parts += [left.rstrip(WHITE) if token["lstrip"] else left, token["id"]]
            begin = i + (len(right) - len(right.lstrip(WHITE)) if token["rstrip"] else 0)
    return [*parts, text[begin:]]


def plain_ids(raw, text, special):
    """First the tokens that stand in the text as it is, then, in its normal form, the others, then words and merges."""
    def normal(text):
        return unicodedata.normalize(raw["normalizer"]["type"], text) if raw["normalizer"] else text
    as_it_is = [a for a in raw["added_tokens"] if not a["normalized"]]
    in_normal_form = [a | {"content": normal(a["content"])} for a in raw["added_tokens"] if a["normalized"]]
    ids = []
    for part in plain_added(text, as_it_is, special):
        for piece in [part] if isinstance(part, int) else plain_added(normal(part), in_normal_form, special):
            ids += [piece] if isinstance(piece, int) else [
                raw["model"]["vocab"][token] for word in words_of_gpt2(piece) for token in plain_bpe(word, raw["model"]["merges"])]
    return ids


def with_added(folder, added, form):
    raw = tokenizer_json(byte_level(True), {"type": form} if form else None, None)
    top = len(raw["model"]["vocab"])   # where the package expects them
    raw["added_tokens"] = [a | {"id": a["id"] - 1000 + top} for a in added]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer, raw


@settings(max_examples=600)
@given(added=ADDITIONS, form=st.sampled_from([None, "NFC", "NFD", "NFKC"]), text=NEAR, special=st.booleans())
@example(added=[{"id": 1000 + i, "content": content, **dict.fromkeys(FLAG_NAMES, False), "normalized": True}
                for i, content in enumerate(["e\u0301", "\xe9f"])], form="NFC", text="\xe9f", special=False)   # longest in normal form
def test_added_tokens_are_found_as_their_flags_say(tmp_path, added, form, text, special):
    tokenizer, raw = with_added(tmp_path, added, form)
    assert tokenizer.encode(text, special) == plain_ids(raw, text, special)


@settings(max_examples=300)
@given(added=ADDITIONS, form=st.sampled_from([None, "NFC", "NFD", "NFKC"]), text=NEAR, special=st.booleans())
def test_added_tokens_are_found_as_the_tokenizers_package_finds_them(tmp_path, added, form, text, special):
    package = pytest.importorskip("tokenizers")
    for token in added:   # white space with lstrip, swallowed by a token with rstrip before it, is lost there: leave it out
        token["lstrip"] &= not token["content"].isspace()
    tokenizer, raw = with_added(tmp_path, added, form)
    theirs = package.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = not special
    assert tokenizer.encode(text, special) == theirs.encode(text).ids


@pytest.mark.parametrize("text, flags, expected", [
    ("a \n<x> b", [], ["a \n", "<x>", " b"]), ("a \n<x> b", ["lstrip"], ["a", "<x>", " b"]),
    ("a \n<x> b", ["rstrip"], ["a \n", "<x>", "b"]), ("a \n<x> b", ["lstrip", "rstrip"], ["a", "<x>", "b"]),
    ("a   <x>", ["lstrip"], ["a", "  ", "<x>"]), ("<x>  b", ["rstrip"], ["<x>", "  ", "b"]),
    ("<x>   b", ["rstrip"], ["<x>", "  ", " b"]), ("<x> <x>", ["lstrip", "rstrip"], ["<x>", "<x>"])])
def test_white_space_beside_an_added_token_is_part_of_it_unless_it_is_an_added_token_itself(tmp_path, text, flags, expected):
    none = dict.fromkeys(FLAG_NAMES, False)
    tokenizer, raw = with_added(tmp_path, [{"id": 1000, "content": "<x>", **none, **dict.fromkeys(flags, True)},
                                           {"id": 1001, "content": "  ", **none}], None)
    ids = {a["content"]: a["id"] for a in raw["added_tokens"]}
    assert tokenizer.encode(text) == [i for piece in expected for i in ([ids[piece]] if piece in ids else plain_ids(raw, piece, False))]


# ---------------------------------------------------------------------------------------------
# Streams: joined, the pieces are the text, and nothing waits that could be shown

@settings(max_examples=100)
@given(text=WILD)
def test_streamed_characters_are_never_cut(tokenizers, text):
    tokenizer = tokenizers["qwen"][0]
    ids = tokenizer.encode(text)
    decode = tokenizer.decoder([])
    pieces = [decode(i, n == len(ids) - 1) for n, i in enumerate(ids)]
    assert "".join(pieces) == tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


# All that a character's bytes can begin with (Python counts the surrogates to them, which it refuses at their third byte),
# and what is no text: torn, overlong, surrogates, beyond Unicode, bytes out of place.
CODES = [chr(i).encode("utf-8", "surrogatepass") for i in range(0x80, 0x110000, 64)]   # 64 differ in the last byte alone
BEGINNINGS = {code[:n] for code in CODES for n in range(1, len(code))}
NO_TEXT = [b"\xc3", b"\xe5\xad", b"\xe5", b"\xf0\x9f\x98", b"\xf0\x9f", b"\xf0", b"\x80", b"\xbf", b"\xa9", b"\xc0\x80", b"\xc1\xbf",
           b"\xe0\x80\x80", b"\xe0\x9f", b"\xf0\x80\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf5", b"\xfe", b"\xff"]
ANY_BYTES = st.lists(st.sampled_from([*NO_TEXT, *(c.encode() for c in "aa \né字😀\ufffd")]), max_size=8).map(b"".join)


@settings(max_examples=400)
@given(tokens=st.lists(st.one_of(ANY_BYTES, st.integers(0, 10 ** 6), st.just("<|bos|>")), max_size=6))
@example(tokens=[b"\xc3aa"])
@example(tokens=[b"\xc3", "<|bos|>"])
@example(tokens=[b"\xf0\x9f", "<|bos|>", b"\x98\x80"])
def test_streamed_bytes_are_shown_as_soon_as_they_are_certain(tokenizers, tokens):
    """Bytes one token each, learned tokens (which are torn characters often enough), and a control token, which is no text."""
    tokenizer, raw, _ = tokenizers["gpt2"]
    vocab, alphabet = raw["model"]["vocab"], byte_alphabet()
    spelled = {character: b for b, character in alphabet.items()}
    flat = []   # (id, its bytes)
    for token in tokens:
        if isinstance(token, bytes):
            flat += [(vocab[alphabet[b]], bytes([b])) for b in token]
        elif isinstance(token, int):
            word = sorted(vocab)[token % len(vocab)]
            flat.append((vocab[word], bytes(spelled[c] for c in word)))
        else:
            flat.append((1000, b""))
    push, shown, data = tokenizer.decoder([5]), "", b""
    for n, (i, more) in enumerate(flat):
        last, data = n == len(flat) - 1, data + more
        shown += push(i, last)
        waiting = next((data[-k:] for k in (3, 2, 1) if data[-k:] in BEGINNINGS and len(data) >= k), b"") if not last else b""
        assert shown == data[:len(data) - len(waiting)].decode("utf-8", "replace")
    assert shown == data.decode("utf-8", "replace") == tokenizer.decode([i for i, _ in flat], skip_special=True)


# SentencePiece's custom: "▁" is a space, and a text's first space is not said. Other characters may be bytes.
SPECIAL, PIECES = 0, ["<s>", "▁", "▁▁", "▁cat", "cat", "a", "▁a", "\ufffd", *(bytes([b]) for b in range(256))]
BYTE_IDS = {piece[0]: i for i, piece in enumerate(PIECES) if isinstance(piece, bytes)}


class StandIn:
    """What the decoder of the tokenizers package does for such a file: replace, bytes, fuse, strip."""
    def __init__(self, strips):
        self.strips = strips

    def decode(self, ids, skip_special_tokens):
        text = ""
        for kind, run in groupby((PIECES[i] for i in ids if i != SPECIAL or not skip_special_tokens), type):
            run = list(run)
            try:
                text += b"".join(run).decode() if kind is bytes else "".join(run).replace("▁", " ")
            except UnicodeDecodeError:   # all of them, however many are in order
                text += "\ufffd" * len(run)
        return text.removeprefix(" ") if self.strips else text


def inner_of_the_package(decoder):
    package = pytest.importorskip("tokenizers")
    vocab = {f"<0x{piece[0]:02X}>" if isinstance(piece, bytes) else piece: i for i, piece in enumerate(PIECES)}
    inner = package.Tokenizer(package.models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    inner.add_special_tokens(["<s>"])
    d = package.decoders
    inner.decoder = {"strip": d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]),
                     "metaspace": d.Sequence([d.ByteFallback(), d.Metaspace()])}[decoder]
    return inner


INNERS = {"loses a space": lambda: StandIn(True), "keeps it": lambda: StandIn(False),
          "package, strip": lambda: inner_of_the_package("strip"), "package, metaspace": lambda: inner_of_the_package("metaspace")}


def spell(character):
    return [BYTE_IDS[b] for b in character.encode()]


WHOLE = st.one_of(st.sampled_from([[i] for i in range(7)]), st.sampled_from([spell(c) for c in "\né字😀😀"]))   # ids of what is whole


def flatten(groups):
    return [i for group in groups for i in group]


@pytest.mark.parametrize("inner", INNERS)
@settings(max_examples=300)
@given(groups=st.lists(WHOLE, min_size=1, max_size=9), data=st.data())
def test_streamed_text_after_a_prompt_is_the_rest_of_the_whole(inner, groups, data):
    """Wherever the cut between prompt and answer is, inside a character too: that character belongs to the answer."""
    foreign, ids = ForeignTokenizer(INNERS[inner]()), flatten(groups)
    cut = data.draw(st.integers(0, len(ids) - 1))

    def text_until(n):   # of the groups that are whole after n tokens
        return foreign.decode(flatten(g for k, g in enumerate(groups) if len(flatten(groups[:k + 1])) <= n), True)
    push, shown = foreign.decoder(ids[:cut]), text_until(cut)
    for n in range(cut, len(ids)):
        shown += push(ids[n], n == len(ids) - 1)
        assert shown == text_until(n + 1), "neither more nor less than the characters that are whole"
    assert shown == foreign.decode(ids, True)


@pytest.mark.parametrize("inner", INNERS)
@settings(max_examples=200)
@given(groups=st.lists(WHOLE, max_size=6), torn=st.sampled_from([spell(c)[:n] for c in "é字😀" for n in range(1, len(c.encode()))]),
       more=st.lists(st.sampled_from([[2], [3], [4], [5], [6]]), max_size=3), data=st.data())
def test_a_torn_character_in_a_stream_harms_no_other(inner, groups, torn, more, data):
    """At the end of a text, or before more of it: U+FFFD for each byte, and what was said before stays said."""
    foreign, ids = ForeignTokenizer(INNERS[inner]()), flatten(groups)
    cut = data.draw(st.sampled_from([len(flatten(groups[:k])) for k in range(len(groups) + 1)]))
    push, answer = foreign.decoder(ids[:cut]), ids[cut:] + torn + flatten(more)
    pieces = [push(i, n == len(answer) - 1) for n, i in enumerate(answer)]
    before, after = foreign.decode(ids, True), foreign.decode([5, *flatten(more)], True)[1:]   # 5: "a", so that no space is lost
    assert "".join(pieces) == before[len(foreign.decode(ids[:cut], True)):] + "\ufffd" * len(torn) + after


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("end", [[PIECES.index("\ufffd")], spell("\ufffd"), spell("字")[:2], [BYTE_IDS[0x80]] * 5])
def test_what_is_no_text_at_a_prompts_end_is_not_said_again(inner, end):
    foreign = ForeignTokenizer(INNERS[inner]())
    push = foreign.decoder([6, *end])
    assert [push(i, False) for i in (6, 4, 7, 6)] == [" a", "cat", "", "\ufffd a"]


def test_a_stream_may_hold_u_fffd_itself():
    foreign, ids = ForeignTokenizer(StandIn(True)), [6, 7, 6, *spell("\ufffd"), 6, 7]
    push = foreign.decoder([6])
    assert "".join(push(i, n == len(ids) - 1) for n, i in enumerate(ids)) == " a\ufffd a\ufffd a\ufffd"


def test_worked_example_of_the_tokenizer_is_true():
    raw = json.loads((HERE / "demo/llama/tokenizer.json").read_text("utf-8"))
    merges, vocab = [m.split(" ") for m in raw["model"]["merges"]], raw["model"]["vocab"]
    assert list(vocab.values())[:256] == list(range(256)) and [vocab["".join(m)] for m in merges] == list(range(256, 256 + len(merges)))
    spelled = {character: b for b, character in byte_alphabet().items()}

    def say(token):   # a byte by its number alone
        return str(vocab[token]) if len(token) == 1 else f'{vocab[token]} "{bytes(spelled[c] for c in token).decode()}"'
    columns = [[f'"{word}"', *(" ".join(map(say, parts)) for parts in merging(word, merges))] for word in words_of_gpt2("The cat sat")]
    lines = [re.split(r"\s{2,}", line.strip()) for line in tokenizer_file.__doc__.split("\n") if line.startswith("    ")]
    assert [line[0] for line in lines[:3]] == ["words", "bytes", "merged"]
    assert [line[n < 3:] for n, line in enumerate(lines)] == [
        [column[n] for column in columns if n < len(column)] for n in range(max(map(len, columns)))]
    assert load_tokenizer(HERE / "demo/llama").encode("The cat sat") == [269, 341, 479]
