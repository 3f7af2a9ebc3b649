"""Downloads from a stub of the Hub on this machine; no test leaves it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from vllm_models import BackendOptions, LoadProgress, load_backend, resolve_model
from vllm_models.hub import wanted_files
from vllm_traits import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PICTURES = {"README.md": b"# hello", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"x"}


class StubHub(ThreadingHTTPServer):
    """One public repository, a gated one, and 404 for all others."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.files = files
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.is_down = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class StubHandler(BaseHTTPRequestHandler):
    server: StubHub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        """Keep the test's output quiet."""

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        files = self.server.files
        if self.server.is_down:
            return self.send(b"down", 500, with_body=with_body)
        if "/own/gated" in path:
            return self.send(b"{}", 403, {"X-Error-Code": "GatedRepo"}, with_body)
        if "/own/model" not in path:
            return self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"}, with_body)
        if path.endswith(("/revision/main", f"/revision/{COMMIT}")):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "own/model", "sha": COMMIT, "siblings": siblings}
            return self.send(json.dumps(info).encode(), with_body=with_body)
        if "/revision/" in path:
            return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"}, with_body)
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": f"{index:040x}"}
                for index, (name, body) in enumerate(files.items())
            ]
            return self.send(json.dumps(tree).encode(), with_body=with_body)
        name = path.split(f"/resolve/{COMMIT}/")[-1].split("/resolve/main/")[-1]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{list(files).index(name):040x}"'}
        return self.send(files[name], 200, headers, with_body)

    def send(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        with_body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(small: Any) -> Iterator[StubHub]:
    files = {path.name: path.read_bytes() for path in small.folder.iterdir()}
    server = StubHub(files | PICTURES)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(hub: StubHub, cache: Path, name: str = "own/model", **options: Any) -> Path:
    return resolve_model(name, endpoint=hub.endpoint, download_dir=cache, **options)


def test_a_download_fetches_only_what_is_needed_and_loads(hub: StubHub, tmp_path: Path) -> None:
    seen: list[LoadProgress] = []
    folder = resolve(hub, tmp_path, token="hf_secret", on_progress=seen.append)
    names = {path.name for path in folder.rglob("*")}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert not any("pytorch_model" in path or "onnx" in path for path in hub.requests)
    assert hub.tokens == {"Bearer hf_secret"}
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert load_backend(BackendOptions(folder, num_blocks=8)).info.vocab_size == 128


def test_an_offline_second_run_makes_no_request(hub: StubHub, tmp_path: Path) -> None:
    first = resolve(hub, tmp_path)
    hub.requests.clear()
    assert resolve(hub, tmp_path, offline=True) == first
    assert hub.requests == []


def test_a_second_run_fetches_no_file_again(hub: StubHub, tmp_path: Path) -> None:
    first = resolve(hub, tmp_path)
    hub.requests.clear()
    assert resolve(hub, tmp_path, revision=COMMIT) == first
    assert not any("/resolve/" in path for path in hub.requests)


def test_a_cached_model_survives_a_network_that_is_gone(hub: StubHub, tmp_path: Path) -> None:
    first = resolve(hub, tmp_path)
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    assert resolve_model("own/model", endpoint=nowhere, download_dir=tmp_path) == first


def test_offline_without_a_cached_copy_says_so(hub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="offline was asked for"):
        resolve(hub, tmp_path, offline=True)
    assert hub.requests == []


def test_a_gated_model_asks_for_a_token(hub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"own/gated is gated.*--hf-token"):
        resolve(hub, tmp_path, "own/gated")


def test_an_unknown_model_asks_for_the_spelling(hub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="own/nothing is not on the Hub"):
        resolve(hub, tmp_path, "own/nothing")


def test_an_unknown_revision_is_named(hub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no revision 'v9'"):
        resolve(hub, tmp_path, revision="v9")


def test_a_network_that_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be reached"):
        resolve_model("own/model", endpoint="http://127.0.0.1:9", download_dir=tmp_path)


def test_a_repository_without_a_model_is_refused(hub: StubHub, tmp_path: Path) -> None:
    del hub.files["config.json"]
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(hub, tmp_path)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./missing", "a/b/c", "just-a-name", "", "a//b"]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="neither an existing folder nor a Hub id"):
        resolve_model(name)


QUANTS = {
    "m-Q4_K_M.gguf": b"four",
    "m-Q8_0.gguf": b"eight",
    "big/m-00001-of-00002.gguf": b"one",
    "big/m-00002-of-00002.gguf": b"two",
    "README.md": b"# hello",
}


def test_a_gguf_file_is_downloaded_alone(hub: StubHub, tmp_path: Path) -> None:
    hub.files |= QUANTS
    seen: list[LoadProgress] = []
    found = resolve(hub, tmp_path, file="m-Q8_0.gguf", on_progress=seen.append)
    assert found.name == "m-Q8_0.gguf" and found.read_bytes() == b"eight"
    assert [path.name for path in found.parent.iterdir()] == ["m-Q8_0.gguf"]
    assert seen[-1] == LoadProgress("download", 1.0, "1 files")


@pytest.mark.parametrize("part", [1, 2])
def test_any_part_of_a_split_set_fetches_the_whole_set(
    hub: StubHub, tmp_path: Path, part: int
) -> None:
    hub.files |= QUANTS
    found = resolve(hub, tmp_path, file=f"big/m-0000{part}-of-00002.gguf")
    assert found.name == "m-00001-of-00002.gguf"
    assert sorted(path.read_bytes() for path in found.parent.iterdir()) == [b"one", b"two"]


def test_a_gguf_file_in_the_cache_is_found_offline(hub: StubHub, tmp_path: Path) -> None:
    hub.files |= QUANTS
    first = resolve(hub, tmp_path, file="m-Q8_0.gguf")
    hub.requests.clear()
    assert resolve(hub, tmp_path, file="m-Q8_0.gguf", offline=True) == first
    with pytest.raises(
        ModelError, match=r"own/model, m-Q4_K_M\.gguf is not in .* offline was asked for"
    ):
        resolve(hub, tmp_path, file="m-Q4_K_M.gguf", offline=True)
    assert hub.requests == []


@pytest.mark.parametrize("file", ["m-Q4_K_S.gguf", "*.gguf", "../m-Q8_0.gguf"])
def test_a_file_that_the_repository_lacks_names_those_it_has(
    hub: StubHub, tmp_path: Path, file: str
) -> None:
    hub.files |= QUANTS
    listed = r"Its GGUF files: big/m-00001-of-00002\.gguf, m-Q4_K_M\.gguf, m-Q8_0\.gguf\.$"
    with pytest.raises(ModelError, match=rf"own/model has no file .*\. The nearest is .*{listed}"):
        resolve(hub, tmp_path, file=file)


def test_a_set_that_lacks_a_part_is_refused(hub: StubHub, tmp_path: Path) -> None:
    hub.files = dict(QUANTS)
    del hub.files["big/m-00002-of-00002.gguf"]
    with pytest.raises(ModelError, match=r"own/model lacks big/m-00002-of-00002\.gguf, which"):
        resolve(hub, tmp_path, file="big/m-00001-of-00002.gguf")


@pytest.mark.parametrize("has_config", [True, False])
def test_a_repository_of_gguf_files_asks_which_one(
    hub: StubHub, tmp_path: Path, has_config: bool
) -> None:
    hub.files = QUANTS | ({"config.json": b"{}"} if has_config else {})
    with pytest.raises(ModelError, match=r"choose one \(--gguf-file\)\. .*: big/m-00001-of-0000"):
        resolve(hub, tmp_path)


def test_local_gguf_files_are_themselves(tmp_path: Path) -> None:
    for name, content in QUANTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    file = tmp_path / "m-Q8_0.gguf"
    assert resolve_model(str(file)) == file
    assert resolve_model("builtin", file=str(file)) == file
    assert resolve_model(str(tmp_path), file="m-Q8_0.gguf") == file
    second = str(tmp_path / "big" / "m-00002-of-00002.gguf")
    assert resolve_model(second).name == "m-00001-of-00002.gguf"
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "README.md")
    assert resolve_model(str(link)) == link


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("{}/x.gguf", None, r"has no file 'x\.gguf'\. The nearest is m\.gguf"),
        ("{}", "x.gguf", r"has no file 'x\.gguf'\. The nearest is m\.gguf"),
        ("{}", "config.json", r"is not named \*\.gguf"),
        ("{}/m.gguf", "m.gguf", "is a file already"),
        ("builtin", "{}/no/m.gguf", "It has no GGUF files"),
        ("{}/m-00003-of-00002.gguf", None, "cannot be a part of a set"),
    ],
)
def test_local_gguf_files_that_are_not_there_are_refused(
    tmp_path: Path, name: str, file: str | None, message: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        resolve_model(name.format(tmp_path), file=file and file.format(tmp_path))


def test_a_folder_is_itself_and_builtin_is_the_demonstration(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert (resolve_model("builtin") / "config.json").is_file()


def test_wanted_files_are_weights_tokenizer_and_configuration() -> None:
    names = [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "chat_template.jinja",
        "config.json",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "original/consolidated.00.pth",
        "model.gguf",
        "model.pt",
        "tokenizer.json",
        "training_args.bin",
    ]
    assert wanted_files(names) == [
        "1_Pooling/config.json",
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "tokenizer.json",
    ]
    assert wanted_files(["weights.safetensors"]) == ["weights.safetensors"]
