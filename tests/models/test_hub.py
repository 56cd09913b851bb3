"""The Hub without the Hub: folders, cards, a recording client, and the cache in the form that the client itself writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import paqdetr
from paqdetr.cli import run
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.models import Detector
from paqdetr.models.hub import hub_errors, model_card, split_address
from paqdetr.runs import Run

HUB = "paqdetr.models.hub"


class NoRoute(HfHubHTTPError.__bases__[0]):
    """As the client's HTTP library has them: no errors of the Hub, nor of the system."""


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, request=None, headers={})


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the client would have sent, with the content of every file."""
    calls: list[tuple[str, Any]] = []

    def create_repo(self: HfApi, repo_id: str, **how: Any) -> Any:
        calls.append(("create", (repo_id, how.get("private"))))
        return type("Address", (), {"repo_id": repo_id})

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **how: Any) -> str:
        calls.append(("upload", {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}))
        return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo: SimpleNamespace(private=repo != "me/public"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def test_what_is_saved_is_what_is_loaded(tiny_run: Run, tmp_path: Path) -> None:
    model = paqdetr.load(tiny_run.output)
    model.save_pretrained(tmp_path / "folder")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = Detector.from_pretrained(tmp_path / "folder")
    assert isinstance(again, Detector) and not again.training and again.classes == model.classes
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert paqdetr.load(tmp_path / "folder").classes == model.classes
    assert run(["info", str(tmp_path / "folder")]) == run(["hub", "card", str(tmp_path / "folder")]) == 0
    for path in (tiny_run.output, tiny_run.best):
        assert Detector.from_pretrained(str(path)).classes == model.classes
    with pytest.raises(CheckpointError, match="no such file"):
        Detector.from_pretrained("me/absent.safetensors")
    with pytest.raises(ConfigError, match="is a path, and revision is for a model of the Hub"):
        Detector.from_pretrained(tiny_run.best, revision="v1")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["model_type"] == "paqdetr" and config["name"] == model.name and len(config["classes"]) == 10


def test_push_uploads_weights_card_export_and_preview(
    tiny_run: Run, tiny_digits: Path, tmp_path: Path, uploads: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"onnx")
    (tmp_path / "eval.json").write_text(
        json.dumps({"AP": 0.5, "AP50": 0.75, "intervals": {"figures": {"AP": {"value": 0.5, "low": 0.4, "high": 0.6}}}})
    )
    picture = next((tiny_digits / "test").glob("*.[jp][pn]*g"))
    arguments = ["hub", "push", str(tiny_run.output), "me/digits", "--private", "--license", "cc0-1.0"]
    arguments += [
        "--with",
        str(tmp_path / "m.onnx"),
        "--preview",
        str(picture),
        "--evaluation",
        str(tmp_path / "eval.json"),
    ]
    assert run(arguments) == 0, capsys.readouterr().err
    assert "https://hub/me/digits/commit/1" in capsys.readouterr().out
    (_, created), (_, files) = uploads
    assert created == ("me/digits", True)
    assert sorted(files) == ["README.md", "config.json", "m.onnx", "model.safetensors", "preview.jpg"]
    assert files["model.safetensors"] == tiny_run.best.read_bytes() and files["m.onnx"] == b"onnx"
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (card["library_name"], card["pipeline_tag"], card["license"]) == ("paqdetr", "object-detection", "cc0-1.0")
    [entry] = card["model-index"]
    ap = entry["results"][0]["metrics"][0]
    assert entry["name"] == "digits" and (ap["type"], ap["value"], ap["args"]) == ("AP", 0.5, {"low": 0.4, "high": 0.6})
    assert "| AP | 0.500 | 0.400 to 0.600 |" in files["README.md"].decode()

    uploads.clear()
    paqdetr.load(tiny_run.output).push_to_hub("me/digits", private=True)
    assert uploads[0] == ("create", ("me/digits", True)) and "config.json" in uploads[-1][1]


def test_nothing_private_goes_into_a_public_repository(
    tiny_run: Run, uploads: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The Hub makes none private that is there already, and says nothing."""
    assert run(["hub", "push", str(tiny_run.output), "me/public", "--private"]) == 2
    assert "me/public: is there already, and is public" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is public"):
        paqdetr.load(tiny_run.output).push_to_hub("me/public", private=True)
    assert {kind for kind, _ in uploads} == {"create"}


