"""A linear probe of a representation: ridge regression to the classes, in closed form."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear_probe(
    rows: Float[Array, "n d"],
    labels: Int[Array, " n"],
    test_rows: Float[Array, "m d"],
    test_labels: Int[Array, " m"],
    classes: int,
    ridge: float = 1e-2,
) -> Float[Array, ""]:
    """The accuracy on test rows of a ridge regression that is fitted to `rows`.

    Channels are standardised by `rows`. The targets are the centred one-hot classes. `ridge` is added to the
    covariance.
    """
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    scale = 1 / jnp.where(std > 1e-6 * std.max(), std, jnp.inf)  # drop channels that do not vary
    x, test = (rows - mean) * scale, (test_rows - mean) * scale
    y = jnp.eye(classes, dtype=rows.dtype)[labels]
    bias = y.mean(axis=0)
    covariance = jnp.einsum("nd,ne->de", x, x, precision="highest") / len(x)
    covariance += ridge * jnp.eye(x.shape[1], dtype=rows.dtype)
    target = jnp.einsum("nd,nk->dk", x, y - bias, precision="highest") / len(x)
    found = jnp.einsum("md,dk->mk", test, jnp.linalg.solve(covariance, target), precision="highest") + bias
    return jnp.mean((jnp.argmax(found, axis=1) == test_labels).astype(jnp.float32))
