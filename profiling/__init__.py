"""Measurements of asl_pallas, on the device at hand and compiled for those that aren't here.

`cases` and `contenders` say what is measured; `memory`, `speed`, `schedule` and `parity` measure it; `session` runs
their jobs; `results` keeps rows and runs; `tables`, `plots`, `readme` and `report` show them. `targets` compiles for
absent chips, `local` knows the machine, `bounds` and `pod` are commands of their own.
"""
