"""From a user's files to records: archives, ImageNet and ADE20K layouts, labels, packing, the built-in world."""
