"""The command line: the only place that prints, configures logging, or exits."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import sys

import torch
import typer

from streamlap.cli import commands
from streamlap.errors import BudgetError, Interrupted, StreamlapError, first_line
from streamlap.system.budget import is_out_of_memory
from streamlap.system.cgroups import usable_cpus
from streamlap.system.signals import Stopped, stops_at_once

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.callback()(commands.whole)
for command in (commands.compress, commands.plan, commands.survey, commands.recover, commands.resume):
    app.command()(command)
app.command("eval")(commands.evaluate)
for command in (commands.inspect, commands.verify, commands.export, commands.demo):
    app.command()(command)


def main() -> None:
    """Entry point of the console script: a StreamlapError becomes one line on stderr and its exit code."""
    spell_all_names()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if "OMP_NUM_THREADS" not in os.environ:  # torch counts the machine's cores, also those that a container may not use
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    try:
        with stops_at_once():
            app(prog_name="streamlap")
    except StreamlapError as error:
        fail(str(error), error.exit_code)
    except Stopped as stop:
        fail(f"stopped ({stop}) with nothing under way; give the same command again", Interrupted.exit_code)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory ({first_line(error)}) before the first layer. Free some.", BudgetError.exit_code)


def spell_all_names() -> None:
    """Names of files come out as they came in, byte for byte; what another encoding than UTF-8 cannot spell is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if codecs.lookup(stream.encoding).name in ("ascii", "utf-8"):
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")
            else:
                stream.reconfigure(errors="backslashreplace")


def fail(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # who cannot be told has the exit code
        typer.echo(f"streamlap: {message}", err=True)
    sys.exit(code)
