"""Hub ids, against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TEXT, MakeModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

import streamlap
from streamlap.errors import CheckpointError
from streamlap.store.hub import READ_AHEAD, header_source, local_folder, model_name
from streamlap.store.source import SafetensorsFolder, TensorSource
from streamlap.untrusted.paths import check_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository, `org/pico`, model and data set alike, from `folder`: its file list and its files, whole or by range.

    It has one commit, under the revisions `main` and `v1`.
    """

    folder: Path
    asked: list[str]
    sent: dict[str, list[tuple[int, int]]]
    """Status and bytes of each answer, by file name."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        name = self.path.split(f"/org/pico/resolve/{COMMIT}/")[-1]
        headers, status = {"X-Repo-Commit": COMMIT}, 200
        revision = self.path.partition("/revision/")[2].partition("?")[0]
        if "/tree/" in self.path:
            rows = [{"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0"}
                    for name in self.names()]  # fmt: skip
            data = json.dumps(rows).encode()
        elif revision not in ("", "main", "v1", COMMIT):
            self.refuse("RevisionNotFound")
            return
        elif self.path.startswith(("/api/models/org/pico", "/api/datasets/org/pico")):
            siblings = [{"rfilename": name} for name in self.names()]
            data = json.dumps({"id": "org/pico", "sha": COMMIT, "siblings": siblings}).encode()
            headers["Content-Type"] = "application/json"
        elif (self.folder / name).is_file():
            data = (self.folder / name).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            if wanted := self.headers["Range"]:
                first, last = (int(end) for end in wanted.removeprefix("bytes=").split("-"))
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                data, status = data[first : last + 1], 206
        else:
            self.refuse("RepoNotFound")
            return
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.sent.setdefault(name, []).append((status, len(data)))
            self.wfile.write(data)

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, type[Hub]]]:
    """Endpoint, and what has been asked of it."""
    handler = type("Served", (Hub,), {"folder": folder, "asked": [], "sent": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(pico: MakeModel, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    served = tmp_path / "served"
    served.mkdir()
    for path in pico("llama", tokenizer=True).iterdir():
        (served / path.name).write_bytes(path.read_bytes())
    (served / "part.txt").write_text(TEXT)
    (served / "pytorch_model.bin").write_bytes(b"pickle")
    (served / "modeling_evil.py").write_text("raise SystemExit('ran')")
    with serving(served) as (endpoint, handler):
        yield endpoint, handler.asked


def run(endpoint: str, home: Path, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, for huggingface_hub reads these variables once, when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    settings["HF_HUB_OFFLINE"] = str(int(offline))
    command = [sys.executable, *words]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)


def ask(endpoint: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(endpoint, home, "-m", "streamlap.cli", *words)


def test_a_hub_id_is_fetched_once_without_pickles_or_code(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    done = ask(endpoint, tmp_path / "home", "inspect", f"org/pico@{COMMIT}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "llama"
    assert any(path.endswith("model.safetensors") for path in asked)
    assert not [path for path in asked if path.endswith((".bin", ".py"))]


@pytest.mark.parametrize("trust", [False, True])
def test_code_is_fetched_with_the_flag_alone_and_pickles_never(monkeypatch: pytest.MonkeyPatch, trust: bool) -> None:
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.pkl", "tokenizer.py", "code.py", "x.bin",
             "consolidated.safetensors", "onnx/model.safetensors"]  # fmt: skip
    asked: dict[str, list[str]] = {}
    monkeypatch.setattr("streamlap.store.hub.snapshot_download", lambda name, **options: asked.update(options) or "x")
    local_folder("org/pico", trust)
    kept = filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == files[:3] + ["tokenizer.py", "code.py"] * trust


def test_a_hub_data_set_is_calibration_text(hub: tuple[str, list[str]], text: Path, tmp_path: Path) -> None:
    words = ("eval", "org/pico", "--length", "16", "--json", "--text")
    done = ask(hub[0], tmp_path / "home", *words, "org/pico")
    assert done.returncode == 0, done.stderr
    local = streamlap.evaluate(tmp_path / "served", text, length=16)
    assert json.loads(done.stdout)["nll"] == local.nll


def test_of_a_data_set_only_the_files_of_a_split_are_fetched(
    hub: tuple[str, list[str]], text: Path, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    (served / "part.txt").unlink()
    for split in ("train", "validation", "test"):
        (served / "data" / split).mkdir(parents=True)
        (served / "data" / split / "a.txt").write_text(split if split != "validation" else TEXT)
    home, words = tmp_path / "home", ("eval", "org/pico", "--length", "16", "--json", "--text")
    done = ask(hub[0], home, *words, "org/pico")
    assert done.returncode == 0, done.stderr
    assert "org/pico: its split validation is read, of " in done.stderr
    assert json.loads(done.stdout)["nll"] == streamlap.evaluate(served, text, length=16).nll
    assert [path.parent.name for path in (home / "hub").glob("datasets--*/snapshots/*/*/*/a.txt")] == ["validation"]
    named = ask(hub[0], home, *words, "org/pico@v1/data/validation/a.txt")
    assert json.loads(named.stdout)["nll"] == json.loads(done.stdout)["nll"]
    absent = ask(hub[0], home, *words, "org/pico:exam")
    assert absent.returncode == 2
    assert "has no split 'exam', but the splits test, train, validation" in absent.stderr
    offline = run(hub[0], home, "-m", "streamlap", *words, "org/pico:test", offline=True)
    assert offline.returncode == 2, "what is not in the cache is not left out"
    assert "data/test/a.txt of data set org/pico cannot be fetched" in offline.stderr


def test_an_unknown_hub_id_says_so(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    done = ask(hub[0], tmp_path / "home", "inspect", "org/absent")
    assert done.returncode == 3
    assert "org/absent" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_is_itself_and_has_a_public_name(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    assert model_name(str(tmp_path)) == tmp_path.name
    assert model_name("org/pico@main") == "org/pico@main"


@pytest.mark.parametrize("name", ["a/b/c", "../x", "no such folder"])
def test_what_is_neither_folder_nor_id_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="hub id"):
        local_folder(name)


def share(cache: Path) -> Path:
    """Put every file of a cache into the store that all repositories share, as the hub's library does."""
    store = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    for number, blob in enumerate(sorted(cache.glob("models--*/blobs/*"))):
        digest, size = f"{number + 171:064x}"[::-1], blob.stat().st_size
        assert store.publish_blob_to_shared_store(
            blob_path=str(blob), xet_hash=digest, cache_dir=cache, expected_size=size
        )
        assert blob.resolve() == store.shared_blob_path(cache, digest).resolve()
    return cache


