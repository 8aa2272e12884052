# shellcheck shell=bash
# Flags of XLA for each platform, each with its reason: source this file, call `xla_flags tpu` or `xla_flags gpu`.
# What XLA_FLAGS holds already comes last and so wins.

xla_flags() {
  local flags=()
  case $1 in
    tpu)
      # None: nothing that we could measure asks for another setting than libtpu's own. Those of TPUs would go into
      # LIBTPU_INIT_ARGS.
      return
      ;;
    gpu)
      # Off by default, on in NVIDIA's JAX images: collectives run beside computation.
      flags+=(--xla_gpu_enable_latency_hiding_scheduler=true)
      if [[ ${DETERMINISTIC:-0} == 1 ]]; then
        # Without it the same run differs in its last bits from time to time; with it, it is slower.
        flags+=(--xla_gpu_deterministic_ops=true)
      fi
      # Of the memory of a GPU that only trains; jax takes 0.75 by default, NVIDIA recommends 0.8 to 0.9.
      export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
      ;;
  esac
  export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
}
