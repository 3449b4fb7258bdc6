"""The measured claims about speed, memory and bits, each a ``python -m benchmarks.NAME``.

================  =================================================================
against           optimizer steps, decoding and start-up by two commits
same_bits         training by two commits, compared bit by bit
train_step        an optimizer step by depths, heads, precision; its parts (profiles)
head              the loss of the shared head, and every objective
kernels           the layers' C++ next to PyTorch
overhead          a run next to a bare loop; validations; checkpoints
runs              start-up, threads, the choice of the main job
data              loader, token store, encoder
decode            plain and speculative decoding, trees, compiled passes
rounds            a decoding round by part, and the cost of its passes
serve             the HTTP server by the number of clients
peers             a step next to transformers and litgpt
llama_cpp         a GGUF file next to llama.cpp
pretrained_heads  heads on a pretrained trunk next to transformers and llama.cpp
decoding_figure   the figure of its results
gpu               steps and decoding passes on a GPU
================  =================================================================

They share harness (turns, processes, memory), cli (options, tables, JSON) and workloads (a step, a
decoding).
"""
