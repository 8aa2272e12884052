"""Weight files: what PyTorch wrote is read exactly and lazily, and no file runs code, exhausts memory, or hangs.

tests/data/weights_zip.pt and weights_legacy.pt were written by PyTorch 2.13.0, from `saved_by_torch` below:

    torch.save(saved_by_torch(torch), "weights_zip.pt")
    torch.save(saved_by_torch(torch), "weights_legacy.pt", _use_new_zipfile_serialization=False)
"""

import argparse
import builtins
import functools
import io
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import Counter, OrderedDict, defaultdict
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diversedit_jax.errors import WeightsError
from diversedit_jax.weights.dit import open_release
from diversedit_jax.weights.formats import torch_pickle, weights_file
from diversedit_jax.weights.formats.weights_file import open_weights, write_safetensors
from tests import DATA

FIXTURES = [DATA / "weights_zip.pt", DATA / "weights_legacy.pt"]
LINE = np.arange(24, dtype=np.float32).reshape(4, 6)


def saved_by_torch(torch):
    """A training checkpoint in small: what trainers save, and every kind of tensor."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(6.0).reshape(2, 3) / 4)
        linear.bias.copy_(torch.tensor([-1.0, 0.5]))
    ema = OrderedDict(
        parameter=torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) * 2),
        whole=base,
        transposed=base.t(),
        window=base[1:3, 1::2],
        tied=base,
        bf16=torch.tensor([1.0, -2.5, 3e38]).bfloat16(),
        f16=torch.tensor([0.5, 65504.0]).half(),
        f64=torch.tensor([1 / 3], dtype=torch.float64),
        i64=torch.tensor([-(2**62), 7]),
        i32=torch.tensor([[-5]], dtype=torch.int32),
        i16=torch.tensor([-300], dtype=torch.int16),
        i8=torch.tensor([-8], dtype=torch.int8),
        u8=torch.tensor([200], dtype=torch.uint8),
        flag=torch.tensor([True, False, True]),
        scalar=torch.tensor(2.25),
        empty=torch.empty(0, 4),
        f8=torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn),
        u16=torch.tensor([65535], dtype=torch.uint16),
    )
    opt = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}],
    }
    args = argparse.Namespace(
        model="SiT-XL/2",
        lr=1e-4,
        resume=None,
        fused=True,
        size=torch.Size([2, 3]),
        dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
    )
    return {"model": linear.state_dict(), "ema": ema, "opt": opt, "args": args, "steps": 400000}


WANTED = {
    "model.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
    "model.bias": np.float32([-1, 0.5]),
    "ema.parameter": np.arange(6, dtype=np.float32).reshape(2, 3) * 2,
    "ema.whole": LINE,
    "ema.transposed": LINE.T,
    "ema.window": LINE[1:3, 1::2],
    "ema.tied": LINE,
    "ema.bf16": np.array([1, -2.5, 3e38], jnp.bfloat16),
    "ema.f16": np.float16([0.5, 65504]),
    "ema.f64": np.float64([1 / 3]),
    "ema.i64": np.int64([-(2**62), 7]),
    "ema.i32": np.int32([[-5]]),
    "ema.i16": np.int16([-300]),
    "ema.i8": np.int8([-8]),
    "ema.u8": np.uint8([200]),
    "ema.flag": np.array([True, False, True]),
    "ema.scalar": np.array(2.25, np.float32),
    "ema.empty": np.zeros((0, 4), np.float32),
    "ema.f8": np.array([1, -448], jnp.float8_e4m3fn),
    "ema.u16": np.uint16([65535]),
    "opt.state.0.step": np.array(3, np.float32),
    "opt.state.0.exp_avg": np.ones((2, 3), np.float32),
}


def assert_same(given: np.ndarray, wanted: np.ndarray, name: str = ""):
    assert (given.dtype, given.shape) == (wanted.dtype, wanted.shape), name
    assert given.tobytes() == wanted.tobytes(), f"{name}: {given} is not {wanted}"


# The formats, written without torch ---------------------------------------------------------------------------------


def op(value) -> bytes:
    """Opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def finished(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def storage(key="0", size=6, kind="FloatStorage", view=b"") -> bytes:
    return b"(" + op("storage") + f"ctorch\n{kind}\n".encode() + op(key) + op("cpu") + op(size) + view + b"tQ"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, where=None, tail=b"") -> bytes:
    where = storage() if where is None else where
    view = op(offset) + op(shape) + op(strides) + op(False) + ORDERED_DICT + tail
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + where + view + b"tR"


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(op(name) + value for name, value in values.items()) + b"u"


