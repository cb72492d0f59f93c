"""hf_plugin.py and the shim: what transformers makes of a streamlap folder, with the loader, with the shim, with neither.

The folders are put together by hand in folders.py, so that nothing under test has written what it reads.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from folders import (
    ATTENTION,
    FAMILIES,
    MIXED,
    SINGLE,
    SIZES,
    TOKENS_BL,
    Case,
    Rows,
    all_kinds,
    edit_config,
    logits,
    make_case,
)
from outside import run_outside
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    dynamic_module_utils,
)
from transformers.distributed import DistributedConfig
from transformers.trainer_utils import validate_quantization_for_training

from streamlap.loader import hf_plugin
from streamlap.loader.forms import form_of
from streamlap.loader.linears import LowRankLinear, StoredLinear
from streamlap.loader.shim import SHIM_FILES, write_shim

REPOSITORY = Path(__file__).parents[2]


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """qwen2, tied, biases on q, k and v. Shared: a test must not write into its folder."""
    return make_case(tmp_path_factory.mktemp("mixed"), FAMILIES["qwen2-tied"](), MIXED)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same model with every kind of row."""
    return make_case(tmp_path_factory.mktemp("kinds"), FAMILIES["qwen2-tied"](), all_kinds(8))


@pytest.fixture(params=["mixed", "kinds"])
def case(request: pytest.FixtureRequest) -> Case:
    """Each of the two."""
    found: Case = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_was_assembled_by_hand(tmp_path: Path, family: str) -> None:
    case = make_case(tmp_path, FAMILIES[family](), MIXED)
    model, info = load(tmp_path, output_loading_info=True)
    assert torch.equal(logits(model), logits(case.reference))
    assert type(model) is type(case.reference)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model.model.layers[0].self_attn.q_proj, LowRankLinear)
    assert isinstance(model.model.layers[1].self_attn.q_proj, nn.Linear)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_every_kind(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    config = FAMILIES[family]()
    head_dim = getattr(config, "head_dim", None) or 8
    case = make_case(tmp_path / "first", config, all_kinds(head_dim), dtype)
    model, info = load(tmp_path / "first", output_loading_info=True)
    assert torch.equal(logits(model), logits(case.reference))
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kinds = [type(module).__name__ for module in model.modules() if isinstance(module, StoredLinear)]
    assert sorted(kinds) == [*["LowRankLinear"] * 3, *["PivotedLinear"] * 5]
    assert model.get_submodule(Q_PROJ).order.dtype == torch.int32
    model.save_pretrained(tmp_path / "second")
    assert_same_tensors(load_file(tmp_path / "second" / "model.safetensors"), case.tensors)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_without_whole_groups_of_heads(tmp_path: Path, family: str) -> None:
    """One of two groups, with its query heads, is gone from every layer."""
    config = FAMILIES[family]()
    wide = 16 if family in ("mistral", "qwen3") else 8
    narrow = {"q": {"out": 2 * wide}, "k": {"out": wide}, "v": {"out": wide}, "o": {"in": 2 * wide}}
    rows = {f"model.layers.{i}.self_attn.{name}_proj": row for i in (0, 1) for name, row in narrow.items()}
    case = make_case(tmp_path, config, rows)
    model = load(tmp_path)
    assert torch.equal(logits(model), logits(case.reference))
    assert_generates(model, case.reference)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(case.reference), atol=1e-5, rtol=1e-5)


def as_written_by_0_4(dense: dict[str, torch.Tensor], rows: Rows) -> dict[str, torch.Tensor]:
    """Random tensors of a compressed folder, as docs/formats.md has them; `dense` gets the matrices that they stand for."""
    stored = dict(dense)
    for path, row in rows.items():
        whole_OI, bias_O = torch.zeros_like(dense[f"{path}.weight"]), dense.get(f"{path}.bias")
        out, width = row.get("out", len(whole_OI)), row.get("in", whole_OI.shape[1])
        parts, w_oi = parts_and_matrix(row, out, width)
        if bias_O is not None or "bias" in row:
            parts["bias"] = torch.randn(out)
            dense[f"{path}.bias"] = nn.functional.pad(parts["bias"], (0, len(whole_OI) - out))
        whole_OI[:out, :width] = w_oi
        dense[f"{path}.weight"] = whole_OI
        stored |= {f"{path}.{name}": part for name, part in parts.items()}
    return stored


