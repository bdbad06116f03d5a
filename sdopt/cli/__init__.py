"""The commands: one module each, with `add_arguments(parser)` and `run(args) -> exit code`.

A module here imports the export or the runtime inside `run`, so that `sdopt COMMAND --help` is instant.
Results go to stdout, and everything else goes to stderr.
"""
