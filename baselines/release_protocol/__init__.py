"""Both stages of RoMo with the departures of the authors' published code, one at a time or together; see docs/fidelity.md.

Two of the departures are made of training labels, which `labels.py` reads.
"""
