"""Detectors on the Hugging Face Hub: a folder of `model.safetensors`, `config.json` (by which the Hub counts downloads) and a
model card, and the way there and back. Nothing in such a folder is code, and nothing of it is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, HfApi, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from paqdetr.checkpoint import read_header
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.files import write_whole
from paqdetr.serialize import plain
from paqdetr.text import printable

if TYPE_CHECKING:
    from paqdetr.models.detector import Detector

WEIGHTS = "model.safetensors"
PREFIX = "hf:"
"""What an address of the Hub begins with: `hf:user/name`, `hf:user/name@revision`."""
# Of the system, and of the library that the client sends its requests with, whichever that is.
_UNREACHABLE = (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class SharedDetector(
    ModelHubMixin, library_name="paqdetr", pipeline_tag="object-detection", tags=["object-detection", "detr"]
):
    """A detector as the Hub's mixin takes it. `Detector.from_pretrained` and the like are the way to it."""

    def __init__(self, model: Detector) -> None:
        self.model = model

    def _save_pretrained(self, save_directory: Path) -> None:
        self.model.save(save_directory / WEIGHTS)
        header = read_header(save_directory / WEIGHTS)
        write_folder(save_directory, header)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: str = "cpu", **where: Any) -> SharedDetector:  # type: ignore[override]
        from paqdetr.models.files import load

        own = {key: where[key] for key in ("revision", "cache_dir", "force_download", "token", "local_files_only")}
        return cls(load(hf_hub_download(model_id, WEIGHTS, **own), device=device))


def from_pretrained(name: str | Path, *, device: str = "cpu", **how: Any) -> Detector:
    """See `Detector.from_pretrained`."""
    if Path(name).exists() or Path(name).suffix == ".safetensors":
        from paqdetr.models.files import load

        if given := [key for key in ("revision", "force_download") if how.get(key)]:
            raise ConfigError(f"{name}: is a path, and {given[0]} is for a model of the Hub", "leave it out")
        return load(name, device=device)
    repo, revision = split_address(str(name))
    if revision and how.setdefault("revision", revision) != revision:
        raise ConfigError(
            f"{name}: names a revision, and revision={how['revision']!r} another", "leave one of them out"
        )
    with hub_errors(repo):
        return SharedDetector.from_pretrained(repo, device=device, **how).model


