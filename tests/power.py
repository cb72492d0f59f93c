"""What a power cut leaves: the states of the disk that a recorded run could have been thrown back to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faults import Operation


@dataclass(eq=False)
class File:
    data: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class Folder:
    """Names as they are for who looks, and as the last sync of this folder has put them on the disk."""

    live: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)


Tree = dict[str, "bytes | Tree"]
Names = Callable[[Folder], dict[str, "File | Folder"]]
Bytes = Callable[[File], bytes]


def torn(file: File) -> bytes:
    """Half of what was written since the last sync."""
    return file.data[: (len(file.data) + len(file.synced)) // 2]


CUTS: dict[str, tuple[Names, Bytes]] = {
    "nothing but what was synced": (lambda folder: folder.durable, lambda file: file.synced),
    "all names, synced bytes": (lambda folder: folder.live, lambda file: file.synced),
    "all names, torn bytes": (lambda folder: folder.live, torn),
    "synced names, torn bytes": (lambda folder: folder.durable, torn),
}
"""A folder and a file as they may be after the cut. The system may also do one thing here and another there: see `mixed`."""


def mixed(seed: int) -> tuple[Names, Bytes]:
    """Each folder and each file as chance has it."""
    chance = random.Random(seed)
    return (
        lambda folder: chance.choice([folder.durable, folder.live]),
        lambda file: chance.choice([file.synced, torn(file), file.data]),
    )


class Replay:
    """The disk under `root`, which is there from the beginning, brought forward operation by operation."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Folder()

    def at(self, path: Path) -> Folder:
        found: File | Folder = self.top
        for name in path.relative_to(self.root).parts:
            assert isinstance(found, Folder)
            found = found.live[name]
        assert isinstance(found, Folder)
        return found

    def apply(self, done: Operation) -> None:
        if done.kind in ("open", "read"):
            return
        if done.kind == "sync folder":
            folder = self.at(done.path)
            folder.durable = dict(folder.live)
            return
        names, name = self.at(done.path.parent).live, done.path.name
        if done.kind == "mkdir":
            names[name] = Folder()
        elif done.kind in ("unlink", "rmdir"):
            del names[name]
        elif done.kind == "rename":
            assert done.target is not None
            self.at(done.target.parent).live[done.target.name] = names.pop(name)
        else:
            file = names.setdefault(name, File())
            assert isinstance(file, File)
            changed = {"create": b"", "write": file.data + done.data, "truncate": file.data[: done.offset]}
            file.data = changed.get(done.kind, file.data)
            if done.kind == "sync":
                file.synced = file.data

    def tree(self, cut: tuple[Names, Bytes]) -> Tree:
        """The disk after a power cut now."""

        def below(node: File | Folder) -> bytes | Tree:
            return cut[1](node) if isinstance(node, File) else {n: below(x) for n, x in sorted(cut[0](node).items())}

        tree = below(self.top)
        assert isinstance(tree, dict)
        return tree


def trees(
    root: Path, operations: Iterable[Operation], cut: tuple[Names, Bytes], after: int = 0
) -> Iterator[tuple[int, Tree]]:
    """Where a cut after each operation but the first `after` leaves the disk, and how many lines of the journal were safe by
    then; no state twice."""
    replay, lines, before = Replay(root), 0, None
    for number, done in enumerate(operations, 1):
        replay.apply(done)
        if done.path.name == "journal.jsonl" and done.kind in ("sync", "unlink"):
            file = replay.at(done.path.parent).live.get(done.path.name)
            lines = file.synced.count(b"\n") if isinstance(file, File) else 0
        if number > after and (state := (lines, replay.tree(cut))) != before:
            yield state
            before = state


def write(tree: Tree, folder: Path) -> None:
    """Put a tree on a real disk, into a new folder."""
    folder.mkdir()
    for name, node in tree.items():
        write(node, folder / name) if isinstance(node, dict) else (folder / name).write_bytes(node)
