import json
from pathlib import Path

import pytest

from paqdetr.convert.classes import COCO, class_slots
from paqdetr.errors import CheckpointError, UserError

MISSING_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_coco_has_80_categories_with_gaps_in_their_ids() -> None:
    assert len(COCO) == 80 == len(set(COCO.names))
    assert set(COCO.ids) == set(range(1, 91)) - MISSING_IDS
    assert {COCO.id_to_name[i] for i in (1, 13, 62, 90)} == {"person", "stop sign", "chair", "toothbrush"}


def test_91_slots_are_category_ids_and_80_are_contiguous() -> None:
    by_id = class_slots(91, given=None, names=None, where="f")
    contiguous = class_slots(80, given=None, names=None, where="f")
    assert by_id.table == contiguous.table == COCO
    assert by_id.rows == COCO.ids and by_id.total == 91
    assert contiguous.rows == tuple(range(80)) and contiguous.total == 80


def test_other_numbers_are_numbered_classes_and_said_to_be() -> None:
    slots = class_slots(7, given=None, names=None, where="f")
    assert slots.table.names == tuple(f"class {i}" for i in range(7))
    assert "no names in the file" in slots.note
    assert class_slots(91, given="numbered", names=None, where="f").rows == tuple(range(91))


def test_names_of_the_file_skip_slots_without_a_class() -> None:
    slots = class_slots(4, given=None, names={0: "N/A", 1: "cat", 2: "dog", 3: "n/a"}, where="f")
    assert (slots.table.names, slots.table.ids, slots.rows) == (("cat", "dog"), (1, 2), (1, 2))
    with pytest.raises(CheckpointError, match="5 rows, its config names 1 labels"):
        class_slots(5, given=None, names={0: "cat"}, where="f")


def test_a_coco_json_fits_by_count_or_by_id(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"categories": [{"id": 5, "name": "b"}, {"id": 2, "name": "a"}]}))
    assert class_slots(2, given=str(path), names=None, where="f").rows == (0, 1)
    by_id = class_slots(6, given=str(path), names=None, where="f")
    assert (by_id.rows, by_id.table.names) == ((2, 5), ("a", "b"))
    with pytest.raises(CheckpointError, match=r"head has 5 rows, .* 2 classes with ids up to 5"):
        class_slots(5, given=str(path), names=None, where="f")
    path.write_text("[]")
    with pytest.raises(UserError, match="no COCO json whose `categories`"):
        class_slots(2, given=str(path), names=None, where="f")


def test_a_text_file_has_a_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\n\n dog \n")
    assert class_slots(2, given=str(path), names=None, where="f").table.names == ("cat", "dog")
    with pytest.raises(CheckpointError, match="head has 3 rows"):
        class_slots(3, given=str(path), names=None, where="f")
    with pytest.raises(CheckpointError, match="no such file"):
        class_slots(3, given=str(tmp_path / "absent.txt"), names=None, where="f")
    with pytest.raises(CheckpointError, match="7 rows; COCO's has 80 or 91"):
        class_slots(7, given="coco", names=None, where="f")
