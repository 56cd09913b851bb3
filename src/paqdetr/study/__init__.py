"""Variants of a model compared over data sets and seeds: what is run, how the runs are kept, and what they say."""
