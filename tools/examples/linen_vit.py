"""The diversity loss and REPA's in a Flax Linen vision transformer that classifies digits.

    python -m tools.examples.linen_vit

A loss takes the outputs of the blocks; here the network returns them. REPA's projector is trained beside the network.
Here it aligns to the pixels of each token's 4 x 4 patch, in place of an encoder's features.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from diversedit_jax.losses import diversity_loss, init_projector, project, repa_loss


class Block(nn.Module):
    """A pre-norm transformer block."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    """Images [b 8 8 1] to logits [b 10] and the outputs of all blocks, [b 16 d] each."""

    depth: int = 4
    width: int = 32

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.width, (2, 2), (2, 2))(images).reshape(len(images), 16, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        features = []
        for _ in range(self.depth):
            x = Block()(x)
            features.append(x)
        return nn.Dense(10)(nn.LayerNorm()(x.mean(axis=1))), features


def patches(images):
    """Images [b 8 8 1] to the pixels around each of 16 tokens, [b 16 16]."""
    around = jnp.pad(images[..., 0], ((0, 0), (1, 1), (1, 1)))
    windows = [around[:, i : i + 4, j : j + 4].reshape(-1, 1, 16) for i in range(0, 8, 2) for j in range(0, 8, 2)]
    return jnp.concatenate(windows, axis=1)


def main(steps: int = 200) -> dict[str, float]:
    """Train without and with the loss; returns the last L_div and the held-out accuracy of both."""
    data = load_digits()
    images, labels = jnp.float32(data.images[..., None] / 8 - 1), jnp.asarray(data.target)
    model, optimizer = ViT(), optax.adamw(2e-3)

    def loss_of(params, x, y, weight):
        logits, features = model.apply(params["model"], x)
        term, parts = diversity_loss(features)  # the term is weighted already, and 0 while L_div < 0.1
        term += 0.1 * repa_loss(project(params["projector"], features[1]), patches(x)).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + weight * term, parts["loss"]

    @jax.jit
    def step(params, opt, x, y, weight):
        grads, diversity = jax.grad(loss_of, has_aux=True)(params, x, y, weight)
        updates, opt = optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, diversity

    results = {}
    for name, weight in [("plain", 0.0), ("diverse", 1.0)]:
        params = {
            "model": jax.jit(model.init)(jax.random.key(0), images[:1]),
            "projector": init_projector(jax.random.key(1), model.width, 32, 16),
        }
        opt = optimizer.init(params)
        rng = np.random.default_rng(0)
        for _ in range(steps):
            rows = rng.integers(1400, size=64)
            params, opt, diversity = step(params, opt, images[rows], labels[rows], weight)
        logits, _ = jax.jit(model.apply)(params["model"], images[1400:])
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels[1400:])
        results |= {f"{name} L_div": float(diversity), f"{name} accuracy": float(accuracy)}
    return results


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:<18}{value:.3f}")
