"""``python -m bench``: pystage and its peers, every regime, in one run."""
