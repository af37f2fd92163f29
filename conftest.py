"""What all tests share: settings, options, and checkpoints with their greedy tokens."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # for the fixture `poisoned`, on a GPU
import pytest
import torch
from hypothesis import HealthCheck, settings

import speculate
from reference import CONFIGS, NEW, as_int8, as_it_is, int8, plain_greedy, tensors_of, write_checkpoint

torch.set_num_threads(1)   # the tensors are tiny, and the other core may be running another test
speculate.THINKING = float("inf")   # look for drafts in every step: no outcome may depend on how long that takes
settings.register_profile("nanoserve", deadline=None, derandomize=True, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("nanoserve")


def pytest_addoption(parser):
    parser.addoption("--soak-minutes", type=float, default=0.05, help="for -k soak (default: 3 seconds)")
    parser.addoption("--poison", action="store_true", help="fill all memory that nobody wrote with NaN, in every test")


def pytest_configure(config):
    config.addinivalue_line("markers", "compiles(program): compiles kernels for GPUs that are not here")


# ---------------------------------------------------------------------------------------------
# Kernels for GPUs that are not here, on the core that tests leave idle

COMPILER = """
import contextlib, io, json, sys, traceback
for program in sys.argv[1:]:
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {})
    except Exception:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]))"""
COMPILING = []   # the process


def waits(item) -> bool:
    return item.get_closest_marker("compiles") is not None


def pytest_collection_finish(session):
    """Programs that compile kernels begin at once, one after another in a process of their own. Who waits for them comes last."""
    session.items.sort(key=waits)
    programs = {item.get_closest_marker("compiles").args[0]: None for item in session.items if waits(item)
                and not any(skip.args[0] for skip in item.iter_markers("skipif"))}
    if programs and not session.config.option.collectonly:
        COMPILING.append(subprocess.Popen(
            ["nice", sys.executable, "-c", COMPILER, *programs], cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"TRITON_INTERPRET": "0"}))


def pytest_sessionfinish():
    for process in COMPILING:
        process.kill()


@pytest.fixture(scope="session")
def all_compiled() -> dict[str, tuple[str, str]]:
    """Of each program what it has printed, and its error."""
    out, err = COMPILING[0].communicate()
    programs = COMPILING[0].args[4:]
    assert COMPILING[0].returncode == 0, err
    return dict(zip(programs, map(json.loads, out.splitlines()), strict=True))


@pytest.fixture
def compiled(request, all_compiled) -> str:
    """What the test's program has printed."""
    printed, error = all_compiled[request.node.get_closest_marker("compiles").args[0]]
    assert not error, error
    return printed


# ---------------------------------------------------------------------------------------------
# Fixtures

@pytest.fixture
def poisoned():
    """Every torch.empty is filled with NaN, so that an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def poisoned_everywhere(request):
    if request.config.getoption("--poison"):
        request.getfixturevalue("poisoned")


@pytest.fixture(scope="session")
def lone(tmp_path_factory):
    """For each config: its folder, prompts (some with a common beginning) and each one's greedy tokens by the plain forward.

    And the same under "llama int8 kv" and so on for a cache of int8, "llama int8 weights", "llama int8 weights int8 kv",
    with prompts of their own: there the most likely token is ahead by 0.018 or more everywhere (by 0.03 with weights of
    int8), as a number of K or V that a rounding error takes to the next of its 127 steps changes a logit by a
    thousandth. One in a row of activations changes it by a hundredth: with these prompts, none is near the middle
    between two steps.
    """
    seeds = {"": (3, 3, 3), " int8 kv": (263, 263, 263), " int8 weights": (297, 815, 904), " int8 weights int8 kv": (398, 393, 690)}
    made = {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        plain_tensors = tensors_of(config)
        folder = write_checkpoint(tmp_path_factory.mktemp(name), config, plain_tensors)
        for suffix, seed in seeds.items():
            tensors, kv = as_int8(plain_tensors) if "weights" in suffix else plain_tensors, int8 if "kv" in suffix else as_it_is
            rng = random.Random(seed[i])
            common = [rng.randrange(61) for _ in range(50)]
            prompts = [common[:n] + [rng.randrange(61) for _ in range(m)]
                       for n, m in [(0, 1), (0, 2), (0, 40), (20, 3), (20, 30), (33, 1), (50, 1), (50, 9), (50, 0)]]
            made[name + suffix] = folder, prompts, [plain_greedy(config, tensors, p, NEW, kv) for p in prompts]
    return made
