"""Tasks: questions of lm-eval, from its registry, a hub or a data pack to requests, scores and the ledger."""
