"""FID's Inception: equal to the published one, read from every kind of file that holds it, and nothing else is read.

tests/data/inception.npz holds what torch-fidelity computes with weights that are made by a rule, `weights` below. Of
the images as the network sees them it holds every 13th row, in float16.
"""

import json
import re
import struct
import tempfile
import tracemalloc
import zlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

# The messages as TensorFlow declares them: written here by those, read by ours.
from tensorboard.compat.proto import graph_pb2, node_def_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.models import inception
from diversedit_jax.weights import inception as published
from diversedit_jax.weights import mapping as loading
from diversedit_jax.weights.formats import tf_graph
from diversedit_jax.weights.formats.tf_graph import open_graph
from tests import DATA
from tests.jaxprs import products
from tests.weights.test_weights_file import legacy, mapping, op, storage, tensor

ROWS = 13


@cache
def golden():
    with np.load(DATA / "inception.npz") as file:
        return {name: file[name] for name in file.files}


@cache
def target():
    return jax.eval_shape(inception.network().init, jax.random.key(0))


@cache
def shapes(layout):
    """Of every array in a layout."""
    found = {}
    for entry in published.entries(layout):
        leaf = target()
        for name in entry.place:
            leaf = leaf[name]
        found[entry.name] = entry.turn.theirs(np.broadcast_to(np.float32(0), leaf.shape)).shape
    return found


def weights(name, shape):
    """The rule by which the reference's weights were made."""
    seed = (zlib.crc32(name.encode()) + int(golden()["seed"])) % 2**32
    draw = np.random.RandomState(seed).randn(*shape)
    if name.endswith(("conv.weight", "fc.weight")):
        draw *= np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        draw = 1 + 0.1 * draw
    elif name.endswith("bn.running_var"):
        draw = np.exp(0.1 * draw)
    else:
        draw *= 0.1
    return draw.astype(np.float32)


@cache
def params():
    arrays = {name: weights(name, shape) for name, shape in shapes("torch").items()}
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), target())
    return loading.fill("inception", published.entries("torch"), arrays, empty)


@cache
def features(name):
    images = np.moveaxis(golden()[name], 1, -1)
    return jax.device_get(jax.jit(inception.network().apply)(params(), images))


def close(given, wanted):
    """Equal to 1e-5 of the largest value."""
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


# The network --------------------------------------------------------------------------------------------------------


def test_it_equals_the_published_network():
    found = features("images_nchw")
    close(found.pool, golden()["pool3"])
    close(found.logits, golden()["logits_unbiased"])
    close(found.spatial, golden()["spatial_mixed6d_branch1x1_first7_nhwc_flat"])


def test_it_equals_the_published_network_on_images_that_are_made_smaller():
    found = features("big_nchw")
    close(found.pool, golden()["big_pool3"])
    close(found.spatial, golden()["big_spatial"])


def test_images_are_resized_as_published():
    images = jnp.asarray(np.moveaxis(golden()["images_nchw"], 1, -1))
    found = np.asarray(inception.inputs(images))
    wanted = np.moveaxis(golden()["resized_input_299_rows_by_13"], 1, -1).astype(np.float32)
    np.testing.assert_allclose(found[:, ::ROWS], wanted, rtol=0, atol=2**-12 + 1e-6)  # half a step of float16 below 1
    np.testing.assert_array_equal(found, inception.inputs(images.astype(jnp.float32)))


@pytest.mark.parametrize("given", [1, 2, 64, 256, 299, 320, 512])
def test_resizing_is_that_of_tensorflow_1(given):
    x = np.random.default_rng(0).uniform(0, 255, given).astype(np.float32)
    wanted = np.empty(299, np.float32)
    for i in range(299):
        place = np.float32(i) * np.float32(np.float32(given) / np.float32(299))
        low = int(np.floor(place))
        high = min(low + 1, given - 1)
        wanted[i] = x[low] + (x[high] - x[low]) * (place - np.float32(low))
    np.testing.assert_allclose(inception.resize_weights(given) @ x, wanted, rtol=1e-6, atol=1e-4)


def test_images_of_the_network_s_size_stay_as_they_are():
    np.testing.assert_array_equal(inception.resize_weights(299), np.eye(299))


