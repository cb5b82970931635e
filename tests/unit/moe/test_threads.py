"""Work on torch's threads. In a process of its own: one that has started threads must not fork afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mhmoe_vl.moe import threads

pytestmark = pytest.mark.skipif(threads.OPENMP is None, reason=threads.STATE)

SNIPPETS = {
    "every_task_runs_once_on_several_threads": """
import threading, time
done, who = [], set()
def task(number, workspace):
    time.sleep(0.01); done.append(number); who.add(threading.get_ident())
threads.share(list(range(40)), task)
print(sorted(done) == list(range(40)), len(who))
""",
    "workspaces_are_not_shared_and_are_kept": """
import time
seen, clashes = set(), []
def task(number, workspace):
    scratch = workspace('x', 10, 10, torch.float32).fill_(number); time.sleep(0.002)
    seen.add(scratch.data_ptr())
    if not bool((scratch == number).all()): clashes.append(number)
for _ in range(5): threads.share(list(range(30)), task)
print(len(seen) <= 3, clashes)
""",
    "matmuls_inside_use_one_thread_and_no_gradient": """
w = torch.ones(64, 64, requires_grad=True)
modes, sums = [], []
def task(number, workspace):
    modes.append(torch.is_grad_enabled())
    out = torch.empty(64, 64); torch.mm(w, w, out=out); sums.append(float(out.sum()))
threads.share(list(range(9)), task)
print(set(modes), set(sums), torch.is_grad_enabled())
""",
    "an_error_in_a_task_is_raised_here": """
def task(number, workspace):
    if number == 7: raise ValueError('task 7')
try: threads.share(list(range(20)), task)
except ValueError as error: print(error)
done = []
threads.share([1, 2, 3], lambda number, workspace: done.append(number)); print(sorted(done))
""",
    "who_shares": """
print([threads.can_share(s) for s in ([1, 1, 1], [1, 1], [4, 3, 3], [5, 3, 3], [], [2, 2, 1, 1, 1, 1])])
torch.set_num_threads(1); print(threads.can_share([1, 1, 1]))
""",
    "the_layer_on_any_number_of_threads": """
import itertools, json
from mhmoe_vl.moe import MultiHeadMoE
worst = {}
for dtype, glu in itertools.product(("float32", "bfloat16", "float64"), (False, True)):
    torch.manual_seed(0)
    layer = MultiHeadMoE(32, 40, 6, 4, 2, glu=glu).to(getattr(torch, dtype))
    x = torch.randn(300, 32, dtype=getattr(torch, dtype))
    for bias in (0.0, 0.4):
        layer.moe.router.selection_bias_E[0] = bias
        results = {}
        for backend, num_threads in (("loop", 1), ("segments", 1), ("segments", 2), ("segments", 3)):
            torch.set_num_threads(num_threads)
            layer.zero_grad(); layer.moe.experts.backend = backend
            y, _ = layer(x); (y * y).sum().backward()
            results[backend, num_threads] = [y.detach().double(), *(p.grad.double() for p in layer.parameters())]
        expected = results.pop(("loop", 1))
        for (_, num_threads), found in results.items():
            errors = [float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in zip(found, expected)]
            worst[f"{dtype}, glu={glu}, bias={bias}, {num_threads} threads"] = max(errors)
print(json.dumps(worst))
""",
    "from_several_threads_at_once": """
import threading
totals = []
def train():
    done = []
    for _ in range(20): threads.share(list(range(12)), lambda number, workspace: done.append(number))
    totals.append(sorted(done) == sorted(list(range(12)) * 20))
workers = [threading.Thread(target=train) for _ in range(3)]
[w.start() for w in workers]; [w.join() for w in workers]
print(totals)
""",
}

RUN = """
import contextlib, io, json, sys, traceback
import torch
printed = {}
for name, snippet in json.load(sys.stdin).items():
    torch.set_num_threads(3)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(snippet, {})
        except Exception:
            traceback.print_exc(file=out)
    printed[name] = out.getvalue()
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each snippet printed, or how it failed."""
    header = "import torch\nfrom mhmoe_vl.moe import threads\n"
    given = json.dumps({name: header + code for name, code in SNIPPETS.items()})
    done = subprocess.run([sys.executable, "-c", RUN], input=given, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_task_runs_once_on_several_threads(printed: dict[str, str]) -> None:
    assert printed["every_task_runs_once_on_several_threads"].split() == ["True", "3"]


def test_workspaces_are_not_shared_and_are_kept(printed: dict[str, str]) -> None:
    assert printed["workspaces_are_not_shared_and_are_kept"].strip() == "True []"


def test_matmuls_inside_use_one_thread_and_no_gradient(printed: dict[str, str]) -> None:
    assert printed["matmuls_inside_use_one_thread_and_no_gradient"].strip() == f"{{False}} {{{64.0**3}}} True"


def test_an_error_in_a_task_is_raised_here(printed: dict[str, str]) -> None:
    assert printed["an_error_in_a_task_is_raised_here"].splitlines() == ["task 7", "[1, 2, 3]"]


def test_who_shares(printed: dict[str, str]) -> None:
    """Three threads: a fair share is a third, and the largest task may be 1.2 times that."""
    assert printed["who_shares"].splitlines() == ["[True, False, True, False, False, True]", "False"]


def test_the_layer_on_any_number_of_threads(printed: dict[str, str]) -> None:
    """With experts for each thread, and with one that has most rows, so that all threads share its matmuls."""
    worst = json.loads(printed["the_layer_on_any_number_of_threads"])
    assert len(worst) == 3 * 2 * 2 * 3
    tolerances = {"float32": 2e-6, "bfloat16": 3e-2, "float64": 1e-14}
    assert {name: error for name, error in worst.items() if not error < tolerances[name.split(",")[0]]} == {}


def test_from_several_threads_at_once(printed: dict[str, str]) -> None:
    assert printed["from_several_threads_at_once"].strip() == "[True, True, True]"
