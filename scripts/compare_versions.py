#!/usr/bin/env python
"""Runs the command lines of two checkouts on the same models and compares what they write, byte for byte.

    python scripts/compare_versions.py OLD NEW --work DIR [--only demo best-0.5]

OLD and NEW are folders that contain `streamlap/`. What must be equal: every shard, the index, the channels that were kept, the
table of modules in config.json as JSON text, the survey file, and the mean loss that `eval --json` prints, to the last bit.
The other files name settings and loaders, which a version may change, and seconds.

The models are the demo's own of OLD and random ones made here: every family, tied and not, and one in bfloat16 with biases in
several shards. Each is compressed by every recipe of `RECIPES`. Cases named killed-... are those of NEW alone: a process that
SIGKILL strikes after its first or second layer, then `resume`; they must give what an unbroken run of OLD gave. Where the
process is done before it is struck, `--stop-after` ends it at its first commit instead.

The command lines of all random models share one process, which takes them one after another as `python -m streamlap.cli` does,
and so do those of the demo; each that is killed has a process of its own. Results of OLD stay in --work and are used again as
long as its code, its commands and the libraries are the same.

Prints a line for each case, `same` or the first difference, and a line of counts. Exit 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.0005
LIMIT_SECONDS = 1200
"""For one process."""
STOPPED = 75
"""Exit code of a run that was stopped by `--stop-after`."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DEMO, BFLOAT16 = "demo", "llama-bfloat16"
MODELS = (DEMO, *(family + tied for family in FAMILIES for tied in ("", "-tied")), BFLOAT16)
VOCABULARY = 300
PICO = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip

RECIPES = {
    f"{name}-{ratio}": [*words, "--ratio", ratio]
    for name, words in {
        "lorap": ["--preset", "lorap"],
        "best": ["--preset", "best"],
        "survey": ["--preset", "best", "--survey", "survey.json"],
        "refine": ["--preset", "best", "--refine", "2"],
    }.items()
    for ratio in ("0.2", "0.5")
}
"""Name -> options of compress. The survey lies beside the output folder and is made first."""

KILLED = {"best-0.5": MODELS, **dict.fromkeys(("lorap-0.5", "refine-0.2", "survey-0.5"), (DEMO, "llama"))}
"""Recipe -> models on which it is also killed and resumed."""

OUT, SURVEY, DONE = "out", "survey.json", "done.json"
INDEX, KEPT = "model.safetensors.index.json", "streamlap_kept_channels.json"
STATE = ".streamlap"

