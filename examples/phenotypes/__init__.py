"""The parts of the phenotype example; `examples/train_phenotypes.py` puts them together."""
