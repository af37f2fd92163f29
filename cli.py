"""The command line: prompts in, texts out, every fault in one sentence. (`python nanoserve.py` comes here.)

Texts go to standard output, each as it appears, and everything else to standard error. A first reading may skip this
file: it reads arguments and files, and says what became of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if sys.argv and Path(sys.argv[0]).name == "nanoserve.py":   # Ctrl-C during the slow imports ends the process quietly
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from distributed import Disaggregated
from nanoserve import LLM, SamplingParams
from parallel import Broken
from watch import Explanation, Timeline


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nanoserve.py", description="Continue a text with a GPT-2, Llama or related checkpoint. Several prompts "
        "run as one batch. The text goes to standard output, everything else to standard error.")
    parser.error = lambda message: parser.exit(2, f"nanoserve.py: {message}; see --help\n")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT",
        help='text to continue; repeatable; "-" reads standard input')
    add("--prompts-file", metavar="FILE", help="a prompt per line (UTF-8); empty lines are skipped")
    add = parser.add_argument_group("model").add_argument
    add("--model", default=Path(__file__).parent / "demo/llama", metavar="DIR",
        help="folder with config.json, model.safetensors and the tokenizer's files (default: demo/llama)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: a GPU if there is one)")
    add("--dtype", default="auto",
        help="auto, float32, float16 or bfloat16 (default: the checkpoint's own; on a CPU float32 if that is faster)")
    add("--quantization", metavar="TYPE", help="int8 or fp8: bring weights into 8 bits while loading (default: not)")
    add("--attention", default="auto", help="auto, torch, triton or naive (default: triton on a GPU, torch elsewhere)")
    add = parser.add_argument_group("choosing tokens").add_argument   # what is not given is as in SamplingParams
    add("--max-tokens", type=int, default=512, metavar="N", help="at most N new tokens per prompt (default: 512)")
    add("--temperature", type=float, metavar="T", help="0: the most likely token; higher: more surprise (default: 0)")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (default: all)")
    add("--top-p", type=float, metavar="P", help="sample from the fewest tokens that add up to P (default: 1)")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    add("--ignore-eos", action="store_true", help="go on to --max-tokens even if the model ends its text")
    add("--n", type=int, metavar="N", help="so many continuations of each prompt (default: 1)")
    add("--logprobs", type=int, metavar="K", help="with --json: log-probabilities of each token and of the K best")
    add = parser.add_argument_group("engine").add_argument
    add("--block-size", type=int, metavar="N", help="tokens per KV block (default: 64 on a GPU, 16 elsewhere)")
    add("--num-blocks", type=int, metavar="N",
        help="KV blocks in the pool (default: what --max-seqs needs and memory allows)")
    add("--max-batched-tokens", type=int, metavar="N",
        help="token budget of a step (default: 4096 on a GPU, 512 elsewhere)")
    add("--max-seqs", type=int, default=64, metavar="N", help="texts that may be written at once (default: 64)")
    add("--kv-cache-dtype", default="auto", metavar="TYPE",
        help="int8: K and V in a byte a number, so that more tokens fit (default: auto, as the model computes them)")
    add("--speculative-model", metavar="MODEL", help="who guesses tokens that the model then verifies in one step: "
        "ngram, or the folder of a smaller model with the same vocabulary (default: nobody)")
    add("--tensor-parallel-size", type=int, default=1, metavar="N",
        help="cut the weights for N processes, each with a GPU of its own if there are some (default: 1)")
    add("--num-speculative-tokens", type=int, default=4, metavar="N",
        help="guess at most N tokens per text and step (default: 4)")
    add("--disaggregate", metavar="P:D", help="P processes for prompts and D for decodes, 1:1 say (default: neither)")
    add("--json", action="store_true", help="print one JSON object per text instead of the text itself")
    add("--timeline", nargs="?", const="", metavar="FILE.svg",
        help="then draw who ran in which step, and the pool; to the terminal, or as a picture")
    add("--explain", action="store_true", help="then say what each step computed, where and at what cost")
    return parser.parse_args(argv)


def say(line: str, end: str = "\n"):
    """To standard error, if anybody listens."""
    with suppress(OSError):
        print(line, end=end, file=sys.stderr, flush=True)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line; those read from elsewhere lose the newline that ends them."""
    prompts = [read_text().removesuffix("\n") if prompt == "-" else prompt for prompt in args.prompt]
    if args.prompts_file:
        lines = read_text(args.prompts_file).replace("\r\n", "\n").split("\n")
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError('there is no prompt: give --prompt "The cat sat", --prompt - or --prompts-file FILE')
    return prompts


