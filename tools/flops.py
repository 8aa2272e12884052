"""What a training step costs, in multiply-adds."""


def multiply_adds(depth: int, width: int, tokens: int, pixels: int, skips: bool) -> int:
    """Of one forward pass for one image; DiT's published "Gflops" are these. A training step is 3 x 2 x this."""
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    merge = 2 * tokens * width**2 if skips else 0
    ends = 2 * tokens * width * pixels + 3 * width**2 + 256 * width
    return depth * block + depth // 2 * merge + ends
