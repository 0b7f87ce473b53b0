"""The templates in `workflows/`: a graph for each family, a job to do with it, a note, a picture."""
