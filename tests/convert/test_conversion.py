from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from paqdetr.config import ModelConfig
from paqdetr.convert import COCO, ConversionReport, convert_checkpoint
from paqdetr.errors import CheckpointError, ConfigError, UserError
from paqdetr.models import Detector, create_model, load

pytestmark = pytest.mark.integration

if TYPE_CHECKING:
    from tests.convert.conftest import Original  # its fixtures make them

HEADS, QUERIES = 4, 7
Make = Callable[[str], "Original"]


def convert(original: Original, **options: Any) -> tuple[Detector, ConversionReport]:
    given = {"num_heads": HEADS, "num_queries": QUERIES} | options.pop("settings", {})
    return convert_checkpoint(original.save(), origin=original.origin, settings=given, **options)


# For each program: their tensor, ours, and what is done on the way. What takes part in predictions is proven in test_outputs.py.
SLOTS = list(COCO.ids)
PLACES: dict[str, list[tuple[str, str, Callable[[Tensor], Tensor]]]] = {
    "dino": [
        ("label_enc.weight", "denoising.label_embed.weight", lambda x: x[SLOTS]),
        ("class_embed.2.bias", "decoder.class_heads.0.bias", lambda x: x[SLOTS]),
        ("transformer.enc_out_class_embed.weight", "start.head.class_head.weight", lambda x: x[SLOTS]),
        ("transformer.decoder.layers.1.norm2.bias", "decoder.layers.1.self_norm.bias", lambda x: x),
        ("transformer.decoder.layers.1.norm1.bias", "decoder.layers.1.cross_norm.bias", lambda x: x),
        ("transformer.decoder.ref_point_head.layers.1.weight", "decoder.position_head.2.weight", lambda x: x),
        ("input_proj.3.0.weight", "neck.extra.0.0.weight", lambda x: x),
    ],
    "dino unshared": [("bbox_embed.2.layers.2.weight", "decoder.box_heads.2.4.weight", lambda x: x)],
    "dino swin": [
        (
            "backbone.0.layers.0.downsample.reduction.weight",
            "backbone.body.layers_1.downsample.reduction.weight",
            lambda x: x,
        ),
        ("backbone.0.norm1.weight", "backbone.norms.0.weight", lambda x: x),
    ],
    "dino 5scale swin": [("backbone.0.norm0.weight", "backbone.norms.0.weight", lambda x: x)],
    "detrex dino": [
        ("label_enc.weight", "denoising.label_embed.weight", lambda x: x),
        ("class_embed.3.weight", "start.head.class_head.weight", lambda x: x),
        ("backbone.res3.0.shortcut.norm.bias", "backbone.body.layer2.0.downsample.1.bias", lambda x: x),
    ],
    "detrex dn": [("label_encoder.weight", "denoising.label_embed.weight", lambda x: x[:80])],
    "detrex dn newer": [("denoising_generator.label_encoder.weight", "denoising.label_embed.weight", lambda x: x[:80])],
    "dn_detr": [
        ("label_enc.weight", "denoising.label_embed.weight", lambda x: x[SLOTS]),
        ("refpoint_embed.weight", "start.boxes", lambda x: x),
    ],
    "deformable one-stage": [
        ("query_embed.weight", "start.position", lambda x: x[:, :128]),
        ("query_embed.weight", "query_source.table", lambda x: x[:, 128:]),
    ],
    "deformable two-stage": [
        ("class_embed.3.weight", "start.head.class_head.weight", lambda x: x[:1]),
        ("transformer.pos_trans.weight", "start.embed.0.weight", lambda x: x),
    ],
    "relation": [
        ("denoising_generator.label_encoder.weight", "denoising.label_embed.weight", lambda x: x[SLOTS]),
        ("neck.convs.3.1.bias", "neck.extra.0.1.bias", lambda x: x),
        (
            "transformer.decoder.position_relation_embedding.pos_proj.0.weight",
            "decoder.relation.project.weight",
            lambda x: x[:, :, 0, 0],
        ),
        ("transformer.hybrid_class_head.weight", "start.head.hybrid_class_head.weight", lambda x: x[SLOTS]),
        ("transformer.hybrid_bbox_head.layers.2.bias", "start.head.hybrid_box_head.4.bias", lambda x: x),
        ("transformer.hybrid_tgt_embed.weight", "hybrid_source.table", lambda x: x),
    ],
    "ddq": [
        ("bbox_head.cls_branches.3.weight", "start.head.class_head.weight", lambda x: x),
        ("bbox_head.cls_branches.4.weight", "start.head.hybrid_class_head.weight", lambda x: x),
        ("bbox_head.reg_branches.4.2.bias", "start.head.hybrid_box_head.2.bias", lambda x: x),
        ("bbox_head.aux_cls_branches.2.weight", "hybrid_heads.class_heads.2.weight", lambda x: x),
        ("bbox_head.aux_reg_branches.1.4.weight", "hybrid_heads.box_heads.1.4.weight", lambda x: x),
        ("query_map.bias", "query_source.linear.bias", lambda x: x),
    ],
    "mmdet dino": [
        ("dn_query_generator.label_embedding.weight", "denoising.label_embed.weight", lambda x: x),
        ("bbox_head.cls_branches.3.weight", "start.head.class_head.weight", lambda x: x),
        ("neck.extra_convs.0.gn.bias", "neck.extra.0.1.bias", lambda x: x),
    ],
    "mmdet dino swin": [("backbone.norm1.weight", "backbone.norms.0.weight", lambda x: x)],
    "co-detr": [
        ("query_head.label_embedding.weight", "denoising.label_embed.weight", lambda x: x),
        ("query_head.transformer.aux_pos_trans.0.bias", "auxiliary.embed.faster_rcnn.0.bias", lambda x: x),
        ("query_head.transformer.aux_pos_trans_norm.1.bias", "auxiliary.embed.atss.1.bias", lambda x: x),
        ("roi_head.0.bbox_head.fc_cls.bias", "auxiliary.heads.faster_rcnn.class_head.bias", lambda x: x[:80]),
        ("roi_head.0.bbox_head.fc_cls.bias", "auxiliary.heads.faster_rcnn.background_head.bias", lambda x: x[80:]),
        ("roi_head.0.bbox_head.fc_reg.bias", "auxiliary.heads.faster_rcnn.box_head.bias", lambda x: x),
        ("bbox_head.0.reg_convs.0.gn.bias", "auxiliary.heads.atss.regress.1.bias", lambda x: x),
        ("bbox_head.0.scales.5.scale", "auxiliary.heads.atss.scales.5", lambda x: x),
    ],
    "co-detr project swin": [
        ("query_head.dn_generator.label_embedding.weight", "denoising.label_embed.weight", lambda x: x)
    ],
}


