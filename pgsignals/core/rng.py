"""Chance of our own: a program that seeds ``random`` gets its own numbers, and all of them."""

from random import SystemRandom

# Without a state, so that the child of a fork does not draw what its parent draws.
chance = SystemRandom()