def write_folder(folder: Path, header: Mapping[str, Any], **about: Any) -> None:
    """config.json and README.md beside weights; `about` goes to `model_card`."""
    config = {"model_type": "paqdetr", **{key: header[key] for key in ("name", "model", "classes", "preprocessing")}}
    for name, text in (("config.json", json.dumps(config, indent=1)), ("README.md", model_card(header, **about))):
        write_whole(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def model_card(
    header: Mapping[str, Any],
    *,
    license: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    repo: str = "user/name",
) -> str:
    """The README of a model.

    Args:
        header: of its checkpoint.
        license: of the weights, as the Hub abbreviates it: apache-2.0, cc-by-4.0, ...
        evaluation: what `paqdetr eval --json` wrote, with `--intervals` if there are any, on the data that its `source` names;
            the metrics of the checkpoint, on its training's validation data, if None.
        repo: where it lies.
    """
    figures = plain(evaluation or header.get("metrics") or {})  # None for NaN, which the Hub does not take
    intervals = (figures.get("intervals") or {}).get("figures") or {}
    intervals = {key: own for key, own in intervals.items() if None not in (own["low"], own["high"])}
    rows = [
        (key, figures[key], intervals.get(key)) for key in ("AP", "AP50", "AP75") if isinstance(figures.get(key), float)
    ]
    data, split, where = _measured_on(evaluation)
    name = repo.rpartition("/")[2] if repo != "user/name" else str(header["name"])
    results = [
        EvalResult(
            task_type="object-detection",
            dataset_type="custom",
            dataset_name=data,
            dataset_split=split,
            metric_type=key,
            metric_value=round(value, 4),
            metric_args={k: i[k] for k in ("low", "high")} if i else None,
        )
        for key, value, i in rows
    ]
    card = ModelCardData(
        library_name="paqdetr",
        pipeline_tag="object-detection",
        license=license,
        tags=["object-detection", "detr", *([] if header["name"].find("paq") < 0 else ["paq-detr"])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    classes = [printable(str(row["name"])).replace("|", "\\|") for row in header["classes"]]
    shown = ", ".join(classes[:100]) + (f" and {len(classes) - 100} more" if len(classes) > 100 else "")
    table = ["| figure | value | 95 % interval |", "|---|---|---|"]
    table += [f"| {k} | {v:.3f} | {'' if not i else '{low:.3f} to {high:.3f}'.format(**i)} |" for k, v, i in rows]
    parts = [
        f"---\n{card.to_yaml()}\n---\n\n# {name}",
        f"An object detector of the architecture `{header['name']}`, trained with paqdetr.",
        f'```python\nimport paqdetr\n\nmodel = paqdetr.load("{PREFIX}{repo}")\n'
        'for found in model.predict("photo.jpg"):\n    print(found.boxes, found.scores, found.labels)\n```',
        *(["## Figures", f"On {where}:", "\n".join(table)] if rows else []),
        f"## Classes\n\n{len(classes)}: {shown}",
    ]
    return "\n\n".join(parts) + "\n"


def _measured_on(evaluation: Mapping[str, Any] | None) -> tuple[str, str | None, str]:
    """Name and split of the data that figures are of, and both in words, with how the model was used."""
    if evaluation is None:
        return "validation data", None, "the validation data of its training"
    source = evaluation.get("source") or {}
    split, path = source.get("split"), Path(source.get("data") or source.get("annotations") or "")
    name = path.parent.name if path.suffix in (".yaml", ".yml") else path.name  # no folders of whoever evaluated it
    if not name:
        return "not named", None, "data that the file of the figures does not name"
    how = [f"the {split} split of {name}" if split else name]
    how += [f"threshold {source['threshold']:g}"] if source.get("threshold") else []
    how += [f"NMS over IoU {source['nms']:g}"] if source.get("nms") is not None else []
    how += ["masks"] if source.get("iou_type") == "segm" else []
    how += [f"{source['max_detections']} detections an image"] if source.get("max_detections", 100) != 100 else []
    how += [f"in tiles of {source['tiles']['size']} pixels"] if source.get("tiles") else []
    return name, split, ", ".join(how)


def fetch(address: str, name: str = WEIGHTS) -> Path:
    """A file of `hf:user/name@revision`, from the cache or the network.

    Raises:
        CheckpointError: there is no such model, file or revision, or it is not in the cache and there is no network.
    """
    repo, revision = split_address(address)
    with hub_errors(repo):
        return Path(hf_hub_download(repo, name, revision=revision))


def split_address(address: str) -> tuple[str, str | None]:
    """`hf:user/name@revision` -> "user/name" and the revision, None if there is none.

    Raises:
        ConfigError: it has another form.
    """
    found = re.fullmatch(r"(?:hf:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if found is None:
        raise ConfigError(f"{address}: not an address of the Hub", "write user/name, or user/name@revision")
    return found[1], found[2]


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder as one commit; the address of the commit.

    Raises:
        CheckpointError: the Hub refuses it, or cannot be reached.
        ConfigError: nobody is logged in, or it is to be private and is public.
    """
    with hub_errors(repo):
        make_repository(repo, private=private)
        api = HfApi(library_name="paqdetr")
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a detector of paqdetr"))


def make_repository(repo: str, *, private: bool | None = None, token: str | bool | None = None) -> None:
    """Make a repository unless it is there, which the Hub leaves as public as it is.

    Raises:
        ConfigError: it is to be private and is public.
    """
    api = HfApi(library_name="paqdetr", token=token)
    made = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(made).private:
        raise ConfigError(
            f"{repo}: is there already, and is public: nothing was uploaded",
            "make it private in its settings on the Hub, choose another name, or do not ask for a private one",
        )


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise ConfigError(f"{repo}: nobody is logged in to the Hub", _LOGIN) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        what = "revision" if isinstance(error, RevisionNotFoundError) else "model, or a private one"
        raise CheckpointError(
            f"{repo}: the Hub has no such {what}", f"check the name; for a private one {_LOGIN}"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise CheckpointError(
            f"{repo}: not in the cache, and the Hub cannot be reached",
            "go online, and unset HF_HUB_OFFLINE if it is set",
        ) from None
    except EntryNotFoundError:
        raise CheckpointError(
            f"{repo}: has no {WEIGHTS}", "name a model that `paqdetr hub push` has uploaded"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ConfigError(f"{repo}: the Hub refuses the request ({status})", _LOGIN) from None
        raise CheckpointError(f"{repo}: the Hub answers {status}: {str(error)[:200]}", "try again later") from None
    except _UNREACHABLE as error:
        raise CheckpointError(f"{repo}: the Hub cannot be reached ({str(error)[:200]})", "check the network") from None
