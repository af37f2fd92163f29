"""How we know that the command line, the models that come with the repository and the words are right."""

import ast
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import batch
import bench
import cli
import kernels
import model
import nanoserve
import paged_kv
from nanoserve import LLM, SamplingParams
from reference import CONFIGS, NEW, plain, tensors_of, write_checkpoint
from sampling import noise_key, sample
from test_tokenizer import SAMPLE
from tokenizer import load_tokenizer
from watch import Timeline

HERE = Path(__file__).parent


# ---------------------------------------------------------------------------------------------
# The command line, as a process, on the model that comes with the repository

def run(*arguments, stdin=b"", **more):
    done = subprocess.run([sys.executable, str(HERE / "nanoserve.py"), *arguments], input=stdin, capture_output=True,
                          timeout=300, env=os.environ | {"PYTHONIOENCODING": "ascii"}, **more)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def exit_code(main, arguments):
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def test_the_readme_command_writes_a_story(tmp_path):
    code, out, err = run("--prompt", "The cat sat", cwd=tmp_path)
    said = re.fullmatch(
        r"prefill: \d+ tokens, .*TTFT.*decode: \d+ tokens .*TPS.*KV: \d+ blocks of \d+ tokens\n(b?float\d\d): .*\n", err)
    assert code == 0 and said, err
    words = out.split()
    assert 40 <= len(words) <= 500 and len(set(words)) > 30 and out.rstrip()[-1] in '.!"?'
    llm = LLM(HERE / "demo/llama", dtype=said[1])   # on a busy machine another type may win
    assert out == llm.generate(["The cat sat"], SamplingParams(max_tokens=512))[0].text + "\n"


def stdin_of(data: bytes):
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def test_several_prompts_run_as_one_batch_and_print_in_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts").write_text("Once upon a time\n\nOne day, 😀\n", "utf-8")
    arguments = ["--dtype", "float32", "--max-tokens", "8", "--prompts-file", str(tmp_path / "prompts"), "--prompt", "The dog", "--prompt", "-"]
    code, out, err = run(*arguments, "--json", stdin="Lily\n".encode())
    objects = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [o["prompt"] for o in objects] == ["The dog", "Lily", "Once upon a time", "One day, 😀"]
    llm = LLM(HERE / "demo/llama", dtype="float32")
    for o in objects:
        (alone,) = llm.generate([o["prompt"]], SamplingParams(max_tokens=8))
        assert (o["text"], o["token_ids"], o["finish_reason"]) == (alone.text, alone.token_ids, alone.finish_reason)
        assert o["ttft"] > 0 and o["tps"] > 0 and o["prompt_tokens"] == len(llm.tokenizer.encode(o["prompt"]))
    monkeypatch.setattr(sys, "stdin", stdin_of(b"Lily\n"))
    assert cli.main(arguments) == 0
    text, err = capsys.readouterr()
    assert text == "".join(o["text"] + "\n" for o in objects) and err.count("TTFT") == 4


def test_in_a_batch_only_the_prompt_at_fault_ends():
    code, out, err = run("--prompt", "The dog", "--prompt", "", "--prompt", "The cat " * 900, "--prompt", b"\xff\xfe",
                         "--prompt", "The hen", "--max-tokens", "5")
    assert code == 2 and len(out.splitlines()) == 2 and "Traceback" not in err
    assert [line for line in err.splitlines() if "TTFT" not in line and "float" not in line] == [
        "nanoserve.py: prompt 2: the prompt is empty: give at least one character",
        next(line for line in err.splitlines() if "prompt 3: the prompt has" in line and "context holds 1024" in line),
        "nanoserve.py: prompt 4: the prompt is not valid UTF-8: re-encode it as UTF-8"]