def zipped(path: Path, body: bytes, storages=None, byteorder="little", entries=(), **options) -> Path:
    """A PyTorch zip file of a pickle's body and the bytes of its storages."""
    storages = {"0": np.arange(6, dtype=np.float32).tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", finished(body))
        archive.writestr("archive/byteorder", byteorder)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in entries:
            archive.writestr(name, content)
    return path


def legacy(path: Path, body: bytes, info: bytes = b"}", keys: bytes | None = None, tail: bytes | None = None) -> Path:
    """A legacy PyTorch file of a pickle's body and one storage "0" of six floats."""
    head = finished(op(0x1950A86A20F9469CFC6C)) + finished(op(1001)) + finished(info)
    tail = struct.pack("<q6f", 6, *range(6)) if tail is None else tail
    path.write_bytes(head + finished(body) + finished(op(["0"]) if keys is None else keys) + tail)
    return path


def refused(path: Path, match: str) -> None:
    """The file ends in one line that starts with its name."""
    with pytest.raises(WeightsError, match=match) as caught, open_weights(path) as weights:
        dict(weights)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(path)) + 400


@contextmanager
def bounded(seconds: float = 20, mib: float = 64):
    """What runs inside takes neither long nor much memory."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        yield
        took, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert took < seconds, f"took {took:.1f} s"
    assert peak < mib, f"took {peak:.1f} MiB"


# What PyTorch wrote -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_kind_of_tensor_is_read_exactly(path):
    with open_weights(path) as weights:
        assert weights.names() == list(weights) == list(WANTED)
        assert len(weights) == len(WANTED)
        for name, wanted in WANTED.items():
            array = weights[name]
            assert_same(array, wanted, name)
            assert array.flags.c_contiguous
            assert array.flags.writeable


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_the_tree_holds_everything_else_as_plain_data(path):
    with open_weights(path) as weights:
        tree = weights.tree
    assert list(tree) == ["model", "ema", "opt", "args", "steps"]
    assert tree["steps"] == 400000
    assert tree["opt"]["param_groups"] == [{"lr": 1e-4, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}]
    assert isinstance(tree["args"], torch_pickle.Namespace)
    assert dict(tree["args"]) == {
        "model": "SiT-XL/2",
        "lr": 1e-4,
        "resume": None,
        "fused": True,
        "size": (2, 3),
        "dtype": "torch.bfloat16",
        "device": "cuda:0",
    }
    assert tree["ema"]["window"][:2] == ((2, 3), np.float32)
    assert tree["ema"]["tied"].storage == tree["ema"]["window"].storage


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_a_part_of_the_tree_is_read_by_its_prefix(path):
    with open_weights(path) as weights:
        assert weights.names("model") == ["model.weight", "model.bias"]
        assert weights.names("model.bias") == ["model.bias"]
        assert weights.names("mod") == []
        model = {name: weights[name] for name in weights.names("model")}
        assert "ema.scalar" in weights
        assert "scalar" not in weights
        with pytest.raises(WeightsError, match=r"no tensor 'pos_embed', it has model.weight, .* and 16 others"):
            weights["pos_embed"]
    model["model.bias"] += 1  # ours, also after the file is closed
    np.testing.assert_array_equal(model["model.bias"], [0, 1.5])


def test_a_file_is_known_by_its_content_not_its_name(tmp_path):
    write_safetensors(tmp_path / "a.pt", {"x": LINE})
    for source in [*FIXTURES, tmp_path / "a.pt"]:
        (tmp_path / "b.safetensors").write_bytes(source.read_bytes())
        with open_weights(str(tmp_path / "b.safetensors")) as weights:
            assert len(dict(weights)) in (1, len(WANTED))


def test_a_saved_tensor_or_list_has_names_too(tmp_path):
    with open_weights(zipped(tmp_path / "a.pt", tensor())) as weights:
        assert weights.names() == [""]
        assert_same(weights[""], np.arange(6, dtype=np.float32).reshape(2, 3))
    with open_weights(legacy(tmp_path / "b.pt", b"](" + tensor() + tensor((6,), (1,)) + b"e")) as weights:
        assert weights.names() == ["0", "1"]


def test_the_optimizer_is_not_read(tmp_path, monkeypatch):
    """Of a training checkpoint of 32 MB, reading the EMA costs the EMA."""
    size = 4 << 20
    big = tensor((size,), (1,), where=storage("1", size))
    body = mapping(model=big, ema=mapping(w=tensor()), opt=mapping(exp_avg=big))
    storages = {"0": np.arange(6, dtype=np.float32).tobytes(), "1": bytes(4 * size)}
    zipped(tmp_path / "a.pt", body, storages)
    tail = struct.pack("<q", size) + bytes(4 * size) + struct.pack("<q6f", 6, *range(6))
    legacy(tmp_path / "b.pt", body, keys=op(["1", "0"]), tail=tail)
    asked = []

    class Counted(weights_file.RegularFile):
        def read(self, size=-1, /):
            asked.append(len(data := super().read(size)))
            return data

        def readinto(self, buffer, /):
            asked.append(read := super().readinto(buffer))
            return read

    monkeypatch.setattr(weights_file, "RegularFile", Counted)
    for name in ("a.pt", "b.pt"):
        asked.clear()
        with bounded(mib=1), open_weights(tmp_path / name) as weights:
            assert_same(weights["ema.w"], np.arange(6, dtype=np.float32).reshape(2, 3))
        assert 24 < sum(asked) < 10_000
        asked.clear()
        with open_weights(tmp_path / name) as weights:
            weights["opt.exp_avg"]
        assert 4 * size < sum(asked) < 4 * size + 10_000


def test_a_big_endian_file_is_read(tmp_path):
    body = mapping(x=tensor(), b=tensor((2,), (1,), where=storage("1", 2, "BFloat16Storage")))
    storages = {"0": np.arange(6, dtype=">f4").tobytes(), "1": b"\x3f\x80\xc0\x20"}
    with open_weights(zipped(tmp_path / "a.pt", body, storages, byteorder="big")) as weights:
        assert_same(weights["x"], np.arange(6, dtype=np.float32).reshape(2, 3))
        assert_same(weights["b"], np.array([1, -2.5], jnp.bfloat16))


def test_python_2_wrote_ordered_dicts_by_a_list(tmp_path):
    """As torchvision's files of 2017: OrderedDict([[key, value], ...]) with byte strings for keys."""
    body = b"ccollections\nOrderedDict\n(](](U\x01w" + tensor() + b"eetR"
    with open_weights(legacy(tmp_path / "a.pt", body)) as weights:
        assert weights.names() == ["w"]


