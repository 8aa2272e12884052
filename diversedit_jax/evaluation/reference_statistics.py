"""What samples are compared with: statistics of real images, in the file formats of the field.

adm            .npz: mu, sigma, mu_s, sigma_s of all images, and `arr_0`, some of them, such as
               VIRTUAL_imagenet256_labeled.npz.
images         .npz with `arr_0` alone, or a folder of images: statistics are computed from them.
torch_fidelity .npz: mu, sigma; also pytorch-fid and MAR.
meanflow       .npz: ref_mu, ref_sigma.
edm2           .pkl: {"fid": {"mu", "sigma"}, "fd_dinov2": {...}}.
diversedit_jax .npz of tools.reference_stats: like adm, with arrays of other networks below their names, features of
               single images, and how the file was made.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diversedit_jax.data import local_path
from diversedit_jax.errors import DataError, WeightsError, check_machine
from diversedit_jax.evaluation import image_files
from diversedit_jax.evaluation.image_files import SampleFiles
from diversedit_jax.reading import Npz, RegularFile, parse_json
from diversedit_jax.weights import hub
from diversedit_jax.weights.formats import numpy_pickle
from diversedit_jax.weights.formats.weights_file import file_digest

Gaussian = tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d d], float64
ABOUT = "about"  # in our own files: JSON
EDM2 = {"fid": "inception", "fd_dinov2": "dinov2"}


class Statistics(NamedTuple):
    """Statistics of the reference in the features of one network. None: the file lacks them.

    pool, spatial: Gaussians fitted to these features.
    features:      pool features [m d] of single images, for precision, recall and kernel distance.
    digest:        of the network's weights, see `extractors.digest`.
    """

    pool: Gaussian
    spatial: Gaussian | None = None
    features: np.ndarray | None = None
    digest: str | None = None


class Reference(NamedTuple):
    """A file of statistics. by_network: name of the extractor -> Statistics. images: in the file, or None."""

    by_network: Mapping[str, Statistics]
    images: SampleFiles | None
    about: dict[str, Any]


def open_reference(path: str | Path) -> Reference:
    """Open the reference in a file or folder, or named as on the hub (`weights.hub`).

    DataError, in one line, if it is in no format of this module.
    """
    path = hub.local(local_path("reference", path))
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
        with Npz(path) as arrays:
            return _of_arrays(path, arrays, about)
    except (OSError, ValueError, MemoryError) as error:
        check_machine(error)
        raise DataError(f"reference: {path} cannot be read: {error}".partition("\n")[0]) from error


def _of_arrays(path: Path, arrays: Npz, about: dict[str, Any]) -> Reference:
    """The reference in the arrays of an .npz. Those that it does not need are not read."""
    names, images = set(arrays), None
    if image_files.ARRAY in names:
        images = image_files.of_array(path, image_files.stored_array(path, image_files.ARRAY))
    if ABOUT in names:
        try:
            made = parse_json(str(arrays[ABOUT]))
            digests = {name: one.get("weights", {}).get("digest") for name, one in made["extractors"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise DataError(f"reference: {path}: {ABOUT} was not written by tools.reference_stats: {why}") from error
        prefixes = {name: "" if name == "inception" else f"{name}/" for name in digests}
        by_network = {name: _statistics(path, arrays, prefixes[name], digest) for name, digest in digests.items()}
        return Reference(by_network, images, about | {"format": "diversedit_jax", "made": made})
    plain = names & {"mu", "sigma"}
    if {"ref_mu", "ref_sigma"} <= names:
        kind, arrays = "meanflow", {"mu": arrays["ref_mu"], "sigma": arrays["ref_sigma"]}
    elif names & {"mu_s", "sigma_s"} or (plain and images):
        kind = "adm"
    elif plain:
        kind = "torch_fidelity"
    elif images is not None:
        return Reference({}, images, about | {"format": "images"})
    else:
        held = ", ".join(sorted(names)) or "nothing"
        raise DataError(f"reference: {path} holds {held}: wanted mu and sigma, or arr_0")
    return Reference({"inception": _statistics(path, arrays)}, images, about | {"format": kind})


def _edm2(path: Path) -> dict[str, Statistics]:
    try:
        with RegularFile(path) as file:
            content = numpy_pickle.load(file.read())
    except (OSError, WeightsError, ValueError, MemoryError) as error:
        check_machine(error)
        raise DataError(f"reference: {path} cannot be read: {error}") from error
    found = {EDM2[key]: value for key, value in content.items() if key in EDM2} if isinstance(content, dict) else {}
    if not found or not all(isinstance(value, dict) for value in found.values()):
        raise DataError(f"reference: {path} holds no statistics: wanted a dict with {' or '.join(EDM2)}")
    return {name: _statistics(path, value) for name, value in found.items()}


def _statistics(path: Path, arrays: Mapping[str, Any], prefix: str = "", digest: str | None = None) -> Statistics:
    pool = _gaussian(path, arrays, f"{prefix}mu", f"{prefix}sigma")
    names = f"{prefix}mu_s", f"{prefix}sigma_s"
    spatial = _gaussian(path, arrays, *names) if any(name in arrays for name in names) else None
    if f"{prefix}features" not in arrays:
        return Statistics(pool, spatial, None, digest)
    features, d = np.asarray(arrays[f"{prefix}features"]), len(pool[0])
    if features.ndim != 2 or features.shape[1] != d or not np.issubdtype(features.dtype, np.floating):
        given = f"{features.dtype} {list(features.shape)}"
        raise DataError(f"reference: {path}: features of single images are {given}, wanted floats [m {d}]")
    if not np.isfinite(features).all():
        raise DataError(f"reference: {path}: features of single images are not finite")
    return Statistics(pool, spatial, features, digest)


def _gaussian(path: Path, arrays: Mapping[str, Any], mean_name: str, cov_name: str) -> Gaussian:
    for name in (mean_name, cov_name):
        if name not in arrays:
            raise DataError(f"reference: {path} has no {name}, it holds {', '.join(map(str, arrays))}")
    given = arrays[mean_name], arrays[cov_name]
    try:
        mean, cov = (np.asarray(array, np.float64) for array in given)
    except (ValueError, TypeError) as error:
        raise DataError(f"reference: {path}: {mean_name} or {cov_name} is no array of numbers: {error}") from error
    if not mean.size or mean.shape != (mean.size,) or cov.shape != (mean.size, mean.size):
        shapes = f"{list(mean.shape)} and {list(cov.shape)}"
        raise DataError(f"reference: {path}: {mean_name} and {cov_name} have shapes {shapes}, wanted [d] and [d d]")
    for name, array in ((mean_name, mean), (cov_name, cov)):
        if not np.isfinite(array).all():
            raise DataError(f"reference: {path}: {name} is not finite")
    if not np.allclose(cov, cov.T, rtol=1e-4, atol=1e-6 * np.abs(cov).max()):
        raise DataError(f"reference: {path}: {cov_name} is not symmetric, so no covariance")
    if (least := np.diagonal(cov).min()) < 0:
        raise DataError(f"reference: {path}: {cov_name} has a variance of {least:.3g}, so is no covariance")
    return mean, cov
