"""The shapes of arrays in signatures. Without jaxtyping they are not checked: the losses then need jax alone."""

import jax

try:
    from jaxtyping import Array, Bool, Float, PRNGKeyArray
except ImportError:
    Array = PRNGKeyArray = jax.Array

    class _Unchecked:
        """`Float[Array, "b n d"]` is `Array`."""

        def __class_getitem__(cls, given):
            return given[0]

    Bool = Float = _Unchecked

__all__ = ["Array", "Bool", "Float", "PRNGKeyArray"]