def test_protocol_4_is_read(tmp_path):
    class Saved:
        def __reduce__(self):
            return OrderedDict, ()

    body = pickle.dumps({"a": Saved(), "n": 1.5, "x": [(1, 2, 3, 4), None, -7, 2**40]}, 4)[2:-1]
    with open_weights(zipped(tmp_path / "a.pt", body)) as weights:
        assert weights.tree == {"a": {}, "n": 1.5, "x": [(1, 2, 3, 4), None, -7, 2**40]}
        assert weights.names() == []


# Files that are not what they should be -----------------------------------------------------------------------------


def test_what_is_no_weight_file_is_refused(tmp_path):
    refused(tmp_path / "none.pt", "No such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.pt").touch()
    refused(tmp_path / "empty.pt", "is empty")
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    refused(tmp_path / "text.pt", "is not a weight file: starts with b'version ', wanted safetensors, PyTorch")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "plain.pkl", "is not a weight file")
    np.savez(tmp_path / "arrays.npz", a=LINE)
    refused(tmp_path / "arrays.npz", r"without the one data.pkl of PyTorch, it has a.npy")
    refused(zipped(tmp_path / "script.pt", b"}", entries=[("archive/constants.pkl", b"")]), "TorchScript")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a regular file")
    with pytest.raises(WeightsError, match="null"):
        open_weights("a\0b")
    assert WeightsError.exit_code == 65


