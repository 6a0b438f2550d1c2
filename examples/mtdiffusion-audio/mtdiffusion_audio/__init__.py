"""Waveforms for mtdiffusion, and digits that are seen, heard and described. Each module is a plugin."""
