"""Hub ids, against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import TEXT, MakeModel

import streamlap
from streamlap.errors import CheckpointError
from streamlap.store.hub import local_folder, model_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository, `org/pico`, model and data set alike, from `folder`: its file list and its files."""

    folder: Path
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        name = self.path.split(f"/org/pico/resolve/{COMMIT}/")[-1]
        headers = {"X-Repo-Commit": COMMIT}
        if "/tree/" in self.path:
            rows = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"}
                    for path in sorted(self.folder.iterdir())]  # fmt: skip
            data = json.dumps(rows).encode()
        elif self.path.startswith(("/api/models/org/pico", "/api/datasets/org/pico")):
            siblings = [{"rfilename": path.name} for path in sorted(self.folder.iterdir())]
            data = json.dumps({"id": "org/pico", "sha": COMMIT, "siblings": siblings}).encode()
            headers["Content-Type"] = "application/json"
        elif (self.folder / name).is_file():
            data = (self.folder / name).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(pico: MakeModel, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    served = tmp_path / "served"
    served.mkdir()
    for path in pico("llama", tokenizer=True).iterdir():
        (served / path.name).write_bytes(path.read_bytes())
    (served / "part.txt").write_text(TEXT)
    (served / "pytorch_model.bin").write_bytes(b"pickle")
    (served / "modeling_evil.py").write_text("raise SystemExit('ran')")
    handler = type("Served", (Hub,), {"folder": served, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(endpoint: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "streamlap.cli", *words]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)


def test_a_hub_id_is_fetched_once_without_pickles_or_code(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    done = ask(endpoint, tmp_path / "home", "inspect", f"org/pico@{COMMIT}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "llama"
    assert any(path.endswith("model.safetensors") for path in asked)
    assert not [path for path in asked if path.endswith((".bin", ".py"))]


def test_a_hub_data_set_is_calibration_text(hub: tuple[str, list[str]], text: Path, tmp_path: Path) -> None:
    words = ("eval", "org/pico", "--length", "16", "--json", "--text")
    done = ask(hub[0], tmp_path / "home", *words, "org/pico")
    assert done.returncode == 0, done.stderr
    local = streamlap.evaluate(tmp_path / "served", text, length=16)
    assert json.loads(done.stdout)["nll"] == local.nll


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
