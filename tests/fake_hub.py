"""A hub in memory: the real `datasets` and `huggingface_hub` talk to it instead of the network."""

import hashlib
import json
from urllib.parse import unquote

import httpx2

COMMIT = "c" * 40


class FakeHub:
    """Serves `files` {repo: {path: bytes}} at every revision. `fault(request)`: a response, an
    exception, or None.
    """

    def __init__(self, files: dict[str, dict[str, bytes]]):
        self.files, self.log, self.fault = files, [], lambda request: None
        self.sent = 0  # bytes of files

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self.handle), follow_redirects=True)

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        path = unquote(request.url.path)
        self.log.append(f"{request.method} {path}")
        found = self.fault(request)
        if isinstance(found, Exception):
            raise found
        response = found or self.answer(request, path)
        response.request = request
        return response

    def answer(self, request: httpx2.Request, path: str) -> httpx2.Response:
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        files = self.files.get(repo)
        if files is None:
            return refused(404, "RepoNotFound")
        if path.startswith("/api"):
            if not rest or rest[0] == "revision":
                commit = rest[1] if len(rest) == 2 and len(rest[1]) == 40 else COMMIT
                return httpx2.Response(200, json={"id": repo, "sha": commit, "siblings": []})
            if rest[0] == "tree":
                deep = request.url.params.get("recursive", "false").lower() == "true"
                return httpx2.Response(200, json=self.tree(files, "/".join(rest[2:]), deep))
            if rest[0] == "paths-info":
                wanted = (
                    json.loads(request.content)["paths"] if request.content.startswith(b"{") else []
                )
                return httpx2.Response(
                    200, json=[item for name in wanted for item in self.info(files, name)]
                )
        name = "/".join(rest[2:])
        if name not in files:
            return refused(404, "EntryNotFound")
        body, commit = files[name], rest[1] if len(rest[1]) == 40 else COMMIT
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}
        if request.method == "HEAD":
            return httpx2.Response(200, headers={**headers, "Content-Length": str(len(body))})
        status = 200
        if span := request.headers.get("Range"):
            start, _, end = span.removeprefix("bytes=").partition("-")
            body, status = body[int(start) : int(end) + 1 if end else None], 206
        self.sent += len(body)
        return httpx2.Response(status, headers=headers, content=body)

    def info(self, files: dict[str, bytes], name: str) -> list[dict]:
        if name in files:
            oid = hashlib.sha1(files[name]).hexdigest()
            return [{"type": "file", "path": name, "size": len(files[name]), "oid": oid}]
        return (
            [{"type": "directory", "path": name, "oid": "0" * 40}]
            if any(path.startswith(f"{name}/") for path in files)
            else []
        )

    def tree(self, files: dict[str, bytes], under: str, deep: bool) -> list[dict]:
        prefix = f"{under}/" if under else ""
        inside = [path for path in files if path.startswith(prefix)]
        nested = [path for path in inside if "/" in path.removeprefix(prefix)]
        folders = {prefix + path.removeprefix(prefix).split("/")[0] for path in nested}
        names = [*sorted(folders), *(path for path in inside if deep or path not in nested)]
        return [item for name in names for item in self.info(files, name)]


def refused(status: int, code: str = "") -> httpx2.Response:
    return httpx2.Response(status, headers={"X-Error-Code": code} if code else {})
