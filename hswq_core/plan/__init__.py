"""Which layer is stored how: the plan, the byte budget it keeps to, the file formats it is written in."""
