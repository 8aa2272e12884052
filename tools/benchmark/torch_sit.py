"""SiT, its training step and its sampler in PyTorch, to compare ours with: the program that `torch_twin` starts.

It knows torch and numpy alone, so that no CUDA library of jax shares its process. Written as for a run of one's own:
scaled_dot_product_attention, torch.compile of the forward pass and the loss as one graph with static shapes (whose
backward pass recomputes what is cheap, as our `remat` does), fused AdamW, EMA in one operation over all parameters,
and nothing in the loop that waits for the device. With bfloat16 products run under autocast and parameters stay
float32; as in our policy, so do the residual stream (unless its dtype is changed), norms, modulation, the time
embedding and losses. On a GPU float32 products are TF32 (`set_float32_matmul_precision("high")`), jax's default, too.
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

# --- The network, under the names of the published one.


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
    """(x_t [b c h w], t, y) -> (velocity float32, the outputs of all blocks). positions: the table [n d].

    skip: DiverseDiT's long residual connections as released, from block i to block depth - 1 - i, merged after it.
    """

    def __init__(
        self,
        positions: np.ndarray,
        grid: tuple[int, int],
        channels: int,
        classes: int,
        depth: int,
        width: int,
        heads: int,
        hidden: int,
        patch: int,
        qk_norm: bool,
        skip: bool,
        stream_dtype: str,
    ):
        super().__init__()
        self.grid, self.patch, self.stream = grid, patch, getattr(torch, stream_dtype)
        pairs = depth // 2 if skip else 0
        self.deep = range(depth - pairs, depth)  # the blocks that a connection leads to
        self.register_buffer("positions", torch.from_numpy(positions), persistent=False)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(Block(width, heads, hidden, qk_norm) for _ in range(depth))
        self.skip_norms = nn.ModuleList(nn.LayerNorm(2 * width, eps=EPS) for _ in range(pairs))
        self.skip_linears = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(2 * width, width)}) for _ in range(pairs))
        self.final_layer = nn.ModuleDict(
            {"adaLN_modulation": modulation(width, 2), "linear": nn.Linear(width, patch * patch * channels)}
        )

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


# --- The diversity loss as released.


def diversity(
    features: list[Tensor],
    pairs: list[tuple[int, int]],
    weights: tuple[float, float, float],
    scale: float,
    lo: float,
    hi: float,
    coefficient: float,
    groups: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`losses.diversity.diversity_loss` with the forms of its preset `release`: the loss and its parts."""
    blocks = [f.float().unflatten(0, (groups, -1)).flatten(1, 2) for f in features]  # [g (b n) d]
    first, second = (list(side) for side in zip(*pairs, strict=True))

    means = F.normalize(torch.stack([f.mean(dim=1) for f in blocks]), dim=-1, eps=1e-8)  # [l g d]
    orthogonality = (means[first] * means[second]).sum(dim=-1).mean(dim=0)

    # Pair by pair, and the unit features never stored: compiled on a CPU less than half the time of indexing a stack.
    inverse = [1 / f.norm(dim=-1).clamp_min(1e-8) for f in blocks]
    cosines = [((blocks[i] * blocks[j]).sum(dim=-1) * inverse[i] * inverse[j]).mean(dim=-1) for i, j in pairs]
    mutual_information = torch.stack(cosines).abs().mean(dim=0)

    usage = torch.stack([f.abs().mean(dim=1) / f.norm(dim=1).clamp_min(1e-8) for f in blocks]).mean(dim=0)  # [g d]
    usage = usage / usage.amax(dim=-1, keepdim=True).clamp_min(1e-8)
    dispersion = -(usage.var(dim=-1, correction=0) / scale).clamp(0, 1)

    terms = {"orthogonality": orthogonality, "mutual_information": mutual_information, "dispersion": dispersion}
    loss = sum(weight * term for weight, term in zip(weights, terms.values(), strict=True))
    ramp = torch.where(loss > hi, 1.0, torch.where(loss > lo, (loss - lo) / hi, 0.0))
    weight = coefficient * ramp
    parts = terms | {"loss": loss, "weight": weight}
    return (weight * loss).mean(), {name: part.mean() for name, part in parts.items()}


# --- The training step.


class Program(NamedTuple):
    """run: so many steps, or batches of samples, on data that stay on the device. once: see `Twin`.

    compile: a step, or an evaluation of the network of each kind, so that all is compiled.
    """

    compile: Callable[[], None]
    run: Callable[[int], None]
    once: Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]


def load(network: SiT, job: dict[str, Any]) -> None:
    network.load_state_dict({name: torch.from_numpy(array) for name, array in job["params"].items()}, strict=True)


def build_network(job: dict[str, Any]) -> SiT:
    network = SiT(job["positions"], **job["network"])
    load(network, job)
    return network.to(job["device"])


def autocast(job: dict[str, Any]) -> torch.autocast:
    return torch.autocast(job["device"], torch.bfloat16, enabled=job["dtype"] == "bfloat16")


