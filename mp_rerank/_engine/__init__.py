"""The model on its device, and what makes it fast. The only wing that imports torch; only a worker imports it.

    engine.py        the model on its device: loaded, proved, made fast, fed with batches
    loading.py       loads a ``CrossEncoder``, proves it is whole, and knows what library versions differ in
    fitting.py       cuts a long document, refuses it, or divides it into chunks
    pipeline.py      from texts to scores: tokenize once, collate batches, forward
    batches.py       which pairs of a slice go through the network together
    words.py         the tokens of words seen before, for tokenizers that take a text word by word
    parity.py        keeps an optimization only if scores stay within tolerance
    packed.py        a batch as one row of real tokens
    attention.py     attention within each pair of a packed batch
    forward.py       what takes the place of a base model's ``forward``, for a row of tokens
    varlen.py        on a GPU: that row with attention by bounds, and a CUDA graph for each size of it
    unpad.py         networks that leave out padding, common beginnings and what the head does not read
    disentangled.py  DeBERTa's attention within each pair of a packed batch
    fused.py         norms, rotations and gates in fewer passes over memory
    prepack.py       linear layers laid out for the CPU: in AMX tiles, or by oneDNN
    together.py      layers that are computed together: gates, feed-forward parts, queries with keys and values
    whole_layers.py  a layer of BERT's or ModernBERT's family as one function that calls its kernels
    weights.py       weights as pages of the checkpoint's file, shared by all workers
    amx/             kernels in C++ for CPUs with AMX; built with the wheel, and done without
    backends/        other runtimes: ONNX Runtime and OpenVINO

Knows no worker, no slot and no request: it takes pairs of texts and gives scores.

A *model* is what a ``ModelSpec`` names, loaded: a ``CrossEncoder``, or what a loader of the user's returns. Its
*network* is the transformers model within a ``CrossEncoder``, from tokens to logits. The *encoder* is the network's
layers.
"""
