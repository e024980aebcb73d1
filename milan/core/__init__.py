"""General tools: errors, validation, atomic files, digests, progress, parallel work, redaction, the code that a stage runs."""
