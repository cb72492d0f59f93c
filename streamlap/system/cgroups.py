"""What a container or job scheduler leaves to this process: Linux control groups, version 2 and 1.

Files: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.current, memory.stat, cpu.max) and cgroup-v1
beside it. Where there are none, nothing is limited.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def memory_room() -> Iterator[int]:
    """limit - used, for every group above this process that has a limit; page cache that can go counts as free."""
    for version, folder in _groups("memory"):
        limit, used, cache = (
            ("memory.max", "memory.current", "inactive_file") if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )  # fmt: skip
        with contextlib.suppress(OSError, ValueError, KeyError):
            most = int((folder / limit).read_text())  # "max" is no number: no limit
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield most - int((folder / used).read_text()) + int(stat[cache])


def usable_cpus() -> int:
    """Processors that this process may keep busy: those it may run on, or its time quota, if that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_cpu_quotas()]))


def _cpu_quotas() -> Iterator[int]:
    for version, folder in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # "max" is no number, and -1 is version 1's word for no limit
                yield math.ceil(int(quota) / int(period))


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of the groups of this process that may limit `controller`, from its own up to the root."""
    with contextlib.suppress(OSError):
        for line in OWN_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = CGROUPS / controllers if controllers and (CGROUPS / controllers).is_dir() else CGROUPS
            if controllers and root == CGROUPS:
                root = CGROUPS / controller
            inner = Path(path.lstrip("/"))
            for folder in (
                inner,
                *inner.parents,
            ):  # in a container the path may be the host's: then only the root is there
                yield (1 if controllers else 2), root / folder