def parts_and_matrix(row: dict[str, int], out: int, width: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What lies on disk for a row, by the end of its name, and the matrix [out, width] that it is."""
    if "rank" in row:
        up_OR, down_RI = torch.randn(out, row["rank"]), torch.randn(row["rank"], width)
        return {"weight": up_OR, "down.weight": down_RI}, up_OR @ down_RI
    if "pivots" not in row:
        w_OI = torch.randn(out, width)
        return {"weight": w_OI}, w_OI
    base_RI, rest_NR = torch.randn(row["pivots"], width), torch.randn(out - row["pivots"], row["pivots"])
    parts, groups = {"weight": base_RI, "rest.weight": rest_NR}, row.get("groups", 1)
    runs = zip(base_RI.chunk(groups), (rest_NR @ base_RI).chunk(groups), strict=True)
    z_OI = torch.cat([part for run in runs for part in run])
    if "groups" in row:
        return parts, z_OI
    order_O = torch.randperm(out, dtype=torch.int32)
    return {**parts, "order": order_O}, torch.stack([z_OI[source] for source in order_O.tolist()])


@pytest.mark.parametrize(("version", "rows"), [(1, MIXED), (2, MIXED), (2, all_kinds(8))], ids=["1", "2", "2-kinds"])
def test_folders_of_version_0_4_load_the_same(tmp_path: Path, version: int, rows: Rows) -> None:
    """Against dense matrices in a native model, so that no module of the loader is on both sides."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["qwen2-tied"]()).eval()
    model.save_pretrained(tmp_path)
    dense = load_file(tmp_path / "model.safetensors")
    stored = as_written_by_0_4(dense, rows)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path, quantization_config=TABLE | {"format_version": version, "modules": rows})
    for name, tensor in dense.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor))
    model.tie_weights()
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    assert {path: form_of(loaded.get_submodule(path)).own for path in rows} == {
        path: {key: row[key] for key in ("rank", "pivots", "groups") if key in row} for path, row in rows.items()
    }


def test_reads_version_1_and_writes_version_2(tmp_path: Path) -> None:
    case = make_case(tmp_path / "first", FAMILIES["llama"](), MIXED)
    edit_config(tmp_path / "first", quantization_config=TABLE | {"format_version": 1, "modules": MIXED})
    model = load(tmp_path / "first")
    assert torch.equal(logits(model), logits(case.reference))
    model.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]["format_version"] == 2


def test_an_order_that_is_no_permutation_raises(kinds: Case, tmp_path: Path) -> None:
    shutil.copytree(kinds.folder, tmp_path / "bad")
    tensors = dict(kinds.tensors)
    tensors[f"{Q_PROJ}.order"] = torch.zeros(32, dtype=torch.int32)
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"'{Q_PROJ}': seen an order .* no permutation"):
        load(tmp_path / "bad")


@pytest.mark.parametrize("rows", [{}, {path: row for path, row in MIXED.items() if "mlp" in path}], ids=["none", "mlp"])
def test_tables_without_factors(tmp_path: Path, rows: Rows) -> None:
    case = make_case(tmp_path / "first", FAMILIES["llama"](), rows)
    model = load(tmp_path / "first")
    assert torch.equal(logits(model), logits(case.reference))
    model.save_pretrained(tmp_path / "second")
    assert_same_tensors(load_file(tmp_path / "second" / "model.safetensors"), case.tensors)


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", "auto"), ("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("rows", [MIXED, all_kinds(8)], ids=["mixed", "kinds"])
def test_dtypes(tmp_path: Path, stored: str, asked: str, rows: Rows) -> None:
    case = make_case(tmp_path, FAMILIES["qwen2-tied"](), rows, getattr(torch, stored))
    wanted = stored if asked == "auto" else asked
    reference = case.reference.to(getattr(torch, wanted))
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config)  # stays float32 when loaded
    model = load(tmp_path, dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, wanted)}
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(case: Case, device_map: Any) -> None:
    assert torch.equal(logits(load(case.folder, device_map=device_map)), logits(case.reference))


