"""The pretrained models, one file each, and where their weights come from (``weights.py``).

A model has ``batch_size``, ``prepare`` (one decoded image to what the network eats; safe in several threads) and a call
on a batch of prepared images. Batches are always padded to ``batch_size`` before the forward pass, so that a feature
does not depend on where a shard ends. Nothing here is imported before it is needed: torch takes seconds.
"""
