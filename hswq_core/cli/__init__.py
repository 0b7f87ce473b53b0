"""The command line, ``python -m hswq_core``: the nodes' work without a UI."""
