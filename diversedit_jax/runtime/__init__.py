"""The machinery of a running program: processes, locks, the command line, metrics, files, progress."""
