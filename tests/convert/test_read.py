import argparse
import contextlib
import json
import os
import pathlib
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from paqdetr.config.model import problem_of
from paqdetr.convert.conversion import LAYOUTS, _label_names
from paqdetr.convert.keymap import Layout
from paqdetr.convert.read import read_source
from paqdetr.convert.target import _hinted, _require
from paqdetr.errors import CheckpointError

WEIGHTS = {"a.weight": torch.tensor([1.0]), "b.bias": torch.tensor([2.0])}


def _equal(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


class _Evil:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_code_is_refused_and_nothing_runs(tmp_path: Path, legacy: bool) -> None:
    path, trap = tmp_path / "evil.pth", tmp_path / "trap"
    torch.save({"model": WEIGHTS, "x": _Evil(trap)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError, match=r"evil\.pth: it holds more than tensors: \w+\.mkdir, which could run code"
    ):
        read_source(path)
    assert not trap.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_arguments_of_the_command_line_are_read_as_values(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.pth"
    arguments = argparse.Namespace(nheads=8, output_dir=Path("out"), lr=np.float64(1e-4), names=["a"])
    torch.save(
        {"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 3, "args": arguments},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    source = read_source(path)
    assert _equal(source.tensors)
    assert source.hints["nheads"] == 8
    assert PurePosixPath(source.hints["output_dir"]) == PurePosixPath("out")


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath"])
def test_paths_of_any_python_and_system(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.13 alone pickles its paths as of `pathlib._local`."""
    own = getattr(pathlib, kind)

    class Pickled:
        def __reduce__(self) -> tuple[type, tuple[str]]:
            return own, ("out",)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, pathlib)
        patch.setattr(own, "__module__", module)
        torch.save({"model": WEIGHTS, "args": argparse.Namespace(output_dir=Pickled())}, tmp_path / "x.pth")
    source = read_source(tmp_path / "x.pth")
    assert _equal(source.tensors) and str(source.hints["output_dir"]) == "out"


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for wrapped in (
        WEIGHTS,
        {"model": {f"module.{key}": value for key, value in WEIGHTS.items()}},
        {"state_dict": {f"_orig_mod.{key}": value for key, value in WEIGHTS.items()}},
    ):
        torch.save(wrapped, path)
        assert _equal(read_source(path).tensors)


def test_one_of_two_sets_of_weights_is_taken_and_the_other_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    other = {key: value + 1 for key, value in WEIGHTS.items()}
    torch.save({"ema_model": other, "model": WEIGHTS}, path)
    source = read_source(path)
    assert _equal(source.tensors)
    assert "weights=ema_model" in source.notes[0]
    assert read_source(path, weights="ema_model").tensors["a.weight"].item() == 2
    with pytest.raises(CheckpointError, match="no weights under 'teacher'"):
        read_source(path, weights="teacher")


def test_a_folder_with_one_file_or_with_an_index(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"d_model": 64}))
    save_file(WEIGHTS, whole / "model.safetensors")
    for i, key in enumerate(WEIGHTS):
        save_file({key: WEIGHTS[key]}, parts / f"model-{i}.safetensors")
    index = {"weight_map": {key: f"model-{i}.safetensors" for i, key in enumerate(WEIGHTS)}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in (whole, parts):
        source = read_source(folder)
        assert _equal(source.tensors)
        assert source.hints == {"d_model": 64}
    (parts / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: the index names it"):
        read_source(parts)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    (folder / "config.json").write_text("{}")
    index = {"weight_map": dict.fromkeys(WEIGHTS, "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no file name"):
        read_source(folder)


def test_a_pickle_in_a_folder_is_read_as_carefully(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert _equal(read_source(tmp_path).tensors)
    torch.save({**WEIGHTS, "x": _Evil(tmp_path / "trap")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        read_source(tmp_path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "not a checkpoint that torch can read"),
        (b"", "not a checkpoint that torch can read"),
        (b"model: dino\nlr: 1\n", "not a checkpoint that torch can read"),
        (b"(\x80\x02.", "not a checkpoint that torch can read"),
        (b"\x80\x02\xff.", "not a checkpoint that torch can read"),
        (b"\x80\x02t.", "not a checkpoint that torch can read"),
        (b"\x80\x02K\x01.", "not a checkpoint that torch can read|expected a dict"),
        (b"\x80\x04\x8d" + b"\xff" * 8, "not a checkpoint that torch can read"),
        (b"PK\x03\x04" + b"\0" * 40, "not a checkpoint that torch can read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.pth: {message}"):
        read_source(path)


@given(content=st.binary(max_size=80), head=st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"PK\x03\x04"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_any_bytes_are_weights_or_one_line(tmp_path: Path, content: bytes, head: bytes) -> None:
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(head + content)
        with contextlib.suppress(CheckpointError):
            assert read_source(tmp_path / name).tensors


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (INDEX, "{}", "weight_map is None, expected the file of each tensor"),
        (INDEX, '{"weight_map": null}', "weight_map is None"),
        (INDEX, '{"weight_map": []}', r"weight_map is \[\]"),
        (INDEX, '{"weight_map": {}}', r"weight_map is \{\}"),
        (INDEX, '{"weight_map": {"a": null}}', r"weight_map is \{'a': None\}"),
        (INDEX, '{"weight_map": {"a": [1]}}', r"weight_map is \{'a': \[1\]\}"),
        (INDEX, "[]", "expected a json object"),
        (INDEX, "{", "no valid json at line 1, column 2"),
        (INDEX, "[" * 10**5, "nested too deeply"),
        ("config.json", "[1]", "expected a json object"),
        ("config.json", '{"a": 1, "a": 2}', "has the key 'a' twice"),
        ("config.json", "\xff", "no UTF-8 text"),
    ],
)
def test_json_beside_weights_that_is_malformed(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_source(tmp_path)
    assert file in caught.value.message and len(caught.value.message) < 300


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_settings_beside_weights_fit_or_are_one_line(layout: Layout, data: st.DataObject) -> None:
    keys = st.sampled_from([*layout.hints, *layout.required, "id2label", "two_stage_num_proposals"])
    values = VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(st.text(max_size=2), VALUES, max_size=2)
    hints = data.draw(st.dictionaries(keys, values, max_size=4))
    with contextlib.suppress(CheckpointError):
        _require(layout, hints, "x")
        for key, value in _hinted(layout, hints, "x").items():
            assert not problem_of(key, value)
    with contextlib.suppress(CheckpointError):
        assert _label_names(hints, "x") is None or isinstance(hints["id2label"], dict)


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"encoder_attention_heads": [8]}, r"x: encoder_attention_heads=\[8\]: Input should be a valid integer"),
        ({"encoder_attention_heads": None}, "x: encoder_attention_heads=None: Input"),
        ({"decoder_n_points": True}, "x: decoder_n_points=True: Input"),
        ({"dropout": "0.1"}, "x: dropout='0.1': Input should be a valid number"),
        ({"dropout": 2}, "x: dropout=2: Input should be less than 1"),
        ({"encoder_n_points": 10**9}, "x: encoder_n_points=1000000000: Input should be less than or equal to 256"),
        ({"encoder_n_points": 4, "decoder_n_points": 2}, "encoder_n_points=4 and decoder_n_points=2"),
    ],
)
def test_settings_beside_weights_that_cannot_be(hints: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _hinted(LAYOUTS["transformers"], hints, "x")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "config.json", INDEX, "model.safetensors"])
def test_pipes_are_not_waited_for(tmp_path: Path, name: str) -> None:
    if name != "config.json":
        (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError):
        read_source(tmp_path / name if name.startswith("x") else tmp_path)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": {"a": torch.randn(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"x\.pth: not a checkpoint that torch can read"):
        read_source(path)


def test_files_without_weights_say_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"epoch": 3, "loss": 0.5}, path)
    with pytest.raises(CheckpointError, match="no weights under model, state_dict, ema_model; it holds epoch, loss"):
        read_source(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="expected a dict of tensors, found list"):
        read_source(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_source(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"a folder without config\.json"):
        read_source(tmp_path)
