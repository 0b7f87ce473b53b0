"""From a plan to a file: the header, the tensors of the output, and file to file without a model in memory."""
