#!/usr/bin/env python
"""Train the demo model that ships inside streamlap: a small Llama, near convergence, on public-domain English.

    python scripts/train_demo_model.py --train train.txt.xz --calibration calibration.txt \
        --validation validation.txt --out streamlap/demo

A model that saw few tokens per parameter is low-rank everywhere and flatters every low-rank method, so the
budget here is at least 20 training tokens per non-embedding parameter. The three texts must be disjoint.

Shape suffixes: B batch, L length, T tokens.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4000
LENGTH = 256
SHIPPED_TEXT_BYTES = 400_000


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries: every byte sequence has tokens, nothing is ever unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=LENGTH)


def tokenise(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Tokens of the whole text, [T] int64. Lines are encoded apart, which changes nothing: no merge crosses a newline."""
    pieces = tokenizer.backend_tokenizer.encode_batch(text.splitlines(keepends=True))
    return torch.from_numpy(np.concatenate([np.asarray(piece.ids, dtype=np.int64) for piece in pieces]))


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, x_BL: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=x_BL, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), x_BL[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens_T: torch.Tensor, windows: int = 512) -> float:
    """exp(mean NLL) over the first `windows` non-overlapping windows of `LENGTH` tokens."""
    tokens_NL = tokens_T[: len(tokens_T) // LENGTH * LENGTH].view(-1, LENGTH)[:windows]
    losses = [loss_of(model, x_BL).item() * len(x_BL) for x_BL in tokens_NL.split(32)]
    return math.exp(sum(losses) / len(tokens_NL))


def batches(tokens_T: torch.Tensor, batch: int, steps: int, seed: int):
    """Shuffled windows, cut anew from a random offset in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        offset = int(torch.randint(LENGTH, (), generator=generator))
        usable_T = tokens_T[offset : offset + (len(tokens_T) - offset) // LENGTH * LENGTH]
        order = torch.randperm(len(usable_T) // LENGTH, generator=generator)
        for rows in order[: len(order) // batch * batch].view(-1, batch):
            if steps == 0:
                return
            yield usable_T.view(-1, LENGTH)[rows]
            steps -= 1


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then linear decay to zero."""
    return peak * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1), 1.0)


def train(
    model: LlamaForCausalLM, tokens_T: torch.Tensor, validation_T: torch.Tensor, args: argparse.Namespace
) -> dict:
    steps = args.tokens // (args.batch * LENGTH)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(loss_of) if args.compile else loss_of
    started, curve = time.monotonic(), []
    for step, x_BL in enumerate(batches(tokens_T, args.batch, steps, args.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.learning_rate)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(model, x_BL)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 499 or step == steps - 1:
            row = {"step": step + 1, "train_loss": round(loss.item(), 4)}
            row["validation_perplexity"] = round(perplexity(model, validation_T, 128), 3)
            row["seconds"] = round(time.monotonic() - started, 1)
            curve.append(row)
            print(json.dumps(row), flush=True)
            model.save_pretrained(args.out / "partial")
    return {"steps": steps, "tokens": steps * args.batch * LENGTH, "curve": curve}


def excerpt(text: str, size: int) -> str:
    """The first `size` bytes or so, cut at a line end."""
    cut = text.encode("utf-8")[:size].decode("utf-8", errors="ignore")
    return cut[: cut.rindex("\n") + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training text, .txt or .txt.xz")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=48_000_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    text, validation = read_text(args.train), read_text(args.validation)
    tokenizer = train_tokenizer(text)
    tokenizer.save_pretrained(args.out / "model")
    tokens_T, validation_T = tokenise(tokenizer, text), tokenise(tokenizer, validation)
    print(f"{len(tokens_T):,} training tokens, {len(validation_T):,} validation tokens", flush=True)

    model = build_model()
    record = {"untrained_validation_perplexity": perplexity(model, validation_T)}
    record |= train(model, tokens_T, validation_T, args)
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out / "model")
    embedding = model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    record |= {
        "parameters": total,
        "non_embedding_parameters": total - embedding,
        "tokens_per_non_embedding_parameter": record["tokens"] / (total - embedding),
        "validation_perplexity": perplexity(model.float(), validation_T),
        "protocol": f"first 512 non-overlapping windows of {LENGTH} tokens of the validation text, float32",
        "torch": torch.__version__,
        "arguments": {
            "tokens": args.tokens,
            "batch": args.batch,
            "learning_rate": args.learning_rate,
            "seed": args.seed,
        },
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "calibration.txt").write_text(excerpt(read_text(args.calibration), SHIPPED_TEXT_BYTES))
    (args.out / "validation.txt").write_text(excerpt(validation, SHIPPED_TEXT_BYTES))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
