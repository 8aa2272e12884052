"""The diversity loss in a plain JAX multi-layer perceptron: no framework, a list of matrices.

    python -m tools.examples.plain_mlp

An example without tokens is one token: a hidden layer [b d] becomes [b 1 d].
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from diversedit_jax.losses.diversity import Settings, diversity_loss

# Training can push signed cosines below zero; their squares are smallest for orthogonal layers.
SETTINGS = Settings(rule="all", orthogonality="squared", mutual_information="squared", weight="constant")


def forward(params, x):
    """Pixels [b 64] to logits [b 10] and the hidden layers, [b 1 d] each."""
    first, *hidden, last = params
    x = x @ first
    features = []
    for kernel in hidden:
        x = x + jax.nn.relu(x @ kernel)
        features.append(x[:, None, :])
    return x @ last, features


def main(steps: int = 500) -> dict[str, float]:
    """Train without and with the loss; returns the last L_div and the held-out accuracy of both."""
    data = load_digits()
    images, labels = jnp.float32(data.data / 8 - 1), jnp.asarray(data.target)

    def loss_of(params, x, y, weight):
        logits, features = forward(params, x)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()
        term, parts = diversity_loss(features, settings=SETTINGS)
        return entropy + weight * term, parts["loss"]

    @jax.jit
    def step(params, x, y, weight):
        grads, diversity = jax.grad(loss_of, has_aux=True)(params, x, y, weight)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), diversity

    results = {}
    for name, weight in [("plain", 0.0), ("diverse", 1.0)]:
        shapes = [(64, 64)] * 7 + [(64, 10)]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        params = [jax.random.normal(k, s) * (0.5 / s[0]) ** 0.5 for k, s in zip(keys, shapes, strict=True)]
        rng = np.random.default_rng(0)
        for _ in range(steps):
            rows = rng.integers(1400, size=64)
            params, diversity = step(params, images[rows], labels[rows], weight)
        accuracy = jnp.mean(jnp.argmax(forward(params, images[1400:])[0], axis=1) == labels[1400:])
        results |= {f"{name} L_div": float(diversity), f"{name} accuracy": float(accuracy)}
    return results


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:<18}{value:.3f}")