Words = list[str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recipe on one model."""

    model: str
    recipe: str
    killed: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {'killed-' * self.killed}{self.recipe}"

    @property
    def whole(self) -> Case:
        """The same, not killed."""
        return Case(model=self.model, recipe=self.recipe)

    def folder(self, side: Path) -> Path:
        return side / self.name.replace(" ", os.sep)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the commands of a model read."""

    model: Path
    calibration: Path
    text: Path
    compress: tuple[str, ...] = ()
    """How many windows, for compress."""
    survey: tuple[str, ...] = ()

    def commands(self, case: Case, folder: Path) -> list[Words]:
        """Command lines that make the results of a case in `folder`, the one to kill first."""
        out, calibration = str(folder / OUT), ["--calibration", str(self.calibration)]
        options = [str(folder / SURVEY) if word == SURVEY else word for word in RECIPES[case.recipe]]
        survey = ["survey", str(self.model), str(folder / SURVEY), *calibration, *self.survey]
        return [
            *([survey] if "--survey" in options else []),
            ["compress", str(self.model), out, *calibration, *self.compress, *options],
            ["eval", out, "--text", str(self.text), "--json"],
        ]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A case on one side, with what there is to do in its folder."""

    case: Case
    folder: Path
    commands: list[Words]

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "commands": self.commands}


# --- what the commands read


def make_inputs(work: Path, old: Path, models: Iterable[str]) -> dict[str, Inputs]:
    """Model -> its inputs; those that are not in `work` yet are made."""
    return {name: demo_inputs(work, old / "streamlap" / "demo") if name == DEMO else pico_inputs(work, name)
            for name in models}  # fmt: skip


def demo_inputs(work: Path, demo: Path) -> Inputs:
    text = work / "text.txt"
    text.write_bytes((demo / "validation.txt").read_bytes()[:30_000])
    return Inputs(
        model=demo / "model", calibration=demo / "calibration.txt", text=text,
        compress=("--samples", "16", "--length", "256"), survey=("--samples", "4", "--length", "128"),
    )  # fmt: skip


def pico_inputs(work: Path, name: str) -> Inputs:
    """A random model and token ids; `text` has others than those to calibrate on."""
    folder = work / "models"
    inputs = Inputs(model=folder / name, calibration=folder / "tokens.npy", text=folder / "text.npy")
    if not inputs.model.is_dir():
        make_pico(inputs, name)
    return inputs


def make_pico(inputs: Inputs, name: str) -> None:
    """Biases and norms are random too, so that losing one shows."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = PICO | {"tie_word_embeddings": name.endswith("-tied"), "attention_bias": name == BFLOAT16}
    torch.manual_seed(0)
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_config(AutoConfig.for_model(name.split("-")[0], **settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in key else 0.0))
    model.tie_weights()
    dtype, shard = (torch.bfloat16, "40KB") if name == BFLOAT16 else (torch.float32, "1GB")
    half = inputs.model.with_name(f"{name}.half")
    shutil.rmtree(half, ignore_errors=True)
    model.to(dtype).save_pretrained(half, max_shard_size=shard)
    for seed, path in enumerate((inputs.calibration, inputs.text)):
        np.save(path, np.random.default_rng(seed).integers(0, VOCABULARY, (12, 16)).astype(np.uint16))
    half.rename(inputs.model)


# --- running the command lines


def environment(checkout: Path, cwd: Path) -> dict[str, str]:
    """Of a process that uses this checkout, leaves nothing in it, and has no network."""
    return {
        **os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1",
        "PYTHONPYCACHEPREFIX": str(cwd.parent / "pycache"), "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": threads(),
    }  # fmt: skip


def threads() -> str:
    return os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))


def require_checkout(checkout: Path, cwd: Path) -> None:
    """End unless a process with this checkout takes streamlap from it and from no other place."""
    code = "import importlib.util as u; s = u.find_spec('streamlap'); print(s.origin if s else None)"
    command = [sys.executable, "-c", code]
    origin = subprocess.run(
        command, env=environment(checkout, cwd), cwd=cwd, capture_output=True, text=True
    ).stdout.strip()
    if Path(origin) != checkout / "streamlap" / "__init__.py":
        sys.exit(f"{checkout}: streamlap would come from {origin}")


def run_jobs(checkout: Path, jobs: list[Job], cwd: Path) -> None:
    """Each job to its `DONE` file: those of random models in one process, those of the demo in another."""
    groups = [[job for job in jobs if (job.case.model == DEMO) == demo] for demo in (False, True)]
    for group in filter(None, groups):
        listed = cwd / "jobs.json"
        listed.write_text(json.dumps([job.to_json() for job in group]))
        command = [sys.executable, str(Path(__file__).resolve()), "--inside", str(listed)]
        try:
            done = subprocess.run(
                command, env=environment(checkout, cwd), cwd=cwd, capture_output=True, text=True, timeout=LIMIT_SECONDS
            )
            error = f"its process ended with exit code {done.returncode}: {last_line(done.stderr)}"
        except subprocess.TimeoutExpired:
            error = f"its process was not done after {LIMIT_SECONDS} s"
        for job in group:
            if not (job.folder / DONE).exists():
                finish(job.folder, job.commands, {"error": error})


def inside(listed: Path) -> None:
    """What the process does: every command line as `python -m streamlap.cli` runs it."""
    for job in json.loads(listed.read_text()):
        result: dict[str, Any] = {}
        for words in job["commands"]:
            code, output, errors = run_command(words)
            if code:
                result = {"error": f"{words[0]} ended with {code}: {last_line(errors)}"}
                break
            if words[0] == "eval":
                result = {"nll": json.loads(output.splitlines()[-1])["nll"]}
        finish(Path(job["folder"]), job["commands"], result)


