"""Class slots of other programs, and the classes they stand for.

The official codes train COCO with 91 slots, one for each category id from 0 to 90, of which 80 exist; slot 0 and ten others never
have an object. There is no slot for background: a query without an object has low scores everywhere. detrex has 80 slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paqdetr.errors import CheckpointError
from paqdetr.files import read_json, read_text
from paqdetr.structures import ClassTable
from paqdetr.values import as_id

_COCO = """
1 person|2 bicycle|3 car|4 motorcycle|5 airplane|6 bus|7 train|8 truck|9 boat|10 traffic light|11 fire hydrant|13 stop sign|
14 parking meter|15 bench|16 bird|17 cat|18 dog|19 horse|20 sheep|21 cow|22 elephant|23 bear|24 zebra|25 giraffe|27 backpack|
28 umbrella|31 handbag|32 tie|33 suitcase|34 frisbee|35 skis|36 snowboard|37 sports ball|38 kite|39 baseball bat|
40 baseball glove|41 skateboard|42 surfboard|43 tennis racket|44 bottle|46 wine glass|47 cup|48 fork|49 knife|50 spoon|51 bowl|
52 banana|53 apple|54 sandwich|55 orange|56 broccoli|57 carrot|58 hot dog|59 pizza|60 donut|61 cake|62 chair|63 couch|
64 potted plant|65 bed|67 dining table|70 toilet|72 tv|73 laptop|74 mouse|75 remote|76 keyboard|77 cell phone|78 microwave|
79 oven|80 toaster|81 sink|82 refrigerator|84 book|85 clock|86 vase|87 scissors|88 teddy bear|89 hair drier|90 toothbrush
"""
_ROWS = [entry.strip().split(" ", 1) for entry in _COCO.replace("\n", " ").split("|")]
COCO = ClassTable(tuple(int(number) for number, _ in _ROWS), tuple(name for _, name in _ROWS))
"""COCO's 80 categories, by ascending id."""


@dataclass(frozen=True)
class ClassSlots:
    """Which rows of a foreign class head are classes.

    Attributes:
        table: the classes, in our order.
        rows: the row of each.
        total: rows the head has.
        note: how this was decided.
    """

    table: ClassTable
    rows: tuple[int, ...]
    total: int
    note: str


def class_slots(total: int, *, given: str | None, names: dict[int, str] | None, where: str) -> ClassSlots:
    """What the rows of a class head stand for.

    Args:
        total: rows.
        given: the user's word: "coco", "numbered", a COCO json with `categories`, or a text file with a name a line; None: decide
            by the names in the file, else by the number of rows: 91 and 80 are COCO's.
        names: row -> name, where the file says ("N/A" for rows without a class).
        where: the file, for errors.

    Raises:
        CheckpointError: the given classes do not fit the number of rows.
    """
    if given is None and names:
        return _named(total, names, where)
    if given is None and total in (91, 80):
        note = "91 slots, one a COCO category id" if total == 91 else "80 slots: taken for COCO's categories"
        return _coco(total, note, where)
    if given == "coco":
        return _coco(total, "given: COCO", where)
    if given is None or given == "numbered":
        note = "given: numbered" if given else "no names in the file: classes are numbered"
        return ClassSlots(ClassTable.numbered(total), tuple(range(total)), total, note)
    return _from_file(total, Path(given), where)


def _coco(total: int, note: str, where: str) -> ClassSlots:
    if total == 80:
        return ClassSlots(COCO, tuple(range(80)), total, note)
    if total == 91:
        return ClassSlots(COCO, COCO.ids, total, note)
    raise CheckpointError(
        f"{where}: its class head has {total} rows; COCO's has 80 or 91",
        "leave classes= out, or give the data set's json: classes=annotations.json",
    )


def _named(total: int, names: dict[int, str], where: str) -> ClassSlots:
    if sorted(names) != list(range(total)):
        raise CheckpointError(
            f"{where}: its class head has {total} rows, its config names {len(names)} labels",
            "correct id2label in config.json, or give classes=numbered",
        )
    rows = tuple(row for row in range(total) if names[row].upper() != "N/A")
    table = ClassTable(rows, tuple(names[row] for row in rows))
    return ClassSlots(table, rows, total, f"names of the file, {total - len(rows)} slots without a class")


def _from_file(total: int, path: Path, where: str) -> ClassSlots:
    if path.suffix == ".json":
        table = _categories(path)
    else:
        lines = [line.strip() for line in read_text(path, error=CheckpointError).split("\n")]
        names = [line for line in lines if line]
        table = ClassTable(tuple(range(len(names))), tuple(names))
    if not len(table):
        raise CheckpointError(f"classes={path}: names no classes", "give a COCO json or a text file with a name a line")
    if len(table) == total:
        return ClassSlots(table, tuple(range(total)), total, f"classes of {path}")
    if max(table.ids) < total and path.suffix == ".json":
        return ClassSlots(table, table.ids, total, f"classes of {path}, the slot is the category id")
    raise CheckpointError(
        f"{where}: its class head has {total} rows, {path} has {len(table)} classes with ids up to {max(table.ids)}",
        "give the classes it was trained on, or give classes=numbered",
    )


def _categories(path: Path) -> ClassTable:
    content = read_json(path, error=CheckpointError)
    rows = content.get("categories") if isinstance(content, dict) else None
    ids = (
        [as_id(row.get("id")) if isinstance(row, dict) else None for row in rows] if isinstance(rows, list) else [None]
    )
    if len(set(ids)) < len(ids) or not all(isinstance(own, int) for own in ids):
        raise CheckpointError(
            f"classes={path}: no COCO json whose `categories` have whole numbers as ids, each another", "give one"
        )
    return ClassTable.from_categories(
        [{"name": own, **row, "id": own} for row, own in zip(rows or [], ids, strict=True)]
    )
