"""Read a pickle of numpy arrays in containers as data, by the machine of `torch_pickle`: nothing in it is run.

numpy pickles an array as a call of `_reconstruct` and a state (version, shape, dtype, Fortran order, bytes), or with
protocol 5 as a call of `_frombuffer`. It pickles a dtype as a call of `dtype` and a state (version, byte order, ...).
"""

import io
import math
from typing import Any

import numpy as np

from diversedit_jax.errors import WeightsError
from diversedit_jax.weights.formats import torch_pickle
from diversedit_jax.weights.formats.torch_pickle import KNOWN, Vocabulary

KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class _DType:
    """A dtype. Its state sets the byte order."""

    def __init__(self, kind: str):
        self.kind, self.order = kind, "|"


class _Array:
    """An array. Its state sets the value."""

    def __init__(self, value: np.ndarray | None = None):
        self.value = value


def _dtype(kind: Any, align: Any = False, copy: Any = True) -> _DType:
    if kind not in KINDS:
        raise ValueError("a dtype that is not of plain numbers")
    return _DType(kind)


def _array(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """The array of these bytes; ValueError if they do not fill its shape."""
    if type(content) not in (bytes, bytearray) or type(dtype) is not _DType or type(shape) is not tuple:
        raise ValueError("an array without bytes, dtype and shape")
    given = np.dtype(dtype.kind).newbyteorder(dtype.order)
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * given.itemsize != len(content):
        raise ValueError(f"an array {given} {shape} of {len(content)} bytes")
    return np.frombuffer(content, given).reshape(shape, order=order).astype(given.newbyteorder("="))


def _build(target: Any, state: Any) -> None:
    if type(target) is _DType and type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "|", "="):
        target.order = state[1]
    elif type(target) is _Array and type(state) is tuple and len(state) == 5:
        target.value = _array(state[4], state[2], state[1], "F" if state[3] else "C")
    else:
        raise ValueError(f"a state of {type(target).__name__}")


_MODULES = ("numpy.core", "numpy._core")
_CALLS = {"numpy.dtype": _dtype}
_CALLS |= {f"{module}.multiarray._reconstruct": lambda kind, shape, code: _Array() for module in _MODULES}
_CALLS |= {f"{module}.numeric._frombuffer": lambda *state: _Array(_array(*state)) for module in _MODULES}
_OPCODES = torch_pickle.opcodes(KNOWN - {"BINPERSID"})
_NUMPY = Vocabulary(_CALLS, ("numpy.ndarray",), {}, _build, None, _OPCODES)


def load(content: bytes) -> dict[Any, Any]:
    """The pickled dict. Arrays in it, or in dicts below it, are contiguous and in the machine's byte order.

    Raises WeightsError, in one line, for everything else that the pickle holds.
    """
    tree = torch_pickle.load(io.BytesIO(content), _NUMPY)
    if type(tree) is not dict:
        raise WeightsError(f"its pickle is of a {type(tree).__name__}, wanted a dict")
    return _finished(tree)


def _finished(tree: Any) -> Any:
    if type(tree) is dict:
        return {name: _finished(value) for name, value in tree.items()}
    return tree.value if type(tree) is _Array else tree
