"""Results in, pictures out: the front, estimates over seeds, the ablation table, plots and exports. Knows no database."""
