"""Patches: images cut into squares, and their embedding as one matrix product."""

from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, (B, 3, H, W) -> (B, N, p p 3): pixels row by row, channels last (MAE's order)."""
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size**2 * channels)


def embed_patches(patches: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Embed patches, (B, K, p p 3) -> (B, K, D), by the weights of a convolution whose stride is its kernel's size."""
    return nn.functional.linear(patches, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)


class PatchConvolution(nn.Conv2d):
    """Such a convolution, computed as a matrix product: for three channels GPUs have only slow convolution kernels.

    Assigned as the class of a convolution that exists, so that names and weights stay."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H/p, W/p)."""
        side = self.kernel_size[0]
        tokens = embed_patches(patchify(images, side), self)
        return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // side, images.shape[3] // side))
