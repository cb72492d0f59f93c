#!/usr/bin/env python
"""Kills real runs with SIGKILL, resumes them, and compares every byte with a run that nobody killed.

    python scripts/bench_resume.py [--kills 220] [--seed 0] [--only llama best] [--out FILE]

What it proves: whenever the process dies, be it at a random moment of its work or right after any commit, what it leaves is
known as unfinished, `streamlap resume` finishes it, also where resumed runs are killed too, and the result is that of the
unbroken run to the last byte. Only what the report says of seconds, memory and bytes moved may differ. It does not prove what
a power cut does: the kernel lives on here. For that see `tests/pipeline/test_every_step.py`.

Each run is a process of its own, forked from a server that has imported streamlap, with one thread. The models are made here:
3 layers, random weights, every family, tied and not. The random moments are drawn uniformly over the time that the unbroken run
worked, as many for every case; a run that was faster than its moment is done again with an earlier one. One resumed run in
three is killed as well. A line for each case goes to stderr, one JSON object to stdout and to --out. Exit 1 when a byte
differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import Result, machine, save, shown_command
from compare_outputs import contents, differing_bytes
from transformers import AutoConfig, AutoModelForCausalLM

import streamlap
from streamlap.errors import StreamlapError
from streamlap.store.journal import STATE_FOLDER, Journal

POLL_SECONDS = 0.0005
LAYERS = 3
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MODELS = {family + "-tied" * tied: (family, tied) for family in FAMILIES for tied in (False, True)}
RECIPES: dict[str, dict[str, Any]] = {
    "lorap": {"preset": "lorap"}, "best": {}, "best --refine 2": {"refine": 2}, "loraprune": {"preset": "loraprune"},
    "pclora": {"preset": "pclora", "ratio": 0.5},
}  # fmt: skip
LESSON: dict[str, Any] = {"rank": 4, "epochs": 4, "learning_rate": 0.02, "distil": 0.1}
"""Knobs with which something is gained, so that there is a result."""
OF_BEST = ("export", "recover")
"""Commands on what `best` has made."""
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command, which is a recipe, survey, export or recover, on one model."""

    model: str
    command: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.model}, {self.command}"

    def run(self, out: Path) -> None:
        source, files = self.folder / self.model, (str(self.folder / "ids.npy"),)
        if self.command == "survey":
            streamlap.survey(source, out, files=files)
        elif self.command == "export":
            streamlap.export_dense(self.folder / f"{self.model}, best", out)
        elif self.command == "recover":
            streamlap.recover(
                self.folder / f"{self.model}, best", out, self.folder / "lesson.npy", dense=source, **LESSON
            )
        else:
            streamlap.compress(source, out, files=files, **RECIPES[self.command])

    def state(self, out: Path) -> Path:
        """The folder that has the journal."""
        return out.with_name(out.name + STATE_FOLDER) if self.command == "survey" else out

    def unfinished(self, out: Path) -> bool:
        if self.command == "survey":
            return not out.exists() or Journal.exists(self.state(out))
        return not out.is_dir() or not streamlap.verify(out)["ok"]


def act(case: Case, out: Path, resume: bool) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    logging.disable()
    try:
        streamlap.resume(out) if resume else case.run(out)
    except StreamlapError as error:
        sys.exit(f"{case.name}: {error}")


def start(case: Case, out: Path, resume: bool = False) -> BaseProcess:
    process = PROCESSES.Process(target=act, args=(case, out, resume))
    process.start()
    return process


def make_sources(folder: Path, models: list[str]) -> None:
    """Random models, token ids to calibrate on, and ids of which the next can be learnt."""
    for name in models:
        family, tied = MODELS[name]
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, hidden_size=64, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=500, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
            pad_token_id=None, tie_word_embeddings=tied,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(
            folder / name, max_shard_size="200KB"
        )
    np.save(folder / "lesson.npy", np.tile(np.arange(32, dtype=np.uint16), (16, 1)))
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 500, (16, 32)).astype(np.uint16))


def commits(case: Case, out: Path) -> int:
    """Lines of the journal but the first; -1 where there is no journal."""
    try:
        return (case.state(out) / STATE_FOLDER / "journal.jsonl").read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return -1


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(POLL_SECONDS)


def working_seconds(case: Case, out: Path) -> float:
    """The unbroken run; gives back how long it worked, from its first file until its state is gone."""
    process = start(case, out)
    state = case.state(out) / STATE_FOLDER
    wait_for(state.exists, process)
    begin = time.perf_counter()
    wait_for(lambda: not state.exists(), process)
    seconds = time.perf_counter() - begin
    process.join()
    if process.exitcode:
        raise SystemExit(f"{case.name}: the unbroken run failed with exit code {process.exitcode}")
    return seconds


