"""Recognisers of other people's MoE layers, one file a style, and what they share.

A recogniser looks at the structure first and at the numbers last, and declines with a named reason when it is not sure.
"""
