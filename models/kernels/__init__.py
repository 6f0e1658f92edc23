"""The fast layers: nearest neighbours, EdgeConv and mesh convolutions."""
