from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_onnx import write_tiny_onnx

from paqdetr.cli import run
from paqdetr.errors import ConfigError, DataError
from paqdetr.metrics.coco import read_results
from paqdetr.runtime import open_exported
from paqdetr.serving.ray_predict import _Files, _require_same_plan, list_images_of, read_shards, shard_of

pytest.importorskip("ray")
pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def pictures(folder: Path, count: int, side: int = 24) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = [folder / f"{i:03d}.png" for i in range(count)]
    for path in paths:
        color = random.integers(40, 255, 3)
        Image.fromarray((np.ones((side, side + 8, 3)) * color).astype(np.uint8)).save(path)
    return paths


def test_pictures_of_folders_lists_and_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [str(path) for path in pictures(tmp_path / "a" / "b", 3)]
    (tmp_path / "a" / "._000.png").write_bytes(b"x")
    for name in ("note.txt", "table.parquet", ".hidden.png", "film.mp4"):
        (tmp_path / "a" / name).write_text("x")
    pictures(tmp_path / "a" / ".thumbnails", 1)
    assert list_images_of(str(tmp_path / "a")) == paths
    assert caplog.messages == [
        f"{tmp_path}/a: videos are left out: 1, such as {tmp_path}/a/film.mp4",
        f"{tmp_path}/a: Parquet files beside pictures are left out: 1, such as {tmp_path}/a/table.parquet",
    ]
    text = tmp_path / "list.txt"
    text.write_text("a/b/000.png\r\n\n" + paths[0] + "\ns3://bucket/x.jpg\n" + paths[2], encoding="utf-8-sig")
    wanted = [paths[0], "s3://bucket/x.jpg", paths[2]]  # each once
    assert list_images_of(str(text)) == wanted
    parquet.write_table(pa.table({"n": [1, 2, 3], "path": ["a/b/000.png", *wanted[1:]]}), tmp_path / "list.parquet")
    assert list_images_of(str(tmp_path / "list.parquet")) == wanted
    (tmp_path / "many").mkdir()
    parquet.write_table(pa.table({"image": wanted}), tmp_path / "many" / "1.parquet")
    assert list_images_of(str(tmp_path / "many")) == wanted
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/x/1.jpg", b"1")
    store.pipe_file("/bucket/2.JPG", b"2")
    store.pipe_file("/bucket/3.avif", b"3")
    assert list_images_of("memory://bucket") == [
        "memory:///bucket/2.JPG",
        "memory:///bucket/3.avif",
        "memory:///bucket/x/1.jpg",
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no.txt", None, "no such file or folder"),
        ("empty.txt", b"\n\n", "names no pictures"),
        ("binary.txt", b"\xff\xfe\x00", "no UTF-8 text"),
        ("broken.parquet", b"PAR1", "not readable as Parquet"),
    ],
)
def test_lists_of_no_use(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        list_images_of(str(tmp_path / name))
    parquet.write_table(pa.table({"url": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"has the columns url \(string\)"):
        list_images_of(str(tmp_path / "other.parquet"))
    contents = pa.array([{"bytes": b"x", "path": "a.png"}])  # as `datasets` has pictures
    parquet.write_table(pa.table({"image": contents}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"has the columns image \(struct"):
        list_images_of(str(tmp_path / "other.parquet"))
    paths = pa.array(["/a.png"]).dictionary_encode()
    parquet.write_table(pa.table({"image": contents, "path": paths}), tmp_path / "other.parquet")
    assert list_images_of(str(tmp_path / "other.parquet")) == ["/a.png"]


def test_a_shard_holds_what_eval_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, paths = open_exported(write_tiny_onnx(tmp_path / "m.onnx")), pictures(tmp_path / "images", 3)
    found = model.predict(paths)
    rows = [(str(p), Image.open(p), f) for p, f in zip(paths, found, strict=True)]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "part-000000.parquet").write_bytes(
        shard_of(iter([*rows[:2], ("gone.png", "no such file", None)]))
    )
    (tmp_path / "shards" / "part-000001.parquet").write_bytes(shard_of(iter(rows[2:])))
    odd = shard_of(iter([("\udcff.png", "\udcff.png: gone", None)]))  # a name that is no UTF-8
    assert parquet.read_table(pa.BufferReader(odd))["image"].to_pylist() == ["\\udcff.png"]
    wanted = []
    for path, detections in zip(paths, found, strict=True):
        detections.file_name, detections.image_id = None, str(path)
        wanted += detections.to_coco()
    assert read_results(tmp_path / "shards") == wanted
    assert "1 of 4 images could not be read and count as images without detections" in caplog.text
    table = parquet.read_table(tmp_path / "shards" / "part-000000.parquet")
    assert table["width"].to_pylist() == [32, 32, None] and table["error"].to_pylist() == [None, None, "no such file"]

    boxes = [
        {"id": n, "image_id": n // 2, "category_id": row["category_id"], "bbox": row["bbox"]}
        for n, row in enumerate(wanted)
    ]
    for box, row in zip(boxes, wanted, strict=True):
        box |= {"image_id": [str(p) for p in paths].index(row["image_id"]), "area": 1.0, "iscrowd": 0}
    truth = {
        "images": [{"id": i, "file_name": path.name, "width": 32, "height": 24} for i, path in enumerate(paths)],
        "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}],
        "annotations": boxes,
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    arguments = ["eval", "--results", str(tmp_path / "shards"), "--annotations", str(tmp_path / "truth.json")]
    assert run([*arguments, "--json", str(tmp_path / "out.json")]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text())["AP"] == pytest.approx(1.0)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not detections in Parquet"):
        read_shards(tmp_path / "bad.parquet")


def test_an_output_belongs_to_one_list_one_model_and_its_settings(tmp_path: Path) -> None:
    files = _Files.at(str(tmp_path / "out"))
    plan = {"model": "a", "list": "b", "how": {"nms": "0.7"}}
    _require_same_plan(files, plan)
    _require_same_plan(files, plan)
    for change, said in (
        ({"model": "c"}, "another model"),
        ({"how": {}}, "other settings"),
        ({"list": "x"}, "another list"),
    ):
        with pytest.raises(ConfigError, match=said):
            _require_same_plan(files, plan | change)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"other files, such as thesis\.tex"):
        _require_same_plan(_Files.at(str(tmp_path / "foreign")), plan)


@pytest.mark.integration
def test_two_workers_of_which_one_is_killed(tmp_path: Path, kill_children: Callable[..., list[int]]) -> None:
    """Nothing is lost, nothing is there twice, and the detections are those of one process; a second call resumes."""
    model = write_tiny_onnx(tmp_path / "m.onnx")
    paths = pictures(tmp_path / "images", 120, side=700)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "paqdetr",
        "predict",
        str(model),
        str(tmp_path / "images"),
        "--output",
        str(output),
    ]
    command += ["--ray", "local", "--workers", "2", "--shard-size", "6", "--threshold", "0.3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed: list[int] = []

    def kill_one() -> None:
        while process.poll() is None and not killed:
            if len(list(output.glob("part-*.parquet"))) >= 2:
                killed.extend(kill_children(process.pid, having="MapWorker"))
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    out, err = process.communicate(timeout=300)
    thread.join()
    assert process.returncode == 2, err
    assert killed and "1 images could not be read" in err and "in 121 images" in out, (killed, out, err)

    def check() -> None:
        shards = sorted(output.glob("part-*.parquet"))
        assert len(shards) == 21
        names = [name for shard in shards for name in parquet.read_table(shard)["image"].to_pylist()]
        assert names == [*map(str, paths), str(tmp_path / "images" / "broken.jpg")]
        wanted = []
        for path, detections in zip(paths, open_exported(model).predict(paths, threshold=0.3), strict=True):
            detections.file_name, detections.image_id = None, str(path)
            wanted += detections.to_coco()
        assert read_results(output) == wanted

    check()
    (output / "part-000003.parquet").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "20 shards were there" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "b", "--output", "out"], "takes one SOURCE"),
        (["a"], "takes one SOURCE"),
        (["no/such/folder", "--output", "out"], "no such file or folder"),
        (["a", "--output", "out", "--save", "yolo"], "--save does not go with --ray"),
        (["a", "--output", "out", "--overwrite"], "--overwrite does not go with --ray"),
        (["a", "--output", "out", "--device", "cuda:1"], "--device cuda:1 does not go with --ray"),
    ],
)
def test_mistakes(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx")
    arguments = [str(tmp_path / word) if word == "out" else word for word in arguments]
    assert run(["predict", str(model), *arguments, "--ray", "local"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--workers", "--shard-size"])
def test_options_of_a_cluster_need_one(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx")
    assert run(["predict", str(model), "a", "--output", str(tmp_path / "out"), option, "2"]) == 2
    assert "give --ray local as well" in capsys.readouterr().err
