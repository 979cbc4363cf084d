"""Losses beside the divergences: of logits, features, relations, attention and other vocabularies."""
