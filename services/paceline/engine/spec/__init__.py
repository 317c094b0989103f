"""Speculative decoding: drafters propose trees of tokens, the target verifies them in one pass.

The way of a round: controller.py says how much to draft for whom, a drafter (drafters/) grows
a tree (builders.py), the runner computes all its nodes with the decode step, verify.py keeps
the path that the target would have taken itself, and everybody learns from what happened.
speculator.py holds the parts together; the engine calls nothing else of this package.
"""