def test_the_file_is_closed_when_it_is_refused(tmp_path, monkeypatch):
    opened = []
    kind = weights_file.RegularFile
    monkeypatch.setattr(weights_file, "RegularFile", lambda path: opened.append(kind(path)) or opened[-1])
    refused(legacy(tmp_path / "a.pt", b"}" + b"P" * 20), "opcode b'P'")
    with open_weights(FIXTURES[0]):
        pass
    assert [file.closed for file in opened] == [True, True]


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (tensor((7,), (1,)), r"tensor float32 \[7\] that does not fit into its storage of 24 bytes"),
        (tensor((2, 3), (4, 1)), "does not fit"),
        (tensor(offset=1), "does not fit"),
        (tensor((10**9, 10**9), (0, 0)), "no sensible"),
        (tensor((10**9,), (0,)), "does not fit"),
        (tensor((2**48,), (1,)), "no sensible"),
        (tensor((-2, 3), (3, 1)), "no sensible"),
        (tensor((2, 3), (-3, 1)), "no sensible"),
        (tensor(offset=-1), "no sensible"),
        (tensor((2.0, 3), (3, 1)), "no sensible"),
        (tensor((True,), (1,)), "no sensible"),
        (tensor((1,) * 40, (1,) * 40), "no sensible"),
        (tensor(where=op("0")), "str where Storage was expected"),
        (tensor((6,), (3, 1)), "no sensible"),
        (tensor(where=storage(size=7)), "storage 0 of .* has 24 bytes, 28 were announced"),
        (tensor(where=storage(size=-1)), "not a whole storage"),
        (tensor(where=storage(kind="_rebuild")), "refuses to load torch._rebuild"),
        (tensor(where=storage(kind="Size")), "not a whole storage"),
        (tensor(where=storage(view=op(("1", 0, 3)))), "not a whole storage"),
        (tensor(where=storage("missing")), "lies in storage missing, which the file lacks"),
        (tensor(where=storage("../byteorder")), "lies in storage ../byteorder, which the file lacks"),
        (tensor(tail=mapping(conj=op(True))), "conjugated"),
        (b"ctorch._utils\n_rebuild_parameter\n(K\x00\x88" + ORDERED_DICT + b"tR", "int where Tensor was expected"),
        (b"}(" + op("a.b") + tensor() + op("a") + mapping(b=tensor()) + b"u", "two tensors named a.b"),
    ],
)
def test_a_tensor_that_lies_is_refused(tmp_path, body, match):
    refused(zipped(tmp_path / "a.pt", body), match)


def test_tensors_share_storage_within_reason(tmp_path):
    body = b"](" + tensor((1000,), (1,), where=storage(size=1000)) + b"q\x00" + b"h\x00" * 400 + b"e"
    refused(zipped(tmp_path / "a.pt", body, {"0": bytes(4000)}), "overlap: they name more than 64 times")
    with open_weights(zipped(tmp_path / "a.pt", body.replace(b"h\x00" * 360, b""), {"0": bytes(4000)})) as weights:
        assert len(dict(weights)) == 41


