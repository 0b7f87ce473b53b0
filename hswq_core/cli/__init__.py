"""The command line, ``python -m hswq_core``: the nodes' work for people without a screen."""
