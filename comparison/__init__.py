"""The parts of compare.py: its options, its results, and the table and plots that are made from them."""
