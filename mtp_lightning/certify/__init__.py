"""``mtp-lightning certify MODEL`` tests whether drafts change a model's text.

Plain decoding of one text on one thread is the reference. Every cell decodes the same prompts in
another way (``cells.py``): with drafts, in a batch whose rows come and go, on more threads, or from
a prefix that is read again. Greedy texts are compared token by token and their logits bit by bit
(``greedy.py``); sampled tokens are tested against the trunk's distribution (``sampled.py``).
``certificate.py`` shows the results as a table, as JSON and as a badge.

This folder is optional: the core does not import it.
"""
