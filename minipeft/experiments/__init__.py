"""Experiments on the shipped base: the methods with their usual settings, and what one run costs, learns and forgets."""