@pytest.fixture
def shared(pico: MakeModel, tmp_path: Path) -> Path:
    """A cache with a model in it whose files are in that store."""
    repository = tmp_path / "hub" / "models--org--pico"
    for folder in (repository / "blobs", repository / "snapshots" / COMMIT):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(pico("llama", tokenizer=True).iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (repository / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number}")
    return share(repository.parent)


def snapshot_of(cache: Path) -> Path:
    (folder,) = cache.glob("models--org--pico/snapshots/*")
    return folder


def test_files_in_the_store_that_repositories_share_are_read(
    hub: tuple[str, list[str]], text: Path, tmp_path: Path
) -> None:
    """Fetched as they always are, and found in that store from then on; by every name that the cache may have."""
    fetched = run(hub[0], tmp_path / "home", "-c", "import huggingface_hub as hub; hub.snapshot_download('org/pico')")
    assert fetched.returncode == 0, fetched.stderr
    shared = share(tmp_path / "home" / "hub")
    words = ("eval", "org/pico", "--text", str(text), "--length", "16", "--limit", "64", "--json")
    done = run("http://127.0.0.1:9", tmp_path / "home", "-m", "streamlap", *words, offline=True)
    assert done.returncode == 0, done.stderr
    wanted = streamlap.evaluate(tmp_path / "served", text, length=16, limit=64).nll
    assert json.loads(done.stdout)["nll"] == wanted
    other = tmp_path / "other disk"
    shared.rename(other)
    shared.symlink_to(other)
    for folder in (snapshot_of(shared), snapshot_of(other)):
        assert streamlap.evaluate(folder, text, length=16, limit=64).nll == wanted
    (tmp_path / "link").symlink_to(snapshot_of(other))
    assert streamlap.verify(tmp_path / "link")["ok"]
    streamlap.compress(snapshot_of(shared), tmp_path / "out", files=(str(text),), samples=4, length=16)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("case", ["repository", "key", "store is a link", "prefix is a link", "name", "key by blob"])
def test_no_other_place_is_read_by_way_of_that_store(shared: Path, tmp_path: Path, case: str) -> None:
    snapshot, digest = snapshot_of(shared), "ab" + 62 * "0"
    (tmp_path / "key").write_text("secret")
    outside = {"repository": "models--other--m/blobs/1", "name": "blobs/ab/key", "key by blob": "../../key"}
    link, target = snapshot / "tokenizer.json", shared / outside.get(case, f"blobs/ab/{digest}")
    if case in outside:
        target.parent.mkdir(parents=True, exist_ok=True)
        if case != "key by blob":
            target.write_text("{}")
    elif case == "key":
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(tmp_path / "key")
    elif case == "store is a link":
        (shared / "blobs").rename(tmp_path / "blobs")
        (shared / "blobs").symlink_to(tmp_path / "blobs")
    else:
        (tmp_path / "ab").mkdir()
        (tmp_path / "ab" / digest).write_text("{}")
        (shared / "blobs" / "ab").symlink_to(tmp_path / "ab")
    if case != "store is a link":
        link.unlink()
        blob = shared / "models--org--pico" / "blobs" / "mine"
        blob.symlink_to(target)
        link.symlink_to("../../blobs/mine")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        check_folder(snapshot)


def test_a_download_into_a_folder_of_ones_own(hub: tuple[str, list[str]], text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    code = f"from huggingface_hub import snapshot_download; snapshot_download('org/pico', local_dir={str(folder)!r})"
    done = run(hub[0], tmp_path / "home", "-c", code)
    assert done.returncode == 0, done.stderr
    assert (folder / ".cache" / "huggingface").is_dir()
    streamlap.compress(folder, tmp_path / "out", files=(str(text),), samples=4, length=16)
    assert not (tmp_path / "out" / ".cache").exists()


def test_a_hub_id_of_another_kind_is_named(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    served = tmp_path / "served"
    for path in served.iterdir():
        path.unlink()
    (served / "model-q4.gguf").write_bytes(b"GGUF")
    for command in ("inspect", "plan"):
        done = ask(hub[0], tmp_path / "home", command, "org/pico")
        assert done.returncode == 3
        assert (
            "org/pico holds model-q4.gguf, a GGUF container; wanted a checkpoint in transformers' layout" in done.stderr
        )


def test_a_folder_has_no_revisions(pico: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pico("llama").parent)
    with pytest.raises(CheckpointError, match=r"is a folder here, and a folder has no revisions; wanted "):
        local_folder(f"{pico('llama').name}@main")


LIST_HEADERS = f"""
import json, sys
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]}
from test_hub import listed
from streamlap.errors import CheckpointError
from streamlap.store.hub import header_source

for model in sys.argv[1:]:
    try:
        folder, source = header_source(model)
        print(json.dumps(listed(source) | {{"folder": str(folder), "kind": type(source).__name__}}))
        source.read("lm_head.weight")
    except CheckpointError as error:
        print(json.dumps({{"error": str(error)}}))
"""


def listed(source: TensorSource) -> dict[str, object]:
    """All that a source tells without its weights, but for the folder."""
    infos = (source.info(name) for name in source.names())
    return {
        "headers": {shard: [header.file_bytes, header.digest] for shard, header in source.headers.items()},
        "infos": {i.name: [str(i.dtype), list(i.shape), i.path.name, i.begin, i.end] for i in infos},
    }


def open_headers(endpoint: str, home: Path, *models: str, offline: bool = False) -> list[dict[str, object]]:
    """For each model in turn what `header_source` tells of it, where it gives a source, and the error, where one is raised."""
    done = run(endpoint, home, "-c", LIST_HEADERS, *models, offline=offline)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def large(pico: MakeModel) -> Path:
    """A model with more bytes in each shard than are read for its header."""
    return pico("llama", hidden_size=128, intermediate_size=2048, shard_size="1MB")


def test_headers_come_without_the_weights(large: Path, tmp_path: Path) -> None:
    revisions = ("", "@v1", f"@{COMMIT}")
    with serving(large) as (endpoint, hub):
        found = open_headers(endpoint, tmp_path, *(f"org/pico{revision}" for revision in revisions))
    local = SafetensorsFolder(large)
    assert len(local.headers) > 3
    for source, unread in zip(found[::2], found[1::2], strict=True):
        assert {key: source[key] for key in ("headers", "infos")} == json.loads(json.dumps(listed(local)))
        assert (Path(str(source["folder"])) / "config.json").is_file()
        assert "weights of org/pico" in str(unread["error"])
    assert not list(tmp_path.rglob("*.safetensors"))
    for shard, header in local.headers.items():
        assert header.file_bytes > 3 * READ_AHEAD
        assert hub.sent[shard] == [(206, READ_AHEAD + 8)] * len(revisions)
    assert not [path for path in hub.asked if "resolve" in path and COMMIT not in path]
    assert all(any(revision[1:] in path for path in hub.asked) for revision in revisions)


def test_a_single_file_with_a_long_header_takes_a_second_range(pico: MakeModel, tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "config.json").write_bytes((pico("llama") / "config.json").read_bytes())
    names = [f"{'x' * 100}.{index}" for index in range(2000)]
    save_file({name: torch.zeros(200) for name in names}, served / "model.safetensors")
    with serving(served) as (endpoint, hub):
        source, _ = open_headers(endpoint, tmp_path / "home", "org/pico")
    local = SafetensorsFolder(served)
    assert {key: source[key] for key in ("headers", "infos")} == json.loads(json.dumps(listed(local)))
    start = min(info.begin for info in local.headers["model.safetensors"].tensors.values())
    assert start > READ_AHEAD
    assert {status for status, _ in hub.sent["model.safetensors"]} == {206}
    assert sum(count for _, count in hub.sent["model.safetensors"]) <= start + READ_AHEAD


def test_weights_in_the_cache_are_used_and_offline_too(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    done = run(
        hub[0], tmp_path / "home", "-c", "from streamlap.store.hub import local_folder; local_folder('org/pico')"
    )
    assert done.returncode == 0, done.stderr
    found = open_headers("http://127.0.0.1:9", tmp_path / "home", "org/pico", offline=True)
    assert [row["kind"] for row in found] == ["SafetensorsFolder"]


def test_offline_without_a_cache_is_said(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """With nothing in the cache, and with all but the weights."""
    nothing = open_headers(hub[0], tmp_path / "home", "org/pico", offline=True)
    assert "org/pico is not a folder" in str(nothing[0]["error"])
    assert not hub[1]
    open_headers(hub[0], tmp_path / "home", "org/pico")
    headers_only = open_headers(hub[0], tmp_path / "home", "org/pico", offline=True)
    assert "HF_HUB_OFFLINE" in str(headers_only[0]["error"])


def test_what_the_hub_does_not_have_is_said(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "served" / "model.safetensors").unlink()
    models = ("org/absent", "org/pico@v9", "org/pico", "no such folder")
    absent, revision, pickles, neither = open_headers(hub[0], tmp_path / "home", *models)
    assert "org/absent is not a folder" in str(absent["error"])
    assert "org/pico@v9 is not a folder" in str(revision["error"])
    assert "only pickled weights (pytorch_model.bin)" in str(pickles["error"])
    assert "wanted a checkpoint folder or a hub id" in str(neither["error"])


def lie(file: Path, kind: str) -> None:
    length = int.from_bytes(file.read_bytes()[:8], "little")
    raw, data = file.read_bytes()[8 : 8 + length], file.read_bytes()[8 + length :]
    if kind == "shape":
        raw = raw.replace(b'"shape":[32]', b'"shape":[31]')
    if kind == "length":
        length = 1 << 40
    if kind == "cut":
        data = data[:-4]
    file.write_bytes(length.to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("shape", "fit the shape"),
        pytest.param("length", "header length", marks=pytest.mark.nightly),
        pytest.param("cut", "truncated", marks=pytest.mark.nightly),
    ],
)
def test_a_remote_header_that_lies_is_refused(hub: tuple[str, list[str]], tmp_path: Path, kind: str, says: str) -> None:
    lie(tmp_path / "served" / "model.safetensors", kind)
    (found,) = open_headers(hub[0], tmp_path / "home", "org/pico")
    assert says in str(found["error"])
    assert f"org/pico@{COMMIT} lies or is damaged on the hub" in str(found["error"])


def test_a_shard_that_the_hub_does_not_have_is_said(large: Path, tmp_path: Path) -> None:
    served = tmp_path / "served"
    shutil.copytree(large, served)
    gone = sorted(served.glob("*.safetensors"))[1]
    gone.unlink()
    with serving(served) as (endpoint, hub):
        (found,) = open_headers(endpoint, tmp_path / "home", "org/pico")
    assert f"shard {gone.name} is missing" in str(found["error"])
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


def test_the_headers_of_a_folder_are_its_own(pico: MakeModel) -> None:
    folder, source = header_source(str(pico("llama")))
    assert folder == pico("llama")
    assert isinstance(source, SafetensorsFolder)


def test_the_headers_are_those_of_the_weights_that_are_chosen(large: Path, pico: MakeModel, tmp_path: Path) -> None:
    """A whole file beside an index, and the file that config.json names."""
    served = tmp_path / "served"
    shutil.copytree(large, served)
    shutil.copy(pico("llama") / "model.safetensors", served / "model.safetensors")
    with serving(served) as (endpoint, _):
        (single,) = [found for found in open_headers(endpoint, tmp_path / "1", "org/pico") if "headers" in found]
        (served / "model.safetensors").rename(served / "tuned.safetensors")
        config = json.loads((served / "config.json").read_text())
        (served / "config.json").write_text(json.dumps(config | {"transformers_weights": "tuned.safetensors"}))
        (named,) = [found for found in open_headers(endpoint, tmp_path / "2", "org/pico") if "headers" in found]
    assert [list(dict(found["headers"])) for found in (single, named)] == [["model.safetensors"], ["tuned.safetensors"]]  # type: ignore[call-overload]
    assert not list(tmp_path.glob("[12]/**/*.safetensors"))
