"""fastkd inside training code that people already have; each file imports its framework itself."""
