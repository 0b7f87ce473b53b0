"""Method model_aware: gather inputs, round, probe, choose what stays in 16 bits, verify."""
