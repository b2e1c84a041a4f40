"""The bundled DINOv2 trainer: from a manifest to a backbone.

Importing this package imports no PyTorch; ``curation.dinov2.train`` does. What flows, in order:

    data (manifest → encoded bytes → pixels) → crops (views, uint8) → colour (augmentation, on the device)
        → model + heads (student, teacher) → losses → optim → checkpoint

Shape legend: N images or views, B images a batch, V views of one size, T tokens, P patches, D features, K prototypes,
M masked patches, H and W pixels. Views of one size are stacked crop-major: all first crops, then all second crops.

No random number comes from a stream: each is a function of the seed, the purpose and the position of the sample
(``curation.dinov2.randomness``). A run that was interrupted therefore goes on exactly where it was.
"""
