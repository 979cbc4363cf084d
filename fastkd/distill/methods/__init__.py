"""Schemes over the trainer: several models, several runs, a student made of its teacher."""
