"""What a model does around its layers, run by its own code: embeddings, arguments of the layers, logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from picos import CONTEXT, PICO_OF
from test_stream import load_tokens, run_stream
from transformers import AutoModelForCausalLM

from streamlap.families import stream as stream_module
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES, Family

SCALES = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22}


@pytest.fixture
def new_row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family that streamlap does not have, with the plainest row there is."""
    monkeypatch.setitem(FAMILIES, request.param, Family(model_type=request.param))
    return str(request.param)


@pytest.mark.parametrize(
    ("new_row", "settings"),
    [
        ("granite", SCALES),
        ("cohere2", {"logit_scale": 0.25, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
        ("olmo2", {}),
    ],
    indirect=["new_row"],
)  # fmt: skip
def test_scales_of_embeddings_and_logits_are_the_models_own(
    pico: MakeModel, tokens: Path, new_row: str, settings: dict[str, object]
) -> None:
    folder, tokens_NL = pico(new_row, **settings), load_tokens(tokens)
    states, logits_NLV = run_stream(folder, tokens_NL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=tokens_NL, output_hidden_states=True)
    for mine, theirs in zip(states[:-1], expected.hidden_states[:-1], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(logits_NLV, expected.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_given_what_the_model_gives_them(pico: MakeModel, tokens: Path, family: str) -> None:
    folder, tokens_NL = pico(family), load_tokens(tokens)
    found = ModelStream(folder, dtype="float32").layer_kwargs(tokens_NL.shape[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected: list[dict[str, object]] = []
    for layer in model.get_submodule(FAMILIES[family].layers).children():
        layer.register_forward_pre_hook(lambda _, __, kwargs: expected.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=tokens_NL[:1], use_cache=False)
    for mine, theirs in zip(found, expected, strict=True):
        theirs.pop("output_router_logits", None)  # at which only experts look
        assert mine.keys() == theirs.keys()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "plain"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ("smollm3", {"use_sliding_window": False}),
        ("ministral", {"layer_types": ["full_attention"] * 3}),
        ("ministral3", {"rope_parameters": PICO_OF["ministral3"]["rope_parameters"] | {"llama_4_scaling_beta": 0.0}}),
        ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    ],
)
def test_the_pico_models_have_what_their_families_are_known_for(
    pico: MakeModel, tokens: Path, family: str, plain: dict[str, object]
) -> None:
    tokens_NL = load_tokens(tokens)
    _, logits_NLV = run_stream(pico(family), tokens_NL)
    assert not torch.equal(logits_NLV, run_stream(pico(family, **plain), tokens_NL)[1])


def test_of_the_embedding_only_the_rows_of_a_batch_are_read(pico: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the id of the padding is larger than any row of the short table."""
    folder = pico("llama", pad_token_id=299)
    read, seen = stream_module.read_rows, []
    monkeypatch.setattr(stream_module, "read_rows", lambda info, rows: seen.append(rows) or read(info, rows))
    tokens_NL = torch.tensor([[7, 299, 7, 0], [5, 5, 7, 0]])
    (x_BLD,) = ModelStream(folder).embed(tokens_NL)
    assert seen == [[0, 5, 7, 299]]
    table_VD = ModelStream(folder).source.read("model.embed_tokens.weight")
    assert torch.equal(x_BLD, table_VD[tokens_NL])


def test_a_token_that_the_compute_dtype_cannot_hold_is_out(pico: MakeModel, tmp_path: Path) -> None:
    """Whether the table or what the model makes of it is too large."""
    stream = ModelStream(pico("llama"), dtype="float16")
    read = stream_module.read_rows

    def huge(info: object, rows: list[int]) -> torch.Tensor:
        table_UD = read(info, rows)  # type: ignore[arg-type]
        table_UD[rows.index(7), 3] = 1e6
        return table_UD

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "read_rows", huge)
        (x_BLD,) = stream.embed(torch.tensor([[7, 1]]))
    assert x_BLD[0, 0].isnan().all()
    assert torch.isfinite(x_BLD[0, 1]).all()


@pytest.mark.parametrize("new_row", ["granite"], indirect=True)
def test_a_token_that_overflows_in_the_embedding_scale_is_out(pico: MakeModel, new_row: str) -> None:
    stream = ModelStream(pico(new_row, embedding_multiplier=1e6), dtype="float16")
    (x_BLD,) = stream.embed(torch.tensor([[7, 1]]))
    assert x_BLD.isnan().all()


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_takes_any_tokens(pico: MakeModel, tied: bool) -> None:
    """More of them than the model has positions, and one that is out."""
    stream = ModelStream(pico("llama", tied=tied))
    x_TD = torch.randn(3 * CONTEXT, stream.width, generator=torch.Generator().manual_seed(0))
    x_TD[5] = torch.nan
    head = stream.head()
    logits_TV = head(x_TD)
    assert logits_TV.shape == (3 * CONTEXT, stream.vocabulary)
    assert logits_TV[5].isnan().all()
    torch.testing.assert_close(logits_TV[7:9], head(x_TD[7:9]))
    assert torch.isfinite(logits_TV[torch.arange(len(x_TD)) != 5]).all()


def test_the_model_stays_on_meta(pico: MakeModel) -> None:
    """Shells are copies: neither weights nor stand-ins are left in the model."""
    stream = ModelStream(pico("llama"))
    modules = dict(stream.model.named_modules())
    stream.layer_kwargs(8)
    list(stream.embed(torch.tensor([[1, 2]])))
    stream.head()(torch.zeros(2, stream.width))
    assert dict(stream.model.named_modules()) == modules
    parts = [*stream.model.parameters(), *stream.model.buffers()]
    assert {tensor.device.type for tensor in parts} == {"meta"}