def on_device(job: dict[str, Any], array: np.ndarray) -> Tensor:
    """Images [b h w c] as torch has them, [b c h w]; all else as it is."""
    tensor = torch.from_numpy(array).to(job["device"])
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor


def compiled(job: dict[str, Any], function: Callable) -> Callable:
    # dynamic=False: the sampler's batch has two sizes, each with its own code
    return torch.compile(function, fullgraph=True, dynamic=False) if job["compile"] else function


def drawn(job: dict[str, Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, noise, t and the labels, some of them dropped."""
    if "moments" in batch:
        mean, std = batch["moments"].float().chunk(2, dim=1)
        x = (mean + std * torch.randn_like(mean) - job["bias"]) * job["scale"]
    else:
        x = batch["x"]
    draws = torch.rand(2, len(x), device=x.device)
    y = batch["y"].masked_fill(draws[1] < job["label_drop"], job["network"]["classes"])
    return x, torch.randn_like(x), draws[0], y


def training(job: dict[str, Any]) -> Program:
    network = build_network(job)
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

    def run(steps: int) -> None:
        for _ in range(steps):
            step(*state, *drawn(job, batch))

    def once(inputs: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
        load(network, job)
        optimizer, ema = optimizer_and_ema()
        given = [on_device(job, inputs[name]) for name in ("x", "noise", "t", "y")]
        for _ in range(steps):
            metrics = step(optimizer, ema, *given)
        names = [name for name, _ in network.named_parameters()]
        metrics |= {f"params/{name}": p.detach() for name, p in zip(names, params, strict=True)}
        metrics |= {f"ema/{name}": p for name, p in zip(names, ema, strict=True)}
        return {name: value.cpu().numpy() for name, value in metrics.items()}

    return Program(lambda: run(1), run, once)


# --- The sampler.


def sampling(job: dict[str, Any]) -> Program:
    """Euler-Maruyama for the linear path with w = 2 t, its last step without noise, as `samplers.euler_maruyama`."""
    network = build_network(job).eval()
    if job["dtype"] == "bfloat16":  # once, where autocast would cast them at every step
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
        both = torch.cat([y, torch.full_like(y, job["network"]["classes"])])
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
        kinds = {low <= t <= high: t for t in options["times"][:-1]}  # guided or not: a time of each
        for t in kinds.values():
            guided(normal(), t, labels)

    def run(batches: int) -> None:
        for _ in range(batches):
            sample(normal(), lambda i: normal(), labels)

    def once(inputs: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
        x, y = (on_device(job, inputs[name]) for name in ("x", "y"))
        x = sample(x, lambda i: on_device(job, inputs["noise"][i]), y)
        return {"x": x.permute(0, 2, 3, 1).cpu().numpy()}

    return Program(compile, run, once)


# --- The process.


def synchronize(job: dict[str, Any]) -> None:
    if job["device"] == "cuda":
        torch.cuda.synchronize()


def timed(job: dict[str, Any], function: Callable, *arguments: Any) -> float:
    """Wall seconds of a call, the device's work included."""
    synchronize(job)
    begin = time.perf_counter()
    function(*arguments)
    synchronize(job)
    return time.perf_counter() - begin


def started(job: dict[str, Any]) -> tuple[Program, dict[str, Any]]:
    """The program of a job, compiled, and the facts about it. What cannot be compiled runs uncompiled."""
    build = {"train": training, "sample": sampling}[job["kind"]]
    why = None if job["compile"] else "not asked for"
    if job["compile"]:
        try:
            program = build(job)
            seconds = timed(job, program.compile)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".split("\n\n")[0]  # without advice for developers of PyTorch
            torch._dynamo.reset()
    if why is not None:
        program = build(job | {"compile": False})
        seconds = timed(job, program.compile)
    cuda = job["device"] == "cuda"
    facts = {
        "torch": str(torch.__version__),  # of a class of torch's, which unpickling would import over there
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "compile": why is None,
        "why_not": why,
        "compile_s": seconds,
        "parameters": sum(array.size for array in job["params"].values()),
    }
    return program, facts


def serve(connection: Connection) -> None:
    """Answer calls (name, *arguments) with (value, None) or (None, error), until the other end closes.

    The first is `begin`, with the job; then `run`, `once` and `peak_bytes`.
    """
    program = None
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if name == "begin":
                (job,) = arguments
                if job["threads"]:
                    torch.set_num_threads(job["threads"])
                if job["device"] == "cuda":
                    torch.set_float32_matmul_precision("high")
                program, value = started(job)
                if job["device"] == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            elif name == "run":
                value = timed(job, program.run, *arguments)
            elif name == "once":
                value = program.once(*arguments)
            else:
                value = torch.cuda.max_memory_allocated() if job["device"] == "cuda" else None
        except Exception as error:
            connection.send((None, (f"{type(error).__name__}: {error}", traceback.format_exc())))
        else:
            connection.send((value, None))


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # else a process that torch.compile starts would keep the pipe open
    serve(Connection(descriptor))
