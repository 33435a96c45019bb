"""A Hugging Face image model as the model of a run; server and agents need `pip install transformers`."""

from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification


class Logits(nn.Module):
    """An image classifier of transformers that returns its logits, as the run wants them."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, float32 [B, num_classes], of images [B, C, H, W]."""
        logits: Tensor = self.classifier(pixel_values=images).logits
        return logits


def net(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Return a small vision transformer that is not trained; `from_pretrained` gives large, trained ones."""
    channels, height, _ = image_shape
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=height,
        patch_size=4,
        num_channels=channels,
        num_labels=num_classes,
    )
    return Logits(ViTForImageClassification(config))
