"""Pipelines from the hub, which a server on this machine plays: what is asked of it, and what goes wrong."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

import fgm
from text2image import hub

COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """Serves a folder as the model owner/name; asked: the paths of all requests.

    fault: an error of the hub's that answers every request, or the end of a name that cannot be had."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.asked, self.fault = folder, [], None


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        files = [file for file in hub.folder.rglob("*") if file.is_file()]
        sizes = {file.relative_to(hub.folder).as_posix(): file.stat().st_size for file in files}
        if hub.fault in ("GatedRepo", "RepoNotFound"):
            self.answer(404, b"", {"X-Error-Code": hub.fault})
        elif hub.fault and path.endswith(hub.fault) and self.command == "GET":
            self.answer(500, b"")
        elif "/resolve/" in path:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            etag = f'"{name.replace("/", "-")}"'
            self.answer(200, (hub.folder / name).read_bytes(), {"ETag": etag, "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            self.answer(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name} for name in sizes]
            about = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(about).encode())

    do_HEAD = do_GET

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in (dict(headers) | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(model, tmp_path, monkeypatch):
    server = Hub(model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def weights(asked):
    return sorted({path.rpartition("/")[2] for path in asked if path.endswith(".safetensors")})


def test_a_model_is_downloaded_once_and_then_no_network_is_touched(server, model):
    folder = hub.model_folder("owner/name")
    assert (folder / "vae" / "config.json").read_bytes() == (model / "vae" / "config.json").read_bytes()
    assert weights(server.asked) == ["diffusion_pytorch_model.safetensors", "model.safetensors"]
    assert not [path for path in server.asked if "images" in path]  # no component
    server.asked.clear()
    assert hub.model_folder("owner/name") == folder and server.asked == []


def test_what_is_half_there_is_completed_and_what_has_come_is_kept(server):
    server.fault = "transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(fgm.InputError, match="the hub does not give it .*what has come is kept"):
        hub.model_folder("owner/name")
    server.fault, came = None, [path for path in server.asked if path.endswith("config.json")]
    server.asked.clear()
    assert (hub.model_folder("owner/name") / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert came and not set(came) & set(server.asked)


@pytest.mark.parametrize("fault, model_id, message", [
    ("GatedRepo", "owner/name", "owner/name.*[Gg]ated"),
    ("RepoNotFound", "owner/name", "owner/name is no folder here.*RepositoryNotFound"),
    (None, "no such folder", "no folder here.*HFValidationError"),
])
def test_a_model_that_cannot_be_had_is_named(server, fault, model_id, message):
    server.fault = fault
    with pytest.raises(fgm.InputError, match=message) as found:
        hub.model_folder(model_id)
    assert "\n" not in str(found.value)


def test_a_model_of_another_kind_is_refused_before_its_weights_come(server, tmp_path):
    server.folder = tmp_path / "other"
    (server.folder / "transformer").mkdir(parents=True)
    (server.folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (server.folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(fgm.InputError, match="owner/name is a FluxPipeline"):
        hub.model_folder("owner/name")
    assert weights(server.asked) == []


def test_without_network_and_without_files_the_way_out_is_told(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(fgm.InputError, match="hub does not give it.*tiny_sd3.py"):
        hub.model_folder("owner/name")
