"""What makes the layers fast on one device, and the same bits in every pass of decoding.

Each file holds one operation: the plain composition, and beside it what is faster where it applies.
The layers call it in a line; nothing here knows of a layer.
"""
