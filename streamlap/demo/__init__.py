"""The demo: the bundled trained model through the whole tool, offline. What ships, and whence, is in README.md beside this."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamlap.pipeline.compress import compress
from streamlap.pipeline.evaluate import evaluate

PROMPT = "The old man looked at the sea and said"
NEW_TOKENS = 60
EVALUATION_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models, measured."""

    parameters: int
    bytes: int
    perplexity: float
    tokens_per_second: float
    """Greedy decoding of one sequence on this machine, the fastest of three runs."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    out: str
    before: Side
    after: Side
    prompt: str
    samples: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> list[tuple[str, str, str]]:
        before, after = self.before, self.after
        return [
            ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
            ("weights, bytes", f"{before.bytes:,}", f"{after.bytes:,}"),
            ("perplexity (windows of 256)", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}"),
            ("decoding, tokens/s", f"{before.tokens_per_second:.0f}", f"{after.tokens_per_second:.0f}"),
        ]


def bundled(name: str) -> Path:
    """A file or folder that ships with the demo: model, calibration.txt, validation.txt, training.json."""
    return Path(str(resources.files("streamlap") / "demo" / name))


def run_demo(out: str | Path, ratio: float | str = 0.2) -> DemoResult:
    """Compress the bundled model into `out` and measure both. Raises RecipeError when `out` is not empty."""
    start = time.perf_counter()
    model, out = bundled("model"), Path(out)
    report = compress(model, out, ratio=ratio, survey=None, redraw=False)  # in two minutes
    total = report.parameters
    before, before_text = measure(model, total.total_before)
    after, after_text = measure(out, total.total_after)
    samples = {"the original": before_text, "the compressed model": after_text}
    seconds = time.perf_counter() - start
    return DemoResult(out=str(out), before=before, after=after, prompt=PROMPT, samples=samples, seconds=seconds)


def measure(folder: Path, parameters: int) -> tuple[Side, str]:
    """Perplexity on the bundled validation text, decoding speed, and a sample of text."""
    perplexity = evaluate(folder, bundled("validation.txt"), limit=EVALUATION_TOKENS).perplexity
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text, speed = generate(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    return Side(parameters=parameters, bytes=size, perplexity=perplexity, tokens_per_second=speed), text


def generate(model: Any, tokenizer: Any) -> tuple[str, float]:
    """What follows the prompt (sampled, seeded), and the fastest of three greedy runs in tokens a second."""
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    sampled = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=40, temperature=0.8)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return tokenizer.decode(sampled[0], skip_special_tokens=True).replace("\n", " "), NEW_TOKENS / min(seconds)
