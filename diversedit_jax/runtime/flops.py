"""What a program computes, and what a device could.

Counted are the products and convolutions of a function as it is traced, with 2 FLOPs for a multiply-add; what DiT and
its successors print as "Gflops" are multiply-adds, half of this. MFU is the share of a device's peak in bfloat16 that
this makes, whatever the matmuls' dtype (PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax

# TFLOP/s in bfloat16, dense, of one jax device, as its maker states it: by the beginning of `device_kind`, the first
# that fits. A chip of TPU v2, v3 and 7x is two devices.
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

    A scan counts as often as it turns, of a conditional the branch with the most. A loop with an unknown end counts
    once, and a kernel of its own (Pallas, cuDNN) not at all: trace a form without.
    """
    return _counted(jax.make_jaxpr(function)(*args).jaxpr)


def _counted(jaxpr: Any) -> int:
    return sum(_of_equation(eqn) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        contracted, _ = params["dimension_numbers"][0]
        return 2 * eqn.outvars[0].aval.size * prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        return 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    if name == "cond":
        return max(_counted(branch.jaxpr) for branch in params["branches"])
    inner = [value for param in params.values() for value in (param if isinstance(param, list | tuple) else [param])]
    found = [getattr(value, "jaxpr", value) for value in inner]
    turns = params["length"] if name == "scan" else 1
    return turns * sum(_counted(jaxpr) for jaxpr in found if hasattr(jaxpr, "eqns"))


def peak(device_kind: str) -> float | None:
    """TFLOP/s that a device of this kind could do in bfloat16, None if it is not known."""
    return next((value for kind, value in PEAKS.items() if device_kind.startswith(kind)), None)


def rates(work: int | float, steps_per_sec: float, device_kind: str, devices: int) -> dict[str, float]:
    """`tflops_per_device`, and `mfu` where the peak is known, of steps of `work` FLOPs over so many devices."""
    tflops = work * steps_per_sec / devices / 1e12
    most = peak(device_kind)
    return {"tflops_per_device": tflops} | ({"mfu": tflops / most} if most else {})
