"""``python -m bench`` measures pystage and its peers in every regime, in one run."""
