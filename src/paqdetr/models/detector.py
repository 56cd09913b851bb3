"""The detector: the parts in the order in which an image passes through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from paqdetr.config import ModelConfig
from paqdetr.models.backbone import Backbone
from paqdetr.models.decoder import Decoded, Decoder
from paqdetr.models.denoising import ContrastiveDenoising, DenoisingQueries
from paqdetr.models.encoder import DeformableEncoder
from paqdetr.models.neck import Neck
from paqdetr.models.proposals import ProposalHead, Proposals
from paqdetr.models.queries import QuerySource
from paqdetr.models.tokens import Tokens
from paqdetr.paq import Mixture
from paqdetr.preprocessing import Preprocessing
from paqdetr.structures import ClassTable, Detections, Targets

if TYPE_CHECKING:
    from paqdetr.models.inference import ImageSource


@dataclass(frozen=True, slots=True)
class DetectorOutput:
    """Everything one forward pass gives.

    Attributes:
        pred_logits: (B, n, C) of the last layer; `sigmoid` gives the probability of each class.
        pred_boxes: (B, n, 4) cxcywh in [0, 1] of the image without its padding.
        layers: predictions of all K decoder layers, the last included: (K, B, n, C) and (K, B, n, 4).
        proposals: the encoder's choice, (B, n, C) and (B, n, 4).
        mixture: content queries (B, n, d), and the weights (B, n, m) of pattern queries or None.
        denoised: predictions of the denoising queries, (K, B, N, C) and (K, B, N, 4); None outside training.
        denoising: how these queries are laid out; None outside training.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    layers: Decoded
    proposals: Proposals
    mixture: Mixture
    denoised: Decoded | None = None
    denoising: DenoisingQueries | None = None


class Detector(nn.Module):
    """A DETR with deformable attention, put together from parts; `create_model` builds one by name.

    Attributes:
        config: the architecture.
        name: the model's name.
        classes: contiguous index -> the data set's category id and name.
        preprocessing: what an image goes through before the model sees it.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        name: str,
        classes: ClassTable,
        preprocessing: Preprocessing,
        backbone: Backbone,
        neck: Neck,
        encoder: DeformableEncoder,
        proposal_head: ProposalHead,
        query_source: QuerySource,
        decoder: Decoder,
        denoising: ContrastiveDenoising | None,
    ) -> None:
        super().__init__()
        self.config, self.name, self.classes, self.preprocessing = config, name, classes, preprocessing
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.proposal_head = proposal_head
        self.query_source = query_source
        self.decoder = decoder
        self.denoising = denoising

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, targets: Sequence[Targets] | None = None
    ) -> DetectorOutput:
        """Detect.

        Args:
            images: (B, 3, H, W) float, normalised as `preprocessing` does.
            padding_mask: (B, H, W) bool, True at padding; None if no image has any.
            targets: of the B images, for denoising in training; ignored in evaluation mode.
        """
        features = self.extract(images, padding_mask)
        return self.detect(features, targets if self.training else None)

    def extract(self, images: Tensor, padding_mask: Tensor | None = None) -> Tokens:
        """Backbone and neck: (B, 3, H, W) -> tokens of all levels."""
        maps = self.neck(self.backbone(images))
        return Tokens.from_maps(maps, padding_mask, temperature=self.config.position_temperature)

    def detect(self, features: Tokens, targets: Sequence[Targets] | None = None) -> DetectorOutput:
        """Encoder to heads. The result does not depend on padded tokens, neither their content nor their number."""
        memory = self.encoder(features)
        proposals = self.proposal_head(memory)
        mixture = self.query_source(
            memory.values, memory.spatial_shapes, memory.padding_mask, proposals.boxes.detach()
        )
        denoising = self.denoising(targets) if self.denoising is not None and targets is not None else None
        if denoising is None:
            decoded = self.decoder(mixture.content, proposals.boxes, memory)
            return _output(decoded, proposals, mixture)

        copies = len(denoising)
        content = torch.cat([denoising.content, mixture.content], dim=1)  # (B, copies + n, d)
        reference = torch.cat([denoising.reference, proposals.boxes.detach()], dim=1)
        forbidden = denoising.attention_mask(mixture.content.shape[1], content.device)
        decoded = self.decoder(content, reference, memory, forbidden)
        denoised = Decoded(decoded.logits[:, :, :copies], decoded.boxes[:, :, :copies])
        matched = Decoded(decoded.logits[:, :, copies:], decoded.boxes[:, :, copies:])
        return _output(matched, proposals, mixture, denoised, denoising)

    def predict(
        self, images: ImageSource | Sequence[ImageSource], threshold: float = 0.3, batch_size: int = 1
    ) -> list[Detections]:
        """Detections of one image or many, in the order given.

        Args:
            images: paths, PIL images or (H, W, 3) uint8 RGB arrays. EXIF turns are applied.
            threshold: the least score of a detection, in [0, 1].
            batch_size: images of one size that go through the model together; it never changes what is found.

        Raises:
            DataError: an image that cannot be read, by name.
        """
        from paqdetr.models.inference import predict_images

        return predict_images(self, images, threshold=threshold, batch_size=batch_size)

    def save(self, path: str) -> None:
        """Write weights, config, classes and preprocessing as one safetensors file that `paqdetr.load` reads."""
        from paqdetr.models.zoo import save

        save(self, path)


def _output(
    decoded: Decoded,
    proposals: Proposals,
    mixture: Mixture,
    denoised: Decoded | None = None,
    denoising: DenoisingQueries | None = None,
) -> DetectorOutput:
    return DetectorOutput(
        pred_logits=decoded.logits[-1],
        pred_boxes=decoded.boxes[-1],
        layers=decoded,
        proposals=proposals,
        mixture=mixture,
        denoised=denoised,
        denoising=denoising,
    )
