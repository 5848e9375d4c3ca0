"""A model is sent while it is being made: one commit at the end, and never a second copy of it on disk."""

from __future__ import annotations

from pathlib import Path

from loratools.hub import files, push
from loratools.hub.client import Hub
from loratools.hub.refs import Ref
from loratools.hub.subject import read
from loratools.hub.upload import Committed, Uploader, look


class Stream:
    """Takes the finished shards of a model that is written into `folder`, in any order, then everything beside them.

    stream = Stream(Hub(), Ref("org/name"), folder)
    stream.shard(folder / "model-00001-of-00002.safetensors")   # sent; only its header stays on disk
    ...
    stream.finish("Merged with loratools")                      # config, tokenizer, index, card; the one commit

    With `keep` the shards stay on disk as they are. Of a model that is one file `place` is the path of that file, of
    any other the folder that it is written into. What the commit was, and what to say of it, is in `done`.
    """

    def __init__(
        self, hub: Hub, ref: Ref, place: Path, *, private: bool = False, keep: bool = False,
        base_model: str | None = None, license: str | None = None,
    ) -> None:  # fmt: skip
        target = look(hub, ref.repo, revision=ref.revision)
        self.hub, self.place, self.uploader = hub, place, Uploader(hub, target, private=private)
        self.keep, self.base_model, self.license = keep, base_model, license
        self._sent: set[str] = set()
        self.done: tuple[Committed, list[str]] | None = None

    def shard(self, path: Path) -> None:
        """Send a finished safetensors file, then give its place on disk back: header and size stay, data do not.

        Safe to call from one thread at a time. Raises `HubError`; the file is then still whole.
        """
        name = path.name if path == self.place else path.relative_to(self.place).as_posix()
        self.uploader.send(name, path)
        self._sent.add(name)
        if self.keep:
            return
        size = path.stat().st_size
        with path.open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.truncate(min(header, size))
            file.truncate(size)

    def finish(self, message: str) -> tuple[Committed, list[str]]:
        """Send what lies beside the shards, with the model card, and make the one commit; return it, and what to say.

        Shards of an earlier version that the new one does not have are removed by the same commit. Raises `HubError`.
        """
        subject, target = read(self.place, self.base_model), self.uploader.target
        text, notes = push.card_for(self.hub, subject, target, self.license, None)
        self.hub.validate_card(target.repo, text)
        for name, content in subject.content.items():
            if isinstance(content, Path) and name not in self._sent | {push.CARD}:
                self.uploader.send(name, content)
        self.uploader.send(push.CARD, text.encode())
        for name in files.stale(target.tree, subject.content):
            self.uploader.remove(name)
        self.done = self.uploader.commit(message), notes
        return self.done
