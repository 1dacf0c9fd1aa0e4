"""Logits are computed by slices of tokens and of the vocabulary: whole, they would need gigabytes."""

# A slice of 1024 tokens and 16384 columns has 64 MiB in fp32.
TOKENS_PER_SLICE, COLUMNS_PER_SLICE = 1024, 16384
# fp32 arrays of one slice's size that a comparison of two models holds at once, about.
ARRAYS_PER_SLICE = 6
