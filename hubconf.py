"""For torch.hub: torch.hub.load("OWNER/REPOSITORY", "load_encoder", "/path/milan_vit_base.pth")."""

from milan.convert.load import load_encoder, load_pretrained  # noqa: F401

dependencies = ["numpy", "PIL", "pydantic", "safetensors", "timm", "torch", "torchvision", "yaml"]