def test_places_are_of_checkpoints_that_there_are(original_names: set[str]) -> None:
    assert set(PLACES) <= original_names, "others would never be looked at"


@pytest.fixture(scope="module")
def converted(original: Original) -> tuple[Detector, ConversionReport]:
    return convert(original)


def test_every_tensor_is_used_once_or_said_to_be_dropped(
    original: Original, converted: tuple[Detector, ConversionReport]
) -> None:
    model, report = converted
    assert report.used | set(report.dropped) == set(original.state)
    assert not report.used & set(report.dropped)
    allowed = ("the same tensor as", "shared with layer 0, verified equal", "follows from the window size")
    assert all(reason.startswith(allowed) for reason in report.dropped.values())
    assert set(report.kept) | set(report.renamed) == set(model.state_dict())
    assert not report.fresh
    ours = model.state_dict()
    for theirs, target, change in PLACES.get(original.name, []):
        assert torch.equal(ours[target], change(original.state[theirs])), (theirs, target)


def test_the_model_is_the_host_that_the_file_is_of(
    original: Original, converted: tuple[Detector, ConversionReport]
) -> None:
    model, report = converted
    assert model.classes == COCO
    assert report.model == model.name
    host = model.name.rsplit("_resnet18", 1)[0].rsplit("_swin_tiny", 1)[0]
    assert (
        host
        in {
            "dino": {"dino", "dino_5scale"},
            "detrex": {"dino", "dn_detr"},
            "dn_detr": {"dn_detr"},
            "deformable_detr": {"deformable_detr", "deformable_detr_refine", "deformable_detr_one_stage"},
            "relation_detr": {"relation_detr", "dino"},
            "mmdet_dino": {"dino"},
            "co_detr": {"co_dino"},
            "ddq": {"ddq_detr"},
        }[original.origin]
    )
    assert (model.config.dim, model.config.num_heads, model.config.num_points) == (128, HEADS, 3)
    assert (model.config.encoder_layers, model.config.decoder_layers, model.config.ffn_dim) == (2, 3, 48)
    assert model.config.num_queries == QUERIES
    assert not model.training


