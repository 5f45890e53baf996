"""What do heads and prototype losses cost in time and memory, in chunks and in the plain form?

The part of a step from tokens to gradients: the teacher's heads, Sinkhorn targets, the student's heads, DINO and iBOT
loss, backward. Rows and sizes are those of ViT-L/14 on 16 images: 2 global and 8 local crops, 1,229 masked patches,
heads of bottleneck 384 and 256. The plain form, written below, holds whole logits, balances a matrix in place as the
references do, and takes log-softmax and cross-entropy by autograd. Losses and gradients are compared before anything
is timed.

    python benchmarks/bench_prototype_loss.py [--rounds 5] [--threads 2] [--prototypes 65536 131072]

Time: medians over rounds in which both forms take turns, of wall and of CPU seconds; CPU seconds are the ones to
compare when other work shares the machine. Memory: how far the resident set of a fresh process rises in one such step
above parameters and inputs, gradients of the parameters included. On a busy machine `--rounds 0` measures memory,
which does not depend on it, and leaves the time. Writes benchmarks/results/prototype_loss.json.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.loss.dino import crop_pairs
from pretrain.loss.prototypes import prototype_loss
from pretrain.loss.targets import Targets, sinkhorn_shift
from pretrain.model.head import Head
from runtime.environment import describe
from runtime.files import write_json

IMAGES, LOCALS, MASKED, WIDTH = 16, 8, 1229, 1024  # masked: half of the global crops, 30 % of 256 patches
TEACHER, STUDENT = 0.05, 0.1  # temperatures
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Work:
    """Heads of student and teacher, and tokens of both; `step` leaves gradients in the student's."""

    def __init__(self, num_prototypes: int, precision: torch.dtype):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden": 2048, "num_layers": 3, "num_prototypes": num_prototypes}
        heads = [Head(WIDTH, bottleneck=384, **sizes), Head(WIDTH, bottleneck=256, **sizes)]
        self.students = nn.ModuleList(heads)
        self.teachers = copy.deepcopy(self.students).requires_grad_(False)
        for parameter in self.teachers.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(()))
        self.cls, self.patches = torch.randn((2 + LOCALS) * IMAGES, WIDTH), torch.randn(MASKED, WIDTH)
        self.teacher_cls, self.teacher_patches = torch.randn(2 * IMAGES, WIDTH), torch.randn(MASKED, WIDTH)
        self.tokens = [self.cls.requires_grad_(), self.patches.requires_grad_()]
        self.precision = precision

    def step(self, form: Callable[["Work"], Tensor]) -> float:
        for leaf in [*self.students.parameters(), *self.tokens]:
            leaf.grad = None
        with torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32):
            loss = form(self)
        loss.backward()
        return loss.item()

    def gradients(self) -> list[Tensor]:
        leaves = [*self.students.parameters(), *self.tokens]
        return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]


def chunked(work: Work) -> Tensor:
    """As pretrain/step.py does it."""
    told = []
    for head, tokens, sets in zip(work.teachers, (work.teacher_cls, work.teacher_patches), (2, 1), strict=True):
        with torch.no_grad():
            z, w = head(tokens, read=lambda z, w: (z, w))
            told.append(Targets(z.unflatten(0, (sets, -1)), w, sinkhorn_shift(z, w, temperature=TEACHER), TEACHER))
    losses = []
    for head, tokens, targets, pairs in zip(
        work.students, work.tokens, told, (crop_pairs(LOCALS), torch.ones(1, 1)), strict=True
    ):
        rows = targets.features.shape[1]
        weights = torch.full((rows,), 1 / rows)

        def read(z: Tensor, w: Tensor, targets=targets, pairs=pairs, weights=weights) -> Tensor:
            sets = z.unflatten(0, (len(pairs), -1))
            return prototype_loss(sets, w, targets, pairs=pairs, weights=weights, measure=False).loss

        losses.append(head(tokens, read=read))
    return losses[0] + losses[1]


