"""One number out of several: the seed of whatever belongs to exactly these numbers."""

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Mix non-negative integers into a seed of 63 bits (SplitMix64's finaliser over each).

    Python's own `hash` will not do: it is salted per process for strings and nearly linear for integers.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
