"""What a computation has to say comes back with its value, through every function that uses it."""

from __future__ import annotations

import pytest
import torch

from streamlap.linalg import anchor, obs, pivot
from streamlap.linalg import subspace as spaces
from streamlap.linalg.anchor import anchored, root
from streamlap.linalg.gram import Gram
from streamlap.linalg.heads import kept_heads
from streamlap.linalg.lowrank import awsvd
from streamlap.linalg.obs import Rest, removals
from streamlap.linalg.pivot import pivot_rows, shared_pivot_rows
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.storage import balanced
from streamlap.linalg.subspace import PULL, refit, subspace, two_factors

SIZE = 12
DAMPED = f"damping 0.01 where 0.001 was not enough for a Gram of size {SIZE}"
PULLED = f"pull 1e-02 where {PULL:.0e} was not enough for a Gram of size {SIZE}"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(least: float = -5e-3) -> torch.Tensor:
    """Eigenvalues of one, and one that is `least`: a little below zero, and the usual damping is not enough."""
    return basis() * torch.tensor([least, *[1.0] * (SIZE - 1)], dtype=torch.float64) @ basis().T


def basis() -> torch.Tensor:
    """The eigenvectors of `gram`, that of `least` first."""
    return torch.linalg.qr(normal(SIZE, SIZE)).Q


def talkative(monkeypatch: pytest.MonkeyPatch, module: object) -> list[str]:
    """Every root that the module takes says that it is the first, the second, and so on; what has been said."""
    said: list[str] = []

    def talk(of: Gram) -> Solution[torch.Tensor]:
        said.append(f"root {len(said)}")
        return Solution(root(of).value, notes=("every root", said[-1]))

    monkeypatch.setattr(module, "root", talk)
    return said


def test_what_nobody_said_is_nothing() -> None:
    assert Solution(3) == Solution(3, error=0.0, notes=())
    assert joined() == ()


def test_notes_are_joined_in_their_order_and_only_once() -> None:
    assert joined(("b", "a"), [], ["c", "b", "c"], ("a", "d")) == ("b", "a", "c", "d")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gram_that_took_more_damping_is_noted_by_what_solves_with_it(dtype: torch.dtype) -> None:
    gram_II, w_OI = gram().to(dtype), normal(6, SIZE, seed=1).to(dtype)
    for solved in (
        Gram.of(gram_II).cholesky(), root(Gram.of(gram_II)), anchored(w_OI, Gram.of(gram_II), w_OI.T.clone()),
        *removals(w_OI, Gram.of(gram_II), [SIZE, 3]),
        kept_heads(w_OI, Gram.of(gram_II), 3, 6, 1),
    ):  # fmt: skip
        assert solved.notes == (DAMPED,)


def test_a_regular_gram_leaves_nothing_to_say() -> None:
    gram_II, w_OI = gram(0.5), normal(20, SIZE, seed=1)
    found = subspace(w_OI, Gram.of(gram_II), 3, serves=torch.arange(15))
    for solved in (
        Gram.of(gram_II).cholesky(), root(Gram.of(gram_II)), anchored(w_OI, Gram.of(gram_II), w_OI.T.clone()),
        *removals(w_OI, Gram.of(gram_II), [SIZE, 3]),
        kept_heads(w_OI, Gram.of(gram_II), 3, 6, 1), refit(w_OI, w_OI[:3], Gram.of(gram_II)), found,
        two_factors(found.value, Gram.of(gram_II), w_OI, torch.float16), balanced(w_OI, w_OI.T, torch.float16, "o"),
        pivot_rows(found.value.basis_OR), pivot_rows(normal(8, 4), 2), shared_pivot_rows([normal(8, 4)]),
        awsvd(w_OI, torch.ones(SIZE), 3),
    ):  # fmt: skip
        assert solved.notes == ()


def test_each_removal_says_what_those_before_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = talkative(monkeypatch, obs)
    first, last = removals(normal(6, SIZE, seed=1), Gram.of(gram()), [SIZE - 2, SIZE - 4])
    assert len(said) == 4
    assert first.notes == (DAMPED, "every root", *said[:2])
    assert last.notes == (DAMPED, "every root", *said)


