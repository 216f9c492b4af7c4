"""Publish a model or a data set: gather, check, write the card, push. Nothing leaves before every check has passed."""

import glob
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, hf_api
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import pipeline

from ..io.adapters import find_base
from ..io.checkpoints import PROJECTOR_CONFIG_NAME, base_of, checkpoint_kind, load_processor
from ..io.files import HUB_NAME
from ..text.stops import needed_by_stock
from .card_fields import check_card_fields
from .files import Problem, find_problems, link_problems, missing_files, read_record, select_files
from .model_card import render_model_card
from .staging import drop_local_names, finish_data_card, name_base, stage_files, stage_results


HTTP_ERROR = (getattr(hf_api, "httpx2", None) or hf_api.httpx).HTTPError
"""Of huggingface_hub's HTTP library; a broken connection is not an `OSError` there."""

WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
BASE_FILES = {"adapter": "adapter_config.json", "projector": PROJECTOR_CONFIG_NAME}
"""Kind → the file that names its base model."""


@dataclass
class Publication:
    """What is to be published, gathered in a folder of its own."""

    repo: str
    kind: str  # `full`, `adapter`, `projector` or `dataset`
    folder: Path
    files: dict[str, int]  # name → bytes
    left_out: list[str]  # files of the source folder that are not published
    problems: list[Problem] = field(default_factory=list)
    generate_kwargs: dict | None = None  # what stock's `generate` needs to end its answers

    @property
    def repo_type(self) -> str:
        return "dataset" if self.kind == "dataset" else "model"


