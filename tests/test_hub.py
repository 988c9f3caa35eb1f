"""Hub ids against a server on the loopback that answers as the hub does; the client runs in processes of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import families
import numpy as np
import pytest

from nla_jax import hub
from nla_jax.errors import HubError
from nla_jax.models import hf

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository, `org/mini`, whose `files` are served; `log` keeps (method, path, Range) of every request.

    `drop[file]` bytes into its first download the connection is closed; `broken` files answer 500. Other names:
    org/gated, org/private (401 without a reason, as the hub hides private repositories), org/denied."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log, self.drop, self.broken = files, [], {}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[tuple[str, str | None]]:
        """(file, Range) of every download since the log was last emptied."""
        return [(path.split("/")[-1], r) for method, path, r in self.log if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.log.append((self.command, path, self.headers.get("Range")))
        repo = path.removeprefix("/api/models").strip("/").split("/")[:2]
        refusals = {
            "private": (401, {}),
            "denied": (403, {}),
            "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}),
        }
        listing = path.startswith("/api/")
        if repo[0] == "org" and repo[1] in refusals and (repo[1] != "gated" or not listing):
            status, headers = refusals[repo[1]]
            return self.reply(status, b"{}", headers, body)
        if repo not in (["org", "mini"], ["org", "gated"]):
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if listing and "/revision/" in path and path.split("/")[-1] not in ("main", "v1", SHA):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if listing:
            return self.reply(200, json.dumps(self.listing(path)).encode(), {"Content-Type": "application/json"}, body)
        return self.file(path.split(f"/resolve/{SHA}/")[-1], body)

    def listing(self, path: str) -> object:
        if "/tree/" in path:
            return [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
        return {"id": "org/mini", "sha": SHA, "siblings": [{"rfilename": name} for name in self.server.files]}

    def file(self, name: str, body: bool) -> None:
        data = self.server.files.get(name)
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        if name in self.server.broken and body:
            return self.reply(500, b"", {}, body)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = self.server.drop.pop(name, None) if body else None
        return self.reply(status, data[start:], headers, body, stop)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool, stop: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:stop])
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    # The client writes 10 MB at a time, and can only go on after what it has written.
    config = families.changed(families.CONFIGS["llama2"], {"vocab_size": 150_000})
    folder = families.write_checkpoint(tmp_path_factory.mktemp("repo"), config, families.hf_weights(config))
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files |= {"nla_meta.yaml": b"kind: nla_model\n", "chat_template.jinja": b"{{ x }}", "tokenizer.json": b"{}"}
    unwanted = "pytorch_model.bin code.py weights.pt README.md consolidated.safetensors onnx/model.safetensors"
    files |= dict.fromkeys(unwanted.split(), b"no")
    with Hub(files) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def in_client(server_url: str, home: Path, calls: list[str], **env: str) -> list[str]:
    """What `resolve` returns or says for each id, in a new process (the endpoint is read once, at import)."""
    code = (
        "import sys, json\nfrom nla_jax import hub\nfrom nla_jax.errors import HubError\nout = []\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    try:\n        out.append(str(hub.resolve(call, role='av')))\n"
        "    except HubError as error:\n        out.append('HubError: ' + str(error))\n"
        "print(json.dumps(out))"
    )
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS")) and "proxy" not in k.lower()
    }
    settings = {
        "HF_ENDPOINT": server_url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)],
        env=clean | settings | env,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_dropped_download_goes_on_where_it_stopped(server, tmp_path):
    weights = "model.safetensors"
    size = len(server.files[weights])
    server.log.clear()
    server.drop[weights] = size * 2 // 3
    (path,) = in_client(server.url, tmp_path, ["org/mini"])
    wanted = {"config.json", "model.safetensors", "nla_meta.yaml", "chat_template.jinja", "tokenizer.json"}
    assert {p.name for p in Path(path).rglob("*")} == wanted
    assert all((Path(path) / name).read_bytes() == server.files[name] for name in wanted)
    asked = [r for name, r in server.downloads() if name == weights]
    assert len(asked) == 2 and asked[0] is None
    first = int(asked[1].removeprefix("bytes=").removesuffix("-"))
    assert 10e6 < first <= size * 2 // 3  # what had arrived is not fetched again
    assert len(server.downloads()) == len(wanted) + 1

    assert hf.load_model(path)[1].embed.shape == (150_000, 48)

    # Nothing is fetched twice, and what is complete needs no network.
    server.log.clear()
    again = in_client(server.url, tmp_path, ["org/mini", f"org/mini@{SHA}", "org/mini@v1"])
    assert again == [path] * 3 and not server.downloads()
    assert in_client("http://127.0.0.1:9", tmp_path, ["org/mini"]) == [path]


def test_a_failed_download_keeps_finished_files(server, tmp_path):
    server.broken.add("model.safetensors")
    server.log.clear()
    (first,) = in_client(server.url, tmp_path, ["org/mini"])
    assert "HTTP 500" in first and "the same command again" in first
    done = {name for name, _ in server.downloads()} - {"model.safetensors"}
    server.broken.clear()
    server.log.clear()
    (second,) = in_client(server.url, tmp_path, ["org/mini"])
    assert (Path(second) / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert "model.safetensors" in {name for name, _ in server.downloads()}
    kept = done - {name for name, _ in server.downloads()}
    assert kept, "every file was fetched again"


def test_refusals_are_one_line_with_the_next_step(server, tmp_path):
    said = in_client(server.url, tmp_path, ["org/nothing", "org/gated", "org/private", "org/denied", "org/mini@v9"])
    expected = [
        ("neither a directory here nor a repository", "check the spelling"),
        ("av: org/gated is gated", "accept its licence"),
        ("org/private", "hf auth login"),
        ("org/denied: access denied (HTTP 403)", "HF_TOKEN"),
        ("org/mini has no revision 'v9'", "branch, tag or commit"),
    ]
    for line, (what, fix) in zip(said, expected, strict=True):
        assert line.startswith("HubError: ") and "\n" not in line
        assert what in line and fix in line.split(" Try: ")[1], line
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("url", "env"), [("http://127.0.0.1:9", {}), ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"})])
def test_no_network(url, env, tmp_path):
    (line,) = in_client(url, tmp_path, ["org/mini"], **env)
    assert line.startswith("HubError: av: org/mini is not complete in the cache and the hub cannot be reached (")
    assert line.split(" Try: ")[1].startswith("check the connection (HF_ENDPOINT, HF_HUB_OFFLINE")


def test_repository_without_safetensors(server, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "files", {"config.json": b"{}", "pytorch_model.bin": b"no"})
    (line,) = in_client(server.url, tmp_path, ["org/mini"])
    assert "org/mini holds no .safetensors weights" in line


@pytest.mark.parametrize(
    "given", ["", "nowhere", "a/b/c", "/no/such/dir", "./out/av", "../x/y", "org/na me", "org/x@", "o@x"]
)
def test_neither_path_nor_id(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="neither a directory here nor a hub id|is a file") as error:
        hub.resolve(given, role="target")
    assert str(error.value).startswith("target: ")


def test_a_directory_wins_and_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/mini").mkdir(parents=True)
    assert hub.resolve("org/mini") == Path("org/mini")
    (tmp_path / "org/file").write_text("")
    with pytest.raises(HubError, match="org/file is a file: expected a model directory"):
        hub.resolve("org/file")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org/mini") == tmp_path / "org/mini"


def test_load_model_of_a_directory(tmp_path):
    weights = families.hf_weights(families.CONFIGS["llama"])
    folder = families.write_checkpoint(tmp_path / "m", families.CONFIGS["llama"], weights)
    cfg, params = hub.load_model(folder)
    assert cfg.family == "llama" and params.embed.dtype == np.float32
    assert hub.load_model(str(folder), "bfloat16", n_layers=1, head=False)[1].layers.wq.shape[0] == 1
