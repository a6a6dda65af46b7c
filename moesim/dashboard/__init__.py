"""Streamlit pages over the command line: they choose inputs and show results, and compute nothing."""
