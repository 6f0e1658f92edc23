"""Every setting of the two stages, and how files and --set fill them."""
