"""The SiT of REPA and DiverseDiT's release (torch names, t = 1 is noise) as parameters of `models.dit`."""

from collections.abc import Mapping

import numpy as np

from diversedit_jax.api import Params


def from_reference(arrays: Mapping[str, np.ndarray], heads: int) -> Params:
    """The parameters of `models.dit` from a state dict of the reference (its position table and projectors aside).

    Linear maps only (transpose, reshape, stack), so it converts gradients as well. Linear weights are [out, in] there
    and [in, out] here; blocks are stacked here, the first half of them in `shallow`, the others in `deep`.
    """
    depth = 1 + max(int(name.split(".")[1]) for name in arrays if name.startswith("blocks."))
    half = depth // 2

    def linear(name: str) -> Params:
        return {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}

    def block(i: int) -> Params:
        width = arrays[f"blocks.{i}.attn.proj.weight"].shape[0]
        qkv = linear(f"blocks.{i}.attn.qkv")
        params = {
            "ada": linear(f"blocks.{i}.adaLN_modulation.1"),
            "qkv": {
                "kernel": qkv["kernel"].reshape(width, 3, heads, width // heads),
                "bias": qkv["bias"].reshape(3, heads, width // heads),
            },
            "proj": linear(f"blocks.{i}.attn.proj"),
            "fc1": linear(f"blocks.{i}.mlp.fc1"),
            "fc2": linear(f"blocks.{i}.mlp.fc2"),
        }
        for norm in ("q_norm", "k_norm"):
            if f"blocks.{i}.attn.{norm}.weight" in arrays:
                params[norm] = {
                    "scale": arrays[f"blocks.{i}.attn.{norm}.weight"],
                    "bias": arrays[f"blocks.{i}.attn.{norm}.bias"],
                }
        return params

    def merge(k: int) -> Params:
        norm = {"scale": arrays[f"skip_norms.{k}.weight"], "bias": arrays[f"skip_norms.{k}.bias"]}
        return {"norm": norm, "linear": linear(f"skip_linears.{k}.linear")}

    patches = arrays["x_embedder.proj.weight"]  # [d, c, p, p]
    params = {
        "patch_embed": {
            "kernel": patches.transpose(2, 3, 1, 0).reshape(-1, patches.shape[0]),
            "bias": arrays["x_embedder.proj.bias"],
        },
        "time_embed": {"fc1": linear("t_embedder.mlp.0"), "fc2": linear("t_embedder.mlp.2")},
        "label_embed": {"embedding": arrays["y_embedder.embedding_table.weight"]},
        "shallow": _stack([block(i) for i in range(half)]),
        "deep": _stack([block(i) for i in range(half, depth)]),
        "final_ada": linear("final_layer.adaLN_modulation.1"),
        "final": linear("final_layer.linear"),
    }
    if "skip_norms.0.weight" in arrays:
        params["merges"] = _stack([merge(k) for k in range(half)])
    return params


def _stack(layers: list[Params]) -> Params:
    if isinstance(layers[0], dict):
        return {name: _stack([layer[name] for layer in layers]) for name in layers[0]}
    return np.stack(layers)
