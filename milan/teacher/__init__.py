"""What CLIP sees: image towers, the small CLIP that is trained here, released teachers, texts of the classes."""
