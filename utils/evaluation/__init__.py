"""Features of whole sets, retrieval metrics, clusterings, and the tables made of them."""
