"""The frozen DINOv2 whose class token ImageFolder's semantic branch agrees with."""

from __future__ import annotations

from torch import Tensor

from core.images import to_unit_range
from core.nn.vit import VisionTransformer, ViTSize, dinov2_files, dinov2_weights
from core.rng import Draws
from core.weights.released import needs
from tokenizer.teachers import Teacher


@needs(dinov2_files("model"))
class DINOv2ClassTeacher(Teacher):
    """Class token after the final norm, one feature per picture: (B, 1, D).

    Args:
        image_size, patch_size: of the network; positions and patch kernel are resized to them. Pictures have that size.
        model: a name in core.nn.vit.VIT_SIZES, or {width, layers, heads}.
        weights: timm's file; None: the published one.
        pretrained: False leaves random weights, for tests.
    """

    name = "dinov2_patch16"

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        model: str | dict = "base",
        weights: str | None = None,
        pretrained: bool = True,
    ):
        super().__init__()
        size = ViTSize.parse(model, "teachers.dinov2_patch16.model")
        self.grid, self.dim = image_size // patch_size, size.width
        self.backbone = VisionTransformer(size, self.grid, patch_size)
        if pretrained:
            self.backbone.load_state_dict(dinov2_weights(size, image_size, patch_size, weights))
        self.freeze()

    def features(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        return self.backbone(self.normalise(to_unit_range(images.float())))[:, :1]
