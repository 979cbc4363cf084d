"""fastkd inside other frameworks: one small file each, imported by name."""
