"""The Inception network of FID (2015, arXiv 1706.08500), as in ADM's evaluator (arXiv 2105.05233)."""

from functools import cache

from jaxtyping import Array

from diversedit_jax.api import Params
from diversedit_jax.evaluation.extractors import Extractor, Features, digest
from diversedit_jax.models import inception
from diversedit_jax.weights.inception import open_inception


def make(*, file: str, precision: str = "highest") -> Extractor:
    """FID's Inception: pool_3 (2048), the first 7 channels of mixed_6/conv (2023), logits without their bias (1008).

    file: pt_inception-2015-12-05-6726825d.pth of torch-fidelity and pytorch-fid, the same as .safetensors, or ADM's
    classify_image_graph_def.pb. precision: of matrix products, see `models.vae`.
    """
    release = open_inception(file)
    network = inception.network(precision)

    def apply(weights: Params, images: Array) -> Features:
        found = network.apply(weights, images)
        return Features(found.pool, found.spatial, found.logits)

    read = cache(release.read)
    about = {"weights": {"name": release.name, "digest": digest(read())}, "precision": precision}
    about["resize"] = "bilinear of TensorFlow 1 to 299 x 299"
    return Extractor("inception", read, apply, about)
