"""What a model does well and badly, in words with advice: every sentence follows from figures, none from another sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from paqdetr.metrics.intervals import Comparison, Interval
from paqdetr.report.section import Finding
from paqdetr.text import some


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """AP of a class (NaN without boxes), its boxes in the split, and in the training split (None if that is not known)."""

    name: str
    ap: float
    boxes: int
    training_boxes: int | None = None


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Images of the split that have a near-duplicate in the training split, and AP of the others, NaN if it is the same."""

    images: int
    ap_without: float = math.nan


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """How a training went.

    Attributes:
        epochs: as planned.
        done: epochs that were trained.
        finished: whether it came to its end.
        ap, loss: (epoch, value) of each evaluation: AP, and the validation loss.
    """

    epochs: int
    done: float
    finished: bool
    ap: Sequence[tuple[float, float]] = ()
    loss: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """The figures that advice is derived from. What nothing defines is NaN; all shares lie in [0, 1].

    Attributes:
        split: its name.
        images, boxes: of the split.
        ap: with its interval over images.
        sizes: (AP, boxes) of "small", "medium" and "large" objects.
        duplicates_cost: AP after non-maximum suppression minus AP.
        removes_duplicates: whether `predict` suppresses them, as the checkpoint says.
        gains: kind of mistake -> what AP50 would gain without it, as of `ErrorSplit`.
        confused: (class, detected as, count, objects of the class), the most frequent first.
        classes: every class.
        threshold, f1, precision, recall: where F1 over all classes is at its best.
        default_threshold, default_f1: the score that `predict` begins from, and F1 there.
        calibration_error, confidence, accuracy: of the detections that score 0.3 or more; means of the last two.
        covered: share of objects that the box of some query overlaps by an IoU of 0.5 or more, in the last layer.
        image_size: that the model sees, as in its settings.
        near_duplicates: None if images were not compared.
        training: None if the checkpoint lies in no run folder.
        crowding: sentences on images with more boxes than can be found or counted.
    """

    split: str
    images: int
    boxes: int
    ap: Interval
    sizes: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    duplicates_cost: float = math.nan
    removes_duplicates: bool = False
    gains: Mapping[str, float] = field(default_factory=dict)
    confused: Sequence[tuple[str, str, int, int]] = ()
    classes: Sequence[ClassFacts] = ()
    threshold: float = math.nan
    f1: float = math.nan
    precision: float = math.nan
    recall: float = math.nan
    default_threshold: float = 0.3
    default_f1: float = math.nan
    calibration_error: float = math.nan
    confidence: float = math.nan
    accuracy: float = math.nan
    covered: float = math.nan
    image_size: object = ""
    near_duplicates: Duplicates | None = None
    training: TrainingFacts | None = None
    crowding: Sequence[str] = ()


# AP from which a cost is worth a line, and from which a mistake is.
_COST, _GAIN = 0.005, 0.02
_NOTHING = 0.05  # AP below which kinds of mistakes say nothing yet
_FEW_BOXES, _FEW_IN_SPLIT = 30, 10


def advice(facts: Facts) -> tuple[Finding, ...]:
    """Strengths, weaknesses (the costliest first) and notes."""
    rules = RULES if facts.ap.value >= _NOTHING else (_overall, _training, _near_duplicates, _crowding)
    found = [finding for rule in rules for finding in rule(facts)]
    return tuple(sorted(found, key=lambda finding: -finding.cost))


def compare(found: Comparison) -> tuple[Finding, ...]:
    """What two models differ in: figures and classes whose interval of B - A does not hold 0."""
    findings = [Finding("note", found.verdict(), where="summary", cost=1.0)]
    sizes = {"APs": "small objects", "APm": "medium objects", "APl": "large objects"}
    named = {what: found.figures[name] for name, what in sizes.items()}
    named |= {f"class {name}": own for name, own in found.per_class.items()}
    for letter, sign in (("A", -1), ("B", 1)):
        ahead = {what: own for what, own in named.items() if own.decided and sign * own.value > 0}
        if ahead:
            order = sorted(ahead, key=lambda what: -abs(ahead[what].value))
            listed = some([f"{what} ({ahead[what].value:+.3f})" for what in order], 5)
            findings.append(
                Finding("note", f"{letter} is better at {listed}; in brackets AP of B - A.", where="classes")
            )
    return tuple(findings)


