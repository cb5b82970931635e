"""Work on torch's threads. In processes of their own: a process that has started threads must not fork afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mhmoe_vl.moe import threads

pytestmark = pytest.mark.skipif(threads.OPENMP is None, reason=threads.STATE)


def run(code: str, num_threads: int = 3) -> str:
    header = f"import torch; torch.set_num_threads({num_threads})\nfrom mhmoe_vl.moe import threads\n"
    done = subprocess.run([sys.executable, "-c", header + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_task_runs_once_on_several_threads() -> None:
    out = run(
        "import threading, time\n"
        "done, who = [], set()\n"
        "def task(number, workspace):\n"
        "    time.sleep(0.01); done.append(number); who.add(threading.get_ident())\n"
        "threads.share(list(range(40)), task)\n"
        "print(sorted(done) == list(range(40)), len(who))"
    )
    assert out.split() == ["True", "3"]


def test_workspaces_are_not_shared_and_are_kept() -> None:
    out = run(
        "import time\n"
        "seen, clashes = set(), []\n"
        "def task(number, workspace):\n"
        "    scratch = workspace('x', 10, 10, torch.float32).fill_(number); time.sleep(0.002)\n"
        "    seen.add(scratch.data_ptr())\n"
        "    if not bool((scratch == number).all()): clashes.append(number)\n"
        "for _ in range(5): threads.share(list(range(30)), task)\n"
        "print(len(seen) <= 3, clashes)"
    )
    assert out.strip() == "True []"


def test_matmuls_inside_use_one_thread_and_no_gradient() -> None:
    out = run(
        "w = torch.ones(64, 64, requires_grad=True)\n"
        "modes, sums = [], []\n"
        "def task(number, workspace):\n"
        "    modes.append(torch.is_grad_enabled())\n"
        "    out = torch.empty(64, 64); torch.mm(w, w, out=out); sums.append(float(out.sum()))\n"
        "threads.share(list(range(9)), task)\n"
        "print(set(modes), set(sums), torch.is_grad_enabled())"
    )
    assert out.strip() == f"{{False}} {{{64.0**3}}} True"


def test_an_error_in_a_task_is_raised_here() -> None:
    out = run(
        "def task(number, workspace):\n"
        "    if number == 7: raise ValueError('task 7')\n"
        "try: threads.share(list(range(20)), task)\n"
        "except ValueError as error: print(error)\n"
        "done = []\n"
        "threads.share([1, 2, 3], lambda number, workspace: done.append(number)); print(sorted(done))"
    )
    assert out.splitlines() == ["task 7", "[1, 2, 3]"]


def test_who_shares() -> None:
    """Three threads: a fair share is a third, and the largest task may be 1.2 times that."""
    out = run(
        "print([threads.can_share(s) for s in ([1, 1, 1], [1, 1], [4, 3, 3], [5, 3, 3], [], [2, 2, 1, 1, 1, 1])])\n"
        "torch.set_num_threads(1); print(threads.can_share([1, 1, 1]))"
    )
    assert out.splitlines() == ["[True, False, True, False, False, True]", "False"]


def test_the_layer_on_any_number_of_threads() -> None:
    """With experts for each thread, and with one that has most rows, so that all threads share its matmuls."""
    code = """
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
"""
    worst = json.loads(run(code))
    assert len(worst) == 3 * 2 * 2 * 3
    tolerances = {"float32": 2e-6, "bfloat16": 3e-2, "float64": 1e-14}
    assert {name: error for name, error in worst.items() if not error < tolerances[name.split(",")[0]]} == {}


def test_from_several_threads_at_once() -> None:
    out = run(
        "import threading\n"
        "totals = []\n"
        "def train():\n"
        "    done = []\n"
        "    for _ in range(20): threads.share(list(range(12)), lambda number, workspace: done.append(number))\n"
        "    totals.append(sorted(done) == sorted(list(range(12)) * 20))\n"
        "workers = [threading.Thread(target=train) for _ in range(3)]\n"
        "[w.start() for w in workers]; [w.join() for w in workers]\n"
        "print(totals)"
    )
    assert out.strip() == "[True, True, True]"
