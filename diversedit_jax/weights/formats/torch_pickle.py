"""The pickle inside of a PyTorch file, read as data.

A pickle is a program for a small stack machine: opcodes build containers, numbers and strings, two of them name any
importable object, and others call it. `pickle.Unpickler` restricts what is named, but still calls `__setstate__`, sets
attributes, hashes any key, and sizes its memo by a number in the file. This machine is smaller than the restrictions:
it never imports, a name is a token with a meaning in the tables below or an error, and what it builds are dicts, lists,
tuples, numbers, strings and `Tensor`. PyTorch's own `weights_only` reader is built alike.

Opcodes: those of protocols 2 (which PyTorch writes) to 5, without bytes, sets, cycles of tuples and classes. What names
mean is a `Vocabulary`: that of PyTorch is here, that of numpy, which has bytes, in `numpy_pickle`.
"""

import math
import pickletools
from collections.abc import Callable, Collection, Mapping
from io import BufferedIOBase
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diversedit_jax.errors import WeightsError

# A SiT-XL/2 with its EMA and optimizer state has about 0.2 MB of pickle, 60 thousand opcodes; the rest is tensors.
MAX_BYTES = 1 << 26
MAX_WORK = 1 << 22
COPY = 8  # work of an element that a call copies: more than an opcode, as it takes no byte in the file
MAX_DIMS = 32

_INTEGERS = {
    name: np.dtype(name) for name in ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
}
_FLOATS = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
_NARROW = {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
DTYPES = {"bool": np.dtype(bool), **_INTEGERS, **_FLOATS, **_NARROW}

_STORAGES = {
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}


class Storage(NamedTuple):
    """A run of numbers in the file, which tensors are views of."""

    key: str
    dtype: np.dtype
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class Tensor(NamedTuple):
    """A tensor that has not been read: a view of a storage, with strides and offset in elements as PyTorch counts."""

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]
    offset: int
    storage: Storage

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements from the first to the last one, those between the view's included."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) if self.size else 0

    def __repr__(self) -> str:
        return f"Tensor({self.dtype} {list(self.shape)})"


class Namespace(dict):
    """What argparse.Namespace held, as a dict."""


class _Name(NamedTuple):
    """A name that the file calls or takes as the type of a storage; it means what the tables say."""

    dotted: str


def show(text: str) -> str:
    """Text of a file as a piece of one line."""
    shown = text[:100].encode("unicode_escape").decode("ascii")
    return shown if len(text) <= 100 else f"{shown}..."


def _is_sizes(value: Any) -> bool:
    return type(value) is tuple and all(type(n) is int and 0 <= n < 2**48 for n in value) and len(value) <= MAX_DIMS


def _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> Tensor:
    dtype = str(_checked(storage, Storage).dtype)
    return _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    if metadata:
        raise ValueError("a tensor that is stored conjugated or negated")
    dtype = DTYPES[_checked(dtype, str).removeprefix("torch.")]
    if not all(map(_is_sizes, ((offset,), shape, strides))) or len(shape) != len(strides):
        raise ValueError("a tensor of no sensible offset, shape and strides")
    tensor = Tensor(shape, dtype, strides, offset, _checked(storage, Storage))
    # Neither past the end of its storage nor, with strides of 0, larger than it.
    if max((offset + tensor.span) * dtype.itemsize, tensor.nbytes) > storage.nbytes:
        raise ValueError(f"a tensor {dtype} {list(shape)} that does not fit into its storage of {storage.nbytes} bytes")
    return tensor


def _rebuild_parameter(tensor, requires_grad, hooks) -> Tensor:
    return _checked(tensor, Tensor)


def _namespace() -> Namespace:
    return Namespace()


def _ordered_dict(pairs: Any = ()) -> dict:
    """An empty one, which opcodes fill, or as Python 2 wrote it, of a list of [key, value]."""
    mapping = {}
    for key, value in _checked(pairs, list, tuple):
        _put(mapping, key, value)
    return mapping


def _size(dims: Any = ()) -> tuple:
    return _checked(dims, tuple)


def _device(kind: Any, index: Any = None) -> str:
    return _checked(kind, str) if index is None else f"{_checked(kind, str)}:{_checked(index, int)}"


_CALLS: dict[str, Callable] = {
    "argparse.Namespace": _namespace,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
}


def _checked(value: Any, *types: type) -> Any:
    """The value, if it is of one of the types exactly."""
    if type(value) not in types:
        raise ValueError(f"{type(value).__name__} where {' or '.join(t.__name__ for t in types)} was expected")
    return value


def _put(mapping: Any, key: Any, value: Any) -> None:
    """mapping[key] = value for keys that hash in one step: nested tuples can take forever."""
    _checked(mapping, dict, Namespace)[_checked(key, str, int, float, bool, type(None))] = value


class Vocabulary(NamedTuple):
    """What the names and opcodes of a kind of pickle mean.

    calls: names that may be called. types: names that may be handed on. constants: names that stand for a value.
    build: (object, state) -> None, the opcode BUILD. stored: of a persistent id. opcodes: by their byte.
    """

    calls: Mapping[str, Callable]
    types: Collection[str]
    constants: Mapping[str, Any]
    build: Callable[[Any, Any], None]
    stored: Callable[[Any], Any]
    opcodes: Mapping[bytes, Any]


