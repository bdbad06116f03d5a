"""The commands: one module each, with `add_arguments(parser)` and `run(args) -> exit code`.

A module here imports its side (export, runtime) inside `run`, so that `sdopt COMMAND --help` is instant.
stdout is the result, stderr is everything else.
"""
