"""From what the user calls a model to local files, downloading from the Hub if need be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vllm_traits import ModelError

from vllm_models.gguf_files import choose_parts, is_gguf, listed, parts_of
from vllm_models.options import LoadProgress, OnProgress, ignore_progress

BUILTIN = "builtin"
_REPO_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
_WANTED = frozenset(
    {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "modules.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    }
)


class _Repo(NamedTuple):
    """A model on a Hub and where its files are kept here."""

    id: str
    revision: str | None
    cache_dir: Path | None
    token: str | None
    endpoint: str | None

    def arguments(self) -> dict[str, Any]:
        return {
            "repo_id": self.id,
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "endpoint": self.endpoint,
        }


def resolve_model(
    name: str,
    *,
    file: str | None = None,
    revision: str | None = None,
    download_dir: Path | None = None,
    offline: bool = False,
    token: str | None = None,
    on_progress: OnProgress | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder of a model's files, or its GGUF file.

    Args:
        name: `builtin`, a folder, a `.gguf` file, or a Hub id such as `Qwen/Qwen3-0.6B`.
        file: A GGUF file in that folder or Hub repository, any part of a split set. With
            `builtin`, which has none, the path of a file.
        revision: Branch, tag or commit on the Hub; None is its main branch.
        download_dir: Where downloads are kept; None is the Hub's usual cache.
        offline: Make no request and take what was downloaded before.
        token: For gated and private models; None uses the one stored by the Hub's own tools.
        on_progress: Told about the download.
        endpoint: Address of the Hub; None is the usual one.

    Raises:
        ModelError: There is no such folder, file or model, it is gated, or it cannot be reached.
    """
    if name == BUILTIN:
        return _local(Path(file)) if file else Path(__file__).parent / "demo"
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _in_folder(path, file) if file else path.resolve()
    if is_gguf(name):
        if file:
            raise ModelError(f"{name} is a file already; leave out {file!r}.")
        return _local(path)
    if not _REPO_ID.fullmatch(name):
        raise ModelError(
            f"{name!r} is neither an existing folder nor a Hub id (owner/name) nor {BUILTIN!r}."
        )
    repo = _Repo(name, revision, download_dir, token, endpoint)
    if file:
        return _gguf_of(repo, file, offline, on_progress or ignore_progress)
    return _cached(repo) if offline else _download(repo, on_progress or ignore_progress)


def _local(path: Path) -> Path:
    """A GGUF file here. Links stay links, since what they lead to may be named in another way."""
    path = path.expanduser().absolute()
    return _in_folder(path.parent, path.name)


def _in_folder(folder: Path, file: str) -> Path:
    """A GGUF file in a folder; of a split set the first."""
    if not is_gguf(file):
        raise ModelError(f"{file!r} is not named *.gguf; GGUF files are told by that.")
    names = parts_of(Path(file).as_posix())
    if not all((folder / name).is_file() for name in names):
        found = (path for pattern in ("*.gguf", "*/*.gguf") for path in folder.glob(pattern))
        names = sorted(path.relative_to(folder).as_posix() for path in found)
    return folder.absolute() / choose_parts(names, Path(file).as_posix(), str(folder))[0]


def _gguf_of(repo: _Repo, file: str, offline: bool, on_progress: OnProgress) -> Path:
    """A GGUF file of a repository with the other parts of its set, and nothing else."""
    parts = parts_of(file)
    if offline:
        folder = _cached(repo, parts)
    else:
        with _explained(repo):
            sizes = _list_files(repo, parts)
            if sizes is not None and set(parts) - set(sizes):
                choose_parts(_all_names(repo), file, repo.id)
            if sizes is None:
                folder = _cached(repo, parts)
            else:
                folder = _fetch(repo, {part: sizes[part] for part in parts}, on_progress)
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        raise _not_cached(repo, missing)
    return folder / parts[0]


def _all_names(repo: _Repo) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi(repo.endpoint, repo.token).list_repo_files(repo.id, revision=repo.revision)


