"""How logits are cut by tokens and columns: of a vocabulary of 202,048, 1024 tokens alone are 0.8 GB in fp32.

The walks that compute logits cut by these numbers, and the planner counts memory by them.
"""

# In fp32 a slice of so many tokens and columns is 64 MiB.
TOKENS_PER_SLICE, COLUMNS_PER_SLICE = 1024, 16384
# About so many arrays of a slice's size live at once while two models are compared.
ARRAYS_PER_SLICE = 6
