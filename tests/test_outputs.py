"""Nothing is overwritten but what this program wrote, and what it writes appears whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest
from PIL import Image

from paqdetr.errors import ConfigError, StorageError
from paqdetr.files import unfinished
from paqdetr.outputs import (
    RESULTS,
    made_by,
    require_free,
    require_replaceable,
    whole_folder,
    write_json,
    write_output,
    write_picture,
)

MAKER = "paqdetr test"
ROW = {
    "image_id": 1,
    "file_name": "a]b.jpg",
    "category_id": 3,
    "category_name": 'a "cat"',
    "bbox": [0.0, 1.5, 2.0, 3.25],
    "score": 0.5,
}
PICTURE = Image.new("RGB", (64, 48), "red")


def foreign(path: Path) -> None:
    """A file of the same kind, from another program."""
    if path.suffix == ".json":
        path.write_text('{"made_by": "somebody", "images": []}', encoding="utf-8")
    else:
        PICTURE.save(path, comment=b"paqdetr is a fine program", format="JPEG")


@pytest.mark.parametrize("name", ["a.json", "a.png", "a.jpg"])
def test_what_wrote_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".json":
        write_json(path, {"AP": 0.5}, maker=MAKER)
        assert json.loads(path.read_text())["AP"] == 0.5
    else:
        write_picture(path, PICTURE, maker=MAKER)
        with Image.open(path) as opened:
            assert opened.size == (64, 48) and opened.format == {"png": "PNG", "jpg": "JPEG"}[name[2:]]
    assert made_by(path) == MAKER
    require_replaceable(path, MAKER)
    with pytest.raises(ConfigError, match="`paqdetr other` did not write it"):
        require_replaceable(path, "paqdetr other")
    foreign(path)
    assert made_by(path) is None


def test_a_jpeg_is_as_large_as_jpeg_allows(tmp_path: Path) -> None:
    for name, size in (("a.jpg", (65_500, 8)), ("a.png", (70_000, 9))):
        write_picture(tmp_path / name, Image.new("RGB", (70_000, 9)), maker=MAKER)
        assert Image.open(tmp_path / name).size == size


def test_results_are_known_by_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for rows in ([], [ROW], [ROW] * 1000):
        write_json(path, rows, maker=RESULTS)
        assert json.loads(path.read_text()) == rows and made_by(path) == RESULTS
    assert len(path.read_text().splitlines()) == 1002
    for rows in ([{**ROW, "area": 3}], [{key: ROW[key] for key in list(ROW)[:4]}], [3], ROW, [[ROW]]):
        path.write_text(json.dumps(rows))
        assert made_by(path) is None
    for text in ("", "[", "[{", '[{"image_id": ', "\x00" * 10):
        path.write_text(text)
        assert made_by(path) is None


@pytest.mark.parametrize("content", [b"mine", b'{"images": []}', b"[1]", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_a_file_of_somebody_else_is_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"out\.json: the file exists") as caught:
        write_json(path, {"AP": 1}, maker=MAKER)
    assert "--overwrite" in caught.value.remedy
    assert path.read_bytes() == content
    write_json(path, {"AP": 1}, maker=MAKER, overwrite=True)
    assert json.loads(path.read_text())["AP"] == 1


def test_an_empty_file_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "tmp.XXXX").touch()  # as mktemp makes it
    write_json(tmp_path / "tmp.XXXX", {"AP": 1}, maker=MAKER)
    assert made_by(tmp_path / "tmp.XXXX") == MAKER


def test_links(tmp_path: Path) -> None:
    """The file behind a link is what is looked at, and what is written."""
    mine, link = tmp_path / "mine.json", tmp_path / "latest.json"
    mine.write_text("[1]")
    link.symlink_to(mine)
    with pytest.raises(ConfigError, match="the file exists"):
        write_json(link, {}, maker=MAKER)
    mine.unlink()
    with pytest.raises(ConfigError, match="the file exists"):  # a link to nowhere
        write_json(link, {}, maker=MAKER)
    write_json(link, {}, maker=MAKER, overwrite=True)
    assert link.is_symlink() and made_by(mine) == MAKER


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"AP": 1}, maker=MAKER)
    reader.join(60)
    assert json.loads(read[0])["AP"] == 1 and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_that_is_full() -> None:
    link = Path("/dev/full")
    if not link.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(StorageError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write_json(link, {"AP": 1}, maker=MAKER)
    assert stat.S_ISCHR(link.stat().st_mode)  # and is still there


def test_places_where_nothing_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, found in (
        (tmp_path, "a folder, where a file is to be written"),
        (tmp_path / "file" / "x.json", "is a file, not a folder"),
        (tmp_path / "file" / "deep" / "x.json", "is a file, not a folder"),
    ):
        with pytest.raises(ConfigError, match=found):
            require_replaceable(path, MAKER, overwrite=True)
    for path in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(ConfigError, match="file"):
            require_free(path, lambda file: True)
    require_replaceable(tmp_path / "new" / "deep" / "x.json", MAKER)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("before")

    def fail(place: Path) -> None:
        place.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"out\.txt: cannot be written \(No space left on device\)"):
        write_output(path, fail, maker=MAKER, overwrite=True)
    assert path.read_text() == "before" and [entry.name for entry in tmp_path.iterdir()] == ["out.txt"]


# ------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_whole(tmp_path: Path, there: bool) -> None:
    output = tmp_path / "out"
    if there:
        output.mkdir()
    with whole_folder(output) as fresh:
        (fresh / "a.txt").write_text("a")
        assert list(output.iterdir()) == [] if there else not output.exists()
    assert (output / "a.txt").read_text() == "a" and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    assert output.stat().st_mode == (tmp_path / "other").stat().st_mode  # as the umask says
    with pytest.raises(StorageError, match=r"out: cannot be written \(Directory not empty\)"), whole_folder(output):
        pass
    assert (output / "a.txt").read_text() == "a"


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_fails_is_gone(tmp_path: Path, replace: bool) -> None:
    output = tmp_path / "out"
    if replace:
        output.mkdir()
        (output / "old.txt").write_text("old")
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space"), StorageError)):
        with pytest.raises(expected), whole_folder(output, replace=replace) as fresh:
            (fresh / "a.txt").write_text("a")
            raise error
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "old.txt"] if replace else [])


def test_a_replaced_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with whole_folder(tmp_path / "out", replace=True) as fresh:
        (fresh / "new.txt").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new.txt"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_cannot_be_renamed_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """Such as a volume that a container has mounted there."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "lost+found").mkdir()
    (output / "a.txt").write_text("old")
    require_free(output, lambda file: file.name == "a.txt")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == output)
    if not replace:
        (output / "a.txt").unlink()
    identity = output.stat().st_ino
    with whole_folder(output, replace=replace) as fresh:
        (fresh / "a.txt").write_text("a")
        (fresh / "deep").mkdir()
    assert output.stat().st_ino == identity
    assert sorted(path.name for path in output.iterdir()) == ["a.txt", "deep", "lost+found"]
    assert (output / "a.txt").read_text() == "a"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / ".paqdetr-killed.tmp" / "out").mkdir(parents=True)
    with unfinished(output) as alive:
        alive.mkdir()
        with whole_folder(output) as fresh:
            (fresh / "a.txt").touch()
        assert alive.is_dir()  # another process that makes the same
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_files(tmp_path: Path) -> None:
    for name in (".DS_Store", "deep/a.txt", "deep/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"holds other files, such as deep/a\.txt"):
        require_free(tmp_path)
    require_free(tmp_path, lambda file: file.name == "a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="such as empty"):
        require_free(tmp_path, lambda file: file.name == "a.txt")
