"""The parallel arm of the claim equivalent_gain_200k_long by PyTorch alone; see README.md beside.

Gain = FLOPs of plain training to the loss that Gloeckle's head (arXiv 2404.19737) ends with / its
own FLOPs. Plain training at a constant rate decays to its end from several points on.
"""

import argparse
import copy
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

BUDGETS = (0.75, 1.0, 1.4, 2.0, 2.8)
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # 95 %, by the number of seeds
SIZES = {"vocabulary": 4096, "width": 64, "layers": 4, "heads": 4, "hidden": 176, "context": 256}
SIZES |= {"batch": 4, "steps": 2000, "warmup": 100, "evaluated": 1500}


def rotate(x, base=10000.0):
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * base ** (-torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class Block(nn.Module):  # attention with rotary positions, and SwiGLU
    def __init__(self, o):
        super().__init__()
        self.heads = o.heads
        self.norms = nn.ModuleList(nn.RMSNorm(o.width, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(o.width, 3 * o.width, bias=False)
        self.out = nn.Linear(o.width, o.width, bias=False)
        self.up = nn.Linear(o.width, 2 * o.hidden, bias=False)
        self.down = nn.Linear(o.hidden, o.width, bias=False)

    def forward(self, x):
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (p.view(shape).transpose(1, 2) for p in self.qkv(self.norms[0](x)).chunk(3, -1))
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Model(nn.Module):  # with mtp, a block beside the last one predicts the token after the next
    def __init__(self, o, mtp, seed):
        super().__init__()
        self.layers, self.embedding = o.layers, nn.Embedding(o.vocabulary, o.width)
        self.blocks = nn.ModuleList(Block(o) for _ in range(o.layers + mtp))
        self.ends = nn.ModuleList(nn.RMSNorm(o.width, eps=1e-6) for _ in range(1 + mtp))
        torch.manual_seed(seed)
        for p in self.parameters():  # the trunk's come first, so that both models draw them alike
            if p.dim() > 1:
                nn.init.normal_(p, std=0.006 * math.sqrt(7168 / o.width))

    def losses(self, window, depths):
        x, n = self.embedding(window[:, :-2]), window.shape[1] - 2
        for block in self.blocks[: self.layers - 1]:
            x = block(x)
        for k in range(depths):
            h = self.ends[k](self.blocks[self.layers - 1 + k](x)) @ self.embedding.weight.T
            yield F.cross_entropy(h.flatten(0, 1), window[:, k + 1 : k + 1 + n].flatten())


def windows(file, o, seed):  # in an order of the seed's
    size = file.stat().st_size // 2
    ids, count = torch.from_file(str(file), size=size, dtype=torch.uint16), (size - 2) // o.context
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return lambda i: ids[order[i % count] * o.context :][: o.context + 2].long()


class Run:
    def __init__(self, o, mtp, seed):
        self.o, self.mtp, self.step, self.model = o, mtp, 0, Model(o, mtp, seed)
        self.read = windows(o.store / "train.bin", o, seed)
        groups = [[p for p in self.model.parameters() if (p.dim() > 1) == m] for m in (True, False)]
        decays = [{"params": p, "weight_decay": w} for p, w in zip(groups, (0.1, 0), strict=True)]
        self.optimizer = torch.optim.AdamW(decays, betas=(0.9, 0.95))
        with FlopCounterMode(display=False) as counter:
            self.backward([0] * o.batch)
        self.per_step = counter.get_total_flops()
        self.optimizer.zero_grad()

    def backward(self, numbers):
        window = torch.stack([self.read(i) for i in numbers])
        main, *ahead = self.model.losses(window, 1 + self.mtp)
        (main + 0.3 * sum(ahead)).backward()

    def train(self, until, decay_to=math.inf):
        for step in range(self.step, until):
            left = (decay_to - step) / (0.2 * decay_to) if decay_to < math.inf else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = 4e-3 * min(1.0, (step + 1) / self.o.warmup) * min(1.0, left)
            self.backward(range(step * self.o.batch, (step + 1) * self.o.batch))
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step = until
        return self

    @torch.no_grad()
    def end(self):  # FLOPs, and the loss of the next token on held-out text
        read, many = windows(self.o.store / "val.bin", self.o, 0), range(self.o.evaluated)
        loss = fmean(float(next(self.model.losses(read(i)[None], 1))) for i in many)
        return self.per_step * self.step, loss


def of_seed(o, seed):
    trunk, curve, gain = Run(o, 0, seed), [], None
    for steps in (round(budget * o.steps) for budget in BUDGETS):
        trunk.train(round(0.8 * steps))
        curve.append(copy.deepcopy(trunk).train(steps, decay_to=steps).end())
    arm = Run(o, 1, seed).train(o.steps, decay_to=o.steps)
    (flops, loss), price = arm.end(), trunk.per_step / arm.per_step
    for (c0, l0), (c1, l1) in zip(curve, curve[1:], strict=False):  # nothing is extrapolated
        if l1 <= loss <= l0:
            gain = c0 * (c1 / c0) ** ((l0 - loss) / (l0 - l1)) / flops
    gains = {"gain": gain, "price": price, "effect": gain and gain / price}
    return {"seed": seed, "loss": loss, "curve": curve, **gains}


def over_seeds(values):  # geometric mean with the 95 % t interval of the logarithms
    logs, n = [math.log(v) for v in values], len(values)
    half = T_QUANTILE[n] * stdev(logs) / math.sqrt(n) if n in T_QUANTILE else math.inf
    return [math.exp(fmean(logs) + shift) for shift in (0, -half, half)]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("store", type=Path, help="folder with train.bin and val.bin, uint16 ids")
    p.add_argument("--output", type=Path, default="gain.json")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    for name, value in SIZES.items():
        p.add_argument(f"--{name}", type=int, default=value)
    o, found = p.parse_args(), []
    for seed in o.seeds:
        found.append(of_seed(o, seed))
        within = [run for run in found if run["gain"]]
        means = {k: over_seeds([r[k] for r in within]) for k in ("gain", "effect") if within}
        o.output.write_text(json.dumps({"seeds": found, **means}, indent=1))
        print(found[-1], means, flush=True)
