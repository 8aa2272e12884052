"""What a traced function computes, for tests that look into it."""

from collections.abc import Iterator
from typing import Any


def products(jaxpr: Any) -> Iterator[Any]:
    """The equations of products and convolutions, also of the functions that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for inner in eqn.params.values():
            if hasattr(inner, "jaxpr"):
                yield from products(inner.jaxpr)
