#!/usr/bin/env python
"""docs/families.md: what is known of each family, what a cut costs there, and what its tests run.

From the rows of `streamlap/families/table.py` and the figures of `scripts/bench_families.py`.

    python scripts/families_table.py > docs/families.md

A test compares the page with what this prints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streamlap.families.linears import ROLES
from streamlap.families.table import FAMILIES, Family
from streamlap.families.wrappers import WRAPPERS

PAGE = """# Model families

Made by `scripts/families_table.py` from the rows in `streamlap/families/table.py`. A family is a `model_type` in config.json.
Any other is refused before a weight is read; [add-a-family.md](add-a-family.md) shows the row that a new one takes.

{table}

- **sub-layers**: in sequence, or parallel, where attention and FFN both read the input of the layer. A name in code style is
  the attribute of the layer that decides it.
- **FFN**: its linears that read its input. All linears of a layer count, and all but those under "stays" are compressed; norms,
  embeddings and the head are copied as bytes.
- **stays**: what some layers have in place of attention, by its path in the layer. It is copied as bytes. A ratio is of all
  linears, these too, so all others lose more. `--refine` trains it with its layer.
- **behind o and down**: what the layer does to their output before it is added to the hidden states. The preset `best` fits
  both linears to what is wanted behind it.
- **heads**: whether `attention_groups` may remove some. Where a norm behind q or k has weights for all heads together, or
  attention relies on the number in config.json, they all stay, and the FFN takes the whole cut.
- **biases**: flags of config.json that give linears biases. They stay.

A `phi3` (also Phi 4) is read as the llama that it is, or where it has a window as a mistral, with its fused matrices apart; so
a result is a llama or a mistral. Those with partial rotary embeddings or scaled positions (`partial_rotary_factor`,
`rope_scaling`) are refused.

A `gpt2` is read as the opt that it is by other names, with q, k and v apart and its matrices transposed; so a result is an opt,
whose table of positions has two more rows, of zeros. Those with `add_cross_attention`, other than the usual scales of
attention, or another `layer_norm_epsilon` than 1e-5 are refused.

In `glm4` gate and up are one matrix, in `gpt_neox` q, k and v. They are compressed each on its own. A result in the factored
format has them apart; `--format stock` and `export --to dense` or `stock` write one matrix again.

`qwen3_next` and `qwen3_5_text` are hybrids: most layers have a gated delta net in place of attention. In the others q gives a
query and a gate, so it has twice the rows; it is compressed as one matrix, beside k, v and o. No head is removed. A
`qwen3_next` whose layers have experts, as the published ones do, is refused: experts are not compressed yet. The state of a
gated delta net does not grow with the tokens, and is not counted as cache. peft takes the FFNs of any `qwen3_next` to be
experts: it adapts its attention and leaves them out, also in the original. `recover` adapts both.

## Models with a vision tower

{wrappers}

Of these the language model is compressed: its layers are those of the family beside it, config.json describes them under
`text_config` (of a `qwen2_5_vl` also beside the other keys), and calibration is text. Everything else, such as the vision tower
and the projector, is copied as bytes under its own names, with the settings of the image processor. It is not built; its
headers are checked, and that its values are finite. Ratio and decoder parameters count the language model; parameters of the
whole model and bytes count all. Tensors of a `qwen3_5` that begin with `mtp.`, which predict several tokens ahead, are copied
too and fit the original alone.

The tensors of the language model are written as `model.language_model.*`, whatever they were called, and transformers
opens the result as it opens the original: by `AutoModelForImageTextToText`. The formats `factored` and `stock`, and the export
`dense`, hold such a model; `nas` and GGUF are refused.

## What a cut costs

{costs}

Mean NLL above that of the model itself, in nats a byte, at 20 and 50 % removed; less is better. Each model is a small one of
its family, about {parameters} parameters in its linears, that has learnt to predict the bytes of English books for
{seconds} seconds on one thread. A random cut has the layouts of `lorap`, with subspaces and channels drawn at random; the mean
of three draws. All three store the same number of parameters, to about 1 % of the model's; `best` has no survey here. The
figures compare cuts of one family, not families: some learn more in that time, and the windows and multipliers of these models
are chosen to be exercised, not to work well. `scripts/bench_families.py` measures them.

## What holds

{holds}

Of the same models. **stream**, **result**: the largest difference between the logits of the layers one by one and those of
transformers, for the model itself and for what `best` makes of it at 20 %; 0 is bit for bit. Of the same result: **whole**, by
`verify`; **saved again**, by transformers, it gives the same logits, bit for bit; **learns**, its loss falls in one step of
LoRA. **tests**: those in `tests/families` that run it, nearly all of which every family inherits, on smaller random models; and
their seconds ({load}).

## What is run

The tests run each of these families, on a random model of three layers and a few thousand weights:

- the layers, run one by one, give bit for bit the hidden states and logits of transformers, in float32 and bfloat16;
- the sub-layers together give what the layer gives: bit for bit in sequence, to one part in a million where they are parallel;
- a compression that removes nothing gives the original model back, bit for bit;
- `lorap` and `best`: the result loads in transformers with the logits of the stream, has the sizes that the plan says, is whole
  by `verify`, generates, and `eval` gives the loss of transformers;