def run_command(words: Words) -> tuple[object, str, str]:
    """One command line inside this process; its exit code, or what it raised, and what it printed."""
    out, errors, before, code = io.StringIO(), io.StringIO(), sys.argv, None
    sys.argv = ["streamlap", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            runpy.run_module("streamlap.cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code, out.getvalue(), errors.getvalue()
    except Exception as error:
        return type(error).__name__, out.getvalue(), str(error)
    finally:
        sys.argv = before
    return code, out.getvalue(), errors.getvalue()


def finish(folder: Path, commands: list[Words], result: dict[str, Any]) -> None:
    (folder / DONE).write_text(json.dumps({"commands": commands, **result}))


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


# --- killing


def kill(checkout: Path, words: Words, layers: int, cwd: Path) -> str:
    """A process of its own that is struck after so many layers; how that went, in words. The run is unfinished then."""
    path = Path(words[2])
    state = path.with_name(path.name + STATE) if words[0] == "survey" else path
    journal = state / STATE / "journal.jsonl"
    command = [sys.executable, "-m", "streamlap.cli", *words]
    variables = environment(checkout, cwd)
    process = subprocess.Popen(command, env=variables, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and commits(journal) < layers and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()  # nothing where it has ended
        errors = process.communicate()[1].decode(errors="replace")
    if process.returncode not in (0, -signal.SIGKILL):
        return f"{words[0]} ended with {process.returncode} before it was killed: {last_line(errors)}"
    if process.returncode and journal.exists():
        return f"killed after layer {commits(journal)}"
    remove(path)
    remove(state)
    command += ["--stop-after", "0.001"]
    done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if done.returncode == STOPPED:
        return "stopped after layer 1"
    return f"{words[0]} --stop-after ended with {done.returncode}: {last_line(done.stderr)}"


def commits(journal: Path) -> int:
    """Lines of the journal but the first."""
    try:
        return journal.read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return -1


def remove(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


# --- comparing


def difference(old: Path, new: Path) -> str:
    """The first difference between the results of a case in two folders, in words; empty where there is none."""
    ends = [json.loads((side / DONE).read_text()) for side in (old, new)]
    for name, end in zip(("old", "new"), ends, strict=True):
        if "error" in end:
            return f"{name} failed: {end['error']}"
    files = [results(side) for side in (old, new)]
    for name in sorted(files[0].keys() | files[1].keys()):
        left, right = (side.get(name) for side in files)
        if left is None or right is None:
            return f"{name} is only in {'new' if left is None else 'old'}"
        if left != right:
            return f"{name}: {difference_of_tensors(left, right) if name.endswith('.safetensors') else at(left, right)}"
    left, right = (end["nll"] for end in ends)
    return "" if left == right else f"nll is {left!r} in old, {right!r} in new"


def results(folder: Path) -> dict[str, bytes]:
    """What must be the same, by name."""
    out = folder / OUT
    paths = [*out.glob("*.safetensors"), out / INDEX, out / KEPT, folder / SURVEY]
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    found = {path.name: path.read_bytes() for path in paths if path.exists()}
    return found | {"modules in config.json": json.dumps(modules).encode()}


def difference_of_tensors(old: bytes, new: bytes) -> str:
    """Where two different shards differ first."""
    (left, start), (right, _) = header(old), header(new)
    if left != right:
        return f"headers differ, {at(left, right)}"
    for name, entry in json.loads(left).items():
        begin, end = (start + offset for offset in entry.get("data_offsets", (0, 0)))
        if old[begin:end] != new[begin:end]:
            return f"{name}, {at(old[begin:end], new[begin:end])}"
    return f"outside of tensors, {at(old, new)}"


def header(shard: bytes) -> tuple[bytes, int]:
    """The JSON at the start of a shard, and where its tensors begin."""
    start = 8 + int(struct.unpack("<Q", shard[:8])[0])
    return shard[8:start], start


def at(old: bytes, new: bytes) -> str:
    """The first byte that differs, and what stands there where it is text."""
    place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    sizes = f" of {len(old)}" if len(old) == len(new) else f"; {len(old)} bytes in old, {len(new)} in new"
    parts = [side[max(0, place - 20) : place + 20] for side in (old, new)]
    shown = " and ".join(repr(part.decode()) for part in parts) if all(map(is_text, parts)) else ""
    return f"byte {place}{sizes}{shown and ': '}{shown}"


def is_text(part: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\r\n\t" for byte in part)


# --- both sides


def digest(checkout: Path) -> str:
    """Of the package's files and of what else decides the bytes of a result."""
    found = hashlib.sha256()
    for path in sorted((checkout / "streamlap").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            found.update(f"{path.relative_to(checkout)} {path.stat().st_size}\n".encode() + path.read_bytes())
    libraries = [metadata.version(name) for name in ("torch", "transformers", "safetensors", "numpy")]
    found.update(repr((libraries, platform.python_version(), threads())).encode())
    return found.hexdigest()[:12]


def cached(job: Job) -> bool:
    """Whether the folder has the result of these very commands."""
    if not (job.folder / DONE).exists():
        return False
    end = json.loads((job.folder / DONE).read_text())
    return "error" not in end and end["commands"] == job.commands


def begin(job: Job) -> Job:
    remove(job.folder)
    job.folder.mkdir(parents=True)
    return job


def run_old(checkout: Path, cases: list[Case], inputs: dict[str, Inputs], side: Path) -> int:
    """Results for all cases; how many of them had to be made."""
    wanted = [Job(case=case, folder=case.folder(side), commands=inputs[case.model].commands(case, case.folder(side)))
              for case in dict.fromkeys(case.whole for case in cases)]  # fmt: skip
    missing = [begin(job) for job in wanted if not cached(job)]
    run_jobs(checkout, missing, side)
    return len(missing)


def run_new(checkout: Path, cases: list[Case], inputs: dict[str, Inputs], side: Path) -> dict[Case, str]:
    """Results for all cases; how the killing went, in words."""
    jobs: list[Job] = []
    words: dict[Case, str] = {}
    for case in cases:
        folder = case.folder(side)
        job = begin(Job(case=case, folder=folder, commands=inputs[case.model].commands(case, folder)))
        if case.killed:
            first, *rest = job.commands
            words[case] = kill(checkout, first, 1 + len(words) % 2, side)
            job = Job(case=case, folder=folder, commands=[["resume", first[2]], *rest])
        jobs.append(job)
    run_jobs(checkout, jobs, side)
    return words


def compare(old: Path, new: Path, work: Path, cases: list[Case]) -> bool:
    """Whether all cases are the same; prints a line for each."""
    sides = work / f"old-{digest(old)}", work / "new"
    remove(sides[1])
    for checkout, side in zip((old, new), sides, strict=True):
        side.mkdir(parents=True, exist_ok=True)
        require_checkout(checkout, side)
    inputs = make_inputs(work, old, dict.fromkeys(case.model for case in cases))
    start = time.perf_counter()
    made = run_old(old, cases, inputs, sides[0])
    middle = time.perf_counter()
    killed = run_new(new, cases, inputs, sides[1])
    end = time.perf_counter()
    different = 0
    for case in cases:
        found = difference(case.whole.folder(sides[0]), case.folder(sides[1]))
        if case.killed and not killed[case].startswith(("killed after", "stopped after")):
            found = killed[case]
        different += bool(found)
        note = f" ({killed[case]})" if case.killed and not found else ""
        print(f"{case.name:<36}{found or 'same'}{note}", flush=True)
    print(
        f"{len(cases)} cases: {len(cases) - different} same, {different} different; "
        f"old {middle - start:.0f} s ({made} results made), new {end - middle:.0f} s"
    )
    return not different


def chosen(only: list[str]) -> list[Case]:
    """All cases, or those of the models and recipes that are named."""
    cases = [Case(model=model, recipe=recipe) for model in MODELS for recipe in RECIPES]
    cases += [Case(model=model, recipe=recipe, killed=True) for recipe, models in KILLED.items() for model in models]
    known = {word for case in cases for word in case.name.split()}
    if unknown := [name for name in only if name not in known]:
        sys.exit(f"--only {' '.join(unknown)}: wanted some of {', '.join(sorted(known))}")
    models = [name for name in only if name in MODELS] or MODELS
    recipes = [name for name in only if name not in MODELS] or known
    return [case for case in cases if case.model in models and case.name.split()[1] in recipes]


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        return inside(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout whose results are right")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkout to check")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for models and outputs, which stay")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these models and recipes")
    options = parser.parse_args()
    cases = chosen(options.only)
    same = compare(options.old.resolve(), options.new.resolve(), options.work.resolve(), cases)
    sys.exit(not same)


if __name__ == "__main__":
    main()
