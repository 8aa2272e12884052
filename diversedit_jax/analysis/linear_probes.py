"""What a linear classifier reads from the mean token of every block, while the network does not see the label."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diversedit_jax.analysis.features import Learned
from diversedit_jax.analysis.measure import Pass, pooled
from diversedit_jax.api import Batch
from diversedit_jax.metrics.linear_probe import linear_probe


def accuracies(
    ready: Pass,
    learned: Learned,
    frozen: Any,
    fitted: Sequence[Batch],
    shown: Sequence[Batch] | None,
    t: float,
    ridge: float = 1e-2,
) -> Float[np.ndarray, " l"]:
    """The accuracy of a linear probe of every block at time t.

    It is fitted to the images in `fitted` and tested on `shown`; where that is None, on the last fifth of `fitted`.
    Real labels would be read from the network's own condition, so it is given the null label.
    """
    rows, labels = pooled(ready, learned, frozen, fitted, t)
    if shown is None:
        cut = max(1, len(labels) * 4 // 5)
        rows, test_rows, labels, test_labels = rows[:, :cut], rows[:, cut:], labels[:cut], labels[cut:]
    else:
        test_rows, test_labels = pooled(ready, learned, frozen, shown, t)
    return np.asarray(_probes(rows, labels, test_rows, test_labels, ready.experiment.space.conditions.classes, ridge))


@jax.jit(static_argnums=(4, 5))
def _probes(rows, labels, test_rows, test_labels, classes: int, ridge: float):
    return jax.lax.map(
        lambda block: linear_probe(block[0], jnp.asarray(labels), block[1], jnp.asarray(test_labels), classes, ridge),
        (rows, test_rows),
    )
