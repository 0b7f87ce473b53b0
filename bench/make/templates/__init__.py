"""The templates of `workflows/`: a graph for each family, a job done with it, a note, a picture."""
