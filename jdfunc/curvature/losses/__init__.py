"""The loss seen from the outputs: likelihoods, their targets, and the kinds of Fisher matrices."""
