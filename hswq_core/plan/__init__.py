"""How each layer is stored: the plan, its byte budget, and the file formats it is written in."""
