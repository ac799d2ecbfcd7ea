"""Peak memory of the loss stage at a vocabulary of 151,936, against keeping all logits as TRL's trainer does.

    python benchmarks/loss_memory.py --trl-python .venv-trl/bin/python [--positions 256 1024] [--json FILE]

Random hidden states (size 576) and a bfloat16 head, forward KL over the full vocabulary, loss and backward, each in its
own process. Peak: the largest resident memory above what was there before the step. TRL's side calls its own loss
function on float32 logits of both roles, as its trainer does with what the model returns.
``loss_memory.<positions>`` is TRL's peak over ours with a head that does not train (the logits' share alone),
``loss_memory_head.<positions>`` with one that trains: both then also hold its gradient.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import finish

V, H = 151_936, 576

MEASURE = """
import json, resource, sys, threading, time
import torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

class Peak:
    def __enter__(self):
        self.most, self.on = 0.0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while self.on:
            self.most = max(self.most, resident())
            time.sleep(0.001)
    def __exit__(self, *error):
        self.on = False
        self.thread.join()

N, V, H, trains = map(int, sys.argv[1:5])
torch.manual_seed(0)
weight = (torch.randn(V, H) * 0.05).bfloat16().requires_grad_(bool(trains))
teacher_weight = (torch.randn(V, H) * 0.05).bfloat16()
student = torch.randn(N, H).bfloat16().requires_grad_()
teacher, targets = torch.randn(N, H).bfloat16(), torch.randint(V, (N,))
"""
OURS = (
    MEASURE
    + """
from perdure.fused import Head, LossInputs, chunked_loss
from perdure.losses import LossSpec

def step():
    inputs = LossInputs(student, teacher, targets, torch.ones(N), torch.ones(N, dtype=torch.bool))
    loss, _ = chunked_loss(LossSpec(), inputs, Head(weight), Head(teacher_weight))
    (loss / N).backward()
    return float(loss) / N
"""
)
THEIRS = (
    MEASURE
    + """
import warnings; warnings.filterwarnings("ignore")
from trl.experimental.sdft import loss_utils

def step():
    student_logits = (student @ weight.T)[None].float() / 1.0
    with torch.no_grad():
        teacher_logits = (teacher @ teacher_weight.T)[None].float() / 1.0
    kl = loss_utils.compute_full_logit_self_distillation_loss(student_logits, teacher_logits, distillation_alpha=0.0)
    loss = kl.sum() / N
    loss.backward()
    return float(loss)
"""
)
RUN = """
before = resident()
with Peak() as peak:
    loss = step()
print(json.dumps({"peak_mb": peak.most - before, "loss": loss}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True)
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict = {"vocabulary": V, "hidden": H, "vs_trl": {"loss_memory": {}, "loss_memory_head": {}}, "peak_mb": {}}
    for positions in args.positions:
        for trains, name in ((0, "loss_memory"), (1, "loss_memory_head")):
            found = {}
            for who, python, code in (("perdure", sys.executable, OURS), ("trl", str(args.trl_python), THEIRS)):
                words = [python, "-c", code + RUN, str(positions), str(V), str(H), str(trains)]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
                found[who] = json.loads(done.stdout.splitlines()[-1])
                report["peak_mb"][f"{name}.{positions}.{who}"] = round(found[who]["peak_mb"], 1)
            assert abs(found["perdure"]["loss"] - found["trl"]["loss"]) < 0.02 * found["trl"]["loss"], found
            report["vs_trl"][name][str(positions)] = found["trl"]["peak_mb"] / found["perdure"]["peak_mb"]
    finish(report, args.json)


if __name__ == "__main__":
    main()
