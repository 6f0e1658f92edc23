"""Everything between raw files and training samples: preparation commands, list files, arrays, transforms, pseudo-labels."""
