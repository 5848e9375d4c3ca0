"""What every dialect promises; its tests subclass `DialectContract`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import LossyConversion, OutputRefused

from .adapters import fingerprint, samples


class DialectContract:
    """Set `name`; override `adapters` where the dialect cannot say all samples, and `own` to add real files."""

    name: str
    suffix = ""
    refactors = False  # whether it may move scaling into the factors, or pad the rank, with ΔW the same

    def adapters(self) -> Mapping[str, Adapter]:
        """Return adapters that the dialect can say completely."""
        return samples()

    def lossy(self) -> Mapping[str, tuple[Adapter, tuple[str, ...]]]:
        """Return adapters that it cannot, each with the `where` of every loss."""
        return {}

    def own(self, folder: Path) -> list[Path]:
        """Return real files of the dialect, written into `folder` by another tool."""
        return []

    @pytest.fixture
    def written(self, tmp_path: Path) -> dict[str, tuple[Adapter, Path]]:
        """Write every adapter."""
        found = {}
        for label, adapter in self.adapters().items():
            path = tmp_path / f"{label}{self.suffix}"
            assert dialects.save_adapter(adapter, path, dialect=self.name) == []
            found[label] = adapter, path
        return found

    def test_reading_what_was_written_gives_the_same_delta_weights(
        self, written: dict[str, tuple[Adapter, Path]]
    ) -> None:
        for label, (adapter, path) in written.items():
            again = dialects.open_adapter(path)
            assert again.dialect == self.name, label
            assert again.updates.keys() == adapter.updates.keys(), label
            assert again.replacements.keys() == adapter.replacements.keys(), label
            for module, update in adapter.updates.items():
                read = again.updates[module]
                assert read.kind == update.kind
                assert self.refactors or read.scaling == pytest.approx(update.scaling, rel=1e-12)
                wanted = update.delta_weight()
                # Another order of the same float32 sum may differ by as much as its largest terms' rounding.
                atol = 1e-6 * max(1.0, float(wanted.abs().max())) if self.refactors else 1e-6
                torch.testing.assert_close(read.delta_weight(), wanted, rtol=1e-6, atol=atol)
            for place, lazy in adapter.replacements.items():
                assert torch.equal(again.replacements[place].load(), lazy.load()), (label, place)

    def test_it_is_surest_of_its_own(self, written: dict[str, tuple[Adapter, Path]], tmp_path: Path) -> None:
        for path in [path for _, path in written.values()] + self.own(tmp_path / "own"):
            listing = dialects.Listing.of(path)
            assert dialects.detect(listing)[0] == self.name
            evidence = dialects.get(self.name).detect(listing)
            assert evidence is not None
            assert evidence.reason
            assert evidence.score <= dialects._HIGHEST.get(self.name, 100)

    def test_it_leaves_the_others_theirs(self, tmp_path: Path) -> None:
        for other in sorted(set(dialects.names()) - {self.name}):
            for label, adapter in samples().items():
                if dialects.get(other).losses(adapter):
                    continue
                path = tmp_path / f"{other}-{label}"
                dialects.save_adapter(adapter, path, dialect=other)
                assert dialects.detect(dialects.Listing.of(path))[0] == other

    def test_every_loss_is_named_and_refused(self, tmp_path: Path) -> None:
        for adapter in self.adapters().values():
            assert dialects.get(self.name).losses(adapter) == []
        for label, (adapter, places) in self.lossy().items():
            path = tmp_path / f"{label}{self.suffix}"
            with pytest.raises(LossyConversion) as refusal:
                dialects.save_adapter(adapter, path, dialect=self.name)
            assert not path.exists()
            lost = dialects.save_adapter(adapter, path, dialect=self.name, allow_loss=True)
            assert sorted(loss.where for loss in lost) == sorted(places), label
            assert refusal.value.problems == tuple(map(str, lost))
            again = dialects.open_adapter(path)
            gone = adapter.updates.keys() - again.updates.keys()
            assert gone <= set(places), label

    def test_reading_and_writing_leave_the_input_untouched(
        self, written: dict[str, tuple[Adapter, Path]], tmp_path: Path
    ) -> None:
        for label, (_, path) in written.items():
            before = fingerprint(path)
            again = dialects.open_adapter(path)
            dialects.save_adapter(again, tmp_path / f"{label}-copy{self.suffix}", dialect=self.name)
            assert fingerprint(path) == before

    def test_equal_adapters_give_equal_bytes(self, written: dict[str, tuple[Adapter, Path]], tmp_path: Path) -> None:
        for label, (adapter, path) in written.items():
            twin = tmp_path / f"{label}-twin{self.suffix}"
            dialects.save_adapter(adapter, twin, dialect=self.name)
            assert list(fingerprint(twin).values()) == list(fingerprint(path).values())

    def test_an_output_that_exists_or_is_an_input_is_refused(self, written: dict[str, tuple[Adapter, Path]]) -> None:
        adapter, path = next(iter(written.values()))
        before = fingerprint(path)
        with pytest.raises(OutputRefused, match="exists already"):
            dialects.save_adapter(adapter, path, dialect=self.name)
        with pytest.raises(OutputRefused, match="is also an input"):
            dialects.save_adapter(dialects.open_adapter(path), path, dialect=self.name, force=True)
        assert fingerprint(path) == before
        dialects.save_adapter(adapter, path, dialect=self.name, force=True)
        assert list(fingerprint(path).values()) == list(before.values())
