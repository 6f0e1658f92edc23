"""Helpers without knowledge of models, losses or data sets; imports no sibling package."""
