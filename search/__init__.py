"""Finds 3D objects by picture, pictures by object, or objects by object, in a collection of the user's own. See docs/search.md."""