def test_offload_to_disk(case: Case, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
                  "model.norm": "cpu", "model.rotary_emb": "cpu"}  # fmt: skip
    model = load(case.folder, device_map=device_map, offload_folder=tmp_path / "offload")
    q_proj = model.get_submodule(Q_PROJ)
    assert q_proj.get_submodule(q_proj.carrier).weight.device.type == "meta"
    assert torch.equal(logits(model), logits(case.reference))
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(load_file(tmp_path / "saved" / "model.safetensors"), case.tensors)


def test_layer_1_is_not_layer_11(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 12})
    rows: Rows = {f"model.layers.{i}.self_attn.q_proj": {"rank": 4 + i} for i in (1, 10)}
    rows |= {"model.layers.11.self_attn.k_proj": {"rank": 3}}
    case = make_case(tmp_path / "first", config, rows)
    model = load(tmp_path / "first")
    assert torch.equal(logits(model), logits(case.reference))
    for renaming in model.hf_quantizer.get_weight_conversions():
        for name in ("model.layers.11.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            assert renaming.rename_source_key(name)[0] == name
    model.save_pretrained(tmp_path / "second")
    assert_same_tensors(load_file(tmp_path / "second" / "model.safetensors"), case.tensors)


def test_bare_decoder_and_back(case: Case, tmp_path: Path) -> None:
    decoder = AutoModel.from_pretrained(case.folder)
    with torch.no_grad():
        hidden_BLD, wanted_BLD = (m(TOKENS_BL).last_hidden_state for m in (decoder, case.reference.model))
    assert torch.equal(hidden_BLD, wanted_BLD)
    decoder.save_pretrained(tmp_path)
    wanted = {name.removeprefix("model."): tensor for name, tensor in case.tensors.items()}
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), wanted)
    for model in (load(tmp_path).model, AutoModel.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert torch.equal(model(TOKENS_BL).last_hidden_state, wanted_BLD)


@pytest.mark.parametrize("shard", [None, "10KB"])
def test_save_pretrained_round_trip(case: Case, tmp_path: Path, shard: str | None) -> None:
    load(case.folder).save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 3) is bool(shard)
    assert_same_tensors({name: t for path in shards for name, t in load_file(path).items()}, case.tensors)
    config, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path, case.folder))
    assert config["quantization_config"] == original["quantization_config"]
    assert "auto_map" not in config
    assert not list(tmp_path.glob("*.py"))
    assert torch.equal(logits(load(tmp_path)), logits(case.reference))


def test_names_on_disk_do_not_hang_on_what_transformers_remembers(case: Case, tmp_path: Path) -> None:
    model = load(case.folder)
    model._weight_conversions = []  # as after `load_adapter`, which keeps those that the adapter needed
    model.save_pretrained(tmp_path)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), case.tensors)


def test_generates_with_its_cache(case: Case) -> None:
    assert_generates(load(case.folder), case.reference)


