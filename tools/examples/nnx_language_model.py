"""The diversity loss in a Flax NNX language model: a causal transformer that predicts the next character.

    python -m tools.examples.nnx_language_model

The loss needs only features [batch, tokens, width]. It knows nothing of images or diffusion.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diversedit_jax.losses import diversity_loss

TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()
LENGTH, WIDTH, DEPTH = 32, 32, 4


class Block(nnx.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norms[1](x))))


class LanguageModel(nnx.Module):
    """Bytes [b n] to logits [b n 256] and the outputs of all blocks, [b n d] each."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.position = nnx.Embed(256, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, text):
        x = self.embed(text) + self.position(jnp.arange(text.shape[1]))
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return self.head(x), features


def main(steps: int = 200) -> dict[str, float]:
    """Train without and with the loss; returns the last L_div and cross-entropy of both."""
    text = np.frombuffer(TEXT, np.uint8)

    def loss_of(model, windows, weight):
        logits, features = model(windows[:, :-1])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()
        term, parts = diversity_loss(features)
        return entropy + weight * term, (entropy, parts["loss"])

    @nnx.jit
    def step(model, optimizer, windows, weight):
        grads, reported = nnx.grad(loss_of, has_aux=True)(model, windows, weight)
        optimizer.update(model, grads)
        return reported

    results = {}
    for name, weight in [("plain", 0.0), ("diverse", 1.0)]:
        model = LanguageModel(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
        rng = np.random.default_rng(0)
        for _ in range(steps):
            starts = rng.integers(len(text) - LENGTH, size=32)
            windows = jnp.asarray(text[starts[:, None] + np.arange(LENGTH + 1)[None]], jnp.int32)
            entropy, diversity = step(model, optimizer, windows, jnp.float32(weight))
        results |= {f"{name} L_div": float(diversity), f"{name} nats": float(entropy)}
    return results


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:<18}{value:.3f}")
