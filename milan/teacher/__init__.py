"""MILAN's teacher: image towers, the small CLIP that is trained here, released teachers, class texts."""
