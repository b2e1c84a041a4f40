"""Neighbours, components, clusters and samples over stored vectors, with NumPy, Numba and Faiss.

Every answer here is a function of the *set* of (key, vector) pairs: not of row order, blocks, shards or threads.
``vectors`` says why that is possible (exact float64 dot products of float16 rows), Faiss only preselects (in
``preselect``, and for short codes in ``binary``), and every tie is broken by key.

=============  =======================================================================================
keys           an image id as two uint64 numbers
vectors        checked float16 → float32, and the rounded similarity that decisions are taken on
preselect      float32 scores with a proven error bound: which pairs can matter at all
exact          all pairs above a threshold, nearest references, best match
pairs          all pairs above a floor behind one interface: exact, or approximate with a promised recall
inverted       the approximate one: fitted rotations, and rows found by their hashes
cross_polytope codes of rows: sketches of signs, and hashes of random rotations
collisions     pairs of rows whose codes collide
identical      rows with equal bytes, compared once
flat           an exact index: add, search, merge, save, load
components     connected components by a streaming union-find
sampling       the n smallest hashes of (seed, key)
assignment     the nearest centroid of each point
seeding        first centroids, by rounds of k-means++ on a sample
kmeans         spherical k-means by partial sums
hierarchy      clusters of clusters, with resampling
balanced       equal shares for all branches of the hierarchy
npz            arrays in files
=============  =======================================================================================
"""
