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
    ap: Sequence[Sequence[float]] = ()
    loss: Sequence[Sequence[float]] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """The figures that advice is derived from. What nothing defines is NaN; all shares lie in [0, 1].

    Attributes:
        split: its name.
        images, boxes: of the split.
        ap: with its interval over images.
        ap50: at IoU 0.5.
        sizes: (AP, boxes) of "small", "medium" and "large" objects.
        duplicates_cost: AP after non-maximum suppression minus AP.
        removes_duplicates: whether `predict` suppresses them, as the checkpoint says.
        gains: kind of mistake -> what AP50 would gain without it, as of `ErrorSplit`.
        confused: (class, detected as, count, objects of the class), the most frequent first.
        classes: every class.
        threshold, f1, precision, recall: where F1 over all classes is at its best.
        default_threshold, default_f1: the score that `predict` begins from, and F1 there.
        calibration_error, calibration_chance, confidence, accuracy: of the detections that score 0.3 or more, as of
            `Calibration`; means of the last two.
        covered: share of objects that the box of some query overlaps by an IoU of 0.5 or more, in the last layer.
        image_size: that the model sees, as in its settings.
        near_duplicates: None if images were not compared.
        unread: why the training split could not be read, so that what needs it is left out; empty if it could.
        training: None if the checkpoint lies in no run folder.
        crowding: sentences on images with more boxes than can be found or counted.
    """

    split: str
    images: int
    boxes: int
    ap: Interval
    ap50: float = math.nan
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
    calibration_chance: float = math.nan
    confidence: float = math.nan
    accuracy: float = math.nan
    covered: float = math.nan
    image_size: object = ""
    near_duplicates: Duplicates | None = None
    unread: str = ""
    training: TrainingFacts | None = None
    crowding: Sequence[str] = ()

    def in_ap(self, gain: float) -> float:
        """A gain of AP50 in units of AP, by the ratio of the model's own two, so that costs of either kind have an order."""
        return gain * self.ap.value / self.ap50 if self.ap.value > 0 and self.ap50 > 0 else gain


# AP from which duplicates are worth a line, and AP50 from which a kind of mistake is.
_COST, _GAIN = 0.005, 0.02
_NOTHING = 0.05  # AP below which kinds of mistakes say nothing yet
_FEW_BOXES, _FEW_IN_SPLIT = 30, 10


def advice(facts: Facts) -> tuple[Finding, ...]:
    """Strengths, weaknesses (the costliest first) and notes."""
    rules = RULES if facts.ap.value >= _NOTHING else (_overall, _training, _near_duplicates, _crowding)
    found = [finding for rule in rules for finding in rule(facts)]
    return tuple(sorted(found, key=lambda finding: -finding.cost))


def compare(found: Comparison) -> tuple[Finding, ...]:
    """What two models differ in: figures and classes whose interval of B - A does not hold 0, and how many of as many would not
    by chance."""
    findings = [Finding("note", found.verdict(), where="summary", cost=1.0)]
    sizes = {"APs": "small objects", "APm": "medium objects", "APl": "large objects"}
    named = {what: found.figures[name] for name, what in sizes.items()}
    named |= {f"class {name}": own for name, own in found.per_class.items()}
    named = {what: own for what, own in named.items() if not math.isnan(own.low)}  # others are never decided
    chance = (1 - found.level) * len(named)
    for letter, sign in (("A", -1), ("B", 1)):
        ahead = {what: own for what, own in named.items() if own.decided and sign * own.value > 0}
        if ahead:
            order = sorted(ahead, key=lambda what: -abs(ahead[what].value))
            listed = some([f"{what} ({ahead[what].value:+.3f})" for what in order], 5)
            findings.append(
                Finding(
                    "note",
                    f"{letter} is better at {listed}; in brackets AP of B - A. Of {len(named)} sizes and classes, {chance:.1f} "
                    "would stand in such lines by chance.",
                    where="classes",
                )
            )
    return tuple(findings)


# ------------------------------------------------------------------------------------------------- rules


