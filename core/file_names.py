"""Names of files that onecard writes beside the weights, known without loading torch."""

# The record of a run.
RECORD_NAME = "onecard.json"