@pytest.mark.parametrize("arguments, words", [
    ([], "there is no prompt"), (["--prompt", ""], "empty"), (["--prompt", "x", "--max-tokens", "0"], "max_tokens"),
    (["--prompt", "x", "--max-tokens", "-5"], "max_tokens"), (["--prompt", "x", "--max-tokens", "many"], "--max-tokens"),
    (["--prompt", "x", "--temperature", "-1"], "temperature"), (["--prompt", "x", "--temperature", "nan"], "temperature"),
    (["--prompt", "x", "--top-p", "0"], "top_p"), (["--prompt", "x", "--top-p", "1.5"], "top_p"), (["--prompt", "x", "--top-k", "-1"], "top_k"),
    (["--prompt", "x", "--stop", ""], "stop is"), (["--prompt", "x", "--device", "abacus"], "abacus"),
    pytest.param(["--prompt", "x", "--device", "cuda"], "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (["--prompt", "x", "--device", "cuda:99"], "cuda:99"), (["--prompt", "x", "--dtype", "int8"], "int8"),
    (["--prompt", "x", "--quantization", "int4"], "quantization 'int4' is not supported: use int8 or fp8"),
    (["--prompt", "x", "--kv-cache-dtype", "fp4"], "kv_cache_dtype 'fp4' is not supported: use auto or int8"),
    (["--prompt", "x", "--attention", "magic"], "magic"), (["--prompt", "x", "--model", "/nowhere"], "/nowhere"),
    (["--prompt", "x", "--block-size", "0"], "block_size"), (["--prompt", "x", "--num-blocks", "-1"], "num_blocks"),
    (["--prompt", "x", "--num-blocks", "999999999999"], "blocks"), (["--prompt", "x", "--max-seqs", "0"], "max_seqs"),
    (["--prompt", "x", "--max-batched-tokens", "0"], "max_batched_tokens"), (["--prompt", "x " * 40, "--num-blocks", "1"], "KV pool"),
    (["--prompt", "x", "--speculative-model", "/nowhere"], "speculative_model '/nowhere' does not exist: use ngram, or the folder of"),
    (["--prompt", "x", "--speculative-model", "bigram"], "speculative_model 'bigram' does not exist: use ngram"),
    (["--prompt", "x", "--speculative-model", str(HERE / "docs")], "config.json"),
    (["--prompt", "x", "--speculative-model", "ngram", "--num-speculative-tokens", "0"], "num_speculative_tokens is 0: it must be"),
    (["--prompt", "x", "--speculative-model", "ngram", "--num-speculative-tokens", "few"], "--num-speculative-tokens"),
    (["--prompt", "x", "--disaggregate", "1"], "--disaggregate 1: give processes for prompts and for decodes, as in 1:1"),
    (["--prompt", "x", "--disaggregate", "0:1"], "as in 1:1"), (["--prompt", "x", "--disaggregate", "1:1", "--explain"], "leave --disaggregate out"),
    (["--prompt", "x", "--disaggregate", "1:1", "--model", "/nowhere"], "/nowhere"),
    (["--prompt", "x", "--disaggregate", "1:1", "--num-blocks", "0"], "num_blocks is 0"),
    (["--prompts-file", "/nowhere/prompts"], "/nowhere/prompts"), (["--prompt", "x", "--prompts-file", "/"], "/"), (["--pompt", "x"], "--pompt"),
])
def test_bad_input_ends_in_one_sentence_and_a_non_zero_exit(capfd, arguments, words):
    code = exit_code(cli.main, arguments)
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize("change, words", [
    (dict(vocab_size=61), "61 tokens and the model's has 1024"), (dict(vocab_size=1024), "other words than the model's")])
def test_a_draft_model_with_another_vocabulary_is_refused_in_one_sentence(tmp_path, capfd, change, words):
    config = CONFIGS["llama"] | change
    write_checkpoint(tmp_path, config, tensors_of(config))
    saved = json.loads((HERE / "demo/llama/tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert cli.main(["--prompt", "x", "--speculative-model", str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err == (f"nanoserve.py: speculative_model {tmp_path}: its vocabulary has {words}: "
                                 "take a draft model with the same vocabulary\n")


@pytest.mark.parametrize("who", ["ngram", str(HERE / "demo/gpt2")])
def test_with_drafts_the_text_is_the_same_and_the_line_after_it_counts_them(capsys, monkeypatch, who):
    monkeypatch.setattr("speculate.Speculator.worthwhile", lambda self, requests, offers, rows: list(offers))
    prompts = ["--dtype", "float32", "--prompt", "The cat sat", "--prompt", "One day, Tom", "--max-tokens", "90", "--device", "cpu"]
    assert cli.main(prompts) == 0
    text, err = capsys.readouterr()
    assert "drafts" not in err and "guessed" not in err
    options = ["--speculative-model", who, "--num-speculative-tokens", "3"]
    assert cli.main([*prompts, *options]) == 0
    drafted, err = capsys.readouterr()
    assert drafted == text
    lines = re.findall(r"^prefill: .* \| KV: \d+ blocks of 16 tokens \| drafts: (\d+) guessed, (\d+) accepted$", err, re.M)
    assert cli.main([*prompts[:4], *options, "--max-tokens", "1"]) == 0
    assert "| drafts: 0 guessed, 0 accepted\n" in capsys.readouterr().err
    assert cli.main([*prompts, *options, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [(str(r["drafted_tokens"]), str(r["accepted_tokens"])) for r in records]
    assert all(0 < r["accepted_tokens"] < r["drafted_tokens"] for r in records)
    # Every token of a prompt, of an answer but its last, and every refused draft was run once.
    assert all(r["computed_tokens"] == r["prompt_tokens"] + len(r["token_ids"]) - 1 + r["drafted_tokens"] - r["accepted_tokens"]
               for r in records)


def test_bad_input_ends_a_process_without_a_traceback():
    code, out, err = run("--prompt", "-", stdin=b"a\xff")
    assert code == 2 and out == "" and err.count("\n") == 1, err


def test_a_prompt_may_come_from_a_stream_that_is_empty(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", stdin_of(b""))
    assert cli.main(["--prompt", "-"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "empty" in err, err


def test_want_of_memory_is_said_in_one_sentence_and_a_fault_of_ours_is_not_hidden(monkeypatch, capsys):
    def serve(args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nMore advice")
    monkeypatch.setattr(cli, "serve", serve)
    assert cli.main(["--prompt", "x"]) == 2
    assert capsys.readouterr().err == ("nanoserve.py: out of memory (CUDA out of memory. Tried to allocate 2 GiB.): "
                                       "take a smaller model, dtype or number of tokens\n")
    monkeypatch.setattr(cli, "serve", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["--prompt", "x"])


def test_a_file_that_may_not_be_read_is_named(monkeypatch, capfd):
    def denied(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "read_text", denied)
    assert cli.main(["--prompt", "x"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "config.json cannot be opened (Permission denied)" in err and err.count("\n") == 1


def test_ctrl_c_ends_cleanly():
    process = subprocess.Popen([sys.executable, str(HERE / "nanoserve.py"), "--prompt", "The cat sat", "--ignore-eos", "--max-tokens", "900"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.decode().strip() == "nanoserve.py: interrupted"


def test_closed_pipe_is_said_in_one_sentence():
    process = subprocess.Popen([sys.executable, str(HERE / "nanoserve.py"), "--prompt", "The cat sat", "--ignore-eos", "--max-tokens", "900"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(20)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 1 and err.count("\n") == 1 and "closed" in err


def test_closed_and_full_standard_streams_are_no_traceback():
    command = f"{sys.executable} {HERE / 'nanoserve.py'} --prompt - --max-tokens 3"
    for streams, code, words in [(">&-", 1, "closed"), (">/dev/full", 1, "could not be written"), ("<&-", 2, "empty"), ("2>/dev/full", 0, "")]:
        if "full" in streams and not Path("/dev/full").exists():
            continue
        done = subprocess.run(["bash", "-c", f"{'echo The cat |' * (streams != '<&-')} {command} {streams}"], capture_output=True, text=True)
        assert done.returncode == code and words in done.stderr and done.stderr.count("\n") <= 1, done.stderr


def test_everything_but_triton_works_where_there_is_no_triton(lone):
    folder, prompts, expected = lone["llama"]
    code = f"""
import sys; sys.modules["triton"] = None   # as if it were not installed
from nanoserve import LLM, SamplingParams
print(LLM({str(folder)!r}, device="cpu").generate([{prompts[1]}], SamplingParams(max_tokens={NEW}))[0].token_ids)
try:
    LLM({str(folder)!r}, device="cpu", attention="triton")
except ValueError as error:
    print(error)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    tokens, error = done.stdout.splitlines()
    assert json.loads(tokens) == expected[1] and "needs the triton package" in error


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    text = capsys.readouterr().out
    for option in ("prompt", "prompts-file", "model", "max-tokens", "temperature", "top-k", "top-p", "seed", "stop", "ignore-eos", "device",
                   "dtype", "attention", "speculative-model", "num-speculative-tokens", "block-size", "num-blocks", "max-batched-tokens", "max-seqs", "json"):
        assert f"--{option} " in text
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 100


# ---------------------------------------------------------------------------------------------
# The model that comes with the repository

@pytest.mark.parametrize("name", ["llama", "gpt2", "draft"])
def test_demo_logits_equal_the_plain_forward(name):
    folder = HERE / "demo" / name
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    llm = LLM(folder, dtype="float32")
    ids = llm.tokenizer.encode('Once upon a time there was a girl named Lily. "Where is my ball?" asked Lily.')
    expected = plain(config, tensors, ids)
    assert (llm.logits(ids).cpu() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_demo_checkpoints_share_a_tokenizer_and_fit_their_size():
    a, *others = (load_tokenizer(HERE / "demo" / name) for name in ("llama", "gpt2", "draft"))
    for text in (SAMPLE, "The cat sat. <|endoftext|>"):
        assert all(a.encode(text) == b.encode(text) for b in others) and a.decode(a.encode(text)) == text
    for name, most in (("llama", 8_000_000), ("gpt2", 8_000_000), ("draft", 1_000_000)):
        files = list((HERE / "demo" / name).iterdir())
        assert sum(f.stat().st_size for f in files) <= most
        with safe_open(HERE / "demo" / name / "model.safetensors", framework="pt") as weights:
            assert list(weights.keys())


@pytest.mark.parametrize("name", ["llama", "gpt2", "draft"])
def test_demo_stories_end_by_themselves(name):
    llm = LLM(HERE / "demo" / name, dtype="float32")
    outs = llm.generate(["The cat sat", "Once upon a time", "One day, Tom"], SamplingParams(max_tokens=900))
    assert [out.finish_reason for out in outs] == ["stop"] * 3
    assert "".join(llm.stream("The cat sat", SamplingParams(max_tokens=900))) == outs[0].text


def test_the_demo_draft_knows_what_the_model_will_say():
    """On a story of the model's own, at temperature 0.8: what it would take in each place, with the noise of that place."""
    llm, draft = (LLM(HERE / "demo" / name, dtype="float32") for name in ("llama", "draft"))
    (story,) = llm.generate(["Once upon a time"], SamplingParams(max_tokens=300, temperature=0.8, seed=5))
    prompt = llm.tokenizer.encode("Once upon a time")
    logits = draft.logits(prompt + story.token_ids)[len(prompt) - 1:-1].cpu()
    places = range(len(prompt), len(prompt) + len(logits))
    drafts = sample(logits, [SamplingParams(temperature=0.8)] * len(logits), [noise_key(5)] * len(logits), list(places))
    right = sum(a == b for a, b in zip(drafts, story.token_ids))
    assert len(logits) > 60 and right > 0.9 * len(logits)


# ---------------------------------------------------------------------------------------------
# What the words say

def blocks_of_code(text):
    """The indented and the fenced blocks of a Markdown text, with the language of the fenced ones."""
    for language, fenced, indented in re.findall(r"^```(\w*)\n(.*?)^```$|((?:^ {4}[^\n]*\n|^\n(?= {4}))+)", text, re.M | re.S):
        yield language, fenced or "\n".join(line[4:] for line in indented.strip("\n").split("\n"))


def test_readme_shows_what_its_commands_print(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("roofline.clock", lambda call, device: 1.0)   # what --explain says of the machine is not compared
    found = list(blocks_of_code((HERE / "README.md").read_text()))
    shown = 0
    for (_, command), (_, expected) in zip(found, found[1:]):
        if command.startswith("python nanoserve.py") and "~" not in command:
            arguments = ["--device", "cpu", "--dtype", "float32", *shlex.split(command)[2:]]   # as it was recorded
            assert cli.main(arguments) == 0
            printed = capsys.readouterr().out
            printed = printed[printed.index("\nstep ") + 1:] if "--timeline" in command else printed

            def plain(text):
                return re.sub(r"machine's [\d,]+: (\w+)-bound, [\d.]+ ms", "machine's", text).split()
            assert plain(printed) == plain(expected), command
            shown += 1
            if "--timeline" in command:
                assert cli.main([*arguments, str(tmp_path / "chart.svg")]) == 0
                assert (tmp_path / "chart.svg").read_text("utf-8") == (HERE / "docs/timeline.svg").read_text("utf-8")
                capsys.readouterr()
    assert shown == 3
    for language, code in found:
        if language == "python":
            exec(code, {})
            assert capsys.readouterr().out.strip()
    mentioned = set(re.findall(r"`python bench.py ?(\w*)", (HERE / "README.md").read_text()))
    assert mentioned == {"", *bench.COMMANDS} - {"phases"}


def test_readme_names_files_and_functions_that_exist():
    text = (HERE / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"`(\w+\.py|demo/|docs/\S+)`", text):
        assert (HERE / path).exists(), path
    everything = "\n".join(path.read_text() for path in HERE.glob("*.py"))
    for name in re.findall(r"`(?:LLM|Scheduler|KVPool|Model)\.(\w+)`", text) + ["sample", "_sweep", "share_out", "race", "exponentials", "rope_frequencies", "_bias"]:
        assert re.search(rf"(def|class) {name}\b", everything), name
    for name in set(re.findall(r"(--[a-z][a-z-]+)", text)) - {"--min-p", *re.findall(r"--\S+", re.search("torchrun .*", text)[0])}:   # the reader's, torchrun's
        assert f'"{name}"' in everything, name


def test_worked_example_in_the_docstrings_is_true():
    llm = LLM(HERE / "demo/llama", dtype="float32", block_size=2, device="cpu")
    requests, tables = [llm.requests[llm.add(prompt, SamplingParams(max_tokens=3))] for prompt in ("The cat sat", "The dog")], []
    llm.watchers.append(lambda *seen: tables.append([list(r.table.blocks) for r in requests]))
    while llm.requests:
        llm.step()
    words = [[f'{i} "{llm.tokenizer.decode([i])}"' for i in r.tokens[:-1]] for r in requests]
    assert tables == [[[0, 1], [3]], [[0, 1], [3, 4]], [[0, 1, 2], [3, 4]]]
    squeezed = " ".join(paged_kv.__doc__.split())
    assert f'request 0 {" ".join(words[0][:2])} | {" ".join(words[0][2:4])} | {words[0][4]} S = 2 its table 0 | 1 | 2 ' in squeezed
    assert f'request 1 {" ".join(words[1][:2])} | {" ".join(words[1][2:])} its table 3 | 4 token 2 -> block 4, slot 4 * 2 + 0 = 8' in squeezed
    picture = (HERE / "docs/step.svg").read_text()
    assert all(f">{i}</text>" in picture for r in requests for i in r.tokens[:-1]) and "slot 4 x 2 + 0 = 8" in picture
    assert requests[1].tokens[2] == 479 and "Chunk([479], start=2, blocks=[3, 4])" in kernels.__doc__
    step = batch.make_batch([batch.Chunk([479], 2, [3, 4]), batch.Chunk([269, 341, 479], 0, [0, 1])], 2)
    for name in ("tokens_T", "positions_T", "slots_T", "query_starts", "kv_lens", "logit_rows"):
        (line,) = [line for line in batch.__doc__.split("\n") if line.startswith(f"    {name} ")]
        numbers = " ".join(str(number) for number in getattr(step, name).tolist())
        assert " ".join(line.split()).startswith(f"{name} {numbers} "), line

    c, (token,) = llm.config, requests[0].tokens[3:4]
    assert f"(E = {c.E}, H = {c.H}, K = {c.K}, D = {c.D}, I = {c.I}, V = {c.V})" in model.__doc__
    assert f'tokens_T {requests[0].tokens[:3]}    x_TE [3, {c.E}]    {c.L} layers' in model.__doc__
    assert f'logits [1, {c.V}]    {token} "{llm.tokenizer.decode([token])}"' in model.__doc__
    command = re.search(r"`(python nanoserve.py --prompt.*?)`", " ".join(nanoserve.Scheduler.__doc__.split()))[1]
    prompts = [word for flag, word in zip(shlex.split(command), shlex.split(command)[1:]) if flag == "--prompt"]
    llm = LLM(HERE / "demo/llama", dtype="float32", max_batched_tokens=6, device="cpu")
    timeline = Timeline(llm)
    llm.generate(prompts, SamplingParams(max_tokens=4))
    for line in timeline.text(100).split("\n")[:5]:
        assert line in nanoserve.Scheduler.__doc__


# ---------------------------------------------------------------------------------------------
# The house: one trade per room, and imports that point one way

ENGINE = "paged_kv", "batch", "kernels", "model", "nanoserve"
ROOMS = ("device", "linear", "sampling", "config", "experts", "checkpoint", "tokenizer",   # each imports only those before it
         "paged_kv", "batch", "kernels", "latent", "model", "speculate", "parallel", "nanoserve", "distributed",
         "roofline", "watch", "cli", "bench")


def imports_of(path):
    """Which of our files a file imports, wherever in it; but not what it runs as a program."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.dump(node.test))]
    names = set()
    for node in ast.walk(tree):
        names |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    return names & {file.stem for file in HERE.glob("*.py")}


def test_imports_point_one_way():
    seen = set()
    for room in ROOMS:
        found = imports_of(HERE / f"{room}.py")
        assert found <= seen, (room, found - seen)
        seen.add(room)
    assert seen == {file.stem for file in HERE.glob("*.py")} - {"conftest", "reference"} - {
        file.stem for file in HERE.glob("test_*.py")}, "every room has its place"
    assert not imports_of(HERE / "reference.py"), "what the tests compare with is computed another way"


def test_rooms_stay_small():
    lines = {file.stem: file.read_text().count("\n") for file in HERE.glob("*.py")}
    assert sum(lines[room] for room in ENGINE) <= 2000
    assert all(lines[room] <= 650 for room in ROOMS if room != "bench")
    for room in ROOMS:
        assert all(len(line) <= 120 for line in (HERE / f"{room}.py").read_text().split("\n")), room