def test_it_has_the_published_size():
    leaves = jax.tree.leaves(target())
    # 94 convolutions, each with a norm of four vectors, and the classifier.
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (94 * 5 + 1, 23_884_384)
    statistics = sum(np.prod(shape) for name, shape in shapes("torch").items() if "running" in name)
    assert 23_884_384 - statistics + 1008 == 23_850_960  # as torch counts: no statistics, but the classifier's bias


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_the_precision_reaches_every_product(precision):
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    jaxpr = jax.make_jaxpr(inception.network(precision).apply)(target(), images)
    found = [eqn.params["precision"] for eqn in products(jaxpr.jaxpr)]
    highest, wanted = jax.lax.Precision.HIGHEST, getattr(jax.lax.Precision, precision.upper())
    assert found[:2] == [(highest, highest)] * 2  # the resizing
    assert len(found[2:]) == 94 + 1
    assert set(found[2:]) == {(wanted, wanted)}


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="inception: precision = 'bf16' is unknown; known: highest, high, default"):
        inception.network("bf16")


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 3, 64, 64), (1, 8, 8, 1), (1, 0, 8, 3)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ConfigError, match=re.escape(f"images of shape {list(shape)}: wanted [b h w 3]")):
        inception.network().apply(params(), jnp.zeros(shape))


