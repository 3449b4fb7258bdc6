"""Claims about multi-token prediction: predicted first, run by one command, judged by code."""
