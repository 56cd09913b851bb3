"""What users get wrong: one line that says what, one that helps, exit code 2, and nothing of theirs is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paqdetr.cli import run
from paqdetr.runs import Run


@dataclass(frozen=True)
class World:
    """What the cases below are made of; everything lies in `root`."""

    root: Path
    data: Path
    checkpoint: Path
    output: Path
    settings: list[str]
    tiny_run: Run

    def unfinished(self) -> Run:
        """A run in `output` that has been stopped at its very end; `resume` continues it."""
        run = Run(Path(shutil.copytree(self.tiny_run.output, self.output)))
        lines = run.metrics_file.read_text().splitlines(keepends=True)
        run.metrics_file.write_text("".join(line for line in lines if '"finished"' not in line))
        return run

    def resume(self, *more: object) -> list[str]:
        return [*self.train("epochs=2", *more), "--resume"]

    def train(self, *more: object, model: str = "paq_dino_nano", **options: object) -> list[str]:
        chosen = {"data": self.data, "output": self.output, "device": "cpu"} | options
        pairs = [str(part) for key, value in chosen.items() for part in (f"--{key}", value)]
        return ["train", model, *self.settings, *map(str, more), *pairs]

    def eval(self, *more: object, checkpoint: object = None) -> list[str]:
        return ["eval", str(checkpoint or self.checkpoint), *map(str, more or ("--data", self.data))]

    def predict(self, *sources: object, checkpoint: object = None, output: object = None) -> list[str]:
        sources = sources or (self.data / "val",)
        target = str(output or self.output)
        return ["predict", str(checkpoint or self.checkpoint), *map(str, sources), "--output", target]

    def edit(self, split: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.data / f"{split}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def file(self, name: str, content: str | bytes = "mine") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@pytest.fixture
def world(tmp_path: Path, tiny_digits: Path, tiny_run: Run, tiny_settings: dict[str, Any]) -> World:
    return World(
        root=tmp_path,
        data=Path(shutil.copytree(tiny_digits, tmp_path / "digits")),
        checkpoint=Path(shutil.copy(tiny_run.best, tmp_path / "model.safetensors")),
        output=tmp_path / "output",
        settings=[f"{key}={value}" for key, value in tiny_settings.items()],
        tiny_run=tiny_run,
    )


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Each takes the world, may break something in it, and gives the arguments; then what the error and the help line say.
Case = tuple[Callable[[World], list[str]], str, str]
CASES: dict[str, Case] = {}
# Found in the middle of a training.
BEGUN = {"image_that_does_not_decode"}


def case(error: str, remedy: str = "") -> Callable[[Callable[[World], list[str]]], Callable[[World], list[str]]]:
    def keep(make: Callable[[World], list[str]]) -> Callable[[World], list[str]]:
        CASES[make.__name__] = (make, error, remedy)
        return make

    return keep


# --------------------------------------------------------------------------------------------------- data


@case("nowhere: no such data folder", "paqdetr data make digits")
def missing_data_folder(w: World) -> list[str]:
    return w.train(data=w.root / "nowhere")


@case("000004.jpg: not an image in a known format", "Replace it, or remove it and its annotations.")
def image_that_does_not_decode(w: World) -> list[str]:
    (w.data / "train" / "000004.jpg").write_text("no image")
    return w.train()


@case("train and val differ: category 11 is 'ten' in ", "same categories")
def validation_with_other_classes(w: World) -> list[str]:
    w.edit("val", lambda content: content["categories"].append({"id": 11, "name": "ten"}))
    return w.train()


@case("train.json it is '0'", "same categories")
def validation_with_a_renamed_class(w: World) -> list[str]:
    w.edit("val", lambda content: content["categories"][0].update(name="zero"))
    return w.train()


@case("val.json: category 1 'zero' does not fit the model: the model calls 1 '0'", "classes the model was trained on")
def evaluation_on_other_classes(w: World) -> list[str]:
    w.edit("val", lambda content: content["categories"][0].update(name="zero"))
    return w.eval()


@case("has no split 'nights', found train, val, test")
def split_that_does_not_exist(w: World) -> list[str]:
    return w.eval("--data", w.data, "--split", "nights")


# ------------------------------------------------------------------------------- a training and its state


@case("patience=3 needs a validation split", "set val_fraction=0.1")
def patience_without_a_validation_split(w: World) -> list[str]:
    (w.data / "val.json").unlink()
    return w.train("patience=3")


@case("accumulate=0")
def accumulation_of_nothing(w: World) -> list[str]:
    return w.train("accumulate=0")


@case("model.safetensors: damaged: its content is not what was written")
def checkpoint_with_a_flipped_bit(w: World) -> list[str]:
    content = bytearray(w.checkpoint.read_bytes())
    content[-1] ^= 1
    w.checkpoint.write_bytes(bytes(content))
    return w.eval()


def change_state(run: Run, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    from paqdetr.checkpoint import read_checkpoint, write_checkpoint

    tensors, header = read_checkpoint(run.state_file)
    change(tensors, header)
    write_checkpoint(run.state_file, tensors, header)


@case("its header is not that of a training state of this version ('position')", "which wrote it")
def state_of_another_version(w: World) -> list[str]:
    change_state(w.unfinished(), lambda tensors, header: header.pop("position"))
    return w.resume()


@case("the run was started with 3 processes, now there are 1", "resume with as many")
def state_of_more_processes(w: World) -> list[str]:
    change_state(
        w.unfinished(),
        lambda tensors, header: tensors.update(
            {f"random.{rank}.cpu": tensors["random.0.cpu"].clone() for rank in (1, 2)}
        ),
    )
    return w.resume()


@case("it is of another model: it lacks")
def state_that_lacks_a_tensor(w: World) -> list[str]:
    run = w.unfinished()
    change_state(run, lambda tensors, header: tensors.pop(next(key for key in tensors if key.startswith("model."))))
    return w.resume()


@case("training_state.safetensors: it is of another model: it lacks")
def checkpoint_in_place_of_the_state(w: World) -> list[str]:
    run = w.unfinished()
    shutil.copy(run.last, run.state_file)
    return w.resume()


@case("the data are not those that the run was started with: train: 4 images removed", "--accept-new-data")
def state_of_other_images(w: World) -> list[str]:
    w.unfinished()

    def halve(content: dict[str, Any]) -> None:
        kept = {row["id"] for row in content["images"][:4]}
        content["images"] = content["images"][:4]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]

    w.edit("train", halve)
    return w.resume()


@case("the run was started with batch_size=4, now it is 2; seed=0, now it is 3", "/output --resume")
def resumption_with_other_settings(w: World) -> list[str]:
    w.unfinished()
    return w.resume("batch_size=2", "seed=3")


@case("output/last.safetensors: a checkpoint, in the place of a setting", "output --resume` goes on with the run")
def resumption_from_a_file(w: World) -> list[str]:
    w.unfinished()
    return [*w.resume(), str(w.output / "last.safetensors")]


@case("output: a checkpoint, in the place of a model", "output --resume` goes on with the run")
def resumption_of_a_folder(w: World) -> list[str]:
    w.unfinished()
    return w.train(model=str(w.output))


@case("--data is not given", "output does not say which it was made with; name the folder of a data set")
def resumption_of_a_run_that_names_no_data(w: World) -> list[str]:
    w.unfinished().environment_file.write_text("[]")
    return ["train", str(w.output), "--resume"]


@case("unknown model or recipe", "`paqdetr config list` lists what there is")
def resumption_of_a_run_that_is_not_there(w: World) -> list[str]:
    return ["train", str(w.output), "--resume"]


@case("a run to go on with, and output is another folder", "leave --output out")
def resumption_into_another_folder(w: World) -> list[str]:
    run = w.unfinished()
    return ["train", str(run.last), "--data", str(w.data), "--output", str(w.root / "other"), "--resume"]


@case("--output is not given", "name a folder for the run; to go on with a run, its folder is enough")
def training_without_output(w: World) -> list[str]:
    return ["train", "dino_nano", "--data", str(w.data), "--resume"]


@case("config.yaml: line 2, column 1: not valid YAML")
def damaged_settings_of_a_run(w: World) -> list[str]:
    w.unfinished().config_file.write_text("name: [paq")
    return w.resume()


@case("file/run")
def output_below_a_file(w: World) -> list[str]:
    return w.train(output=w.file("file") / "run")


@case("--steps", "`paqdetr plan --help`")
def plan_of_no_steps(w: World) -> list[str]:
    return ["plan", "paq_dino_nano", "--data", str(w.data), "--steps", "0"]


@case("train.json: no image has boxes", "paqdetr data check")
def overfitting_without_boxes(w: World) -> list[str]:
    w.edit("train", lambda content: content.update(annotations=[]))
    return ["plan", "paq_dino_nano", *w.settings, "--data", str(w.data), "--device", "cpu", "--overfit", "1"]


# ----------------------------------------------------------------------------------------------- settings


@case("'epochs' is not a setting", "key=value")
def setting_without_a_value(w: World) -> list[str]:
    return w.train("epochs")


@case("model.num_classes=3, and ", "leave model.num_classes out")
def other_number_of_classes_than_the_data_have(w: World) -> list[str]:
    return w.train("model.num_classes=3")


@case("model.safetensors: a checkpoint, in the place of a model", "train MODEL init=")
def checkpoint_in_place_of_the_model(w: World) -> list[str]:
    return w.train(model=str(w.checkpoint))


@case("a checkpoint, in the place of a model", "train MODEL init=")
def run_in_place_of_the_model(w: World) -> list[str]:
    return w.train(model=str(w.tiny_run.output))


@case("broken.yaml: line 2, column 1: not valid YAML")
def broken_settings_file(w: World) -> list[str]:
    return w.train(model=str(w.file("broken.yaml", "model: [1, 2")))


@case("device 'quantum': there is no such kind; expected cpu, cuda, mps, xpu", "--device cpu")
def unknown_device(w: World) -> list[str]:
    return w.train(device="quantum")


# --------------------------------------------------------------------------------------------- checkpoints


@case("nothing: the folder has no checkpoint")
def folder_without_a_checkpoint(w: World) -> list[str]:
    (w.root / "nothing").mkdir()
    return w.predict(checkpoint=w.root / "nothing")


# ------------------------------------------------------------------------------------------------- output


@case("output: the folder holds other files", "--output")
def foreign_folder_in_the_way_of_training(w: World) -> list[str]:
    w.file("output/metrics.jsonl")
    return [*w.train(), "--resume"]


@case("output: the folder holds other files")
def foreign_folder_in_the_way_of_predictions(w: World) -> list[str]:
    w.file("output/000000.jpg")
    return w.predict()


@case("digits: the folder is not empty and holds no digits data", "")
def folder_in_the_way_of_the_digits(w: World) -> list[str]:
    (w.data / "digits.json").unlink()
    return ["data", "make", "digits", "--output", str(w.data)]


@case("holds another edition of the digits: seed=0 (asked for 5)")
def another_edition_in_the_way(w: World) -> list[str]:
    return f"data make digits --size 96 --train 8 --val 4 --test 4 --max-objects 5 --seed 5 --output {w.data}".split()


# ------------------------------------------------------------------------------------------ command line


@case("--threshold", "`paqdetr predict --help`")
def threshold_out_of_range(w: World) -> list[str]:
    return [*w.predict(), "--threshold", "1.5"]


@case("--threshold: expected a number from 0 to 1, found nan", "`paqdetr predict --help`")
def threshold_that_is_no_number(w: World) -> list[str]:
    return [*w.predict(), "--threshold", "nan"]


@case("--output", "`paqdetr analyze --help`")
def missing_option(w: World) -> list[str]:
    return ["analyze", "paq_dino_nano", "--data", str(w.data)]


@case("No such command 'trian'", "`paqdetr --help`")
def unknown_verb(w: World) -> list[str]:
    return ["trian", "paq_dino_nano"]


@case("has no --epochs", "epochs=3")
def unknown_option(w: World) -> list[str]:
    return [*w.train(), "--epochs", "3"]


@case("digits: a folder, where a file is to be written", "name a file")
def figures_into_a_folder(w: World) -> list[str]:
    return w.eval("--data", w.data, "--json", w.data)


@case("the same file as --json", "two files")
def figures_and_results_into_one_file(w: World) -> list[str]:
    return w.eval("--data", w.data, "--json", w.root / "a.json", "--results-out", f"{w.root}/./a.json")


@case("st.txt: the picture is a PNG", ".png")
def statistics_as_text(w: World) -> list[str]:
    return ["data", "stats", str(w.data), "--output", str(w.root / "st.txt")]


@case("--resamples", "`paqdetr eval --help`")
def too_few_resamples(w: World) -> list[str]:
    return w.eval("--data", w.data, "--intervals", "--resamples", "1")


@case("no model is called 'yolo*'", "`paqdetr models`")
def pattern_without_a_model(w: World) -> list[str]:
    return ["models", "yolo*"]


@case("there is no recipe for a data set 'letters'")
def unknown_data_set(w: World) -> list[str]:
    return ["data", "make", "letters", "--output", str(w.output)]


@case("size")
def too_small_digits(w: World) -> list[str]:
    return ["data", "make", "digits", "--size", "1", "--output", str(w.output)]


@case("eval takes a MODEL or --results or --compare, found none of them")
def nothing_to_evaluate(w: World) -> list[str]:
    return ["eval", "--data", str(w.data)]


@case("eval MODEL needs --data")
def evaluation_without_data(w: World) -> list[str]:
    return ["eval", str(w.checkpoint)]


@case("--split test is of --data, which is not given", "give --data, or leave --split out")
def split_without_data(w: World) -> list[str]:
    return [
        "eval",
        "--results",
        str(w.file("results.json", "[]")),
        "--annotations",
        str(w.data / "val.json"),
        "--split",
        "test",
    ]


@case("eval --results needs the ground truth, once", "--annotations, or --data")
def results_without_annotations(w: World) -> list[str]:
    return ["eval", "--results", str(w.file("results.json", "[]"))]


@case("--iou-type and --annotations go with --results")
def masks_of_a_checkpoint(w: World) -> list[str]:
    return w.eval("--data", w.data, "--iou-type", "segm")


@case("--iou-type: expected bbox or segm, found 'oks'")
def unknown_iou_type(w: World) -> list[str]:
    results, truth = str(w.file("results.json", "[]")), str(w.data / "val.json")
    return ["eval", "--results", results, "--annotations", truth, "--iou-type", "oks"]


@case("train.json: found a json dict, expected a list of detections")
def annotations_in_place_of_results(w: World) -> list[str]:
    return ["eval", "--results", str(w.data / "train.json"), "--annotations", str(w.data / "train.json")]


@case("image_id 'a.jpg' is none of the 4 images")
def results_of_other_images(w: World) -> list[str]:
    row = {"image_id": "a.jpg", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    results = w.file("results.json", json.dumps([row]))
    return ["eval", "--results", str(results), "--annotations", str(w.data / "val.json")]


@case("other.json: result number 0: image_id 'a.jpg' is none of the 4 images")
def comparison_with_results_of_other_images(w: World) -> list[str]:
    row = {"image_id": "a.jpg", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    pair = [w.file("results.json", "[]"), w.file("other.json", json.dumps([row]))]
    return ["eval", "--compare", *map(str, pair), "--annotations", str(w.data / "val.json")]


@case("eval --compare needs the ground truth, once", "--annotations if both are results")
def comparison_without_truth(w: World) -> list[str]:
    return ["eval", "--compare", str(w.checkpoint), str(w.checkpoint)]


@case("model.safetensors: a model needs --data")
def comparison_of_a_checkpoint_with_annotations(w: World) -> list[str]:
    results, truth = w.file("results.json", "[]"), w.data / "val.json"
    return ["eval", "--compare", str(results), str(w.checkpoint), "--annotations", str(truth)]


@case("--iou-type segm compares results files")
def comparison_of_masks_of_checkpoints(w: World) -> list[str]:
    pair = [str(w.checkpoint)] * 2
    return ["eval", "--compare", *pair, "--data", str(w.data), "--iou-type", "segm"]


@case("the option --data stands in the place of one", "--compare A B")
def comparison_of_one_file(w: World) -> list[str]:
    return ["eval", "--compare", str(w.checkpoint), "--data", str(w.data)]


@case("--compare, found MODEL ", "give one of them")
def evaluation_and_results(w: World) -> list[str]:
    return w.eval("--results", w.root / "r.json", "--data", w.data)


@case("eval takes a MODEL or --results or --compare")
def evaluation_and_comparison(w: World) -> list[str]:
    return w.eval("--compare", w.checkpoint, w.checkpoint, "--data", w.data)


@case("--results-out keeps the detections of a MODEL")
def results_kept_of_results(w: World) -> list[str]:
    kept = ["--annotations", str(w.data / "val.json"), "--results-out", str(w.root / "kept.json")]
    return ["eval", "--results", str(w.file("results.json", "[]")), *kept]


@case("nowhere.jpg: no such file")
def missing_picture(w: World) -> list[str]:
    return w.predict(w.root / "nowhere.jpg")


@case("pictures: the folder holds no images")
def folder_without_pictures(w: World) -> list[str]:
    (w.root / "pictures").mkdir()
    return w.predict(w.root / "pictures")


@case("none of 1 images could be read; the first: ")
def no_readable_picture(w: World) -> list[str]:
    return w.predict(w.file("bad.png"))


@pytest.mark.parametrize("name", CASES)
def test_mistake(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    make, error, remedy = CASES[name]
    arguments = make(world)
    before = snapshot(world.root)
    assert run(arguments) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    helps = [line for line in lines if line.startswith("help: ")]
    assert len(errors) == 1 and len(helps) == 1, said.err
    assert error in errors[0] and remedy in helps[0], said.err
    assert lines[-2:] == [errors[0], helps[0]]  # on one line each, and the last thing said
    assert "Traceback" not in said.err + said.out and "\\[" not in said.err
    if arguments[0] == "train" and world.output.is_dir():
        assert any(world.output.iterdir())  # no empty folder of a run
    after = snapshot(world.root)
    assert {path: after.get(path) for path in before} == before
    new = {path.name for path in after.keys() - before.keys()}
    # Only a training that had begun leaves something: what --resume needs.
    begun = {".lock", "config.yaml", "environment.json", "metrics.jsonl", "training_state.safetensors"}
    assert new <= (begun if name in BEGUN else set())
