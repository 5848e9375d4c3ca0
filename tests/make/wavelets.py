"""Write the filters of the wavelets that PEFT's WaveFT can merge: `python -m tests.make.wavelets`.

They are PEFT's own, taken from PyWavelets, as `loratools/adapter/kinds/wavelets.json`: those whose number of taps PEFT
knows how much larger it makes a weight for.
"""

from __future__ import annotations

import json

from tests.make import REPOSITORY

TABLE = REPOSITORY / "loratools" / "adapter" / "kinds" / "wavelets.json"


def listed() -> dict[str, list[float]]:
    """Return name -> filter g of the installed PEFT."""
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import Wavelet, wavelist

    known = {name: list(Wavelet(name).rec_lo) for name in wavelist() if name in WAVELET_REDUCTIONS}
    return {name: taps for name, taps in known.items() if WAVELET_REDUCTIONS[name] == (len(taps) - 2, len(taps) - 2)}


def written() -> str:
    """Return the table as it stands in the file, a wavelet a line."""
    lines = ",\n".join(f' "{name}": {json.dumps(taps)}' for name, taps in listed().items())
    return f"{{\n{lines}\n}}\n"


if __name__ == "__main__":
    TABLE.write_text(written(), encoding="utf-8")
