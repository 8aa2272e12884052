"""Check what training would be called with, without data, weights or devices: python -m tools.check_config FLAGS

FLAGS are those of diversedit_jax.train. An unknown key or variant and a required option that is not set are named, with
exit code 78. The scripts in launch/ ask this before they pay for machines.
"""

from absl import flags

from diversedit_jax import train
from diversedit_jax.runs import check
from diversedit_jax.runtime import cli, processes

if __name__ == "__main__":
    train.define_flags()
    processes.define_flags()
    cli.launch(lambda: check.check(flags.FLAGS.config))
