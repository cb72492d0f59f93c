"""Matrix products of large problems.

torch's `@` is MKL on x86, and MKL runs float32 at half speed on processors that are not Intel's. oneDNN, which torch also has,
does not. The bits of neither depend on the number of threads.

Shape suffixes: M rows, K inner, N columns; T tokens, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """a b, in their dtype and on their device."""
    if not _serves(a_MK, b_KN):
        return a_MK @ b_KN
    made_MN: torch.Tensor = torch.ops.mkldnn._linear_pointwise(_packed(a_MK), _packed(b_KN).T, None, "none", [], "")
    return made_MN


class Linears(TorchFunctionMode):
    """Within it `torch.nn.functional.linear` and its gradients are made of `product`. Their bits are not those of transformers,
    so it is for training, not for a stream."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func is not torch.nn.functional.linear or kwargs or not _serves(*args[:2]):
            return func(*args, **(kwargs or {}))
        x, w_OI, *bias = args
        y_TO = _Linear.apply(x.reshape(-1, x.shape[-1]), w_OI, *bias)  # type: ignore[no-untyped-call]
        return y_TO.view(*x.shape[:-1], len(w_OI))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, w_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        of_x, of_w, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x_TI if of_w else None, w_OI if of_x else None)
        y_TO = product(x_TI, w_OI.T)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    @staticmethod
    def backward(ctx: Any, g_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_TI, w_OI), of_bias = ctx.saved_tensors, ctx.needs_input_grad[2:]
        return (
            None if w_OI is None else product(g_TO, w_OI), None if x_TI is None else product(g_TO.T, x_TI),
            *(g_TO.sum(dim=0) if wanted else None for wanted in of_bias),
        )  # fmt: skip


def _serves(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether oneDNN is there for both, and is the better one."""
    plain = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"
    return plain and 0 not in (*a.shape, *b.shape) and _has_onednn()


def _has_onednn() -> bool:
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _packed(x: torch.Tensor) -> torch.Tensor:
    """A slice with gaps, copied to memory of its own: oneDNN would go through the gaps number by number."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()
