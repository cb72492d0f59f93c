"""Memory as a budget: sizes in words, who holds how much, and what gives way; and room on the disk."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from streamlap.accelerator.devices import accelerator_of
from streamlap.errors import BudgetError, RecipeError, shown
from streamlap.system import budget as purse
from streamlap.system.budget import Ladder, MemoryBudget, parse_size, require_disk, show_size


def test_too_little_disk_is_said_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"1,000,000,000,000,000 bytes .* are free"):
        require_disk(tmp_path / "not" / "there", 10**15, "the output")


# --- sizes -----------------------------------------------------------------------------------------------------------

SIZES = [
    ("8GiB", 8 << 30), ("500MB", 500 * 10**6), ("1.5 GiB", 3 << 29), ("64kib", 64 << 10), (" 2TB ", 2 * 10**12),
    ("3B", 3), ("1024", 1024), (1024, 1024), ("0.5KiB", 512), ("7KB", 7000), ("1TiB", 1 << 40), ("2MiB", 2 << 20),
    ("8G", 8 << 30), ("8g", 8 << 30), ("8 G", 8 << 30), ("8Gi", 8 << 30), ("24GB", 24 * 10**9), ("24 gb", 24 * 10**9),
    ("24gib", 24 << 30), ("1.5T", 3 << 39), ("500M", 500 << 20), ("512k", 512 << 10), ("0.1GB", 10**8), (".5G", 1 << 29),
    ("8_000_000_000", 8 * 10**9), ("8_192 MiB", 8 << 30),
]  # fmt: skip


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text, "max_ram") == size


def test_no_size_is_no_limit() -> None:
    assert parse_size(None, "max_ram") is None


@pytest.mark.parametrize(
    "text",
    [
        "0",
        0,
        "0GiB",
        "0.1B",
        "-1",
        -1,
        "lots",
        "1e3",
        "",
        "GiB",
        "8GiBs",
        "1,5GiB",
        "nan",
        "1.GiB",
        "_8G",
        "8_G",
        "8__0",
        "8 gigs",
        "8 G B",
        "٨G",
        True,
    ],
)
def test_what_is_no_size_is_refused_by_the_name_of_the_knob(text: str | int) -> None:
    with pytest.raises(RecipeError) as refusal:
        parse_size(text, "max_vram")
    assert str(refusal.value) == (
        f"max_vram is {text!r}; wanted a size like 8GiB or 8G (2^30 bytes each), or 8GB (10^9 bytes)."
    )


@pytest.mark.parametrize(
    "digits", ["9" * 41, "9" * 5000, 10**40, 10**5000, [10**5000]], ids=lambda value: shown(value, 20)
)
def test_a_number_that_is_too_long_is_refused_in_a_short_message(digits: Any) -> None:
    with pytest.raises(RecipeError, match=r"^max_ram is .*; wanted a size like") as refusal:
        parse_size(digits, "max_ram")
    assert len(str(refusal.value)) < 250


def test_sizes_are_shown_in_the_unit_that_suits() -> None:
    assert [show_size(count) for count in (0, 3 << 19, (1 << 30) - 1, 5 << 29)] == [
        "0.0 MiB", "1.5 MiB", "1024.0 MiB", "2.50 GiB"
    ]  # fmt: skip


# --- who holds it ----------------------------------------------------------------------------------------------------


def test_claims_add_up_and_go_in_any_order() -> None:
    budget = MemoryBudget(100, base=10)
    with budget.claim({"staging": 30, "hidden states": 20}):
        assert (budget.used, budget.held) == (60, {"staging": 30, "hidden states": 20})
        inner = budget.claim({"workspace": 40})
        with inner:
            assert budget.used == 100
        assert budget.used == 60
    assert (budget.used, budget.held) == (10, {})


def test_overlapping_claims_of_one_purpose_count_twice() -> None:
    budget, first, second = MemoryBudget(100), contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(budget.claim({"edits": 30}))
    second.enter_context(budget.claim({"edits": 20}))
    assert budget.held == {"edits": 50}
    first.close()
    assert budget.held == {"edits": 20}
    second.close()
    assert budget.held == {}


def test_a_claim_over_the_cap_names_what_is_held_and_holds_nothing() -> None:
    budget = MemoryBudget(100 << 20, base=10 << 20, name="VRAM")
    with budget.claim({"staging": 60 << 20}):
        with pytest.raises(BudgetError) as refusal, budget.claim({"layer": 25 << 20, "workspace": 6 << 20}):
            pytest.fail("31 MiB were given where 30 are left")
        assert budget.held == {"staging": 60 << 20}
        with budget.claim({"layer": 30 << 20}):
            assert budget.used == budget.cap
    assert str(refusal.value) == (
        "layer, workspace take 31.0 MiB of VRAM, and 70.0 MiB of the 100.0 MiB allowed are held "
        "(process 10.0 MiB, staging 60.0 MiB). Raise the cap."
    )


def test_a_claim_ends_with_its_block_however_that_ends() -> None:
    budget = MemoryBudget(100)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), budget.claim({"edits": 30}):
            raise error
        assert budget.held == {}


# --- what gives way --------------------------------------------------------------------------------------------------

CPU, CUDA = accelerator_of("cpu"), accelerator_of("cuda")
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


class Attempt:
    """Fails so many times, then gives 7; notes what the ladder had given way at each attempt."""

    def __init__(self, ladder: Ladder, failures: int, error: Exception | None = None) -> None:
        self.ladder, self.failures, self.error = ladder, failures, error or MemoryError("no room")
        self.seen: list[tuple[int, str]] = []

    def __call__(self) -> int:
        self.seen.append((self.ladder.micro, self.ladder.solve_device.type))
        if len(self.seen) <= self.failures:
            raise self.error
        return 7


def test_what_succeeds_at_once_takes_no_step() -> None:
    ladder = Ladder(8, CPU)
    assert ladder.climb("capture", 0, Attempt(ladder, 0)) == 7
    assert (ladder.micro, ladder.steps) == (8, [])


@pytest.mark.parametrize("phase", ["capture", "propagate"])
def test_a_forward_goes_down_to_one_sequence_then_frees_caches(phase: str) -> None:
    ladder = Ladder(5, CPU)
    attempt = Attempt(ladder, 4)
    assert ladder.climb(phase, 3, attempt) == 7
    assert [micro for micro, _ in attempt.seen] == [5, 3, 2, 1, 1]
    assert ladder.taken(3) == tuple(
        f"layer 3, {phase}: {step}"
        for step in ("3 sequences a forward", "2 sequences a forward", "1 sequences a forward", "caches freed")
    )


@pytest.mark.parametrize("phase", ["capture", "solve", "propagate"])
def test_at_the_end_of_the_ladder_is_an_error_that_says_what_to_do(phase: str) -> None:
    ladder = Ladder(2, CPU)
    with pytest.raises(BudgetError, match=rf"out of memory in {phase} after every fallback \(no room\).*--length"):
        ladder.climb(phase, 0, Attempt(ladder, 99))
    assert [step.split(": ")[1] for _, step in ladder.steps] == (
        ["caches freed"] if phase == "solve" else ["1 sequences a forward", "caches freed"]
    )


def test_a_solve_leaves_the_gpu_but_not_the_cpu() -> None:
    ladder = Ladder(8, CUDA)
    attempt = Attempt(ladder, 2)
    assert ladder.climb("solve", 1, attempt) == 7
    assert attempt.seen == [(8, "cuda"), (8, "cuda"), (8, "cpu")]
    assert ladder.taken(1) == ("layer 1, solve: caches freed", "layer 1, solve: solve on the CPU")
    with pytest.raises(BudgetError, match="out of memory in solve"):
        ladder.climb("solve", 2, Attempt(ladder, 99))
    assert ladder.taken(2) == ("layer 2, solve: caches freed",)


def test_a_forward_never_leaves_the_gpu() -> None:
    ladder = Ladder(1, CUDA)
    with pytest.raises(BudgetError, match="out of memory in capture"):
        ladder.climb("capture", 0, Attempt(ladder, 99))
    assert ladder.solve_device == CUDA.device


def test_a_step_holds_for_the_layers_that_follow() -> None:
    ladder = Ladder(8, CPU)
    ladder.climb("capture", 0, Attempt(ladder, 1))
    later = Attempt(ladder, 1)
    ladder.climb("propagate", 1, later)
    assert [micro for micro, _ in later.seen] == [4, 2]
    assert ladder.taken(0) == ("layer 0, capture: 4 sequences a forward",)
    assert ladder.taken(1) == ("layer 1, propagate: 2 sequences a forward",)
    assert ladder.taken(2) == ()


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_every_kind_of_exhaustion_counts(error: Exception) -> None:
    ladder = Ladder(2, CPU)
    assert ladder.climb("capture", 0, Attempt(ladder, 1, error)) == 7
    assert ladder.micro == 1


def test_any_other_error_passes_at_once() -> None:
    ladder = Ladder(8, CPU)
    attempt = Attempt(ladder, 9, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ladder.climb("capture", 0, attempt)
    assert len(attempt.seen) == 1
    assert ladder.steps == []


def test_what_a_failed_attempt_held_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def attempt() -> int:
        alive.extend(reference() is not None for reference in held)
        block = torch.zeros(10)
        held.append(weakref.ref(block))
        if len(held) < 3:
            raise MemoryError
        return int(block.sum())

    monkeypatch.setattr(purse.gc, "collect", lambda: 0)  # not even a cycle holds it
    assert Ladder(4, CPU).climb("capture", 0, attempt) == 0
    assert alive == [False, False, False]
