"""Making and drawing shapes: digits, meshes, pictures."""
