"""How much memory there is where control groups limit it, of both versions, inside and outside of containers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from streamlap.system import cgroups
from streamlap.system.budget import free_ram

SYSTEM = 10 << 30
"""What the machine as a whole has free in these tests."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with that much free and no control groups; their folder."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=SYSTEM))
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "OWN_CGROUP", tmp_path / "own")
    return tmp_path / "cgroup"


def belongs_to(root: Path, *lines: str) -> None:
    """What /proc/self/cgroup says."""
    (root.parent / "own").write_text("".join(line + "\n" for line in lines))


def v2(folder: Path, limit: int | str, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 7\n")


def v1(folder: Path, limit: int, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {cache}\n")


def test_without_control_groups_the_system_decides(machine: Path) -> None:
    assert not machine.exists()
    assert free_ram() == SYSTEM


def test_the_limit_of_the_own_group_counts(machine: Path) -> None:
    belongs_to(machine, "0::/job")
    v2(machine / "job", 4 << 30, 1 << 30)
    assert free_ram() == 3 << 30


def test_a_limit_above_what_the_system_has_changes_nothing(machine: Path) -> None:
    belongs_to(machine, "0::/job")
    v2(machine / "job", 40 << 30, 1 << 30)
    assert free_ram() == SYSTEM


def test_a_group_without_a_limit_leaves_it_to_those_above(machine: Path) -> None:
    belongs_to(machine, "0::/slice/job/step")
    v2(machine / "slice/job/step", "max", 1 << 30)
    v2(machine / "slice/job", 6 << 30, 1 << 30)
    v2(machine / "slice", 5 << 30, 2 << 30)
    assert free_ram() == 3 << 30


def test_the_inner_of_two_limits_counts_where_it_is_the_tighter(machine: Path) -> None:
    belongs_to(machine, "0::/job/step")
    v2(machine / "job/step", 3 << 30, 1 << 30)
    v2(machine / "job", 8 << 30, 2 << 30)
    assert free_ram() == 2 << 30


def test_page_cache_that_can_go_is_free(machine: Path) -> None:
    belongs_to(machine, "0::/job")
    v2(machine / "job", 4 << 30, 4 << 30, cache=1 << 30)
    assert free_ram() == 1 << 30


def test_a_group_over_its_limit_leaves_nothing(machine: Path) -> None:
    belongs_to(machine, "0::/job")
    v2(machine / "job", 4 << 30, 5 << 30)
    assert free_ram() == 0


def test_in_a_container_only_the_root_is_there(machine: Path) -> None:
    """The path is the host's, and what is mounted is the container's own group."""
    belongs_to(machine, "0::/system.slice/docker-0123.scope")
    v2(machine, 2 << 30, 1 << 30)
    assert free_ram() == 1 << 30


def test_version_1_has_a_tree_of_its_own(machine: Path) -> None:
    belongs_to(machine, "12:pids:/other", "4:memory:/job", "1:name=systemd:/other")
    v1(machine / "memory" / "job", 4 << 30, 2 << 30, cache=1 << 30)
    v1(machine / "memory" / "other", 1 << 30, 0)
    assert free_ram() == 3 << 30


def test_version_1_says_no_limit_by_a_huge_number(machine: Path) -> None:
    belongs_to(machine, "4:memory:/job")
    v1(machine / "memory" / "job", 9223372036854771712, 2 << 30)
    v1(machine / "memory", 9223372036854771712, 2 << 30)
    assert free_ram() == SYSTEM


def test_version_1_in_a_container(machine: Path) -> None:
    belongs_to(machine, "4:memory:/docker/0123", "0::/")
    v1(machine / "memory", 3 << 30, 1 << 30)
    assert free_ram() == 2 << 30


@pytest.mark.parametrize("damage", ["max", "current"])
def test_groups_that_cannot_be_read_limit_nothing(machine: Path, damage: str) -> None:
    belongs_to(machine, "0::/job")
    v2(machine / "job", 4 << 30, 1 << 30)
    (machine / "job" / f"memory.{damage}").write_text("garbage")
    assert free_ram() == SYSTEM


def test_here_and_now_something_is_free() -> None:
    assert 0 < free_ram() <= psutil.virtual_memory().total