def read_text(file: str | None = None) -> str:
    """Of the file, or without one of standard input (which is None if the shell closed it)."""
    source = file or "standard input"
    try:
        data = Path(file).read_bytes() if file else sys.stdin.buffer.read() if sys.stdin else b""
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error.strerror}): give --prompts-file a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not valid UTF-8 at byte {error.start}: re-encode it as UTF-8") from None


def serve(args: argparse.Namespace) -> int:
    """Run the prompts of the command line and print their texts in order, each as it appears."""
    if args.timeline:
        if not args.timeline.endswith(".svg"):
            raise ValueError(f"--timeline {args.timeline}: the picture's name must end in .svg")
        check_writable(Path(args.timeline))
    if args.disaggregate and not re.fullmatch(r"[1-9]\d?:[1-9]\d?", args.disaggregate):
        raise ValueError(f"--disaggregate {args.disaggregate}: give processes for prompts and for decodes, as in 1:1")
    if args.disaggregate and (args.explain or args.timeline is not None):
        raise ValueError("--timeline and --explain look at the steps of one process: leave --disaggregate out")
    prompts = read_prompts(args)
    params = SamplingParams(**{name: value for name, value in vars(args).items()
                               if name in SamplingParams.__dataclass_fields__ and value is not None})
    options = {name: getattr(args, name) for name in (
        "device", "dtype", "attention", "block_size", "num_blocks", "max_batched_tokens", "max_seqs", "quantization",
        "kv_cache_dtype", "speculative_model", "num_speculative_tokens", "tensor_parallel_size")}
    if args.disaggregate:
        llm = Disaggregated(args.model, *map(int, args.disaggregate.split(":")), **options)
    else:
        llm = LLM(args.model, **options)
    if llm.device.type == "cuda":   # what is compiled, loaded and recorded once is no part of TTFT and TPS
        with suppress(ValueError):   # hardly room for a prompt
            llm.generate([[0, 0]], SamplingParams(max_tokens=2, ignore_eos=True))
        llm.next_id = 0
    watchers = [Timeline(llm, args.timeline)] if args.timeline is not None else []
    watchers += [Explanation(llm)] if args.explain else []
    outputs = llm.start(prompts, params)
    for number, (prompt, first) in enumerate(zip(prompts, outputs), 1):
        for out in first.samples:
            if sys.stdout.isatty() and not args.json and not out.error:
                say(prompt, end="")   # a terminal shows the whole text, a pipe gets only what is new
            for piece in llm.follow(out):
                print("" if args.json else piece, end="", flush=True)
            if args.json:
                record = {key: value for key, value in vars(out).items() if key != "samples"}
                print(json.dumps({"prompt": prompt} | record, ensure_ascii=False), flush=True)
            elif out.token_ids:
                print(flush=True)
            if out.error:
                say(f"nanoserve.py: prompt {number}: {out.error}")
            else:
                say(f"prefill: {out.prompt_tokens} tokens, first token after {out.ttft * 1000:.0f} ms (TTFT) | "
                    f"decode: {len(out.token_ids)} tokens at {out.tps:.0f} per second (TPS) | "
                    f"KV: {out.blocks} blocks of {llm.pool.block_size} tokens" + (
                        f" | drafts: {out.drafted_tokens} guessed, {out.accepted_tokens} accepted"
                        if llm.speculator else ""))
    if args.dtype == "auto" and any(out.token_ids for out in outputs):
        say(f"{llm.dtype}: {llm.dtype_reason}")
    for watcher in watchers:
        watcher.show(say if args.json else print)
    return 2 if any(sample.error for out in outputs for sample in out.samples) else 0


def check_writable(path: Path):
    """Now rather than after minutes of work. Raises ValueError."""
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): name another file") from None
    if new:
        path.unlink()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_status("nanoserve.py", lambda: serve(args))


def exit_status(name: str, command: Callable[[], int]) -> int:
    """What the command returns; 2 for bad input, for a file that cannot be opened and if memory runs out, 1 if standard
    output was closed or is full or a rank has ended, 130 after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.stderr or open(os.devnull, "w")   # None: the shell closed it
    if sys.stdout is None:
        say(f"{name}: standard output is closed: give the text somewhere to go")
        return 1
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return command()
    except KeyboardInterrupt:
        say(f"\n{name}: interrupted")
        return 130
    except ValueError as error:
        say(f"{name}: {error}")
        return 2
    except Broken as error:
        say(f"{name}: {error}")
        return 1
    except OSError as error:
        if error.filename:
            say(f"{name}: {error.filename} cannot be opened ({error.strerror}): give yourself the permission to")
            return 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # or Python complains again when it exits
        say(f"{name}: the text could not be written ({error.strerror}), as standard output was closed or is full: "
            "keep it open, or send it elsewhere")
        return 1
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        say(f"{name}: out of memory ({str(error).splitlines()[0]}): take a smaller model, dtype or number of tokens")
        return 2