def test_a_card_of_a_model_without_figures_and_with_odd_names() -> None:
    names = ["a|b", "naïve: yes", "---", "two\nlines", *map(str, range(200))]
    header = {"name": "dino_nano", "classes": [{"id": i, "name": name} for i, name in enumerate(names)]}
    text = model_card({**header, "metrics": {"AP": float("nan")}})
    assert yaml.safe_load(text.split("\n---\n")[0]) == {
        "library_name": "paqdetr",
        "pipeline_tag": "object-detection",
        "tags": ["object-detection", "detr"],
    }
    assert "204: a\\|b, naïve: yes, ---, two\\nlines, 0" in text and "and 104 more" in text and "## Figures" not in text
    unknown = {"AP": {"low": None, "high": None}}  # as json has NaN
    assert "| AP | 0.500 |  |" in model_card(header, evaluation={"AP": 0.5, "intervals": {"figures": unknown}})


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        (None, "not named", "On data that the file of the figures does not name:"),
        ({"data": "sets/street", "split": "test"}, "street", "On the test split of street:"),
        (
            {"data": "x/street/data.yaml", "split": "val", "threshold": 0.25, "nms": 0.7, "tiles": {"size": 640}},
            "street",
            "On the val split of street, threshold 0.25, NMS over IoU 0.7, in tiles of 640 pixels:",
        ),
        ({"results": "r.json", "annotations": "x/truth.json"}, "truth.json", "On truth.json:"),
    ],
)
def test_a_card_names_the_data_of_its_figures(source: dict[str, Any] | None, name: str, said: str) -> None:
    header = {"name": "dino_nano", "classes": [{"id": 1, "name": "car"}], "metrics": {"AP": 0.25}}
    text = model_card(header, evaluation={"AP": 0.5} | ({} if source is None else {"source": source}))
    assert said in text.splitlines() and "validation" not in text and "/home" not in text
    [result] = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    assert (result["dataset"]["name"], result["dataset"].get("split")) == (name, (source or {}).get("split"))
    assert "On the validation data of its training:" in model_card(header)


def test_two_files_of_one_name_are_not_pushed(
    tiny_run: Run, tmp_path: Path, uploads: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("a_f32.onnx", "a_f16.onnx", "again/a_f32.onnx", "model.safetensors")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(file.name.encode())
    push = ["hub", "push", str(tiny_run.output), "me/digits", "--with", str(files[0]), "--with", str(files[1])]
    assert run(push) == 0 and {"a_f32.onnx", "a_f16.onnx"} <= set(uploads.pop()[1])
    uploads.clear()
    for other in files[2:]:
        assert run([*push, "--with", str(other)]) == 2 and not uploads
        assert f"the upload has another file called {other.name}" in capsys.readouterr().err


def fill_cache(cache: Path, weights: Path, repo: str = "me/digits") -> None:
    """As the client leaves a download."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").write_bytes(weights.read_bytes())
    (snapshot / "config.json").write_text("{}")


@pytest.mark.integration
def test_offline_from_the_cache(tiny_run: Run, tmp_path: Path) -> None:
    """The client reads these variables when it is imported: a process of its own."""
    fill_cache(tmp_path / "hub", tiny_run.best)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    code = (
        "import paqdetr, sys\n"
        "one, other = paqdetr.load('hf:me/digits'), paqdetr.models.Detector.from_pretrained('hf:me/digits@main')\n"
        "assert paqdetr.load('hf:me/digits@main').name == one.name == other.name\n"
        "from paqdetr.cli import run\n"
        "assert run(['hub', 'pull', 'me/digits', '--output', sys.argv[1]]) == 0\n"
        "sys.exit(run(['hub', 'pull', 'me/absent', '--output', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: me/absent: not in the cache"), done.stderr
    assert (tmp_path / "m.safetensors").read_bytes() == tiny_run.best.read_bytes()


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (LocalTokenNotFoundError("x"), ConfigError, "nobody is logged in"),
        (RepositoryNotFoundError("x", response=answer(404)), CheckpointError, "no such model"),
        (RevisionNotFoundError("x", response=answer(404)), CheckpointError, "no such revision"),
        (HfHubHTTPError("x", response=answer(401)), ConfigError, r"refuses the request \(401\)"),
        (HfHubHTTPError("x", response=answer(503)), CheckpointError, "answers 503"),
        (ConnectionError("no route"), CheckpointError, "cannot be reached"),
        (NoRoute("no route"), CheckpointError, "cannot be reached"),
    ],
)
def test_what_the_hub_says_becomes_one_line(error: Exception, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"me/x: .*{said}"), hub_errors("me/x"):
        raise error


def test_push_without_a_token(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create_repo(self: HfApi, *args: Any, **how: Any) -> None:
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    assert run(["hub", "push", str(tiny_run.output), "me/digits"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: me/digits: nobody is logged in to the Hub",
        "help: log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    ]


@pytest.mark.parametrize("address", ["digits", "hf:", "a/b/c", "a/b@", "a b/c", "https://huggingface.co/a/b"])
def test_addresses(address: str) -> None:
    assert split_address("hf:me/my.model-2@v1.0") == ("me/my.model-2", "v1.0")
    with pytest.raises(ConfigError, match="not an address of the Hub"):
        split_address(address)


def test_a_space_is_a_program_that_compiles(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "space", str(tiny_run.output), "--output", str(tmp_path / "space")]) == 0
    compile((tmp_path / "space" / "app.py").read_text(), "app.py", "exec")
    assert (tmp_path / "space" / "model.safetensors").read_bytes() == tiny_run.best.read_bytes()
    front = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py"
    assert run(["hub", "space", str(tiny_run.output), "--output", str(tmp_path / "space")]) == 2
    assert run(["hub", "card", str(tiny_run.output), "--evaluation", str(tiny_run.config_file)]) == 2
    for content in ("[1]", "null", "{}"):
        (tmp_path / "no_figures.json").write_text(content)
        capsys.readouterr()
        assert run(["hub", "card", str(tiny_run.output), "--evaluation", str(tmp_path / "no_figures.json")]) == 2
        assert "holds no figures" in capsys.readouterr().err
    assert run(["hub", "card", str(tiny_run.output)]) == 0
    assert capsys.readouterr().out.startswith("---\nlibrary_name: paqdetr\n")