def test_a_converted_model_can_be_saved_and_loaded(
    converted: tuple[Detector, ConversionReport], tmp_path: Path
) -> None:
    model, _ = converted
    model.save(tmp_path / "x.safetensors")
    loaded = load(tmp_path / "x.safetensors")
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(model(images).pred_boxes, loaded(images).pred_boxes)
    assert loaded.classes.names[0] == "person" and loaded.classes.ids[-1] == 90


def test_convolutions_without_a_bias_get_one_of_zeros(make_original: Make) -> None:
    model, report = convert(make_original("relation"))
    assert model.state_dict()["neck.lateral.0.0.bias"].count_nonzero() == 0
    assert report.renamed["neck.lateral.0.0.bias"].note == "zero: the convolution had no bias"


# Shared heads


@pytest.mark.parametrize(
    ("variant", "shared"), [("dino", True), ("dino unshared", False), ("deformable one-stage", True)]
)
def test_heads_are_shared_where_all_copies_are_equal(variant: str, shared: bool, make_original: Make) -> None:
    model, report = convert(make_original(variant))
    assert model.config.share_heads is shared
    dropped = [key for key, reason in report.dropped.items() if "shared with layer 0" in reason]
    assert bool(dropped) is shared


def test_heads_that_the_program_shares_have_to_be_equal(make_original: Make) -> None:
    original = make_original("deformable one-stage")
    original.state["bbox_embed.1.layers.0.bias"] += 1
    with pytest.raises(CheckpointError, match="3 box_heads are one and the same in its program, but number 1 differs"):
        convert(original)


def test_a_second_name_with_other_values_is_an_error(make_original: Make) -> None:
    original = make_original("dino")
    original.state["transformer.decoder.bbox_embed.0.layers.0.bias"] += 1
    with pytest.raises(CheckpointError, match="two names of one tensor, but hold different values"):
        convert(original)


# What the file says of itself


def test_settings_name_their_origin(make_original: Make) -> None:
    _, report = convert_checkpoint(make_original("dino").save(), origin="dino")
    known = {key: (setting.value, setting.known_from) for key, setting in report.settings.items()}
    assert known["num_heads"] == (HEADS, "arguments in the file")
    assert known["dim"] == (128, "tensors")
    assert known["position_temperature"] == (20.0, "code of IDEA-Research/DINO")
    assert known["num_classes"] == (80, "91 slots, one a COCO category id")


def test_what_is_given_wins_over_what_the_file_says(make_original: Make) -> None:
    model, report = convert(
        make_original("detrex dino"), settings={"position_temperature": 20, "model.position_offset": 0.0}
    )
    assert (model.config.position_temperature, model.config.position_offset) == (20, 0)
    assert report.settings["position_temperature"].known_from == "given"