def assert_generates(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """What the reference gives without any cache."""
    wanted_BL = TOKENS_BL
    for _ in range(6):
        with torch.no_grad():
            wanted_BL = torch.cat([wanted_BL, reference(wanted_BL).logits[:, -1:].argmax(-1)], dim=1)
    for cache in ("dynamic", "static"):
        found_BL = model.generate(
            TOKENS_BL, attention_mask=torch.ones_like(TOKENS_BL), max_new_tokens=6, do_sample=False,
            cache_implementation=cache, disable_compile=True,
        )  # fmt: skip
        assert torch.equal(found_BL, wanted_BL), cache


def test_whole_model_may_be_trained_by_trainer(case: Case) -> None:
    model = load(case.folder)
    validate_quantization_for_training(model)  # raises where the quantizer does not allow it
    assert model.hf_quantizer.is_qat_trainable


def test_saved_file_goes_through_load_state_dict(case: Case) -> None:
    model = load(case.folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(load_file(case.folder / "model.safetensors"), strict=False)  # as Trainer does to resume
    assert torch.equal(logits(model), logits(case.reference))


def test_dequantize_keeps_an_added_bias(kinds: Case, caplog: pytest.LogCaptureFixture) -> None:
    model = load(kinds.folder)
    model.dequantize()
    assert not any(isinstance(module, StoredLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(kinds.reference), atol=1e-4, rtol=1e-4)
    assert "4 more have a bias that a saved native model leaves out" in caplog.text


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_dequantize_gives_a_plain_dense_model(tmp_path: Path, dtype: torch.dtype, atol: float) -> None:
    case = make_case(tmp_path / "small", FAMILIES["qwen2-tied"](), MIXED, dtype)
    model = load(tmp_path / "small")
    model.save_pretrained(tmp_path / "again")  # turns config.dtype into a string
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(logits(model), logits(case.reference), atol=atol, rtol=0)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense, info = load(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any(isinstance(module, LowRankLinear) for module in dense.modules())
    assert torch.equal(logits(dense), logits(model))


def test_dequantize_to_another_dtype(tmp_path: Path) -> None:
    make_case(tmp_path, FAMILIES["qwen2-tied"](), MIXED, torch.bfloat16)
    model = load(tmp_path)
    wide = load(tmp_path, dtype=torch.float32)
    model.dequantize(dtype=torch.float32)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(wide), atol=1e-5, rtol=1e-5)


def test_compiles_in_one_graph(case: Case) -> None:
    model = load(case.folder)
    assert model.hf_quantizer.is_compileable
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(case.reference), atol=1e-5, rtol=1e-5)


def test_exports_in_one_graph(kinds: Case) -> None:
    module = load(kinds.folder).model.layers[0].self_attn
    for part in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
        x_BLI = torch.randn(2, 3, part.in_features)
        program = torch.export.export(part, (x_BLI,))
        torch.testing.assert_close(program.module()(x_BLI), part(x_BLI))


def test_loaded_config_can_be_used_again(case: Case) -> None:
    config = AutoConfig.from_pretrained(case.folder)
    for _ in range(2):
        assert torch.equal(logits(load(case.folder, config=config)), logits(case.reference))


TABLE: dict[str, Any] = {"quant_method": "streamlap", "format_version": 2, "modules": ATTENTION}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 3}, r"format_version: seen 3; wanted one of \(1, 2\).*[Uu]pdate"),
        ({"format_version": 3, "modules": [], "new": 1}, "format_version: seen 3"),
        ({"format_version": "1"}, "format_version: seen '1'"),
        ({"format_version": True}, "format_version: seen True"),
        ({"format_version": None}, "format_version: seen None"),
        ({"module": {}}, r"seen module; wanted"),
        ({"modules": None}, "modules: seen None; wanted a table"),
        ({"modules": ["a"]}, r"modules: seen \['a'\]; wanted a table"),
        ({"modules": {Q_PROJ: 7}}, rf"modules\['{Q_PROJ}'\]: seen 7"),
        ({"modules": {".*q_proj": {"rank": 7}}}, r"'\.\*q_proj'.*no such module"),
        ({"modules": {Q_PROJ: {}}}, f"'{Q_PROJ}'.*seen {{}}; wanted at most one of 'rank'"),
        ({"modules": {Q_PROJ: {"rank": "7"}}}, f"'{Q_PROJ}'.*rank = '7'; wanted an integer"),
        ({"modules": {Q_PROJ: {"rank": None}}}, f"'{Q_PROJ}'.*rank = None; wanted an integer 1..31"),
        ({"modules": {Q_PROJ: {"out_heads": 2, "head_dim": 5}}}, f"'{Q_PROJ}'.*seen {{'head_dim': 5, 'out_heads': 2}}"),
        ({"modules": {Q_PROJ: {"pivots": 32}}}, f"'{Q_PROJ}'.*pivots = 32; wanted an integer 1..31"),
        ({"modules": {Q_PROJ: {"rank": 32}}}, f"'{Q_PROJ}'.*rank = 32; wanted an integer 1..31"),
        ({"modules": {"model.layers.2.self_attn.q_proj": {"rank": 7}}}, "'model.layers.2.self_attn.q_proj'.*no such"),
        ({"modules": {"model.norm": {"rank": 7}}}, "'model.norm'.*RMSNorm"),
    ],
)
def test_malformed_tables_raise(mixed: Case, changes: dict[str, Any], words: str) -> None:
    config = AutoConfig.from_pretrained(mixed.folder)
    config.quantization_config = TABLE | changes
    with pytest.raises(ValueError, match=words):
        load(mixed.folder, config=config)