# ------------------------------------------------------------------------------------------------- rules


def _overall(facts: Facts) -> Iterator[Finding]:
    ap = facts.ap
    if ap.value < _NOTHING:
        yield Finding(
            "bad",
            f"The model finds next to nothing: AP {ap.value:.3f}.",
            "Train longer, from pretrained weights; look at boxes and classes with `paqdetr data preview`.",
            "training" if facts.training else "summary",
            1.0,
        )
    width = ap.high - ap.low
    if width > 0.1:
        yield Finding(
            "note",
            f"{facts.images} images of {facts.split} say little: AP lies between {ap.low:.3f} and {ap.high:.3f}.",
            f"Judge with more images; differences below {width / 2:.2f} may be chance.",
            "summary",
        )


def _training(facts: Facts) -> Iterator[Finding]:
    own = facts.training
    if own is None:
        return
    if not own.finished and own.done < own.epochs:
        yield Finding(
            "bad",
            f"The training is unfinished: {own.done:.1f} of {own.epochs} epochs.",
            "`paqdetr train --resume` goes on; the learning rate falls at the end, where much of the AP is gained.",
            "training",
            0.5,
        )
    values = [value for _, value in own.ap]
    recent = max(1, len(values) // 4)
    before = max(values[:-recent], default=math.nan)
    gain = max(values, default=math.nan) - before
    if own.finished and len(values) > 2:
        if gain >= 0.01 and values[-1] >= max(values) - 0.002:
            yield Finding(
                "bad",
                f"AP still rose when the training ended, by {gain:.3f} in the last {recent} of {len(values)} evaluations.",
                "Train longer: raise max_steps."
                if own.done < own.epochs
                else f"Train longer, such as epochs={2 * own.epochs}.",
                "training",
                gain,
            )
        best = max(range(len(values)), key=values.__getitem__)
        if values[best] - values[-1] >= 0.01:
            yield Finding(
                "bad",
                f"AP fell from {values[best]:.3f} in epoch {own.ap[best][0]:g} to {values[-1]:.3f} at the end.",
                "best.safetensors keeps the best epoch; train shorter, or with more augmentation or data.",
                "training",
                values[best] - values[-1],
            )
        moved = max(values[-recent - 1 :]) - min(values[-recent - 1 :])
        if moved < 0.005 and facts.ap.value >= _NOTHING:
            text = f"The training has converged: AP moved by {moved:.3f} over its last {recent + 1} evaluations."
            yield Finding("good", text, where="training")
    if len(own.loss) > 2:
        epoch, least = min(own.loss, key=lambda point: point[1])
        last = own.loss[-1][1]
        if last > 1.05 * least > 0:
            yield Finding(
                "bad",
                f"Overfitting: the validation loss was lowest in epoch {epoch:g} and {last / least - 1:.0%} higher at the end.",
                "More training images or stronger augmentation (augment.mosaic, augment.scale), or fewer epochs.",
                "training",
                0.01,
            )


def _duplicates(facts: Facts) -> Iterator[Finding]:
    cost = facts.duplicates_cost
    if cost >= _COST:
        yield Finding(
            "bad",
            f"Duplicate detections cost {cost:.3f} AP: several queries answer for one object.",
            "Train longer: one-to-one matching suppresses them late. "
            + (
                "Until then `predict` removes them, as the checkpoint asks for."
                if facts.removes_duplicates
                else "Until then predict with `--nms 0.7` (`nms=0.7`)."
            ),
            "summary",
            cost,
        )
    elif not math.isnan(cost):
        yield Finding(
            "good", f"Few duplicates: non-maximum suppression would gain {max(cost, 0):.3f} AP.", where="summary"
        )


def _confusion(facts: Facts) -> Iterator[Finding]:
    gain = facts.gains.get("classification", math.nan)
    often = [row for row in facts.confused if row[2] >= 3 and row[2] >= 0.05 * row[3]]
    if often and (gain >= _GAIN or often[0][2] >= 0.2 * often[0][3]):
        listed = some([f"{count} of {objects} {name!r} as {other!r}" for name, other, count, objects in often])
        yield Finding(
            "bad",
            f"Confused classes cost {max(gain, 0):.3f} AP50: {listed}.",
            "Compare their pictures below (mistake: wrong class): label them by one rule, add examples of both, or merge them.",
            "confusion",
            gain,
        )
    elif gain >= _GAIN:
        yield Finding(
            "bad", f"Wrong classes cost {gain:.3f} AP50, spread over many pairs of classes.",
            "Train longer, and add examples of the classes with the lowest AP.", "confusion", gain,
        )  # fmt: skip
    elif gain < 0.01 and len(facts.classes) > 1:
        yield Finding("good", f"Classes are told apart: wrong ones cost {gain:.3f} AP50.", where="confusion")


def _boxes(facts: Facts) -> Iterator[Finding]:
    gain = facts.gains.get("localisation", math.nan)
    if gain >= _GAIN:
        yield Finding(
            "bad",
            f"Loose boxes cost {gain:.3f} AP50: the right class, with an IoU of .10 to .50.",
            f"Train longer or with a larger image_size (now {facts.image_size}), and check that annotated boxes are tight.",
            "mistakes",
            gain,
        )
    elif gain < 0.01:
        yield Finding("good", f"Boxes fit: loose ones cost {gain:.3f} AP50.", where="mistakes")


def _background(facts: Facts) -> Iterator[Finding]:
    gain = facts.gains.get("background", math.nan)
    if gain >= _GAIN:
        yield Finding(
            "bad",
            f"Detections where nothing is annotated cost {gain:.3f} AP50.",
            "Look at them below (mistake: background): label what was forgotten, and add images without objects.",
            "images",
            gain,
        )


def _missed(facts: Facts) -> Iterator[Finding]:
    gain = facts.gains.get("missed", math.nan)
    if not gain >= _GAIN:
        return
    remedy = "Train longer, and add examples like those missed below (mistake: missed)."
    if facts.covered < 0.9:
        text = f"Missed objects cost {gain:.3f} AP50: {1 - facts.covered:.0%} of the objects have no query's box near them."
        remedy = (
            f"A larger image_size (now {facts.image_size}) or more queries (model.num_queries) may reach them. {remedy}"
        )
    else:
        text = (
            f"Missed objects cost {gain:.3f} AP50, though queries' boxes reach most objects: their scores are too low."
        )
    yield Finding("bad", text, remedy, "images", gain)


def _sizes(facts: Facts) -> Iterator[Finding]:
    known = {name: value for name, (value, boxes) in facts.sizes.items() if boxes >= _FEW_IN_SPLIT and value == value}
    small = known.pop("small", math.nan)
    if math.isnan(small) or not known:
        return
    best = max(known, key=known.__getitem__)
    share = facts.sizes["small"][1] / max(facts.boxes, 1)
    if small < 0.7 * known[best]:
        yield Finding(
            "bad",
            f"Small objects (below 32 x 32 pixels, {share:.0%} of all) are found worse: AP {small:.3f}, {best} ones "
            f"{known[best]:.3f}.",
            f"Train with a larger image_size (now {facts.image_size}); on large images predict with `--tiles 640`.",
            "summary",
            share * (known[best] - small),
        )
    elif small >= 0.9 * known[best]:
        text = f"Small objects are found nearly as well as {best} ones: AP {small:.3f} and {known[best]:.3f}."
        yield Finding("good", text, where="summary")


def _classes(facts: Facts) -> Iterator[Finding]:
    known = [one for one in facts.classes if one.ap == one.ap]
    counts = sorted(one.training_boxes for one in facts.classes if one.training_boxes is not None)
    median = counts[len(counts) // 2] if counts else 0

    def listed(rows: Sequence[ClassFacts], training: bool = True) -> str:
        count = [f"{one.training_boxes if training else one.boxes} boxes, " for one in rows]
        return some([f"{one.name!r} ({boxes}AP {one.ap:.3f})" for one, boxes in zip(rows, count, strict=True)], 5)

    few = [
        one
        for one in sorted(known, key=lambda one: (one.training_boxes or 0, one.name))
        if one.training_boxes is not None
        and (one.training_boxes < _FEW_BOXES or one.training_boxes < median / 4)
        and one.ap < facts.ap.value
    ]
    if few:
        cost = sum(facts.ap.value - one.ap for one in few) / len(known)
        remedy = "Collect more images of them; every class counts alike in AP."
        yield Finding("bad", f"Too few examples in train of {listed(few)}.", remedy, "classes", cost)
    weak = [one for one in known if one.ap < 0.5 * facts.ap.value and one not in few]
    if weak:
        weak.sort(key=lambda one: one.ap)
        cost = sum(facts.ap.value - one.ap for one in weak) / len(known)
        remedy = (
            "Choose the class over the pictures below: its mistakes say whether labels, size or likeness are to blame."
        )
        why = ", not for lack of examples" if counts else ""
        yield Finding("bad", f"The weakest classes{why}: {listed(weak, bool(counts))}.", remedy, "classes", cost)
    strong = [one for one in known if one.ap >= 0.5 and one.ap > facts.ap.value and one.boxes >= _FEW_IN_SPLIT]
    if strong and len(known) > 1:
        strong.sort(key=lambda one: -one.ap)
        best = some([f"{one.name!r} (AP {one.ap:.3f})" for one in strong])
        yield Finding("good", f"Best at {best}.", where="classes")
    rare = [one.name for one in known if one.boxes < _FEW_IN_SPLIT]
    if rare:
        yield Finding(
            "note", f"AP of {some([repr(name) for name in rare], 5)} rests on fewer than {_FEW_IN_SPLIT} boxes.",
            f"Add images of them to {facts.split} before judging these classes.", "classes",
        )  # fmt: skip


def _threshold(facts: Facts) -> Iterator[Finding]:
    if math.isnan(facts.f1):
        return
    chosen = f"At a score of {facts.threshold:.2f} {facts.precision:.0%} of the detections are right and {facts.recall:.0%} of "
    chosen += f"the objects are found (F1 {facts.f1:.3f})."
    lost = facts.f1 - facts.default_f1
    if lost >= 0.02:
        yield Finding(
            "bad",
            f"{chosen} At {facts.default_threshold:.2f}, where `predict` begins, F1 is {facts.default_f1:.3f}.",
            f"Predict with `--threshold {facts.threshold:.2f}` (`threshold={facts.threshold:.2f}`).",
            "curves",
        )
    else:
        kind = "good" if min(facts.precision, facts.recall) >= 0.8 else "note"
        yield Finding(kind, chosen, where="curves")


def _calibration(facts: Facts) -> Iterator[Finding]:
    error = facts.calibration_error
    if error >= 0.1:
        which = "high" if facts.confidence > facts.accuracy else "low"
        yield Finding(
            "note",
            f"Scores are too {which} to be read as probabilities: detections over 0.3 score {facts.confidence:.2f} on average, "
            f"and {facts.accuracy:.0%} of them are right.",
            "Take thresholds from F1 by class, not from what a score seems to mean.",
            "calibration",
        )
    elif error < 0.05:
        text = f"Scores over 0.3 can be read as probabilities: their mean error is {error:.3f}."
        yield Finding("good", text, where="calibration")


def _near_duplicates(facts: Facts) -> Iterator[Finding]:
    own = facts.near_duplicates
    if own is None:
        return
    if own.images:
        yield Finding(
            "bad",
            f"{own.images} of {facts.images} images of {facts.split} have a near-duplicate in train: AP {facts.ap.value:.3f}, "
            f"{own.ap_without:.3f} without them.",
            "`paqdetr data check` lists them; `paqdetr data split` keeps near-duplicates together.",
            cost=max(0.01, facts.ap.value - own.ap_without),
        )
    else:
        yield Finding("good", f"No image of {facts.split} has a near-duplicate in train.")


def _crowding(facts: Facts) -> Iterator[Finding]:
    for sentence in facts.crowding:
        yield Finding("bad", f"{sentence[:1].upper()}{sentence[1:]}.")


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _overall, _training, _duplicates, _confusion, _boxes, _background, _missed, _sizes, _classes, _threshold, _calibration,
    _near_duplicates, _crowding,
)  # fmt: skip
"""Each looks at some figures and yields what they come to."""
