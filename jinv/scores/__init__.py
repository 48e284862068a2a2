"""How good images are: what networks say of them, and how near they are to originals."""
