"""SiT, its training step and its sampler in PyTorch, to compare ours with: the program that `torch_twin` starts.

It imports only torch and numpy: CUDA libraries of jax and torch cannot share a process. It is written to be fast:

- scaled_dot_product_attention, fused AdamW, EMA in one operation over all parameters, no waiting for the device;
- torch.compile of forward pass and loss as one graph with static shapes. Its backward pass recomputes cheap values, as
  our `remat` does;
- bfloat16: products run under autocast. Parameters, norms, modulation, the time embedding, losses and the residual
  stream (unless `stream_dtype` says otherwise) stay float32, as in our policy;
- float32 on a GPU: products are TF32 (`set_float32_matmul_precision("high")`), which is jax's default.
"""

import math
import os
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))


def modulation(width: int, parts: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool):
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        layers = {"fc1": nn.Linear(width, hidden), "act": nn.GELU("tanh"), "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        ada = self.adaLN_modulation(c).float()[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = ada.chunk(6, dim=-1)
        x = x + (gate_a * self.attn(modulate(x, shift_a, scale_a))).to(x.dtype)
        return x + (gate_m * self.mlp(modulate(x, shift_m, scale_m))).to(x.dtype)


class SiT(nn.Module):
    """(x_t [b c h w], t, y) -> (velocity float32, the outputs of all blocks).

    positions: the table [n d]. arch: an Architecture of `weights.dit` as a dict, with `grid` and `stream_dtype`. Its
    `skip`: DiverseDiT's long residual connections as released, from block i to behind block depth - 1 - i.
    """

    def __init__(self, positions: np.ndarray, arch: dict[str, Any]):
        super().__init__()
        depth, width, patch, channels = (arch[name] for name in ("depth", "width", "patch", "channels"))
        self.grid, self.patch, self.stream = arch["grid"], patch, getattr(torch, arch["stream_dtype"])
        pairs = depth // 2 if arch["skip"] else 0
        self.deep = range(depth - pairs, depth)  # the blocks that end a connection
        self.register_buffer("positions", torch.from_numpy(positions), persistent=False)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(arch["num_classes"] + 1, width)})
        block = partial(Block, width, arch["heads"], int(width * arch["mlp_ratio"]), arch["qk_norm"])
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.skip_norms = nn.ModuleList(nn.LayerNorm(2 * width, eps=EPS) for _ in range(pairs))
        self.skip_linears = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(2 * width, width)}) for _ in range(pairs))
        last = {"adaLN_modulation": modulation(width, 2), "linear": nn.Linear(width, patch * patch * channels)}
        self.final_layer = nn.ModuleDict(last)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.x_embedder["proj"](x_t).flatten(2).transpose(1, 2) + self.positions
        x = x.to(self.stream)
        with torch.autocast(x.device.type, enabled=False):
            angles = t[:, None] * self.frequencies
            c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=-1))
        c = c + self.y_embedder["embedding_table"](y)
        features, shallow = [], []
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if i in self.deep:
                k = i - self.deep.start
                both = torch.cat([x, shallow.pop()], dim=-1)
                x = self.skip_linears[k]["linear"](self.skip_norms[k](both)).to(x.dtype)
            elif i < len(self.deep):
                shallow.append(x)
            features.append(x)
        shift, scale = self.final_layer["adaLN_modulation"](c).float()[:, None].chunk(2, dim=-1)
        x = self.final_layer["linear"](modulate(x, shift, scale)).float()
        x = x.unflatten(1, self.grid).unflatten(-1, (self.patch, self.patch, -1))
        return torch.einsum("bhwpqc->bchpwq", x).flatten(4, 5).flatten(2, 3), features


