"""Results in, pictures out: front, estimates over seeds, ablation table, plots, exports. Knows no database."""