def test_zip_archives_that_pytorch_does_not_write_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    refused(zipped(path, tensor(), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted entry archive/data.pkl")
    for name in ("../evil", "/evil", "archive/../../evil", "archive\\..\\evil"):
        refused(zipped(path, tensor(), entries=[(name, b"")]), "evil, which leads out of the archive")
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(path, tensor(), entries=[("archive/data/0", bytes(24))])
    refused(path, "two entries archive/data/0")
    refused(zipped(path, tensor(), entries=[("b/data.pkl", b"N.")]), "without the one data.pkl")
    refused(zipped(path, tensor(), byteorder="middle"), "byte order 'middle'")
    content = zipped(path, tensor()).read_bytes()
    path.write_bytes(content.replace(b"archive/data/0", b"archive/data/1", 1))
    refused(path, "no header of entry archive/data/0")
    path.write_bytes(content[:-30])
    refused(path, "truncated or damaged zip archive")


def test_legacy_files_that_lie_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    refused(legacy(path, tensor(), tail=struct.pack("<q5f", 6, *range(5))), "truncated: storage 0 ends at byte")
    refused(legacy(path, tensor(), tail=b""), "storage 0 of 6 elements has 0")
    refused(legacy(path, tensor(), tail=struct.pack("<q", 2**62)), "storage 0 of 6 elements has")
    refused(legacy(path, tensor(), keys=op([])), "storage 0, which the file lacks")
    refused(legacy(path, tensor(), keys=op(["0", "0"])), "no list of different storage keys")
    refused(legacy(path, tensor(), keys=op("0")), "no list of different storage keys")
    refused(legacy(path, tensor(), keys=op([0])), "no list of different storage keys")
    refused(legacy(path, tensor(), keys=op(["1"])), "storage 1 of no tensor")
    path.write_bytes(finished(op(0x1950A86A20F9469CFC6C)) + finished(op(1002)) + b"N.")
    refused(path, "legacy PyTorch file of protocol 1001")


# Hostile files ------------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(sentinel: Path) -> dict[str, bytes]:
    """Pickle bodies, each of which would create the file in one reader or another; and the name that is refused."""
    touch, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')"
    path = str(sentinel)
    setstate = b"}" + op("__setstate__") + op(touch) + b"s"
    return {
        "posix.system": op(Calls(os.system, touch)),
        "__builtin__.eval": op(Calls(eval, code)),
        "__builtin__.exec": op(Calls(exec, code)),
        "__builtin__.getattr": op(Calls(getattr, Calls(functools.partial, os.system), "func")).replace(
            b"functools\npartial", b"__builtin__\ngetattr"
        ),
        "functools.partial": op(Calls(functools.partial, os.system, touch)),
        f"{open.__module__}.open": op(Calls(builtins.open, path, "w")),  # io, or _io from Python 3.13 on
        "commands.Popen": op(Calls(subprocess.Popen, ["touch", path])),
        "torch.load": b"ctorch\nload\n" + op((path,)) + b"R",
        "torch.serialization.load": b"ctorch.serialization\nload\n" + op((path,)) + b"R",
        "torch.hub.load_state_dict_from_url": b"ctorch.hub\nload_state_dict_from_url\n" + op((path,)) + b"R",
        "torch.storage._load_from_bytes": b"ctorch.storage\n_load_from_bytes\n" + op((path,)) + b"R",
        "torch.float32.__class__": b"ctorch\nfloat32.__class__\n",
        "collections.OrderedDict.__init__": b"ccollections\nOrderedDict.__init__\n",
        "argparse.FileType": b"cargparse\nFileType\n" + op(("w",)) + b"R" + op((path,)) + b"R",
        "os.system": pickle.dumps(Calls(os.system, touch), 4)[2:-1].replace(b"\x8c\x05posix", b"\x8c\x02os"),
        "opcode b'i'": b"(" + op(touch) + b"iposix\nsystem\n",
        "opcode b'o'": b"(" + op(touch) + b"o",
        "opcode .*x82": b"\x82\x01",
        "opcode b'P'": b"P0\n",
        "refuses to load os.p": b"cos\np\\q\n",
        "opcode b'S'": b"S'\\p'\n",
        "opcode b'I'": b"I" + b"1" * 5000 + b"\n",
        "_Name where dict or Namespace": b"cargparse\nNamespace\n" + setstate + b"b",
        "_Name where": b"ctorch._utils\n_rebuild_tensor_v2\n(N" + setstate + b"tb",
        "Tensor where dict or Namespace": tensor() + setstate + b"b",
        "int where str": b"cargparse\nNamespace\n)\x81}K\x00K\x00sb",
        "tuple where dict": b"cargparse\nNamespace\n)\x81N}" + op("x") + b"K\x00s\x86b",
        "a call of str": op(touch) + b")R",
        "a call of _Name": b"ctorch\nFloatStorage\n)R",
        "list where tuple": b"ccollections\nOrderedDict\n]R",
        "Tensor where str or int": b"}" + tensor() + b"K\x00s",
        "not a whole storage": op(touch) + b"Q",
        "dict where list or tuple": b"ccollections\nOrderedDict\n}\x85R",
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_nothing_in_a_pickle_is_run(tmp_path, name):
    sentinel = tmp_path / "sentinel"
    body = attacks(sentinel)[name]
    foreign = name.startswith("refuses") or re.fullmatch(r"[\w.]+\.\w+", name) is not None
    match = f"refuses to load {name}: only tensors" if foreign and not name.startswith("refuses") else name
    refused(zipped(tmp_path / "a.pt", body), match)
    refused(zipped(tmp_path / "b.pt", mapping(model=ORDERED_DICT + op("w") + body + b"s")), match)
    refused(legacy(tmp_path / "c.pt", body, keys=b"]", tail=b""), match)
    refused(legacy(tmp_path / "d.pt", b"}", keys=body), "no list of different storage keys" if foreign else match)
    zip_file = zipped(tmp_path / "e.pt", mapping(ema=mapping(w=tensor()), other=body))
    for path in zip_file, legacy(tmp_path / "f.pt", mapping(ema=mapping(w=tensor())), info=body):
        if not foreign:
            refused(path, match)
            continue
        with open_weights(path) as weights:  # the object is skipped, and the weights beside it are read
            assert_same(weights["ema.w"], np.arange(6, dtype=np.float32).reshape(2, 3))
            assert set(weights.foreign) == ({"other"} if path.name == "e.pt" else set())
    assert not sentinel.exists()


def test_the_attacks_are_real(tmp_path):
    """An ordinary unpickler creates the file."""
    sentinel = tmp_path / "sentinel"
    pickle.loads(finished(attacks(sentinel)["posix.system"]))
    assert sentinel.exists()


ODD = {
    "scalar": np.float32(1.5),
    "path": Path("a/b"),
    "counter": Counter(seen=3),
    "default": defaultdict(list, {"a": [1]}),
    "set": {1, 2},
    "frozen": frozenset((1, 2)),
    "bytes": b"abc",
    "array": np.arange(3),
    "complex": 1j,
    "range": slice(1, 2),
    "keys": {("a", 1): 2, b"b": 3, "c": 4},
    "huge": 1 << 3000,
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_odd_objects_beside_the_weights_are_skipped_by_name(tmp_path, protocol):
    odd = b"\x8c\x04args" + pickle.dumps(ODD, protocol)[2:-1]  # first: protocol 4 counts what it remembers
    body = b"}(" + odd + op("ema") + mapping(w=tensor()) + b"u"
    with open_weights(zipped(tmp_path / "a.pt", body)) as weights:
        assert list(weights) == ["ema.w"]
        told = weights.foreign
        assert {path.partition(".")[2] for path in told} >= ODD.keys() - {"bytes", "keys", "huge"}
        assert told["args.counter"] == "collections.Counter"
        assert weights.tree["args"]["keys"]["c"] == 4
        assert weights.tree["args"]["huge"] == 1 << 3000


def test_tensors_inside_of_odd_objects_are_skipped_too(tmp_path):
    """Their storages, too, which a legacy file holds one after another."""
    wrapped = b"cema_pytorch\nEMA\n)R}" + op("w") + tensor(where=storage("1")) + b"sb"
    body = mapping(model=mapping(w=tensor()), ema=wrapped)
    both = struct.pack("<q6f", 6, *range(6)) + struct.pack("<q6f", 6, *[9] * 6)
    old = legacy(tmp_path / "b.pt", body, keys=op(["0", "1"]), tail=both)
    storages = {key: np.arange(6, dtype=np.float32).tobytes() for key in "01"}
    for path in zipped(tmp_path / "a.pt", body, storages), old:
        with open_weights(path) as weights:
            assert dict(weights.foreign) == {"ema": "ema_pytorch.EMA"}
            assert_same(weights["model.w"], np.arange(6, dtype=np.float32).reshape(2, 3))
        with pytest.raises(
            WeightsError, match=r"'ema' is an object of ema_pytorch.EMA, which is not read; .*--weights: model"
        ):
            open_release(path)


def test_a_tensor_of_a_foreign_type_is_skipped(tmp_path):
    rotary = tensor(where=storage("1", kind="ComplexFloatStorage"))
    with open_weights(zipped(tmp_path / "a.pt", mapping(w=tensor(), rotary=rotary))) as weights:
        assert (list(weights), dict(weights.foreign)) == (["w"], {"rotary": "torch.ComplexFloatStorage"})


def test_attributes_of_a_namespace_stay_data(tmp_path):
    names = ["__class__", "__dict__", "__setstate__", "__getattribute__", "keys"]
    body = b"cargparse\nNamespace\n)\x81}(" + b"".join(op(name) + op(1) for name in names) + b"ub"
    with open_weights(zipped(tmp_path / "a.pt", body)) as weights:
        assert type(weights.tree) is torch_pickle.Namespace
        assert sorted(weights.tree) == sorted(names)
    assert not set(vars(torch_pickle.Namespace())) & set(names)


def test_an_ugly_name_stays_on_its_line(tmp_path):
    body = b"\x80\x04" + op("os\n\x1b[31m") + op("system" * 1000 + "\u2028") + b"\x93"
    refused(zipped(tmp_path / "a.pt", body), r"refuses to load os\\n\\x1b\[31m.systemsystem")
    body = mapping(**{"a\nb": tensor(where=storage("x\ny"))})
    refused(zipped(tmp_path / "a.pt", body), r"a\\nb lies in storage x\\ny")


def bombs() -> dict[str, tuple[bytes, str]]:
    """Short pickles that ask for very much."""
    # The list in the memo slot before, twice.
    doubled = b"]" + tensor() + b"aq\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    tuples = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    return {
        "a list of itself": (b"]q\x00h\x00a", "nested deeper than 100"),
        "lists of lists, 2^60 tensors": (doubled, "overlap|too many tensors"),
        "empty lists of lists, 2^60": (doubled.replace(tensor() + b"a", b""), "too many tensors"),
        "a key of nested tuples": (b"}q\x7f" + tuples + b"K\x00s", "dict where|tuple where"),
        "depth": (b"](" * 20_000 + b"e" * 20_000, "nested deeper than 100"),
        "depth of tuples": (b")" + b"\x85" * 20_000, "nested deeper than 100"),
        "memo": (b"]r\xff\xff\xff\x7f", ""),
        "string of 4 GB": (b"X\xff\xff\xff\xff", "bytes in a unicodestring4"),
        "string of 2^60 bytes": (b"\x8d" + struct.pack("<Q", 2**60), "bytes in a unicodestring8"),
        "frame of 2^60 bytes": (b"\x95" + struct.pack("<Q", 2**60) + b"]", ""),
        "copied pairs": (
            op([("k", 0)] * 30000) + b"q\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 10_000,
            "more than .* opcodes",
        ),
        "copied attributes": (
            op({str(i): i for i in range(3000)}) + b"q\x00" + b"cargparse\nNamespace\n)\x81h\x00b" * 10_000,
            "more than .* opcodes",
        ),
        "unfinished marks": (b"(" * 3000, "too little on the stack"),
        "long name": (b"}" + op("k" * 60_000) + tensor() + b"s", ""),
    }


def read_bombs(folder: str) -> None:
    for name, (body, match) in bombs().items():
        path = zipped(Path(folder) / f"{name}.pt", body)
        with bounded(mib=64):
            if match:
                refused(path, match)
                continue
            with open_weights(path) as weights:
                assert len(weights) < 2, name


def run_alone(call: str) -> None:
    """In a process of its own a hang or a crash is seen, and annotations cost no time: fifty times that of the work."""
    code = f"import warnings; warnings.simplefilter('error'); from tests.weights.test_weights_file import *; {call}"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=DATA.parent.parent, capture_output=True, text=True, timeout=150)
    assert process.returncode == 0, process.stderr


def test_a_small_file_neither_hangs_nor_fills_the_memory(tmp_path):
    run_alone(f"read_bombs({str(tmp_path)!r})")


def read_damaged(kind: str, folder: str, rounds: int = 1, seed: int = 0) -> None:
    """Reads a file cut off at many a byte, and with bytes changed: WeightsError, or arrays as the tree says."""
    path, random, outcomes = Path(folder) / "damaged", np.random.default_rng(seed), Counter()
    if kind == "safetensors":
        write_safetensors(path, WANTED)
    else:
        path.write_bytes((DATA / f"weights_{kind}.pt").read_bytes())
    whole = path.read_bytes()

    def variants():
        for end in random.integers(len(whole), size=100 * rounds):
            yield whole[:end]
        for count in ([1] * 400 + [2] * 60 + [30] * 30) * rounds:
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[random.integers(len(whole), size=count)] ^= random.integers(1, 256, size=count, dtype=np.uint8)
            yield damaged.tobytes()
        for start in random.integers(len(whole), size=40 * rounds):
            yield whole[:start] + b"\xff" * 8 + whole[start + 8 :]

    with bounded(seconds=100 * rounds, mib=16):
        for content in variants():
            path.write_bytes(content)
            try:
                with open_weights(path) as weights:
                    assert sum(array.nbytes for array in weights.values()) < 64 * len(content)
                outcomes["read"] += 1
            except WeightsError as error:
                outcomes["refused" if str(error).isprintable() else "more than one line"] += 1
    assert set(outcomes) == {"read", "refused"}, outcomes
    assert min(outcomes.values()) > 30, outcomes


@pytest.mark.parametrize("kind", ["zip", pytest.param("legacy", marks=pytest.mark.slow), "safetensors"])
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path, kind):
    run_alone(f"read_damaged({kind!r}, {str(tmp_path)!r})")


# safetensors --------------------------------------------------------------------------------------------------------


def test_arrays_of_any_layout_come_back(tmp_path):
    """The safetensors package writes the memory of arrays that are not C-contiguous in the wrong order."""
    arrays = {**WANTED, "fortran": np.asfortranarray(LINE), "reversed": LINE[::-1], "big": LINE.astype(">f4")}
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays)
    with open_weights(path) as weights:
        assert sorted(weights) == sorted(arrays)
        for name, array in arrays.items():
            assert_same(weights[name], array.astype(array.dtype.newbyteorder("=")), name)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": LINE})
    before = path.read_bytes()

    def full(arrays, partial, metadata):
        Path(partial).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(WeightsError, match=r"a\.safetensors: cannot be written: No space left on device"):
        write_safetensors(path, {"x": LINE + 1})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="x has dtype object, which cannot be written"):
        write_safetensors(tmp_path / "a.safetensors", {"x": np.array([None])})
    with pytest.raises(WeightsError, match="x has dtype complex128"):
        write_safetensors(tmp_path / "a.safetensors", {"x": np.array([1j])})
    with pytest.raises(WeightsError, match="No such file"):
        write_safetensors(tmp_path / "none" / "a.safetensors", {"x": LINE})
    assert not list(tmp_path.iterdir())


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": LINE})
    (tmp_path / "ordinary").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "ordinary")}
    assert len(modes) == 1


