"""Files from outside: regular ones only, verified, and in bounded memory; and whose fault a failure is."""

import ast
import errno
import gc
import io
import os
import sys
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diversedit_jax.errors import DataError, MachineError, check_machine
from diversedit_jax.reading import Npz, RegularFile, check_folder, parse_json, parse_npy, read_member, zip_members
from tests import ROOT


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, words in (("pipe", "is not a regular file"), ("link", "is not a regular file"), (".", "is a folder")):
        with pytest.raises(OSError, match=words):
            RegularFile(tmp_path / name)
    with pytest.raises(OSError, match="not a regular file"):
        RegularFile("/dev/zero")
    with pytest.raises(ValueError, match=r"(pipe|link) is not a regular file"):
        check_folder(tmp_path)
    (tmp_path / "file").write_bytes(b"abc")
    with RegularFile(tmp_path / "file") as file:
        assert (file.read(2**60), file.size) == (b"abc", 3)


def test_json_that_is_nested_too_deeply_is_damaged():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def packed(path, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a.npy", content)
    return path


def member(path):
    with RegularFile(path) as file:
        return read_member(file, zip_members(file)["a.npy"])


def test_a_member_of_a_zip_takes_no_more_than_its_share(tmp_path):
    path = packed(tmp_path / "bomb.zip", bytes(2**26))
    lying = path.read_bytes()
    place = lying.rindex(b"PK\1\2") + 24  # the size after unpacking, in the directory
    (tmp_path / "lying.zip").write_bytes(lying[:place] + (1000).to_bytes(4, "little") + lying[place + 4 :])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"67108864 bytes packed in \d+: wanted at most 32 times"):
        member(path)
    with pytest.raises(ValueError, match="damaged in the zip: its size or checksum is wrong"):
        member(tmp_path / "lying.zip")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    words = b"[12345, 678], " * 2**17  # what compresses well, but is no bomb
    assert member(packed(tmp_path / "words.zip", words)) == words


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_no_flipped_bit_of_a_member_is_read(method, tmp_path):
    path = packed(tmp_path / "a.zip", np.random.default_rng(0).bytes(200), method)
    whole, wanted = path.read_bytes(), member(path)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert member(path) == wanted
        except (ValueError, KeyError):
            continue


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + content


def test_arrays_come_back():
    for array in (
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.eye(3)),
        np.float32(2),
        np.zeros((0, 4)),
        np.array("ab"),
    ):
        file = io.BytesIO()
        np.save(file, array)
        np.testing.assert_array_equal(parse_npy(file.getvalue()), array, strict=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a text", "no header of an array"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,)}"), "is truncated"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", bytes(4)), "is truncated"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "4 bytes follow its array"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "Object arrays"),
        (npy(f"{'-' * 9000}1"), "no header of an array"),
        (npy(f"{'(' * 4000}"), "no header of an array"),
    ],
)
def test_an_array_that_lies_is_refused(content, words):
    with pytest.raises(ValueError, match=words):
        parse_npy(content)


def test_an_array_whose_name_has_a_damaged_bit_is_not_left_out(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.ones(3), extra=np.ones(2))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.rindex(b"extra")] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"no header of entry dxtra.npy"):
        Npz(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")]
)
def test_what_the_machine_lacks_is_no_damage(error):
    with pytest.raises(MachineError, match="the machine lacks memory, threads or open files: ") as raised:
        check_machine(error)
    with pytest.raises(MachineError) as again:
        check_machine(raised.value)
    assert again.value is raised.value
    check_machine(ValueError("damaged"))
    check_machine(OSError(errno.ENOENT, "No such file"))


def test_every_image_is_opened_as_one_of_the_formats_that_are_asked_for():
    """Pillow would start Ghostscript for what its content calls EPS, whatever its name."""
    for path in [*(ROOT / "diversedit_jax").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                assert "formats" in {keyword.arg for keyword in node.keywords}, f"{path}, line {node.lineno}"


def test_an_error_is_one_line_whatever_it_quotes():
    error = DataError("no image a\nb\x1b[31m\ud800é")
    assert str(error) == r"no image a\nb\x1b[31m\ud800é"
    assert str(error).isprintable()


def test_threads_may_read_headers_while_garbage_is_collected():
    """On Python 3.11 some were refused: jax has such a callback, too."""
    file = io.BytesIO()
    np.save(file, np.zeros((8, 4, 4), np.float32))
    before, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(callback := lambda *given: sum(range(50)))
    gc.set_threshold(5, 2, 2)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: parse_npy(file.getvalue()).shape, range(2_000)))
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
    assert found == [(8, 4, 4)] * 2_000