def wanted_files(names: list[str]) -> list[str]:
    """Of a repository's files those that are needed: never pickles, other formats or pictures."""
    weights = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    usual = [name for name in weights if name.startswith("model")]
    return sorted((_WANTED & set(names)) | set(usual or weights))


def _cached(repo: _Repo, files: Sequence[str] = ("config.json",)) -> Path:
    """What an earlier download left; makes no request."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            **repo.arguments(), local_files_only=True, allow_patterns=list(files)
        )
    except LocalEntryNotFoundError as error:
        raise _not_cached(repo, files) from error
    return Path(found)


def _not_cached(repo: _Repo, files: Sequence[str]) -> ModelError:
    where = repo.cache_dir or "the Hub's cache"
    what = ", ".join([repo.id, *filter(is_gguf, files)])
    return ModelError(
        f"{what} is not in {where} and offline was asked for; download it once online."
    )


def _download(repo: _Repo, on_progress: OnProgress) -> Path:
    """Fetch the files that are needed; unchanged ones are not fetched again."""
    with _explained(repo):
        sizes = _list_files(repo, [*_WANTED, "*.safetensors"])
        if sizes is None:
            on_progress(LoadProgress("download", 1.0, "the Hub is out of reach, using the cache"))
            return _cached(repo)
        names = wanted_files(list(sizes))
        if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
            _refuse_gguf(repo)
        if "config.json" not in names:
            raise ModelError(f"{repo.id} has no config.json; it is not a transformers model.")
        return _fetch(repo, {name: sizes[name] for name in names}, on_progress)


def _refuse_gguf(repo: _Repo) -> None:
    """Ask which file is meant, if the repository has several models in GGUF."""
    names = _all_names(repo)
    if any(is_gguf(name) for name in names):
        raise ModelError(
            f"{repo.id} has no safetensors, but GGUF files: choose one (--gguf-file). "
            f"{listed(names)}"
        )


def _fetch(repo: _Repo, sizes: Mapping[str, int], on_progress: OnProgress) -> Path:
    """Download files of known sizes; unchanged ones are not fetched again."""
    from huggingface_hub import hf_hub_download, snapshot_download

    total, done, names = sum(sizes.values()) or 1, 0, list(sizes)
    for name in names:
        bar = _bar(done, total, name, on_progress)
        hf_hub_download(filename=name, tqdm_class=bar, **repo.arguments())
        done += sizes[name]
    on_progress(LoadProgress("download", 1.0, f"{len(names)} files"))
    silent = _silent_bar()
    return Path(snapshot_download(**repo.arguments(), allow_patterns=names, tqdm_class=silent))


def _list_files(repo: _Repo, patterns: Sequence[str]) -> dict[str, int] | None:
    """Size of every file that may be needed; None if only the cache can be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError

    try:
        files = snapshot_download(
            **repo.arguments(),
            allow_patterns=list(patterns),
            dry_run=True,
            tqdm_class=_silent_bar(),
        )
    except DryRunError as error:
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise cause from error
        try:
            _cached(repo, patterns)
        except ModelError:
            raise ConnectionError(str(cause)) from error
        return None
    return {file.filename: file.file_size for file in files}


def _bar(done: int, total: int, name: str, on_progress: OnProgress) -> type[Any]:
    """A silent progress bar class that reports bytes to us."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.received = options.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += n or 0
            on_progress(LoadProgress("download", min(1.0, (done + self.received) / total), name))
            return super().update(n)

    return Bar


def _silent_bar() -> type[Any]:
    return _bar(0, 1, "", ignore_progress)


@contextmanager
def _explained(repo: _Repo) -> Iterator[None]:
    """Turn the Hub's errors into ours, each with what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo.id} is gated: accept its terms on its page, then pass a token that may read it "
            "(--hf-token or HF_TOKEN)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo.id} is not on the Hub, or it is private and the token may not read it; check "
            "the spelling and the token."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo.id} has no revision {repo.revision!r}.") from error
    except (errors.HTTPError, OSError) as error:
        raise ModelError(
            f"{repo.id} could not be downloaded ({type(error).__name__}): the Hub cannot be "
            "reached or does not answer. Check the network, or use a local folder."
        ) from error
