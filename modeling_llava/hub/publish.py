"""Publish a model or a data set: gather, check, write the card, push. Nothing leaves before every check has passed."""

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checkpoints import base_model_of, checkpoint_kind
from .files import Problem, find_problems, select_files, stage_files
from .model_card import render_model_card


logger = logging.getLogger(__name__)


@dataclass
class Publication:
    """What is to be sent, gathered in a folder of its own."""

    repo: str
    kind: str
    """`full`, `adapter`, `projector` or `dataset`."""
    folder: Path
    files: dict[str, int]
    """Size in bytes of each file that is sent."""
    left_out: list[str]
    """Files of the source folder that stay."""
    problems: list[Problem] = field(default_factory=list)
    url: str | None = None
    """Where it is, once it has been pushed."""

    @property
    def repo_type(self) -> str:
        return "dataset" if self.kind == "dataset" else "model"


def gather(
    source: str | os.PathLike,
    repo: str,
    folder: str | os.PathLike | None = None,
    *,
    base_models: list[str] | None = None,
    datasets: list[str] | None = None,
    license: str = "other",
    language: str = "en",
    summary: str | None = None,
) -> Publication:
    """
    Gather what is to be published in a folder, write the model card into it, and look for problems.

    Args:
        source (`str` or `os.PathLike`):
            A full model, an adapter, a projector, or a data set made by the data engine. It is not changed.
        repo (`str`):
            Name on the Hub: `owner/name`, or `name` for one's own.
        folder (`str` or `os.PathLike`, *optional*):
            Where to gather; by default beside `source`, with `-to-publish` behind its name. An earlier one is replaced.
        base_models, datasets, license, language, summary:
            See [`render_model_card`]. An adapter's base is taken from its configuration if it is a Hub name.

    Returns:
        [`Publication`]: with `problems`, which must be empty for [`push`].

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the name is not a Hub name, the folder holds neither a model nor a data set, or an adapter's base is
            a local folder and `base_models` does not say its Hub name.
    """
    source = Path(source).resolve()
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Give the folder of a model, an adapter or a data set.")
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"{repo!r} is not a name on the Hub: give owner/name. ({error})") from None
    kind = _kind(source)
    if kind == "adapter" and not base_models:
        base = base_model_of(source)
        if os.path.isdir(base):
            raise ValueError(
                f"{source} is an adapter for {base}, a folder that others do not have. Give its name on the Hub with "
                "--base-model, or merge the adapter first (llava merge) and publish the full model."
            )
        base_models = [base]
    published, left_out = select_files(source, "dataset" if kind == "dataset" else "model")

    folder = Path(folder) if folder is not None else source.with_name(f"{source.name}-to-publish")
    if folder.resolve() == source or source in folder.resolve().parents:
        raise ValueError(f"{folder} lies in {source}, which is being published. Choose another folder.")
    marker = folder / ".gathered-by-llava-publish"
    if folder.exists() and any(folder.iterdir()) and not marker.is_file():
        raise ValueError(f"{folder} exists and was not made by this command. Choose another folder.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    stage_files(source, folder, published)
    if kind == "adapter":
        _name_base(folder / "adapter_config.json", base_models[0])
    if kind == "projector" and base_models:
        _name_base(folder / "projector_config.json", base_models[0])
    _remove_local_names(folder)
    if kind != "dataset":
        card = render_model_card(
            folder,
            repo,
            kind=kind,
            base_models=base_models,
            datasets=datasets,
            license=license,
            language=language,
            summary=summary,
        )
        (folder / "README.md").write_text(card, "utf-8")
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != marker
    }
    return Publication(
        repo=repo,
        kind=kind,
        folder=folder,
        files=files,
        left_out=[str(file) for file in left_out],
        problems=find_problems(folder) + _missing_files(folder, kind),
    )


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
    Create the repository if it is absent, and send what was gathered. Run it again after an interruption: what the Hub
    has already is not sent twice.

    The token is that of `hf auth login` or `HF_TOKEN`; it is handed to nobody but `huggingface_hub`.

    Args:
        publication ([`Publication`]):
            From [`gather`].
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch to push to; it is created from `main` if absent.
        tags (`list[str]`, *optional*):
            Git tags for the new commit, such as `["v1"]`.
        message (`str`, *optional*):
            The commit's first line.
        endpoint (`str`, *optional*):
            Another Hub; `HF_ENDPOINT` or the public one by default.

    Returns:
        `str`: where it is.

    Raises:
        ValueError: the publication has problems.
        PermissionError: there is no token, or it may not write there.
        OSError: the upload broke off.
    """
    if publication.problems:
        raise ValueError(
            f"{len(publication.problems)} problem(s) stand against publishing:\n"
            + "\n".join(f"  {problem}" for problem in publication.problems)
        )
    api = HfApi(endpoint=endpoint)
    kind: dict[str, Any] = {"repo_type": publication.repo_type}
    try:
        repo = api.create_repo(publication.repo, private=private, exist_ok=True, **kind).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True, **kind)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=publication.folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=[".*"],
            **kind,
        )
        for tag in tags or []:
            api.create_tag(repo, tag=tag, revision=revision, exist_ok=True, **kind)
    except LocalTokenNotFoundError:
        raise PermissionError(
            "You are not logged in: run `hf auth login`, or set HF_TOKEN to a write token."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(
                f"The Hub refused {publication.repo} ({status}): log in with a token that may write there "
                "(`hf auth login`), and check the owner's name."
            ) from None
        raise OSError(f"The upload broke off ({status or error}). Run the same command again: it goes on.") from None
    except OSError as error:
        raise OSError(f"The upload broke off ({error}). Run the same command again: it goes on.") from None
    publication.url = str(commit.commit_url).split("/commit/")[0]
    return publication.url


def _kind(source: Path) -> str:
    if not (source / "config.json").is_file() and not (source / "adapter_config.json").is_file():
        if any(source.glob("*.parquet")) or any(source.glob("data/*.parquet")):
            return "dataset"
    return checkpoint_kind(source)


def _name_base(file: Path, base: str) -> None:
    """Write the base model's Hub name into a copy of an adapter's configuration (the copy may be a hard link)."""
    config = json.loads(file.read_text("utf-8"))
    config["base_model_name_or_path"] = base
    file.unlink()
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _remove_local_names(folder: Path) -> None:
    """Drop the place a model was loaded from, which transformers and tokenizers note in their files."""
    for file in [
        *folder.glob("config.json"),
        *folder.glob("tokenizer_config.json"),
        *folder.glob("trainer_state.json"),
    ]:
        content = json.loads(file.read_text("utf-8"))
        if file.name == "trainer_state.json":
            best = content.get("best_model_checkpoint")
            changed = bool(best)
            if best:
                content["best_model_checkpoint"] = Path(best).name
        else:
            changed = _drop_paths(content)
        if changed:
            file.unlink()
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _drop_paths(content: dict) -> bool:
    changed = False
    for key in ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file"):
        if os.path.isabs(str(content.get(key, ""))):
            del content[key]
            changed = True
    for value in content.values():
        if isinstance(value, dict):
            changed = _drop_paths(value) or changed
    return changed


def _missing_files(folder: Path, kind: str) -> list[Problem]:
    """Files without which the publication cannot be used by its one-line example."""
    if kind == "dataset":
        return []
    needed = {"full": ["config.json"], "adapter": ["adapter_config.json"], "projector": ["projector_config.json"]}[
        kind
    ]
    if kind != "projector":
        needed += ["processor_config.json"]
    problems = [
        Problem(name, 0, "is missing; save the processor beside the weights (processor.save_pretrained).")
        for name in needed
        if not (folder / name).is_file()
    ]
    if not any(folder.glob("*.safetensors")):
        problems.append(Problem("*.safetensors", 0, "there are no weights; save them as safetensors."))
    if kind == "full" and not any(folder.glob("chat_template*")):
        problems.append(
            Problem("chat_template.jinja", 0, "is missing; the model does not know how questions are asked.")
        )
    return problems


__all__ = ["Publication", "gather", "push"]
