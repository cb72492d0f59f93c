"""Products are those of `@` to rounding, whatever lies how in memory, and the same on any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from streamlap.linalg import products
from streamlap.linalg.products import Linears, product
from streamlap.linalg.sums import total

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.contiguous().T,
    "slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "slice of columns": lambda x: torch.cat([x, x]).T.contiguous().T[: len(x)],
    "every other": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


def pair(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, inner, generator=generator).to(dtype),
        torch.randn(inner, columns, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_are_those_of_exact_numbers(left: str, right: str, dtype: torch.dtype) -> None:
    a, b = pair(37, 129, 65, dtype)
    made = product(LAYOUTS[left](a), LAYOUTS[right](b))
    assert made.dtype == dtype
    exact = a.double() @ b.double()
    torch.testing.assert_close(made.double(), exact, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (1, 300, 1)])
def test_products_of_any_size(shape: tuple[int, int, int]) -> None:
    a, b = pair(*shape, torch.float32)
    torch.testing.assert_close(product(a, b), a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 33), (2, 7, 33), (33,)])
def test_linears_and_their_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=generator) for size in (shape, (17, 33), *[(17,)] * bias)]

    def run() -> list[torch.Tensor]:
        tensors = [tensor.clone().requires_grad_() for tensor in given]
        y = torch.nn.functional.linear(*tensors)
        y.square().sum().backward()
        return [y, *(tensor.grad for tensor in tensors)]

    wanted = run()
    with Linears():
        made = run()
    assert made[0].grad_fn is not None
    assert "_Linear" in str(made[0].grad_fn.next_functions), "behind a change of shape"
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_linears_make_no_gradient_that_nobody_wants() -> None:
    x, w = pair(5, 3, 4, torch.float32)
    w = w.T.contiguous().requires_grad_()
    with Linears():
        torch.nn.functional.linear(x, w).sum().backward()
        assert not torch.nn.functional.linear(x, w.detach()).requires_grad
    assert x.grad is None
    torch.testing.assert_close(w.grad, x.sum(dim=0).expand(4, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_the_linears_of_torch(dtype: torch.dtype) -> None:
    x, w = pair(5, 3, 4, dtype)
    with Linears():
        made = torch.nn.functional.linear(x.requires_grad_(), w.T)
    assert made.grad_fn is not None
    assert "_Linear" not in str((made.grad_fn, made.grad_fn.next_functions))
    assert torch.equal(made, torch.nn.functional.linear(x, w.T))


def test_threads_do_not_move_a_bit() -> None:
    a, b = pair(200, 300, 500, torch.float32)
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(product(a, b))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("shape", [(1, 40000), (300, 1100)])
def test_threads_do_not_move_a_bit_of_a_total(threads: Callable[[int], None], shape: tuple[int, int]) -> None:
    x_TI, found = torch.randn(shape, generator=torch.Generator().manual_seed(0)), set()
    for count in (1, 2, 3, 4):
        threads(count)
        found.add((total(x_TI), total(x_TI, torch.float64)))
    assert len(found) == 1
    assert found.pop()[1] == pytest.approx(float(x_TI.double().sum()), rel=1e-12)


def test_without_onednn_it_is_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    a, b = pair(20, 30, 40, torch.float32)
    assert torch.equal(product(a, b), a @ b)
