"""Real models of transformers, written by save_pretrained and read back as ours: outputs have to be equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from paqdetr.convert import COCO, convert_checkpoint
from paqdetr.errors import CheckpointError

pytestmark = pytest.mark.integration

transformers = pytest.importorskip("transformers")

KINDS = {
    "one-stage": dict(with_box_refine=False, two_stage=False),
    "refine": dict(with_box_refine=True, two_stage=False),
    "two-stage": dict(with_box_refine=True, two_stage=True),
}


def _model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.DeformableDetrConfig(
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_n_points=3,
        decoder_n_points=3,
        two_stage_num_proposals=8,
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": "resnet18",
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [2, 3, 4],
        },
        **KINDS[kind],
        **{"num_labels": 5, "num_queries": 9} | options,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # heads and offsets start at zero, which would prove little
            if parameter.count_nonzero() == 0:
                nn.init.normal_(parameter, std=0.1)
    model.tie_weights()
    return model


def _outputs(model: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Theirs, and the batch: two images, the second padded."""
    images = torch.randn(2, 3, 128, 160)
    mask = torch.zeros(2, 128, 160, dtype=torch.bool)
    mask[1, 96:] = True
    mask[1, :, 120:] = True
    images = images.masked_fill(mask[:, None], 0.0)
    with torch.no_grad():
        return model(images, pixel_mask=(~mask).long()), images, mask


@pytest.mark.parametrize("kind", list(KINDS))
def test_outputs_are_equal(kind: str, tmp_path: Path) -> None:
    theirs = _model(kind)
    theirs.save_pretrained(tmp_path)
    wanted, images, mask = _outputs(theirs)
    model, report = convert_checkpoint(tmp_path, origin="transformers")
    with torch.no_grad():
        found = model(images, mask)
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.pred_logits, wanted.logits, atol=1e-4, rtol=1e-4)
    assert not report.fresh and not report.dropped
    assert model.config.num_queries == (8 if kind == "two-stage" else 9)
    assert model.config.box_refinement is (kind != "one-stage")


@pytest.mark.parametrize("size", [(100, 133), (90, 200), (200, 90)])
def test_predictions_equal_those_of_its_own_processor(size: tuple[int, int], tmp_path: Path) -> None:
    """From the picture to boxes; the second and third pass the limit of the long side."""
    theirs = _model("refine", num_queries=60)
    theirs.save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    processor = transformers.DeformableDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    inputs = processor(picture, return_tensors="pt")
    model, _ = convert_checkpoint(tmp_path, origin="transformers", settings={"image_size": [96, 160]})
    assert model.preprocessing.target_size(*size) == tuple(inputs["pixel_values"].shape[2:])
    with torch.no_grad():
        outputs = theirs(**inputs)
    (wanted,) = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=[size])
    (found,) = model.predict(picture, threshold=0.0)
    assert len(wanted["scores"]) == 100  # of 300 scores
    assert found.scores == pytest.approx(wanted["scores"].numpy(), abs=1e-5)
    assert found.labels.tolist() == wanted["labels"].tolist()
    assert np.abs(found.boxes - wanted["boxes"].numpy()).max() < 0.01


def test_the_single_file_beside_its_config_is_enough(tmp_path: Path) -> None:
    _model("refine").save_pretrained(tmp_path)
    model, report = convert_checkpoint(tmp_path / "model.safetensors", origin="transformers")
    assert model.config.num_heads == 4
    assert report.settings["num_heads"].known_from == "arguments in the file"


def test_a_sharded_folder_gives_the_same_model(tmp_path: Path) -> None:
    theirs = _model("two-stage")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="10MB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    whole, parts = (
        convert_checkpoint(tmp_path / name, origin="transformers")[0].state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_names_of_version_5_in_memory_are_known(tmp_path: Path) -> None:
    theirs = _model("two-stage")
    theirs.save_pretrained(tmp_path)
    on_disk, _ = convert_checkpoint(tmp_path, origin="transformers")
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")
    given = {"num_heads": 4, "num_queries": 8}
    in_memory, _ = convert_checkpoint(tmp_path / "memory.pth", origin="transformers", settings=given)
    ours, other = on_disk.state_dict(), in_memory.state_dict()
    assert all(torch.equal(ours[key], other[key]) for key in ours)


def test_91_labels_become_coco(tmp_path: Path) -> None:
    theirs = _model("refine", num_labels=91)
    names = {row: COCO.id_to_name.get(row, "N/A") for row in range(91)}
    theirs.config.id2label, theirs.config.label2id = names, {name: row for row, name in names.items()}
    theirs.save_pretrained(tmp_path)
    wanted, images, mask = _outputs(theirs)
    model, _ = convert_checkpoint(tmp_path, origin="transformers")
    with torch.no_grad():
        found = model(images, mask)
    assert model.classes == COCO
    torch.testing.assert_close(found.pred_logits, wanted.logits[..., list(COCO.ids)], atol=1e-4, rtol=1e-4)


def test_labels_come_with_their_names(tmp_path: Path) -> None:
    theirs = _model("refine", id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}, num_labels=2)
    theirs.save_pretrained(tmp_path)
    model, _ = convert_checkpoint(tmp_path, origin="transformers")
    assert model.classes.names == ("cat", "dog")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "detr", "made with model_type='detr'"),
        ("activation_function", "gelu", "made with activation_function='gelu'"),
        ("decoder_attention_heads", 8, "encoder_attention_heads=4 and decoder_attention_heads=8"),
    ],
)
def test_what_cannot_be_built_is_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    _model("refine").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path, origin="transformers")
