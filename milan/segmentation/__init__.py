"""Transfer an encoder to semantic segmentation: UPerNet, scene samples, sliding-window inference, mIoU."""