def _named(words: Vocabulary, module: Any, name: Any) -> Any:
    dotted = f"{_checked(module, str)}.{_checked(name, str)}"
    if dotted in words.calls or dotted in words.types:
        return _Name(dotted)
    if dotted in words.constants:
        return words.constants[dotted]
    raise WeightsError(f"refuses to load {show(dotted)}: only tensors, containers and numbers are read")


def _called(words: Vocabulary, function: Any, args: tuple) -> Any:
    if type(function) is not _Name or function.dotted not in words.calls:
        raise ValueError(f"a call of {type(function).__name__}")
    return words.calls[function.dotted](*args)


def _build(target: Any, state: Any) -> None:
    """The attributes of an object: those of a Namespace are kept, those of a state dict (its _metadata) are not."""
    _checked(target, dict, Namespace)
    if type(target) is Namespace:
        for key, value in _checked(state, dict).items():
            target[_checked(key, str)] = value


def _stored(reference: Any) -> Storage:
    """The storage of a persistent id: ("storage", type, key, device, elements), in legacy files and a view, None."""
    match reference:
        case ("storage", _Name(kind), str(key), str(), int(size), *view) if kind in _STORAGES and view in ([], [None]):
            if _is_sizes((size,)):
                return Storage(key, DTYPES[_STORAGES[kind]], size)
    raise ValueError("a persistent id that is not a whole storage")


_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_STRINGS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARKED = ("MARK", "TUPLE", "APPENDS", "SETITEMS")
_SINGLE = ("EMPTY_DICT", "EMPTY_LIST", "APPEND", "SETITEM", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID")
_MEMO = ("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET")
_OTHERS = ("PROTO", "FRAME", "STOP", "GLOBAL", "STACK_GLOBAL")
KNOWN = {*_LITERALS, *_STRINGS, *_CONSTANTS, *_TUPLES, *_MARKED, *_SINGLE, *_MEMO, *_OTHERS}


def opcodes(names: Collection[str]) -> dict[bytes, Any]:
    """Opcodes by their byte."""
    return {op.code.encode("latin-1"): op for op in pickletools.opcodes if op.name in names}


_TORCH = Vocabulary(
    _CALLS, _STORAGES, {f"torch.{name}": f"torch.{name}" for name in DTYPES}, _build, _stored, opcodes(KNOWN)
)


def load(file: BufferedIOBase, words: Vocabulary = _TORCH) -> Any:
    """The object of the pickle at the file's position, which is left behind it; storages are not read.

    Strings and dtypes (torch.bfloat16) come as str, OrderedDict as dict, argparse.Namespace as `Namespace`.
    Raises WeightsError, in one line without the file's name, for whatever else the pickle holds or lacks.
    """
    try:
        return _run(file, words)
    except LookupError as error:
        raise WeightsError("its pickle cannot be read: an opcode that refers to nothing") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise WeightsError(f"its pickle cannot be read: {show(str(error))}") from error


def _run(file: BufferedIOBase, words: Vocabulary) -> Any:
    stack, marks, memo = [], [], {}
    end = file.tell() + MAX_BYTES
    work = 0

    def popped(count: int) -> list:
        if count > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("an opcode that finds too little on the stack")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def marked() -> list:
        items = popped(len(stack) - marks[-1])
        marks.pop()
        return items

    while (work := work + 1) <= MAX_WORK and file.tell() <= end:
        code = file.read(1)
        if not code:
            raise ValueError("it ends in the middle")
        if code not in words.opcodes:
            raise ValueError(f"opcode {code!r} where only tensors, containers and numbers are read")
        opcode = words.opcodes[code]
        name = opcode.name
        argument = opcode.arg.reader(file) if opcode.arg and name != "GLOBAL" else None
        match name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return popped(1)[0]
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(popped(_TUPLES[name])))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(marked()))
            case "APPEND":
                target, item = popped(2)
                _checked(target, list).append(item)
                stack.append(target)
            case "APPENDS":
                items = marked()
                _checked(stack[-1], list).extend(items)
            case "SETITEM":
                target, key, value = popped(3)
                _put(target, key, value)
                stack.append(target)
            case "SETITEMS":
                items = marked()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _put(stack[-1], key, value)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                # Not by pickletools, which undoes escapes in names, with a warning for those it does not know.
                stack.append(_named(words, *(file.readline().removesuffix(b"\n").decode("utf-8") for _ in range(2))))
            case "STACK_GLOBAL":
                stack.append(_named(words, *popped(2)))
            case "REDUCE" | "NEWOBJ":
                function, args = popped(2)
                work += COPY * sum(len(arg) for arg in _checked(args, tuple) if type(arg) in (list, tuple))
                stack.append(_called(words, function, args))
            case "BUILD":
                target, state = popped(2)
                work += COPY * len(state) if type(state) is dict else 0
                words.build(target, state)
                stack.append(target)
            case "BINPERSID":
                stack.append(words.stored(popped(1)[0]))
            case _:  # numbers, strings and bytes
                stack.append(argument)
    raise ValueError(f"it is more than {MAX_BYTES} bytes or {MAX_WORK} opcodes, copies counted")