def test_table_that_contradicts_the_tensors_raises(mixed: Case) -> None:
    config = AutoConfig.from_pretrained(mixed.folder)
    config.quantization_config = copy.deepcopy(TABLE | {"modules": MIXED | {Q_PROJ: {"rank": 8}}})
    with pytest.raises((RuntimeError, ValueError), match=r"mismatched|seen a tensor of shape \(7, 32\)"):
        load(mixed.folder, config=config)


def test_checks_what_older_transformers_let_pass(mixed: Case) -> None:
    model = load(mixed.folder)
    q_proj = model.get_submodule(Q_PROJ)
    q_proj.up.double()
    model.hf_quantizer.postprocess_model(model)
    assert q_proj.up.weight.dtype == torch.float32
    q_proj.down.weight = nn.Parameter(torch.zeros(8, 32))
    with pytest.raises(ValueError, match=rf"'{Q_PROJ}': seen a tensor of shape \(8, 32\).*wanted \(7, 32\)"):
        model.hf_quantizer.postprocess_model(model)


def test_does_not_compress_on_the_fly(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(tmp_path)
    table = hf_plugin.StreamlapConfig(modules=ATTENTION, format_version=2)
    with pytest.raises(ValueError, match="streamlap does require the model to be pre-quantized"):
        load(tmp_path, quantization_config=table)


def test_shim_is_the_packages_own_files(tmp_path: Path) -> None:
    old_mask = os.umask(0o027)
    try:
        auto_map = write_shim(tmp_path)
    finally:
        os.umask(old_mask)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SHIM_FILES)
    for name in SHIM_FILES:
        assert (tmp_path / name).read_bytes() == (REPOSITORY / "streamlap" / "loader" / name).read_bytes()
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
        assert "import streamlap" not in (tmp_path / name).read_text()
        needed = set(dynamic_module_utils.get_imports(tmp_path / name)) - set(sys.stdlib_module_names)
        assert needed <= {"torch", "transformers"}, "or transformers opens the folder only where these are installed"
    # Older transformers copy what the first file imports, and not what these import.
    first, *others = SHIM_FILES
    assert {f"{name}.py" for name in dynamic_module_utils.get_relative_imports(tmp_path / first)} == set(others)
    for auto_class, reference in auto_map.items():
        file, name = reference.split(".")
        assert hasattr(AutoModelForCausalLM if "Model" in auto_class else AutoConfig, "from_pretrained")
        assert f"class {name}:" in (tmp_path / f"{file}.py").read_text()


