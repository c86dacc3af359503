"""Measurements of asl_pallas, on the device at hand and compiled for those that aren't here."""
