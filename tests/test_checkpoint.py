from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from paqdetr._version import __version__
from paqdetr.checkpoint import load_tensors, read_checkpoint, read_header, write_checkpoint
from paqdetr.errors import CheckpointError, StorageError
from paqdetr.files import remove_leftovers, write_whole

TENSORS = {
    "float": torch.tensor([[1.5, -0.0], [float("inf"), 1e-42]]),
    "half": torch.randn(3).bfloat16(),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "strided": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "folder" / "model.safetensors"
    write_checkpoint(path, TENSORS, {"name": "häuschen", "metrics": {"AP": 0.5, "APs": None}})
    return path


def test_round_trip_bit_for_bit(file: Path) -> None:
    tensors, header = read_checkpoint(file)
    assert set(tensors) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key], tensor), key
    assert torch.signbit(tensors["float"][0, 1])  # minus zero
    assert header == {"name": "häuschen", "metrics": {"AP": 0.5, "APs": None}, "version": __version__}
    assert read_header(file) == header


def test_any_safetensors_reader_shows_it(file: Path) -> None:
    with safe_open(file, framework="numpy") as opened:
        assert set(opened.keys()) == set(TENSORS)
        assert '"AP": 0.5' in opened.metadata()["paqdetr"]
        assert opened.get_tensor("flags").tolist() == [True, False]


def test_nothing_is_left_beside_the_file(file: Path) -> None:
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(StorageError, match=r"safetensors: cannot be written \(No space left on device\)"):
        write_checkpoint(file, {"other": torch.zeros(2)}, {})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_header_that_json_refuses_leaves_the_old_file(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(TypeError):
        write_checkpoint(file, TENSORS, {"metrics": torch.zeros(2)})
    assert file.read_bytes() == before


@pytest.mark.parametrize("place", ["tensors", "header"])
def test_what_was_damaged_is_noticed(file: Path, place: str) -> None:
    """One bit, which safetensors itself does not mind."""
    content = bytearray(file.read_bytes())
    content[-1 if place == "tensors" else content.index(b"0.5")] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged: its content is not what was written"):
        read_checkpoint(file)


def test_a_file_without_a_hash_is_read(file: Path) -> None:
    """As versions before the hash wrote it."""
    with safe_open(file, framework="pt") as opened:
        metadata = {"paqdetr": opened.metadata()["paqdetr"]}
    save_file({key: tensor.contiguous() for key, tensor in TENSORS.items()}, file, metadata=metadata)
    assert read_checkpoint(file)[0].keys() == TENSORS.keys()


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    for read in (read_checkpoint, read_header):
        with pytest.raises(CheckpointError) as caught:
            read(file)
        assert caught.value.message.startswith(f"{file}: not a readable safetensors file")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is a folder, expected a file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="a pickle, which this program does not open"):
        read_checkpoint(path)
    renamed = path.rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_checkpoint(renamed)


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        (
            "a.jpg",
            "a picture, in the place of a model",
            "give a run's folder or a .safetensors file first, then pictures",
        ),
        ("config.yaml", "settings, which hold no weights", "give the run's folder or a .safetensors file"),
        ("run/config.yaml", "settings, which hold no weights", "give the run's folder: {path.parent}"),
        ("m.onnx", "an exported model, where a checkpoint is needed", "give the checkpoint that it was exported from"),
        ("notes.txt", "not a readable safetensors file", "give a run's folder or a .safetensors file"),
        ("x.safetensors", "not a readable safetensors file", "copy or train it again"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, name: str, message: str, remedy: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/best.safetensors").touch()
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: {message}")
    assert caught.value.remedy == remedy.format(path=path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "safetensors without a paqdetr header"),
        ({"format": "pt"}, "safetensors without a paqdetr header"),
        ({"paqdetr": "{no json"}, "its paqdetr header: no valid json at line 1, column 2"),
        ({"paqdetr": "[]"}, "its paqdetr header is a list, expected an object"),
        ({"paqdetr": "null"}, "its paqdetr header is a NoneType, expected an object"),
        ({"paqdetr": "7"}, "its paqdetr header is a int, expected an object"),
        ({"paqdetr": "[" * 10**5}, "its paqdetr header: the json is nested too deeply"),
        ({"paqdetr": "1" * 5000}, "its paqdetr header: no usable json"),
        ({"paqdetr": '{"name": 1, "name": 2}'}, "has the key 'name' twice"),
    ],
)
def test_safetensors_of_another_program(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is a pipe, expected a file"):
        read_header(tmp_path / "x.safetensors")


def test_load_tensors() -> None:
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    load_tensors(module, other.state_dict(), "x")
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(3, 2)}, "file: it is of another model: it lacks bias"),
        ({}, "it lacks weight, bias"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "extra": torch.zeros(1)}, "it has unknown extra"),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)},
            "it has another shape for weight (2, 2) instead of (3, 2)",
        ),
        (
            {"weight": torch.zeros(3, 2, dtype=torch.int64), "bias": torch.zeros(3)},
            "it has values of another type for weight (torch.int64 instead of torch.float32)",
        ),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(3, dtype=torch.bool)},
            "it has values of another type for bias (torch.bool",
        ),
        ({"weight": torch.zeros(3, 2, dtype=torch.complex64), "bias": torch.zeros(3)}, "another type for weight"),
        ({"weight": torch.zeros(3, 2).to_sparse(), "bias": torch.zeros(3)}, "another type for weight"),
        ({"weight": torch.zeros(3, 2, device="meta"), "bias": torch.zeros(3)}, "another type for weight"),
    ],
)
def test_load_tensors_of_another_model(tensors: dict[str, torch.Tensor], message: str) -> None:
    module = nn.Linear(2, 3)
    before = module.weight.detach().clone()
    with pytest.raises(CheckpointError) as caught:
        load_tensors(module, tensors, "file")
    assert message in caught.value.message
    assert torch.equal(module.weight, before)  # all or nothing


