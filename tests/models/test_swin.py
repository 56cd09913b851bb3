import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from paqdetr.models.backbone import BUILD_OPTIONS, pad_before_shift

STAGES, WIDTH = (2, 2, 2, 2), 24


def small_swin() -> nn.Module:
    """Swin-T, narrower and with fewer blocks."""
    options = {"features_only": True, "embed_dim": WIDTH, "depths": STAGES}
    return timm.create_model("swin_tiny_patch4_window7_224", **options, **BUILD_OPTIONS).eval()


def test_features_equal_those_of_torchvision_on_any_size() -> None:
    # torchvision pads before it shifts, as the detection code does.
    torch.manual_seed(0)
    theirs = SwinTransformer([4, 4], WIDTH, list(STAGES), [3, 6, 12, 24], [7, 7]).eval()
    for parameter in theirs.parameters():  # biases and tables that are zero would prove little
        nn.init.normal_(parameter, std=0.05)
    ours = small_swin()
    ours.load_state_dict(_timm_names(theirs.state_dict()))
    pad_before_shift(ours)
    images = torch.randn(2, 3, 268, 332)  # stages of 67 x 83, 34 x 42, 17 x 21, 9 x 11: no multiple of 7 but one
    with torch.no_grad():
        found, features = ours(images), images
        for index, block in enumerate(theirs.features):
            features = block(features)
            if index % 2:
                torch.testing.assert_close(found[index // 2], features, atol=1e-5, rtol=1e-5)


def test_timms_own_order_of_steps_differs() -> None:
    torch.manual_seed(0)
    body = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **BUILD_OPTIONS).eval()
    images = torch.randn(1, 3, 256, 320)
    with torch.no_grad():
        before = body(images)[0]
        pad_before_shift(body)
        after = body(images)[0]
    assert (before - after).abs().max() > 1e-2


def test_sides_that_are_no_multiple_of_4_are_padded_at_the_right_and_the_bottom() -> None:
    body = small_swin()
    pad_before_shift(body)
    images = torch.randn(1, 3, 133, 118)
    with torch.no_grad():
        for found, wanted in zip(body(images), body(F.pad(images, (0, 2, 0, 3))), strict=True):
            torch.testing.assert_close(found, wanted, atol=0, rtol=0)


@pytest.mark.parametrize("stage", [0, 3])
def test_every_second_block_shifts_in_every_stage(stage: int) -> None:
    body = small_swin()
    pad_before_shift(body)
    blocks = body.get_submodule(f"layers_{stage}").blocks  # type: ignore[union-attr]
    assert [block.shift_size for block in blocks][:2] == [(0, 0), (3, 3)]  # type: ignore[union-attr]


def _timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision: features.0 patches; features.1, 3, 5, 7 stages; features.2, 4, 6 mergings, which timm has at the start of the
    next stage."""
    renamed = {}
    for key, tensor in state.items():
        if not key.startswith("features.") or key.endswith("relative_position_index"):
            continue
        _, index, rest = key.split(".", 2)
        number = int(index)
        if number == 0:
            rest = rest.replace("0.", "proj.", 1) if rest.startswith("0.") else rest.replace("2.", "norm.", 1)
            renamed[f"patch_embed.{rest}"] = tensor
        elif number % 2 == 0:
            renamed[f"layers_{number // 2}.downsample.{rest}"] = tensor
        else:
            rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            renamed[f"layers_{number // 2}.blocks.{rest}"] = tensor
    return renamed
