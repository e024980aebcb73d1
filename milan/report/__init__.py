"""Turn results into a table, charts, figures and a page, with the verdicts on the paper's claims."""
