"""What a traced function computes, for tests that look into it."""

from collections.abc import Iterator
from typing import Any

import jax.extend


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the jaxprs within it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def products(jaxpr: Any) -> Iterator[Any]:
    """The equations of products and convolutions, also of the functions that it calls."""
    return (e for e in equations(jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated"))
