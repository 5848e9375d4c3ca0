"""Jobs of a SLURM cluster: what a job asks for is in dask-jobqueue's own configuration (`jobqueue.slurm`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loratools.errors import InvalidOption, LoraToolsError
from loratools.parallel.executors._dask import connected
from loratools.parallel.executors._pool import Pool, missing

SUMMARY = "jobs of a SLURM cluster, slurm or slurm:16"

_MOST = 16


@contextmanager
def opened(address: str) -> Iterator[Pool]:
    """Submit as many jobs as the address says after its colon, else at most 16, as tasks ask for them."""
    number = address.partition(":")[2]
    if number and not (number.isdecimal() and int(number)):
        raise InvalidOption(f"workers is {address!r}; after slurm: comes a number of jobs")
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError:
        raise missing("dask-jobqueue") from None
    try:
        cluster: Any = SLURMCluster(scheduler_options=_options())
    except (ValueError, TypeError) as error:
        raise LoraToolsError(
            f"slurm: dask-jobqueue cannot describe a job: {error}",
            hint="Set cores and memory under jobqueue.slurm in ~/.config/dask/jobqueue.yaml.",
        ) from None
    with cluster:
        if number:
            cluster.scale(jobs=int(number))
        else:
            cluster.adapt(minimum_jobs=0, maximum_jobs=_MOST)
        with connected(cluster, address, count=int(number) if number else None, patience=None) as pool:
            yield pool


def _options() -> dict[str, Any]:
    """Return what the scheduler is told: its pages are for this machine, where the user's configuration is silent."""
    import dask

    return {"dashboard_address": "127.0.0.1:0", **(dask.config.get("jobqueue.slurm.scheduler-options", None) or {})}
