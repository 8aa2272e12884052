"""A hub of models on this machine, as far as huggingface_hub asks one: repositories, revisions, files, refusals."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """The server. commits: repository -> revision -> {file: content}; the last revision is `main` too.

    gated: repositories whose files are refused. slow: seconds before the content of a file.
    asked: the requests, such as `GET owner/name/resolve/main/model.safetensors`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.slow = 0.0
        self.asked: list[str] = []
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, source: Path | Mapping[str, bytes], revision: str = "main") -> str:
        """Add a revision: the files below a folder, or those given. Returns the commit."""
        if isinstance(source, Path):
            files = [path for path in sorted(source.rglob("*")) if path.is_file()]
            source = {path.relative_to(source).as_posix(): path.read_bytes() for path in files}
        commit = hashlib.sha1(repr((repo, sorted(source.items()))).encode()).hexdigest()
        self.commits.setdefault(repo, {}).update({revision: dict(source), commit: dict(source)})
        return commit

    def downloads(self, file: str) -> int:
        """How often the content of a file was asked for."""
        return sum(line.startswith("GET ") and line.endswith(f"/{file}") for line in self.asked)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization", ""))
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if repo not in self.server.commits:
            return self.refuse(404, "RepoNotFound")
        revision, file = (rest[1] if len(rest) > 1 else "main"), "/".join(rest[2:])
        files = self.server.commits[repo].get(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        known = self.server.commits[repo].items()
        commit = next(name for name, held in known if len(name) == 40 and held == files)
        if api:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return self.answer(json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode(), commit)
        if repo in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            time.sleep(self.server.slow)
        return self.answer(files[file], commit)

    def answer(self, content: bytes, commit: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def served() -> Iterator[Hub]:
    """A hub while it is served."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