def _overall(facts: Facts) -> Iterator[Finding]:
    ap = facts.ap
    if ap.value < _NOTHING:
        yield _bad(
            f"The model finds next to nothing: AP {ap.value:.3f}.",
            "Train longer, from pretrained weights; look at boxes and classes with `paqdetr data preview`.",
            "training" if facts.training else "summary",
            cost=1.0,
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
        yield _bad(
            f"The training is unfinished: {own.done:.1f} of {own.epochs} epochs.",
            "`paqdetr train RUN --resume` goes on; the learning rate falls at the end, where much of the AP is gained.",
            "training",
            cost=0.5,
        )
    values = [value for _, value in own.ap]
    if own.finished and len(values) > 2:
        recent, last = max(1, len(values) // 4), values[-1]
        gain = max(values) - max(values[:-recent])
        if gain >= 0.01 and last >= max(values) - 0.002:
            longer = ": raise max_steps" if own.done < own.epochs else f", such as epochs={2 * own.epochs}"
            yield _bad(
                f"AP still rose when the training ended, by {gain:.3f} in the last {recent} of {len(values)} evaluations.",
                f"Train longer{longer}.",
                "training",
                cost=gain,
            )
        epoch, best = max(own.ap, key=lambda point: point[1])
        if best - last >= 0.01:
            yield _bad(
                f"AP fell from {best:.3f} in epoch {epoch:g} to {last:.3f} at the end.",
                "best.safetensors keeps the best epoch; train shorter, or with more augmentation or data.",
                "training",
                cost=best - last,
            )
        moved = max(values[-recent - 1 :]) - min(values[-recent - 1 :])
        if moved < 0.005 and facts.ap.value >= _NOTHING:
            text = f"The training has converged: AP moved by {moved:.3f} over its last {recent + 1} evaluations."
            yield Finding("good", text, where="training")
    if len(own.loss) > 2:
        epoch, least = min(own.loss, key=lambda point: point[1])
        last = own.loss[-1][1]
        if last > 1.05 * least > 0:
            yield _bad(
                f"Overfitting: the validation loss was lowest in epoch {epoch:g} and {last / least - 1:.0%} higher at the end.",
                "More training images or stronger augmentation (augment.mosaic, augment.scale), or fewer epochs.",
                "training",
                cost=0.01,
            )


def _duplicates(facts: Facts) -> Iterator[Finding]:
    cost = facts.duplicates_cost
    if cost >= _COST:
        until = "Until then predict with `--nms 0.7` (`nms=0.7`)."
        if facts.removes_duplicates:
            until = "Until then `predict` removes them, as the checkpoint asks for."
        text = f"Duplicate detections cost {cost:.3f} AP: several queries answer for one object."
        yield _bad(text, f"Train longer: one-to-one matching suppresses them late. {until}", "summary", cost=cost)
    elif not math.isnan(cost):
        text = f"Few duplicates: non-maximum suppression would gain {max(cost, 0):.3f} AP."
        yield Finding("good", text, where="summary")


def _confusion(facts: Facts) -> Iterator[Finding]:
    gain = facts.gains.get("classification", math.nan)
    often = [row for row in facts.confused if row[2] >= 3 and row[2] >= 0.05 * row[3]]
    if often and (gain >= _GAIN or often[0][2] >= 0.2 * often[0][3]):
        listed = some([f"{count} of {objects} {name!r} as {other!r}" for name, other, count, objects in often])
        remedy = (
            "Compare their pictures below (mistake: wrong class): label them by one rule, add examples of both, or merge "
            "them."
        )
        text = f"Confused classes cost {max(gain, 0):.3f} AP50: {listed}."
        yield _bad(text, remedy, "confusion", cost=facts.in_ap(max(gain, 0)))
    else:
        yield from _mistake(
            facts,
            "classification",
            "Wrong classes cost {:.3f} AP50, spread over many pairs of classes.",
            "Train longer, and add examples of the classes with the lowest AP.",
            "confusion",
            good="Classes are told apart: wrong ones cost {:.3f} AP50." if len(facts.classes) > 1 else "",
        )


def _boxes(facts: Facts) -> Iterator[Finding]:
    remedy = (
        f"Train longer or with a larger image_size (now {facts.image_size}), and check that annotated boxes are tight."
    )
    bad = "Loose boxes cost {:.3f} AP50: the right class, with an IoU of .10 to .50."
    good = "Boxes fit: loose ones cost {:.3f} AP50."
    yield from _mistake(facts, "localisation", bad, remedy, "mistakes", good=good)


def _background(facts: Facts) -> Iterator[Finding]:
    remedy = "Look at them below (mistake: background): label what was forgotten, and add images without objects."
    text = "Detections where nothing is annotated cost {:.3f} AP50."
    yield from _mistake(facts, "background", text, remedy, "images")


def _missed(facts: Facts) -> Iterator[Finding]:
    text = "Missed objects cost {:.3f} AP50, though queries' boxes reach most objects: their scores are too low."
    remedy = "Train longer, and add examples like those missed below (mistake: missed)."
    if facts.covered < 0.9:
        text = (
            f"Missed objects cost {{:.3f}} AP50: {1 - facts.covered:.0%} of the objects have no query's box near them."
        )
        larger = f"A larger image_size (now {facts.image_size}) or more queries (model.num_queries) may reach them."
        remedy = f"{larger} {remedy}"
    yield from _mistake(facts, "missed", text, remedy, "images")


def _sizes(facts: Facts) -> Iterator[Finding]:
    known = {name: value for name, (value, boxes) in facts.sizes.items() if boxes >= _FEW_IN_SPLIT and value == value}
    small = known.pop("small", math.nan)
    if math.isnan(small) or not known:
        return
    best = max(known, key=known.__getitem__)
    share = facts.sizes["small"][1] / max(facts.boxes, 1)
    if small < 0.7 * known[best]:
        yield _bad(
            f"Small objects (below 32 x 32 pixels, {share:.0%} of all) are found worse: AP {small:.3f}, {best} ones "
            f"{known[best]:.3f}.",
            f"Train with a larger image_size (now {facts.image_size}); on large images predict with `--tiles 640`.",
            "summary",
            cost=share * (known[best] - small),
        )
    elif small >= 0.9 * known[best]:
        text = f"Small objects are found nearly as well as {best} ones: AP {small:.3f} and {known[best]:.3f}."
        yield Finding("good", text, where="summary")


def _classes(facts: Facts) -> Iterator[Finding]:
    known = [one for one in facts.classes if one.ap == one.ap]
    counts = sorted(one.training_boxes for one in facts.classes if one.training_boxes is not None)
    median = counts[len(counts) // 2] if counts else 0

    def weakness(rows: Sequence[ClassFacts], text: str, remedy: str) -> Iterator[Finding]:
        boxes = [one.training_boxes if counts else one.boxes for one in rows]
        listed = some([f"{one.name!r} ({n} boxes, AP {one.ap:.3f})" for one, n in zip(rows, boxes, strict=True)], 5)
        if rows:
            cost = sum(facts.ap.value - one.ap for one in rows) / len(known)
            yield _bad(f"{text} {listed}.", remedy, "classes", cost=cost)

    few = [
        one
        for one in sorted(known, key=lambda one: (one.training_boxes or 0, one.name))
        if one.training_boxes is not None
        and (one.training_boxes < _FEW_BOXES or one.training_boxes < median / 4)
        and one.ap < facts.ap.value
    ]
    weak = sorted((one for one in known if one.ap < 0.5 * facts.ap.value and one not in few), key=lambda one: one.ap)
    remedy = "Collect more images of them; every class counts alike in AP."
    yield from weakness(few, "Too few examples in train of", remedy)
    why = ", not for lack of examples" if counts else ""
    remedy = "Choose the class over the pictures below: its mistakes say whether labels, size or likeness are to blame."
    yield from weakness(weak, f"The weakest classes{why}:", remedy)
    strong = [one for one in known if one.ap >= 0.5 and one.ap > facts.ap.value and one.boxes >= _FEW_IN_SPLIT]
    if strong and len(known) > 1:
        strong.sort(key=lambda one: -one.ap)
        best = some([f"{one.name!r} (AP {one.ap:.3f})" for one in strong])
        yield Finding("good", f"Best at {best}.", where="classes")
    if rare := [repr(one.name) for one in known if one.boxes < _FEW_IN_SPLIT]:
        text = f"AP of {some(rare, 5)} rests on fewer than {_FEW_IN_SPLIT} boxes."
        yield Finding("note", text, f"Add images of them to {facts.split} before judging these classes.", "classes")


def _threshold(facts: Facts) -> Iterator[Finding]:
    if math.isnan(facts.f1):
        return
    chosen = (
        f"At a score of {facts.threshold:.2f} {facts.precision:.0%} of the detections are right and {facts.recall:.0%} of the "
        f"objects are found (F1 {facts.f1:.3f})."
    )
    if facts.f1 - facts.default_f1 >= 0.02:
        text = f"{chosen} At {facts.default_threshold:.2f}, where `predict` begins, F1 is {facts.default_f1:.3f}."
        how = f"Predict with `--threshold {facts.threshold:.2f}` (`threshold={facts.threshold:.2f}`)."
        yield _bad(text, how, "curves")
    else:
        kind = "good" if min(facts.precision, facts.recall) >= 0.8 else "note"
        yield Finding(kind, chosen, where="curves")


def _calibration(facts: Facts) -> Iterator[Finding]:
    error, chance = facts.calibration_error, facts.calibration_chance
    if error - chance >= 0.1:
        off = facts.confidence - facts.accuracy
        how = f"are too {'high' if off > 0 else 'low'} to" if abs(off) >= 0.05 else "cannot"
        yield Finding(
            "note",
            f"Scores {how} be read as probabilities, their mean error is {error:.3f} ({chance:.3f} by chance alone): "
            f"detections over 0.3 score {facts.confidence:.2f} on average, "
            f"and {facts.accuracy:.0%} of them are right.",
            "Take thresholds from F1 by class, not from what a score seems to mean.",
            "calibration",
        )
    elif max(error, chance) < 0.05:
        text = f"Scores over 0.3 can be read as probabilities: their mean error is {error:.3f}."
        yield Finding("good", text, where="calibration")


def _near_duplicates(facts: Facts) -> Iterator[Finding]:
    own = facts.near_duplicates
    if facts.unread:
        yield Finding(
            "note",
            f"The training split cannot be used, and what needs it is left out: {facts.unread}.",
            "Without it nobody knows whether these images were trained on.",
        )
    if own is None:
        return
    if own.images and own.images == facts.images:
        yield _bad(
            f"All {own.images} images of {facts.split} have a near-duplicate in train: these figures say nothing of new images.",
            "`paqdetr data check` lists them; `paqdetr data split` keeps near-duplicates together.",
            cost=1.0,
        )
    elif own.images:
        yield _bad(
            f"{own.images} of {facts.images} images of {facts.split} have a near-duplicate in train: AP {facts.ap.value:.3f}, "
            f"{own.ap_without:.3f} without them.",
            "`paqdetr data check` lists them; `paqdetr data split` keeps near-duplicates together.",
            cost=max(0.01, facts.ap.value - own.ap_without),
        )


def _crowding(facts: Facts) -> Iterator[Finding]:
    for sentence in facts.crowding:
        yield _bad(f"{sentence[:1].upper()}{sentence[1:]}.")


def _bad(text: str, advice: str = "", where: str = "", *, cost: float = 0.0) -> Finding:
    return Finding("bad", text, advice, where, cost)


def _mistake(facts: Facts, kind: str, bad: str, remedy: str, where: str, *, good: str = "") -> Iterator[Finding]:
    """A kind of mistake is a weakness if it costs much; if it costs next to nothing, `good` says so. Texts take the gain."""
    gain = facts.gains.get(kind, math.nan)
    if gain >= _GAIN:
        yield _bad(bad.format(gain), remedy, where, cost=facts.in_ap(gain))
    elif gain < 0.01 and good:
        yield Finding("good", good.format(gain), where=where)


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _overall, _training, _duplicates, _confusion, _boxes, _background, _missed, _sizes, _classes, _threshold, _calibration,
    _near_duplicates, _crowding,
)  # fmt: skip
"""Each looks at some figures and yields what they come to."""
