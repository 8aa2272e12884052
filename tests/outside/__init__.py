"""A project that sees the library from outside: its own data, codec, network, objective and loss, by config alone.

Examples are 8 x 8 grey images. A condition is a set of vectors, `context` [3 2]; `mask` [3] says which of them count.
Their sum v decides the mean of an image; around it every pixel is normal. In the network's space, 4 x 4 x 4, that is

    x ~ N(sum_j v_j PATTERN_j, DEVIATION^2),

so that the right samples are known in closed form.
"""

import numpy as np

SLOTS, WIDTH = 3, 2  # vectors of a condition, and their width
SHAPE = (4, 4, 4)  # in the network's space
DEVIATION = 0.5
LEVELS = 32.0  # grey levels per unit of x
PATTERN = np.float32(np.cos(np.outer([1.0, 2.5], np.arange(64))).reshape(WIDTH, *SHAPE))


def means(y: dict[str, np.ndarray]) -> np.ndarray:
    """The mean of x under each condition [b ...], in closed form: [b 4 4 4]."""
    total = np.where(np.asarray(y["mask"])[..., None], y["context"], 0).sum(axis=1)
    return np.tensordot(total, PATTERN, 1)
