"""Read the pickle inside of a PyTorch file as data: nothing in it is run.

A pickle is a program for a small stack machine. Its opcodes build containers, numbers and strings. Two opcodes name any
importable object, and others call it. `pickle.Unpickler` can restrict the names, but it still calls `__setstate__`,
sets attributes, hashes any key, and sizes its memo by a number in the file. The machine here is smaller. It never
imports: a name is a token with a meaning in the tables below. It builds dicts, lists, tuples, numbers, strings and
`Tensor`. Everything else that a PyTorch file holds becomes `Foreign`, a name without content, so that an odd object
beside the weights (a path, a counter, a set) does no harm.

The opcodes are those of protocols 2 (which PyTorch writes) to 5, without extensions. A `Vocabulary` says what names
mean. PyTorch's is here; numpy's, which allows no foreign objects, is in `numpy_pickle`.
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
COPY = 8  # work of an element that a call copies: more than an opcode, because it takes no byte in the file
MAX_DIMS = 32

_INTEGERS = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
_NARROW = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = {name: np.dtype(name) for name in ("bool", *_INTEGERS, "float16", "float32", "float64")}
DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _NARROW}

_KINDS = {"Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64"}
_KINDS |= {"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64", "Untyped": "uint8"}
_STORAGES = {f"torch.{kind}Storage": dtype for kind, dtype in _KINDS.items()} | {
    "torch.storage.UntypedStorage": "uint8"
}


class Extent(NamedTuple):
    """Where a storage lies in the file, in bytes. crc: its checksum; 0: it has none (PyTorch can leave it out)."""

    start: int
    nbytes: int
    crc: int = 0

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class Storage(NamedTuple):
    """A run of numbers in the file. Tensors are views of it."""

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
        """Elements of the storage from the view's first to its last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) if self.size else 0


