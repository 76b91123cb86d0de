"""Quantisation: a float graphs folder and what the parent's layers were given in, INT8 or FP8 graphs with explicit Q/DQ out."""

from nitro_export.quantise.attribution import LayerError, attribute
from nitro_export.quantise.calibration import calibrate
from nitro_export.quantise.qdq import quantise_graphs
from nitro_export.quantise.recipe import KeptLayer, QuantisationRecipe, QuantisedLayer

__all__ = ["KeptLayer", "LayerError", "QuantisationRecipe", "QuantisedLayer", "attribute", "calibrate", "quantise_graphs"]
