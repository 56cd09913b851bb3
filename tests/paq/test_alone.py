"""`paqdetr.paq` for someone who uses nothing else: a process in which no other package can be imported."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

import paqdetr

pytestmark = pytest.mark.integration

WANTED = ("torch", "torchvision", "scipy", "numpy")

SCRIPT = """
import sys

allowed, finders = set(sys.argv[1].split(",")) | sys.stdlib_module_names, list(sys.meta_path)

class OnlyAllowed:
    # Whatever else is installed cannot be found.
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top.startswith("_sysconfigdata"):
            return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [OnlyAllowed()]
try:
    import pydantic
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the test does not keep packages away")

import torch
from paqdetr.paq import (
    FixedKAssigner, OneToOneAssigner, PatternQueries, QualityAwareAssigner, SimOTAAssigner,
    StaticMixtures,
    Targets, focal_loss, match_layers, pattern_diversity_loss, varifocal_loss,
)
torch.manual_seed(0)
queries = PatternQueries(10, 4, 16, 2)
head, box_head = torch.nn.Linear(16, 3), torch.nn.Linear(16, 4)
content = queries(torch.randn(2, 20, 16), [(4, 4), (2, 2)]).content
assert StaticMixtures(10, 4, 16)(content, []).content.shape == content.shape
logits, boxes = head(content)[None].repeat(5, 1, 1, 1), box_head(content).sigmoid()[None].repeat(5, 1, 1, 1)
targets = [Targets(torch.tensor([0, 2]), torch.rand(2, 4)), Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))]
rules = [QualityAwareAssigner(), QualityAwareAssigner(select="score"), FixedKAssigner(), SimOTAAssigner()]
rules.append(OneToOneAssigner())
goal = torch.zeros_like(logits)
for layer, images in enumerate(match_layers(logits, boxes, targets, rules)):
    for image, pairs in enumerate(images):
        goal[layer, image, pairs.query_indices, targets[image].labels[pairs.target_indices]] = 0.5
loss = varifocal_loss(logits, goal).sum() + focal_loss(logits, goal.ceil()).sum() + pattern_diversity_loss(queries.patterns)
loss.backward()
assert queries.patterns.grad.abs().sum() > 0
print("done", *sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def required_by(wanted: tuple[str, ...]) -> set[str]:
    """These distributions and all they require, extras left out."""
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:  # for another platform
            continue
        waiting += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    return found


def test_paq_needs_four_libraries_and_what_they_need() -> None:
    there = required_by(WANTED)
    allowed = {
        module
        for module, distributions in packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", name).lower() in there for name in distributions)
    } | {"paqdetr"}
    assert not allowed & {"timm", "accelerate", "pydantic", "yaml", "transformers", "safetensors", "matplotlib"}
    command = [sys.executable, "-c", SCRIPT, ",".join(sorted(allowed))]
    source = str(Path(paqdetr.__file__).parents[1])
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"done", "paqdetr", "torch", "scipy"} <= loaded
    assert not loaded & {"timm", "accelerate", "pydantic", "yaml", "transformers", "safetensors", "supervision"}
