"""Names of the baselines: LRU, which every strategy is compared with, and the optimum that bounds them all."""

LRU, OPTIMAL = "lru", "optimal"
