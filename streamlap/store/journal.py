"""What has been committed to an output folder, and for whom.

`.streamlap/journal.jsonl`: the first line says what the folder is being made from (fingerprint, arguments), every further
line is one finished layer. A line is the commit point of its layer: it is appended and fsynced after the shard and the
next hidden states are on the disk. A torn last line, as a crash leaves it, never happened.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamlap.errors import CheckpointError, ResumeMismatch, first_line, one_line, shown
from streamlap.store.sink import STATE_FOLDER as STATE_FOLDER
from streamlap.store.sink import disk_error, fsync_folder, remove_file, write_durably
from streamlap.untrusted.json import parse_json, read_limited
from streamlap.untrusted.npy import read_integers
from streamlap.untrusted.paths import looking_at

JOURNAL_NAME = "journal.jsonl"
TOKENS_NAME = "tokens.npy"
REDRAWN_NAME = "redrawn.npy"

OWN = "streamlap_*"
"""Files of a finished result by which it is known."""

MOST_BYTES = 1 << 30

REPLACING = ("compress", "survey")
"""The commands that have --overwrite."""


def save_tokens(out: Path, tokens_NL: torch.Tensor) -> None:
    """Keep the calibration windows of a run beside its journal."""
    write_tokens(out / STATE_FOLDER / TOKENS_NAME, tokens_NL)


def write_tokens(path: Path, tokens_NL: torch.Tensor) -> None:
    """Windows of a run, for `read_tokens`."""
    file = io.BytesIO()
    np.save(file, tokens_NL.numpy())
    write_durably(path, file.getvalue())


def saved_tokens(out: Path) -> torch.Tensor:
    """The windows that the run into `out` began with, [N, L]. Raises ResumeMismatch when they cannot be read."""
    return read_tokens(out / STATE_FOLDER / TOKENS_NAME)


def read_tokens(path: Path) -> torch.Tensor:
    """Windows of a run, [N, L]. Raises ResumeMismatch when they cannot be read."""
    try:
        tokens_NL = torch.from_numpy(read_integers(path).astype(np.int64, copy=False))
        if tokens_NL.ndim != 2:
            raise ValueError(f"shape {list(tokens_NL.shape)}; wanted [N, L]")
        return tokens_NL
    except Exception as error:  # numpy raises a different one for every way to damage a header
        raise ResumeMismatch(
            f"{path} cannot be read ({first_line(error)}); wanted this run's tokens. Give the first command again."
        ) from error


def refuse_unfinished(folder: Path) -> None:
    """Raise CheckpointError for the output of a run that is not finished in place of a checkpoint."""
    if Journal.exists(folder) and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} is the output of a run that is not finished, and no model yet; go on with: streamlap resume "
            f"{shlex.quote(str(folder))}"
        )


def what_is_there(out: Path) -> str:
    """Of a place without an unfinished run."""
    if not out.is_dir():
        return "is a file, with no unfinished run beside it" if out.exists() else "is not there"
    if any(out.glob(OWN)):
        return "holds a finished result"
    if (out / "config.json").exists():
        return "holds a model, and no unfinished run"
    return f"has no {STATE_FOLDER}/{JOURNAL_NAME}"


def parse_start(line: bytes) -> dict[str, Any]:
    """The first line of a journal. Raises ValueError where it is none."""
    start = parse_json(line)
    parts = ("fingerprint", "arguments")
    if not isinstance(start, dict) or not all(isinstance(start.get(part), dict) for part in parts):
        raise ValueError(f"its first line is {shown(start)}; wanted {' and '.join(parts)}")
    return start


def check_line(line: bytes, place: int) -> None:
    """Raise ValueError unless the line of a finished layer is that of layer `place`."""
    layer = parse_json(line)
    if not isinstance(layer, dict) or type(layer.get("index")) is not int or layer["index"] != place:
        raise ValueError(f"lines out of order: line {place + 2} is not that of layer {place}")
    seconds = layer.get("seconds", {})
    if not isinstance(seconds, dict) or not all(type(value) in (int, float) for value in seconds.values()):
        raise ValueError(f"layer {place} has seconds {shown(seconds)}")


class Journal:
    """The open journal of one output folder."""

    def __init__(self, out: Path, start: Mapping[str, Any], lines: list[bytes]) -> None:
        self.state, self.start = out / STATE_FOLDER, dict(start)
        self._lines = lines  # as text: the kept channels of a wide layer take ten times as much as Python numbers

    @property
    def next_layer(self) -> int:
        return len(self._lines)

    @property
    def layers(self) -> Iterator[dict[str, Any]]:
        """The finished layers in order, parsed one by one."""
        return map(json.loads, self._lines)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the run was begun with, as the first line has it."""
        return dict(self.start["arguments"])

    @staticmethod
    def exists(out: Path) -> bool:
        return (out / STATE_FOLDER / JOURNAL_NAME).is_file()

    @classmethod
    def open(cls, out: Path, fingerprint: Mapping[str, Any], arguments: Mapping[str, Any]) -> Journal:
        """The folder's journal, checked against this run, or a new one."""
        if not cls.exists(out):
            return cls.create(out, fingerprint, arguments)
        journal = cls.load(out)
        journal.check(fingerprint, arguments.get("command"))
        journal.settle()
        return journal

    @classmethod
    def create(cls, out: Path, fingerprint: Mapping[str, Any], arguments: Mapping[str, Any]) -> Journal:
        start = {"fingerprint": dict(fingerprint), "arguments": dict(arguments)}
        write_durably(out / STATE_FOLDER / JOURNAL_NAME, (json.dumps(start) + "\n").encode())
        return cls(out, start, [])

    @classmethod
    def load(cls, out: Path) -> Journal:
        """Read the journal up to its last whole line. Raises ResumeMismatch when there is none or it is damaged inside.

        Changes nothing, so that it may be called without the lock.
        """
        path = out / STATE_FOLDER / JOURNAL_NAME
        with looking_at(path):
            is_there = path.is_file()
        if not is_there:
            raise ResumeMismatch(f"{out} {what_is_there(out)}, so there is nothing to resume. Run streamlap compress.")
        try:
            raw = read_limited(path, MOST_BYTES)
            lines = raw[: raw.rfind(b"\n") + 1].split(b"\n")[:-1]
            start = parse_start(lines.pop(0) if lines else b"")
            for place, line in enumerate(lines):
                check_line(line, place)
        except ValueError as error:
            raise ResumeMismatch(
                f"{path} is damaged ({error}). Delete {out} and give the first command again."
            ) from error
        return cls(out, start, lines)

    def check(self, fingerprint: Mapping[str, Any], command: object, but: Collection[str] = ()) -> None:
        """Raise ResumeMismatch naming every entry in which this run, of that command, differs from the one that began the
        folder; the entries `but` are left out."""
        old = self.start["fingerprint"]
        rows = [
            f"  {one_line(key)}: the folder has {one_line(repr(old.get(key)))}, "
            f"this run has {one_line(repr(fingerprint.get(key)))}"
            for key in sorted({*old, *fingerprint} - {*but})
            if old.get(key) != fingerprint.get(key)
        ]
        if rows:
            raise ResumeMismatch(
                f"{self.state.parent} was begun by another run:\n"
                + "\n".join(rows)
                + "\nUse the values that the folder has, "
                + ("start over with --overwrite, " if command in REPLACING else "")
                + "or choose another folder."
            )

    def settle(self) -> None:
        """What is read from now on is what a power cut would leave: whoever wrote it may have died before its fsync.

        What follows the last whole line is taken off, so that the next one begins a line of its own.
        """
        path = self.state / JOURNAL_NAME
        try:
            fsync_folder(self.state)
            with path.open("r+b") as file:
                raw = file.read()
                if not raw.endswith(b"\n"):
                    file.truncate(raw.rfind(b"\n") + 1)
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, path) from error

    def append(self, layer: Mapping[str, Any]) -> None:
        """Commit one layer."""
        path = self.state / JOURNAL_NAME
        line = (json.dumps(dict(layer), allow_nan=False) + "\n").encode()
        try:
            with path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, path, len(line)) from error
        self._lines.append(line)

    def remove(self) -> None:
        """The run is complete: nothing of its state stays.

        The journal goes first, durably: from then on the folder is finished, for whoever looks, and a death in what follows
        leaves a lock and tokens that nobody reads. With the journal last, or with the state renamed, there would be no
        fewer remains, but a moment at which the journal has no tokens, or a second process no lock to find.
        """
        remove_file(self.state / JOURNAL_NAME)
        try:
            fsync_folder(self.state)
        except OSError as error:
            raise disk_error(error, self.state) from error
        shutil.rmtree(self.state, ignore_errors=True)
        with contextlib.suppress(OSError):  # all is done
            fsync_folder(self.state.parent)
