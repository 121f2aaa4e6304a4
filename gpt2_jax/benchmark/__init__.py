"""The benches behind scripts/bench_matmul.py and scripts/bench_train.py, and the peers that they compare with."""
