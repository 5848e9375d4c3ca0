"""Who is asking, and what they may do: the Hub's 401, 403 and 404 rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tests.hub.server.store import Repo, Store
from tests.hub.server.wire import HubError, Request


@dataclass(frozen=True)
class User:
    """One account as seen through one of its tokens."""

    name: str
    orgs: tuple[str, ...] = ()
    role: Literal["read", "write"] = "write"

    def owns(self, namespace: str) -> bool:
        """Whether this account may write under `namespace`."""
        return namespace == self.name or namespace in self.orgs


def user_of(request: Request, tokens: Mapping[str, User]) -> User | None:
    """Return the account of the request's bearer token, None without one, 401 for a token nobody has."""
    header = request.headers.get("Authorization")
    if header is None:
        return None
    user = tokens.get(header.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


def find(store: Store, repo_id: str, user: User | None) -> Repo:
    """Return a repository the user may see; a private one looks missing: 404, or 401 without a token."""
    repo = store.repos.get(repo_id)
    if repo is None or (repo.private and not (user and user.owns(repo.owner))):
        raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
    return repo


def check_files(repo: Repo, user: User | None) -> None:
    """Refuse the files of a gated repository to those who have not been granted access: 401 or 403 GatedRepo."""
    if not repo.gated or (user and (user.owns(repo.owner) or user.name in repo.granted)):
        return
    if user is None:
        message = f"Access to model {repo.id} is restricted. You must have access to it and be authenticated."
        raise HubError(401, message, "GatedRepo")
    message = f"Access to model {repo.id} is restricted and you are not in the authorized list."
    raise HubError(403, message, "GatedRepo")


def check_write(namespace: str, user: User | None, *, pull: bool = False) -> User:
    """Return the user when they may write under `namespace`; anyone with a write token may open a pull request."""
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if user.role != "write":
        raise HubError(403, "You must use a write token to do this: this token has the role read.")
    if not (pull or user.owns(namespace)):
        raise HubError(403, f"You don't have the rights to write under the namespace {namespace}.")
    return user
