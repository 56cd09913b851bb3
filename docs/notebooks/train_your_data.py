# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Train on your own data
#
# From a folder of annotated images to a detector and its figures. So that this runs anywhere in a minute, the folder is 60 images of digits and the training is short: far too short for a
# good detector. What changes for yours is one line, and the time: `make quickstart` does the same with 1,400 harder images and 1,400 steps ([its figures](../results/README.md)).

# %%
import json
from pathlib import Path

import numpy as np
from PIL import Image

import paqdetr
from paqdetr.data.check import check_dataset
from paqdetr.data.digits import make_digits
from paqdetr.data.stats import dataset_stats
from paqdetr.drawing import draw_boxes

data = Path("data/sixty")  # your folder: COCO, YOLO, Pascal VOC, Cityscapes or CrowdHuman
if not data.exists():
    make_digits(data, size=128, train=60, val=20, test=20, max_objects=4, min_scale=0.2)

# %% [markdown]
# ## Is the data all right?
#
# Ten minutes here save days later. The check reads every annotation and decodes every image: what is an error here would end the training, or teach it something wrong. It also finds images that
# are in two splits, which make every figure look better than it is. On the command line: `paqdetr data check DIR`.

# %%
report = check_dataset(data, workers=1)
print(f"{report.format}: {report.number_of('error')} errors, {report.number_of('warning')} warnings")
for severity, sentence in report.summary():
    print(severity, "-", sentence)
assert not report.errors, "mend these first"

# %% [markdown]
# How many boxes of which class, and how large? A class with ten boxes will not be learned. A query finds one object at most: `model.num_queries` has to be larger than the fullest image.

# %%
stats = dataset_stats(data)["train"]
print(dict(zip(stats.annotations.classes.names, stats.per_class.tolist())))
print("boxes of the fullest image:", stats.per_image.max())
print("median side of a box:", round(float(np.median(stats.sides))), "pixels")

# %% [markdown]
# Look at some images with their boxes, always. `paqdetr data preview DIR` draws the batches as the model gets them, augmented.

# %%
truth = json.loads((data / "train.json").read_text())
names = {one["id"]: one["name"] for one in truth["categories"]}
first = truth["images"][0]
boxes = [one for one in truth["annotations"] if one["image_id"] == first["id"]]
corners = [(x, y, x + width, y + height) for x, y, width, height in (one["bbox"] for one in boxes)]
picture = Image.open(data / "train" / first["file_name"])
draw_boxes(picture, corners, [one["category_id"] for one in boxes], names).resize((384, 384))

# %% [markdown]
# ## Train
#
# `dino_nano` is the model for CPUs and short trainings; with a GPU take `dino_r50`. The settings here make the training small, but for one: a mirrored 2 is no 2, so digits are not flipped. Leave
# `augment.flip` out unless your classes are like that. `paqdetr plan dino_nano --data DIR` says how long yours would take.
#
# Stopped with Ctrl-C or killed, the same call with `resume=True` goes on from the last saved step; once it is finished, it does nothing.

# %%
run = paqdetr.train(
    "dino_nano",
    data=data,
    output="runs/sixty",
    resume=True,
    epochs=6,  # yours: a few thousand steps, at 4 images each
    image_size=128,  # the long side; 320 to 640 for real photographs
    settings={"augment.flip": 0, "model.num_queries": 20, "eval_every": 3},
)
for record in run.records("eval"):
    print(
        f"epoch {record['epoch']}: AP {record['AP']:.3f}, AP50 {record['AP50']:.3f}, after NMS {record['AP_nms']:.3f}"
    )

# %% [markdown]
# AP after NMS lies above AP as long as the model answers one object with several boxes. A DETR learns to find objects long before it learns to detect each only once, so a wide gap says: train longer.

# %%
Image.open(run.output / "curves.png")

# %%
Image.open(run.output / "predictions.png")

# %% [markdown]
# ## How good is it?
#
# On images that neither the training nor the choice of the best epoch has seen. Twenty of them say little: `paqdetr analyze` puts an interval to every figure.

# %%
model = paqdetr.load(run.best)
evaluation = paqdetr.evaluate(model, data=data, split="test")
print(f"AP {evaluation.figures.AP:.3f}, AP50 {evaluation.figures.AP50:.3f}, after NMS {evaluation.figures_nms.AP:.3f}")
print(f"{evaluation.predictions_per_image:.1f} confident predictions an image, {evaluation.boxes_per_image:.1f} boxes")

# %% [markdown]
# ## What next
#
# | you see | do |
# |---|---|
# | the loss still falls at the end | more `epochs`, before anything else |
# | AP of train is high, of val low | more data, `augment.color=0.3`, `augment.mosaic=0.5`, `patience=5` |
# | small objects are missed | a larger `image_size`; tiles in [predict](../predict.md) |
# | you have weights of a similar task | `init=CHECKPOINT` ([fine-tuning](../finetuning.md)) |
# | you wonder whether a change helped | `paqdetr eval --compare A B`, and more than one seed ([evaluation](../evaluation.md)) |
#
# Then [read the report](read_the_report.md), and [take it into use](deploy.md).
