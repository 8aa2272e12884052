"""Names on the hub: what is downloaded, once, and what is refused in one line. The hub is one of the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import DATA, ROOT
from tests.hub import served

ASK = """
import json, sys
from diversedit_jax.errors import RunError
from diversedit_jax.weights import hub
for line in sys.stdin:
    try:
        answer = str(hub.local(line.strip())), None
    except RunError as error:
        answer = str(error), type(error).__name__
    print(json.dumps(answer), flush=True)
"""
CONTENT = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"# a model"}


@pytest.fixture(scope="module")
def hub():
    with served() as one:
        one.add("some/folder", CONTENT | {"pytorch_model.bin": b"others"})
        one.add("some/vae", DATA / "vae")
        one.add("some/file", {"README.md": b"", "only.pt": b"its weights"})
        one.add("some/pipeline", {f"{part}/{n}": c for part in ("vae", "unet") for n, c in CONTENT.items()})
        split = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)}
        one.add("some/parts", {"model.safetensors.index.json": b"{}", "config.json": b"{}", "x.npz": b""} | split)
        one.add("some/two", {"a.pt": b"a", "b.pt": b"b", "notes.txt": b""})
        one.add("some/none", {"notes.txt": b""})
        one.add("some/gated", CONTENT)
        one.gated.add("some/gated")
        one.add("some/tagged", {"w.pt": b"old"}, "v1")
        one.add("some/tagged", {"w.pt": b"new"})
        yield one


def started(home, hub, **variables):
    """A process that asks for the path of each name on its stdin, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XLA", "JAX"))}
    where = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", ASK], env=kept | where | variables, text=True, **pipes)


