# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Take it into use
#
# A trained detector, in a program: which detections to trust, what to write, and a file that runs without torch and faster ([how much](../deploy.md)).
#
# The detector is the one of [train on your own data](train_your_data.md): 60 images and a minute of training, so expect its detections to be poor, and everything around them to work.

# %%
import time
from pathlib import Path

import paqdetr
from paqdetr.data.digits import make_digits

data = Path("data/sixty")
if not data.exists():
    make_digits(data, size=128, train=60, val=20, test=20, max_objects=4, min_scale=0.2)
settings = {"augment.flip": 0, "model.num_queries": 20, "eval_every": 3}
run = paqdetr.train(
    "dino_nano", data=data, output="runs/sixty", resume=True, epochs=6, image_size=128, settings=settings
)

# %% [markdown]
# ## Detect
#
# `load` takes a run, a checkpoint or an exported file; all predict in the same way. Images are paths, folders, PIL images, arrays or tensors; boxes come out in pixels of the image as it was given, with the category ids of your data.
#
# Without a threshold the model's own is used: the one at which its last evaluation found the best balance of found and false.

# %%
model = paqdetr.load(run.best)
pictures = sorted((data / "test").glob("*.jpg"))
print("operating point:", model.operating_point)
detections = model(pictures[0])[0]
print(detections)

# %% [markdown]
# Boxes, scores and labels are arrays; `detections[0].name` is one of them, `detections[detections.scores > 0.5]` and `detections["7"]` are some, and `to_coco`, `to_yolo`, `to_voc`, `to_pandas` and
# `to_supervision` turn them into what other programs take.

# %%
detections[:3].draw().resize((384, 384))

# %% [markdown]
# - A higher `threshold` means fewer false detections and more missed ones. Choose it on your validation split, by what each costs you.
# - `nms=0.7` takes out duplicates. A well-trained DETR needs none; after a short training it helps.
# - `classes=["7"]` keeps some of the classes, and `tiles=640` cuts large images into tiles, for small objects.

# %%
sure = model(pictures, threshold=0.2, nms=0.7, batch_size=4)
print(sum(map(len, sure)), "detections in", len(sure), "images")
print(sure[0].to_coco(rounded=True)[:1])

# %% [markdown]
# Folders, videos and cameras: `model.stream("clip.mp4")` yields frame by frame, and `paqdetr predict RUN SOURCE --save draw,coco,yolo` writes pictures and files ([predict](../predict.md)).
#
# ## A file that runs without torch
#
# `export` (`pip install 'paqdetr[export]'`) writes ONNX (or OpenVINO), then compares the file with the model on pictures: detection by detection, not by the eye. Where they differ, nothing is kept. It takes about half a minute.

# %%
export = paqdetr.export(run.best, "runs/sixty/model.onnx", overwrite=True)
print(export.file, f"{export.file.stat().st_size / 2**20:.0f} MiB")
print(f"largest difference of a score: {max(image.max_score_difference for image in export.parity.images):.0e}")

# %%
exported = paqdetr.load(export.file, threads=1)
again = exported(pictures, threshold=0.2, nms=0.7)
print([len(one) for one in sure])
print([len(one) for one in again])

# %% [markdown]
# The counts are equal, or nearly: a file has one image size, so images are stretched to it where the model keeps their aspect.


# %%
def milliseconds(detector):
    detector.predict(pictures[0])
    start = time.perf_counter()
    for _ in range(5):
        detector.predict(pictures[0])
    return (time.perf_counter() - start) / 5 * 1000


print(f"torch {milliseconds(model):.0f} ms, onnxruntime {milliseconds(exported):.0f} ms")

# %% [markdown]
# Where it goes from here:
#
# | you want | do |
# |---|---|
# | another program or language to call it | the file takes uint8 RGB images and gives boxes, scores and labels: [deploy](../deploy.md) |
# | requests over HTTP, and a page to try it | `paqdetr serve runs/sixty/model.onnx` ([serve](../serve.md)) |
# | an Intel CPU, or int8 | `paqdetr.export(..., format="openvino")`; `precision="int8", calibrate=data` as well measures whether int8 pays ([deploy](../deploy.md)) |
# | to share it | `paqdetr hub push` ([serve](../serve.md)) |
# | millions of pictures | `paqdetr predict --ray` ([scale](../scale.md)) |
