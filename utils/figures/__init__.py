"""Plots, thumbnails and contact sheets."""
