"""An ablation: arms that differ in what was named and in nothing else, run and compared by seeds."""