def test_shim_and_package_in_one_process(mixed: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = load(mixed.folder, trust_remote_code=True)
    assert any(name.endswith(".hf_plugin") and name.startswith("transformers_modules") for name in sys.modules)
    assert type(model.hf_quantizer) is hf_plugin.StreamlapQuantizer
    assert torch.equal(logits(model), logits(mixed.reference))
    assert not type(model).is_remote_code()
    assert type(model.config)._auto_class is None


WITHOUT_STREAMLAP = """
import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

out, mixed, *refused = sys.argv[1:]
tokens_BL = torch.arange(24).reshape(2, 12) * 7 % 96
seen = {}
for folder in (mixed, *refused):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        seen[folder] = f"{type(error).__name__}: {error}"
config = AutoConfig.from_pretrained(mixed, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(mixed, trust_remote_code=True)
seen["types"] = [f"{type(x).__module__}.{type(x).__name__}" for x in (config, model)]
with torch.no_grad():
    torch.save(model(tokens_BL).logits, out + "/logits.pt")
mask_BL = torch.ones_like(tokens_BL)
torch.save(model.generate(tokens_BL, attention_mask=mask_BL, max_new_tokens=4, do_sample=False), out + "/generated.pt")
model.save_pretrained(out + "/saved")
kinds = AutoModelForCausalLM.from_pretrained(refused[-1], trust_remote_code=True)
with torch.no_grad():
    torch.save(kinds(tokens_BL).logits, out + "/kinds.pt")
empty = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
seen["from_config"] = type(empty).__name__
seen["streamlap"] = [name for name in sys.modules if name.split(".")[0] == "streamlap"]
print(json.dumps(seen))
"""


class Outside(NamedTuple):
    """What a process without streamlap saw."""

    seen: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def outside(mixed: Case, kinds: Case, tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """One process, -I and a blocked import, first without any help and then with trust_remote_code."""
    folder = tmp_path_factory.mktemp("outside")
    for name, rows in {"attention": ATTENTION, **SINGLE}.items():
        make_case(folder / name, FAMILIES["qwen2-tied"](), rows)
    refused = [folder / "attention", *(folder / name for name in SINGLE), kinds.folder]
    printed = run_outside(WITHOUT_STREAMLAP, folder, folder, mixed.folder, *refused, timeout=300)
    return Outside(json.loads(printed.splitlines()[-1]), folder)


@pytest.mark.parametrize("which", ["attention", *SINGLE])
def test_without_loader_or_shim_it_raises(outside: Outside, which: str) -> None:
    found = outside.seen[str(outside.folder / which)]
    assert found.startswith("RuntimeError")
    assert "mismatched" in found


def test_without_loader_or_shim_mixtures_raise(outside: Outside, case: Case) -> None:
    assert "mismatched" in outside.seen[str(case.folder)]


def test_shim_loads_every_kind(outside: Outside, kinds: Case) -> None:
    assert torch.equal(torch.load(outside.folder / "kinds.pt"), logits(kinds.reference))


def test_shim_loads_where_streamlap_is_not(outside: Outside, mixed: Case) -> None:
    assert outside.seen["streamlap"] == []
    assert outside.seen["types"] == [
        f"{type(x).__module__}.{type(x).__name__}" for x in (mixed.reference.config, mixed.reference)
    ]
    assert torch.equal(torch.load(outside.folder / "logits.pt"), logits(mixed.reference))
    wanted = mixed.reference.generate(
        TOKENS_BL, attention_mask=torch.ones_like(TOKENS_BL), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(torch.load(outside.folder / "generated.pt"), wanted)
    assert torch.equal(logits(load(outside.folder / "saved")), logits(mixed.reference))
    assert outside.seen["from_config"] == "Qwen2ForCausalLM"


TENSOR_PARALLEL = """
import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import streamlap.loader.hf_plugin

folder, out = sys.argv[1:]
torch.distributed.init_process_group("gloo")
tokens_BL = torch.arange(24).reshape(2, 12) * 7 % 96
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
attention = model.model.layers[0].self_attn
split = attention.v_proj.up
assert split.weight.to_local().shape[0] * 2 == split.weight.shape[0]
result = model(tokens_BL, labels=tokens_BL)
result.loss.backward()
whole = {name: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for name, p in model.named_parameters()}
if torch.distributed.get_rank() == 0:
    torch.save({"logits": getattr(result.logits, "full_tensor", lambda: result.logits)().detach(), "grads": whole}, out)
torch.distributed.destroy_process_group()
"""


def test_tensor_parallel_is_refused_where_a_pivoted_output_would_be_split(kinds: Case) -> None:
    model = load(kinds.folder)
    plan = {"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"}
    model.hf_quantizer.update_parallel_plan(model, plan)
    assert [key for key in plan if "o_proj." in key] == [
        f"model.layers.*.self_attn.o_proj.{p}" for p in ("down", "base")
    ]
    model.config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match=rf"'{Q_PROJ}': seen {{'pivots': 7}} under .* 'colwise'"):
        model.hf_quantizer.update_parallel_plan(model, plan)


SPLIT: Rows = {
    "model.layers.0.self_attn.v_proj": {"rank": 5},
    "model.layers.0.self_attn.o_proj": {"rank": 6, "bias": 1},
    "model.layers.0.mlp.down_proj": {"pivots": 7, "bias": 1},
    "model.layers.1.self_attn.o_proj": {"pivots": 9},
    "model.layers.1.mlp.up_proj": {"bias": 1},
    "model.layers.1.mlp.down_proj": {"pivots": 8, "groups": 2},
}


@pytest.mark.nightly
@pytest.mark.parametrize("rows", [MIXED, SPLIT], ids=["mixed", "split"])
def test_tensor_parallel_gives_the_same_logits_and_gradients(tmp_path: Path, rows: Rows) -> None:
    """Two processes. Both layers are under one plan and have other kinds at the same path; widths 33 and 20 split unevenly."""
    case = make_case(tmp_path / "model", FAMILIES["qwen2-tied"](), rows)
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, case.folder, "found.pt"], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    model = load(case.folder)
    result = model(TOKENS_BL, labels=TOKENS_BL)
    result.loss.backward()
    torch.testing.assert_close(found["logits"], result.logits.detach(), atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found["grads"][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
