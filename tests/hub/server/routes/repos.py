"""Accounts, repositories, refs and pull requests."""

from typing import TYPE_CHECKING, Any

from tests.hub.server import accounts, card
from tests.hub.server.routes import route
from tests.hub.server.store import Pull, Repo
from tests.hub.server.wire import HubError, Reply, Request, json_reply

if TYPE_CHECKING:
    from tests.hub.server.hub import LocalHub


@route("GET", "/api/whoami-v2")
def whoami(hub: "LocalHub", request: Request) -> Reply:
    """Say whose token this is."""
    user = hub.user(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "fullname": name} for name in user.orgs]
    token = {"displayName": "test", "role": user.role}
    auth = {"type": "access_token", "accessToken": token}
    return json_reply({"type": "user", "id": user.name, "name": user.name, "orgs": orgs, "auth": auth})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: "LocalHub", request: Request) -> Reply:
    """Check a card before anything is uploaded."""
    errors, warnings = card.check(request.json()["content"])
    body = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return json_reply(body, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create(hub: "LocalHub", request: Request) -> Reply:
    """Create a repository; the 409 of an existing one still names its address, which the client reads."""
    wanted = request.json()
    user = hub.user(request)
    namespace = wanted.get("organization") or (user.name if user else "")
    user = accounts.check_write(namespace, user)
    if wanted.get("type", "model") != "model":
        raise HubError(400, "This Hub only has models.")
    repo_id = f"{namespace}/{wanted['name']}"
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    with hub.store.lock:
        known = repo_id in hub.store.repos
        if not known:
            hub.store.create(repo_id, user.name, private=private)
    body = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
    if known:
        message = "You already created this model repo"
        return json_reply({"error": message, **body}, 409, X_Error_Message=message)
    return json_reply(body)


@route("DELETE", "/api/repos/delete")
def delete(hub: "LocalHub", request: Request) -> Reply:
    """Delete a repository."""
    wanted = request.json()
    user = hub.user(request)
    namespace = wanted.get("organization") or (user.name if user else "")
    repo = accounts.find(hub.store, f"{namespace}/{wanted['name']}", user)
    accounts.check_write(namespace, user)
    with hub.store.lock:
        del hub.store.repos[repo.id]
    return json_reply({})


@route("PUT", "/api/models/{repo}/settings")
def settings(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """Change visibility or gating."""
    repository = hub.find(request, repo)
    accounts.check_write(repository.owner, hub.user(request))
    wanted = request.json()
    if "visibility" in wanted or "private" in wanted:
        repository.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    if "gated" in wanted:
        repository.gated = wanted["gated"]
    return json_reply({})


@route("GET", "/api/models/{repo}")
def info(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """Describe a model at its main branch."""
    return _info(hub, request, hub.find(request, repo), "main")


@route("GET", "/api/models/{repo}/revision/{revision}")
def revision_info(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """Describe a model at a revision."""
    return _info(hub, request, hub.find(request, repo), revision)


def _info(hub: "LocalHub", request: Request, repo: Repo, revision: str) -> Reply:
    commit = repo.commit(revision)
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if request.query("blobs"):
        for sibling in siblings:
            blob = commit.files[sibling["rfilename"]]
            sibling |= {"size": blob.size, "blobId": blob.oid}
            if blob.sha256:
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    body = {
        "_id": repo.id,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.owner,
        "sha": commit.oid,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": next(iter(repo.commits.values())).date,
        "lastModified": commit.date,
        "siblings": siblings,
        **card.described(commit),
    }
    if hub.cas_url:
        body["xetEnabled"] = True
    return json_reply(body)


@route("GET", "/api/models/{repo}/auth-check")
def auth_check(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """Say whether the caller may read the files."""
    accounts.check_files(hub.find(request, repo), hub.user(request))
    return json_reply({})


@route("GET", "/api/models/{repo}/auth-check/write")
def auth_check_write(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """Say whether the caller may write."""
    accounts.check_write(hub.find(request, repo).owner, hub.user(request))
    return json_reply({})


@route("GET", "/api/models/{repo}/refs")
def refs(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """List branches, tags and, when asked, pull requests."""
    repository = hub.find(request, repo)

    def under(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in repository.refs.items()
            if ref.startswith(prefix)
        ]

    body: dict[str, Any] = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    if request.query("include_prs"):
        body["pullRequests"] = under("refs/pr/")
    return json_reply(body)


@route("POST", "/api/models/{repo}/branch/{name}")
def create_branch(hub: "LocalHub", request: Request, repo: str, name: str) -> Reply:
    """Create a branch."""
    return _create_ref(hub, request, repo, f"refs/heads/{name}", request.json().get("startingPoint", "main"))


@route("POST", "/api/models/{repo}/tag/{revision}")
def create_tag(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """Create a tag."""
    return _create_ref(hub, request, repo, f"refs/tags/{request.json()['tag']}", revision)


def _create_ref(hub: "LocalHub", request: Request, repo_id: str, ref: str, start: str) -> Reply:
    repo = hub.find(request, repo_id)
    accounts.check_write(repo.owner, hub.user(request))
    with hub.store.lock:
        commit = repo.commit(start)
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = commit.oid
    return json_reply({})


@route("DELETE", "/api/models/{repo}/branch/{name}")
def delete_branch(hub: "LocalHub", request: Request, repo: str, name: str) -> Reply:
    """Delete a branch."""
    return _delete_ref(hub, request, repo, f"refs/heads/{name}")


@route("DELETE", "/api/models/{repo}/tag/{name}")
def delete_tag(hub: "LocalHub", request: Request, repo: str, name: str) -> Reply:
    """Delete a tag."""
    return _delete_ref(hub, request, repo, f"refs/tags/{name}")


def _delete_ref(hub: "LocalHub", request: Request, repo_id: str, ref: str) -> Reply:
    repo = hub.find(request, repo_id)
    accounts.check_write(repo.owner, hub.user(request))
    with hub.store.lock:
        if ref not in repo.refs:
            raise HubError(404, f"Reference does not exist: {ref}", "RevisionNotFound")
        del repo.refs[ref]
    return json_reply({})


@route("POST", "/api/models/{repo}/discussions")
def create_discussion(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """Open a pull request (an empty one: its commits come to refs/pr/<number>)."""
    repository = hub.find(request, repo)
    user = accounts.check_write(repository.owner, hub.user(request), pull=True)
    wanted = request.json()
    if not wanted.get("pullRequest"):
        raise HubError(400, "This Hub only has pull requests, no discussions.")
    with hub.store.lock:
        base = repository.commit("main")
        pull = repository.open_pull(wanted["title"], wanted["description"], user.name, base, "refs/heads/main")
    return json_reply({"num": pull.number, "url": hub.pull_url(repository, pull), "pullRequest": True})


@route("GET", "/api/models/{repo}/discussions")
def discussions(hub: "LocalHub", request: Request, repo: str) -> Reply:
    """List the pull requests, on one page."""
    repository = hub.find(request, repo)
    listed = [_pull(repository, pull) for pull in repository.pulls] if request.query("p", "0") == "0" else []
    return json_reply({"discussions": listed, "count": len(repository.pulls), "start": 0})


@route("GET", "/api/models/{repo}/discussions/{number}")
def discussion(hub: "LocalHub", request: Request, repo: str, number: str) -> Reply:
    """Describe one pull request."""
    repository = hub.find(request, repo)
    pulls = [pull for pull in repository.pulls if str(pull.number) == number]
    if not pulls:
        raise HubError(404, f"Discussion {number} not found")
    return json_reply(_pull(repository, pulls[0]))


def _pull(repo: Repo, pull: Pull) -> dict[str, Any]:
    return {
        "num": pull.number,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": pull.date,
        "status": "open",
        "repo": {"name": repo.id, "type": "model"},
        "isPullRequest": True,
        "changes": {"base": pull.base},
        "filesWithConflicts": [],
        "events": [],
        "diff": "",
    }
