"""fastkd inside the frameworks that people train with: one small file for each."""
