"""Experiments of the paper as cells (single runs), a scheduler for them, and the tables and figures made of their results."""
