"""The tables and plots of the pages, from bench/results."""
