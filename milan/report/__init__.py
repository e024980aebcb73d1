"""What came out: results, claims, tables, plots, figures, the page, sweeps and studies."""
