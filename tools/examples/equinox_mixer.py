"""The diversity loss of random layers, and Dispersive Loss, in an Equinox MLP-Mixer that classifies digits.

    python -m tools.examples.equinox_mixer

As in the paper, each step draws random blocks and takes all their pairs: pairs are an argument and may be traced.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from diversedit_jax.losses.dispersive import dispersive_loss
from diversedit_jax.losses.diversity import diversity_loss, select_pairs

TOKENS, WIDTH, DEPTH = 16, 32, 4


class Block(eqx.Module):
    """A mixer block, for one example [n d]."""

    over_tokens: eqx.nn.MLP
    over_channels: eqx.nn.MLP
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.over_tokens = eqx.nn.MLP(TOKENS, TOKENS, 2 * TOKENS, 1, key=first)
        self.over_channels = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, key=second)
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)]

    def __call__(self, x):
        x = x + jax.vmap(self.over_tokens)(jax.vmap(self.norms[0])(x).T).T
        return x + jax.vmap(self.over_channels)(jax.vmap(self.norms[1])(x))


class Mixer(eqx.Module):
    """An image [8 8] to logits [10] and the outputs of all blocks, [16 d] each."""

    embed: eqx.nn.Linear
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, DEPTH + 2)
        self.embed = eqx.nn.Linear(4, WIDTH, key=keys[0])
        self.blocks = [Block(k) for k in keys[1:-1]]
        self.head = eqx.nn.Linear(WIDTH, 10, key=keys[-1])

    def __call__(self, image):
        patches = image.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(TOKENS, 4)
        x = jax.vmap(self.embed)(patches)
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return self.head(x.mean(axis=0)), features


def main(steps: int = 200) -> dict[str, float]:
    """Train without and with the loss; returns the last L_div and the held-out accuracy of both."""
    data = load_digits()
    images, labels = jnp.float32(data.images / 8 - 1), jnp.asarray(data.target)
    optimizer = optax.adamw(2e-3)

    def loss_of(model, x, y, weight, key):
        logits, features = jax.vmap(model)(x)  # features: [b n d] each
        pairs = select_pairs(DEPTH, "random_layers", k=3, key=key)
        term, parts = diversity_loss(features, pairs)
        term += 0.1 * dispersive_loss(features[0])  # pushes the first block's features of the examples apart
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + weight * term, parts["loss"]

    @eqx.filter_jit
    def step(model, opt, x, y, weight, key):
        grads, diversity = eqx.filter_grad(loss_of, has_aux=True)(model, x, y, weight, key)
        updates, opt = optimizer.update(grads, opt, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt, diversity

    results = {}
    for name, weight in [("plain", 0.0), ("diverse", 1.0)]:
        model = eqx.filter_jit(Mixer)(jax.random.key(0))
        opt = optimizer.init(eqx.filter(model, eqx.is_array))
        rng = np.random.default_rng(0)
        for i in range(steps):
            rows = rng.integers(1400, size=64)
            model, opt, diversity = step(model, opt, images[rows], labels[rows], jnp.float32(weight), jax.random.key(i))
        logits, _ = eqx.filter_jit(eqx.filter_vmap(model))(images[1400:])
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels[1400:])
        results |= {f"{name} L_div": float(diversity), f"{name} accuracy": float(accuracy)}
    return results


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:<18}{value:.3f}")