def test_a_long_list_is_cut_short() -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(CheckpointError, match=r"lacks 0\.weight, 0\.bias, 1\.weight and 5 more"):
        load_tensors(module, {}, "file")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_any_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_checkpoint(tmp_path / "model.safetensors", TENSORS, {})
        write_whole(tmp_path / "a.json", lambda path: path.write_text("{}"))
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "model.safetensors": mode,
        "a.json": mode,
    }


WRITER = """
import sys, time
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from paqdetr.files import write_whole

def write(path):
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(120)

write_whole(Path(sys.argv[1]), write)
"""


@pytest.mark.integration
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no such locks on Windows")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        (unfinished,) = tmp_path.iterdir()
        remove_leftovers(tmp_path)
        assert (unfinished / "a.json").read_text() == "half"
        writer.kill()
    for name in (".notes.tmp", "mine.tmp", ".paqdetr.yaml"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", ".paqdetr.yaml", "mine.tmp"]


TRIED = """
import os, sys
from paqdetr.checkpoint import read_header
from paqdetr.errors import CheckpointError
if os.getuid() == 0:  # root may read everything
    os.setuid(65534)
for path in sys.argv[1:]:
    try:
        read_header(path)
    except CheckpointError as error:
        print(error.message.removeprefix(path))
"""


@pytest.mark.integration
@pytest.mark.skipif(os.name == "nt", reason="permissions of another kind")
def test_a_checkpoint_without_the_right_to_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a private folder
        folder = Path(name)
        folder.chmod(0o755)
        private = folder / "private"
        for place in (folder, private):
            write_checkpoint(place / "model.safetensors", TENSORS, {})
        (folder / "model.safetensors").chmod(0)
        private.chmod(0)
        paths = [folder / "model.safetensors", private / "model.safetensors", folder / "none.safetensors"]
        command = [sys.executable, "-c", TRIED, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    refused = ": cannot be read: Permission denied"
    assert done.stdout.splitlines() == [refused, refused, ": no such file"]