def test_what_published_models_have_is_assumed_and_said(make_original: Make) -> None:
    original = make_original("deformable two-stage")
    torch.save(original.state, original.path)  # without arguments
    with pytest.raises(CheckpointError, match=r"12 samples per level and width 128 do not divide into 8 heads"):
        convert_checkpoint(original.path, origin="deformable_detr")
    _, report = convert_checkpoint(original.path, origin="deformable_detr", settings={"num_heads": HEADS})
    assert report.settings["num_queries"].value == 300
    assert report.settings["num_queries"].known_from == "published models; the file does not say"


def with_argument(original: Original, argument: str, value: Any) -> Path:
    path = original.save()
    content = torch.load(path, weights_only=False)
    setattr(content["args"], argument, value)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("variant", "argument", "value"),
    [
        ("dino", "two_stage_type", "no"),
        ("dino", "dilation", True),
        ("dino", "transformer_activation", "gelu"),
        ("dn_detr", "modelname", "dn_dab_dino_deformable_detr"),
    ],
)
def test_variants_that_cannot_be_built_are_refused(
    variant: str, argument: str, value: Any, make_original: Make
) -> None:
    path = with_argument(make_original(variant), argument, value)
    with pytest.raises(CheckpointError, match=rf"made with {argument}={value!r}, which cannot be built here"):
        convert_checkpoint(path, origin=variant)


# README.md of DN-DETR trains its model of 49.5 AP with the first name, main.py knows the second.
@pytest.mark.parametrize(
    ("variant", "argument", "setting"),
    [("dino", "dn_number", "denoising_queries"), ("dn_detr", "scalar", "denoising_groups")],
)
def test_a_training_without_denoising_says_nothing_of_ours(
    variant: str, argument: str, setting: str, make_original: Make
) -> None:
    model, _ = convert_checkpoint(with_argument(make_original(variant), argument, 0), origin=variant)
    assert getattr(model.config, setting) == ModelConfig.model_fields[setting].default


@pytest.mark.parametrize("name", ["dab_deformable_detr", "dn_dab_deformable_detr"])
def test_both_names_of_dn_detrs_deformable_model_are_known(name: str, make_original: Make) -> None:
    model, _ = convert_checkpoint(with_argument(make_original("dn_detr"), "modelname", name), origin="dn_detr")
    assert model.config.denoising == "plain"


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("dino", "label_enc.weight"),
        ("detrex dino", "label_enc.weight"),
        ("dn_detr", "label_enc.weight"),
        ("relation", "denoising_generator.label_encoder.weight"),
    ],
)
def test_labels_that_the_file_has_no_row_for_start_anew(variant: str, key: str, make_original: Make) -> None:
    """DINO's label table has `dn_labelbook_size` + 1 rows, whatever the number of classes."""
    original = make_original(variant)
    table = original.state[key] = original.state[key][:20].clone()
    model, report = convert(original)
    ours = model.state_dict()["denoising.label_embed.weight"]
    rows = list(range(80)) if "detrex" in variant else list(COCO.ids)
    known = [place for place, row in enumerate(rows) if row < 20]
    assert torch.equal(ours[known], table[[rows[place] for place in known]])
    new = ours[len(known) :]
    assert new.isfinite().all() and new.std() == pytest.approx(1, abs=0.1)
    note = f"{len(known)} labels; {80 - len(known)} start anew, since the file has none for them"
    assert report.renamed["denoising.label_embed.weight"].note == note
    assert any(note in line for line in report.notes)


# What a program does to images and to detections
IMAGES = {
    "dino": ("detr", 1, 300, False),
    "detrex dino": ("detectron2", 1, 300, True),
    "detrex dn": ("detectron2", 1, 100, True),
    "dn_detr": ("detr", 1, 100, False),
    "deformable two-stage": ("detr", 1, 100, False),
    "relation": ("relation_detr", 32, 300, False),
    "ddq": ("detectron2", 1, 300, True),
}


