"""How people's files become records: archives, ImageNet and ADE20K layouts, labels, packing, the built-in world."""