def killed(process: BaseProcess, moment: Callable[[], bool]) -> bool:
    """SIGKILL as soon as `moment` has come; whether it struck a living process."""
    wait_for(moment, process)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended with exit code {process.exitcode}")
    return process.exitcode == -signal.SIGKILL


def at_moment(begun: Path, seconds: float) -> Callable[[], bool]:
    """Holds `seconds` after there is a folder of that name."""
    first: list[float] = []

    def reached() -> bool:
        if not first and begun.exists():
            first.append(time.perf_counter())
        return bool(first) and time.perf_counter() - first[0] >= seconds

    return reached


def at_commit(case: Case, out: Path, number: int) -> Callable[[], bool]:
    return lambda: commits(case, out) >= number


def clear(case: Case, out: Path) -> None:
    for path in (out, case.state(out)):
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def finish(case: Case, out: Path, seconds: float, chance: random.Random) -> Iterator[str]:
    """Resumed until it is done, one run in three killed as well. Gives a word for each kill that struck a living process."""
    while case.unfinished(out):
        process = start(case, out, resume=commits(case, out) >= 0)
        if chance.random() < 1 / 3:
            if killed(process, at_moment(case.state(out), chance.uniform(0, seconds))):
                yield "resumed"
            continue
        process.join()
        if process.exitcode:
            raise SystemExit(f"{case.name}: exit code {process.exitcode} of a resumed run")


def try_case(case: Case, moments: int, chance: random.Random) -> Result:
    """Kills at so many random moments, and one right after each commit."""
    whole_out = case.folder / case.name
    seconds = working_seconds(case, whole_out)
    whole, out = contents(whole_out), case.folder / "out"
    row = {"case": case.name, "kills": 0, "of resumed runs": 0, "unfinished": 0, "differing_bytes": 0}
    steps = LAYERS + (case.command in OF_BEST)
    for number in range(moments + steps):
        moment = chance.uniform(0, seconds)
        after = number - moments + 1  # commits; at a random moment where there are none to wait for
        reached = at_commit(case, out, after) if after > 0 else at_moment(case.state(out), moment)
        while not killed(start(case, out), reached):
            clear(case, out)
            moment *= chance.random()
            reached = at_moment(case.state(out), moment)
        row["kills"] += 1
        row["unfinished"] += case.unfinished(out)
        row["of resumed runs"] += len(list(finish(case, out, seconds, chance)))
        row["differing_bytes"] += differing_bytes(whole, contents(out))
        clear(case, out)
    row["kills"] += row["of resumed runs"]
    print(
        f"{case.name:<32}{row['kills']:>4} kills{row['differing_bytes']:>8} bytes differ", file=sys.stderr, flush=True
    )
    return row | {"bytes": sum(map(len, whole.values())), "unbroken_seconds": round(seconds, 3)}


def bench(folder: Path, kills: int, seed: int, only: list[str]) -> Result:
    models = [name for name in MODELS if not only or name in only] or list(MODELS)
    commands = [name for name in (*RECIPES, "survey", *OF_BEST) if not only or name in only] or [*RECIPES]
    if "best" not in commands and not {*OF_BEST}.isdisjoint(commands):
        commands.insert(0, "best")  # there must be something to work on
    make_sources(folder, models)
    cases = [Case(model=model, command=command, folder=folder) for model in models for command in commands]
    chance, begin = random.Random(seed), time.perf_counter()
    rows = [try_case(case, -(-max(0, kills - LAYERS * len(cases)) // len(cases)), chance) for case in cases]
    counted = ("kills", "of resumed runs", "unfinished", "differing_bytes")
    total = {key: sum(row[key] for row in rows) for key in counted}
    return {**total, "layers": LAYERS, "seed": seed, "seconds": round(time.perf_counter() - begin, 1), "cases": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=220, help="kills in all, at least; more where a case has commits left"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these models and commands")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    PROCESSES.set_forkserver_preload(["streamlap"])
    with tempfile.TemporaryDirectory(prefix="bench-resume-") as folder:
        result = bench(Path(folder), options.kills, options.seed, options.only)
    result = {"command": shown_command(), "machine": machine(), **result}
    save(options.out, result)
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["differing_bytes"]))


if __name__ == "__main__":
    main()
