"""Both stages of RoMo with the departures of the authors' published code, one at a time or together; see docs/fidelity.md.

The only training code in the project that reads training labels, which two of the departures are made of.
"""
