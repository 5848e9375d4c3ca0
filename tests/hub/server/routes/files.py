"""Reading: trees, paths, commits, and the files themselves with their redirects to storage."""

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlencode

from tests.hub.server import accounts, objects
from tests.hub.server.routes import route
from tests.hub.server.store import Blob, Commit, Repo, git_blob_oid
from tests.hub.server.wire import FileSlice, HubError, Reply, Request, json_reply, ranged

if TYPE_CHECKING:
    from tests.hub.server.hub import LocalHub


def _entry(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
    blob = commit.files.get(path)
    entry: dict[str, Any]
    if blob is not None:
        entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
        if blob.sha256:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
        if blob.xet_hash:
            entry["xetHash"] = blob.xet_hash
    else:
        inside = sorted((name, file.oid) for name, file in commit.files.items() if name.startswith(f"{path}/"))
        if not inside:
            return None
        entry = {"type": "directory", "oid": git_blob_oid(repr(inside).encode()), "size": 0, "path": path}
    if expand:
        last = _last_change(repo, commit, path)
        entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return entry


def _last_change(repo: Repo, commit: Commit, path: str) -> Commit:
    def state(at: Commit) -> dict[str, str]:
        return {name: blob.oid for name, blob in at.files.items() if name == path or name.startswith(f"{path}/")}

    last = commit
    for older in repo.history(commit.oid):
        if state(older) != state(commit):
            break
        last = older
    return last


def _children(commit: Commit, folder: str, recursive: bool) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    paths: set[str] = set()
    for path in commit.files:
        if path.startswith(prefix):
            parts = path.removeprefix(prefix).split("/")
            depth = len(parts) if recursive else 1
            paths |= {prefix + "/".join(parts[:count]) for count in range(1, depth + 1)}
    return sorted(paths)


@route("GET", "/api/models/{repo}/tree/{revision}")
def tree_root(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """List the root folder."""
    return tree(hub, request, repo, revision, "")


@route("GET", "/api/models/{repo}/tree/{revision}/{path}")
def tree(hub: "LocalHub", request: Request, repo: str, revision: str, path: str) -> Reply:
    """List a folder in pages; the Link header names the next page."""
    repository = hub.find(request, repo)
    commit = repository.commit(revision)
    children = _children(commit, path.strip("/"), request.query("recursive").lower() == "true")
    if path and not children:
        message = f"{path} does not exist on {revision}"
        raise HubError(404, message, "EntryNotFound", X_Repo_Commit=commit.oid)
    expand = request.query("expand").lower() == "true"
    start = int(request.query("cursor", "0"))
    stop = start + hub.page_size
    reply = json_reply([_entry(repository, commit, child, expand) for child in children[start:stop]])
    if stop < len(children):
        query = {name: request.query(name) for name in ("recursive", "expand") if request.query(name)}
        following = urlencode({**query, "cursor": str(stop)})
        reply.headers["Link"] = f'<{hub.endpoint}{request.path}?{following}>; rel="next"'
    return reply


@route("POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """Describe the paths asked for; those that do not exist are left out."""
    repository = hub.find(request, repo)
    commit = repository.commit(revision)
    form = parse_qs(request.body().decode())
    expand = form.get("expand", ["false"])[0].lower() == "true"
    entries = [_entry(repository, commit, path.strip("/"), expand) for path in form.get("paths", [])]
    return json_reply([entry for entry in entries if entry is not None])


@route("GET", "/api/models/{repo}/commits/{revision}")
def commits(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """List the commits of a revision, newest first."""
    listed = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in hub.find(request, repo).history(revision)
    ]
    return json_reply(listed, X_Total_Count=str(len(listed)))


@route("GET", "/{repo}/resolve/{revision}/{path}")
def resolve(hub: "LocalHub", request: Request, repo: str, revision: str, path: str) -> Reply:
    """Answer with a small file itself, or redirect to the signed storage address of a large one."""
    repository = hub.find(request, repo)
    accounts.check_files(repository, hub.user(request))
    commit, blob = repository.file(revision, path)
    headers = {"X-Repo-Commit": commit.oid, "Content-Disposition": f'inline; filename="{path.rsplit("/", 1)[-1]}";'}
    if blob.data is not None:
        return ranged(request, blob.data, {**headers, "ETag": f'"{blob.oid}"', "Content-Type": "text/plain"})
    assert blob.sha256 is not None
    address = objects.signed(hub.cdn, f"/objects/{blob.sha256}", name=path.rsplit("/", 1)[-1])
    headers |= {
        "Accept-Ranges": "bytes",
        "ETag": f'"{blob.oid}"',
        "X-Linked-ETag": f'"{blob.sha256}"',
        "X-Linked-Size": str(blob.size),
        "Location": address,
    }
    if blob.xet_hash:
        token_url = f"{hub.endpoint}/api/models/{repository.id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
    return Reply(302, headers, f"Found. Redirecting to {address}".encode())


@route("GET", "/objects/{sha256}", origin="cdn")
def stored_object(hub: "LocalHub", request: Request, sha256: str) -> Reply:
    """Serve a large file from storage."""
    (name,) = objects.check_signature(request, "name")
    headers = {
        "ETag": f'"{sha256}"',
        "Content-Type": "binary/octet-stream",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{name}\";",
    }
    return ranged(request, hub.large_bytes(sha256), headers)


@route("GET", "/api/models/{repo}/safetensors-metadata/{path}")
def safetensors_metadata(hub: "LocalHub", request: Request, repo: str, path: str) -> Reply:
    """Return the headers of every shard an index on main names, in one answer."""
    repository = hub.find(request, repo)
    accounts.check_files(repository, hub.user(request))
    text = _read(hub, repository.file("main", path)[1])
    index = json.loads(text if isinstance(text, bytes) else text.read())
    shards = sorted(set(index["weight_map"].values()))
    headers = {shard: _header(_read(hub, repository.file("main", shard)[1])) for shard in shards}
    return json_reply({"headers": headers, "index": {"metadata": index.get("metadata")}})


def _read(hub: "LocalHub", blob: Blob) -> bytes | FileSlice:
    if blob.data is not None:
        return blob.data
    assert blob.sha256 is not None
    return hub.large_bytes(blob.sha256)


def _header(data: bytes | FileSlice) -> Any:
    def read(part: slice) -> bytes:
        piece = data[part]
        return piece if isinstance(piece, bytes) else piece.read()

    length = int.from_bytes(read(slice(0, 8)), "little")
    return json.loads(read(slice(8, 8 + length)))