def test_safetensors_that_lie_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = '"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'

    def written(*entries: str, size: int = 8, length: int | None = None) -> Path:
        header = "{" + ",".join(entries) + "}"
        path.write_bytes(struct.pack("<Q", length or len(header)) + header.encode() + bytes(size))
        return path

    with open_weights(written(entry)) as weights:
        assert_same(weights["x"], np.zeros(2, np.float32))
    for size in (0, 7, 9):
        refused(written(entry, size=size), "not a whole safetensors file")
    for length in (10, 60, 2**60, 2**64 - 1):
        refused(written(entry, length=length), "not a whole safetensors file")
    refused(written(entry.replace("[2]", "[3]")), "not a whole safetensors file")
    refused(written(entry.replace("[2]", "[-2]")), "not a whole safetensors file")
    refused(written(entry.replace("[2]", "[4294967296,4294967296,2]")), "not a whole safetensors file")
    refused(written(entry.replace("8]}", "9]}")), "not a whole safetensors file")
    refused(written(entry, entry.replace("x", "y")), "not a whole safetensors file")
    refused(written(entry, entry), "not a whole safetensors file")
    refused(written('"a":{' * 1000), "not a whole safetensors file")
    refused(written(entry.replace("F32", "C64").replace("[2]", "[1]")), "x has dtype C64, which is not read")


