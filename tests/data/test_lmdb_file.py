"""Our reader of LMDB gives what its own library wrote, and refuses what is damaged."""

import random

import lmdb
import pytest

from diversedit_jax.data.lmdb_file import open_database


@pytest.mark.parametrize("subdir", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5, 300, 3000])
def test_every_value_is_read(count, subdir, tmp_path):
    """Values in pages and beyond them, in trees of every depth, written in several transactions, some removed again."""
    rng, wanted = random.Random(count), {}
    sizes = [0, 1, 10, 1500, 2030, 2050, 5000, 40_000] if count < 1000 else [9]
    with lmdb.open(str(tmp_path / "db"), map_size=2**26, subdir=subdir) as env:
        for chunk in range(3):
            with env.begin(write=True) as transaction:
                for i in range(count):
                    key = str(i).encode()
                    if not chunk or rng.random() < 0.3:
                        wanted[key] = rng.randbytes(rng.choice(sizes))
                        transaction.put(key, wanted[key])
                    elif rng.random() < 0.3:
                        transaction.delete(key)
                        wanted.pop(key, None)
    database = open_database(tmp_path / "db")
    for i in range(-1, count + 2):
        key = str(i).encode()
        assert database.get(key) == wanted.get(key)


def test_what_is_truncated_is_refused(tmp_path):
    """Its own library maps the file: reading beyond its end ends the process by SIGBUS."""
    with lmdb.open(str(tmp_path / "db"), map_size=2**24) as env, env.begin(write=True) as transaction:
        for i in range(100):
            transaction.put(str(i).encode(), bytes(6000))
    file = tmp_path / "db" / "data.mdb"
    whole = file.read_bytes()
    for size in (0, 100, 4096, 8192, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"is truncated|is no database"):
            open_database(tmp_path / "db")


def test_a_database_of_another_kind_is_refused(tmp_path):
    with lmdb.open(str(tmp_path / "db"), map_size=2**20, max_dbs=2) as env:
        env.open_db(b"other")
        with env.begin(write=True) as transaction:
            transaction.put(b"a", b"1")
    database = open_database(tmp_path / "db")
    assert database.get(b"a") == b"1"
    with pytest.raises(ValueError, match="a value of kind 2"):
        database.get(b"other")
