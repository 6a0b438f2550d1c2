"""Evaluators, and what they measure with. :func:`frechet_distance` is for other people's evaluators, too."""

from mtdiffusion_plugins.metrics.distances import frechet_distance

__all__ = ["frechet_distance"]