# Its files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder():
    """Removed at once: a file has 95 MB."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


REST = {"fc.bias": np.ones(1008, np.float32), "AuxLogits.conv0.conv.weight": np.ones((2, 2), np.float32)}
TRACKED = "Conv2d_1a_3x3.bn.num_batches_tracked"


def write_safetensors(path):
    arrays = loading.written(published.entries("torch"), params())
    save_file(arrays | REST | {TRACKED: np.array(7)}, path)


def write_legacy(path):
    """As torch before 1.6 saved it."""
    arrays = loading.written(published.entries("torch"), params()) | REST | {TRACKED: np.array(7)}
    views, tail = {}, []
    for i, (name, array) in enumerate(arrays.items()):
        kind = {"float32": "FloatStorage", "int64": "LongStorage"}[array.dtype.name]
        strides = tuple(stride // array.itemsize for stride in array.strides)
        views[name] = tensor(array.shape, strides, where=storage(str(i), array.size, kind))
        tail += [struct.pack("<q", array.size), array.tobytes()]
    keys = op([str(i) for i in range(len(arrays))])
    legacy(path, mapping(**views), keys=keys, tail=b"".join(tail))


def write_graph(path):
    arrays = loading.written(published.entries("tensorflow"), params())
    rest = [
        constant("softmax/biases", np.ones(1008, np.float32)),
        constant("Sub/y", np.float32(128)),
        constant("ResizeBilinear/size", np.array([299, 299], np.int32)),
        node_def_pb2.NodeDef(name="conv/Conv2D", op="Conv2D", input=["Mul", "conv/conv2d_params"], device="/cpu:0"),
    ]
    graph(path, *rest, *(constant(name, array) for name, array in arrays.items()))


def constant(name, array=None, **change):
    """A node of a graph: an array as TensorFlow keeps it, or other fields of its tensor."""
    array = np.zeros((2, 3), np.float32) if array is None else array
    kind = {"float32": types_pb2.DT_FLOAT, "int32": types_pb2.DT_INT32}[array.dtype.name]
    fields = {"dtype": kind, "tensor_shape": sizes(*array.shape), "tensor_content": array.tobytes()} | change
    node = node_def_pb2.NodeDef(name=name, op="Const")
    node.attr["dtype"].type = kind
    node.attr["value"].tensor.CopyFrom(tensor_pb2.TensorProto(**fields))
    return node


def sizes(*shape, **options):
    return tensor_shape_pb2.TensorShapeProto(dim=[{"size": size} for size in shape], **options)


def filled(value, *shape):
    """The fields of a tensor with one value for all of it."""
    return {"tensor_content": b"", "float_val": [value], "tensor_shape": sizes(*shape)}


def graph(path, *nodes):
    path.write_bytes(graph_pb2.GraphDef(node=nodes, versions={"producer": 8}).SerializeToString())
    return path


@pytest.mark.parametrize("write", [write_safetensors, write_legacy, write_graph])
def test_every_kind_of_file_is_read(write, folder):
    write(folder / "weights")
    release = published.open_inception(folder / "weights")
    assert release.name == "weights"
    jax.tree.map(np.testing.assert_array_equal, release.read(), params())


def test_layers_have_their_names_in_both_layouts():
    """A pair for every rule of the naming, as public converters between the two have them."""
    names = {unit.torch: unit.tensorflow for unit in published.units()}
    assert len(names) == len(set(names.values())) == 94
    wanted = {
        "Conv2d_1a_3x3": "conv",
        "Conv2d_4a_3x3": "conv_4",
        "Mixed_5b.branch1x1": "mixed/conv",
        "Mixed_5b.branch5x5_2": "mixed/tower/conv_1",
        "Mixed_5c.branch3x3dbl_3": "mixed_1/tower_1/conv_2",
        "Mixed_5d.branch_pool": "mixed_2/tower_2/conv",
        "Mixed_6a.branch3x3": "mixed_3/conv",
        "Mixed_6a.branch3x3dbl_1": "mixed_3/tower/conv",
        "Mixed_6d.branch1x1": "mixed_6/conv",
        "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
        "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
        "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
        "Mixed_7b.branch3x3_1": "mixed_9/tower/conv",
        "Mixed_7b.branch3x3_2a": "mixed_9/tower/mixed/conv",
        "Mixed_7c.branch3x3dbl_2": "mixed_10/tower_1/conv_1",
        "Mixed_7c.branch3x3dbl_3b": "mixed_10/tower_1/mixed/conv_1",
        "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
    }
    assert {name: names[name] for name in wanted} == wanted


def refused(path, words, kind=ConfigError):
    with pytest.raises(kind, match=words) as error:
        published.open_inception(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def hollow(path, **change):
    """A safetensors file of the right arrays, changed; without numbers, which take no place on the disk."""
    found, end = {}, 0
    for name, shape in (shapes("torch") | change).items():
        if shape is not None:
            found[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * int(np.prod(shape))]}
            end = found[name]["data_offsets"][1]
    header = json.dumps(found).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


def test_torchvision_s_classifier_is_refused(tmp_path):
    path = hollow(tmp_path / "inception_v3_google.pth", **{"fc.weight": (1000, 2048), "fc.bias": (1000,)})
    refused(path, "torchvision's classifier of ImageNet, not FID's Inception.*pt_inception-2015-12-05-6726825d.pth")


def test_what_does_not_fit_is_named(tmp_path):
    name, path = "Mixed_7a.branch3x3_2.bn.running_var", tmp_path / "weights.safetensors"
    refused(hollow(path, **{name: None}), rf"the array {name} \[320\] is missing")
    refused(hollow(path, **{name: (4,)}), rf"{name} has shape \[4\], wanted \[320\]")
    refused(hollow(path, more=(3,)), r"the array more \[3\] is not known")


def test_a_graph_that_does_not_fit_is_refused(tmp_path):
    name, path = "mixed_8/tower/conv_1/batchnorm/moving_variance", tmp_path / "classify_image_graph_def.pb"
    for change, words in [
        ({name: None}, rf"the array {name} \[320\] is missing"),
        ({name: (4,)}, rf"{name} has shape \[4\], wanted \[320\]"),
    ]:
        every = {name: shape for name, shape in (shapes("tensorflow") | change).items() if shape is not None}
        refused(graph(path, *(constant(name, **filled(1, *shape)) for name, shape in every.items())), words)


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    wanted = "wanted .*; FID's Inception is pt_inception.* or classify_image_graph_def.pb"
    page, graph_file, empty = tmp_path / "page.pth", tmp_path / "graph.pb", tmp_path / "empty.pth"
    page.write_text("<!DOCTYPE html>\n<html>not found</html>\n")
    refused(page, f"is not a weight file: starts with .*{wanted}", WeightsError)
    graph(graph_file, constant("conv/conv2d_params"), constant("softmax/weights"))
    graph_file.write_bytes(graph_file.read_bytes()[:-9])
    refused(graph_file, "is no graph of TensorFlow, or is truncated or damaged; FID's Inception is", WeightsError)
    empty.touch()
    refused(empty, "is empty; FID's Inception is", WeightsError)
    refused(tmp_path, "is a folder", WeightsError)
    refused(tmp_path / "nowhere", "No such file", WeightsError)


# Graphs -------------------------------------------------------------------------------------------------------------


def test_the_constants_of_a_graph_are_read(tmp_path):
    line = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    values = {"tensor_content": b"", "float_val": line.reshape(-1).tolist()}
    nodes = [
        constant("bytes", line),
        constant("values", line, **values),
        constant("one", **filled(0.5, 4, 2)),
        constant("scalar", **filled(0.25)),
        constant("none", np.zeros((0, 3), np.float32)),
        constant("whole", np.array([1], np.int32)),
        node_def_pb2.NodeDef(name="input", op="Placeholder"),
        node_def_pb2.NodeDef(name="hollow", op="Const"),
    ]
    found = open_graph(graph(tmp_path / "graph.pb", *nodes))
    assert found.shapes == {"bytes": (2, 3), "values": (2, 3), "one": (4, 2), "scalar": (), "none": (0, 3)}
    assert list(found) == list(found.shapes)
    for name, wanted in {"bytes": line, "values": line, "one": np.full((4, 2), 0.5), "scalar": 0.25}.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, found.shapes[name])
        np.testing.assert_array_equal(found[name], wanted)
    assert found["none"].shape == (0, 3)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([constant("a", tensor_content=b"12345678")], r"a has 8 bytes, its shape \[2, 3\] wants 6 float32"),
        ([constant("a", tensor_content=b"", float_val=[1, 2])], r"a has 2 values, its shape \[2, 3\] wants 6"),
        ([constant("a", tensor_content=b"")], r"a has 0 values, its shape \[2, 3\] wants 6"),
        ([constant("a", float_val=[1])], "a holds its values twice"),
        ([constant("a", tensor_shape=sizes(-1, 3))], r"a has no shape that an array can have: \[-1, 3\]"),
        ([constant("a", tensor_shape=sizes(unknown_rank=True))], "a has no shape that an array can have"),
        ([constant("a", **filled(1, *[2] * 33))], "a has no shape that an array can have"),
        ([constant("a", **filled(1, 2**62, 2**62))], "a has no shape that an array can have"),
        ([constant("a", **filled(1, 0, 2**62))], "a has no shape that an array can have"),
        ([constant("a\nb"), constant("a\nb")], r"has two constants named a\\nb"),
        ([constant("a", np.array([1], np.int32))], "is a graph without constants of float32: wanted a frozen one"),
        ([], "is empty"),
    ],
)
def test_a_graph_that_lies_is_refused(tmp_path, nodes, words):
    path = graph(tmp_path / "graph.pb", *nodes)
    if not nodes:
        path.write_bytes(b"")
    with pytest.raises(WeightsError, match=words) as error:
        open_graph(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_size_in_a_graph_takes_no_memory(tmp_path):
    path = graph(tmp_path / "graph.pb", constant("a", **filled(1, 2**20, 2**20)))
    tracemalloc.start()
    try:
        assert open_graph(path)["a"].shape == (2**20, 2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**22


def test_a_damaged_graph_is_refused_or_read_and_nothing_else(tmp_path):
    path = graph(tmp_path / "graph.pb", constant("a"), constant("b", **filled(1, 4)), constant("c", np.float32(3)))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [whole[:n] for n in range(len(whole))]
    for _ in range(1000):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] = rng.integers(256)
        damaged.append(bytes(changed))
    read, refusals = 0, []
    for content in damaged:
        path.write_bytes(content)
        try:
            found = open_graph(path)
            assert all(found[name].shape == found.shapes[name] for name in found)
            read += 1
        except WeightsError as error:
            refusals.append(str(error))
    assert read
    assert refusals
    assert all(map(str.isprintable, refusals))


def test_a_folder_and_a_file_too_large_are_no_graphs(tmp_path):
    with pytest.raises(WeightsError, match="is a folder, not a file"):
        open_graph(tmp_path)
    with open(tmp_path / "large.pb", "wb") as file:
        file.truncate(tf_graph.MAX_BYTES)
    with pytest.raises(WeightsError, match="it has 2147483648 bytes, a graph fewer"):
        open_graph(tmp_path / "large.pb")
