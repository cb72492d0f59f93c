"""Code that lies in a model folder runs only where the user said so, the tokenizer's alone; templates are never rendered."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from conftest import TEXT, MakeModel
from transformers import AutoTokenizer

import streamlap
from streamlap import cli
from streamlap.data.tokenizer import Encoder
from streamlap.errors import CheckpointError, RecipeError

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
SMALL = ("--samples", "4", "--length", "16")

Change = Callable[..., None]


def tokenise(text: str, folder: Path, of: Path, trust_remote_code: bool = False) -> torch.Tensor:
    return torch.from_numpy(Encoder(folder, of, trust_remote_code).ids(text, of))


def change(path: Path, **fields: Any) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(table | fields))


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers puts the code that it is about to run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def loaded(pico: MakeModel, tmp_path: Path) -> Path:
    """A model whose config and tokenizer point at files that leave a mark when they are imported."""
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "loaded"))
    for name in ("config_code", "tokenizer_code"):
        (folder / f"{name}.py").write_text(CODE.format(marker=str(tmp_path / f"{name} ran")))
    change(
        folder / "config.json",
        auto_map={"AutoConfig": "config_code.Config", "AutoModelForCausalLM": "config_code.Model",
                  "AutoTokenizer": ["tokenizer_code.Tokenizer", None]},
    )  # fmt: skip
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenizer_code.Tokenizer", None]})
    return folder


def marks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.glob("* ran"))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["streamlap", *map(str, words)])
        patch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
        with pytest.raises(SystemExit) as stop:
            cli.main()
    code = stop.value.code
    return code if isinstance(code, int) else 0, capsys.readouterr().err


COMMANDS = {
    "compress": ("compress", "{model}", "{tmp}/out", "--calibration", "{text}", *SMALL),
    "plan": ("plan", "{model}", "--calibration", "{text}", *SMALL),
    "survey": ("survey", "{model}", "{tmp}/s.json", "--calibration", "{text}", *SMALL),
    "eval": ("eval", "{model}", "--text", "{text}", "--length", "16", "--limit", "64"),
    "inspect": ("inspect", "{model}"),
    "verify": ("verify", "{model}"),
    "export": ("export", "{model}", "{tmp}/dense", "--to", "dense"),
}


def words_of(command: str, model: Path, text: Path, tmp_path: Path) -> list[str]:
    return [word.format(model=model, text=text, tmp=tmp_path) for word in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_of_the_folder(
    loaded: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code, err = run(capsys, *words_of(command, loaded, text, tmp_path))
    assert code == (3 if command == "export" else 0), err  # not compressed, so nothing to export
    assert marks(loaded) == []


def test_a_compressed_folder_with_code_is_exported_without_it(loaded: Path, tokens: Path, tmp_path: Path) -> None:
    streamlap.compress(loaded, tmp_path / "out", files=(str(tokens),))
    streamlap.export_dense(tmp_path / "out", tmp_path / "dense")
    streamlap.load(tmp_path / "out")
    assert marks(loaded) == []
    assert not list((tmp_path / "dense").glob("*.py"))


@pytest.mark.parametrize("command", ["compress", "plan", "survey", "eval"])
def test_a_tokenizer_that_is_code_needs_the_flag(
    loaded: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    change(loaded / "tokenizer_config.json", tokenizer_class="Tokenizer")
    words = words_of(command, loaded, text, tmp_path)
    code, err = run(capsys, *words)
    assert code == RecipeError.exit_code
    for word in ("a 'Tokenizer'", "tokenizer_code.Tokenizer", "--trust-remote-code", ".npy"):
        assert word in err
    assert err.count("\n") == 1
    assert marks(loaded) == []
    code, err = run(capsys, *words, "--trust-remote-code")
    assert code == 0, err
    assert marks(loaded) == ["tokenizer_code ran"]


def test_the_tokenizer_of_code_gives_the_ids(loaded: Path, tmp_path: Path) -> None:
    native = tokenise(TEXT, loaded, tmp_path)
    assert marks(loaded) == []
    assert torch.equal(tokenise(TEXT, loaded, tmp_path, trust_remote_code=True), native)
    assert marks(loaded) == ["tokenizer_code ran"]


def test_code_of_another_repository_is_not_fetched(loaded: Path, tmp_path: Path) -> None:
    change(loaded / "tokenizer_config.json", auto_map={"AutoTokenizer": ["org/other--code.Tokenizer", None]})
    with pytest.raises(CheckpointError, match="org/other--code"):
        tokenise(TEXT, loaded, tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokenizer_class": ["x"]}, "transformers has no tokenizer of that name.*npy"),
        ({"tokenizer_class": "pipeline"}, "transformers has no tokenizer"),
        ({"tokenizer_class": "LlamaForCausalLM"}, "transformers has no tokenizer"),
        ({"fast_tokenizer_files": ["../tokenizer.5.0.0.json"]}, "fast_tokenizer_files .*inside"),
        ({"gguf_file": "/etc/passwd"}, "gguf_file '/etc/passwd'"),
        ({"vocab": "/etc/passwd"}, "vocab '/etc/passwd'; wanted none, the files are those of"),
        ({"vocab": "passwd"}, "vocab 'passwd'; wanted none"),
        ({"merges": "/dev/zero"}, "merges '/dev/zero'; wanted none"),
        ({"sp_model_kwargs": {"model_file": "/etc/passwd"}}, "model_file '/etc/passwd'; wanted none"),
        ({"a": [{"monolingual_vocab_file": "x"}]}, "monolingual_vocab_file 'x'; wanted none"),
        ({"init_inputs": ["/etc/passwd"]}, "init_inputs .* wanted settings by name"),
    ],
)
def test_tokenizer_settings_that_lead_elsewhere(
    pico: MakeModel, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    change(folder / "tokenizer_config.json", **fields)
    with pytest.raises((RecipeError, CheckpointError), match=words) as caught:
        tokenise(TEXT, folder, tmp_path)
    assert len(str(caught.value)) < 1000


def test_special_tokens_lead_nowhere_either(pico: MakeModel, tmp_path: Path) -> None:
    """transformers merges that file into the settings."""
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"vocab": "/etc/passwd"}))
    with pytest.raises(CheckpointError, match=r"special_tokens_map.json has vocab '/etc/passwd'; wanted none"):
        tokenise(TEXT, folder, tmp_path)


def test_labels_that_old_versions_left_are_not_opened(pico: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    wanted = tokenise(TEXT, folder, tmp_path)
    elsewhere = {key: f"/nowhere/{key}.json" for key in ("name_or_path", "special_tokens_map_file", "tokenizer_file")}
    change(folder / "tokenizer_config.json", **elsewhere)
    assert torch.equal(tokenise(TEXT, folder, tmp_path), wanted)


LEFT_OVER = {
    "cache_dir": "", "vocab_file": "tokenizer.model", "merges_file": "merges.txt", "tokenizer_file": "tokenizer.json",
    "chat_template_path": "chat.jinja", "added_tokens_file": "added_tokens.json", "sp_model_path": "tokenizer.model",
    "output_dir": "", "spm_file": "spiece.model",
}  # fmt: skip
"""Key -> a file in the folder outside."""

OPENED: list[str] = []


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """Every file that the process opens from now on."""
    if not OPENED:
        sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)
    return OPENED


@pytest.fixture
def outside(pico: MakeModel, tmp_path: Path) -> Path:
    """A folder of a stranger's files, of every name, whose tokenizer gives other ids."""
    folder = tmp_path / "outside"
    folder.mkdir()
    table = json.loads((pico("llama", tokenizer=True) / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    table["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(table))
    for name in {*LEFT_OVER.values()} - {"", "tokenizer.json"}:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    "tokenizer_class", [None, "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer"]
)
@pytest.mark.parametrize("key", LEFT_OVER)
def test_a_path_of_another_place_is_not_heeded(
    pico: MakeModel, tmp_path: Path, outside: Path, opened: list[str], caplog: pytest.LogCaptureFixture,
    tokenizer_class: str | None, key: str,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    change(folder / "tokenizer_config.json", **({"tokenizer_class": tokenizer_class} if tokenizer_class else {}))
    wanted = tokenise(TEXT, folder, tmp_path)
    change(folder / "tokenizer_config.json", **{key: str(outside / LEFT_OVER[key])})
    before, _ = (folder / "tokenizer_config.json").read_bytes(), opened.clear()
    for _ in range(2):
        assert torch.equal(tokenise(TEXT, folder, tmp_path), wanted)
    assert not [path for path in opened if "outside" in Path(path).parts]
    notes = [note for note in caplog.messages if "ignored" in note]
    assert len(notes) == 1
    assert f"tokenizer_config.json has {key}, of the machine that wrote it" in notes[0]
    assert (folder / "tokenizer_config.json").read_bytes() == before


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer", "Qwen2Tokenizer", "BertTokenizer"])
@pytest.mark.parametrize("key", LEFT_OVER)
def test_a_path_of_another_place_is_no_tokenizer(
    pico: MakeModel, tmp_path: Path, outside: Path, opened: list[str], tokenizer_class: str | None, key: str
) -> None:
    """Where the folder has no tokens of its own."""
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {key: str(outside / LEFT_OVER[key])}))
    opened.clear()
    with pytest.raises(RecipeError, match="has no tokenizer that loads"):
        tokenise(TEXT, folder, tmp_path)
    assert not [path for path in opened if "outside" in Path(path).parts]


def test_transformers_is_given_no_path_of_another_place(
    pico: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a version of it would open: it never sees them, and all else as it was."""
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    before = json.loads((folder / "tokenizer_config.json").read_text())
    change(folder / "tokenizer_config.json", **{key: f"/x/{name}" for key, name in LEFT_OVER.items()})
    seen: list[tuple[dict[str, Any], set[str]]] = []
    load = AutoTokenizer.from_pretrained

    def look(place: Path, **options: Any) -> Any:
        seen.append(
            (json.loads((place / "tokenizer_config.json").read_text()), {path.name for path in place.iterdir()})
        )
        return load(place, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", look)
    tokenise(TEXT, folder, tmp_path)
    assert seen == [(before, {path.name for path in folder.iterdir()})]


def test_the_settings_with_a_path_are_carried_over_as_they_are(pico: MakeModel, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    change(folder / "tokenizer_config.json", cache_dir="/workspace/.cache")
    streamlap.compress(folder, tmp_path / "out", files=(str(text),), samples=4, length=16)
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()


MISSING = {
    "tokenizer.model": (b"\n\x0e\n\x05<unk>\x15", ["sentencepiece", "protobuf"]),
    "tokenizer.model.v3": (b"\n\x0e\n\x05<unk>\x15", ["protobuf"]),
    "sentencepiece.bpe.model": (b"\n\x0e\n\x05<unk>\x15", ["sentencepiece"]),
    "tiktoken.model": (b"IQ== 0\nIg== 1\n", ["tiktoken"]),
    "qwen.tiktoken": (b"IQ== 0\nIg== 1\n", ["tiktoken"]),
}


@pytest.mark.parametrize("name", MISSING)
def test_the_package_that_is_missing_is_that_of_the_file(
    pico: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    raw, packages = MISSING[name]
    for package in ("sentencepiece", "protobuf", "tiktoken"):
        there = package not in packages
        monkeypatch.setattr(f"streamlap.data.tokenizer.is_{package}_available", lambda there=there: there)
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    (folder / name).write_bytes(raw)
    words = rf"{name} needs {' and '.join(packages)}, not installed here; .* pip install {' '.join(packages)}, or"
    with pytest.raises(RecipeError, match=words):
        tokenise(TEXT, folder, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": {"": "evil/kernel"}},
        {"experts_implementation": "a/b"},
    ],
)
def test_loading_fetches_no_kernel_of_a_configs_choice(pico: MakeModel, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    change(folder / "config.json", **config)
    with pytest.raises(CheckpointError, match=r"_implementation .*, code on a hub; wanted none"):
        streamlap.load(folder)


def test_an_adapter_is_no_model(pico: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    with pytest.raises(CheckpointError, match=r"has an adapter_config.json; wanted a model alone"):
        streamlap.load(folder)


@pytest.mark.parametrize("raw", [b"[" * 99_999, b"\xff", b'{"a":1,"a":2}', b"[]"])
def test_tokenizer_settings_that_are_no_object(pico: MakeModel, tmp_path: Path, raw: bytes) -> None:
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    (folder / "tokenizer_config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        tokenise(TEXT, folder, tmp_path)


@pytest.mark.parametrize("name", ["LLaMATokenizer", "Ernie4_5_Tokenizer", "os.system", "", "x" * 10**6])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_name_that_is_none_of_transformers_leaves_tokenizer_json(
    pico: MakeModel, tmp_path: Path, name: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers; without that file there is nothing to read."""
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    wanted = tokenise(TEXT, folder, tmp_path)
    change(folder / file, tokenizer_class=name)
    assert AutoTokenizer.from_pretrained(folder)("a b")["input_ids"]
    assert torch.equal(tokenise(TEXT, folder, tmp_path), wanted)
    assert "transformers has none of that name: it takes tokenizer.json" in caplog.text
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"transformers has no tokenizer of that name.*npy") as caught:
        tokenise(TEXT, folder, tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_folder_without_tokens_is_said_to_have_none(pico: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"no tokenizer that loads: no tokenizer\.json, and no other file of tokens"):
        tokenise(TEXT, folder, tmp_path)


def test_config_may_not_name_a_model_as_its_tokenizer(pico: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    change(folder / "config.json", tokenizer_class="AutoModel")
    with pytest.raises(RecipeError, match="'AutoModel': transformers has no tokenizer"):
        tokenise(TEXT, folder, tmp_path)


BROKEN = {"no JSON": "{", "empty object": "{}", "no model": '{"model": {"type": "None"}}', "a list": "[]"}


@pytest.mark.parametrize("case", BROKEN)
def test_a_tokenizer_that_is_broken(pico: MakeModel, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    (folder / "tokenizer.json").write_text(BROKEN[case])
    with pytest.raises(RecipeError, match=r"no tokenizer that loads.*\.npy"):
        tokenise(TEXT, folder, tmp_path)


class PanicException(BaseException):
    """What a panic in the tokenizers library looks like in Python."""


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (PanicException("\x1b oh"), RecipeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(), SystemExit),
    ],
)
def test_a_panic_is_an_error_and_an_interrupt_is_none(
    pico: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, seen: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(seen):
        tokenise(TEXT, pico("llama", tokenizer=True), tmp_path)


def test_a_chat_template_is_carried_over_and_never_rendered(
    pico: MakeModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "model"))
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "x ran") + "') }}"
    (folder / "chat_template.jinja").write_text(template)
    change(folder / "tokenizer_config.json", chat_template=template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text(template)

    def fail(*_: object, **__: object) -> None:
        pytest.fail("a template was compiled")

    for name in ("compile", "parse", "from_string"):
        monkeypatch.setattr(jinja2.Environment, name, fail)
    monkeypatch.setattr(jinja2.Template, "render", fail)
    out = tmp_path / "out"
    streamlap.compress(folder, out, files=(str(text),), samples=4, length=16)
    streamlap.evaluate(out, text, length=16, limit=64)
    for name in ("chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/tool.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert marks(folder) == []
