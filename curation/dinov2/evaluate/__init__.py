"""What a backbone is worth: k-NN, linear probe, logistic regression, spectra and pictures of frozen features.

::

    labelled.py     images with classes: Parquet, a folder for each class
    backbones.py    a run, an export, published weights, a timm name; random weights and raw pixels beside
    features.py     one pass over the images; features in files that are mapped, not held
    knn.py linear.py logistic.py spectrum.py pictures.py    the measures
    evaluation.py   all of them for all rows; tables.py shows what came of it
"""
