"""What samples are compared with: statistics of real images, in the files in which the field exchanges them.

adm            .npz: mu, sigma, mu_s, sigma_s of all images, and `arr_0`, some of them, such as
               VIRTUAL_imagenet256_labeled.npz. Where there is `arr_0` alone, or a folder of images, statistics are
               computed from these.
torch_fidelity .npz: mu, sigma; so do pytorch-fid and MAR.
meanflow       .npz: ref_mu, ref_sigma.
edm2           .pkl: {"fid": {"mu", "sigma"}, "fd_dinov2": {...}}.
diversedit_jax .npz of tools.reference_stats: those of adm, of networks other than Inception below their name, features
               of single images, and how all was made.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diversedit_jax.data import local_path
from diversedit_jax.errors import DataError, WeightsError
from diversedit_jax.evaluation import image_files
from diversedit_jax.evaluation.image_files import SampleFiles
from diversedit_jax.weights.formats import numpy_pickle
from diversedit_jax.weights.formats.weights_file import file_digest

Gaussian = tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d d], float64
ABOUT = "about"  # of our own files: JSON
EDM2 = {"fid": "inception", "fd_dinov2": "dinov2"}


class Statistics(NamedTuple):
    """What a feature network says of the reference.

    pool, spatial: Gaussians fitted to these features, None where the file lacks them.
    features:      pool features [m d] of single images, for precision, recall and kernel distance, or None.
    digest:        of the network's weights, where the file says so; see `extractors.digest`.
    """

    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    features: np.ndarray | None = None
    digest: str | None = None


class Reference(NamedTuple):
    """A file of statistics. by_network: extractor's name -> Statistics. images: in the file, or None."""

    by_network: Mapping[str, Statistics]
    images: SampleFiles | None
    about: dict[str, Any]


def open_reference(path: str | Path) -> Reference:
    """The reference in a file or folder, told apart by content. DataError, in one line, for what is none."""
    path = local_path("reference", path)
    if not path.exists():
        raise DataError(f"reference: {path} does not exist")
    if path.is_dir() or path.suffix not in (".npz", ".pkl", ".pickle"):
        images = image_files.open_samples(path)
        about = {"name": path.name, "format": "images", "count": images.count, "sha256": images.digest()}
        return Reference({}, images, about)
    about = {"name": path.name, "sha256": file_digest(path)}
    if path.suffix != ".npz":
        return Reference(_edm2(path), None, about | {"format": "edm2"})
    return _npz(path, about)


def _npz(path: Path, about: dict[str, Any]) -> Reference:
    image_files.check_zip(path)
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = set(file.files)
            small = {name: file[name] for name in file.files if name != image_files.ARRAY}
    except image_files.DAMAGED as error:
        raise DataError(f"reference: {path} cannot be read: {error}".partition("\n")[0]) from error
    images = None
    if image_files.ARRAY in names:
        images = image_files.of_array(path, image_files.stored_array(path, image_files.ARRAY))
    if ABOUT in small:
        made, digests = _made(path, small[ABOUT])
        about |= {"format": "diversedit_jax", "made": made}
        found = {
            name: _statistics(path, small, "" if name == "inception" else f"{name}/", digest)
            for name, digest in digests.items()
        }
        return Reference(found, images, about)
    if {"ref_mu", "ref_sigma"} <= names:
        small |= {"mu": small["ref_mu"], "sigma": small["ref_sigma"]}
        about["format"] = "meanflow"
    else:
        adm, plain = names & {"mu_s", "sigma_s"}, names & {"mu", "sigma"}
        about["format"] = "adm" if adm or (plain and images) else "torch_fidelity" if plain else "images"
    if about["format"] == "images" and images is None:
        raise DataError(
            f"reference: {path} holds {', '.join(sorted(names)) or 'nothing'}: wanted mu and sigma, or arr_0"
        )
    found = {} if about["format"] == "images" else {"inception": _statistics(path, small, "")}
    return Reference(found, images, about)


def _made(path: Path, about: np.ndarray) -> tuple[dict[str, Any], dict[str, str | None]]:
    """How one of our own files was made, and the digest of each network's weights."""
    try:
        made = json.loads(str(about))
        return made, {name: of.get("weights", {}).get("digest") for name, of in made["extractors"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"reference: {path}: {ABOUT} is not that of tools.reference_stats: {type(error).__name__}: {error}"
        ) from error


def _edm2(path: Path) -> dict[str, Statistics]:
    try:
        content = numpy_pickle.load(path.read_bytes())
    except (OSError, WeightsError, ValueError) as error:
        raise DataError(f"reference: {path} cannot be read: {error}") from error
    found = {EDM2[key]: value for key, value in content.items() if key in EDM2} if isinstance(content, dict) else {}
    if not found or not all(isinstance(value, dict) for value in found.values()):
        raise DataError(f"reference: {path} holds no statistics: wanted a dict with {' or '.join(EDM2)}")
    return {name: _statistics(path, value, "") for name, value in found.items()}


def _statistics(path: Path, arrays: Mapping[str, Any], prefix: str, digest: str | None = None) -> Statistics:
    pool = _gaussian(path, arrays, f"{prefix}mu", f"{prefix}sigma")
    names = f"{prefix}mu_s", f"{prefix}sigma_s"
    spatial = _gaussian(path, arrays, *names) if any(name in arrays for name in names) else None
    single = f"{prefix}features"
    return Statistics(
        pool, spatial, _features(path, arrays[single], len(pool[0])) if single in arrays else None, digest
    )


def _features(path: Path, given: Any, d: int) -> np.ndarray:
    features = np.asarray(given)
    if features.ndim != 2 or features.shape[1] != d or not np.issubdtype(features.dtype, np.floating):
        what = f"{features.dtype} {list(features.shape)}"
        raise DataError(f"reference: {path}: features of single images are {what}, wanted floats [m {d}]")
    if not np.isfinite(features).all():
        raise DataError(f"reference: {path}: features of single images are not finite")
    return features


def _gaussian(path: Path, arrays: Mapping[str, Any], mean: str, cov: str) -> Gaussian:
    for name in (mean, cov):
        if name not in arrays:
            raise DataError(f"reference: {path} has no {name}, it holds {', '.join(map(str, arrays))}")
    try:
        found = tuple(np.asarray(arrays[name], np.float64) for name in (mean, cov))
    except (ValueError, TypeError) as error:
        raise DataError(f"reference: {path}: {mean} or {cov} is no array of numbers: {error}") from error
    d = found[0].size
    if not d or found[0].shape != (d,) or found[1].shape != (d, d):
        shapes = " and ".join(str(list(array.shape)) for array in found)
        raise DataError(f"reference: {path}: {mean} and {cov} have shapes {shapes}, wanted [d] and [d d]")
    for name, array in zip((mean, cov), found, strict=True):
        if not np.isfinite(array).all():
            raise DataError(f"reference: {path}: {name} is not finite")
    if not np.allclose(found[1], found[1].T, rtol=1e-4, atol=1e-6 * np.abs(found[1]).max(initial=0)):
        raise DataError(f"reference: {path}: {cov} is not symmetric, so no covariance")
    if (least := np.diagonal(found[1]).min()) < 0:
        raise DataError(f"reference: {path}: {cov} has a variance of {least:.3g}, so is no covariance")
    return found
