"""
A server on this machine that speaks the part of the Hub's HTTP API that publishing and downloading use.

Repositories hold, per revision, a mapping from path to content. Large files go through the LFS batch API, others in the
commit itself. `fail_next(...)` makes it answer with an error or drop the connection in the middle.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


TOKEN = "hf_" + "t" * 30
LARGE_SUFFIXES = (".safetensors", ".parquet", ".model", ".png", ".gguf")


class LocalHub:
    """`with LocalHub() as hub: HfApi(endpoint=hub.url)`"""

    def __init__(self, token: str = "hf_testtoken"):
        self.token = token
        self.repositories: dict[tuple[str, str], dict] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self._failures: list[tuple[str, str, str]] = []
        self._lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def fail_next(self, method: str, path_contains: str, how: str):
        """The next such request fails: `how` is "500", "403" or "drop" (the connection is cut)."""
        self._failures.append((method, path_contains, how))

    def files(self, repo: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        return self.repositories[kind, repo]["revisions"][revision]

    def _take_failure(self, method: str, path: str) -> str | None:
        with self._lock:
            for failure in self._failures:
                if failure[0] == method and failure[1] in path:
                    self._failures.remove(failure)
                    return failure[2]
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _handle(self):
        path = unquote(urlparse(self.path).path)
        self.query = parse_qs(urlparse(self.path).query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        failure = self.hub._take_failure(self.command, path)
        if failure == "drop":
            self.connection.close()
            self.close_connection = True
            return
        if failure:
            return self._json({"error": "injected"}, int(failure))
        writes = self.command in ("POST", "PUT") and "/lfs-storage/" not in path
        if writes and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._json({"error": "Invalid token"}, 401)
        for method, pattern, function in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                names = match.groupdict()
                if "kind" in names:
                    kind = names.pop("kind").rstrip("s") or "model"
                    names["repository"] = self.hub.repositories.get((kind, names["repo"]))
                    if names["repository"] is None:
                        return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return function(self, body, **names)
        self._json({"error": f"no route {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _json(self, value, status=200, headers=None):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # routes

    def _whoami(self, body):
        self._json({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})

    def _create(self, body):
        request = json.loads(body)
        owner = request.get("organization") or "tester"
        key = request.get("type") or "model", f"{owner}/{request['name']}"
        prefix = "" if key[0] == "model" else f"{key[0]}s/"
        if key in self.hub.repositories:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{prefix}{key[1]}"}, 409)
        self.hub.repositories[key] = {
            "visibility": request.get("visibility", "public"),
            "revisions": {"main": {}},
            "commits": {"main": "0" * 40},
            "tags": {},
            "tagged": {},
        }
        self._json({"url": f"{self.hub.url}/{prefix}{key[1]}", "id": key[1], "name": key[1]})

    def _validate_yaml(self, body):
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body, repo, repository, revision):
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE_SUFFIXES)
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        self._json({"files": files})

    def _lfs_batch(self, body, repo):
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-storage/{item['oid']}", "header": {}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "checksum"}, 400)
        self.hub.objects[oid] = body
        self.hub.uploads.append(oid)
        self._send(b"")

    def _commit(self, body, repo, repository, revision):
        files = dict(repository["revisions"][revision])
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"])
        repository["revisions"][revision] = files
        commit = hashlib.sha1(body).hexdigest()
        repository["commits"][revision] = commit
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def _branch(self, body, repo, repository, branch):
        if branch in repository["revisions"]:
            return self._json({"error": "exists"}, 409)
        repository["revisions"][branch] = dict(repository["revisions"]["main"])
        repository["commits"][branch] = repository["commits"]["main"]
        self._json({})

    def _tag(self, body, repo, repository, revision):
        tag = json.loads(body)["tag"]
        if tag in repository["tags"]:
            return self._json({"error": "exists"}, 409)
        repository["tags"][tag] = revision
        repository["tagged"][tag] = repository["commits"][revision]
        self._json({})

    def _refs(self, body, repo, repository):
        refs = {"converts": []}
        for kind, commits in (("branches", repository["commits"]), ("tags", repository["tagged"])):
            refs[kind] = [{"name": name, "ref": name, "targetCommit": commit} for name, commit in commits.items()]
        self._json(refs)

    def _info(self, body, repo, repository, revision="main"):
        files = self._files(repository, revision)
        if files is None:
            return
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        commit = repository["commits"].get(revision, revision)
        private = repository["visibility"] == "private"
        self._json({"id": repo, "sha": commit, "siblings": siblings, "private": private, "tags": []})

    def _tree(self, body, repo, repository, revision):
        files = self._files(repository, revision)
        if files is None:
            return
        entries = [{"type": "file", "path": name, "size": len(c), "oid": "0" * 40} for name, c in files.items()]
        self._json(entries)

    def _files(self, repository, revision):
        branch = next((name for name, commit in repository["commits"].items() if revision in (name, commit)), None)
        branch = branch or repository["tags"].get(revision)
        if branch is None:
            self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        self.commit = repository["commits"][branch]
        return repository["revisions"][branch]

    def _resolve(self, body, repo, repository, revision, file):
        files = self._files(repository, revision)
        if files is None:
            return
        if file not in files:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = files[file]
        etag = hashlib.sha256(content).hexdigest()
        self._send(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit})

    _REPO = r"(?P<repo>[^/]+/[^/]+)"
    _KIND = r"/api/(?P<kind>models|datasets)/" + _REPO
    ROUTES = [
        ("GET", "/api/whoami-v2", _whoami),
        ("POST", "/api/repos/create", _create),
        ("POST", "/api/validate-yaml", _validate_yaml),
        ("POST", _KIND + "/preupload/(?P<revision>[^/]+)", _preupload),
        ("POST", "/(?:datasets/)?" + _REPO + r"\.git/info/lfs/objects/batch", _lfs_batch),
        ("PUT", "/lfs-storage/(?P<oid>[0-9a-f]+)", _lfs_put),
        ("POST", _KIND + "/commit/(?P<revision>[^/]+)", _commit),
        ("POST", _KIND + "/branch/(?P<branch>[^/]+)", _branch),
        ("POST", _KIND + "/tag/(?P<revision>[^/]+)", _tag),
        ("GET", _KIND, _info),
        ("GET", _KIND + "/revision/(?P<revision>[^/]+)", _info),
        ("GET", _KIND + "/tree/(?P<revision>[^/]+)/?", _tree),
        ("GET", _KIND + "/refs", _refs),
        ("GET", "/(?P<kind>datasets|)/?" + _REPO + "/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _resolve),
        ("HEAD", "/(?P<kind>datasets|)/?" + _REPO + "/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _resolve),
    ]  # fmt: skip
