"""Clips on their way to the model: manifests, decoding, preprocessing, the demo set.

Nothing is imported here, so that reading a manifest costs no torch.
"""