@pytest.mark.parametrize("variant", list(IMAGES))
def test_images_and_detections_are_treated_as_the_program_does(
    variant: str, make_original: Make, tmp_path: Path
) -> None:
    model, report = convert(make_original(variant))
    model.save(tmp_path / "x.safetensors")
    kept = load(tmp_path / "x.safetensors")
    for one in (model, kept):
        found = (
            one.preprocessing.resize,
            one.preprocessing.pad_divisor,
            one.config.max_detections,
            one.config.clamp_boxes,
        )
        assert found == IMAGES[variant]
    for key, value in zip(("resize", "pad_divisor", "max_detections", "clamp_boxes"), found, strict=True):
        assert report.settings[key].value == value and report.settings[key].known_from.startswith("code of")
    # Two of them can be said by the file or by the user.
    given, _ = convert(make_original(variant), settings={"resize": "nearest", "max_detections": 7})
    assert (given.preprocessing.resize, given.config.max_detections) == ("nearest", 7)


def test_dinos_own_number_of_detections_wins(make_original: Make) -> None:
    model, _ = convert_checkpoint(with_argument(make_original("dino"), "num_select", 50), origin="dino")
    assert model.config.max_detections == 50


def test_encoder_and_decoder_have_to_be_of_one_size(make_original: Make) -> None:
    original = make_original("dino")
    for leaf, shape in (("linear1.weight", (64, 128)), ("linear1.bias", (64,)), ("linear2.weight", (128, 64))):
        for i in range(3):
            original.state[f"transformer.decoder.layers.{i}.{leaf}"] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=r"feed-forward block: 48 in encoder.*64 in decoder"):
        convert(original)


@pytest.mark.parametrize(
    ("variant", "model", "moved"),
    [
        ("ddq", "paq_ddq_detr_r50", {"query_map.weight": "hybrid_source.linear.weight"}),
        (
            "relation",
            "paq_relation_detr_r50",
            {"transformer.hybrid_class_head.bias": "start.head.hybrid_class_head.bias"},
        ),
    ],
)
def test_becomes_its_host_with_paq(
    variant: str, model: str, moved: dict[str, str], make_original: Make, tmp_path: Path
) -> None:
    original, recipe = make_original(variant), tmp_path / "small.yaml"
    recipe.write_text(f"base: {model}\nmodel: {{backbone: resnet18, hybrid_ratio: 1.3}}\n")
    found, report = convert(original, model=str(recipe))
    assert found.config.queries == "patterns" and found.config.num_hybrid == 9
    assert all(key.startswith("query_source.") for key in report.fresh)
    for theirs, ours in moved.items():
        tensor = original.state[theirs]
        assert torch.equal(found.state_dict()[ours], tensor[SLOTS] if len(tensor) == 91 else tensor)


def test_without_the_heads_of_training_it_is_the_detector_alone(make_original: Make) -> None:
    original = make_original("ddq")
    for key in [key for key in original.state if "aux_" in key or "branches.4." in key]:
        del original.state[key]
    model, report = convert(original)
    assert model.config.num_hybrid == 0 and model.hybrid_heads is None and not report.fresh


def test_one_decoder_layer_scales_no_positions(make_original: Make) -> None:
    original = make_original("dn_detr")
    later = re.compile(r"(decoder\.layers|class_embed|bbox_embed)\.[12]\.")
    for key in [key for key in original.state if later.search(key)]:
        del original.state[key]
    model, report = convert(original)
    assert model.config.decoder_layers == 1 and model.config.scale_positions
    assert model.decoder.position_scale is None
    dropped = {key for key, reason in report.dropped.items() if "does not scale positions" in reason}
    assert dropped == {key for key in original.state if ".query_scale." in key} and len(dropped) == 4


# Unknown and missing tensors


