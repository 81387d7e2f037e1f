"""The parts of `gpu.py`. Each yields what it measures, one by one, as a name and the work that gives its figures."""
