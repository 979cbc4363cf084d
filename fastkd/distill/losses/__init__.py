"""Losses beside the divergences: logits, features, relations, attention, other vocabularies."""