def plain(work: Work) -> Tensor:
    """Whole logits."""
    with torch.no_grad():
        cls = sinkhorn_matrix(work.teachers[0](work.teacher_cls)).unflatten(0, (2, -1))
        patches = sinkhorn_matrix(work.teachers[1](work.teacher_patches))
    logits = work.students[0](work.cls).unflatten(0, (2 + LOCALS, -1))
    log_q = (logits.float() / STUDENT).log_softmax(-1)
    dino = -(cls.flip(0) * log_q[:2]).sum(-1).mean(1).sum()
    for local in log_q[2:]:
        dino = dino - (cls.sum(0) * local).sum(-1).mean()
    log_q = (work.students[1](work.patches).float() / STUDENT).log_softmax(-1)
    return dino / (2 + 2 * LOCALS) - (patches * log_q).sum(-1).mean()


def sinkhorn_matrix(logits: Tensor, iterations: int = 3) -> Tensor:
    q = (logits.float() / TEACHER).exp()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True) * q.shape[1]
        q /= q.sum(1, keepdim=True) * q.shape[0]
    return q * len(q)


FORMS = {"chunked": chunked, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="0: memory and differences alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[65536, 131072])
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # form, prototypes, precision: one case
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        form, prototypes, precision = args.memory_of
        print(json.dumps(rise(FORMS[form], Work(int(prototypes), PRECISIONS[precision]))))
        return
    load = os.getloadavg()[0]
    results = {}
    for prototypes in args.prototypes:
        for precision, dtype in PRECISIONS.items():
            memory = {form: in_fresh_process(form, prototypes, precision, args.threads) for form in FORMS}
            work = Work(prototypes, dtype)
            case = {"memory_MiB": {**memory, "ratio": round(memory["chunked"] / memory["plain"], 3)}, **compare(work)}
            if args.rounds:
                case |= measure(work, args.rounds)
            results[f"K={prototypes} {precision}"] = case
            print(f"K={prototypes} {precision}", json.dumps(case), flush=True)
    report = {
        "question": "time and memory of heads and prototype losses, chunked beside plain",
        "date": time.strftime("%Y-%m-%d"),
        "rows": {"images": IMAGES, "local crops": LOCALS, "masked patches": MASKED, "width": WIDTH},
        "rounds": args.rounds,
        "threads": args.threads,
        "load_average_before": load,
        "results": results,
        "environment": describe(),
    }
    write_json(Path(__file__).parent / "results" / "prototype_loss.json", report)


def compare(work: Work) -> dict[str, float]:
    """Differences of the forms; AssertionError where they are not the same loss."""
    losses, gradients = {}, {}
    for name, form in FORMS.items():
        losses[name], gradients[name] = work.step(form), work.gradients()
    apart = abs(losses["chunked"] - losses["plain"]) / abs(losses["plain"])
    worst = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(*gradients.values(), strict=True))
    exact = work.precision == torch.float32
    assert apart < (1e-5 if exact else 1e-3), f"losses differ: {losses}"
    assert worst < (1e-4 if exact else 3e-2), f"gradients differ by {worst:.1e}"
    return {"loss_apart": apart, "gradient_apart": worst}


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Median seconds of a step in each form, taking turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for i in range(rounds + 1):
        for name in list(FORMS)[:: 1 if i % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            work.step(FORMS[name])
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    table: dict[str, Any] = {}
    for k, clock in enumerate(("wall_s", "cpu_s")):
        medians = {name: statistics.median(each[k] for each in rows) for name, rows in seconds.items()}
        ratio = statistics.median(a[k] / b[k] for a, b in zip(*seconds.values(), strict=True))
        table[clock] = {
            **{name: round(value, 3) for name, value in medians.items()},
            "ratio_per_round": round(ratio, 3),
        }
    return table


def in_fresh_process(form: str, prototypes: int, precision: str, threads: int) -> float:
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", form, str(prototypes), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rise(form: Callable[[Work], Tensor], work: Work) -> float:
    """MiB by which the resident set of this process rises, at its peak, in one step (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    work.step(form)
    return round((status("VmHWM") - before) / 1024)


def status(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
