"""Experiments on the shipped base: methods with their usual settings, and what a run costs, learns and forgets."""