def gather(
    source: str | os.PathLike,
    repo: str,
    folder: str | os.PathLike | None = None,
    *,
    results: list[str | os.PathLike] | None = None,
    base_models: list[str] | None = None,
    license: str | None = None,
    language: str = "en",
    **card,
) -> Publication:
    """
    Gather what is to be published in a folder, write the model card into it, and look for problems.

    Args:
        source (`str` or `os.PathLike`):
            A full model, an adapter, a projector, or a data set or a run of the data engine. It is not changed.
        repo (`str`): Name on the Hub: `owner/name`, or `name` for your own.
        folder (`str` or `os.PathLike`, *optional*):
            Where to gather; by default `SOURCE-to-publish`. An earlier one is replaced.
        results, base_models, license, language, card:
            The options of `llava publish`. A data set has its own card, into which `license` is written.

    Returns:
        [`Publication`]: with `problems`, which must be empty for [`push`].

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a name, the license or the language is not valid on the Hub, the folder holds neither a model nor a data
            set, or an adapter's base is a local folder and `base_models` does not name it.
    """
    source = Path(source).resolve()
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Give the folder of a model, an adapter or a data set.")
    check_names(repo, *(base_models or []), *(card.get("datasets") or []))
    check_card_fields(license, language)
    repo = _with_owner(repo)
    folder = Path(folder).resolve() if folder is not None else source.with_name(f"{source.name}-to-publish")
    kind, source, form = _kind(source)
    base = (base_models or [None])[0]
    if kind in BASE_FILES and base is None:
        base = read_record(source / BASE_FILES[kind]).get("base_model_name_or_path") or "nothing"
        if not HUB_NAME.fullmatch(base) or os.path.isdir(base):
            what = f"{source} is {'an adapter' if kind == 'adapter' else 'a projector'} for {base}"
            raise ValueError(f"{what}. Give its name on the Hub with --base-model, or --merge it.")
        base_models = [base]
    published, left_out = select_files(source, form)
    problems = link_problems(source, form)
    linked = {problem.file for problem in problems}

    marker = folder / ".gathered-by-llava-publish"
    if folder == source or source in folder.parents or folder in source.parents:
        raise ValueError(f"{folder} and {source} are inside each other. Choose another folder to gather in.")
    if folder.exists() and any(folder.iterdir()) and not marker.is_file():
        raise ValueError(f"{folder} exists and was not made by this command. Choose another folder.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    stage_files(source, folder, [file for file in published if file.as_posix() not in linked])
    stage_results(results or [], folder)
    if kind in BASE_FILES:
        name_base(folder / BASE_FILES[kind], base)
    drop_local_names(folder)
    generate_kwargs = needed_by_stock(source, kind) if kind in ("full", "adapter") else None
    if kind == "dataset":
        finish_data_card(folder / "README.md", repo, license)
    else:
        card |= {"base_models": base_models, "license": license or "other", "generate_kwargs": generate_kwargs}
        text = render_model_card(folder, repo, kind=kind, language=language, **card)
        (folder / "README.md").write_text(text, "utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != marker)
    return Publication(
        repo=repo,
        kind=kind,
        folder=folder,
        files={path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        left_out=[str(file) for file in left_out],
        problems=problems + find_problems(folder) + missing_files(folder, kind),
        generate_kwargs=generate_kwargs,
    )


def require_base(source: str | os.PathLike) -> None:
    """ValueError if the base of an adapter or a projector is missing, or does not fit it."""
    try:
        base_of(source)
    except ValueError as error:
        raise ValueError(f"{error} Or publish it without trying it first (--no-run).") from None
    find_base(source)


def ask_once(folder: str | os.PathLike, source: str | os.PathLike) -> str:
    """
    Ask a gathered model, or an adapter gathered from `source`, about a plain image, through the pipeline that its users call.

    Raises:
        ValueError: an adapter's base is missing, or does not fit it.
    """
    path = os.fspath(folder)
    if checkpoint_kind(folder) == "adapter":  # of which the source may name its base by a local path
        path = os.fspath(source)
        require_base(path)
    pipe = pipeline("image-text-to-text", model=path, processor=load_processor(folder))
    image = Image.new("RGB", (64, 64), (120, 160, 200))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    return pipe(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]


def check_names(*names: str) -> None:
    """ValueError if one of `names` is not a valid name on the Hub."""
    for name in names:
        try:
            validate_repo_id(name)
        except ValueError as error:
            raise ValueError(f"{name!r} is not a name on the Hub: give owner/name. ({error})") from None


def check_refs(*names: str | None) -> None:
    """ValueError if one of `names` cannot be the name of a branch or a tag."""
    for name in names:
        if name is not None and re.search(r"[\s~^:?*\[\\\x00-\x1f]|\.\.|^[-/.]|[/.]$|^$", name):
            raise ValueError(f"{name!r} cannot be the name of a branch or a tag. Choose another, such as v1.0.")


def push(
    publication: Publication,
    *,
    private: bool = False,
    revision: str | None = None,
    tags: list[str] | None = None,
    message: str = "Upload with llava publish",
    endpoint: str | None = None,
) -> str:
    """
    Create the repository if it does not exist, and upload what was gathered. After an interruption, call it again: files
    that the Hub has are not uploaded twice.

    The arguments are those of `llava publish`. A tag that exists, and `private` for an existing public repository, are refused
    before the upload. `endpoint` is another Hub than `HF_ENDPOINT` or the public one. Returns the repository's URL.

    Raises:
        ValueError: the publication has problems, the repository is public, a tag is taken, or the Hub rejects something.
        PermissionError: there is no token, or it may not write there.
        OSError: the upload was interrupted.
    """
    if publication.problems:
        lines = "\n".join(f"  {problem}" for problem in publication.problems)
        raise ValueError(f"cannot publish: {len(publication.problems)} problems:\n{lines}")
    api, kind, tags = HfApi(endpoint=endpoint), {"repo_type": publication.repo_type}, tags or []
    check_refs(revision, *tags)
    try:
        _check_repository(api, publication, private, tags)
        repo = api.create_repo(publication.repo, private=private, exist_ok=True, **kind).repo_id
        if revision is not None and not revision.startswith("refs/"):  # such as an existing pull request
            api.create_branch(repo, branch=revision, exist_ok=True, **kind)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=publication.folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=[".*"],
            delete_patterns=_stale_weights(api, repo, publication, revision),
            **kind,
        )
        for tag in tags:
            api.create_tag(repo, tag=tag, revision=revision, **kind)
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join((error.server_message or str(error)).split())
        if status in (401, 403):
            what = f"The Hub refused {publication.repo} ({status}: {said})"
            raise PermissionError(f"{what}: log in with a token that may write there (`hf auth login`).") from None
        if 400 <= status < 500 and status not in (408, 429):
            raise ValueError(f"The Hub rejects {publication.repo} ({status}: {said}).") from None
        raise _interrupted("too many requests: wait a while" if status == 429 else str(status)) from None
    except (OSError, HTTP_ERROR) as error:
        raise _interrupted(str(error)) from None
    except RuntimeError as error:  # of a large file: the Hub's storage
        if not isinstance(error.__cause__, (OSError, HTTP_ERROR)):
            raise
        response = getattr(error.__cause__, "response", None)
        raise _interrupted(f"{error} {error.__cause__ if response is None else response.status_code}") from None
    return str(commit.commit_url).split("/commit/")[0]


def _interrupted(why: str) -> OSError:
    return OSError(f"The upload was interrupted ({' '.join(why.split())}). Run the same command again to resume it.")


def _with_owner(repo: str) -> str:
    if "/" in repo:
        return repo
    try:
        return f"{HfApi().whoami()['name']}/{repo}"
    except (OSError, HTTP_ERROR):
        raise ValueError(
            f"{repo!r} has no owner, and no login tells it. Give owner/name, or `hf auth login`."
        ) from None


def _kind(source: Path) -> tuple[str, Path, str]:
    """What is published, its folder, and the key of `PUBLISHED` for its files."""
    if any((source / name).is_file() for name in ("config.json", *BASE_FILES.values())):
        kind = checkpoint_kind(source)
        return kind, source, "model"
    for folder in (source, source / "dataset"):  # or the data set of a run of the data engine
        if any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet")):
            return "dataset", folder, "dataset"
    if (source / "instruct.json").is_file():
        return "dataset", source, "run"
    there = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
    model, data = f"config.json, adapter_config.json, {PROJECTOR_CONFIG_NAME}", "*.parquet, instruct.json"
    raise ValueError(f"{source} holds neither a model ({model}) nor a data set ({data}). It holds: {there}.")


def _check_repository(api: HfApi, publication: Publication, private: bool, tags: list[str]) -> None:
    """Refuses what would silently go wrong in an existing repository."""
    try:
        info = api.repo_info(publication.repo, repo_type=publication.repo_type)
    except RepositoryNotFoundError:
        return
    if private and info.private is False:
        public = f"{publication.repo} exists and is public: --private applies to new repositories"
        raise ValueError(f"{public}. Make it private in its settings first, or choose another name.")
    there = {tag.name for tag in api.list_repo_refs(publication.repo, repo_type=publication.repo_type).tags}
    if taken := next((tag for tag in tags if tag in there), None):
        raise ValueError(f"{publication.repo} has a tag {taken!r}, of an earlier commit. Choose another.")


def _stale_weights(api: HfApi, repo: str, publication: Publication, revision: str | None) -> list[str]:
    """Weights of an earlier publication that are not replaced (other shards, pickles): a loader might use them."""
    if publication.kind == "dataset":
        return []
    there = api.list_repo_files(repo, revision=revision, repo_type=publication.repo_type)
    stale = [name for name in there if "/" not in name and name.endswith(WEIGHT_ENDINGS)]
    return [glob.escape(name) for name in stale if name not in publication.files]
