"""Control groups of memory on Linux, v1 and v2: run a command where page cache counts and the kernel keeps the limit.

https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html beside it. No command itself.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")

LIMITS = {
    "cgroup v1": {"memory.limit_in_bytes": "{}", "memory.memsw.limit_in_bytes": "{}"},
    "cgroup v2": {"memory.max": "{}", "memory.swap.max": "0"},
}
"""Kind -> file -> what to write there; the second of each is about swap and need not exist."""
FIGURES = {
    "cgroup v1": {
        "peak_bytes": ("memory.max_usage_in_bytes", ""),
        "limit_hits": ("memory.failcnt", ""),
        "oom_kills": ("memory.oom_control", "oom_kill "),
    },
    "cgroup v2": {
        "peak_bytes": ("memory.peak", ""),
        "limit_hits": ("memory.events", "max "),
        "oom_kills": ("memory.events", "oom_kill "),
    },
}
"""Kind -> figure -> file, and what the line with the number begins with."""
WAIT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group made here for one run."""

    kind: str
    folder: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words that bring the command after them into the group and become it."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"))

    def limit(self, count: int) -> None:
        """Raises OSError where this group cannot be limited, or entered."""
        (limit, text), (swap, swap_text) = LIMITS[self.kind].items()
        (self.folder / limit).write_text(text.format(count))
        with contextlib.suppress(OSError):
            (self.folder / swap).write_text(swap_text.format(count))
        if subprocess.run([*self.prefix, "true"], stderr=subprocess.DEVNULL).returncode:
            raise PermissionError(f"no process may be moved into {self.folder}")

    def figures(self) -> dict[str, int | None]:
        """Highest use, how often the limit was met (page cache gives way then), how often a process was killed for it."""
        return {name: read_number(self.folder / file, begin) for name, (file, begin) in FIGURES[self.kind].items()}

    def remove(self) -> None:
        """The last process of the group may take a moment to be gone."""
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self.folder.rmdir()
                break
            except OSError as error:
                if time.monotonic() > end:
                    print(f"{self.folder} could not be removed: {error.strerror}", file=sys.stderr)
                    break
                time.sleep(0.05)


def read_number(path: Path, begin: str = "") -> int | None:
    """The number after `begin` in its line of the file; None where this kernel has none."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(begin):
                return int(line.removeprefix(begin))
    return None


def places() -> Iterator[tuple[str, Path]]:
    """Kind and folder of the groups below which one could be made: that of this process, then those above it."""
    lines = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            switch = CGROUPS / folder / "cgroup.subtree_control"
            if "memory" in controllers.split(","):
                yield "cgroup v1", CGROUPS / "memory" / folder
            elif not controllers and switch.is_file() and "memory" in switch.read_text().split():
                yield "cgroup v2", CGROUPS / folder


def new_group(count: int) -> Group | None:
    """The first group that can be made, limited and entered."""
    for kind, folder in places():
        group = Group(kind=kind, folder=folder / f"streamlap-bench-{time.time_ns()}")
        try:
            group.folder.mkdir()
        except OSError:
            continue
        try:
            group.limit(count)
            return group
        except OSError:
            group.remove()
    return None


@contextlib.contextmanager
def limited_group(count: int) -> Iterator[Group | None]:
    """A group that may hold `count` bytes, page cache included; None where this machine lets us make none."""
    group = new_group(count)
    try:
        yield group
    finally:
        if group:
            group.remove()
