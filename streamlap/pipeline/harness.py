"""A checkpoint as a model of lm-eval: every request passes layer k before layer k + 1 is read.

Import this file only where lm-eval is installed. Log-likelihoods are what a stream can give; text is not generated.

Shape suffixes: N sequences, L length, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.functional import cross_entropy

from streamlap.errors import RecipeError, UnsupportedModel, shown

LEAST = 16
"""Inputs of the shortest sequences that go through together."""

Request = tuple[Any, list[int], list[int]]
"""Its text, the tokens before, and those that are scored."""


class StreamedModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Args: tokenizer, of transformers; context, tokens that the layers may read, behind which one more is scored; vocabulary,
    ids that the model knows; score, what `scored` gives [N, L - 1, 2] of sequences [N, L]."""

    def __init__(
        self, tokenizer: Any, context: int, vocabulary: int, score: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.tokenizer, self._context, self._vocabulary, self._score = tokenizer, context, vocabulary, score

    @property
    def eot_token_id(self) -> int | None:
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        first = self.eot_token_id if bos is None else int(bos)
        if first is None:
            raise RecipeError(
                "the tokenizer has no bos or eos, and the task begins with one: it scores whole texts, or a context of it is "
                "empty. Name one in tokenizer_config.json, or give each document a context."
            )
        return self._known([first])[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        wanted = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self._known(list(self.tokenizer.encode(string, **wanted)))

    def _known(self, ids: list[int]) -> list[int]:
        """The same. Raises RecipeError where the model has no such token."""
        if (highest := max(ids, default=0)) >= self._vocabulary:
            name = shown(self.tokenizer.convert_ids_to_tokens(highest))
            raise RecipeError(
                f"the task has the token {name} (id {highest}), which is in the tokenizer, and not in the model's vocabulary "
                f"of 0 to {self._vocabulary - 1}. Use the tokenizer that the model was trained with, or take the token out of "
                "the task."
            )
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Of the tokens of each request behind those before it; in passes of sequences of about one length."""
        rows = [((before or [self.prefix_token_id]) + after)[-(self._context + 1) :] for _, before, after in requests]
        passes: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            passes.setdefault(min(self._context, max(LEAST, 1 << (len(row) - 2).bit_length())), []).append(place)
        found: dict[int, tuple[float, bool]] = {}
        for inputs, places in sorted(passes.items()):
            tokens_NL = torch.zeros(len(places), inputs + 1, dtype=torch.long)  # anything may stand behind a row
            for number, place in enumerate(places):
                tokens_NL[number, : len(rows[place])] = torch.tensor(rows[place])
            for scored_L2, place in zip(self._score(tokens_NL), places, strict=True):
                end = len(rows[place]) - 1
                if len(requests[place][2]) > end:
                    raise UnsupportedModel(
                        f"the task has a continuation of {len(requests[place][2])} tokens, and the model a context of "
                        f"{self._context}; wanted one that fits."
                    )
                own_T2 = scored_L2[end - len(requests[place][2]) : end]
                found[place] = -float(own_T2[:, 0].double().sum()), bool(own_T2[:, 1].all())
        return [found[place] for place in range(len(rows))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that fill the context with the token before them."""
        prefix, context = self.prefix_token_id, self._context
        texts = (self.tok_encode(request.args[0]) for request in requests)
        windows = [list(map(make_disjoint_window, get_rolling_token_windows(ids, prefix, context, 1))) for ids in texts]
        each = iter(self._loglikelihood_tokens([(None, *window) for of_text in windows for window in of_text]))
        return [sum(next(each)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise UnsupportedModel(
            "the task asks for generated text, and a model that is streamed layer by layer gives log-likelihoods alone; wanted "
            "a task of multiple choice or of log-likelihood. Give the folder to lm-eval's own command for others."
        )


def scored(logits_TV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """[T, 2]: NLL, and 1 where the target is the likeliest."""
    likeliest_T = logits_TV.argmax(-1) == target_T
    return torch.stack((cross_entropy(logits_TV, target_T, reduction="none"), likeliest_T.float()), -1)
