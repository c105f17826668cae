"""The parts of evaluate.py: its options and inputs, feature extractors, and torch-fidelity's metrics."""