def test_what_was_only_looked_at_is_noted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said = talkative(monkeypatch, obs)
    rest = Rest(normal(6, SIZE, seed=1), Gram.of(gram()))
    assert rest.notes == (DAMPED,)
    rest.loss(torch.tensor([1, 2]))
    rest.remove(torch.tensor([3]))
    assert rest.notes == (DAMPED, "every root", *said)
    assert len(said) == 2


def test_every_round_of_pivots_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivot, "BLOCK", 2)
    said = talkative(monkeypatch, pivot)
    bases = [torch.linalg.qr(normal(24, 6, seed=seed)).Q for seed in range(2)]
    assert shared_pivot_rows(bases).notes == ("every root", *said)
    assert len(said) == 4, "two bases, and two rounds before the last"
    said.clear()
    assert pivot_rows(bases[0], 3).notes == ("every root", *said)
    assert len(said) == 3


def test_a_refit_notes_its_pull_and_what_its_root_took(monkeypatch: pytest.MonkeyPatch) -> None:
    gram_II, base_RI = gram(), basis().T[:3]
    fitted = refit(normal(5, SIZE, seed=1), base_RI, Gram.of(gram_II))
    assert fitted.notes == (PULLED,)

    def talk(part: Gram) -> Solution[torch.Tensor] | None:
        found = anchor.root_if_any(part)
        return None if found is None else Solution(found.value, notes=("a root",))

    monkeypatch.setattr(spaces, "root_if_any", talk)
    again = refit(normal(5, SIZE, seed=1), base_RI, Gram.of(gram_II))
    assert again.notes == ("a root", PULLED)
    assert torch.equal(again.value, fitted.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_subspace_notes_the_root_of_its_gram(dtype: torch.dtype) -> None:
    """In float32 also where it is found in float64 in the end; where the root is given, there is nothing to say."""
    t_OI, gram_II = normal(30, SIZE, seed=1).to(dtype), gram().to(dtype)
    for rank in (3, SIZE):
        found = subspace(t_OI, Gram.of(gram_II), rank)
        assert found.notes == (DAMPED,)
        assert found.error == found.value.error(rank)
    assert subspace(t_OI, Gram.of(gram_II), 3, root(Gram.of(gram_II)).value).notes == ()


def test_a_subspace_that_is_found_again_in_float64_notes_that_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the first is left then."""
    said = talkative(monkeypatch, spaces)
    t_OI = (normal(30, 2, seed=1) @ normal(2, SIZE, seed=2)).float()
    assert subspace(t_OI, Gram.of(gram(0.5).float()), 8).notes == ("every root", "root 1")
    assert len(said) == 2


def test_a_subspace_notes_the_refit_of_rows_that_it_does_not_serve() -> None:
    t_OI = torch.zeros(8, SIZE, dtype=torch.float64)
    t_OI[:3] = basis().T[:3]
    found = subspace(t_OI, Gram.of(gram()), 3, serves=torch.arange(3))
    assert found.notes == (PULLED,)
    assert found.error == found.value.error(3)


def test_two_factors_note_the_refit_and_the_balance() -> None:
    """And give the error of the subspace."""
    t_OI, gram_II = basis().T[:3], gram()
    for rank, notes in ((1, ()), (3, (PULLED,))):
        found = subspace(t_OI, Gram.of(gram_II), rank).value
        plain = two_factors(found, Gram.of(gram_II), t_OI, torch.float32, "o")
        assert plain.notes == notes
        assert plain.error == found.error(rank) == pytest.approx(0.5 if rank == 1 else 0)
    even_1I = torch.full((1, SIZE), SIZE**-0.5, dtype=torch.float64)
    t_OI, gram_II = 5e9 * even_1I, torch.eye(SIZE).double() - 1.005 * even_1I.T @ even_1I
    loud = two_factors(subspace(t_OI, Gram.of(gram_II), 1).value, Gram.of(gram_II), t_OI, torch.float16, "o")
    assert loud.notes == (PULLED, "o: 1 ranks balanced for torch.float16")
