"""``mtp-lightning certify MODEL``: whether drafts change a model's text, tried and written down.

Plain decoding of one text on one thread is the reference. Every cell decodes the same prompts in
another way (``cells.py``): with drafts, in a batch whose rows come and go, on more threads, from a
prefix that is read again. Greedy texts are compared token by token and their logits bit by bit
(``greedy.py``); sampled tokens are held against the distribution that they claim to be drawn from
(``sampled.py``). ``certificate.py`` keeps what was found, as a table, as JSON and as a badge.

This folder comes off, and the core knows nothing of it.
"""
