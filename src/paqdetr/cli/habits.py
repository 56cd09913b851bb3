"""What users of other programs type by habit, and what is to be typed here instead.

One mechanism: words of a command line that its verb does not take are looked up in the tables below, and the whole line is
written anew. What no table knows is left to the usual errors.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paqdetr.other_programs import SWITCHES, WORDS

# Verbs of ultralytics, rf-detr, detectron2, mmdetection, transformers and others.
VERBS = {
    "val": "eval", "validate": "eval", "validation": "eval", "evaluate": "eval", "evaluation": "eval",
    "test": "eval --split test",
    "detect": "predict", "detection": "predict", "infer": "predict", "inference": "predict", "demo": "predict",
    "prediction": "predict", "track": "predict",
    "fit": "train", "finetune": "train", "fine-tune": "train", "fine_tune": "train", "training": "train",
    "benchmark": "bench", "profile": "bench", "speed": "bench",
    "report": "analyze", "analyse": "analyze", "visualize": "analyze", "explain": "analyze",
    "list": "models", "zoo": "models", "summary": "info", "describe": "info", "inspect": "info", "show": "info",
    "cfg": "config show", "settings": "config show", "recipes": "config list",
    "check": "data check", "checks": "data check", "stats": "data stats", "preview": "data preview", "split": "data split",
    "make": "data make", "browse": "data preview", "dataset": "data check",
    "push": "hub push", "upload": "hub push", "pull": "hub pull", "download": "hub pull",
    "server": "serve", "deploy": "export", "version": "--version",
}  # fmt: skip

_KEY = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_NUMBER = re.compile(r"[\d.,\[\]e+-]*\d[\]]?")
_OFF = ("false", "0", "no", "none")


@dataclass
class _Line:
    """The words after a verb, sorted into what the verb takes."""

    arguments: Sequence[str]
    options: Mapping[str, int]  # name -> how many words follow it
    positionals: list[str] = field(default_factory=list)
    given: dict[str, list[str]] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # why -> the words of `wrong`
    gpus: str = ""

    @property
    def takes_settings(self) -> bool:
        return "KEY=VALUE" in self.arguments

    def read(self, words: list[str]) -> bool:
        """Sort all words; whether each of them has a place."""
        while words:
            word = words.pop(0)
            name, equals, value = word.partition("=")
            pair = _KEY.fullmatch(word)
            if word.startswith("--") and name in self.options:
                count = 0 if equals else self.options[name]
                self.given[word] = [words.pop(0) for _ in range(min(count, len(words)))]
            elif word.startswith("--"):
                if not self._place(name, name[2:], [value] if equals else words):
                    return False
            elif word.isupper() and "." in word and words and word.lower() in WORDS:  # SOLVER.BASE_LR 0.001
                self._place(word, word, words)
            elif pair and self.takes_settings and self._setting(name) == name and not self._is_folder(name):
                self.settings.append(word)
            elif not pair or "FACT=VALUE" in self.arguments or Path(word).exists():
                self.positionals.append(word)
            elif not self._place(f"{name}=", name, [value]):
                if not self.takes_settings:
                    self.positionals.append(word)
                elif (setting := self._setting(name)) is not None:
                    self.settings.append(f"{setting}={value}")
                else:
                    return False  # the error about the setting says what is near
        self._set_apart_gpus()
        return True

    def _set_apart_gpus(self) -> None:
        """A device that is several, which no verb takes."""
        for word, values in list(self.given.items()):
            option, _, joined = word.partition("=")
            value = "".join(values) or joined
            if option == "--device" and "," in value:
                del self.given[word]
                self.gpus = value
                self.wrong.append(f"{option} {value}")

    def _is_folder(self, name: str) -> bool:
        return name == "name" and "project=" in self.wrong  # project=runs name=first

    def _place(self, word: str, key: str, values: list[str]) -> bool:
        """Put the value of a word that the verb does not take where it belongs; whether there is such a place."""
        key = key.lower().replace("-", "_")
        place = self._find(word, key)
        if place is None:
            return False
        self.wrong.append(word)
        follows = values and not values[0].startswith("--")
        if place[:1] in ("*", "!") and (reason := place[1:]):
            if follows and (place[0] == "*" or values[0].lower() in (*_OFF, "true")):
                values.pop(0)
            while values and _NUMBER.fullmatch(values[0]):
                values.pop(0)
            self.left_out.setdefault(reason, []).append(word)
            return True
        option, _, fixed = place.partition(" ")
        setting, equals, set_to = place.partition("=")
        takes = not (fixed or set_to or place == "" or self.options.get(option) == 0)
        value = values.pop(0) if follows and (takes or values[0].lower() in (*_OFF, "true")) else None
        off = value is not None and value.lower() in _OFF
        switched = key in SWITCHES and (value is None or off or value.lower() == "true")
        if place in ("", "*") or switched or (not takes and off):
            return True
        if place == "GPUS":
            self.gpus = value or ""
            return True
        if equals:
            self.settings.append(f"{place}{value or 'VALUE'}" if takes else place)
        elif place.startswith("--"):
            before = self.given.get(option, []) if key == "name" else []
            self.given[option] = ["/".join([*before, value or "VALUE"])] if takes else fixed.split()
        elif place == "MODEL":
            self.positionals.insert(0, value or place)
        else:
            self.positionals.append(value or place)
        return True

    def _find(self, word: str, key: str) -> str | None:
        if (option := f"--{key.replace('_', '-')}") in self.options:
            return option
        for place in WORDS.get(key, "?").split("|"):
            known = place[:1] in ("", "*", "!") or place in ("MODEL", "GPUS", *self.arguments)
            if known or place.partition(" ")[0] in self.options or (self.takes_settings and "=" in place):
                return place
        setting = self._setting(key) if self.takes_settings and word.startswith("--") else None
        return None if setting is None else f"{setting}="

    def _setting(self, key: str) -> str | None:
        """The dotted name of a setting."""
        from paqdetr.config import known_keys  # needs pydantic, and an exported model runs without

        return next((name for name in known_keys() if key in (name, name.rpartition(".")[2])), None)


def what_to_type(words: Sequence[str], program: Any) -> tuple[str, str] | None:
    """What is wrong with a command line that other programs would take, and the command that does the same here.

    Args:
        words: after the program's name.
        program: the command of the program, with its verbs.

    Returns:
        the two sentences of an error; None if every word is one of ours, or unknown to the tables.
    """
    if not words or words[0].startswith("-"):
        return None
    path, names, command, wrong = list(words), [], program, ""
    mode = next((word.partition("=")[2] for word in path if word.startswith("mode=")), None)
    if mode is not None and "=" in path[0]:
        path.insert(0, mode)
    if path[0] in VERBS and path[0] not in program.commands and (*path, "")[1] in {*VERBS, *program.commands}:
        wrong = path.pop(0)  # detect train
    while path and (known := getattr(command, "commands", None)) is not None:
        if path[0] not in known:
            ours = VERBS.get(path[0], "").split()
            if ours[: len(names)] != names or len(ours) == len(names):
                return None
            wrong = wrong or path[0]
            path[:1] = ours[len(names) :]
        if path[0] not in known:  # --version
            return f"`paqdetr` has no verb {wrong}", f"type: paqdetr {path[0]}"
        command = known[path[0]]
        names.append(path.pop(0))
    if hasattr(command, "commands"):
        return None
    arguments = {param.metavar or param.name.upper(): param for param in command.params if _is(param, "argument")}
    options = [param for param in command.params if _is(param, "option")]
    takes = {name: 0 if param.is_flag else param.nargs for param in options for name in param.opts}
    line = _Line(list(arguments), takes | {"--help": 0, "-h": 0})
    if not line.read(path) or not (wrong or line.wrong):
        return None
    if list(arguments)[:1] == ["DIR"] and len(line.positionals) == 2:  # data preview MODEL --data DIR
        model = line.positionals.pop(0)
        if "--model" in takes:
            line.given.setdefault("--model", [model])
    given = {name.partition("=")[0] for name in line.given}
    needed = {param.opts[0] for param in options if param.required}
    missing = [name for name, param in arguments.items() if param.required][len(line.positionals) :]
    if names == ["train"] and "--resume" not in given:  # a run that is resumed by its folder says both
        needed |= {"--data", "--output"}
    if names == ["eval"] and not given & {"--results", "--compare"}:
        needed.add("--data")
        missing = [] if line.positionals else ["MODEL"]
    start, note = _program(line.gpus, names[0])
    typed = [start, shlex.join([*names, *line.positionals]), *missing]
    typed += [shlex.join([name, *values]) for name, values in line.given.items()]
    typed += [f"{name} DIR" for name in sorted(needed - given)]
    typed += map(shlex.quote, line.settings)
    found = f"`paqdetr {' '.join(names)}` has no {', '.join(dict.fromkeys(line.wrong))}"
    found = f"`paqdetr` has no verb {wrong}" if wrong else found
    for reason, lost in line.left_out.items():
        found += f"; {', '.join(dict.fromkeys(lost))} left out: {reason}"
    return f"{found}{note}", f"type: {' '.join(typed)}"


def _program(gpus: str, verb: str) -> tuple[str, str]:
    """What starts a verb on these GPUs, "2" or "0,1" (any number of them if ""), and what is to be said of it."""
    numbers = re.findall(r"\d+", gpus)
    chosen = numbers if "," in gpus else [str(i) for i in range(int(numbers[0][:4]))] if numbers else []
    if len(chosen) < 2:
        return "paqdetr", ""
    if verb not in ("train", "eval"):
        return "paqdetr", f"; {verb} runs on one device"
    start = f"torchrun --nproc_per_node={len(chosen)} -m paqdetr"
    first = chosen == [str(i) for i in range(len(chosen))]
    start = start if first else f"CUDA_VISIBLE_DEVICES={','.join(chosen)} {start}"
    return start, "; each GPU has a process of its own, and batch_size is that of one"


def _is(param: Any, kind: str) -> bool:
    return param.param_type_name == kind