- shares by a survey, `best` and `--refine` in one run, killed after its first layer with its hidden states on the disk; it
  goes on to the same bytes as a run that was not killed;
- LoRAPrune and PC-LoRA; the export to plain linears, with the loss of the result; `recover`, which trains every linear; an
  adapter of peft, which learns, and gives the same on a model opened anew; and, nightly, the result opened by the code in its
  folder, in a process without streamlap;
- where nothing is lost, `best` fits the last linear of each sub-layer back to itself (one family with norms behind its
  sub-layers, one with a multiplier, one with parallel sub-layers, one without a gate).

Of each model with a vision tower, also on a small random one: the stream gives bit for bit the hidden states and logits of the
whole model on text; the result of both presets is whole, gives the same features of an image bit for bit and, on text, the
logits of the stream; saved again and exported as `dense`, it gives the same answer to a prompt with an image.

A checkpoint whose layers are not what the row says is refused before anything is written: the sub-layers are compared with the
layer on the first window.
"""

FIGURES = Path(__file__).parent.parent / "docs" / "benchmarks" / "families.json"
KINDS = (*FAMILIES, "phi3", "gpt2", *WRAPPERS)
"""All that is served."""
RATIOS = (0.2, 0.5)
WAYS = {"random": "random", "lorap": "`lorap`", "best": "`best`"}
"""Way of cutting in the figures -> in words."""

COLUMNS = ("family", "sub-layers", "stays", "FFN", "behind o and down", "heads", "biases")


def row(family: Family) -> tuple[str, ...]:
    """The cells of a family."""
    order = f"parallel if `{family.parallel}`" if isinstance(family.parallel, str) else "parallel" * family.parallel
    parts = family.sublayers.values()
    behind = {"norm" if part.norm else f"`{part.multiplier}`" if part.multiplier else "nothing" for part in parts}
    reads = [role for role in ROLES if role in family.sublayers["ffn"].reads]
    flags = dict.fromkeys(f"`{flag}`" for flag in family.bias_flags.values())
    return (
        f"`{family.model_type}`", order or "in sequence", ", ".join(f"`{path}`" for path in family.kept.values()) or "nothing",
        ", ".join(reads), ", ".join(sorted(behind)),
        "stay" if family.heads_stay else "may go", ", ".join(flags) or "none to switch",
    )  # fmt: skip


def page() -> str:
    """The whole text."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, FAMILIES.values())]
    wrappers = [("model", "layers of"), ("---", "---")]
    wrappers += [(f"`{kind}`", " or ".join(f"`{row}`" for row in texts.values())) for kind, texts in WRAPPERS.items()]
    return PAGE.format(table=lines(rows), wrappers=lines(wrappers), **costs(FIGURES), **holds(FIGURES))


def costs(path: Path) -> dict[str, Any]:
    """What the page says of the figures in a file; none are there where it is absent."""
    found = json.loads(path.read_text(encoding="utf-8"))["families"] if path.is_file() else {}
    names = [f"{words}, {ratio:.0%}" for ratio in RATIOS for words in WAYS.values()]
    rows = [("family", "dense NLL", *names), ("---",) * (2 + len(names))]
    rows += [
        (f"`{kind}`", f"{found[kind]['dense']:.3f}" if kind in found else "", *losses(found.get(kind)))
        for kind in KINDS
    ]
    trained = [row["trained"] for row in found.values()]
    sizes, seconds = (
        [row["parameters"]["decoder"] // 1000 * 1000 for row in trained],
        [int(row["seconds"]) for row in trained],
    )
    return {"costs": lines(rows), "seconds": span(seconds), "parameters": span(sizes)}


def holds(path: Path) -> dict[str, str]:
    """What the page says of what holds in each family, by the figures in a file, and how busy the machine of the tests was."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tests = found.get("tests", {})
    rows = [("family", "stream", "result", "whole", "saved again", "learns", "tests", "seconds"), ("---",) * 8]
    for kind in KINDS:
        row, run = found.get("families", {}).get(kind), tests.get("families", {}).get(kind)
        apart = [f"{row['logits'][name]:.1g}" for name in ("source", "best")] if row else ["not measured"] * 2
        good = [row["whole"], row["reloads"], row["step"]["learns"]] if row else []
        held = ["yes" if value else "no" for value in good] or ["not measured"] * 3
        counts = [str(run["tests"]), f"{run['seconds']:.0f}"] if run else ["not measured"] * 2
        rows.append((f"`{kind}`", *apart, *held, *counts))
    load = (
        f"with {tests['machine']['load']:.0f} busy threads on {tests['machine']['cores']} cores" if tests else "not run"
    )
    return {"holds": lines(rows), "load": load}


def losses(row: dict[str, Any] | None) -> list[str]:
    """The figures of one family, as `bench_families` has them, in the cells of a table."""
    ways = [(str(ratio), way) for ratio in RATIOS for way in WAYS]
    return [f"{round(row['cuts'][ratio][way]['loss'], 3) + 0.0:.3f}" if row else "not measured" for ratio, way in ways]


def span(counts: list[int]) -> str:
    """From the least to the most."""
    ends = [f"{count:,}" for count in sorted({min(counts), max(counts)})] if counts else ["no"]
    return " to ".join(ends)


def lines(rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(page(), end="")
