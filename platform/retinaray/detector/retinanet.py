"""The network: RGB 0..255 in, raw class logits and box offsets of every anchor out."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from retinaray.detector.anchors import AnchorSpec, make_anchors
from retinaray.detector.backbone import Backbone, NormKind, count_groups
from retinaray.detector.fpn import FeaturePyramid
from retinaray.detector.heads import PredictionHead, prior_bias

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RetinaNet(nn.Module):
    """One-stage detector with focal loss.

    Args:
        backbone: One of `backbone.BACKBONE_NAMES`.
        num_classes: K, background not counted.
        anchors: Anchor specification; a first stride of 4 adds the P2 level.
        norm: Normalisation of the backbone.
        fpn_channels: Width of pyramid and heads.
        head_depth: Convolutions in each head before its output layer.
        stride_in_1x1: See `Backbone`.
        has_head_norm: GroupNorm in the towers of the heads.

    Raises:
        ValueError: If the strides are not those of P2..P7 or P3..P7, or a name is unknown.

    Source: Lin et al. 2017 (arXiv:1708.02002).
    """

    def __init__(
        self,
        *,
        backbone: str,
        num_classes: int,
        anchors: AnchorSpec | None = None,
        norm: NormKind = "bn",
        fpn_channels: int = 256,
        head_depth: int = 4,
        stride_in_1x1: bool = False,
        has_head_norm: bool = False,
    ) -> None:
        super().__init__()
        self.anchor_spec = anchors or AnchorSpec()
        if self.anchor_spec.strides not in ((4, 8, 16, 32, 64, 128), (8, 16, 32, 64, 128)):
            raise ValueError(
                f"anchor strides={self.anchor_spec.strides}: "
                "expected 8..128 (P3 to P7) or 4..128 (P2 to P7)"
            )
        self.num_classes = num_classes
        self.backbone = Backbone(backbone, norm=norm, stride_in_1x1=stride_in_1x1)
        self._skipped = 0 if self.anchor_spec.strides[0] == 4 else 1
        self.fpn = FeaturePyramid(
            self.backbone.out_channels[self._skipped :], channels=fpn_channels
        )
        groups = count_groups(fpn_channels) if has_head_norm else 0
        num_anchors = self.anchor_spec.num_per_cell
        self.class_head = PredictionHead(
            channels=fpn_channels,
            depth=head_depth,
            num_anchors=num_anchors,
            num_outputs=num_classes,
            output_bias=prior_bias(),
            norm_groups=groups,
        )
        self.box_head = PredictionHead(
            channels=fpn_channels,
            depth=head_depth,
            num_anchors=num_anchors,
            num_outputs=4,
            norm_groups=groups,
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer(
            "mean", 255 * torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", 255 * torch.tensor(IMAGENET_STD).reshape(3, 1, 1), persistent=False
        )

    def forward(
        self, images: UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]
    ) -> tuple[Float[Tensor, "N A K"], Float[Tensor, "N A 4"]]:
        """Raw outputs for images of any height and width.

        Args:
            images: RGB 0..255, uint8 or float; normalised in here, so that black padding is the
                same everywhere.

        Returns:
            Class logits and box offsets (dx, dy, dw, dh), anchors in the order of `anchors_for`.
        """
        features = self.backbone((images.float() - self.mean) / self.std)
        levels = self.fpn(features[self._skipped :])
        return self.class_head(levels), self.box_head(levels)

    def anchors_for(self, images: Tensor) -> Float[Tensor, "A 4"]:
        """Anchors over images of this height and width, on their device."""
        return make_anchors(
            self.anchor_spec, images.shape[-2], images.shape[-1], device=images.device
        )
