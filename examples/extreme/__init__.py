"""The parts of the extreme-classification example; `examples/train_extreme.py` puts them together."""