def diversity(
    features: list[Tensor],
    pairs: list,
    weights: tuple,
    scale: float,
    lo: float,
    hi: float,
    coefficient: float,
    groups: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`losses.diversity.diversity_loss` with its preset `release`: the loss and its parts."""
    blocks = [f.float().unflatten(0, (groups, -1)).flatten(1, 2) for f in features]  # [g (b n) d]
    first, second = (list(side) for side in zip(*pairs, strict=True))

    means = F.normalize(torch.stack([f.mean(dim=1) for f in blocks]), dim=-1, eps=1e-8)  # [l g d]
    orthogonality = (means[first] * means[second]).sum(dim=-1).mean(dim=0)

    # One pair at a time, without storing unit features: on a CPU less than half the time of indexing a stack.
    inverse = [1 / f.norm(dim=-1).clamp_min(1e-8) for f in blocks]
    cosines = [((blocks[i] * blocks[j]).sum(dim=-1) * inverse[i] * inverse[j]).mean(dim=-1) for i, j in pairs]
    mutual_information = torch.stack(cosines).abs().mean(dim=0)

    usage = torch.stack([f.abs().mean(dim=1) / f.norm(dim=1).clamp_min(1e-8) for f in blocks]).mean(dim=0)  # [g d]
    usage = usage / usage.amax(dim=-1, keepdim=True).clamp_min(1e-8)
    dispersion = -(usage.var(dim=-1, correction=0) / scale).clamp(0, 1)

    terms = {"orthogonality": orthogonality, "mutual_information": mutual_information, "dispersion": dispersion}
    loss = sum(weight * term for weight, term in zip(weights, terms.values(), strict=True))
    weight = coefficient * torch.where(loss > hi, 1.0, torch.where(loss > lo, (loss - lo) / hi, 0.0))
    parts = terms | {"loss": loss, "weight": weight}
    return (weight * loss).mean(), {name: part.mean() for name, part in parts.items()}


class Program(NamedTuple):
    """A training step or a sampler."""

    compile: Callable[[], Any]  # runs everything that compiles: a step, or a guided and an unguided evaluation
    run: Callable[[], Any]  # does one step, or one batch of samples, on data on the device
    once: Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]  # see `Twin.once`


def load(network: SiT, job: dict[str, Any]) -> SiT:
    network.load_state_dict({name: torch.from_numpy(array) for name, array in job["params"].items()}, strict=True)
    return network.to(job["device"])


def autocast(job: dict[str, Any]) -> torch.autocast:
    return torch.autocast(job["device"], torch.bfloat16, enabled=job["dtype"] == "bfloat16")


def on_device(job: dict[str, Any], array: np.ndarray) -> Tensor:
    """An array as a tensor; images [b h w c] become [b c h w]."""
    tensor = torch.from_numpy(array).to(job["device"])
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor


def compiled(job: dict[str, Any], function: Callable) -> Callable:
    # dynamic=False: compile for each of the two batch sizes of the sampler
    return torch.compile(function, fullgraph=True, dynamic=False) if job["compile"] else function


def drawn(job: dict[str, Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, noise, t and the labels after dropout."""
    if "moments" in batch:
        mean, std = batch["moments"].float().chunk(2, dim=1)
        x = (mean + std * torch.randn_like(mean) - job["bias"]) * job["scale"]
    else:
        x = batch["x"]
    draws = torch.rand(2, len(x), device=x.device)
    y = batch["y"].masked_fill(draws[1] < job["label_drop"], job["network"]["num_classes"])
    return x, torch.randn_like(x), draws[0], y


def training(job: dict[str, Any]) -> Program:
    network = load(SiT(job["positions"], job["network"]), job)
    params = list(network.parameters())
    batch = {name: on_device(job, array) for name, array in job["batch"].items()}

    @partial(compiled, job)
    def loss_of(x: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        at = t[:, None, None, None]
        with autocast(job):
            v, features = network((1 - at) * x + at * noise, t, y)
        objective = F.mse_loss(v, noise - x)
        if job["diversity"] is None:
            return objective, {"loss/objective": objective}
        value, parts = diversity(features, **job["diversity"])
        metrics = {"loss/objective": objective, "loss/diversity": value}
        return objective + value, metrics | {f"diversity/{name}": part for name, part in parts.items()}

    def optimizer_and_ema() -> tuple[torch.optim.Optimizer, list[Tensor]]:
        optimizer = torch.optim.AdamW(params, **job["adamw"], fused=True)
        return optimizer, [p.detach().clone() for p in params]

    def step(optimizer: torch.optim.Optimizer, ema: list[Tensor], *inputs: Tensor) -> dict[str, Tensor]:
        total, metrics = loss_of(*inputs)
        total.backward()
        norm = nn.utils.clip_grad_norm_(params, job["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - job["ema_decay"])
        metrics |= {"loss/total": total}
        return {name: metric.detach() for name, metric in metrics.items()} | {"grad_norm": norm}

    state = optimizer_and_ema()

    def run() -> None:
        step(*state, *drawn(job, batch))

    def once(inputs: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
        load(network, job)
        optimizer, ema = optimizer_and_ema()
        given = [on_device(job, inputs[name]) for name in ("x", "noise", "t", "y")]
        for _ in range(steps):
            metrics = step(optimizer, ema, *given)
        for (name, param), average in zip(network.named_parameters(), ema, strict=True):
            metrics |= {f"params/{name}": param.detach(), f"ema/{name}": average}
        return {name: value.cpu().numpy() for name, value in metrics.items()}

    return Program(run, run, once)


def sampling(job: dict[str, Any]) -> Program:
    """`solvers.euler_maruyama` for the linear path with w = 2 t; the last step adds no noise."""
    network = load(SiT(job["positions"], job["network"]), job).eval()
    if job["dtype"] == "bfloat16":  # autocast would cast them at every step
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module not in network.t_embedder["mlp"]:
                module.to(torch.bfloat16)
    labels = on_device(job, job["batch"]["y"])
    options = job["sampler"]
    low, high = options["interval"]

    @partial(compiled, job)
    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(job):
            return network(x, t, y)[0]

    def guided(x: Tensor, t: float, y: Tensor) -> Tensor:
        if options["cfg_scale"] == 1 or not low <= t <= high:
            return velocity(x, x.new_full((len(x),), t), y)
        both = torch.cat([y, torch.full_like(y, job["network"]["num_classes"])])
        v, v_null = velocity(torch.cat([x, x]), x.new_full((2 * len(x),), t), both).chunk(2)
        return v_null + options["cfg_scale"] * (v - v_null)

    @torch.inference_mode()
    def sample(x: Tensor, draw: Callable[[int], Tensor], y: Tensor) -> Tensor:
        spans = list(pairwise(options["times"]))
        for i, (t, t_next) in enumerate(spans):
            v = guided(x, t, y)
            score = -(x + (1 - t) * v) / t
            x = x + (t_next - t) * (v - t * score)
            if i < len(spans) - 1:
                x = x + math.sqrt(2 * t * (t - t_next)) * draw(i)
        return x

    height, width = (side * job["network"]["patch"] for side in job["network"]["grid"])
    shape = (len(labels), job["network"]["channels"], height, width)
    normal = partial(torch.randn, shape, device=job["device"])

    @torch.inference_mode()
    def compile() -> None:
        for t in {low <= t <= high: t for t in options["times"][:-1]}.values():  # one guided time, one unguided
            guided(normal(), t, labels)

    def run() -> None:
        sample(normal(), lambda i: normal(), labels)

    def once(inputs: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
        x, y = (on_device(job, inputs[name]) for name in ("x", "y"))
        x = sample(x, lambda i: on_device(job, inputs["noise"][i]), y)
        return {"x": x.permute(0, 2, 3, 1).cpu().numpy()}

    return Program(compile, run, once)


class Worker:
    """The calls of a `Twin`, each with its job."""

    def begin(self, job: dict[str, Any]) -> dict[str, Any]:
        """Build and compile the job; returns facts about it. It runs uncompiled if torch.compile fails."""
        self.cuda = job["device"] == "cuda"
        if job["threads"]:
            torch.set_num_threads(job["threads"])
        if self.cuda:
            torch.set_float32_matmul_precision("high")
        why = None if job["compile"] else "not asked for"
        try:
            seconds = self._start(job)
        except Exception as error:
            if not job["compile"]:
                raise
            why = f"{type(error).__name__}: {error}".split("\n\n")[0]  # without the advice for PyTorch's developers
            torch._dynamo.reset()
            seconds = self._start(job | {"compile": False})
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        return {
            "torch": str(torch.__version__),  # a class of torch's own: unpickling it would import torch
            "device": torch.cuda.get_device_name() if self.cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
            "threads": torch.get_num_threads(),
            "compile": why is None,
            "why_not": why,
            "compile_s": seconds,
            "parameters": sum(array.size for array in job["params"].values()),
        }

    def _start(self, job: dict[str, Any]) -> float:
        self.program = {"train": training, "sample": sampling}[job["kind"]](job)
        return self._timed(self.program.compile)

    def _timed(self, function: Callable[[], Any], count: int = 1) -> float:
        """Wall seconds of `count` calls, with the device's work."""
        wait = torch.cuda.synchronize if self.cuda else lambda: None
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            function()
        wait()
        return time.perf_counter() - begin

    def run(self, count: int) -> float:
        return self._timed(self.program.run, count)

    def once(self, inputs: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
        return self.program.once(inputs, steps)

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else None


def serve(connection: Connection) -> None:
    """Answer calls (name, *arguments) of a Worker with (value, None) or (None, error), until the other end closes."""
    worker = Worker()
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(worker, name)(*arguments), None
        except Exception as error:
            answer = None, (f"{type(error).__name__}: {error}", traceback.format_exc())
        connection.send(answer)


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # else processes of torch.compile keep the pipe open
    serve(Connection(descriptor))
