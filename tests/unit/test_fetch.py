"""What `fetch` says when the hub refuses, is away or lacks something; against a small server on this machine."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickled", "modeling.py": b"code", "chat_template.jinja": b"template",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: t/good, t/bare (no safetensors), t/gated, t/sick; others do not exist."""

    protocol_version = "HTTP/1.1"
    asked = []

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        Hub.asked.append(self.path)
        path = self.path.partition("?")[0]
        repo = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        names = [name for name in FILES if repo != "t/bare" or not name.endswith(".safetensors")]
        if self.headers.get("Authorization") == "Bearer hf_wrong":
            self.answer(401, b'{"error":"Invalid credentials"}', X_Error_Message="Invalid credentials in Authorization header")
        elif repo == "t/gated":
            self.answer(403 if self.headers.get("Authorization") else 401, b"{}", X_Error_Code="GatedRepo")
        elif repo == "t/sick":
            self.answer(501, b"{}")
        elif repo not in ("t/good", "t/bare"):
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif path.startswith("/api/models/") and "/tree/" in path:
            rows = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": f"{i:040x}"} for i, name in enumerate(names)]
            self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/"):
            info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            name = path.split("/resolve/", 1)[1].split("/", 1)[1]
            self.answer(200, FILES[name], ETag=f'"{name}"', X_Repo_Commit=SHA, Accept_Ranges="bytes")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(home, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    clean.update(PYTHONPATH=str(ROOT / "python"), HF_HOME=str(home), HF_HUB_DISABLE_XET="1", **environment)
    return subprocess.run([sys.executable, "-m", "ulysses_plus.fetch", *arguments], capture_output=True, text=True, env=clean, timeout=120)


def sentence(done):
    """The last line on stderr; there is no traceback."""
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr.rstrip("\n").splitlines()[-1]


def test_a_model_is_fetched_without_pickles_and_code(tmp_path, endpoint):
    done = fetch(tmp_path, "t/good", HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    again = fetch(tmp_path, "t/good", HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, done.stdout)


def test_only_the_tokenizer_on_request(tmp_path, endpoint):
    done = fetch(tmp_path, "t/good", "--tokenizer-only", HF_ENDPOINT=endpoint)
    assert sorted(path.name for path in Path(done.stdout.strip()).iterdir()) == ["chat_template.jinja", "config.json", "tokenizer.json"]
    whole = fetch(tmp_path, "t/good", HF_HUB_OFFLINE="1")
    assert whole.returncode == 2 and "model.safetensors" in sentence(whole) or "not in the cache" in sentence(whole)


def test_a_folder_is_itself(tmp_path):
    done = fetch(tmp_path, str(tmp_path), HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n")


def test_a_gated_model_says_what_to_do(tmp_path, endpoint):
    done = fetch(tmp_path, "t/gated", HF_ENDPOINT=endpoint)
    assert done.returncode == 2
    assert sentence(done) == f"t/gated is gated: accept its licence on its page ({endpoint}/t/gated), then set HF_TOKEN (not set now)"
    done = fetch(tmp_path, "t/gated", HF_ENDPOINT=endpoint, HF_TOKEN="hf_secret")
    assert done.returncode == 2 and "set now, but it has no access" in sentence(done)
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("repo,environment,code,said", [
    ("t/missing", {}, 2, "t/missing: no such model at"),
    ("t/good", {"HF_TOKEN": "hf_wrong"}, 2, "t/good: the hub refused the token in HF_TOKEN"),
    ("t/bare", {}, 2, "t/bare: expected weights as safetensors, found no model.safetensors"),
    ("t/sick", {}, 75, "answered HTTP 501: try again later"),
    ("./folder", {}, 2, "./folder: expected a folder or a hub id like 'owner/name', found no such folder"),
    ("t/good", {"HF_HUB_OFFLINE": "1"}, 2, "t/good: not in the cache"),
    ("t/good", {"HF_ENDPOINT": "http://127.0.0.1:9"}, 75, "cannot be reached: check the network and try again"),
])
def test_errors_are_one_sentence(tmp_path, endpoint, repo, environment, code, said):
    done = fetch(tmp_path, repo, **{"HF_ENDPOINT": endpoint, **environment})
    assert done.returncode == code, done.stderr
    assert said in sentence(done)
    assert "hf_wrong" not in done.stderr
