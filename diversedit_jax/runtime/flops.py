"""The FLOPs of a program, and the peak of a device.

Products and convolutions of a function are counted as it is traced, a multiply-add as 2 FLOPs. The "Gflops" of DiT and
its successors are multiply-adds, half as many. MFU is the share of a device's peak in bfloat16, whatever the dtype
(PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax

# Dense bfloat16 TFLOP/s of one jax device, as its maker states them, by the beginning of `device_kind`. The first that
# fits counts. A chip of TPU v2, v3 or 7x is two devices.
PEAKS = {
    "TPU v2": 23.0,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU7x": 1153.5,
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


def of(function: Callable, *args: Any) -> int:
    """The FLOPs of `function(*args)`; arrays may be jax.ShapeDtypeStructs.

    Every turn of a scan counts, and the largest branch of a conditional. A while loop counts once. Custom kernels
    (Pallas, cuDNN) do not count at all: trace a form without them.
    """
    return _counted(jax.make_jaxpr(function)(*args).jaxpr)


def _counted(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            contracted, _ = params["dimension_numbers"][0]
            total += 2 * eqn.outvars[0].aval.size * prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size // outputs
        elif name == "cond":
            total += max(_counted(branch.jaxpr) for branch in params["branches"])
        else:
            turns = params["length"] if name == "scan" else 1
            inner = [part for x in params.values() for part in (x if isinstance(x, list | tuple) else [x])]
            found = [getattr(part, "jaxpr", part) for part in inner]
            total += turns * sum(_counted(part) for part in found if hasattr(part, "eqns"))
    return total


def peak(device_kind: str) -> float | None:
    """The peak of a device of this kind, bfloat16 TFLOP/s; None if it is not known."""
    return next((value for kind, value in PEAKS.items() if device_kind.startswith(kind)), None)


def rates(work: int | float, steps_per_sec: float, device_kind: str, devices: int) -> dict[str, float]:
    """`tflops_per_device`, and `mfu` if the peak is known, for steps of `work` FLOPs on all devices together."""
    tflops = work * steps_per_sec / devices / 1e12
    most = peak(device_kind)
    return {"tflops_per_device": tflops} | ({"mfu": tflops / most} if most else {})