def contiguous(key: str, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """The C-contiguous tensor that fills the storage `key`."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Tensor(shape, dtype, strides, 0, Storage(key, dtype, math.prod(shape)))


class Namespace(dict):
    """The attributes of an argparse.Namespace, as a dict."""


class Foreign(NamedTuple):
    """An object that is not read, by the name of what makes it."""

    dotted: str


class _Name(NamedTuple):
    """A name from the file: of a function to call, or of the type of a storage. The tables say what it means."""

    dotted: str


def show(text: str) -> str:
    """Text of a file for an error message: escaped, and cut after 100 characters."""
    shown = text[:100].encode("unicode_escape").decode("ascii")
    return shown if len(text) <= 100 else f"{shown}..."


def is_sizes(value: Any) -> bool:
    """Whether this is a tuple of sizes or strides that an array can have."""
    return type(value) is tuple and all(type(n) is int and 0 <= n < 2**48 for n in value) and len(value) <= MAX_DIMS


def is_shape(value: Any) -> bool:
    """Whether numpy can make an array of this shape: it refuses some without elements, such as (0, 2^40, 2^40)."""
    return is_sizes(value) and math.prod(n or 1 for n in value) < 2**48


def _checked(value: Any, *types: type) -> Any:
    """`value`, if its type is exactly one of `types`."""
    if type(value) not in types:
        raise ValueError(f"{type(value).__name__} where {' or '.join(t.__name__ for t in types)} was expected")
    return value


def _put(mapping: Any, key: Any, value: Any) -> None:
    """Set mapping[key]. A key must hash in one step: nested tuples can take forever."""
    if type(key) in (tuple, bytes, Foreign):
        kind = getattr(key, "dotted", type(key).__name__)
        key, value = f"<{kind}>", Foreign(f"a key of type {kind}")
    _checked(mapping, dict, Namespace)[_checked(key, str, int, float, bool, type(None))] = value


def _extend(target: Any, items: list) -> None:
    if type(target) is not Foreign:
        _checked(target, list).extend(items)


def _update(target: Any, items: list) -> None:
    if type(target) is Foreign:
        return
    for key, value in zip(items[::2], items[1::2], strict=True):
        _put(target, key, value)


def _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> Tensor:
    dtype = str(_checked(storage, Storage).dtype)
    return _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    if metadata:
        raise ValueError("a tensor that is stored conjugated or negated")
    dtype = DTYPES[_checked(dtype, str).removeprefix("torch.")]
    if not (is_shape(shape) and is_sizes(strides) and is_sizes((offset,))) or len(shape) != len(strides):
        raise ValueError("a tensor of no sensible offset, shape and strides")
    tensor = Tensor(shape, dtype, strides, offset, _checked(storage, Storage))
    # It may not pass the end of its storage, nor (by strides of 0) be larger than it.
    if max((offset + tensor.span) * dtype.itemsize, tensor.nbytes) > storage.nbytes:
        raise ValueError(f"a tensor {dtype} {list(shape)} that does not fit into its storage of {storage.nbytes} bytes")
    return tensor


def _rebuild_parameter(tensor, requires_grad, hooks) -> Tensor:
    return _checked(tensor, Tensor)


def _ordered_dict(pairs: Any = ()) -> dict:
    """A dict of [key, value] pairs, as Python 2 wrote it. Later versions start empty and fill it by opcodes."""
    mapping = {}
    for key, value in _checked(pairs, list, tuple):
        _put(mapping, key, value)
    return mapping


def _device(kind: Any, index: Any = None) -> str:
    return _checked(kind, str) if index is None else f"{_checked(kind, str)}:{_checked(index, int)}"


_CALLS: dict[str, Callable] = {
    "argparse.Namespace": lambda: Namespace(),
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": lambda dims=(): _checked(dims, tuple),
    "torch.device": _device,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
}


def _build(target: Any, state: Any) -> None:
    """Set the attributes of a Namespace. Those of a state dict (its _metadata) and of foreign objects are dropped."""
    if type(_checked(target, dict, Namespace, Foreign)) is Namespace:
        for key, value in _checked(state, dict).items():
            target[_checked(key, str)] = value


def _stored(reference: Any) -> Storage | Foreign:
    """The storage of a persistent id: ("storage", type, key, device, elements); legacy files add a view, None."""
    match reference:
        case ("storage", _Name(kind), str(key), str(), int(size), *view) if kind in _STORAGES and view in ([], [None]):
            if is_sizes((size,)):
                return Storage(key, DTYPES[_STORAGES[kind]], size)
        case ("storage", Foreign() as kind, *_):  # of complex numbers, for example
            return kind
    raise ValueError("a persistent id that is not a whole storage")


class Vocabulary(NamedTuple):
    """What the names and opcodes of one kind of pickle mean.

    calls: name -> function to run. types: names that may only be arguments. constants: name -> value.
    build: (object, state) -> None, for the opcode BUILD. opcodes: those that are known, by their byte.
    foreign: whether all other names become `Foreign`; else they are an error.
    stored: persistent id -> object; None without the opcode BINPERSID.
    """

    calls: Mapping[str, Callable]
    types: Collection[str]
    constants: Mapping[str, Any]
    build: Callable[[Any, Any], None]
    stored: Callable[[Any], Any] | None
    opcodes: Mapping[bytes, Any]
    foreign: bool = False


# Opcodes that put a value on the stack: (machine, argument) -> value. Literals put their argument.
_VALUES: dict[str, Callable] = {
    "NONE": lambda machine, _: None,
    "NEWTRUE": lambda machine, _: True,
    "NEWFALSE": lambda machine, _: False,
    "EMPTY_DICT": lambda machine, _: {},
    "EMPTY_LIST": lambda machine, _: [],
    "EMPTY_TUPLE": lambda machine, _: (),
    "TUPLE1": lambda machine, _: tuple(machine.popped(1)),
    "TUPLE2": lambda machine, _: tuple(machine.popped(2)),
    "TUPLE3": lambda machine, _: tuple(machine.popped(3)),
    "TUPLE": lambda machine, _: tuple(machine.marked()),
    "BINGET": lambda machine, key: machine.memo[key],
    "LONG_BINGET": lambda machine, key: machine.memo[key],
    "GLOBAL": lambda machine, _: machine.named(machine.line(), machine.line()),
    "STACK_GLOBAL": lambda machine, _: machine.named(*machine.popped(2)),
    "REDUCE": lambda machine, _: machine.called(*machine.popped(2)),
    "NEWOBJ": lambda machine, _: machine.called(*machine.popped(2)),
    "NEWOBJ_EX": lambda machine, _: machine.called(*machine.popped(3)[:2]),
    "EMPTY_SET": lambda machine, _: machine.foreign("set"),
    "FROZENSET": lambda machine, _: machine.foreign("frozenset", machine.marked()),
    "DUP": lambda machine, _: machine.stack[-1],
    "BUILD": lambda machine, _: machine.built(*machine.popped(2)),
    "BINPERSID": lambda machine, _: machine.stored(*machine.popped(1)),
}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_LITERALS += ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_LITERALS += ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING")
# The other opcodes: (machine, argument) -> None.
_EFFECTS: dict[str, Callable] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "BINPUT": lambda machine, key: machine.memo.update({key: machine.stack[-1]}),
    "LONG_BINPUT": lambda machine, key: machine.memo.update({key: machine.stack[-1]}),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    "APPEND": lambda machine, _: machine.fill(_extend, 1),
    "APPENDS": lambda machine, _: machine.fill(_extend),
    "SETITEM": lambda machine, _: machine.fill(_update, 2),
    "SETITEMS": lambda machine, _: machine.fill(_update),
    "ADDITEMS": lambda machine, _: machine.fill(_extend),
    "POP": lambda machine, _: machine.popped(1),
    "POP_MARK": lambda machine, _: machine.marked(),
}
KNOWN = {"STOP", *_VALUES, *_LITERALS, *_EFFECTS}


def opcodes(names: Collection[str]) -> dict[bytes, Any]:
    """The opcodes of these names, by their byte."""
    return {op.code.encode("latin-1"): op for op in pickletools.opcodes if op.name in names}


_DTYPE_NAMES = {f"torch.{name}": f"torch.{name}" for name in DTYPES}
_TORCH = Vocabulary(_CALLS, _STORAGES, _DTYPE_NAMES, _build, _stored, opcodes(KNOWN), foreign=True)


def load(file: BufferedIOBase, words: Vocabulary = _TORCH, storages: dict[str, Storage] | None = None) -> Any:
    """The object of the pickle at the file's position, which moves behind the pickle. Storages are not read.

    storages: gets every storage that the pickle names, also in foreign objects, by its key.

    Strings and dtypes (torch.bfloat16) become str, OrderedDict becomes dict, argparse.Namespace becomes `Namespace`.
    Raises WeightsError, in one line without the file's name, for a pickle that is damaged or too large.
    """
    try:
        return _Machine(file, words, {} if storages is None else storages).run()
    except LookupError as error:
        raise WeightsError("its pickle cannot be read: an opcode that refers to nothing") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise WeightsError(f"its pickle cannot be read: {show(str(error))}") from error


class _Machine:
    """The stack machine. marks: heights of the stack at which a container begins. work: opcodes and copies so far."""

    def __init__(self, file: BufferedIOBase, words: Vocabulary, storages: dict[str, Storage]):
        self.file, self.words, self.storages = file, words, storages
        self.stack, self.marks, self.memo, self.work = [], [], {}, 0

    def run(self) -> Any:
        end = self.file.tell() + MAX_BYTES
        while self.work < MAX_WORK and self.file.tell() <= end:
            self.work += 1
            code = self.file.read(1)
            if not code:
                raise ValueError("it ends in the middle")
            if code not in self.words.opcodes:
                raise ValueError(f"opcode {code!r} where only tensors, containers and numbers are read")
            opcode = self.words.opcodes[code]
            # pickletools must not read GLOBAL: it undoes escapes in names and warns of those that it does not know.
            argument = opcode.arg.reader(self.file) if opcode.arg and opcode.name != "GLOBAL" else None
            if opcode.name == "STOP":
                return self.popped(1)[0]
            if opcode.name in _EFFECTS:
                _EFFECTS[opcode.name](self, argument)
            else:
                self.stack.append(_VALUES[opcode.name](self, argument) if opcode.name in _VALUES else argument)
        raise ValueError(f"it is more than {MAX_BYTES} bytes or {MAX_WORK} opcodes, copies counted")

    def popped(self, count: int) -> list:
        """The last `count` values, taken from the stack."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("an opcode that finds too little on the stack")
        items, self.stack[start:] = self.stack[start:], []
        return items

    def marked(self) -> list:
        """The values above the last mark, taken from the stack with the mark."""
        items = self.popped(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return items

    def fill(self, add: Callable[[Any, list], None], count: int | None = None) -> None:
        """Add values to the list or dict below them: the last `count`, by default all above the mark."""
        if count is None:
            items = self.marked()
        else:
            target, *items = self.popped(count + 1)
            self.stack.append(target)
        add(self.stack[-1], items)

    def line(self) -> str:
        return self.file.readline().removesuffix(b"\n").decode("utf-8")

    def named(self, module: Any, name: Any) -> Any:
        dotted = f"{_checked(module, str)}.{_checked(name, str)}"
        if dotted in self.words.calls or dotted in self.words.types:
            return _Name(dotted)
        if dotted in self.words.constants:
            return self.words.constants[dotted]
        return self.foreign(dotted)

    def foreign(self, dotted: str, content: Any = None) -> Foreign:
        """An object that is not read. `content` is dropped."""
        if not self.words.foreign:
            raise WeightsError(f"refuses to load {show(dotted)}: only tensors, containers and numbers are read")
        return Foreign(dotted)

    def stored(self, reference: Any) -> Storage | Foreign:
        found = self.words.stored(reference)
        if type(found) is Storage:
            self.storages.setdefault(found.key, found)
        return found

    def called(self, function: Any, args: Any) -> Any:
        self.work += COPY * sum(len(arg) for arg in _checked(args, tuple) if type(arg) in (list, tuple))
        if type(function) is Foreign:
            return function
        if type(function) is not _Name or function.dotted not in self.words.calls:
            raise ValueError(f"a call of {type(function).__name__}")
        unread = next((arg for arg in args if type(arg) is Foreign), None)  # a tensor of a foreign type is foreign
        return self.words.calls[function.dotted](*args) if unread is None else unread

    def built(self, target: Any, state: Any) -> Any:
        self.work += COPY * len(state) if type(state) is dict else 0
        self.words.build(target, state)
        return target