@pytest.mark.parametrize(
    ("variant", "key", "message"),
    [
        ("dino", "transformer.decoder.scale.weight", r"1 of \d+ tensors are not of .*DINO: transformer\.dec"),
        ("ddq", "query_embedding.bias", r"1 of \d+ tensors are not of DDQ-DETR: query_embedding"),
    ],
)
def test_unknown_tensors_are_an_error_unless_partial(variant: str, key: str, message: str, make_original: Make) -> None:
    original = make_original(variant)
    original.state[key] = torch.zeros(8, 64, 1, 1)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(original)
    assert "--partial" in caught.value.remedy
    _, report = convert(original, partial=True)
    assert report.dropped[key] == "unknown"


def test_missing_tensors_are_an_error_unless_partial(make_original: Make) -> None:
    original = make_original("dino")
    del original.state["transformer.enc_output.bias"]
    with pytest.raises(CheckpointError, match=r"for a dino_resnet18 it lacks start\.head\.project\.bias"):
        convert(original)
    _, report = convert(original, partial=True)
    assert report.fresh == {"start.head.project.bias": "not in the file"}


def test_misfits_are_an_error_unless_partial(make_original: Make) -> None:
    original = make_original("dino")
    original.state["transformer.enc_output.bias"] = torch.zeros(64)
    with pytest.raises(
        CheckpointError, match=r"other shapes for start\.head\.project\.bias \(64,\) instead of \(128,\)"
    ):
        convert(original)
    _, report = convert(original, partial=True)
    assert report.fresh == {"start.head.project.bias": "the file has shape (64,)"}
    assert "transformer.enc_output.bias" in report.dropped


def test_step_counters_of_norms_are_dropped_with_the_reason(make_original: Make) -> None:
    original = make_original("detrex dino")
    key = "backbone.res3.0.shortcut.norm.num_batches_tracked"
    original.state[key] = torch.tensor(7)
    _, report = convert(original)
    assert report.dropped[key] == "a step counter of batch norm, which frozen norms have no use for"


def test_a_backbone_we_do_not_know_can_be_replaced(make_original: Make) -> None:
    original = make_original("dino")
    backbone = [key for key in original.state if key.startswith("backbone.")]
    for i, key in enumerate(backbone):
        original.state[f"backbone.0.blocks.{i}.kernel"] = original.state.pop(key)
    model, report = convert(original, partial=True, settings={"backbone": "resnet18"})
    assert {key for key in report.dropped if report.dropped[key] == "unknown"} == {
        f"backbone.0.blocks.{i}.kernel" for i in range(len(backbone))
    }
    assert set(report.fresh) == {key for key in model.state_dict() if key.startswith("backbone.body.")}
    with pytest.raises(CheckpointError, match=r"no weights of a ResNet or Swin|backbone"):
        convert(original, partial=True)


def test_a_file_of_another_program_is_recognised(make_original: Make) -> None:
    with pytest.raises(CheckpointError, match=r"names look like --from dino, which knows 100% of them"):
        convert_checkpoint(make_original("dino").save(), origin="deformable_detr")


def test_widths_that_are_normed_otherwise_are_refused(make_original: Make) -> None:
    original = make_original("dino")
    original.state["transformer.level_embed"] = torch.zeros(4, 64)
    with pytest.raises(CheckpointError, match="width 64: levels are normed in 32 groups there"):
        convert(original)


