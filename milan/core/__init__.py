"""What is general: errors, files written whole or not at all, progress, parallel work, redaction, the code that a stage runs."""
