"""What the sources must not contain, and what must agree between them."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("traits", "core", "models", "dist", "server")
SECRET_WORDS = {"key", "keys", "digest", "digests", "secret", "proof", "hexdigest"}
EMPTY_NOUNS = {"manager", "helper", "helpers", "util", "utils", "common", "misc", "impl"}
RETIRED_WORDS = {"job", "page", "pages", "lane", "uid", "req", "reqs", "retract", "swap", "epoch"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def matches(pattern: str, *folders: str) -> list[str]:
    """Places where a pattern stands."""
    expression = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources(*folders)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if expression.search(line)
    ]


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [
        (r"torch\.load\(", "packages"),
        (r"\bimport (pickle|dill|cloudpickle|shelve|marshal)\b", "packages"),
        (r"innerHTML", "packages"),
        (r"trust_remote_code", "packages"),
        (r"\beval\(|\bexec\(", "packages/server"),
        (r"is_prefill", "packages/core"),
        (r"\bTODO\b|\bFIXME\b|\bXXX\b|NotImplementedError", "packages"),
    ],
)
def test_nothing_forbidden_is_written(pattern: str, folder: str) -> None:
    path = ROOT / folder
    assert path.exists()
    found = matches(pattern, folder) if path.is_dir() else re.findall(pattern, path.read_text())
    assert not found


def plain_comparisons(source: str) -> list[str]:
    """Where something that is named like a secret is compared by `==` or `!=`."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops)
        and any(words_of(last_name(side)) & SECRET_WORDS for side in (node.left, *node.comparators))
    ]


def last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return last_name(inner)
        case _:
            return ""


def test_secrets_are_compared_in_constant_time() -> None:
    assert len(plain_comparisons("a == self._key; proof(x)[:8] != b; d.hexdigest() == c")) == 3
    folders = ("packages/server/src/vllm_server/ops", "packages/dist/src")
    for path in sources(*folders):
        assert not plain_comparisons(path.read_text()), path


def test_there_is_one_template_environment() -> None:
    assert len(matches(r"\bimport \w*SandboxedEnvironment", "packages")) == 1
    assert not matches(r"\bimport .*(?<!Sandboxed)\bEnvironment\b", "packages")


def test_the_five_packages_have_one_version() -> None:
    versions = {
        tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"][
            "version"
        ]
        for name in PACKAGES
    }
    assert len(versions) == 1
    assert f"## {versions.pop()}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_is_typed_and_licensed(name: str) -> None:
    package = ROOT / "packages" / name
    assert (package / f"src/vllm_{name}/py.typed").exists()
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def tracked_texts() -> list[Path]:
    """Every file under version control that is text."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    paths = [ROOT / name for name in listed if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_texts_name_no_machine_and_no_ticket() -> None:
    forbidden = re.compile(r"/(?:work|home|root)/\w|\bissue #?\d+|\bticket \d+", re.IGNORECASE)
    texts = tracked_texts()
    assert ROOT / "justfile" in texts
    for path in texts:
        if path != Path(__file__):
            found = forbidden.search(path.read_text())
            assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"


def defined_names(path: Path) -> set[str]:
    """What a source names itself: the module, its classes, functions and parameters."""
    names = {path.stem}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def words_of(name: str) -> set[str]:
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


@pytest.mark.parametrize("package", PACKAGES)
def test_names_keep_to_the_glossary(package: str) -> None:
    """The server shows flags and pages that others named; the engine has its own words."""
    banned = EMPTY_NOUNS if package == "server" else EMPTY_NOUNS | RETIRED_WORDS
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(f"packages/{package}/src")
        for name in defined_names(path)
        if words_of(name) & banned
    }
    assert not found


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


PUBLIC_NAMES = {
    "vllm_traits": {
        "EMPTY", "BackendError", "BackendInfo", "Batch", "BatchOutput", "BlockStore", "Chunk",
        "ConfigError", "ContextLengthError", "DeviceError", "Done", "FinishReason", "Grammar",
        "InFlight", "InvalidRequestError", "KVGroup", "ModelBackend", "ModelError", "Pending",
        "PoolingParams", "QueueFullError", "Request", "RequestOutput", "SamplingParams", "Start",
        "StepCost", "TokenLogprobs", "VllmLiteError", "WireError",
    },
    "vllm_models": {
        "BackendOptions", "LoadProgress", "MemoryReport", "ModelConfig", "TorchBackend",
        "load_backend", "register_architecture", "resolve_model", "supported_architectures",
    },
    "vllm_dist": {
        "Channel", "ChannelClosed", "Inbox", "RemoteBackend", "Role", "accept_channel",
        "connect_channel", "handshake", "launch_backend", "serve_backend",
    },
    "vllm_lite": {
        "Engine", "EngineConfig", "GenerationOutput", "GenerationStream", "Message",
        "SamplingParams", "StreamItem",
    },
}  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_a_package_exports_exactly_its_public_names(module: str) -> None:
    package = import_module(module)
    assert set(package.__all__) == PUBLIC_NAMES[module]
    assert all(hasattr(package, name) for name in package.__all__)
