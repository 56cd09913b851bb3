# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Read the report
#
# One number, AP, says whether a detector is good, not why. `paqdetr analyze` writes one HTML page that says what it does well and badly, shows the images, and looks inside. This notebook makes one
# and goes through it in the order in which it pays: first what costs AP, then which images, then the inside.
#
# The detector is the one of [train on your own data](train_your_data.md): 60 images, a minute of training. Its report is one of a bad detector, which is what a report is for.

# %%
from pathlib import Path

from IPython.display import Markdown

import paqdetr
from paqdetr.data.digits import make_digits
from paqdetr.report.page import to_table

data = Path("data/sixty")
if not data.exists():
    make_digits(data, size=128, train=60, val=20, test=20, max_objects=4, min_scale=0.2)
settings = {"augment.flip": 0, "model.num_queries": 20, "eval_every": 3}
run = paqdetr.train(
    "dino_nano", data=data, output="runs/sixty", resume=True, epochs=6, image_size=128, settings=settings
)

# %%
report = paqdetr.analyze(run.output, data=data, output="runs/report", split="val", images=3, samples=200)
print("open", report.page, f"- {report.page.stat().st_size / 2**20:.1f} MiB, needs no network and no other file")
for section in report.sections:
    print("-", section.title)

# %% [markdown]
# ## How good, and how sure is that?
#
# Every figure has an interval: how far it depends on which images the split happens to hold. Two models whose intervals overlap may still differ, since both saw the same images: give `against=OTHER_RUN`, and
# the difference is resampled in pairs.

# %%
parts = {part.name: part for section in report.sections for part in section.parts}


def show(name):
    """A table of the report."""
    return Markdown(to_table(parts[name]))


show("figures")

# %% [markdown]
# ## What it says first
#
# The page begins with what the model does well and badly, what costs most before the rest, each line with advice.

# %%
for finding in parts["findings_a"].items:
    print(f"{finding.kind}: {finding.text}", f"\n  -> {finding.advice}" if finding.advice else "")

# %% [markdown]
# ## What costs AP?
#
# - **Duplicates**: AP after NMS less AP. Much of it in short trainings. Train longer; until then, predict with `nms=`.
# - **Mistakes**: what AP50 would gain if all mistakes of one kind were corrected. Classification: look at the confusion matrix, and at the labels. Localisation: more training, a larger `image_size`.
#   Missed: small or rare objects, or images without their boxes annotated.

# %%
cost = report.figures["AP_nms"] - report.figures["AP"]
print(f"AP {report.figures['AP']:.3f}, after NMS {report.figures['AP_nms']:.3f}: duplicates cost {cost:.3f}")
show("mistake_counts")

# %% [markdown]
# ## Which images?
#
# The page shows the worst images first, in a gallery that filters by class and by kind of mistake. Look there for objects that nobody annotated, for wrong labels, and for what the training data never had, before you touch a setting: most of what
# looks like a weakness of the model is one of the data.
#
# ## Inside
#
# Layer by layer: what the detector would answer if it stopped after each decoder layer. If the last layer adds nothing, it needs no more layers. If the encoder's proposals already miss the objects, no
# decoder can find them.

# %%
show("layer_figures")

# %% [markdown]
# Where the queries behind the three surest detections look in the last layer. Points that stay far from the object are context, or waste.

# %%
parts["attention_0"].images[-1]

# %% [markdown]
# How evenly queries are used, and how not to read that: [queries](../queries.md). Every part of the page is described in [the report](../analyze.md), and the numbers behind each plot lie as json in `data/` beside it.
#
# Next: [take it into use](deploy.md).
