"""The same work on many modules, several at a time: each on one thread of torch, so that no number depends on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loratools.errors import IncompatibleAdapter

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[str, Item], Result], items: Mapping[str, Item], threads: int | None) -> dict[str, Result]:
    """Return module -> work(module, item), begun in the order of the items; `threads` is by default one per core.

    Raises `IncompatibleAdapter` with every module for which `work` raises `ValueError`, and why.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Result] = {}
    problems = []
    try:
        with ThreadPoolExecutor(threads or _cores()) as pool:
            futures = {module: pool.submit(work, module, item) for module, item in items.items()}
            try:
                for module, future in futures.items():
                    try:
                        found[module] = future.result()
                    except ValueError as error:
                        problems.append(f"{module}: {error}")
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)
    if problems:
        raise IncompatibleAdapter(f"{len(problems)} module(s) cannot be worked on", problems)
    return found


def _cores() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
