"""The ablation laboratory: arms that differ in what was asked for, and what may be said of them."""
