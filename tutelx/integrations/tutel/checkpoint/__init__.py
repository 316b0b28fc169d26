"""Checkpoints of one number of ranks from those of another, bit for bit: the commands `gather` and `scatter`.

What one rank's file holds for experts is described in :mod:`tutelx.integrations.tutel.checkpoint.layout`.
"""
