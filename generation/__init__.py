"""The parts of generate.py: its options, the folder that it writes to, the formats of its images."""