@pytest.mark.parametrize(
    "shape", ["[" + "1," * 2000 + "2]", "[0,4611686018427387904]", "[0,1099511627776,1099511627776]"]
)
def test_a_shape_that_no_array_has_is_refused(shape, tmp_path):
    elements = 8 if shape.endswith("2]") else 0
    header = f'{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{elements}]}}}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(elements))
    refused(path, "no shape that an array can have|not a whole safetensors file")


def test_no_flipped_bit_of_a_zip_goes_into_the_weights(tmp_path):
    path = zipped(tmp_path / "a.pt", mapping(x=tensor(), y=tensor((2,), (1,), offset=1)))
    content = path.read_bytes()
    place = content.index(np.arange(6, dtype=np.float32).tobytes())
    for name, damaged in (("x", place + 3), ("y", place + 23), ("pickle", content.index(b"_rebuild_tensor_v2") + 40)):
        changed = bytearray(content)
        changed[damaged] ^= 1
        path.write_bytes(changed)
        refused(path, "the checksum of its (storage|pickle) is wrong")
        if name == "y":  # the bit lies in the storage, beside the tensor
            with open_weights(path) as weights, pytest.raises(WeightsError, match="y is damaged"):
                weights["y"]


def test_a_zip_without_checksums_is_read(tmp_path):
    """torch.serialization.set_crc32_options(False) leaves them out."""
    content = bytearray(zipped(tmp_path / "a.pt", tensor()).read_bytes())
    for signature, place in ((b"PK\3\4", 14), (b"PK\1\2", 16)):
        at = content.find(signature)
        while at >= 0:
            content[at + place : at + place + 4] = bytes(4)
            at = content.find(signature, at + 4)
    (tmp_path / "a.pt").write_bytes(content)
    with open_weights(tmp_path / "a.pt") as weights:
        assert_same(weights[""], np.arange(6, dtype=np.float32).reshape(2, 3))


# With torch, where it is installed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}], ids=str)
def test_torch_saves_and_we_read(tmp_path, options):
    torch = pytest.importorskip("torch")
    torch.save(saved_by_torch(torch), tmp_path / "a.pt", **options)
    with open_weights(tmp_path / "a.pt") as weights:
        for name, wanted in WANTED.items():
            assert_same(weights[name], wanted, name)
    buffer = io.BytesIO()
    torch.save(torch.arange(4)[::2], buffer, **options)
    (tmp_path / "b.pt").write_bytes(buffer.getvalue())
    with open_weights(tmp_path / "b.pt") as weights:
        assert_same(weights[""], np.int64([0, 2]))


def test_we_write_and_torch_reads(tmp_path):
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    arrays = {name: array for name, array in WANTED.items() if array.dtype != jnp.float8_e4m3fn}
    write_safetensors(tmp_path / "a.safetensors", arrays)
    tensors = load_file(tmp_path / "a.safetensors")
    assert sorted(tensors) == sorted(arrays)
    for name, array in arrays.items():
        assert tuple(tensors[name].shape) == array.shape
        assert str(tensors[name].dtype) == f"torch.{array.dtype}"
        np.testing.assert_array_equal(tensors[name].double().numpy(), array.astype(np.float64), name)