def test_a_file_without_a_detector_is_named(tmp_path: Path) -> None:
    torch.save({"model": {"backbone.0.body.conv1.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"no tensor for encoder\.level_embed"):
        convert_checkpoint(tmp_path / "x.pth", origin="dino")


def test_unknown_programs_and_settings_are_named(make_original: Make) -> None:
    path = make_original("dino").save()
    with pytest.raises(ConfigError, match="--from yolo: no such program"):
        convert_checkpoint(path, origin="yolo")
    with pytest.raises(ConfigError, match="unknown setting 'num_head'"):
        convert_checkpoint(path, origin="dino", settings={"num_head": 8})


# Another model


def test_a_baseline_starts_a_paq_model(make_original: Make, tmp_path: Path) -> None:
    original = make_original("dino")
    recipe = tmp_path / "paq.yaml"
    recipe.write_text("base: paq_dino_r50\nmodel: {backbone: resnet18, num_patterns: 5}\n")
    model, report = convert(original, model=str(recipe))
    ours, baseline = model.state_dict(), convert(original)[0].state_dict()
    assert model.config.queries == "patterns" and model.config.num_patterns == 5
    assert {key for key in ours if key.startswith("query_source.")} == set(report.fresh)
    assert set(report.fresh.values()) == {"patterns instead of the file's static queries"}
    assert report.dropped["transformer.tgt_embed.weight"] == "content queries become patterns"
    for key in ours.keys() & baseline.keys():
        assert torch.equal(ours[key], baseline[key]), key
    # Heads that the baseline shares are copied: PaQ trains the last layer otherwise than the rest.
    assert not model.config.share_heads
    assert torch.equal(ours["decoder.box_heads.2.4.weight"], baseline["decoder.box_heads.0.4.weight"])
    assert model.config.refine_from == "raw"  # the weights' own conventions stay
    assert model(torch.randn(1, 3, 96, 96)).pred_boxes.isfinite().all()


def test_content_from_proposals_becomes_patterns(make_original: Make, tmp_path: Path) -> None:
    original = make_original("deformable two-stage")
    recipe = tmp_path / "paq.yaml"
    recipe.write_text("base: paq_deformable_detr_r50\nmodel: {backbone: resnet18}\n")
    model, report = convert(original, model=str(recipe))
    half = original.state["transformer.pos_trans.weight"][:128]
    assert torch.equal(model.state_dict()["start.embed.0.weight"], half)
    assert "position half" in report.renamed["start.embed.0.weight"].note
    assert all(key.startswith("query_source.") for key in report.fresh)


def test_a_checkpoint_of_ours_starts_a_paq_model(tmp_path: Path) -> None:
    small = {"dim": 32, "ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 6}
    baseline = create_model("dn_detr_nano", num_classes=3, **small)
    baseline.save(tmp_path / "best.safetensors")
    model, report = convert_checkpoint(tmp_path, origin="paqdetr", model="paq_dn_detr_nano")
    ours, theirs = model.state_dict(), baseline.state_dict()
    assert model.name == "paq_dn_detr_nano" and model.classes == baseline.classes
    assert set(report.kept) == {key for key in theirs if key != "query_source.table"}
    assert all(torch.equal(ours[key], theirs[key]) for key in report.kept)
    assert report.dropped == {"query_source.table": "content queries become patterns"}
    assert all(key.startswith("query_source.") for key in report.fresh)
    same, whole = convert_checkpoint(tmp_path / "best.safetensors", origin="paqdetr")
    assert same.name == "dn_detr_nano" and set(whole.kept) == set(theirs)


def test_queries_of_the_same_kind_keep_their_settings(tmp_path: Path) -> None:
    small = {"dim": 32, "ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 6}
    other = {
        "temperature": 0.25,
        "head": "factorised",
        "num_patterns": 9,
        "mixture": "residual",
        "mixture_input": "both",
    }
    trained = create_model("paq_co_dino_nano", num_classes=3, **small, **other).eval()
    trained.save(tmp_path / "best.safetensors")
    model, report = convert_checkpoint(tmp_path, origin="paqdetr", model="paq_dino_nano")
    assert not report.fresh and {key: getattr(model.config, key) for key in other} == other
    assert report.settings["temperature"].known_from == "header of the file"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).pred_logits, trained(images).pred_logits)
    given, _ = convert_checkpoint(tmp_path, origin="paqdetr", model="paq_dino_nano", settings={"temperature": 2.0})
    assert given.config.temperature == 2


@pytest.mark.parametrize("key", ["classes", "weights"])
def test_a_checkpoint_of_ours_says_its_classes_itself(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}: a checkpoint of ours holds them itself"):
        convert_checkpoint(tmp_path / "best.safetensors", origin="paqdetr", settings={key: "coco"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("paq_dino_r50", "backbone='resnet18', and paq_dino_r50 has backbone='resnet50'"),
        ("paq_dino_r5", "unknown model or recipe"),
    ],
)
def test_a_model_of_another_host_is_refused(model: str, message: str, make_original: Make) -> None:
    with pytest.raises(UserError, match=message):
        convert(make_original("dino"), model=model)


def test_another_host_is_refused(make_original: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "dn.yaml"
    recipe.write_text("base: paq_dn_detr_r50\nmodel: {backbone: resnet18}\n")
    with pytest.raises(CheckpointError, match=r"positions='proposals', and .* has positions='anchors': another host"):
        convert(make_original("dino"), model=str(recipe))


# Parts of training alone


def test_auxiliary_heads_can_be_left_out_and_come_back(make_original: Make, tmp_path: Path) -> None:
    for name in ("dino_5scale", "co_dino"):
        (tmp_path / f"{name}.yaml").write_text(f"base: {name}_r50\nmodel: {{backbone: resnet18}}\n")
    with_heads, _ = convert(make_original("co-detr"))
    with_heads.save(tmp_path / "x.safetensors")
    without, report = convert_checkpoint(
        tmp_path / "x.safetensors", origin="paqdetr", model=str(tmp_path / "dino_5scale.yaml")
    )
    heads = {key for key in with_heads.state_dict() if key.startswith("auxiliary.")}
    assert set(report.dropped) == heads and not report.fresh and without.auxiliary is None
    assert set(report.dropped.values()) == {"a part of training alone that dino_5scale does not have"}
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(with_heads(images).layers.boxes, without(images).layers.boxes)
    without.save(tmp_path / "y.safetensors")
    again, report = convert_checkpoint(
        tmp_path / "y.safetensors", origin="paqdetr", model=str(tmp_path / "co_dino.yaml")
    )
    assert set(report.fresh) == heads and not report.dropped
    assert again.config.auxiliary_heads == ("faster_rcnn", "atss")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("query_head.transformer.head_pos_embed.weight", "Co-Deformable-DETR"),
        ("roi_head.0.mask_head.convs.0.conv.weight", "mask head"),
    ],
)
def test_other_forms_of_co_detr_are_named(key: str, message: str, make_original: Make) -> None:
    original = make_original("co-detr")
    original.state[key] = torch.zeros(2, 1)
    with pytest.raises(CheckpointError, match=message):
        convert(original)


def test_co_detr_without_auxiliary_queries(make_original: Make) -> None:
    original = make_original("co-detr")
    for key in [key for key in original.state if "aux_pos_trans" in key]:
        del original.state[key]
    model, report = convert(original)
    assert model.config.customised_queries == 0 and not report.fresh


# Classes that mmdetection names beside the weights


@pytest.mark.parametrize(
    "meta", [{"CLASSES": ("cat", "dog")}, {"dataset_meta": {"classes": ("cat", "dog")}}, {"epoch": 3}]
)
def test_mmdetection_names_the_classes(meta: dict[str, Any], make_original: Make, tmp_path: Path) -> None:
    state = make_original("mmdet dino").state
    state = {key: x[:2] if "cls_branches" in key or "label_embedding" in key else x for key, x in state.items()}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "x.pth")
    model, _ = convert_checkpoint(tmp_path / "x.pth", origin="mmdet_dino", settings={"num_heads": HEADS})
    assert model.classes.names == (("class 0", "class 1") if "epoch" in meta else ("cat", "dog"))
