"""Weights by their name on the Hugging Face Hub, `hf:owner/name[@revision][:file]`, wherever a file of them is wanted.

    hf:stabilityai/sd-vae-ft-ema              the one set of weights of a repository, with its config.json
    hf:facebook/DiT-XL-2-256:transformer      a folder in a repository
    hf:openai/clip-vit-large-patch14          a text encoder with its tokenizer
    hf:owner/name@v1.0:model.safetensors      a file, at a branch, a tag or a commit

huggingface_hub downloads each file once into its cache. Its own settings apply: HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE. Without a network the cached files are taken.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diversedit_jax.errors import ConfigError, RunError, StorageError, check_machine
from diversedit_jax.runtime.progress import say
from diversedit_jax.weights.formats.weights_folder import CONFIG, NAMES

PREFIX = "hf:"
NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@\s]+))?(:(?P<part>[^:\s]+))?")
FORM = "wanted hf:owner/name[@revision][:file]"
# How the names of files of weights and statistics end, in a repository that has no folder of weights.
ENDINGS = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".msgpack", ".pb", ".npz", ".pkl")
BESIDE = (CONFIG, "vocab.json", "merges.txt")  # what a folder of weights may hold besides: also a tokenizer
SHOWN = 8  # names in an error


def local(name: str | Path) -> Path:
    """The path on this machine of what `name` names. A name on the hub is downloaded first, if it is not cached.

    name: `hf:...`, or a path, in which `~` is expanded.
    Raises ConfigError for a name that the hub does not have or does not give, StorageError if it cannot be reached.
    """
    return _downloaded(str(name)) if on_hub(name) else Path(name).expanduser()


def folder(name: str | Path, files: Sequence[str]) -> Path:
    """The folder on this machine of these files. name: of a folder or a repository, as for `local`.

    `local` of a repository would download its weights, too.
    """
    if not on_hub(name):
        return local(name)
    inside = "/" if NAME.fullmatch(str(name)) and str(name).count(":") == 2 else ":"
    folders = [local(f"{name}{inside}{file}").parent for file in files]
    return folders[0]


def on_hub(name: str | Path) -> bool:
    """Whether `name` is one on the hub. It may be malformed."""
    return str(name).startswith(PREFIX)


def title(name: str | Path) -> str:
    """The name for records: a name on the hub as it is, the last part of a path."""
    return str(name) if on_hub(name) else local(name).resolve().name


def place(name: str | Path) -> Path:
    """Where results go by default: what a file is called without its ending, or a folder itself.

    For a name on the hub: a folder of the repository's name in the current one.
    """
    if not on_hub(name):
        path = local(name).absolute()
        return path if path.is_dir() else path.with_name(path.stem)
    return Path(re.sub(r"[@:/]", "_", str(name).partition("/")[2])).absolute()


@cache  # the same files all along, even if the repository changes meanwhile
def _downloaded(name: str) -> Path:
    """The path of a name on the hub in the cache, where all of its files now are."""
    given = NAME.fullmatch(name)
    if given is None or ".." in (given["part"] or "").split("/"):
        raise ConfigError(f"{name}: {FORM}")
    try:
        import huggingface_hub as hub  # here, because only such names need it
        import huggingface_hub.constants  # the parts are attributes of `hub` once they are imported
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise ConfigError(f"{name}: huggingface_hub is not installed: pip install diversedit_jax[hub]") from None
    # It raises the errors of whichever network library it uses, and documents none.
    patience = hub.constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = hub.HfApi().model_info(given["repo"], revision=given["revision"], files_metadata=True, timeout=patience)
    except Exception as error:
        check_machine(error)
        return _cached(hub, given, _explained(hub, given, error))
    sizes = {one.rfilename: one.size for one in info.siblings}
    target, wanted = chosen(name, sizes, given["part"])
    try:
        return _fetched(hub, given, wanted, sizes, info.sha) / target
    except Exception as error:
        check_machine(error)
        raise _explained(hub, given, error) from error


def _fetched(hub: Any, given: re.Match, files: list[str], sizes: Mapping[str, int | None], commit: str) -> Path:
    """Download files of a repository; the folder of them. Each that is not cached is reported in a line.

    Processes of one machine may do this at once: huggingface_hub holds a lock for each file, so that one downloads it
    while the others wait. Where a file system has no such locks, each downloads a copy of its own and renames it: that
    costs time, and harms nothing.
    """
    revision = given["revision"] or "main"
    for file in files:
        if not isinstance(hub.try_to_load_from_cache(given["repo"], file, revision=commit), str):
            size = "" if sizes[file] is None else f" ({sizes[file]:,} bytes)"
            say(f"downloading {PREFIX}{given['repo']}: {file}{size}")
        with _without_bars(hub.utils):
            path = Path(hub.hf_hub_download(given["repo"], file, revision=revision))
        folder = path.parents[file.count("/")]
        revision = folder.name  # the commit, for the other files
    return folder


def _cached(hub: Any, given: re.Match, problem: RunError) -> Path:
    """The path of a name in the cache. problem: why the hub does not answer, raised if the cache lacks the name."""
    try:
        there = hub.snapshot_download(
            given["repo"], revision=given["revision"], local_files_only=True, allow_patterns=[]
        )
    except Exception:
        raise problem from None
    folder = Path(there)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        return folder / chosen(given[0], dict.fromkeys(names), given["part"])[0]
    except ConfigError as error:
        raise type(problem)(
            f"{problem}; of the cached files: {str(error).removeprefix(given[0]).strip(': ')}"
        ) from None


def chosen(name: str, files: Mapping[str, Any], part: str | None) -> tuple[str, list[str]]:
    """What `name` takes of a repository: the path of a file or folder in it, and the files that this needs.

    files: all names in the repository. part: of a file or folder; None: the repository itself.
    """
    if part in files:
        folder, _, file = part.rpartition("/")
        beside = [f"{folder}/{one}" if folder else one for one in BESIDE] if file in NAMES else []
        return part, [*(one for one in beside if one in files), part]
    prefix = f"{part.rstrip('/')}/" if part else ""
    inside = [file for file in files if file.startswith(prefix)]
    if not inside:
        raise ConfigError(f"{name}: it has no {part or 'files'}; it has {_listed(files)}")
    beside = [prefix + one for one in BESIDE if prefix + one in files]
    for wanted in (prefix + one for one in NAMES):
        held = [wanted] if wanted in files else []
        if not held and f"{wanted}.index.json" in files:  # in parts: model-00001-of-00002.safetensors
            stem, _, kind = wanted.rpartition(".")
            parts = [file for file in inside if file.startswith(f"{stem}-") and file.endswith(f".{kind}")]
            held = [f"{wanted}.index.json", *parts]
        if held:
            return prefix, [*beside, *held]
    found = [file for file in inside if file.endswith(ENDINGS)]
    if len(found) == 1:
        return chosen(name, files, found[0])
    if not found:
        raise ConfigError(f"{name}: it holds no weights; it has {_listed(inside)}")
    repository = name.removesuffix(f":{part}")
    raise ConfigError(f"{name}: it holds {len(found)} files of weights; give one as {repository}:{_listed(found)}")


def _explained(hub: Any, given: re.Match, error: Exception) -> RunError:
    """An error of huggingface_hub in one line of ours."""
    name, repo, errors = given[0], given["repo"], hub.errors
    if isinstance(error, errors.GatedRepoError):
        place = f"{hub.constants.ENDPOINT}/{repo}"
        return ConfigError(
            f"{name}: its owner grants access: ask for it at {place}, then set HF_TOKEN or `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(f"{name}: no such repository. A private one needs HF_TOKEN or `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{name}: the repository has no revision {given['revision'] or 'main'!r}")
    if isinstance(error, errors.HFValidationError):
        return ConfigError(f"{name}: {FORM} ({_line(error)})")
    if hub.constants.HF_HUB_OFFLINE:
        return ConfigError(f"{name}: HF_HUB_OFFLINE is set, and it is not in the cache {hub.constants.HF_HUB_CACHE}")
    if isinstance(error, OSError) and error.filename is not None:  # of the cache
        return StorageError(f"{name}: {error.filename}: {error.strerror}")
    while error.__cause__:
        error = error.__cause__
    return StorageError(f"{name}: {hub.constants.ENDPOINT} does not answer as wanted: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _listed(names: Mapping[str, Any] | list[str]) -> str:
    """The first names, for an error."""
    more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
    return ", ".join(list(names)[:SHOWN]) + more or "nothing"


@contextlib.contextmanager
def _without_bars(utils: Any) -> Iterator[None]:
    """Hide the progress bars of huggingface_hub: our line stands for them."""
    shown = not utils.are_progress_bars_disabled()
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()
