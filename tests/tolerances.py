"""How near numbers must be in tests, and why that near."""

REORDERED = 1e-5
"""Relative to the largest output: the same float32 products of a small graph summed in another order (seen: 6e-7)."""

SOLVED = 1e-6
"""Relative to the largest number: a float64 solution of a few dozen unknowns, well conditioned (seen: 1e-9)."""

QUANTIZED_DB = 25.0
"""SQNR of a quantized small graph against the float one: 8 bits leave some 40 dB of each operand, a chain less."""

FOUR_BITS_DB = 10.0
"""SQNR of a small graph with 4-bit weights against the float one: some 20 dB a layer (seen: 13.7 after seven)."""
