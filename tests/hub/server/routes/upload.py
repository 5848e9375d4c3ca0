"""Writing: preupload, large file uploads (single and multipart) and the atomic commit."""

import base64
import fnmatch
import json
import math
from typing import TYPE_CHECKING, Any

from tests.hub.server import accounts, card, objects
from tests.hub.server.routes import route
from tests.hub.server.store import Blob, Commit, Repo, upload_mode
from tests.hub.server.wire import HubError, Reply, Request, json_reply

if TYPE_CHECKING:
    from tests.hub.server.hub import LocalHub

_GIT_LFS = "application/vnd.git-lfs+json"


def _writable(hub: "LocalHub", request: Request, repo_id: str) -> Repo:
    repo = hub.find(request, repo_id)
    accounts.check_write(repo.owner, hub.user(request), pull=bool(request.query("create_pr")))
    return repo


@route("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """Say how each file is to be uploaded, and the id of what is there, so that the client drops what is unchanged."""
    commit = _writable(hub, request, repo).commit(revision)
    wanted = request.json()
    ignored = [line.strip() for line in wanted.get("gitIgnore", "").splitlines() if line.strip()[:1] not in ("", "#")]
    files = []
    for file in wanted["files"]:
        path = file["path"]
        names = (path, path.rsplit("/", 1)[-1])
        answer = {
            "path": path,
            "uploadMode": upload_mode(path, file["size"], base64.b64decode(file["sample"])),
            "shouldIgnore": any(fnmatch.fnmatch(name, pattern) for name in names for pattern in ignored),
        }
        if path in commit.files:
            blob = commit.files[path]
            answer["oid"] = blob.sha256 or blob.oid
        files.append(answer)
    return json_reply({"files": files})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """Hand out upload addresses for objects this repository does not have yet (git-lfs batch API)."""
    repository = hub.find(request, repo)
    accounts.check_write(repository.owner, hub.user(request), pull=True)
    wanted = request.json()
    if hub.cas_url and "xet" in wanted["transfers"]:
        # Clients of the 1.x line offer xet here and go on to the xet token once it is chosen.
        asked = [{"oid": item["oid"], "size": item["size"]} for item in wanted["objects"]]
        return json_reply({"transfer": "xet", "objects": asked}, Content_Type=_GIT_LFS)
    answers = [_batch_item(hub, repository, item["oid"], item["size"]) for item in wanted["objects"]]
    multipart = any("header" in item.get("actions", {}).get("upload", {}) for item in answers)
    body = {"transfer": "multipart" if multipart else "basic", "objects": answers}
    return json_reply(body, Content_Type=_GIT_LFS)


def _batch_item(hub: "LocalHub", repo: Repo, oid: str, size: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"oid": oid, "size": size}
    if oid in repo.large:
        return answer
    upload: dict[str, Any]
    if size > hub.multipart_above:
        upload_id = hub.next_id()
        path = f"/upload/{oid}"
        count = math.ceil(size / hub.part_size)
        parts = {
            str(number): objects.signed(hub.cdn, path, repo=repo.id, upload=upload_id, part=str(number))
            for number in range(1, count + 1)
        }
        complete = objects.signed(hub.endpoint, "/api/complete_multipart", repo=repo.id, upload=upload_id)
        upload = {"href": complete, "header": {"chunk_size": str(hub.part_size), **parts}}
    else:
        upload = {"href": objects.signed(hub.cdn, f"/upload/{oid}", repo=repo.id, upload="", part="")}
    verify = {"href": f"{hub.endpoint}/{repo.id}.git/info/lfs/objects/verify"}
    return {**answer, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


@route("PUT", "/upload/{sha256}", origin="cdn")
def upload_object(hub: "LocalHub", request: Request, sha256: str) -> Reply:
    """Take a whole object, or one part of it, at a signed storage address."""
    repo, upload, part = objects.check_signature(request, "repo", "upload", "part")
    if part:
        return Reply(200, {"ETag": hub.objects.put_part(upload, int(part), request.pieces())})
    hub.objects.put(sha256, request.pieces())
    hub.store.repos[repo].large.add(sha256)
    return Reply(200, {"ETag": f'"{sha256}"'})


@route("POST", "/api/complete_multipart")
def complete_multipart(hub: "LocalHub", request: Request) -> Reply:
    """Join the parts of a multipart upload."""
    repo, upload = objects.check_signature(request, "repo", "upload")
    wanted = request.json()
    hub.objects.complete(upload, wanted["oid"], wanted["parts"])
    hub.store.repos[repo].large.add(wanted["oid"])
    return json_reply({})


@route("POST", "/{repo}.git/info/lfs/objects/verify")
def verify(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """Confirm that an object arrived with the size the client has."""
    repository = hub.find(request, repo)
    accounts.check_write(repository.owner, hub.user(request), pull=True)
    wanted = request.json()
    if wanted["oid"] not in repository.large:
        raise HubError(404, f"Object {wanted['oid']} was not uploaded")
    size = len(hub.objects.slice(wanted["oid"]))
    if size != wanted["size"]:
        raise HubError(400, f"Object {wanted['oid']} has {size} bytes, expected {wanted['size']}")
    return json_reply({"message": "ok"})


@route("POST", "/api/models/{repo}/commit/{revision}")
def commit(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """Apply all operations of a commit, or none; 412 when `parentCommit` is no longer the head."""
    repository = hub.find(request, repo)
    create_pr = bool(request.query("create_pr"))
    user = accounts.check_write(repository.owner, hub.user(request), pull=create_pr or revision.startswith("refs/pr/"))
    lines = [json.loads(line) for line in request.body().splitlines() if line.strip()]
    headers = [line["value"] for line in lines if line["key"] == "header"]
    if len(headers) != 1 or not headers[0].get("summary"):
        raise HubError(400, "A commit needs one header with a summary")
    operations = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
    title, message = headers[0]["summary"], headers[0].get("description", "")
    with hub.store.lock:
        base = repository.commit(revision)
        ref = repository.ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(404, f"{revision} is not a branch", "RevisionNotFound")
        parent = headers[0].get("parentCommit")
        if parent and create_pr:
            base = repository.commit(parent)
        elif parent and not base.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = _applied(hub, repository, base, operations)
        body: dict[str, Any] = {"success": True}
        if create_pr:
            pull = repository.open_pull(title, message, user.name, base, ref)
            ref = pull.ref
            body["pullRequestUrl"] = hub.pull_url(repository, pull)
        made = repository.record(ref, base, files, title, message, user.name)
    return json_reply({"commitUrl": f"{hub.endpoint}/{repository.id}/commit/{made.oid}", "commitOid": made.oid, **body})


def _applied(
    hub: "LocalHub", repo: Repo, base: Commit, operations: list[tuple[str, dict[str, Any]]]
) -> dict[str, Blob]:
    files = dict(base.files)
    for key, value in operations:
        path = value["path"]
        if any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
            raise HubError(400, f"Invalid path in commit: {path}")
        if key not in _OPERATIONS:
            raise HubError(400, f"Unknown operation in commit: {key}")
        _OPERATIONS[key](hub, repo, files, value)
    return files


def _add(hub: "LocalHub", repo: Repo, files: dict[str, Blob], value: dict[str, Any]) -> None:
    data = base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
    path = value["path"]
    if upload_mode(path, len(data), data[:512]) == "lfs" and data:
        raise HubError(400, f"{path} has to be uploaded as a large file, not inside the commit")
    if path == "README.md" and (errors := card.check(data.decode())[0]):
        raise HubError(400, "Invalid metadata in README.md: " + " ".join(errors))
    files[path] = Blob.regular(data)


def _add_large(hub: "LocalHub", repo: Repo, files: dict[str, Blob], value: dict[str, Any]) -> None:
    sha256 = value["oid"]
    if sha256 in repo.large:
        size, xet_hash = len(hub.objects.slice(sha256)), None
    else:
        file = hub.xet_file(sha256)
        if file is None:
            raise HubError(400, f"LFS pointer {value['path']} points to {sha256}, which was never uploaded")
        xet_hash, size = file
    if value.get("size", size) != size:
        raise HubError(400, f"{value['path']} has {size} bytes in storage, the commit says {value['size']}")
    files[value["path"]] = Blob.large(sha256, size, xet_hash)


def _delete_file(hub: "LocalHub", repo: Repo, files: dict[str, Blob], value: dict[str, Any]) -> None:
    if files.pop(value["path"], None) is None:
        raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")


def _delete_folder(hub: "LocalHub", repo: Repo, files: dict[str, Blob], value: dict[str, Any]) -> None:
    inside = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
    if not inside:
        raise HubError(404, f"A folder with this name doesn't exist: {value['path']}", "EntryNotFound")
    for path in inside:
        del files[path]


_OPERATIONS = {"file": _add, "lfsFile": _add_large, "deletedFile": _delete_file, "deletedFolder": _delete_folder}
