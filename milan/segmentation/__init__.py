"""How well an encoder transfers to segmentation: UPerNet, mIoU, scene samples."""
