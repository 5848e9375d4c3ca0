"""Print the table; see the folder's docstring."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interop.image_table")
    parser.add_argument("families", nargs="*", help="families (default: all)")
    parser.add_argument("--naming", help="one naming only")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    from tests.interop.image_table.files import namings
    from tests.interop.image_table.models import MODELS, PACKED
    from tests.interop.image_table.rows import COLUMNS, row

    print(f"{'family':<18}{'naming':<11}", *(f"{column:<9}" for column in COLUMNS))
    faults = 0
    for family in options.families or [*MODELS, *PACKED]:
        for naming in namings(family):
            if options.naming in (None, naming):
                with tempfile.TemporaryDirectory() as folder:
                    line = row(family, naming, Path(folder))
                outcomes = [line.outcomes[c] if c not in line.faults else "NO" for c in COLUMNS]
                print(f"{family:<18}{naming:<11}", *(f"{outcome:<9}" for outcome in outcomes), flush=True)
                for column, fault in line.faults.items():
                    print(f"    {column}: {fault[:160]}", flush=True)
                faults += len(line.faults)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
