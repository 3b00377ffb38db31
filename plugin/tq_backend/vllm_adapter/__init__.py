"""vLLM's side of the seam: one thin file per contract. The only folder, with register.py, that imports vLLM."""