def asked(home, hub, *names, **variables):
    """The answer to each name, a path or an error with its kind; and the lines on stderr."""
    process = started(home, hub, **variables)
    out, err = process.communicate("\n".join(names), timeout=120)
    assert process.returncode == 0, err
    return [tuple(json.loads(line)) for line in out.splitlines()], err.splitlines()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_name_becomes_a_path_with_the_files_it_needs(home, hub):
    names = ["folder", "file", "pipeline:vae", "parts", "two:b.pt", "vae:diffusion_pytorch_model.safetensors"]
    found, lines = asked(home, hub, *(f"hf:some/{name}" for name in names))
    assert [error for _, error in found] == [None] * len(names), found
    folder, file, pipeline, parts, two, vae = (Path(path) for path, _ in found)
    assert files(folder) == ["config.json", "model.safetensors"]  # neither the README nor a second copy of the weights
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (file.name, file.read_bytes()) == ("only.pt", b"its weights")
    assert (pipeline.name, files(pipeline)) == ("vae", ["config.json", "model.safetensors"])
    assert files(pipeline.parent) == ["vae", "vae/config.json", "vae/model.safetensors"]
    wanted = ["config.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), "model.safetensors.index.json"]
    assert files(parts) == wanted
    assert (two.name, files(two.parent)) == ("b.pt", ["b.pt"])
    assert files(vae.parent) == ["config.json", vae.name]  # config.json tells what the arrays do not
    assert "downloading hf:some/folder: model.safetensors (7 bytes)" in lines
    assert len(lines) == 12, lines  # one for each file, and no progress bar


def test_a_folder_of_some_files_is_downloaded_without_the_others(home, hub):
    hub.add("some/text", CONTENT | {"vocab.json": b"{}", "merges.txt": b"", "tokenizer/a": b"1", "tokenizer/b": b"2"})
    code = "import sys; from diversedit_jax.weights import hub; print(hub.folder(sys.argv[1], sys.argv[2:]))"
    for name, wanted in (("some/text", ["merges.txt", "vocab.json"]), ("some/text@main:tokenizer", ["a", "b"])):
        command = [sys.executable, "-c", code, f"hf:{name}", *wanted]
        variables = {"HF_HOME": str(home / name[-4:]), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert files(Path(done.stdout.strip())) == wanted


def test_what_is_cached_is_not_downloaded_again(home, hub):
    name = "hf:some/two:a.pt"
    first, lines = asked(home, hub, name, name)
    assert lines == ["downloading hf:some/two: a.pt (1 bytes)"]
    before = hub.downloads("a.pt")
    again, lines = asked(home, hub, name)
    assert (again[0], lines) == (first[0], [])
    assert hub.downloads("a.pt") == before


def test_a_branch_a_tag_and_a_commit(home, hub):
    commit = hub.add("some/tagged", {"w.pt": b"old"}, "v1")
    found, _ = asked(home, hub, "hf:some/tagged", "hf:some/tagged@v1:w.pt", f"hf:some/tagged@{commit}")
    assert [Path(path).read_text() for path, _ in found] == ["new", "old", "old"]


def test_a_moved_branch_is_followed_and_a_process_keeps_what_it_began_with(home, hub):
    hub.add("some/moving", {"w.pt": b"1"})
    with started(home, hub) as process:
        process.stdin.write("hf:some/moving\n")
        process.stdin.flush()
        first = process.stdout.readline()
        hub.add("some/moving", {"w.pt": b"2"})
        assert process.communicate("hf:some/moving\n", timeout=60)[0] == first
    assert Path(json.loads(first)[0]).read_text() == "1"
    ((path, _),), _ = asked(home, hub, "hf:some/moving")
    assert Path(path).read_text() == "2"


def test_without_a_network_the_cache_serves(home, hub):
    names = ["hf:some/folder", "hf:some/two:a.pt", "hf:some/tagged@v1"]
    online, _ = asked(home, hub, *names)
    offline, lines = asked(home, None, *names, "hf:some/two:b.pt", "hf:some/file", HF_HUB_OFFLINE="1")
    assert (offline[:3], lines) == (online, [])
    for text, error in offline[3:]:
        assert error == "ConfigError"
        assert "HF_HUB_OFFLINE is set, and it is not in the cache" in text
    unplugged, _ = asked(home, None, names[0], "hf:some/file")
    assert unplugged[0] == online[0]
    text, error = unplugged[1]
    assert error == "StorageError"
    assert text.startswith("hf:some/file: http://127.0.0.1:9 does not answer as wanted: ConnectError")


def test_what_the_hub_lacks_is_said_in_one_line(home, hub):
    cases = {
        "hf:some/nothing": "no such repository. A private one needs HF_TOKEN",
        "hf:some/folder@v7": "the repository has no revision 'v7'",
        "hf:some/folder:modle.pt": "it has no modle.pt; it has config.json, model.safetensors, README.md",
        "hf:some/two": "it holds 2 files of weights; give one as hf:some/two:a.pt, b.pt",
        "hf:some/none": "it holds no weights; it has notes.txt",
        "hf:some/gated": f"its owner grants access: ask for it at {hub.url}/some/gated, then set HF_TOKEN",
        "hf:two": "wanted hf:owner/name[@revision][:file]",
        "hf:some/two:../a.pt": "wanted hf:owner/name[@revision][:file]",
        "hf:-some--/two.git": "wanted hf:owner/name[@revision][:file]",
    }
    found, _ = asked(home, hub, *cases)
    for (text, error), (name, words) in zip(found, cases.items(), strict=True):
        assert error == "ConfigError", text
        assert text.startswith(f"{name}: ")
        assert words in text
        assert "\n" not in text


def test_a_hub_that_fails_is_no_mistake_of_the_user(home, hub):
    (found,), _ = asked(home, hub, "hf:some/two:a.pt", HF_ENDPOINT=f"{hub.url}/some/two/resolve/main/a.pt?")
    assert found[1] == "StorageError"
    home.mkdir(exist_ok=True)
    (home / "hub").write_text("a file where the cache should be")
    (found,), _ = asked(home, hub, "hf:some/two:a.pt")
    assert found[1] == "StorageError"
    assert str(home / "hub") in found[0]


def test_a_token_is_sent(home, hub):
    asked(home, hub, "hf:some/two:a.pt", HF_TOKEN="hf_secret")
    assert "Bearer hf_secret" in hub.tokens


def test_of_several_processes_one_downloads(home, hub):
    hub.add("some/large", {"large.pt": b"x" * 1000})
    hub.slow = 1.5
    try:
        processes = [started(home, hub) for _ in range(3)]
        for process in processes:
            process.stdin.write("hf:some/large")
            process.stdin.close()
            process.stdin = None
        answers = {process.communicate(timeout=60)[0] for process in processes}
    finally:
        hub.slow = 0.0
    assert len(answers) == 1, answers
    assert hub.downloads("large.pt") == 1


def test_without_the_library_its_name_is_told(home, hub, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not installed')")
    (found,), _ = asked(home, hub, "hf:some/two:a.pt", PYTHONPATH=f"{tmp_path}:{ROOT}")
    words = "huggingface_hub is not installed: pip install diversedit_jax[hub]"
    assert found == (f"hf:some/two:a.pt: {words}", "ConfigError")


def test_a_path_stays_a_path():
    found, _ = asked(Path.home(), None, "~/x", "./hf:some/two", "a/b.pt")
    assert [path for path, _ in found] == [str(Path.home() / "x"), "hf:some/two", "a/b.pt"]
