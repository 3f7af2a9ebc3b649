"""What the sources must not contain, and what must agree between them."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import vllm_traits

ROOT = Path(__file__).parents[2]
PACKAGES = ("traits", "core", "models", "dist", "server")


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
        (r"\b(key|digest|secret|token)\w* == ", "packages/server/src/vllm_server/ops/auth.py"),
    ],
)
def test_nothing_forbidden_is_written(pattern: str, folder: str) -> None:
    path = ROOT / folder
    assert path.exists()
    found = matches(pattern, folder) if path.is_dir() else re.findall(pattern, path.read_text())
    assert not found


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


def test_texts_name_no_machine_and_no_ticket() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    forbidden = re.compile(r"/(?:work|home|root)/\w|\bissue #?\d+|\bticket \d+", re.IGNORECASE)
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml") and path != Path(__file__):
            found = forbidden.search(path.read_text())
            assert found is None, f"{name}: {found[0]}"


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_traits_export_exactly_the_protocol() -> None:
    assert set(vllm_traits.__all__) == {
        "EMPTY", "BackendError", "BackendInfo", "Batch", "BatchOutput", "BlockStore", "Chunk",
        "ConfigError", "ContextLengthError", "DeviceError", "Done", "FinishReason", "Grammar",
        "InFlight", "InvalidRequestError", "KVGroup", "ModelBackend", "ModelError", "Pending",
        "PoolingParams", "QueueFullError", "Request", "RequestOutput", "SamplingParams", "Start",
        "StepCost", "TokenLogprobs", "VllmLiteError", "WireError",
    }  # fmt: skip
    assert all(hasattr(vllm_traits, name) for name in vllm_traits.__all__)
