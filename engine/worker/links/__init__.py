"""Links carry KV from a mesh of one process to a mesh of another: `link` is the contract, one file for each kind."""
