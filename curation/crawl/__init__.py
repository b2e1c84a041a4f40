"""From pages, lists and image sets to links, and from links to checked images.

``inputs.read_inputs`` yields what the inputs of a run hold; ``fetcher.fetch`` turns links into bytes that decode, or a
reason. Nothing is imported here: what reads settings needs no HTTP client.
"""
