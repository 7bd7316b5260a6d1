"""A random generator of our own, which takes no numbers from a program that seeds ``random``."""

from random import SystemRandom

# Without a state, so that the child of a fork does not draw what its parent draws.
chance = SystemRandom()
