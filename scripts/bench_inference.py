#!/usr/bin/env python
"""Tokens a second of dense, factored and pivoted linears that store equally much: one sequence, prompt and decoding.

    PYTHONPATH=. python scripts/bench_inference.py --hidden 2048 --ffn 5632 --layers 4 --ratios 0.2 0.5
    PYTHONPATH=. python scripts/bench_inference.py --device cuda --dtype bfloat16 --hidden 4096 --ffn 14336 --out gpu.json

Layers of a Llama with random weights and a small vocabulary, so that little but the decoder counts. Every linear of a layer
stores the same share of its dense parameters:

factors   two factors
ordered   pivoted, an order of its outputs is stored and applied
folded    pivoted, and no order for v, gate and up, where it folds into what reads them; ordered elsewhere
bare      pivoted, without any order: what the ordering costs at most

Prefill is one forward over the prompt, decode one token after another with the cache. Of --repeats the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
import torch
from benchmarks import Result
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from streamlap.loader.forms import Form
from streamlap.methods.anchored.ranks import RankSite

FOLDS = ("v_proj", "gate_proj", "up_proj")
VOCABULARY = 256


def config(args: argparse.Namespace) -> LlamaConfig:
    k = args.scale_down
    return LlamaConfig(
        hidden_size=args.hidden // k, intermediate_size=args.ffn // k, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, vocab_size=VOCABULARY,
        max_position_embeddings=args.prompt + args.decode + 1,
    )  # fmt: skip


def form(kind: str, path: str, linear: nn.Linear, keep: float, heads: int) -> Form:
    """What stands in place of `linear`, so that it stores the share `keep`; v has a group for each of its `heads`."""
    shape = linear.out_features, linear.in_features
    ordered = kind == "ordered" or (kind == "folded" and not path.endswith(FOLDS))
    site = RankSite(
        name=path, shape=shape, itemsize=linear.weight.dtype.itemsize,
        storage="factors" if kind == "factors" else "pivoted",
        groups=None if ordered else heads if path.endswith("v_proj") else 1,
    )  # fmt: skip
    return site.at(site.rank_within(keep * linear.weight.numel()))


def model(args: argparse.Namespace, kind: str, ratio: float) -> nn.Module:
    """Random numbers on the device; an order is a random permutation."""
    with torch.device("meta"):
        made = LlamaForCausalLM(config(args)).to(getattr(torch, args.dtype)).eval()
    linears = {path: part for path, part in made.model.layers.named_modules() if isinstance(part, nn.Linear)}
    for path, part in linears.items() if kind != "dense" else ():
        stored = form(kind, path, part, 1 - ratio, args.kv_heads)
        made.model.layers.set_submodule(path, stored.build("meta", part.weight.dtype))
    rotary = type(made.model.rotary_emb)(made.config)  # its frequencies are computed, not stored
    made.to_empty(device=args.device)
    made.model.rotary_emb = rotary.to(args.device)
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.02)
        else:
            tensor.copy_(torch.randperm(len(tensor), device=tensor.device))
    return made.requires_grad_(False)


def stored(made: nn.Module) -> int:
    """Parameters of the layers, indices counted by their bytes."""
    tensors = list(made.model.layers.state_dict().values())
    itemsize = next(t.dtype.itemsize for t in tensors if t.is_floating_point())
    return sum(t.nbytes for t in tensors) // itemsize


def seconds(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def speed(made: nn.Module, args: argparse.Namespace) -> Result:
    """Median tokens a second of both phases, after one round that does not count."""
    prompt_BL = torch.arange(args.prompt, device=args.device)[None] % VOCABULARY
    prefill, decode = [], []
    for _ in range(args.repeats + 1):
        begin = seconds(args.device)
        output = made(prompt_BL, use_cache=True, logits_to_keep=1)
        middle = seconds(args.device)
        for _ in range(args.decode):
            token_BL = output.logits[:, -1:].argmax(-1)
            output = made(token_BL, past_key_values=output.past_key_values, use_cache=True)
        prefill.append(args.prompt / (middle - begin))
        decode.append(args.decode / (seconds(args.device) - middle))
    return {"prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[1:])}


def variants(ratios: list[float]) -> Iterator[tuple[str, float]]:
    yield "dense", 0.0
    yield from ((kind, ratio) for ratio in ratios for kind in ("factors", "ordered", "folded", "bare"))


def measure(args: argparse.Namespace) -> Result:
    """Every variant in turn; only one model is in memory at a time."""
    rows = []
    for kind, ratio in variants(args.ratios):
        made = model(args, kind, ratio)
        rows.append({"kind": kind, "ratio": ratio, "parameters": stored(made), **speed(made, args)})
        del made
    shape = {key: getattr(args, key) for key in ("hidden", "ffn", "layers", "heads", "kv_heads", "scale_down")}
    return {"shape": shape, "dtype": args.dtype, "device": args.device, "prompt": args.prompt, "decode": args.decode,
            "rows": rows}  # fmt: skip


def table(result: Result) -> str:
    dense = result["rows"][0]
    columns = ["linears", "ratio", "parameters", "prefill, tokens/s", "of dense", "decode, tokens/s", "of dense"]
    return shared.markdown(
        columns,
        ([r["kind"], r["ratio"] or "", f"{r['parameters']:,}", f"{r['prefill']:.1f}", f"{r['prefill'] / dense['prefill']:.2f}",
          f"{r['decode']:.1f}", f"{r['decode'] / dense['decode']:.2f}"] for r in result["rows"]),
    )  # fmt: skip


def main() -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size (2048)")
    parser.add_argument("--ffn", type=int, default=5632, help="FFN width (5632)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (4)")
    parser.add_argument("--heads", type=int, default=32, help="attention heads (32)")
    parser.add_argument("--kv-heads", type=int, default=4, help="of them with keys and values of their own (4)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5], help="parameters removed (0.2 0.5)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (64)")
    parser.add_argument("--decode", type=int, default=8, help="tokens decoded after it (8)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of which the median counts (3)")
    parser.add_argument("--dtype", default="float32", help="of weights and activations (float32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    args = parser.parse_args()
    result = shared.conclude(args, lambda _: measure(args), table)
    if not args.table:
        print(table(result), file=sys.stderr)


if __name__ == "__main__":
    main()
