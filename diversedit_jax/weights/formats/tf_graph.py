"""The constants of a frozen TensorFlow graph (GraphDef, .pb), without TensorFlow.

A GraphDef is a message of protocol buffers: a list of nodes, each with a name, an operation and attributes. A node
`Const` has its tensor in the attribute `value`. FIELDS declares the fields that are read, by TensorFlow's numbers.
Parsing skips the others.
"""

import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from diversedit_jax.errors import WeightsError, check_machine
from diversedit_jax.reading import RegularFile
from diversedit_jax.weights.formats import NamedArrays
from diversedit_jax.weights.formats.torch_pickle import MAX_DIMS, show

DT_FLOAT = 1
MAX_BYTES = 1 << 31  # of a message of protocol buffers
MAX_SIZE = 1 << 40  # elements of an array: far more than any file names, far less than numpy refuses to count

# (message, field, number, kind): a kind of protocol buffers or another message; [] means any number of them.
FIELDS = [
    ("GraphDef", "node", 1, "NodeDef[]"),
    ("NodeDef", "name", 1, "string"),
    ("NodeDef", "op", 2, "string"),
    ("NodeDef", "attr", 5, "Attr[]"),
    ("Attr", "key", 1, "string"),
    ("Attr", "value", 2, "AttrValue"),
    ("AttrValue", "tensor", 8, "TensorProto"),
    ("TensorProto", "dtype", 1, "int32"),
    ("TensorProto", "tensor_shape", 2, "TensorShapeProto"),
    ("TensorProto", "tensor_content", 4, "bytes"),
    ("TensorProto", "float_val", 5, "float[]"),
    ("TensorShapeProto", "dim", 2, "Dim[]"),
    ("TensorShapeProto", "unknown_rank", 3, "bool"),
    ("Dim", "size", 1, "int64"),
]


@cache
def messages() -> SimpleNamespace:
    """The classes of the messages in FIELDS, by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="graph_def.proto", package="graph_def", syntax="proto3")
    declared = {name: file.message_type.add(name=name) for name in dict.fromkeys(message for message, *_ in FIELDS)}
    Field = descriptor_pb2.FieldDescriptorProto
    for message, name, number, kind in FIELDS:
        field = declared[message].field.add(name=name, number=number)
        field.label = Field.LABEL_REPEATED if kind.endswith("[]") else Field.LABEL_OPTIONAL
        kind = kind.removesuffix("[]")
        if kind in declared:
            field.type, field.type_name = Field.TYPE_MESSAGE, f".graph_def.{kind}"
        else:
            field.type = Field.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # our own: TensorFlow may have its messages in that of the process
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"graph_def.{name}") for name in declared}
    return SimpleNamespace(**{name: message_factory.GetMessageClass(found[name]) for name in declared})


class Constants(NamedArrays):
    """The float32 constants of a graph by the names of their nodes, as read-only arrays."""

    def __init__(self, graph: Any):
        self._tensors = {}
        for node in graph.node:
            if node.op == "Const":
                value = next((attr.value.tensor for attr in node.attr if attr.key == "value"), None)
                if node.name in self._tensors:
                    raise WeightsError(f"has two constants named {show(node.name)}")
                if value is not None and value.dtype == DT_FLOAT:
                    self._tensors[node.name] = value
        if not self._tensors:
            raise WeightsError("is a graph without constants of float32: wanted a frozen one")
        self.shapes = {name: _shape(name, tensor) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor, shape = self._tensors[name], self.shapes[name]
        if tensor.tensor_content:
            return np.frombuffer(tensor.tensor_content, "<f4").reshape(shape)
        values = np.array(tensor.float_val, np.float32)
        # One value may stand for a whole array. It is not repeated in memory: the shape may be of any size.
        return np.broadcast_to(values[0], shape) if len(values) == 1 else values.reshape(shape)


def starts(path: Path) -> bool:
    """Whether a file starts as a graph does, with a node. The length in a safetensors file may look the same."""
    try:
        with RegularFile(path) as file:
            head = file.read(9)
    except OSError:
        return False
    return head[:1] == b"\n" and head[4:] != b"\0\0\0\0{"


def open_graph(path: str | Path) -> Constants:
    """The float32 constants of the frozen graph in a file. The whole graph stays in memory.

    Raises WeightsError, in one line, for what is no graph, is damaged, or holds an array that does not fit its shape.
    """
    from google.protobuf.message import DecodeError

    path = Path(path)
    try:
        with RegularFile(path) as file:
            if not file.size:
                raise WeightsError("is empty")
            if file.size >= MAX_BYTES:
                words = f"it has {file.size} bytes, a graph fewer than {MAX_BYTES}"
                raise WeightsError(f"is no graph of TensorFlow: {words}")
            graph = messages().GraphDef()
            graph.ParseFromString(file.read())
        return Constants(graph)
    except DecodeError as error:
        raise WeightsError(f"{path}: is no graph of TensorFlow, or is truncated or damaged") from error
    except (WeightsError, OSError, MemoryError) as error:
        check_machine(error)
        raise WeightsError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _shape(name: str, tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor; WeightsError if its values do not fill it."""
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    size = math.prod(shape)
    possible = len(shape) <= MAX_DIMS and min(shape, default=0) >= 0 and math.prod(max(n, 1) for n in shape) <= MAX_SIZE
    if tensor.tensor_shape.unknown_rank or not possible:
        raise WeightsError(f"{show(name)} has no shape that an array can have: {show(str(list(shape)))}")
    content, values = len(tensor.tensor_content), len(tensor.float_val)
    if content and values:
        raise WeightsError(f"{show(name)} holds its values twice")
    if content != 4 * size if content else values not in (1, size):
        given = f"{content} bytes" if content else f"{values} values"
        raise WeightsError(f"{show(name)} has {given}, its shape {show(str(list(shape)))} wants {size} float32")
    return shape
