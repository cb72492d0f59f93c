"""What every run that can be resumed does around its loop: room on the disk, the lock, stops, the journal, and tidying up."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from streamlap.data.calibration import token_hash
from streamlap.errors import RecipeError, ResumeMismatch, shown
from streamlap.families.stream import ModelStream
from streamlap.planning.disk import DiskNeeds
from streamlap.settings import RunSettings
from streamlap.store.hidden import remove_hidden
from streamlap.store.journal import STATE_FOLDER, Journal, save_tokens
from streamlap.store.lock import HOLDER, LOCKS, OutputLock, empty_state
from streamlap.store.sink import write_durably
from streamlap.store.source import data_digest
from streamlap.system.signals import Stops, stop_requests
from streamlap.version import __version__


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its journal knows it: what goes on where, and from what."""

    command: str
    """compress, survey, recover or export."""
    out: Path
    """The folder that is made, or the file of a survey."""
    folder: Path
    """Where its state lies: in the output folder, or in one beside the file."""
    model: str
    """The source: hub id, or the whole path of a folder."""
    settings: RunSettings
    own: Mapping[str, Any]
    """What else the command was begun with."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What the journal keeps of it."""
        place = {} if self.settings.work is None else {"place": self.place}
        return {"command": self.command, "model": self.model, "settings": self.settings.to_json(), **place, **self.own}

    @property
    def place(self) -> str:
        return str(self.folder.resolve())

    @property
    def hidden(self) -> Path:
        """Hidden states live in the state folder, or under `work` in a folder named after the place of that one."""
        mark = hashlib.sha256(os.fsencode(self.place)).hexdigest()[:16]
        work = self.settings.work
        return self.folder / STATE_FOLDER / "hidden" if work is None else Path(work) / f"streamlap-hidden-{mark}"


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run under way."""

    run: Run
    """As it was begun. A resumed run keeps the arguments of the first."""
    journal: Journal
    stops: Stops

    @property
    def state(self) -> Path:
        return self.journal.state


@contextlib.contextmanager
def session(
    run: Run, marks: Mapping[str, Any], needs: DiskNeeds, deadline: float, check: Callable[[], None],
    tokens_NL: torch.Tensor | None = None, keep: Mapping[str, Path] | None = None,
) -> Iterator[Session]:  # fmt: skip
    """The block is the run, from the layer at which its journal stands. A good end removes the state, an
    error leaves it.

    Args: marks, all that the bytes of the result depend on; needs, room on the disk for a run that begins; deadline, on the
    clock of `time.monotonic`; check, raises where the output may not be written, and is called once nobody else can write
    there; tokens_NL, the calibration windows, which are kept beside the journal; keep, files of which a copy is kept there too,
    by the name of the copy.
    """
    if not Journal.exists(run.folder):
        needs.require(run.folder, run.hidden)
    again = f"streamlap resume {shlex.quote(str(run.out))}"
    with OutputLock(run.folder), stop_requests(deadline, again) as stops:
        check()
        if not Journal.exists(run.folder):
            remove_hidden(run.hidden)  # of a run whose output went without it
            # Draws and a gain of that run, which a file's name alone does not tell from those of this one.
            empty_state(run.folder, but=(*LOCKS, HOLDER))
            if tokens_NL is not None:
                save_tokens(run.folder, tokens_NL)
            for name, path in (keep or {}).items():
                write_durably(run.folder / STATE_FOLDER / name, path.read_bytes())
        journal = Journal.open(run.folder, marks, run.arguments)
        begun = parse_run(run.out, run.folder, journal.arguments)
        yield Session(run=begun, journal=journal, stops=stops)
        remove_hidden(begun.hidden)  # before the journal, which alone knows where they are
        journal.remove()


def read_run(folder: Path) -> Run:
    """The run that was begun there, as if its output were that folder.

    Raises ResumeMismatch where there is none, where another version began it, or where it does not say how it was begun.
    """
    journal = Journal.load(folder)
    begun, versions = journal.start["fingerprint"].get("versions"), versions_mark()
    if begun != versions:
        journal.check({**journal.start["fingerprint"], "versions": versions}, journal.arguments.get("command"))
    return parse_run(folder, folder, journal.arguments)


def parse_run(out: Path, folder: Path, arguments: Mapping[str, Any]) -> Run:
    """Raises ResumeMismatch for arguments that no run was begun with, and for a run that was moved away from its `work`."""
    own = {key: value for key, value in arguments.items() if key not in ("command", "model", "settings", "place")}
    try:
        command, model, table = arguments.get("command"), arguments.get("model"), arguments.get("settings")
        if not isinstance(command, str) or not isinstance(model, str) or not isinstance(table, dict):
            raise ValueError(f"command is {shown(command)}, model {shown(model)}, settings {shown(table)}")
        settings = RunSettings.from_json(table)
    except (ValueError, RecipeError) as error:
        raise ResumeMismatch(
            f"{folder} does not say how it was begun ({error}). Delete it and give the first command again."
        ) from error
    run = Run(command=command, out=out, folder=folder, model=model, settings=settings, own=own)
    begun = arguments.get("place")
    if settings.work is not None and begun != run.place:
        raise ResumeMismatch(
            f"{folder} was begun at {shown(begun)} and is now at {shown(run.place)}; wanted it where it was, since its hidden "
            f"states under --work {shown(str(settings.work))} are found by that place. Move it back, or start over in another "
            "folder."
        )
    return run


def goes_on(run: Run, marks: Mapping[str, Any]) -> bool:
    """Whether the journal where the run would begin is that of this very run."""
    with contextlib.suppress(ResumeMismatch):
        journal = Journal.load(run.folder)
        journal.check(marks, run.command)
        parse_run(run.out, run.folder, journal.arguments)
        return True
    return False


def remove_begun(folder: Path) -> None:
    """The hidden states of an unfinished run, wherever they are; nothing where its journal does not say."""
    with contextlib.suppress(ResumeMismatch):
        remove_hidden(parse_run(folder, folder, Journal.load(folder).arguments).hidden)


def whole_name(model: str | Path, folder: Path) -> str:
    """What a run that is resumed from elsewhere calls its source."""
    return str(folder.resolve()) if Path(model).is_dir() else str(model)


def remove_state(folder: Path) -> None:
    """What an earlier run has left, where nobody is at work."""
    with OutputLock(folder):
        remove_begun(folder)
        shutil.rmtree(folder)


def versions_mark() -> str:
    return f"streamlap {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"


def source_marks(stream: ModelStream) -> dict[str, Any]:
    """What tells a checkpoint, and the programs that read it, from others."""
    shards = {
        f"source {name}": f"{h.file_bytes} bytes, header {h.digest[:16]}, data {data_digest(h)[:16]}"
        for name, h in stream.source.headers.items()
    }
    config = json.dumps(stream.raw_config, sort_keys=True).encode()
    return {**shards, "source config.json": hashlib.sha256(config).hexdigest()[:16], "versions": versions_mark()}


def stream_marks(stream: ModelStream, tokens_NL: torch.Tensor) -> dict[str, Any]:
    """All that the hidden states of a dense model depend on."""
    return {
        **source_marks(stream), "calibration tokens": f"{list(tokens_NL.shape)} {token_hash(tokens_NL)[:16]}",
        "compute": f"{stream.dtype} on {stream.accelerator.label.type}",
    }  # fmt: skip
